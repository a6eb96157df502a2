// The lookup tables of a token with 4-bit codes; lookup.h describes the method.

#pragma once

#include "quantizer.h"

#include <vector>

namespace lbllm {

constexpr int ENTRIES = 16;  // per table

// The tables of one token's codes.
class Lookup {
 public:
  // Quantizes x (columns,) and builds the tables of its codes, for groups of `length` columns.
  void build(const Quantizer& quantizer, const float* x, int64_t columns, int64_t length) {
    quads_ = columns / 4;
    per_group_ = length / 4;
    const int64_t groups = (columns + length - 1) / length;
    codes_.resize(3 * columns);
    int8_t *body = codes_.data(), *below = body + columns, *above = below + columns;
    const bool finite = quantizer.encode(x, columns, body, below, above, steps);
    if (!finite) steps[0] = std::numeric_limits<float>::quiet_NaN();  // this makes every product NaN
    tables_.resize(quads_ * ENTRIES);
    totals_.resize(3 * groups);
    int most = 0, most_tail = 1;
    for (int64_t quad = 0; quad < quads_; ++quad) {
      table(body + 4 * quad, tables_.data() + quad * ENTRIES);
      most = std::max(most, bound(body + 4 * quad));
    }
    narrow = most <= 31;
    for (int64_t group = 0; group < groups; ++group) {
      int32_t* totals = totals_.data() + 3 * group;
      std::fill_n(totals, 3, 0);
      for (int64_t j = group * length; j < std::min(columns, (group + 1) * length); ++j) {
        totals[0] += body[j];
        totals[1] += below[j];
        totals[2] += above[j];
      }
    }
    for (int side = 0; side < 2; ++side) {
      const int8_t* codes = side ? above : below;
      Tails& tails = tails_[side];
      tails.quads.clear();
      tails.tables.clear();
      tails.first.assign(groups + 1, 0);
      for (int64_t quad = 0; quad < quads_; ++quad) {
        int32_t four;
        std::memcpy(&four, codes + 4 * quad, sizeof four);
        if (four) {
          most_tail = std::max(most_tail, bound(codes + 4 * quad));
          tails.quads.push_back(static_cast<int32_t>(quad));
          tails.tables.resize(tails.tables.size() + ENTRIES);
          table(codes + 4 * quad, tails.tables.data() + tails.tables.size() - ENTRIES);
        }
        if ((quad + 1) % per_group_ == 0 || quad + 1 == quads_)
          tails.first[quad / per_group_ + 1] = static_cast<int32_t>(tails.quads.size());
      }
    }
    together = 127 / most_tail;
  }

  const int8_t* quad(int64_t index) const { return tables_.data() + index * ENTRIES; }
  // The sum of a group's codes. part 0: body, 1: lower tail, 2: upper tail.
  int32_t total(int64_t group, int part) const { return totals_[3 * group + part]; }

  // Calls f(quad, table) for each quad of a group that has codes in the lower (side 0) or upper (side 1) tail.
  template <class F>
  INLINE void each_tail(int side, int64_t group, F f) const {
    const Tails& tails = tails_[side];
    for (int32_t i = tails.first[group]; i < tails.first[group + 1]; ++i)
      f(tails.quads[i], tails.tables.data() + i * ENTRIES);
  }
  bool has_tail(int side, int64_t group) const { return tails_[side].first[group] < tails_[side].first[group + 1]; }

  float steps[3];       // step sizes of the body, the lower and the upper tail
  bool narrow = false;  // the sums of four quads fit into a byte
  int together = 1;     // the number of tail quads whose sums fit into a byte

 private:
  struct Tails {
    std::vector<int32_t> quads, first;  // quads with codes in this tail; where each group starts in `quads`
    std::vector<int8_t> tables;
  };

  // The largest sum of four codes over all signs.
  static int bound(const int8_t* codes) {
    return std::abs(codes[0]) + std::abs(codes[1]) + std::abs(codes[2]) + std::abs(codes[3]);
  }

  static void table(const int8_t* codes, int8_t* out) {
#if defined(__AVX2__)
    alignas(16) static const int8_t SIGNS[4][ENTRIES] = {
        {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
        {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
        {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
        {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1}};
    __m128i sum = _mm_setzero_si128();
    each<4>([&](auto j) {
      const __m128i signs = _mm_load_si128(reinterpret_cast<const __m128i*>(SIGNS[j]));
      sum = _mm_add_epi8(sum, _mm_sign_epi8(_mm_set1_epi8(codes[j]), signs));
    });
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sum);
#else
    for (int entry = 0; entry < ENTRIES; ++entry) {
      int sum = 0;
      for (int j = 0; j < 4; ++j) sum += entry >> j & 1 ? codes[j] : -codes[j];
      out[entry] = static_cast<int8_t>(sum);
    }
#endif
  }

  int64_t quads_ = 0, per_group_ = 1;
  std::vector<int8_t> codes_, tables_;
  std::vector<int32_t> totals_;
  Tails tails_[2];
};

}  // namespace lbllm
