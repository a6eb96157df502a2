// Products with, and rows of, embeddings and output heads in 8, 6 or 4 bits. A group becomes floats in registers once for
// several tokens.

#include "embedding.h"

#include "simd.h"
#include "work.h"

#include <ATen/Parallel.h>

namespace lbllm {

namespace {

constexpr int TOGETHER = 4;  // tokens for which a group is unpacked once

alignas(16) constexpr int8_t LEVELS_4[16] = {-127, -100, -80, -65, -51, -38, -25, -12, 0, 13, 25, 38, 51, 66, 84, 106};

template <int BITS>
constexpr int GROUP = BITS == 6 ? 64 : 32;
template <int BITS>
constexpr int GROUP_BYTES = 2 + GROUP<BITS> * BITS / 8;

INLINE float scale_of(const uint8_t* group) {
  uint16_t half;
  std::memcpy(&half, group, sizeof half);
  return half_to_float(half);
}

// The levels LANES * k, LANES * k + 1, .. of a group with these codes. `k` is a compile-time constant.
#if defined(__AVX512F__)
INLINE Floats same(float value) { return _mm512_set1_ps(value); }
INLINE Word bytes(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
INLINE Floats floats(Word word) { return _mm512_cvtepi32_ps(word); }
INLINE Word low_bits(Word word, int mask) { return _mm512_and_si512(word, _mm512_set1_epi32(mask)); }
template <int BITS>
INLINE Word left(Word word) {
  return _mm512_slli_epi32(word, BITS);
}
INLINE Word either(Word a, Word b) { return _mm512_or_si512(a, b); }
INLINE Word less(Word word, int value) { return _mm512_sub_epi32(word, _mm512_set1_epi32(value)); }
INLINE Floats signed_bytes(const uint8_t* from) {
  return floats(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
INLINE Floats four_bits(const uint8_t* from, int shift) {
  const __m128i codes = _mm_srli_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), shift);
  const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(LEVELS_4));
  return floats(_mm512_cvtepi8_epi32(_mm_shuffle_epi8(table, _mm_and_si128(codes, _mm_set1_epi8(15)))));
}
#elif defined(__AVX2__)
INLINE Floats same(float value) { return _mm256_set1_ps(value); }
INLINE Word bytes(const uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
INLINE Floats floats(Word word) { return _mm256_cvtepi32_ps(word); }
INLINE Word low_bits(Word word, int mask) { return _mm256_and_si256(word, _mm256_set1_epi32(mask)); }
template <int BITS>
INLINE Word left(Word word) {
  return _mm256_slli_epi32(word, BITS);
}
INLINE Word either(Word a, Word b) { return _mm256_or_si256(a, b); }
INLINE Word less(Word word, int value) { return _mm256_sub_epi32(word, _mm256_set1_epi32(value)); }
INLINE Floats signed_bytes(const uint8_t* from) {
  return floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
INLINE Floats four_bits(const uint8_t* from, int shift) {
  const __m128i codes = _mm_srli_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), shift);
  const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(LEVELS_4));
  return floats(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(table, _mm_and_si128(codes, _mm_set1_epi8(15)))));
}
#else
INLINE Floats same(float value) {
  Floats values;
  for (float& lane : values.lane) lane = value;
  return values;
}
INLINE Word bytes(const uint8_t* from) {
  Word word;
  for (int l = 0; l < LANES; ++l) word.lane[l] = from[l];
  return word;
}
INLINE Floats floats(const Word& word) {
  Floats values;
  for (int l = 0; l < LANES; ++l) values.lane[l] = static_cast<float>(static_cast<int32_t>(word.lane[l]));
  return values;
}
INLINE Word low_bits(Word word, uint32_t mask) {
  for (uint32_t& lane : word.lane) lane &= mask;
  return word;
}
template <int BITS>
INLINE Word left(Word word) {
  for (uint32_t& lane : word.lane) lane <<= BITS;
  return word;
}
INLINE Word either(Word a, const Word& b) {
  for (int l = 0; l < LANES; ++l) a.lane[l] |= b.lane[l];
  return a;
}
INLINE Word less(Word word, uint32_t value) {
  for (uint32_t& lane : word.lane) lane -= value;
  return word;
}
INLINE Floats signed_bytes(const uint8_t* from) {
  Floats values;
  for (int l = 0; l < LANES; ++l) values.lane[l] = static_cast<int8_t>(from[l]);
  return values;
}
INLINE Floats four_bits(const uint8_t* from, int shift) {
  Floats values;
  for (int l = 0; l < LANES; ++l) values.lane[l] = LEVELS_4[(from[l] >> shift) & 15];
  return values;
}
#endif

template <int BITS, int K>
INLINE Floats levels(const uint8_t* codes) {
  constexpr int first = LANES * K;
  if constexpr (BITS == 8) return signed_bytes(codes + first);
  if constexpr (BITS == 4) return four_bits(codes + first % 16, first / 16 * 4);
  const Word low = low_bits(next<first / 32 * 4>(bytes(codes + first % 32)), 15);
  const Word high = low_bits(next<first / 16 * 2>(bytes(codes + 32 + first % 16)), 3);
  return floats(less(either(low, left<4>(high)), 32));
}

template <int BITS, int TOKENS>
void some_tokens_of(const EmbeddingRows& table, int64_t begin, int64_t end, int64_t rows, const float* x, int64_t stride,
                    float* y) {
  constexpr int STEPS = GROUP<BITS> / LANES;
  const int64_t groups = table.row_bytes / GROUP_BYTES<BITS>;
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* at = table.bytes + row * table.row_bytes;
    Floats sums[TOKENS];
    each<TOKENS>([&](auto t) { sums[t] = zero(); });
    for (int64_t group = 0; group < groups; ++group, at += GROUP_BYTES<BITS>) {
      const float* inputs = x + group * GROUP<BITS>;
      Floats parts[TOKENS];
      each<TOKENS>([&](auto t) { parts[t] = zero(); });
      each<STEPS>([&](auto k) {
        const Floats values = levels<BITS, k>(at + 2);
        each<TOKENS>([&](auto t) { parts[t] = multiply_add(values, read(inputs + t * stride + k * LANES), parts[t]); });
      });
      const Floats scale = same(scale_of(at));
      each<TOKENS>([&](auto t) { sums[t] = multiply_add(parts[t], scale, sums[t]); });
    }
    each<TOKENS>([&](auto t) { y[t * rows + row] = total(sums[t]); });
  }
}

template <int BITS>
void some_rows(const EmbeddingRows& table, int64_t begin, int64_t end, int64_t rows, const float* x, int64_t stride,
               int64_t tokens, float* y) {
  for (int64_t token = 0; token < tokens; token += TOGETHER) {
    const float* from = x + token * stride;
    float* to = y + token * rows;
    switch (std::min<int64_t>(TOGETHER, tokens - token)) {
      case 1: some_tokens_of<BITS, 1>(table, begin, end, rows, from, stride, to); break;
      case 2: some_tokens_of<BITS, 2>(table, begin, end, rows, from, stride, to); break;
      case 3: some_tokens_of<BITS, 3>(table, begin, end, rows, from, stride, to); break;
      default: some_tokens_of<BITS, TOGETHER>(table, begin, end, rows, from, stride, to);
    }
  }
}

template <int BITS>
void expand(const EmbeddingRows& table, int64_t row, float* out) {
  const uint8_t* at = table.bytes + row * table.row_bytes;
  for (int64_t first = 0; first < table.columns; first += GROUP<BITS>, at += GROUP_BYTES<BITS>) {
    const Floats scale = same(scale_of(at));
    float values[GROUP<BITS>];
    each<GROUP<BITS> / LANES>(
        [&](auto k) { write(values + k * LANES, multiply_add(levels<BITS, k>(at + 2), scale, zero())); });
    std::copy_n(values, std::min<int64_t>(GROUP<BITS>, table.columns - first), out + first);
  }
}

}  // namespace

void multiply_embedding(const EmbeddingRows& table, int64_t rows, const float* x, int64_t stride, int64_t tokens, float* y) {
  at::parallel_for(0, rows, std::max<int64_t>(1, WORK / table.columns), [&](int64_t begin, int64_t end) {
    (table.bits == 8 ? some_rows<8> : table.bits == 6 ? some_rows<6> : some_rows<4>)(table, begin, end, rows, x, stride,
                                                                                   tokens, y);
  });
}

void expand_embedding_row(const EmbeddingRows& table, int64_t row, float* out) {
  (table.bits == 8 ? expand<8> : table.bits == 6 ? expand<6> : expand<4>)(table, row, out);
}

}  // namespace lbllm
