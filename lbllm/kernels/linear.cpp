// The operators for linear layers: packed weights in words or in tiles, packing into words, and an output head in
// bfloat16.

#include "lookup.h"
#include "operators.h"
#include "packed.h"
#include "work.h"

namespace lbllm {

using at::Tensor;

namespace {

constexpr int64_t FEW = 8;             // up to this number of tokens the packed weights are multiplied directly
constexpr int64_t EXPANDED = 1 << 21;  // for more tokens, weights that are expanded together: they fit into the cache

// The dot product of a row of bfloat16 weights and x.
inline float dot_bfloat16(const uint16_t* weight, const float* x, int64_t columns) {
  float sum = 0;
  int64_t i = 0;
#if defined(__AVX2__)
  __m256 sums[4];
  each<4>([&](auto k) { sums[k] = _mm256_setzero_ps(); });
  for (; i + 32 <= columns; i += 32)
    each<4>([&](auto k) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + i + 8 * k));
      const __m256 values = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
      sums[k] = _mm256_fmadd_ps(values, _mm256_loadu_ps(x + i + 8 * k), sums[k]);
    });
  float lanes[8];
  _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
  for (float lane : lanes) sum += lane;
#endif
  for (; i < columns; ++i) {
    const uint32_t bits = static_cast<uint32_t>(weight[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    sum += value * x[i];
  }
  return sum;
}

}  // namespace

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

void some_rows_of(const Job& job, int64_t begin, int64_t end, int64_t tokens) {
  (job.weights.params.count == 2 ? some_tokens<1> : some_tokens<2>)(job, begin, end, tokens);
}

// y (..., rows) = x (..., columns) W^T + bias, in the dtype of x. The sums are float32.
Tensor packed_linear(const Tensor& x, const Tensor& words, const Tensor& params, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& bias, int64_t columns, int64_t length) {
  const Weights w = weights_of(words, params, scale, columns, length);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == columns, "packed_linear: the last dimension of x must be ", columns);
  const int64_t rows = words.size(0), tokens = x.numel() / columns;
  const bool one = w.params.count == 2;
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
      (one ? expand_rows<1> : expand_rows<2>)(w, row, row + count, dense.data_ptr<float>());
      Tensor part = y.narrow(1, row, count);
      part.copy_(input.mm(dense.narrow(0, 0, count).t()));
    }
  }
  if (bias) y.add_(*bias);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  return y.reshape(sizes).to(x.scalar_type());
}

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

void look_up(const Tiles& w, int64_t begin, int64_t end, const Lookup& lookup, float* y) {
  for (int64_t tile = begin; tile < end; ++tile) {
    float* to = y + tile * TILE;
    if (w.bits == 2)
      lookup.narrow ? look_up_tile<2, true>(w, tile, lookup, to) : look_up_tile<2, false>(w, tile, lookup, to);
    else
      lookup.narrow ? look_up_tile<1, true>(w, tile, lookup, to) : look_up_tile<1, false>(w, tile, lookup, to);
  }
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
      float* expanded = dense.data_ptr<float>();
      at::parallel_for(0, now, std::max<int64_t>(1, EACH / columns / TILE), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k)
          (w.bits == 1 ? expand_tile<1> : expand_tile<2>)(w, tile + k, expanded + k * TILE * columns);
      });
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
  const int64_t rows = planes.size(0), bytes = planes.size(2), per_word = 32 / bits;
  Tensor words = planes.new_zeros({rows, shape.words, LANES}, at::kInt);
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
  Tensor planes = words.new_zeros({rows, bits, bytes}, at::kByte);
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
  at::parallel_for(0, rows, std::max<int64_t>(1, WORK / columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t token = 0; token < tokens; ++token)
        to[token * rows + row] = dot_bfloat16(w + row * columns, from + token * columns, columns);
  });
  return y.reshape(sizes);
}

}  // namespace lbllm
