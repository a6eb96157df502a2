// Vector registers of the instruction set that the library is compiled for, and small functions on numbers.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace lbllm {

// Calls f(0), f(1), .. f(N - 1) with compile-time constants. An array that is indexed only by them stays in registers.
template <int N, class F>
INLINE void each(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

#if defined(__F16C__)
INLINE float half_to_float(uint16_t value) { return _cvtsh_ss(value); }
#else
INLINE float half_to_float(uint16_t value) {
  const uint32_t sign = (value & 0x8000u) << 16, exponent = (value >> 10) & 31, fraction = value & 1023;
  if (exponent == 0) {
    const float small = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -small : small;
  }
  const uint32_t bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
#endif

// One register of floats, of words, and of levels, for the instruction set that this file is compiled for.
#if defined(__AVX512F__)
constexpr int LANES = 16;
using Word = __m512i;
using Levels = __m512;
using Floats = __m512;
INLINE Word load(const uint32_t* words) { return _mm512_loadu_si512(words); }
template <int BITS>
INLINE Word next(Word word) {
  return _mm512_srli_epi32(word, BITS);
}
template <int COUNT>
INLINE Levels spread(const float* values) {
  if constexpr (COUNT == 8)
    return _mm512_broadcast_f32x8(_mm256_loadu_ps(values));
  else
    return _mm512_broadcast_f32x4(_mm_loadu_ps(values));
}
INLINE Floats zero() { return _mm512_setzero_ps(); }
// The lookup reads the two low bits of each lane, or with eight levels the three low ones.
template <int COUNT>
INLINE Floats pick(Levels levels, Word word) {
  if constexpr (COUNT == 8)
    return _mm512_permutexvar_ps(word, levels);
  else
    return _mm512_permutevar_ps(levels, word);
}
INLINE Floats read(const float* x) { return _mm512_loadu_ps(x); }
INLINE void write(float* to, Floats values) { _mm512_storeu_ps(to, values); }
INLINE Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
INLINE float total(Floats sum) { return _mm512_reduce_add_ps(sum); }
#elif defined(__AVX2__)
constexpr int LANES = 8;
using Word = __m256i;
using Levels = __m256;
using Floats = __m256;
INLINE Word load(const uint32_t* words) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)); }
template <int BITS>
INLINE Word next(Word word) {
  return _mm256_srli_epi32(word, BITS);
}
template <int COUNT>
INLINE Levels spread(const float* values) {
  if constexpr (COUNT == 8)
    return _mm256_loadu_ps(values);
  else
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(values));
}
INLINE Floats zero() { return _mm256_setzero_ps(); }
// The lookup reads the two low bits of each lane, or with eight levels the three low ones.
template <int COUNT>
INLINE Floats pick(Levels levels, Word word) {
  if constexpr (COUNT == 8)
    return _mm256_permutevar8x32_ps(levels, word);
  else
    return _mm256_permutevar_ps(levels, word);
}
INLINE Floats read(const float* x) { return _mm256_loadu_ps(x); }
INLINE void write(float* to, Floats values) { _mm256_storeu_ps(to, values); }
INLINE Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
INLINE float total(Floats sum) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#else
constexpr int LANES = 8;
struct Word {
  uint32_t lane[LANES];
};
struct Levels {
  float value[8];
};
struct Floats {
  float lane[LANES];
};
INLINE Word load(const uint32_t* words) {
  Word word;
  std::memcpy(&word, words, sizeof word);
  return word;
}
template <int BITS>
INLINE Word next(Word word) {
  for (uint32_t& lane : word.lane) lane >>= BITS;
  return word;
}
template <int COUNT>
INLINE Levels spread(const float* values) {
  Levels levels = {};
  std::memcpy(levels.value, values, COUNT * sizeof(float));
  return levels;
}
INLINE Floats zero() { return Floats{}; }
template <int COUNT>
INLINE Floats pick(const Levels& levels, const Word& word) {
  Floats picked;
  for (int l = 0; l < LANES; ++l) picked.lane[l] = levels.value[word.lane[l] & (COUNT - 1)];
  return picked;
}
INLINE Floats read(const float* x) {
  Floats values;
  std::memcpy(&values, x, sizeof values);
  return values;
}
INLINE void write(float* to, const Floats& values) { std::memcpy(to, &values, sizeof values); }
INLINE Floats multiply_add(const Floats& a, const Floats& b, Floats sum) {
  for (int l = 0; l < LANES; ++l) sum.lane[l] += a.lane[l] * b.lane[l];
  return sum;
}
INLINE float total(const Floats& sum) {
  float result = 0;
  for (float lane : sum.lane) result += lane;
  return result;
}
#endif

// e^x for x <= 0. Below -80 it gives e^-80. Written out, because a call would keep the compiler from vectorizing a
// loop.
INLINE float exponential(float x) {
  const float bounded = std::max(x, -80.0f), n = std::nearbyint(bounded * 1.44269504f);
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  const float power = ((((1.98756915e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
                       1.6666665459e-1f) * r + 0.5f;
  return (power * r * r + r + 1) * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

}  // namespace lbllm
