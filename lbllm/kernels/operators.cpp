// The operators of torch.ops.lbllm on the CPU.

#include "attention.h"
#include "divergence.h"
#include "lookup.h"
#include "packed.h"
#include "team.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <limits>

namespace {

using at::Tensor;

Weights weights_of(const Tensor& words, const Tensor& params, const std::optional<Tensor>& scale, int64_t columns,
                   int64_t length) {
  TORCH_CHECK(params.dim() == 3 && (!scale || scale->dim() == 3),
              "packed_linear: params must be (rows, groups, codes), a scale (rows, levels, 2)");
  const int count = static_cast<int>(scale ? scale->size(1) : params.size(2));
  const int bits = !scale ? 16 : params.size(2) == count ? 8 : 4;
  const Shape shape(columns, length, count / 2);
  TORCH_CHECK(words.scalar_type() == at::kInt && words.is_contiguous() && words.dim() == 3 &&
                  words.size(1) == shape.words && words.size(2) == LANES,
              "packed_linear: words must be the contiguous int32 tensor that pack_words makes of these sizes");
  TORCH_CHECK(params.is_contiguous() && params.size(0) == words.size(0) && params.size(1) == shape.groups &&
                  (count == 2 || count == 4) && params.size(2) == (bits == 4 ? count / 2 : count) &&
                  params.scalar_type() == (scale ? at::kByte : at::kHalf),
              "packed_linear: params must be contiguous (rows, groups, 2 or 4) float16, or with a scale uint8, two codes "
              "of 4 bits a byte");
  const uint16_t* affine = nullptr;
  if (scale) {
    TORCH_CHECK(scale->is_contiguous() && scale->scalar_type() == at::kHalf &&
                    scale->numel() == words.size(0) * count * 2,
                "packed_linear: params_scale must be contiguous float16 (rows, levels, 2)");
    affine = static_cast<const uint16_t*>(scale->const_data_ptr());
  }
  return {shape, reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()),
          {params.const_data_ptr(), affine, shape.groups, count, bits}};
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
    at::parallel_for(0, rows, std::max<int64_t>(4, WORK / std::max<int64_t>(1, columns * tokens)),
                     [&](int64_t begin, int64_t end) { some_rows_of(job, begin, end, tokens); });
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

Quantizer quantizer_of(int64_t bits, int64_t tail, double knee, double clip_low, double clip_high) {
  return {static_cast<int>(bits), static_cast<int>(tail), static_cast<float>(knee), static_cast<float>(clip_low),
          static_cast<float>(clip_high)};
}

// x (..., features) on the grid of each token.
Tensor quantize_activations(const Tensor& x, double knee, double clip_low, double clip_high, int64_t bits,
                            int64_t tail) {
  const Quantizer quantizer = quantizer_of(bits, tail, knee, clip_low, clip_high);
  const Tensor input = x.to(at::kFloat).contiguous();
  Tensor out = at::empty_like(input);
  const int64_t features = x.size(-1), tokens = x.numel() / features;
  const float* from = input.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, tokens, std::max<int64_t>(1, EACH / features), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      quantizer.apply_one(from + token * features, to + token * features, features);
  });
  return out.to(x.scalar_type());
}

// What the gradient of quantize_activations' result is to x, in x's dtype, and to knee, clip_low and clip_high:
// float32 (3).
std::tuple<Tensor, Tensor> quantize_activations_backward(const Tensor& grad, const Tensor& x, double knee,
                                                         double clip_low, double clip_high, int64_t bits,
                                                         int64_t tail, double temperature) {
  const Quantizer quantizer = quantizer_of(bits, tail, knee, clip_low, clip_high);
  TORCH_CHECK(grad.sizes() == x.sizes(), "quantize_activations_backward: grad and x must have one shape");
  const Tensor input = x.to(at::kFloat).contiguous(), given = grad.to(at::kFloat).contiguous();
  Tensor out = at::empty_like(input);
  const int64_t features = x.size(-1), tokens = x.numel() / features;
  const float *from = input.const_data_ptr<float>(), *slope = given.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  std::vector<double> act(3 * tokens);  // of each token, so that the sum is the same for any number of threads
  at::parallel_for(0, tokens, std::max<int64_t>(1, EACH / features), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      quantizer.backward(from + token * features, slope + token * features, to + token * features,
                         act.data() + 3 * token, static_cast<float>(temperature), features);
  });
  Tensor by_act = at::empty({3}, input.options());
  for (int k = 0; k < 3; ++k) {
    double sum = 0;
    for (int64_t token = 0; token < tokens; ++token) sum += act[3 * token + k];
    by_act.data_ptr<float>()[k] = static_cast<float>(sum);
  }
  return {out.to(x.scalar_type()), by_act};
}

// `groups` (rows, n, length) of weights and their `levels` (rows, n, 2 or 4), ascending.
void check_groups(const Tensor& groups, const Tensor& levels) {
  TORCH_CHECK(groups.dim() == 3 && levels.dim() == 3 && groups.size(0) == levels.size(0) &&
                  groups.size(1) == levels.size(1) && (levels.size(2) == 2 || levels.size(2) == 4) &&
                  groups.is_contiguous() && levels.is_contiguous() && groups.scalar_type() == at::kFloat &&
                  levels.scalar_type() == at::kFloat,
              "nearest_level: contiguous float32 groups (rows, n, length) and levels (rows, n, 2 or 4) are needed");
}

// work(group) for every group of weights.
template <class Work>
void each_group(const Tensor& groups, const Work& work) {
  const int64_t count = groups.size(0) * groups.size(1);
  at::parallel_for(0, count, std::max<int64_t>(1, EACH / std::max<int64_t>(1, groups.size(2))),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t group = begin; group < end; ++group) work(group);
                   });
}

// The level nearest to each weight; of two at one distance the lower.
Tensor nearest_level(const Tensor& groups, const Tensor& levels) {
  check_groups(groups, levels);
  Tensor out = at::empty_like(groups);
  const int64_t length = groups.size(2), count = levels.size(2);
  const float *from = groups.const_data_ptr<float>(), *of = levels.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  each_group(groups, [&](int64_t group) {
    const float *x = from + group * length, *level = of + group * count;
    float* y = to + group * length;
    const float first = level[0], second = level[1], low = (first + second) / 2;
    if (count == 2) {
#pragma omp simd
      for (int64_t k = 0; k < length; ++k) y[k] = x[k] > low ? second : first;
      return;
    }
    const float third = level[2], fourth = level[3], middle = (second + third) / 2, high = (third + fourth) / 2;
#pragma omp simd
    for (int64_t k = 0; k < length; ++k) {
      const float inner = x[k] > middle ? third : second;
      const float above = x[k] > high ? fourth : inner;
      y[k] = x[k] > low ? above : first;
    }
  });
  return out;
}

// What the gradient of nearest_level's result is to the levels: each one's sum over its members.
Tensor nearest_level_backward(const Tensor& grad, const Tensor& groups, const Tensor& levels) {
  check_groups(groups, levels);
  TORCH_CHECK(grad.sizes() == groups.sizes(), "nearest_level_backward: grad and groups must have one shape");
  const Tensor given = grad.to(at::kFloat).contiguous();
  Tensor out = at::empty_like(levels);
  const int64_t length = groups.size(2), count = levels.size(2);
  const float *from = groups.const_data_ptr<float>(), *of = levels.const_data_ptr<float>();
  const float* slope = given.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  each_group(groups, [&](int64_t group) {
    const float *x = from + group * length, *g = slope + group * length, *level = of + group * count;
    float* sums = to + group * count;
    // Without four levels the upper two have no members.
    const float low = (level[0] + level[1]) / 2;
    const float middle = count == 4 ? (level[1] + level[2]) / 2 : std::numeric_limits<float>::infinity();
    const float high = count == 4 ? (level[2] + level[3]) / 2 : middle;
    float first = 0, second = 0, third = 0, fourth = 0;
#pragma omp simd reduction(+ : first, second, third, fourth)
    for (int64_t k = 0; k < length; ++k) {
      const bool one = x[k] > low, two = x[k] > middle, three = x[k] > high;
      first += one ? 0.0f : g[k];
      second += one && !two ? g[k] : 0.0f;
      third += two && !three ? g[k] : 0.0f;
      fourth += three ? g[k] : 0.0f;
    }
    sums[0] = first;
    sums[1] = second;
    if (count == 4) {
      sums[2] = third;
      sums[3] = fourth;
    }
  });
  return out;
}

Tiles tiles_of(const Tensor& tiles, const Tensor& params, int64_t columns, int64_t length) {
  TORCH_CHECK(tiles.scalar_type() == at::kByte && tiles.is_contiguous() && tiles.dim() == 4 && columns % 8 == 0 &&
                  tiles.size(1) == columns / 8 && (tiles.size(2) == 1 || tiles.size(2) == 2) && tiles.size(3) == TILE,
              "packed_lookup: tiles must be contiguous uint8 (rows / 32, columns / 8, 1 or 2, 32)");
  // More columns would not fit into 16 bits.
  TORCH_CHECK(length % 8 == 0 && length > 0 && length <= 2048, "packed_lookup: groups have 8, 16, .. 2048 columns");
  const int64_t groups = (columns + length - 1) / length, bits = tiles.size(2);
  TORCH_CHECK(params.is_contiguous() && params.scalar_type() == at::kHalf && params.dim() == 4 &&
                  params.size(0) == tiles.size(0) && params.size(1) == groups && params.size(2) == 2 * bits &&
                  params.size(3) == TILE,
              "packed_lookup: params must be contiguous float16 (rows / 32, groups, 2 or 4, 32)");
  return {tiles.const_data_ptr<uint8_t>(), static_cast<const uint16_t*>(params.const_data_ptr()), columns, length,
          groups, static_cast<int>(bits)};
}

// y (..., rows) = q(x) W^T + bias for x (..., columns), its values put on the grid of 4-bit activations, in x's dtype.
Tensor packed_lookup(const Tensor& x, const Tensor& tiles, const Tensor& params, const std::optional<Tensor>& bias,
                     int64_t columns, int64_t length, double knee, double clip_low, double clip_high, int64_t tail) {
  const Tiles w = tiles_of(tiles, params, columns, length);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == columns, "packed_lookup: the last dimension of x must be ", columns);
  TORCH_CHECK(tail >= 0 && tail <= 7, "packed_lookup: a tail has at most 7 steps");
  const Quantizer quantizer = quantizer_of(4, tail, knee, clip_low, clip_high);
  const int64_t count = tiles.size(0), rows = count * TILE, tokens = x.numel() / columns;
  const Tensor input = x.reshape({tokens, columns}).to(at::kFloat).contiguous();
  const float* from = input.const_data_ptr<float>();
  Tensor y = at::empty({tokens, rows}, input.options());
  float* to = y.data_ptr<float>();
  if (tokens <= FEW) {
    std::vector<Lookup> lookups(tokens);
    for (int64_t token = 0; token < tokens; ++token)
      lookups[token].build(quantizer, from + token * columns, columns, length);
    at::parallel_for(0, count, std::max<int64_t>(1, WORK / std::max<int64_t>(1, TILE * columns * tokens)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t tile = begin; tile < end; ++tile)
                         for (int64_t token = 0; token < tokens; ++token)
                           look_up(w, tile, tile + 1, lookups[token], to + token * rows);
                     });
  } else {
    const Tensor grid = quantize_activations(input, knee, clip_low, clip_high, 4, tail);
    const int64_t together = std::max<int64_t>(2, EXPANDED / columns / TILE);
    Tensor dense = at::empty({std::min(together, count) * TILE, columns}, input.options());
    for (int64_t tile = 0; tile < count; tile += together) {
      const int64_t now = std::min(together, count - tile);
      float* expanded = dense.data_ptr<float>();
      at::parallel_for(0, now, std::max<int64_t>(1, EACH / columns / TILE), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k)
          (w.bits == 1 ? expand_tile<1> : expand_tile<2>)(w, tile + k, expanded + k * TILE * columns);
      });
      Tensor part = y.narrow(1, tile * TILE, now * TILE);
      part.copy_(at::mm(grid, dense.narrow(0, 0, now * TILE).t()));
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

// KL(p_T || p_S), mean over the tokens, of the softmaxes of logits (tokens, vocabulary) in float32 or bfloat16, and its
// gradient to the student's.
std::tuple<Tensor, Tensor> forward_kl(const Tensor& student, const Tensor& teacher) {
  TORCH_CHECK(student.dim() == 2 && student.sizes() == teacher.sizes() && student.numel() > 0 &&
                  student.is_contiguous() && teacher.is_contiguous() &&
                  student.scalar_type() == teacher.scalar_type() &&
                  (student.scalar_type() == at::kFloat || student.scalar_type() == at::kBFloat16),
              "forward_kl: two contiguous tensors (tokens, vocabulary) of float32 or bfloat16 are needed");
  const int64_t tokens = student.size(0), count = student.size(1);
  Tensor grad = at::empty_like(student), losses = at::empty({tokens}, student.options().dtype(at::kFloat));
  float* to = losses.data_ptr<float>();
  if (student.scalar_type() == at::kFloat)
    forward_kl_rows(student.const_data_ptr<float>(), teacher.const_data_ptr<float>(), grad.data_ptr<float>(), to,
                    tokens, count);
  else
    forward_kl_rows(student.const_data_ptr<at::BFloat16>(), teacher.const_data_ptr<at::BFloat16>(),
                    grad.data_ptr<at::BFloat16>(), to, tokens, count);
  return {losses.mean(), grad};
}

constexpr int LAYERS = 7;           // q, k, v, o, gate, up, down
constexpr int64_t PIECE = 1 << 16;  // weights that a thread takes at a time, some 10 microseconds

// A packed layer, its bits in words or in tiles.
struct Layer {
  bool tiled;
  Weights words;
  Tiles tiles;
  int64_t rows, columns, length;
  Quantizer quantizer;
  const float* bias;
};

// A decoder block of LLaMA's kind.
struct Block {
  const float* norms[4];  // before attention, before the MLP, and perhaps of each head's query and key
  Layer layers[LAYERS];
  Cache kept[2];
};

inline void rms_norm(const float* weight, const float* x, float* out, int64_t count, float epsilon) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) sums[k] += static_cast<double>(x[i + k]) * x[i + k];
  for (; i < count; ++i) sums[0] += static_cast<double>(x[i]) * x[i];
  const double mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<double>(count);
  const float factor = 1.0f / std::sqrt(static_cast<float>(mean) + epsilon);
  for (int64_t j = 0; j < count; ++j) out[j] = weight[j] * (x[j] * factor);
}

// One token's way through blocks; holds the memory that all of them use in turn.
class Pass {
 public:
  Pass(Team& team, int64_t size, int64_t dim, int64_t heads, int64_t kv_heads, int64_t position, float scaling,
       float epsilon)
      : team_(team), size_(size), dim_(dim), heads_(heads), kv_heads_(kv_heads), tokens_(position + 1),
        scaling_(scaling), epsilon_(epsilon), normed_(size), attended_(heads * dim), projected_(size),
        room_(kv_heads * attention_room(position + 1, dim, heads / kv_heads)) {}

  void run(Block& block, float* stream, const float* cosine, const float* sine) {
    const int64_t group = heads_ / kv_heads_;
    for (int k = 0; k < LAYERS; ++k)
      if (k != 3 && k != 6) outputs_[k].resize(block.layers[k].rows);
    float *q = outputs_[0].data(), *k = outputs_[1].data(), *v = outputs_[2].data();

    rms_norm(block.norms[0], stream, normed_.data(), size_, epsilon_);
    float* queries[] = {q, k, v};
    multiply(block, 0, 3, normed_.data(), queries);
    if (block.norms[2]) {
      for (int64_t head = 0; head < heads_; ++head)
        rms_norm(block.norms[2], q + head * dim_, q + head * dim_, dim_, epsilon_);
      for (int64_t head = 0; head < kv_heads_; ++head)
        rms_norm(block.norms[3], k + head * dim_, k + head * dim_, dim_, epsilon_);
    }
    rotate(q, heads_, dim_, cosine, sine);
    rotate(k, kv_heads_, dim_, cosine, sine);
    for (int64_t head = 0; head < kv_heads_; ++head) {
      block.kept[0].append(head, tokens_ - 1, k + head * dim_);
      block.kept[1].append(head, tokens_ - 1, v + head * dim_);
    }
    const int64_t room = static_cast<int64_t>(room_.size()) / kv_heads_;
    team_.share(kv_heads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t kv = begin; kv < end; ++kv)
        attend(q, block.kept[0], block.kept[1], kv, tokens_, group, scaling_, room_.data() + kv * room,
               attended_.data());
    });
    float* projected[] = {projected_.data()};
    multiply(block, 3, 1, attended_.data(), projected);
    for (int64_t i = 0; i < size_; ++i) stream[i] += projected_[i];

    rms_norm(block.norms[1], stream, normed_.data(), size_, epsilon_);
    float *gate = outputs_[4].data(), *up = outputs_[5].data();
    float* gated[] = {gate, up};
    multiply(block, 4, 2, normed_.data(), gated);
    team_.share(block.layers[4].rows, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    });
    multiply(block, 6, 1, gate, projected);
    for (int64_t i = 0; i < size_; ++i) stream[i] += projected_[i];
  }

 private:
  // Layers first .. first + count - 1, which read one input: it is quantized once where their quantizers agree.
  void multiply(const Block& block, int first, int count, const float* input, float** outputs) {
    Job jobs[3];
    const Lookup* lookups[3] = {};
    const float* last = nullptr;
    int64_t units = 0, rows = 0, weights = 0;  // a unit: 32 rows of one layer
    for (int j = 0; j < count; ++j) {
      const Layer &layer = block.layers[first + j], &before = block.layers[first + j - (j > 0)];
      const bool same = j > 0 && layer.quantizer == before.quantizer && layer.tiled == before.tiled;
      if (layer.tiled) {
        if (same && layer.length == before.length) {
          lookups[j] = lookups[j - 1];
        } else {
          lookups_[j].build(layer.quantizer, input, layer.columns, layer.length);
          lookups[j] = &lookups_[j];
        }
      } else {
        const float* from = input;
        if (layer.quantizer.bits) {
          if (!same) {
            quantized_[j].resize(layer.columns);
            layer.quantizer.apply(input, quantized_[j].data(), layer.columns);
            last = quantized_[j].data();
          }
          from = last;
        }
        jobs[j] = {layer.words, layer.rows, laid_out(layer.words.shape, from, 1, laid_[j]), outputs[j]};
      }
      units += (layer.rows + TILE - 1) / TILE;
      rows += layer.rows;
      weights += layer.rows * layer.columns;
    }
    team_.share(units, std::max<int64_t>(1, rows * PIECE / weights / TILE), [&](int64_t begin, int64_t end) {
      int64_t passed = 0;
      for (int j = 0; j < count; ++j) {
        const Layer& layer = block.layers[first + j];
        const int64_t own = (layer.rows + TILE - 1) / TILE;
        const int64_t from = std::max(begin, passed) - passed, to = std::min(end, passed + own) - passed;
        passed += own;
        if (from >= to) continue;
        const int64_t top = from * TILE, bottom = std::min(layer.rows, to * TILE);
        if (layer.tiled)
          look_up(layer.tiles, from, to, *lookups[j], outputs[j]);
        else
          some_rows_of(jobs[j], top, bottom, 1);
        if (layer.bias)
          for (int64_t row = top; row < bottom; ++row) outputs[j][row] += layer.bias[row];
      }
    });
  }

  Team& team_;
  const int64_t size_, dim_, heads_, kv_heads_, tokens_;
  const float scaling_, epsilon_;
  std::vector<float> normed_, attended_, projected_, room_, outputs_[LAYERS], quantized_[3], laid_[3];
  Lookup lookups_[3];
};

// One token (1, 1, hidden) through all decoder blocks of a model of LLaMA's kind and the norm after them, the keys and
// values kept in 4, 8 or 16 bits.
//
// Of every block in turn: `norms`, before attention and before the MLP, and where a model has them those of each head's
// query and key; then at the end the last norm. `words`, `params`, `scales`, `biases`, `columns` and `lengths` of the
// layers q, k, v, o, gate, up, down; six numbers of each layer's quantizer, bits (0: none), tail, knee, the two clips
// and how many features share a range. `cache`: codes and scales of the keys, codes and scales of the values, with room
// for one more token at `position`; float16 values and empty scales where they have 16 bits.
Tensor decode(const Tensor& hidden, const Tensor& cosine, const Tensor& sine, at::TensorList norms,
              at::TensorList words, at::TensorList params, const c10::List<std::optional<Tensor>>& scales,
              const c10::List<std::optional<Tensor>>& biases, at::ArrayRef<double> quantizers,
              at::IntArrayRef columns, at::IntArrayRef lengths, at::TensorList cache, int64_t position,
              int64_t heads, int64_t kv_heads, double scaling, double epsilon) {
  const int64_t size = hidden.numel(), dim = cosine.size(-1);
  const size_t blocks = words.size() / LAYERS, layers = blocks * LAYERS;
  TORCH_CHECK(blocks > 0 && words.size() == layers && params.size() == layers && scales.size() == layers &&
                  biases.size() == layers && quantizers.size() == 6 * layers && columns.size() == layers &&
                  lengths.size() == layers && cache.size() == 4 * blocks &&
                  (norms.size() == 2 * blocks + 1 || norms.size() == 4 * blocks + 1),
              "decode: seven layers, two or four norms and four tensors of cache a block, and one norm more are "
              "expected");
  TORCH_CHECK(hidden.scalar_type() == at::kFloat && hidden.is_contiguous() && size == columns[0],
              "decode: one token is expected, contiguous float32");
  for (const Tensor& tensor : {cosine, sine})
    TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous() && tensor.numel() == dim,
                "decode: one position's rotary embedding is expected, contiguous float32");
  TORCH_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && dim % 2 == 0,
              "decode: whole groups of heads, and heads of even length, are expected");
  const size_t each_norms = (norms.size() - 1) / blocks;
  const auto norm_at = [&](size_t index, int64_t count) {
    const Tensor& norm = norms[index];
    TORCH_CHECK(norm.scalar_type() == at::kFloat && norm.is_contiguous() && norm.numel() == count,
                "decode: norms must be float32, of the size that they are for");
    return norm.const_data_ptr<float>();
  };

  std::vector<Block> program(blocks);
  std::vector<Tensor> held;  // biases in float32
  for (size_t b = 0; b < blocks; ++b) {
    Block& block = program[b];
    for (size_t n = 0; n < 4; ++n)
      block.norms[n] = n < each_norms ? norm_at(b * each_norms + n, n < 2 ? size : dim) : nullptr;
    for (int k = 0; k < LAYERS; ++k) {
      const size_t at = b * LAYERS + k;
      Layer& layer = block.layers[k];
      layer.tiled = words[at].scalar_type() == at::kByte;
      layer.columns = columns[at];
      layer.length = lengths[at];
      layer.rows = params[at].size(0) * (layer.tiled ? TILE : 1);
      const double* six = quantizers.data() + 6 * at;
      const auto bits = static_cast<int64_t>(six[0]), tail = static_cast<int64_t>(six[1]);
      layer.quantizer = quantizer_of(bits, tail, six[2], six[3], six[4]);
      layer.quantizer.size = static_cast<int64_t>(six[5]);
      TORCH_CHECK(layer.quantizer.size > 0, "decode: ranges have one feature or more");
      if (layer.tiled) {
        TORCH_CHECK(layer.quantizer.bits == 4 && layer.quantizer.size == layer.columns,
                    "decode: layers in tiles have 4-bit activations, one range a token");
        layer.tiles = tiles_of(words[at], params[at], layer.columns, layer.length);
      } else {
        layer.words = weights_of(words[at], params[at], scales.get(at), layer.columns, layer.length);
      }
      layer.bias = nullptr;
      if (const std::optional<Tensor> bias = biases.get(at)) {
        TORCH_CHECK(bias->numel() == layer.rows, "decode: a bias of another size");
        held.push_back(bias->to(at::kFloat).contiguous());
        layer.bias = held.back().const_data_ptr<float>();
      }
    }
    const Layer* at = block.layers;
    const int64_t wide = heads * dim, narrow = kv_heads * dim, middle = at[6].columns;
    const int64_t sizes[LAYERS][2] = {{size, wide}, {size, narrow}, {size, narrow}, {wide, size},
                                      {size, middle}, {size, middle}, {middle, size}};
    for (int k = 0; k < LAYERS; ++k)
      TORCH_CHECK(at[k].columns == sizes[k][0] && at[k].rows == sizes[k][1],
                  "decode: the layers' sizes don't fit each other");
    for (int which = 0; which < 2; ++which) {
      const Tensor &codes = cache[4 * b + 2 * which], &scale = cache[4 * b + 2 * which + 1];
      const bool halves = codes.scalar_type() == at::kHalf;
      const int bits = halves ? 16 : codes.size(-1) == dim ? 8 : 4;
      TORCH_CHECK(codes.is_contiguous() && scale.is_contiguous() && (halves || codes.scalar_type() == at::kByte) &&
                      scale.scalar_type() == at::kHalf && codes.dim() == 4 && codes.size(0) == 1 &&
                      codes.size(1) == kv_heads && codes.size(2) > position &&
                      codes.size(3) == (bits == 4 ? dim / 2 : dim) && scale.dim() == 4 &&
                      scale.size(1) == kv_heads && scale.size(2) == codes.size(2) &&
                      scale.size(3) == (halves ? 0 : 2),
                  "decode: the cache has no room, or another shape");
      block.kept[which] = {bits, codes.data_ptr(), reinterpret_cast<uint16_t*>(scale.data_ptr<at::Half>()),
                           codes.size(2), dim};
    }
  }
  const float* last = norm_at(norms.size() - 1, size);

  std::vector<float> stream(hidden.const_data_ptr<float>(), hidden.const_data_ptr<float>() + size);
  Tensor out = at::empty_like(hidden);
  const float *turn = cosine.const_data_ptr<float>(), *tilt = sine.const_data_ptr<float>();
  float* result = out.data_ptr<float>();
  with_team([&](Team& team) {
    Pass pass(team, size, dim, heads, kv_heads, position, static_cast<float>(scaling), static_cast<float>(epsilon));
    for (Block& block : program) pass.run(block, stream.data(), turn, tilt);
    rms_norm(last, stream.data(), result, size, static_cast<float>(epsilon));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(lbllm, m) {
  m.def("packed_linear(Tensor x, Tensor words, Tensor params, Tensor? scale, Tensor? bias, int columns, int length) -> Tensor");
  m.def(
      "packed_lookup(Tensor x, Tensor tiles, Tensor params, Tensor? bias, int columns, int length, float knee, "
      "float clip_low, float clip_high, int tail) -> Tensor");
  m.def("pack_words(Tensor planes, int columns, int length) -> Tensor");
  m.def("unpack_words(Tensor words, int columns, int length, int bits) -> Tensor");
  m.def("bfloat16_linear(Tensor x, Tensor weight) -> Tensor");
  m.def(
      "decode(Tensor hidden, Tensor cosine, Tensor sine, Tensor[] norms, Tensor[] words, Tensor[] params, "
      "Tensor?[] scales, Tensor?[] biases, float[] quantizers, int[] columns, int[] lengths, Tensor(a!)[] cache, "
      "int position, int heads, int kv_heads, float scaling, float epsilon) -> Tensor");
  m.def("quantize_activations(Tensor x, float knee, float clip_low, float clip_high, int bits, int tail) -> Tensor");
  m.def(
      "quantize_activations_backward(Tensor grad, Tensor x, float knee, float clip_low, float clip_high, int bits, "
      "int tail, float temperature) -> (Tensor, Tensor)");
  m.def("forward_kl(Tensor student, Tensor teacher) -> (Tensor, Tensor)");
  m.def("nearest_level(Tensor groups, Tensor levels) -> Tensor");
  m.def("nearest_level_backward(Tensor grad, Tensor groups, Tensor levels) -> Tensor");
}

TORCH_LIBRARY_IMPL(lbllm, CPU, m) {
  m.impl("packed_linear", packed_linear);
  m.impl("packed_lookup", packed_lookup);
  m.impl("pack_words", pack_words);
  m.impl("unpack_words", unpack_words);
  m.impl("bfloat16_linear", bfloat16_linear);
  m.impl("decode", decode);
  m.impl("quantize_activations", quantize_activations);
  m.impl("quantize_activations_backward", quantize_activations_backward);
  m.impl("forward_kl", forward_kl);
  m.impl("nearest_level", nearest_level);
  m.impl("nearest_level_backward", nearest_level_backward);
}
