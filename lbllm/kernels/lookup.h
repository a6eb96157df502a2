// Linear layers with 4-bit activations, computed by table lookup.
//
// The sums +-c_0 +-c_1 +-c_2 +-c_3 of a token's codes c in four neighbouring columns (a quad) have 16 values: a table.
// One byte shuffle looks up the sums of 32 rows at once; the index is four bits of each row's bit plane (T-MAC, Wei et
// al. 2024; the idea is the Method of Four Russians). With s = 2B - 1 and g = 2G - 1, the sum over the members of one
// level, for example B = G = 1, is
//
//     1/4 [X + X_s + X_g + X_sg],   X_p = sum_j p_j x_j,
//
// so three lookups per quad are enough: for B, G and B xor G. The four levels of a group are applied once per group.
// The sums are integers and therefore exact. A level without members adds nothing, however large it is. Activations
// beyond the knee have a second code with a step of its own, and a second table per quad.
//
// In memory a layer is a list of tiles of 32 rows. A tile holds 32 bytes per plane for each 8 columns: byte 2 i is row
// i of the tile, byte 2 i + 1 is row 16 + i, and the bits of a byte are the columns, in the order of a checkpoint. The
// parameters are stored by tile as well: for each group alpha_0 of the 32 rows, then mu_0 and so on. A tile is read
// from start to end.

#pragma once

#include "tables.h"
#include "work.h"

#include <ATen/Parallel.h>

namespace lbllm {

constexpr int TILE = 32;  // rows per tile
constexpr int QUADS = 2;  // quads per byte

// A packed layer in tiles.
struct Tiles {
  const uint8_t* bytes;    // (rows / TILE, columns / 8, bits, TILE)
  const uint16_t* params;  // float16 (rows / TILE, groups, 2 bits, TILE)
  int64_t columns, length, groups;
  int bits;

  // The k-th parameter of a group, for all rows of a tile.
  const uint16_t* params_at(int64_t tile, int64_t group, int k) const {
    return params + ((tile * groups + group) * 2 * bits + k) * TILE;
  }
};

// The row of a tile that a byte belongs to.
inline int row_of(int place) { return place % 2 * 16 + place / 2; }

#if defined(__AVX2__)

// The integer sums of 32 rows for P planes: rows 0 .. 15 and 16 .. 31.
template <int P>
struct Whole {
  __m256i first[P], second[P];
  INLINE Whole() {
    each<P>([&](auto p) { first[p] = second[p] = _mm256_setzero_si256(); });
  }
  // Adds bytes, one per row.
  INLINE void add(int p, __m256i bytes) {
    first[p] = _mm256_add_epi16(first[p], _mm256_maddubs_epi16(_mm256_set1_epi16(1), bytes));
    second[p] = _mm256_add_epi16(second[p], _mm256_maddubs_epi16(_mm256_set1_epi16(256), bytes));
  }
  // For rows 8 Q .. 8 Q + 7, the sum over the members of each level, times the number of levels. `total` is the sum
  // over all columns.
  template <int Q>
  INLINE void members(int32_t total, __m256* out) const {
    __m256i sum[P];
    each<P>([&](auto p) {
      const __m256i half = Q < 2 ? first[p] : second[p];
      sum[p] = _mm256_cvtepi16_epi32(Q % 2 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half));
    });
    const __m256i all = _mm256_set1_epi32(total);
    const auto level = [&](int k, __m256i a, __m256i b) {
      out[2 * k] = _mm256_cvtepi32_ps(_mm256_sub_epi32(a, b));
      out[2 * k + 1] = _mm256_cvtepi32_ps(_mm256_add_epi32(a, b));
    };
    if constexpr (P == 1) {
      level(0, all, sum[0]);
    } else {
      level(0, _mm256_add_epi32(all, sum[1]), _mm256_sub_epi32(sum[0], sum[2]));
      level(1, _mm256_sub_epi32(all, sum[1]), _mm256_add_epi32(sum[0], sum[2]));
    }
  }
};

INLINE __m256i table_of(const int8_t* table) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}

// Computes y (TILE,) for one tile.
template <int BITS, bool NARROW>
void look_up_tile(const Tiles& w, int64_t tile, const Lookup& lookup, float* y) {
  constexpr int P = BITS == 2 ? 3 : 1;
  const __m256i low_bits = _mm256_set1_epi8(15);
  const int64_t blocks = w.columns / 8, per_group = w.length / 8;
  const uint8_t* bytes = w.bytes + tile * blocks * BITS * TILE;
  const auto plane = [&](int64_t block, int bit) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + (block * BITS + bit) * TILE));
  };
  // The bits of one quad of a block of 8 columns, for each plane.
  const auto nibbles = [&](const __m256i* loaded, int odd, __m256i* out) __attribute__((always_inline)) {
    each<BITS>([&](auto bit) {
      out[bit] = _mm256_and_si256(odd ? _mm256_srli_epi16(loaded[bit], 4) : loaded[bit], low_bits);
    });
    if constexpr (BITS == 2) out[2] = _mm256_xor_si256(out[0], out[1]);
  };
  // The sums over a block, one byte per row.
  const auto block_sums = [&](int64_t block, __m256i* sums) __attribute__((always_inline)) {
    __m256i loaded[BITS], index[2][P];
    each<BITS>([&](auto bit) { loaded[bit] = plane(block, bit); });
    nibbles(loaded, 0, index[0]);
    nibbles(loaded, 1, index[1]);
    const __m256i even = table_of(lookup.quad(2 * block)), odd = table_of(lookup.quad(2 * block + 1));
    each<P>([&](auto p) {
      sums[p] = _mm256_add_epi8(_mm256_shuffle_epi8(even, index[0][p]), _mm256_shuffle_epi8(odd, index[1][p]));
    });
  };
  __m256 result[4];
  each<4>([&](auto q) { result[q] = _mm256_setzero_ps(); });
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t end = std::min(blocks, (group + 1) * per_group);
    int64_t block = group * per_group;
    Whole<P> body;
    __m256i sums[P], more[P];
    if constexpr (NARROW)
      for (; block + 2 <= end; block += 2) {
        block_sums(block, sums);
        block_sums(block + 1, more);
        each<P>([&](auto p) { body.add(p, _mm256_add_epi8(sums[p], more[p])); });
      }
    for (; block < end; ++block) {
      block_sums(block, sums);
      each<P>([&](auto p) { body.add(p, sums[p]); });
    }
    constexpr int K = 2 * BITS;
    __m256 x[4][K];
    each<4>([&](auto q) {
      body.template members<q>(lookup.total(group, 0), x[q]);
      each<K>([&](auto k) { x[q][k] = _mm256_mul_ps(x[q][k], _mm256_set1_ps(lookup.steps[0])); });
    });
    for (int side = 0; side < 2; ++side) {
      if (!lookup.has_tail(side, group)) continue;
      Whole<P> tail;
      int room = lookup.together;
      each<P>([&](auto p) { more[p] = _mm256_setzero_si256(); });
      lookup.each_tail(side, group, [&](int64_t quad, const int8_t* table) __attribute__((always_inline)) {
        __m256i loaded[BITS], index[P];
        each<BITS>([&](auto bit) { loaded[bit] = plane(quad / QUADS, bit); });
        if (quad % QUADS)
          nibbles(loaded, 1, index);
        else
          nibbles(loaded, 0, index);
        const __m256i entries = table_of(table);
        each<P>([&](auto p) { more[p] = _mm256_add_epi8(more[p], _mm256_shuffle_epi8(entries, index[p])); });
        if (--room == 0) {
          each<P>([&](auto p) {
            tail.add(p, more[p]);
            more[p] = _mm256_setzero_si256();
          });
          room = lookup.together;
        }
      });
      each<P>([&](auto p) { tail.add(p, more[p]); });
      each<4>([&](auto q) {
        __m256 more_x[K];
        tail.template members<q>(lookup.total(group, 1 + side), more_x);
        each<K>([&](auto k) { x[q][k] = _mm256_fmadd_ps(more_x[k], _mm256_set1_ps(lookup.steps[1 + side]), x[q][k]); });
      });
    }
    each<4>([&](auto q) {
      __m256 p[K];
      each<K>([&](auto k) {
        const uint16_t* halves = w.params_at(tile, group, k) + 8 * q;
        p[k] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
      });
      each<BITS>([&](auto k) {
        result[q] = _mm256_fmadd_ps(_mm256_sub_ps(p[2 * k + 1], p[2 * k]), x[q][2 * k], result[q]);
        result[q] = _mm256_fmadd_ps(_mm256_add_ps(p[2 * k + 1], p[2 * k]), x[q][2 * k + 1], result[q]);
      });
    });
  }
  const __m256 share = _mm256_set1_ps(BITS == 1 ? 0.5f : 0.25f);
  each<4>([&](auto q) { _mm256_storeu_ps(y + 8 * q, _mm256_mul_ps(result[q], share)); });
}

#else

template <int BITS, bool NARROW>
void look_up_tile(const Tiles& w, int64_t tile, const Lookup& lookup, float* y) {
  constexpr int P = BITS == 2 ? 3 : 1;
  const int64_t blocks = w.columns / 8, per_group = w.length / 8;
  const uint8_t* bytes = w.bytes + tile * blocks * BITS * TILE;
  for (int place = 0; place < TILE; ++place) {
    float result = 0;
    for (int64_t group = 0; group < w.groups; ++group) {
      int whole[3][P] = {};
      const auto add = [&](int64_t quad, const int8_t* table, int* sums) {
        const uint8_t* at = bytes + quad / QUADS * BITS * TILE + place;
        const int shift = quad % QUADS * 4, first = at[0] >> shift & 15;
        sums[0] += table[first];
        if constexpr (BITS == 2) {
          const int second = at[TILE] >> shift & 15;
          sums[1] += table[second];
          sums[2] += table[first ^ second];
        }
      };
      for (int64_t quad = group * per_group * QUADS; quad < std::min(blocks, (group + 1) * per_group) * QUADS; ++quad)
        add(quad, lookup.quad(quad), whole[0]);
      for (int side = 0; side < 2; ++side)
        lookup.each_tail(side, group, [&](int64_t quad, const int8_t* table) { add(quad, table, whole[1 + side]); });
      float x[2 * BITS] = {}, p[2 * BITS];
      for (int part = 0; part < 3; ++part) {
        const int* sum = whole[part];
        const int all = lookup.total(group, part);
        for (int k = 0; k < BITS; ++k) {
          const int a = BITS == 1 ? all : k ? all - sum[P > 1] : all + sum[P > 1];
          const int b = BITS == 1 ? sum[0] : k ? sum[0] + sum[P - 1] : sum[0] - sum[P - 1];
          x[2 * k] += static_cast<float>(a - b) * lookup.steps[part];
          x[2 * k + 1] += static_cast<float>(a + b) * lookup.steps[part];
        }
      }
      for (int k = 0; k < 2 * BITS; ++k) p[k] = half_to_float(w.params_at(tile, group, k)[row_of(place)]);
      for (int k = 0; k < BITS; ++k)
        result += (p[2 * k + 1] - p[2 * k]) * x[2 * k] + (p[2 * k + 1] + p[2 * k]) * x[2 * k + 1];
    }
    y[row_of(place)] = result * (BITS == 1 ? 0.5f : 0.25f);
  }
}

#endif

// Expands the weights of one tile to floats (TILE, columns).
template <int BITS>
void expand_tile(const Tiles& w, int64_t tile, float* out) {
  const int64_t blocks = w.columns / 8;
  const uint8_t* bytes = w.bytes + tile * blocks * BITS * TILE;
  for (int place = 0; place < TILE; ++place) {
    float* to = out + row_of(place) * w.columns;
    alignas(16) float levels[4];
    for (int64_t block = 0; block < blocks; ++block, to += 8) {
      if (block % (w.length / 8) == 0) {
        float p[2 * BITS];
        const int64_t group = block / (w.length / 8);
        for (int k = 0; k < 2 * BITS; ++k) p[k] = half_to_float(w.params_at(tile, group, k)[row_of(place)]);
        for (int code = 0; code < 4; ++code) {
          const float* pair = BITS == 2 && code < 2 ? p + 2 : p;
          levels[code] = code % 2 ? pair[1] + pair[0] : pair[1] - pair[0];
        }
      }
      const uint8_t* at = bytes + block * BITS * TILE + place;
      const uint32_t sign = at[0], bitmap = BITS == 2 ? at[TILE] : 0;
#if defined(__AVX2__)
      const __m256i shifts = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), one = _mm256_set1_epi32(1);
      __m256i code = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(sign)), shifts), one);
      if constexpr (BITS == 2) {
        const __m256i second = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bitmap)), shifts);
        code = _mm256_or_si256(code, _mm256_slli_epi32(_mm256_and_si256(second, one), 1));
      }
      const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(levels));
      _mm256_storeu_ps(to, _mm256_permutevar_ps(four, code));
#else
      for (int j = 0; j < 8; ++j) to[j] = levels[(sign >> j & 1) | (bitmap >> j & 1) << 1];
#endif
    }
  }
}

// Defined in linear.cpp, so the templates above are compiled only once.

// Computes y (rows,) for the tiles [begin, end).
void look_up(const Tiles& w, int64_t begin, int64_t end, const Lookup& lookup, float* y);
// Expands the tiles [begin, end) to floats ((end - begin) TILE, columns).
void expand_tiles(const Tiles& w, int64_t begin, int64_t end, float* out);

}  // namespace lbllm
