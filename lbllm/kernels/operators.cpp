// The operators of torch.ops.lbllm on the CPU.

#include "attention.h"
#include "packed.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

namespace {

using at::Tensor;

Weights weights_of(const Tensor& words, const Tensor& params, const std::optional<Tensor>& scale, int64_t columns,
                   int64_t length) {
  const int count = static_cast<int>(params.size(2));
  const Shape shape(columns, length, count / 2);
  TORCH_CHECK(words.scalar_type() == at::kInt && words.is_contiguous() && words.dim() == 3 &&
                  words.size(1) == shape.words && words.size(2) == LANES,
              "packed_linear: words must be the contiguous int32 tensor that pack_words makes of these sizes");
  TORCH_CHECK(params.is_contiguous() && params.size(0) == words.size(0) && params.size(1) == shape.groups &&
                  (count == 2 || count == 4) &&
                  params.scalar_type() == (scale ? at::kByte : at::kHalf),
              "packed_linear: params must be contiguous (rows, groups, 2 or 4), float16, or uint8 with a scale");
  const uint16_t* affine = nullptr;
  if (scale) {
    TORCH_CHECK(scale->is_contiguous() && scale->scalar_type() == at::kHalf &&
                    scale->numel() == words.size(0) * count * 2,
                "packed_linear: params_scale must be contiguous float16 (rows, levels, 2)");
    affine = static_cast<const uint16_t*>(scale->const_data_ptr());
  }
  return {shape, reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()),
          {params.const_data_ptr(), affine, shape.groups, count}};
}

// y (..., rows) = x (..., columns) W^T + bias, in x's dtype; summed in float32.
Tensor packed_linear(const Tensor& x, const Tensor& words, const Tensor& params, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& bias, int64_t columns, int64_t length) {
  const Weights w = weights_of(words, params, scale, columns, length);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == columns, "packed_linear: the last dimension of x must be ", columns);
  const int64_t rows = words.size(0), tokens = x.numel() / columns;
  const bool one = w.params.count == 2;
  const Tensor input = x.reshape({tokens, columns}).to(at::kFloat).contiguous();
  Tensor y = at::empty({tokens, rows}, input.options());
  if (tokens <= FEW) {
    std::vector<float> room;
    const float* laid = laid_out(w.shape, input.const_data_ptr<float>(), tokens, room);
    const Job job{w, rows, laid, y.data_ptr<float>()};
    multiply_few(&job, 1, tokens);
  } else {
    const int64_t tile = std::max<int64_t>(64, EXPANDED / columns);
    Tensor dense = at::empty({std::min(tile, rows), columns}, input.options());
    for (int64_t row = 0; row < rows; row += tile) {
      const int64_t count = std::min(tile, rows - row);
      (one ? expand_rows<1> : expand_rows<2>)(w, row, row + count, dense.data_ptr<float>());
      Tensor part = y.narrow(1, row, count);
      part.copy_(at::mm(input, dense.narrow(0, 0, count).t()));
    }
  }
  if (bias) y.add_(*bias);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  return y.reshape(sizes).to(x.scalar_type());
}

// Planes uint8 (rows, bits, ceil(columns / 8)) of a checkpoint to words int32 (rows, words, LANES).
Tensor pack_words(const Tensor& planes, int64_t columns, int64_t length) {
  TORCH_CHECK(planes.scalar_type() == at::kByte && planes.is_contiguous() && planes.dim() == 3 &&
                  (planes.size(1) == 1 || planes.size(1) == 2) && planes.size(2) == (columns + 7) / 8,
              "pack_words: planes must be contiguous uint8 (rows, 1 or 2, ceil(columns / 8))");
  const int bits = static_cast<int>(planes.size(1));
  const Shape shape(columns, length, bits);
  const int64_t rows = planes.size(0), bytes = planes.size(2), per_word = 32 / bits;
  Tensor words = at::empty({rows, shape.words, LANES}, planes.options().dtype(at::kInt)).zero_();
  const uint8_t* from = planes.const_data_ptr<uint8_t>();
  auto* to = reinterpret_cast<uint32_t*>(words.data_ptr<int32_t>());
  at::parallel_for(0, rows, std::max<int64_t>(1, WORK / columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      shape.each_group([&](int64_t column, int64_t first, int64_t width) {
        for (int64_t offset = 0; offset < width; ++offset) {
          const int64_t c = column + offset, step = (first + offset) / LANES, lane = (first + offset) % LANES;
          uint32_t code = 0;
          for (int bit = 0; bit < bits; ++bit)
            code |= ((from[(row * bits + bit) * bytes + c / 8] >> (c % 8)) & 1u) << bit;
          to[(row * shape.words + step / per_word) * LANES + lane] |= code << (step % per_word * bits);
        }
      });
  });
  return words;
}

// The inverse of pack_words.
Tensor unpack_words(const Tensor& words, int64_t columns, int64_t length, int64_t bits) {
  const Shape shape(columns, length, static_cast<int>(bits));
  TORCH_CHECK(words.scalar_type() == at::kInt && words.is_contiguous() && words.dim() == 3 &&
                  words.size(1) == shape.words && words.size(2) == LANES,
              "unpack_words: words must be the contiguous int32 tensor that pack_words makes of these sizes");
  const int64_t rows = words.size(0), bytes = (columns + 7) / 8, per_word = 32 / bits;
  Tensor planes = at::empty({rows, bits, bytes}, words.options().dtype(at::kByte)).zero_();
  const auto* from = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  uint8_t* to = planes.data_ptr<uint8_t>();
  at::parallel_for(0, rows, std::max<int64_t>(1, WORK / columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      shape.each_group([&](int64_t column, int64_t first, int64_t width) {
        for (int64_t offset = 0; offset < width; ++offset) {
          const int64_t c = column + offset, step = (first + offset) / LANES, lane = (first + offset) % LANES;
          const uint32_t code = from[(row * shape.words + step / per_word) * LANES + lane] >> (step % per_word * bits);
          for (int64_t bit = 0; bit < bits; ++bit)
            to[(row * bits + bit) * bytes + c / 8] |= static_cast<uint8_t>(((code >> bit) & 1u) << (c % 8));
        }
      });
  });
  return planes;
}

// x (..., features) on the grid of each token.
Tensor quantize_activations(const Tensor& x, double knee, double clip_low, double clip_high, int64_t bits,
                            int64_t tail) {
  const Quantizer quantizer{static_cast<int>(bits), static_cast<int>(tail), static_cast<float>(knee),
                            static_cast<float>(clip_low), static_cast<float>(clip_high)};
  const Tensor input = x.to(at::kFloat).contiguous();
  Tensor out = at::empty_like(input);
  const int64_t features = x.size(-1), tokens = x.numel() / features;
  const float* from = input.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, tokens, std::max<int64_t>(1, WORK / features / 4), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      quantizer.apply(from + token * features, to + token * features, features);
  });
  return out.to(x.scalar_type());
}

// x (..., columns) times W^T for W (rows, columns) in bfloat16, in float32: bytes are what an output head costs.
Tensor bfloat16_linear(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.is_contiguous() && weight.dim() == 2,
              "bfloat16_linear: weight must be contiguous bfloat16 (rows, columns)");
  const int64_t rows = weight.size(0), columns = weight.size(1), tokens = x.numel() / columns;
  TORCH_CHECK(x.size(-1) == columns, "bfloat16_linear: the last dimension of x must be ", columns);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  if (tokens > FEW) {
    // Many tokens: a tile of the weight at a time in float32.
    const Tensor input = x.reshape({tokens, columns}).to(at::kFloat);
    Tensor y = at::empty({tokens, rows}, input.options());
    const int64_t tile = std::max<int64_t>(64, EXPANDED / columns);
    for (int64_t row = 0; row < rows; row += tile) {
      const int64_t count = std::min(tile, rows - row);
      Tensor part = y.narrow(1, row, count);
      part.copy_(at::mm(input, weight.narrow(0, row, count).to(at::kFloat).t()));
    }
    return y.reshape(sizes);
  }
  const Tensor input = x.reshape({tokens, columns}).to(at::kFloat).contiguous();
  Tensor y = at::empty({tokens, rows}, input.options());
  const auto* w = static_cast<const uint16_t*>(weight.const_data_ptr());
  const float* from = input.const_data_ptr<float>();
  float* to = y.data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, WORK / columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t token = 0; token < tokens; ++token)
        to[token * rows + row] = dot_bfloat16(w + row * columns, from + token * columns, columns);
  });
  return y.reshape(sizes);
}

Weights weights_at(at::TensorList words, at::TensorList params, const c10::List<std::optional<Tensor>>& scales,
                   at::IntArrayRef columns, at::IntArrayRef lengths, int k) {
  return weights_of(words[k], params[k], scales.get(k), columns[k], lengths[k]);
}

// One token (1, 1, hidden) through a whole decoder block of LLaMA's kind, its keys and values kept in 4 bits.
//
// `norms`: before attention and before the MLP, and where a model has them those of each head's query and key. The layers are q, k, v, o, gate, up, down; `quantizers` has five numbers for each: bits (0: none), tail, knee and the
// two clips. `cache`: codes and scales of the keys, codes and scales of the values, with room for one more token at
// `position`.
Tensor decode_block(const Tensor& hidden, const Tensor& cosine, const Tensor& sine, at::TensorList norms,
                    at::TensorList words, at::TensorList params, const c10::List<std::optional<Tensor>>& scales,
                    const c10::List<std::optional<Tensor>>& biases, at::ArrayRef<double> quantizers,
                    at::IntArrayRef columns, at::IntArrayRef lengths, at::TensorList cache, int64_t position,
                    int64_t heads, int64_t kv_heads, double scaling, double epsilon) {
  const int64_t size = hidden.numel(), dim = cosine.size(-1);
  TORCH_CHECK(hidden.scalar_type() == at::kFloat && hidden.is_contiguous() && size == columns[0] && words.size() == 7 &&
                  params.size() == 7 && quantizers.size() == 35 && cache.size() == 4 && (norms.size() == 2 || norms.size() == 4),
              "decode_block: one token, seven layers, two or four norms and four tensors of cache are expected");
  for (const Tensor& tensor : norms)
    TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous(), "decode_block: norms must be float32");
  for (const Tensor& tensor : {cosine, sine})
    TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous(),
                "decode_block: rotary embeddings must be contiguous float32");
  TORCH_CHECK(norms[0].numel() == size && norms[1].numel() == size &&
                  (norms.size() == 2 || (norms[2].numel() == dim && norms[3].numel() == dim)),
              "decode_block: norms of another size");
  TORCH_CHECK(cosine.numel() == dim && sine.numel() == dim && heads % kv_heads == 0 && dim % 2 == 0,
              "decode_block: one position's rotary embedding and whole groups of heads are expected");
  std::vector<Weights> w;
  std::vector<Quantizer> q;
  for (int k = 0; k < 7; ++k) {
    w.push_back(weights_at(words, params, scales, columns, lengths, k));
    const double* five = quantizers.data() + 5 * k;
    q.push_back({static_cast<int>(five[0]), static_cast<int>(five[1]), static_cast<float>(five[2]),
                 static_cast<float>(five[3]), static_cast<float>(five[4])});
  }
  TORCH_CHECK(words[0].size(0) == heads * dim && words[1].size(0) == kv_heads * dim &&
                  words[2].size(0) == kv_heads * dim && columns[3] == heads * dim && words[3].size(0) == size &&
                  words[6].size(0) == size && words[4].size(0) == columns[6] && words[5].size(0) == columns[6],
              "decode_block: the layers' sizes don't fit each other");
  Cache kept[2];
  for (int which = 0; which < 2; ++which) {
    const Tensor &codes = cache[2 * which], &scale = cache[2 * which + 1];
    TORCH_CHECK(codes.is_contiguous() && scale.is_contiguous() && codes.scalar_type() == at::kByte &&
                    scale.scalar_type() == at::kHalf && codes.dim() == 4 && codes.size(0) == 1 &&
                    codes.size(1) == kv_heads && codes.size(2) > position && codes.size(3) == dim / 2 &&
                    scale.size(2) == codes.size(2),
                "decode_block: the cache has no room, or another shape");
    kept[which] = {codes.data_ptr<uint8_t>(), reinterpret_cast<uint16_t*>(scale.data_ptr<at::Half>()), codes.size(2),
                   dim};
  }

  // A step's layers read one input: quantized once where their quantizers agree.
  std::vector<float> room[3], laid[3];
  const auto run = [&](int first, int count, const std::vector<float>& input, std::vector<float>* outputs) {
    Job jobs[3];
    const float* last = nullptr;
    for (int j = 0; j < count; ++j) {
      const int k = first + j;
      const float* from = input.data();
      if (q[k].bits) {
        if (j == 0 || !(q[k] == q[k - 1])) {
          room[j].resize(columns[k]);
          q[k].apply(input.data(), room[j].data(), columns[k]);
          last = room[j].data();
        }
        from = last;
      }
      outputs[j].resize(words[k].size(0));
      jobs[j] = {w[k], words[k].size(0), laid_out(w[k].shape, from, 1, laid[j]), outputs[j].data()};
    }
    multiply_few(jobs, count, 1);
    for (int j = 0; j < count; ++j) {
      const std::optional<Tensor> bias = biases.get(first + j);
      if (!bias) continue;
      const Tensor values = bias->to(at::kFloat).contiguous();
      for (size_t i = 0; i < outputs[j].size(); ++i) outputs[j][i] += values.const_data_ptr<float>()[i];
    }
  };

  const float* x = hidden.const_data_ptr<float>();
  std::vector<float> normed(size), stream(x, x + size), qkv[3], attended(heads * dim), projected[1], gated[2];
  const auto norm = [&](const Tensor& weight, const float* values, float* result) {
    const int64_t count = weight.numel();
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]) * values[i];
    const float factor = 1.0f / std::sqrt(static_cast<float>(sum / count) + static_cast<float>(epsilon));
    for (int64_t i = 0; i < count; ++i) result[i] = weight.const_data_ptr<float>()[i] * (values[i] * factor);
  };

  norm(norms[0], stream.data(), normed.data());
  run(0, 3, normed, qkv);
  for (size_t which = 2; which < norms.size(); ++which)
    for (float* head = qkv[which - 2].data(); head != qkv[which - 2].data() + qkv[which - 2].size(); head += dim)
      norm(norms[which], head, head);
  rotate(qkv[0].data(), heads, dim, cosine.const_data_ptr<float>(), sine.const_data_ptr<float>());
  rotate(qkv[1].data(), kv_heads, dim, cosine.const_data_ptr<float>(), sine.const_data_ptr<float>());
  for (int which = 0; which < 2; ++which)
    for (int64_t head = 0; head < kv_heads; ++head)
      kept[which].append(head, position, qkv[which + 1].data() + head * dim);
  attend(qkv[0].data(), kept[0], kept[1], position + 1, heads, kv_heads, static_cast<float>(scaling), attended.data());
  run(3, 1, attended, projected);
  for (int64_t i = 0; i < size; ++i) stream[i] += projected[0][i];

  norm(norms[1], stream.data(), normed.data());
  run(4, 2, normed, gated);
  for (size_t i = 0; i < gated[0].size(); ++i) gated[0][i] = gated[0][i] / (1.0f + std::exp(-gated[0][i])) * gated[1][i];
  run(6, 1, gated[0], projected);
  Tensor out = at::empty_like(hidden);
  for (int64_t i = 0; i < size; ++i) out.data_ptr<float>()[i] = stream[i] + projected[0][i];
  return out;
}

}  // namespace

TORCH_LIBRARY(lbllm, m) {
  m.def("packed_linear(Tensor x, Tensor words, Tensor params, Tensor? scale, Tensor? bias, int columns, int length) -> Tensor");
  m.def("pack_words(Tensor planes, int columns, int length) -> Tensor");
  m.def("unpack_words(Tensor words, int columns, int length, int bits) -> Tensor");
  m.def("bfloat16_linear(Tensor x, Tensor weight) -> Tensor");
  m.def(
      "decode_block(Tensor hidden, Tensor cosine, Tensor sine, Tensor[] norms, Tensor[] words, Tensor[] params, "
      "Tensor?[] scales, Tensor?[] biases, float[] quantizers, int[] columns, int[] lengths, Tensor(a!)[] cache, "
      "int position, int heads, int kv_heads, float scaling, float epsilon) -> Tensor");
  m.def("quantize_activations(Tensor x, float knee, float clip_low, float clip_high, int bits, int tail) -> Tensor");
}

TORCH_LIBRARY_IMPL(lbllm, CPU, m) {
  m.impl("packed_linear", packed_linear);
  m.impl("pack_words", pack_words);
  m.impl("unpack_words", unpack_words);
  m.impl("bfloat16_linear", bfloat16_linear);
  m.impl("decode_block", decode_block);
  m.impl("quantize_activations", quantize_activations);
}
