// The operators, on tensors: they check the arguments, convert dtypes and hand pointers to the kernels. Only this file
// and library.cpp include PyTorch's tensors, which take seconds to compile.

#include "operators.h"

#include "decode.h"
#include "elementwise.h"
#include "head.h"
#include "lookup.h"
#include "packed.h"
#include "work.h"

#include <ATen/Parallel.h>

namespace lbllm {

using at::Tensor;

namespace {

constexpr int64_t FEW = 8;             // up to this number of tokens the packed weights are multiplied directly
constexpr int64_t EXPANDED = 1 << 21;  // for more tokens, weights that are expanded together: they fit into the cache

// The packed weights in these tensors, as pack_words and a checkpoint give them.
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
              "packed_linear: params must be contiguous (rows, groups, 2 or 4) float16, or with a scale uint8, two "
              "codes of 4 bits a byte");
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

// The packed layer in these tensors.
Tiles tiles_of(const Tensor& tiles, const Tensor& params, int64_t columns, int64_t length) {
  TORCH_CHECK(tiles.scalar_type() == at::kByte && tiles.is_contiguous() && tiles.dim() == 4 && columns % 8 == 0 &&
                  tiles.size(1) == columns / 8 && (tiles.size(2) == 1 || tiles.size(2) == 2) && tiles.size(3) == TILE,
              "packed_lookup: tiles must be contiguous uint8 (rows / 32, columns / 8, 1 or 2, 32)");
  // The sums of longer groups would not fit into 16 bits.
  TORCH_CHECK(length % 8 == 0 && length > 0 && length <= 2048, "packed_lookup: groups have 8, 16, .. 2048 columns");
  const int64_t groups = (columns + length - 1) / length, bits = tiles.size(2);
  TORCH_CHECK(params.is_contiguous() && params.scalar_type() == at::kHalf && params.dim() == 4 &&
                  params.size(0) == tiles.size(0) && params.size(1) == groups && params.size(2) == 2 * bits &&
                  params.size(3) == TILE,
              "packed_lookup: params must be contiguous float16 (rows / 32, groups, 2 or 4, 32)");
  return {tiles.const_data_ptr<uint8_t>(), static_cast<const uint16_t*>(params.const_data_ptr()), columns, length,
          groups, static_cast<int>(bits)};
}

// Checks the weights `groups` (rows, n, length) and their `levels` (rows, n, 2 or 4), which are in ascending order.
void check_groups(const Tensor& groups, const Tensor& levels) {
  TORCH_CHECK(groups.dim() == 3 && levels.dim() == 3 && groups.size(0) == levels.size(0) &&
                  groups.size(1) == levels.size(1) && (levels.size(2) == 2 || levels.size(2) == 4) &&
                  groups.is_contiguous() && levels.is_contiguous() && groups.scalar_type() == at::kFloat &&
                  levels.scalar_type() == at::kFloat,
              "nearest_level: contiguous float32 groups (rows, n, length) and levels (rows, n, 2 or 4) are needed");
}

}  // namespace

// y (..., rows) = x (..., columns) W^T + bias, in the dtype of x. The sums are float32.
Tensor packed_linear(const Tensor& x, const Tensor& words, const Tensor& params, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& bias, int64_t columns, int64_t length) {
  const Weights w = weights_of(words, params, scale, columns, length);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == columns, "packed_linear: the last dimension of x must be ", columns);
  const int64_t rows = words.size(0), tokens = x.numel() / columns;
  const Tensor input = x.reshape({tokens, columns}).to(at::kFloat).contiguous();
  Tensor y = input.new_empty({tokens, rows});
  if (tokens <= FEW) {
    std::vector<float> room;
    const float* laid = laid_out(w.shape, input.const_data_ptr<float>(), tokens, room);
    const Job job{w, rows, laid, y.data_ptr<float>()};
    at::parallel_for(0, rows, std::max<int64_t>(4, WORK / std::max<int64_t>(1, columns * tokens)),
                     [&](int64_t begin, int64_t end) { some_rows_of(job, begin, end, tokens); });
  } else {
    const int64_t tile = std::max<int64_t>(64, EXPANDED / columns);
    Tensor dense = input.new_empty({std::min(tile, rows), columns});
    for (int64_t row = 0; row < rows; row += tile) {
      const int64_t count = std::min(tile, rows - row);
      expand_rows(w, row, row + count, dense.data_ptr<float>());
      Tensor part = y.narrow(1, row, count);
      part.copy_(input.mm(dense.narrow(0, 0, count).t()));
    }
  }
  if (bias) y.add_(*bias);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  return y.reshape(sizes).to(x.scalar_type());
}

// y (..., rows) = q(x) W^T + bias, in the dtype of x. q quantizes x (..., columns) to 4 bits, with one range per token.
Tensor packed_lookup(const Tensor& x, const Tensor& tiles, const Tensor& params, const std::optional<Tensor>& bias,
                     int64_t columns, int64_t length, double knee, double clip_low, double clip_high, int64_t tail) {
  const Tiles w = tiles_of(tiles, params, columns, length);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == columns, "packed_lookup: the last dimension of x must be ", columns);
  TORCH_CHECK(tail >= 0 && tail <= 7, "packed_lookup: a tail has at most 7 steps");
  const Quantizer quantizer = quantizer_of(4, tail, knee, clip_low, clip_high);
  const int64_t count = tiles.size(0), rows = count * TILE, tokens = x.numel() / columns;
  const Tensor input = x.reshape({tokens, columns}).to(at::kFloat).contiguous();
  const float* from = input.const_data_ptr<float>();
  Tensor y = input.new_empty({tokens, rows});
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
    Tensor dense = input.new_empty({std::min(together, count) * TILE, columns});
    for (int64_t tile = 0; tile < count; tile += together) {
      const int64_t now = std::min(together, count - tile);
      expand_tiles(w, tile, tile + now, dense.data_ptr<float>());
      Tensor part = y.narrow(1, tile * TILE, now * TILE);
      part.copy_(grid.mm(dense.narrow(0, 0, now * TILE).t()));
    }
  }
  if (bias) y.add_(*bias);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  return y.reshape(sizes).to(x.scalar_type());
}

// From the planes of a checkpoint, uint8 (rows, bits, ceil(columns / 8)), to words, int32 (rows, words, LANES).
Tensor pack_words(const Tensor& planes, int64_t columns, int64_t length) {
  TORCH_CHECK(planes.scalar_type() == at::kByte && planes.is_contiguous() && planes.dim() == 3 &&
                  (planes.size(1) == 1 || planes.size(1) == 2) && planes.size(2) == (columns + 7) / 8,
              "pack_words: planes must be contiguous uint8 (rows, 1 or 2, ceil(columns / 8))");
  const int bits = static_cast<int>(planes.size(1));
  const Shape shape(columns, length, bits);
  const int64_t rows = planes.size(0);
  Tensor words = planes.new_zeros({rows, shape.words, LANES}, at::kInt);
  const uint8_t* from = planes.const_data_ptr<uint8_t>();
  auto* to = reinterpret_cast<uint32_t*>(words.data_ptr<int32_t>());
  pack(shape, bits, rows, from, to);
  return words;
}

// The inverse of pack_words.
Tensor unpack_words(const Tensor& words, int64_t columns, int64_t length, int64_t bits) {
  const Shape shape(columns, length, static_cast<int>(bits));
  TORCH_CHECK(words.scalar_type() == at::kInt && words.is_contiguous() && words.dim() == 3 &&
                  words.size(1) == shape.words && words.size(2) == LANES,
              "unpack_words: words must be the contiguous int32 tensor that pack_words makes of these sizes");
  const int64_t rows = words.size(0), bytes = (columns + 7) / 8;
  Tensor planes = words.new_zeros({rows, bits, bytes}, at::kByte);
  const auto* from = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  uint8_t* to = planes.data_ptr<uint8_t>();
  unpack(shape, static_cast<int>(bits), rows, from, to);
  return planes;
}

// x (..., columns) W^T for W (rows, columns) in bfloat16; the result is float32. The time of an output head is that of
// reading its bytes.
Tensor bfloat16_linear(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.is_contiguous() && weight.dim() == 2,
              "bfloat16_linear: weight must be contiguous bfloat16 (rows, columns)");
  const int64_t rows = weight.size(0), columns = weight.size(1), tokens = x.numel() / columns;
  TORCH_CHECK(x.size(-1) == columns, "bfloat16_linear: the last dimension of x must be ", columns);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  if (tokens > FEW) {
    // Many tokens: convert a part of the weight to float32 at a time.
    const Tensor input = x.reshape({tokens, columns}).to(at::kFloat);
    Tensor y = input.new_empty({tokens, rows});
    const int64_t tile = std::max<int64_t>(64, EXPANDED / columns);
    for (int64_t row = 0; row < rows; row += tile) {
      const int64_t count = std::min(tile, rows - row);
      Tensor part = y.narrow(1, row, count);
      part.copy_(input.mm(weight.narrow(0, row, count).to(at::kFloat).t()));
    }
    return y.reshape(sizes);
  }
  const Tensor input = x.reshape({tokens, columns}).to(at::kFloat).contiguous();
  Tensor y = input.new_empty({tokens, rows});
  const auto* w = static_cast<const uint16_t*>(weight.const_data_ptr());
  const float* from = input.const_data_ptr<float>();
  float* to = y.data_ptr<float>();
  multiply_bfloat16(w, rows, columns, from, tokens, to);
  return y.reshape(sizes);
}

// Quantizes x (..., features) with one range per token; the result has the dtype of x.
Tensor quantize_activations(const Tensor& x, double knee, double clip_low, double clip_high, int64_t bits,
                            int64_t tail) {
  const Quantizer quantizer = quantizer_of(bits, tail, knee, clip_low, clip_high);
  const Tensor input = x.to(at::kFloat).contiguous();
  Tensor out = input.new_empty(input.sizes());
  const int64_t features = x.size(-1), tokens = x.numel() / features;
  const float* from = input.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  quantize(quantizer, from, to, tokens, features);
  return out.to(x.scalar_type());
}

// From the gradient of quantize_activations' result to the gradients of x, in the dtype of x, and of knee, clip_low and
// clip_high, float32 (3,).
std::tuple<Tensor, Tensor> quantize_activations_backward(const Tensor& grad, const Tensor& x, double knee,
                                                         double clip_low, double clip_high, int64_t bits,
                                                         int64_t tail, double temperature) {
  const Quantizer quantizer = quantizer_of(bits, tail, knee, clip_low, clip_high);
  TORCH_CHECK(grad.sizes() == x.sizes(), "quantize_activations_backward: grad and x must have one shape");
  const Tensor input = x.to(at::kFloat).contiguous(), given = grad.to(at::kFloat).contiguous();
  Tensor out = input.new_empty(input.sizes());
  const int64_t features = x.size(-1), tokens = x.numel() / features;
  const float *from = input.const_data_ptr<float>(), *slope = given.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  std::vector<double> act(3 * tokens);  // per token, so the sum is the same for any number of threads
  quantize_backward(quantizer, from, slope, to, act.data(), static_cast<float>(temperature), tokens, features);
  Tensor by_act = input.new_empty({3});
  for (int k = 0; k < 3; ++k) {
    double sum = 0;
    for (int64_t token = 0; token < tokens; ++token) sum += act[3 * token + k];
    by_act.data_ptr<float>()[k] = static_cast<float>(sum);
  }
  return {out.to(x.scalar_type()), by_act};
}

// The level nearest to each weight, or the lower of two at the same distance: float32 (rows, n, length).
Tensor nearest_level(const Tensor& groups, const Tensor& levels) {
  check_groups(groups, levels);
  Tensor out = groups.new_empty(groups.sizes());
  const float *from = groups.const_data_ptr<float>(), *of = levels.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  round_to_levels(from, of, to, groups.size(0) * groups.size(1), groups.size(2), levels.size(2));
  return out;
}

// From the gradient of nearest_level's result to the gradient of the levels: for each level the sum over its members.
Tensor nearest_level_backward(const Tensor& grad, const Tensor& groups, const Tensor& levels) {
  check_groups(groups, levels);
  TORCH_CHECK(grad.sizes() == groups.sizes(), "nearest_level_backward: grad and groups must have one shape");
  const Tensor given = grad.to(at::kFloat).contiguous();
  Tensor out = levels.new_empty(levels.sizes());
  const float *from = groups.const_data_ptr<float>(), *of = levels.const_data_ptr<float>();
  const float* slope = given.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  round_to_levels_backward(from, of, slope, to, groups.size(0) * groups.size(1), groups.size(2), levels.size(2));
  return out;
}

// KL(p_T || p_S) of the softmaxes of logits (tokens, vocabulary) in float32 or bfloat16, averaged over the tokens, and
// its gradient to the student's logits.
std::tuple<Tensor, Tensor> forward_kl(const Tensor& student, const Tensor& teacher) {
  TORCH_CHECK(student.dim() == 2 && student.sizes() == teacher.sizes() && student.numel() > 0 &&
                  student.is_contiguous() && teacher.is_contiguous() &&
                  student.scalar_type() == teacher.scalar_type() &&
                  (student.scalar_type() == at::kFloat || student.scalar_type() == at::kBFloat16),
              "forward_kl: two contiguous tensors (tokens, vocabulary) of float32 or bfloat16 are needed");
  const int64_t tokens = student.size(0), count = student.size(1);
  Tensor grad = student.new_empty(student.sizes()), losses = student.new_empty({tokens}, at::kFloat);
  float* to = losses.data_ptr<float>();
  if (student.scalar_type() == at::kFloat)
    forward_kl_rows(student.const_data_ptr<float>(), teacher.const_data_ptr<float>(), grad.data_ptr<float>(), to,
                    tokens, count);
  else
    forward_kl_rows(student.const_data_ptr<at::BFloat16>(), teacher.const_data_ptr<at::BFloat16>(),
                    grad.data_ptr<at::BFloat16>(), to, tokens, count);
  return {losses.mean(), grad};
}

// Runs one token (1, 1, hidden) through all decoder blocks of a model with the structure of LLaMA and through the norm
// after them. Keys and values are stored in 4, 8 or 16 bits.
//
// `norms`: for each block the norms before attention and before the MLP, then the norms of each head's query and key if
// the model has them; after all blocks the last norm. `words`, `params`, `scales`, `biases`, `columns`, `lengths`: for
// each block those of the layers q, k, v, o, gate, up, down. `quantizers`: six numbers per layer, namely bits (0: no
// quantization), tail, knee, the two clips, and how many features share a range. `cache`: for each block codes and
// scales of the keys, then of the values, with room for a token at `position`; with 16 bits float16 values and empty
// scales. With a `group_size` above 0, six: keys have ranges over groups of so many tokens, and the last two hold float16
// keys and values of the `first` tokens and of the unfinished group.
Tensor decode(const Tensor& hidden, const Tensor& cosine, const Tensor& sine, at::TensorList norms,
              at::TensorList words, at::TensorList params, at::ArrayRef<std::optional<Tensor>> scales,
              at::ArrayRef<std::optional<Tensor>> biases, at::ArrayRef<double> quantizers,
              at::IntArrayRef columns, at::IntArrayRef lengths, at::TensorList cache, int64_t position,
              int64_t heads, int64_t kv_heads, double scaling, double epsilon, int64_t group_size, int64_t first) {
  const int64_t size = hidden.numel(), dim = cosine.size(-1);
  const size_t blocks = words.size() / LAYERS, layers = blocks * LAYERS, parts = group_size ? 6 : 4;
  const Groups groups{group_size, first};
  TORCH_CHECK(group_size >= 0 && first >= 0 && blocks > 0 && words.size() == layers && params.size() == layers &&
                  scales.size() == layers && biases.size() == layers && quantizers.size() == 6 * layers &&
                  columns.size() == layers && lengths.size() == layers && cache.size() == parts * blocks &&
                  (norms.size() == 2 * blocks + 1 || norms.size() == 4 * blocks + 1),
              "decode: seven layers, two or four norms and four or six tensors of cache a block, and one norm more are "
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
        layer.words = weights_of(words[at], params[at], scales[at], layer.columns, layer.length);
      }
      layer.bias = nullptr;
      if (const std::optional<Tensor>& bias = biases[at]) {
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
      const Tensor &codes = cache[parts * b + 2 * which], &scale = cache[parts * b + 2 * which + 1];
      const bool halves = codes.scalar_type() == at::kHalf, by_channel = group_size && which == 0;
      const int bits = halves ? 16 : codes.size(-1) == dim ? 8 : 4;
      const int64_t needed = group_size ? groups.encoded(position) : position + 1;
      TORCH_CHECK(codes.is_contiguous() && scale.is_contiguous() && (halves || codes.scalar_type() == at::kByte) &&
                      scale.scalar_type() == at::kHalf && codes.dim() == 4 && codes.size(0) == 1 &&
                      codes.size(1) == kv_heads && codes.size(2) >= needed &&
                      codes.size(3) == (bits == 4 ? dim / 2 : dim) && scale.dim() == (by_channel ? 5 : 4) &&
                      scale.size(1) == kv_heads &&
                      (by_channel ? codes.size(2) == scale.size(2) * group_size && scale.size(3) == 2 &&
                                        scale.size(4) == dim
                                  : scale.size(2) == codes.size(2) && scale.size(3) == (halves ? 0 : 2)),
                  "decode: the cache has no room, or another shape");
      Cache& kept = block.kept[which];
      kept = {bits, codes.data_ptr(), reinterpret_cast<uint16_t*>(scale.data_ptr<at::Half>()), codes.size(2), dim};
      if (group_size) {
        const Tensor& recent = cache[parts * b + 4 + which];
        TORCH_CHECK(!halves && recent.is_contiguous() && recent.scalar_type() == at::kHalf &&
                        recent.sizes() == at::IntArrayRef({1, kv_heads, first + group_size, dim}),
                    "decode: the tokens in 16 bits have another shape");
        kept.groups = groups, kept.by_channel = by_channel;
        kept.halves = reinterpret_cast<uint16_t*>(recent.data_ptr<at::Half>());
      }
    }
  }
  const float* last = norm_at(norms.size() - 1, size);

  std::vector<float> stream(hidden.const_data_ptr<float>(), hidden.const_data_ptr<float>() + size);
  Tensor out = hidden.new_empty(hidden.sizes());
  const float *turn = cosine.const_data_ptr<float>(), *tilt = sine.const_data_ptr<float>();
  float* result = out.data_ptr<float>();
  run_blocks(program, {size, dim, heads, kv_heads, position, static_cast<float>(scaling), static_cast<float>(epsilon)},
             stream.data(), turn, tilt, last, result);
  return out;
}

}  // namespace lbllm
