// The tables of a token's 4-bit codes, which packed bits are looked up in: see lookup.h.

#pragma once

#include "quantizer.h"

#include <vector>

namespace lbllm {

constexpr int ENTRIES = 16;  // of a table

// The tables of one token's codes.
class Lookup {
 public:
  // The codes of x (columns,), which `quantizer` puts on its grid; groups of `length` columns.
  void build(const Quantizer& quantizer, const float* x, int64_t columns, int64_t length) {
    quads_ = columns / 4;
    per_group_ = length / 4;
    const int64_t groups = (columns + length - 1) / length;
    codes_.resize(3 * columns);
    int8_t *body = codes_.data(), *below = body + columns, *above = below + columns;
    const bool sound = quantizer.encode(x, columns, body, below, above, steps);
    if (!sound) steps[0] = std::numeric_limits<float>::quiet_NaN();  // and so is every product with them
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
  // A group's sum of codes: of the body (0), below it (1), above it (2).
  int32_t total(int64_t group, int part) const { return totals_[3 * group + part]; }

  // f(quad, table) for the quads of a group with codes below (0) or above (1) the body.
  template <class F>
  INLINE void each_tail(int side, int64_t group, F f) const {
    const Tails& tails = tails_[side];
    for (int32_t i = tails.first[group]; i < tails.first[group + 1]; ++i) f(tails.quads[i], tails.tables.data() + i * ENTRIES);
  }
  bool has_tail(int side, int64_t group) const { return tails_[side].first[group] < tails_[side].first[group + 1]; }

  float steps[3];       // of body, lower and upper tail
  bool narrow = false;  // four quads' sums fit into a byte
  int together = 1;     // so many tail quads' sums do

 private:
  struct Tails {
    std::vector<int32_t> quads, first;  // quads with such codes, and each group's first one in `quads`
    std::vector<int8_t> tables;
  };

  // The largest sum of four codes, whatever their signs.
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
