// Linear layers that compute from packed bits, on the CPU.
//
// In memory the 1 or 2 bits of a weight lie so that a register of LANES 32-bit words holds the codes of many steps of LANES
// neighbouring columns: lane l, step s of a word is bits [s BITS, (s + 1) BITS) and stands for column s LANES + l. One
// step costs a shift, a lookup of LANES levels by the low bits of their lanes, and a multiply-add; nothing is unpacked.
// Every group of a row begins a new step, so a shorter last group needs no special case: x is laid out the same way, with
// zeros where a group does not fill its last step.
//
// The sums are float32, so a layer with quantized activations gives what it gave in training: the input comes here as
// the values its codes stand for.


#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#define INLINE inline __attribute__((always_inline))

// f(0), f(1), .. f(N - 1) with constants, so that arrays which only such indices reach live in registers.
template <int N, class F>
INLINE void each(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) { (f(std::integral_constant<int, I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
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

// One register of floats, of words, and of levels, for the instructions that this file is compiled for.
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
INLINE Levels spread(const float* four) { return _mm512_broadcast_f32x4(_mm_loadu_ps(four)); }
INLINE Floats zero() { return _mm512_setzero_ps(); }
// The lookup reads the two low bits of each lane.
INLINE Floats pick(Levels levels, Word word) { return _mm512_permutevar_ps(levels, word); }
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
INLINE Levels spread(const float* four) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four)); }
INLINE Floats zero() { return _mm256_setzero_ps(); }
// The lookup reads the two low bits of each lane.
INLINE Floats pick(Levels levels, Word word) { return _mm256_permutevar_ps(levels, word); }
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
  float value[4];
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
INLINE Levels spread(const float* four) {
  Levels levels;
  std::memcpy(&levels, four, sizeof levels);
  return levels;
}
INLINE Floats zero() { return Floats{}; }
INLINE Floats pick(const Levels& levels, const Word& word) {
  Floats picked;
  for (int l = 0; l < LANES; ++l) picked.lane[l] = levels.value[word.lane[l] & 3];
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

// e^x for x <= 0, 0 where it is too small to matter. By hand, since a call would keep a loop from being vectorized.
INLINE float exponential(float x) {
  const float bounded = std::max(x, -80.0f), n = std::nearbyint(bounded * 1.44269504f);
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  const float power = ((((1.98756915e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
                       1.6666665459e-1f) * r + 0.5f;
  return (power * r * r + r + 1) * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

// The group parameters of a layer: float16, or codes of 8 or 4 bits with a float16 minimum and step of each row and
// parameter; two codes of 4 bits share a byte, the first has its lower half.
struct Params {
  const void* values;
  const uint16_t* scale;  // null for float16 parameters
  int64_t groups;
  int count;  // 2 or 4 a group: alpha_0, mu_0[, alpha_1, mu_1]
  int bits;   // 4, 8 or 16

  int64_t row_bytes() const { return groups * count * bits / 8; }
};

constexpr int64_t AHEAD = 8;  // groups whose levels are made at once

// Those of one row.
class RowParams {
 public:
  RowParams() = default;
  RowParams(const Params& params, int64_t row)
      : values_(static_cast<const uint8_t*>(params.values) + row * params.row_bytes()),
        count_(params.count),
        bits_(params.bits) {
    for (int k = 0; params.scale && k < count_; ++k) {
      low_[k] = half_to_float(params.scale[(row * count_ + k) * 2]);
      step_[k] = half_to_float(params.scale[(row * count_ + k) * 2 + 1]);
    }
  }

  // The levels of groups [group, group + many) into out (many, 4), by code, B + 2 G; with two levels the second half
  // repeats the first. `out` has room for AHEAD groups.
  INLINE void levels(int64_t group, int64_t many, float* out) const {
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
          p = _mm512_add_ps(_mm512_mul_ps(codes, spread(step_)), spread(low_));
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
          p = _mm256_add_ps(_mm256_mul_ps(codes, spread(step_)), spread(low_));
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
  INLINE void levels_to(int64_t group, float out[4]) const {
    float p[4];
    for (int k = 0; k < count_; ++k) {
      const int64_t at = group * count_ + k;
      if (bits_ == 16) {
        uint16_t half;
        std::memcpy(&half, values_ + at * 2, sizeof half);
        p[k] = half_to_float(half);
      } else {
        const int code = bits_ == 8 ? values_[at] : values_[at / 2] >> at % 2 * 4 & 15;
        p[k] = static_cast<float>(code) * step_[k] + low_[k];
      }
    }
    const int inner = count_ == 4 ? 2 : 0;  // G = 0 is the second pair
    out[0] = p[inner + 1] - p[inner];
    out[1] = p[inner + 1] + p[inner];
    out[2] = p[1] - p[0];
    out[3] = p[1] + p[0];
  }

#if defined(__AVX2__)
  // The 4-bit codes in the lower 8 bytes, one a byte.
  static INLINE __m128i apart(__m128i pairs) {
    const __m128i wide = _mm_cvtepu8_epi16(pairs);
    return _mm_and_si128(_mm_or_si128(wide, _mm_slli_epi16(wide, 4)), _mm_set1_epi8(15));
  }
#endif

  const uint8_t* values_ = nullptr;
  int count_ = 4, bits_ = 16;
  float low_[4] = {}, step_[4] = {};
};

constexpr int64_t WORK = 1 << 21;      // weights times tokens that are worth waking an idle thread for, some 0.1 ms
constexpr int64_t EACH = 1 << 16;      // weights to expand, or values to quantize, that are worth the same
constexpr int64_t EXPANDED = 1 << 21;  // weights that are expanded at once for many tokens: they stay in the cache
constexpr int64_t FEW = 8;           // tokens up to which the packed weights are multiplied as they are

// Where the layer's columns lie among `steps * LANES` values; nothing to do where every group fills its steps.
struct Shape {
  int64_t columns = 0, length = 0, groups = 0, steps = 0, words = 0;

  Shape() = default;
  Shape(int64_t columns, int64_t length, int bits) : columns(columns), length(length) {
    groups = (columns + length - 1) / length;
    steps = (groups - 1) * steps_of(length) + steps_of(columns - (groups - 1) * length);
    words = (steps * bits + 31) / 32;
  }
  static int64_t steps_of(int64_t width) { return (width + LANES - 1) / LANES; }
  int64_t width(int64_t group) const { return std::min(length, columns - group * length); }
  int64_t padded() const { return steps * LANES; }
  bool filled() const { return padded() == columns; }

  template <class Move>
  void each_group(Move move) const {  // move(first column, first place, width)
    for (int64_t group = 0; group < groups; ++group)
      move(group * length, group * steps_of(length) * LANES, width(group));
  }
};

// A layer's packed weights.
struct Weights {
  Shape shape;
  const uint32_t* words;  // (rows, shape.words, LANES)
  Params params;
};

// Asks for memory that is read later. A layer's rows are too short for the processor to see them coming, and without
// this a token waits for them a third of its time.
INLINE void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// The products of R rows from `row` on with M tokens x (M, padded): sums[r][m].
template <int BITS, int R, int M>
void multiply(const Weights& w, int64_t row, const float* x, float sums[R][M]) {
  constexpr int64_t PER_WORD = 32 / BITS;
  const Shape& shape = w.shape;
  const int64_t stride = shape.words * LANES, padded = shape.padded();
  const uint32_t* words = w.words + row * stride;
  RowParams params[R];
  Word word[R];
  alignas(64) float ahead[R][AHEAD * 4];
  Levels levels[R];
  Floats sum[R][M];
  each<R>([&](auto r) {
    params[r] = RowParams(w.params, row + r);
    each<M>([&](auto m) { sum[r][m] = zero(); });
  });
  const int64_t bytes = w.params.row_bytes();
  fetch(static_cast<const char*>(w.params.values) + (row + 2 * R) * bytes, R * bytes);
  int64_t left = 0;  // steps left in the present words
  for (int64_t group = 0; group < shape.groups; ++group) {
    const int64_t place = group % AHEAD;
    if (place == 0)
      each<R>([&](auto r) { params[r].levels(group, std::min(AHEAD, shape.groups - group), ahead[r]); });
    each<R>([&](auto r) { levels[r] = spread(ahead[r] + place * 4); });
    for (int64_t steps = Shape::steps_of(shape.width(group)); steps > 0;) {
      if (left == 0) {
        each<R>([&](auto r) {
          word[r] = load(words + r * stride);
          fetch(words + (r + 2 * R) * stride, LANES * sizeof(uint32_t));
        });
        words += LANES;
        left = PER_WORD;
      }
      const int64_t now = std::min(steps, left);
      for (const float* end = x + now * LANES; x != end; x += LANES) {
        Floats input[M];
        each<M>([&](auto m) { input[m] = read(x + m * padded); });
        each<R>([&](auto r) {
          const Floats weight = pick(levels[r], word[r]);
          word[r] = next<BITS>(word[r]);
          each<M>([&](auto m) { sum[r][m] = multiply_add(weight, input[m], sum[r][m]); });
        });
      }
      steps -= now;
      left -= now;
    }
  }
  each<R>([&](auto r) { each<M>([&](auto m) { sums[r][m] = total(sum[r][m]); }); });
}

// y (tokens, rows) at M tokens from `token` on, for rows [begin, end).
template <int BITS, int R, int M>
void some_rows(const Weights& w, int64_t begin, int64_t end, int64_t rows, const float* x, float* y) {
  float sums[R][M];
  int64_t row = begin;
  for (; row + R <= end; row += R) {
    multiply<BITS, R, M>(w, row, x, sums);
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) y[m * rows + row + r] = sums[r][m];
  }
  for (; row < end; ++row) {
    multiply<BITS, 1, M>(w, row, x, sums);
    for (int m = 0; m < M; ++m) y[m * rows + row] = sums[0][m];
  }
}

// A layer, its input (tokens, padded) and its output (tokens, rows).
struct Job {
  Weights weights;
  int64_t rows;
  const float* x;
  float* y;
};

template <int BITS>
void some_tokens(const Job& job, int64_t begin, int64_t end, int64_t tokens) {
  const Weights& w = job.weights;
  int64_t token = 0;
  while (token < tokens) {
    const float* from = job.x + token * w.shape.padded();
    float* to = job.y + token * job.rows;
    const int64_t left = tokens - token;
    if (left >= 4) {
      some_rows<BITS, 2, 4>(w, begin, end, job.rows, from, to);
      token += 4;
    } else if (left >= 2) {
      some_rows<BITS, 4, 2>(w, begin, end, job.rows, from, to);
      token += 2;
    } else {
      some_rows<BITS, 4, 1>(w, begin, end, job.rows, from, to);
      token += 1;
    }
  }
}

inline void some_rows_of(const Job& job, int64_t begin, int64_t end, int64_t tokens) {
  (job.weights.params.count == 2 ? some_tokens<1> : some_tokens<2>)(job, begin, end, tokens);
}

// x (tokens, columns) in the order of the words, in `room` where it isn't that already.
inline const float* laid_out(const Shape& shape, const float* x, int64_t tokens, std::vector<float>& room) {
  if (shape.filled()) return x;
  room.assign(tokens * shape.padded(), 0.0f);
  for (int64_t token = 0; token < tokens; ++token)
    shape.each_group([&](int64_t column, int64_t first, int64_t width) {
      std::copy_n(x + token * shape.columns + column, width, room.data() + token * shape.padded() + first);
    });
  return room.data();
}

// One row's weights as floats (columns,).
template <int BITS>
void expand_row(const Weights& w, int64_t row, float* out, float* room) {
  constexpr int PER_WORD = 32 / BITS;
  const Shape& shape = w.shape;
  const uint32_t* words = w.words + row * shape.words * LANES;
  const RowParams params(w.params, row);
  float* place = shape.filled() ? out : room;
  Word word = load(words);
  alignas(64) float ahead[AHEAD * 4];
  int64_t done = 0;
  for (int64_t group = 0; group < shape.groups; ++group) {
    if (group % AHEAD == 0) params.levels(group, std::min(AHEAD, shape.groups - group), ahead);
    const Levels levels = spread(ahead + group % AHEAD * 4);
    for (int64_t step = Shape::steps_of(shape.width(group)); step > 0; --step, ++done, place += LANES) {
      if (done > 0 && done % PER_WORD == 0) word = load(words += LANES);
      write(place, pick(levels, word));
      word = next<BITS>(word);
    }
  }
  if (!shape.filled())
    shape.each_group([&](int64_t column, int64_t first, int64_t width) {
      std::copy_n(room + first, width, out + column);
    });
}

template <int BITS>
void expand_rows(const Weights& w, int64_t begin, int64_t end, float* out) {
  at::parallel_for(begin, end, std::max<int64_t>(1, EACH / w.shape.columns), [&](int64_t first, int64_t last) {
    std::vector<float> room(w.shape.filled() ? 0 : w.shape.padded());
    for (int64_t row = first; row < last; ++row)
      expand_row<BITS>(w, row, out + (row - begin) * w.shape.columns, room.data());
  });
}

// The piecewise quantizer of lbllm.activations, value for value; bits 0: none. For `apply`, `size` features of a token
// share a range.
struct Quantizer {
  int bits = 0, tail = 0;
  float knee = 0, clip_low = 0, clip_high = 0;
  int64_t size = 0;

  bool operator==(const Quantizer&) const = default;

  // One token's grid.
  struct Grid {
    float body, zero, span, low, high, tails;
  };
  // A token's least value, or zero, and its greatest.
  static std::pair<float, float> range(const float* x, int64_t features) {
    float least = 0, most = 0;
    for (int64_t i = 0; i < features; ++i) {
      least = std::min(least, x[i]);
      most = std::max(most, x[i]);
    }
    return {least, most};
  }
  Grid grid(std::pair<float, float> range) const {
    const float steps = static_cast<float>((1 << bits) - 1 - 2 * tail), tails = static_cast<float>(tail);
    const float share = tail ? knee : 1.0f, bottom = clip_low * range.first, top = clip_high * range.second;
    const float body = std::max(share * (top - bottom) / steps, 1e-12f);
    const float zero = std::nearbyint(-share * bottom / body), span = steps - zero;
    if (!tail) return {body, zero, span, 0, 0, 0};
    const float low = std::max(-zero * body - bottom, 0.0f) / tails, high = std::max(top - span * body, 0.0f) / tails;
    return {body, zero, span, low, high, tails};
  }

  // A value's codes: the body's, and the steps into the tails that lie at its ends.
  struct Place {
    float code, below, above;
  };
  static INLINE Place place(float value, const Grid& grid) {
    const float code = std::min(std::max(std::nearbyint(value / grid.body), -grid.zero), grid.span);
    const float edge = code * grid.body, low_step = std::max(grid.low, 1e-12f), high_step = std::max(grid.high, 1e-12f);
    const float below = std::min(std::max(std::nearbyint((edge - value) / low_step), 0.0f), grid.tails);
    const float above = std::min(std::max(std::nearbyint((value - edge) / high_step), 0.0f), grid.tails);
    return {code, code == -grid.zero ? below : 0.0f, code == grid.span ? above : 0.0f};
  }

  // One token's values on its grids.
  void apply(const float* x, float* out, int64_t features) const {
    for (int64_t first = 0; first < features; first += size)
      apply_one(x + first, out + first, std::min(size, features - first));
  }

  // The same where all features share a range.
  void apply_one(const float* x, float* out, int64_t features) const {
    const Grid on = grid(range(x, features));
    if (!tail) {
      for (int64_t i = 0; i < features; ++i)
        out[i] = on.body * std::min(std::max(std::nearbyint(x[i] / on.body), -on.zero), on.span);
      return;
    }
    for (int64_t i = 0; i < features; ++i) {
      const auto [code, below, above] = place(x[i], on);
      out[i] = code * on.body - on.low * below + on.high * above;
    }
  }

  // The same as codes: x is steps[0] body + steps[1] below + steps[2] above, with below <= 0 <= above. False where x is
  // not finite. At most 4 bits.
  bool encode(const float* x, int64_t features, int8_t* body_codes, int8_t* below_codes, int8_t* above_codes,
              float* steps) const {
    const Grid on = grid(range(x, features));
    steps[0] = on.body;
    steps[1] = on.low;
    steps[2] = on.high;
    int strange = 0;
    for (int64_t i = 0; i < features; ++i) {
      strange |= !(std::abs(x[i]) <= std::numeric_limits<float>::max());
      const auto [code, below, above] = place(x[i], on);
      body_codes[i] = static_cast<int8_t>(static_cast<int>(code));
      below_codes[i] = static_cast<int8_t>(-static_cast<int>(below));
      above_codes[i] = static_cast<int8_t>(static_cast<int>(above));
    }
    return !strange;
  }

  // The gradients that one token's values on its grid send back: to x, and added to `act` those of knee and clips.
  // The formulas are lbllm.activations'; `tau` is the soft mask's temperature.
  void backward(const float* x, const float* grad, float* to_x, double* act, float tau, int64_t features) const {
    const auto [least, most] = range(x, features);
    const Grid on = grid({least, most});
    // By name, not as a structured binding: clang does not allow one inside an OpenMP loop.
    const float body = on.body, zero = on.zero, span = on.span, low = on.low, high = on.high, tails = on.tails;
    const float lower = -zero * body, upper = span * body;
    const float slack = tail ? 1e-5f * (upper + tails * high - (lower - tails * low)) : body / 2;
    const float first = lower - tails * low - slack, last = upper + tails * high + slack;
    const float dense_first = tail ? lower : first, dense_last = tail ? upper : last;
    const float width = tau * body, below_reach = body + low, above_reach = body + high;
    float by_body = 0, by_low = 0, by_high = 0;
#pragma omp simd reduction(+ : by_body, by_low, by_high)
    for (int64_t i = 0; i < features; ++i) {
      const float value = x[i];
      const auto [code, below, above] = place(value, on);
      float slope = code - (value >= dense_first && value <= dense_last ? value / body : 0.0f);
      if (tail) {
        const float edge = code * body;
        // Moving an edge hands values near it from the tail's grid to the body's, by the soft mask's slope.
        const float over = value - upper, under = value - lower;
        const float to_upper = (edge - upper - high * above) * bell(over / width) * (span / width);
        const float to_lower = (edge - lower + low * below) * bell(under / width) * (zero / width);
        slope += std::abs(over) <= above_reach ? to_upper : 0.0f;
        slope += std::abs(under) <= below_reach ? to_lower : 0.0f;
        by_low -= grad[i] * below;
        by_high += grad[i] * above;
      }
      by_body += grad[i] * slope;
      to_x[i] = value >= first && value <= last ? grad[i] : 0.0f;
    }
    // From the steps to what the grid is made of; where it is cut off at nothing, no gradient passes.
    const float steps = span + zero, share = tail ? knee : 1.0f, bottom = clip_low * least, top = clip_high * most;
    if (tail) {
      by_low = -zero * body - bottom >= 0 ? by_low / tails : 0.0f;
      by_high = top - span * body >= 0 ? by_high / tails : 0.0f;
      by_body -= zero * by_low + span * by_high;
    }
    if (!(share * (top - bottom) / steps >= 1e-12f)) by_body = 0;
    if (tail) act[0] += by_body * (top - bottom) / steps;
    act[1] -= (share / steps * by_body + by_low) * least;
    act[2] += (share / steps * by_body + by_high) * most;
  }

 private:
  // m (1 - m) for m = sigmoid(t).
  static INLINE float bell(float t) {
    const float e = exponential(-std::abs(t));
    return e / ((1 + e) * (1 + e));
  }
};

}  // namespace
