// The products of linear layers, on pointers: packed weights in words or in tiles, and weights in bfloat16.

#include "head.h"
#include "lookup.h"
#include "packed.h"
#include "work.h"

#include <ATen/Parallel.h>

namespace lbllm {

void some_rows_of(const Job& job, int64_t begin, int64_t end, int64_t tokens) {
  const int planes = job.weights.params.planes();
  (planes == 1 ? some_tokens<1> : planes == 2 ? some_tokens<2> : some_tokens<3>)(job, begin, end, tokens);
}

void expand_rows(const Weights& w, int64_t begin, int64_t end, float* out) {
  const int planes = w.params.planes();
  (planes == 1 ? expand_some_rows<1> : planes == 2 ? expand_some_rows<2> : expand_some_rows<3>)(w, begin, end, out);
}

void pack(const Shape& shape, int bits, int64_t rows, const uint8_t* planes, uint32_t* words) {
  const int64_t bytes = (shape.columns + 7) / 8, per_word = 32 / bits;
  at::parallel_for(0, rows, std::max<int64_t>(1, WORK / shape.columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      shape.each_group([&](int64_t column, int64_t first, int64_t width) {
        for (int64_t offset = 0; offset < width; ++offset) {
          const int64_t c = column + offset, step = (first + offset) / LANES, lane = (first + offset) % LANES;
          uint32_t code = 0;
          for (int bit = 0; bit < bits; ++bit)
            code |= ((planes[(row * bits + bit) * bytes + c / 8] >> (c % 8)) & 1u) << bit;
          words[(row * shape.words + step / per_word) * LANES + lane] |= code << (step % per_word * bits);
        }
      });
  });
}

void unpack(const Shape& shape, int bits, int64_t rows, const uint32_t* words, uint8_t* planes) {
  const int64_t bytes = (shape.columns + 7) / 8, per_word = 32 / bits;
  at::parallel_for(0, rows, std::max<int64_t>(1, WORK / shape.columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      shape.each_group([&](int64_t column, int64_t first, int64_t width) {
        for (int64_t offset = 0; offset < width; ++offset) {
          const int64_t c = column + offset, step = (first + offset) / LANES, lane = (first + offset) % LANES;
          const uint32_t code = words[(row * shape.words + step / per_word) * LANES + lane] >> (step % per_word * bits);
          for (int bit = 0; bit < bits; ++bit)
            planes[(row * bits + bit) * bytes + c / 8] |= static_cast<uint8_t>(((code >> bit) & 1u) << (c % 8));
        }
      });
  });
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

void expand_tiles(const Tiles& w, int64_t begin, int64_t end, float* out) {
  at::parallel_for(begin, end, std::max<int64_t>(1, EACH / w.columns / TILE), [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile)
      (w.bits == 1 ? expand_tile<1> : expand_tile<2>)(w, tile, out + (tile - begin) * TILE * w.columns);
  });
}

namespace {

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

void multiply_bfloat16(const uint16_t* weight, int64_t rows, int64_t columns, const float* x, int64_t tokens,
                       float* y) {
  at::parallel_for(0, rows, std::max<int64_t>(1, WORK / columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t token = 0; token < tokens; ++token)
        y[token * rows + row] = dot_bfloat16(weight + row * columns, x + token * columns, columns);
  });
}

}  // namespace lbllm
