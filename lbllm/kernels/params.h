// The group parameters of a packed layer, and the levels that follow from them.

#pragma once

#include "simd.h"

namespace lbllm {

// The group parameters of a layer: float16, or codes of 8 or 4 bits with a float16 minimum and step for each row and
// parameter. Two 4-bit codes share a byte; the first is in the lower half. With three planes a group has one parameter,
// the scale of the layer's eight levels.
struct Params {
  const void* values;
  const uint16_t* scale;  // null for float16 parameters
  int64_t groups;
  int count;  // parameters per group: 2 or 4, alpha_0, mu_0[, alpha_1, mu_1]; 1, the scale of `table`
  int bits;   // of a parameter: 4, 8 or 16
  float table[8] = {};  // the levels for a scale of 1, indexed by the code B + 2 G + 4 H

  int64_t row_bytes() const { return (groups * count * bits + 7) / 8; }
  int planes() const { return count == 1 ? 3 : count / 2; }
  // From eight levels in ascending order, float16. G and H count a side's levels from the middle.
  void set_table(const uint16_t* ascending) {
    for (int code = 0; code < 8; ++code) {
      const int place = (code & 2) + (code >> 2);
      table[code] = half_to_float(ascending[code & 1 ? 4 + place : 3 - place]);
    }
  }
};

constexpr int levels_of(int planes) { return planes == 3 ? 8 : 4; }  // floats of a group's levels in a register

constexpr int64_t AHEAD = 8;  // groups whose levels are computed together

// The group parameters of one row.
class RowParams {
 public:
  RowParams() = default;
  RowParams(const Params& params, int64_t row)
      : values_(static_cast<const uint8_t*>(params.values) + row * params.row_bytes()),
        table_(params.table),
        count_(params.count),
        bits_(params.bits) {
    for (int k = 0; params.scale && k < count_; ++k) {
      low_[k] = half_to_float(params.scale[(row * count_ + k) * 2]);
      step_[k] = half_to_float(params.scale[(row * count_ + k) * 2 + 1]);
    }
  }

  // Writes the levels of groups [group, group + many) to out (many, levels_of(PLANES)), indexed by the code
  // B + 2 G + 4 H. With two levels the second half repeats the first. `out` has room for AHEAD groups.
  template <int PLANES>
  INLINE void levels(int64_t group, int64_t many, float* out) const {
    if constexpr (PLANES == 3) {
      for (int64_t done = 0; done < many; ++done) {
        const float scale = param(group + done, 0);
        for (int code = 0; code < 8; ++code) out[done * 8 + code] = scale * table_[code];
      }
      return;
    }
    int64_t done = 0;
#if defined(__AVX512F__)
    if (count_ == 4)
      for (; done < many; done += 4) {
        const auto asked = static_cast<__mmask16>((1u << std::min<int64_t>(16, (many - done) * 4)) - 1);
        const int64_t first = (group + done) * 4;
        __m512 p;
        if (bits_ == 16) {
          p = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(asked, values_ + first * 2));
        } else {
          __m128i bytes;
          if (bits_ == 8) {
            bytes = _mm_maskz_loadu_epi8(asked, values_ + first);
          } else {
            const auto pairs = static_cast<__mmask16>((1u << std::min<int64_t>(8, (many - done) * 2)) - 1);
            bytes = apart(_mm_maskz_loadu_epi8(pairs, values_ + first / 2));
          }
          const __m512 codes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
          p = _mm512_add_ps(_mm512_mul_ps(codes, spread<4>(step_)), spread<4>(low_));
        }
        const __m512 mu = _mm512_shuffle_ps(p, p, _MM_SHUFFLE(1, 1, 3, 3));
        const __m512 alpha = _mm512_shuffle_ps(p, p, _MM_SHUFFLE(0, 0, 2, 2));
        const __m512 sign = _mm512_castsi512_ps(_mm512_set1_epi64(0x80000000));
        _mm512_storeu_ps(out + done * 4, _mm512_add_ps(mu, _mm512_xor_ps(alpha, sign)));
      }
#elif defined(__AVX2__)
    if (count_ == 4)
      for (; done + 2 <= many; done += 2) {
        const int64_t first = (group + done) * 4;
        __m256 p;
        if (bits_ == 16) {
          p = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values_ + first * 2)));
        } else {
          __m128i bytes;
          if (bits_ == 8) {
            bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values_ + first));
          } else {
            int32_t pairs;
            std::memcpy(&pairs, values_ + first / 2, sizeof pairs);
            bytes = apart(_mm_cvtsi32_si128(pairs));
          }
          const __m256 codes = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
          p = _mm256_add_ps(_mm256_mul_ps(codes, spread<4>(step_)), spread<4>(low_));
        }
        const __m256 mu = _mm256_shuffle_ps(p, p, _MM_SHUFFLE(1, 1, 3, 3));
        const __m256 alpha = _mm256_shuffle_ps(p, p, _MM_SHUFFLE(0, 0, 2, 2));
        const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi64x(0x80000000));
        _mm256_storeu_ps(out + done * 4, _mm256_add_ps(mu, _mm256_xor_ps(alpha, sign)));
      }
#endif
    for (; done < many; ++done) levels_to(group + done, out + done * 4);
  }

 private:
  INLINE float param(int64_t group, int k) const {
    const int64_t at = group * count_ + k;
    if (bits_ == 16) {
      uint16_t half;
      std::memcpy(&half, values_ + at * 2, sizeof half);
      return half_to_float(half);
    }
    const int code = bits_ == 8 ? values_[at] : values_[at / 2] >> at % 2 * 4 & 15;
    return static_cast<float>(code) * step_[k] + low_[k];
  }

  INLINE void levels_to(int64_t group, float out[4]) const {
    float p[4];
    for (int k = 0; k < count_; ++k) p[k] = param(group, k);
    const int inner = count_ == 4 ? 2 : 0;  // G = 0 selects the second pair
    out[0] = p[inner + 1] - p[inner];
    out[1] = p[inner + 1] + p[inner];
    out[2] = p[1] - p[0];
    out[3] = p[1] + p[0];
  }

#if defined(__AVX2__)
  // The 4-bit codes of the lower 8 bytes, one per byte.
  static INLINE __m128i apart(__m128i pairs) {
    const __m128i wide = _mm_cvtepu8_epi16(pairs);
    return _mm_and_si128(_mm_or_si128(wide, _mm_slli_epi16(wide, 4)), _mm_set1_epi8(15));
  }
#endif

  const uint8_t* values_ = nullptr;
  const float* table_ = nullptr;
  int count_ = 4, bits_ = 16;
  float low_[4] = {}, step_[4] = {};
};

}  // namespace lbllm
