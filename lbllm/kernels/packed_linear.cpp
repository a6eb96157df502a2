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

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

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
INLINE Levels spread(__m256 twice) { return _mm512_broadcast_f32x8(twice); }
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
INLINE Levels spread(__m256 twice) { return twice; }
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

// The group parameters of a layer: float16, or 8-bit codes with a float16 minimum and step of each row and parameter.
struct Params {
  const void* values;
  const uint16_t* scale;  // null for float16 parameters
  int64_t groups;
  int count;  // 2 or 4 a group: alpha_0, mu_0[, alpha_1, mu_1]
};

// Those of one row.
class RowParams {
 public:
  RowParams() = default;
  RowParams(const Params& params, int64_t row)
      : halves_(params.scale ? nullptr : static_cast<const uint16_t*>(params.values) + row * params.groups * params.count),
        bytes_(params.scale ? static_cast<const uint8_t*>(params.values) + row * params.groups * params.count : nullptr),
        count_(params.count) {
    for (int k = 0; params.scale && k < count_; ++k) {
      low_[k] = half_to_float(params.scale[(row * count_ + k) * 2]);
      step_[k] = half_to_float(params.scale[(row * count_ + k) * 2 + 1]);
    }
  }

  // The levels of a group by code, B + 2 G; with two levels the second half repeats the first.
  INLINE Levels levels(int64_t group) const {
#if defined(__AVX2__)
    if (halves_ && count_ == 4) {
      const __m128i twice = _mm_castpd_si128(_mm_loaddup_pd(reinterpret_cast<const double*>(halves_ + group * 4)));
      const __m256 p = _mm256_cvtph_ps(twice);
      const __m256 mu = _mm256_shuffle_ps(p, p, _MM_SHUFFLE(1, 1, 3, 3));
      const __m256 alpha = _mm256_shuffle_ps(p, p, _MM_SHUFFLE(0, 0, 2, 2));
      const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi64x(0x80000000));
      return spread(_mm256_add_ps(mu, _mm256_xor_ps(alpha, sign)));
    }
#endif
    float p[4];
    for (int k = 0; k < count_; ++k)
      p[k] = halves_ ? half_to_float(halves_[group * count_ + k])
                     : static_cast<float>(bytes_[group * count_ + k]) * step_[k] + low_[k];
    const int inner = count_ == 4 ? 2 : 0;  // G = 0 is the second pair
    alignas(16) const float out[4] = {p[inner + 1] - p[inner], p[inner + 1] + p[inner], p[1] - p[0], p[1] + p[0]};
    return spread(out);
  }

 private:
  const uint16_t* halves_ = nullptr;
  const uint8_t* bytes_ = nullptr;
  int count_ = 4;
  float low_[4] = {}, step_[4] = {};
};

constexpr int64_t WORK = 1 << 17;    // weights times tokens that are worth waking a thread for
constexpr int64_t EXPANDED = 1 << 21;  // weights that are expanded at once for many tokens: they stay in the cache
constexpr int64_t FEW = 8;           // tokens up to which the packed weights are multiplied as they are

// Where the layer's columns lie among `steps * LANES` values; nothing to do where every group fills its steps.
struct Shape {
  int64_t columns, length, groups, steps, words;

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

// The products of R rows from `row` on with M tokens x (M, padded): sums[r][m].
template <int BITS, int R, int M>
void multiply(const Weights& w, int64_t row, const float* x, float sums[R][M]) {
  constexpr int64_t PER_WORD = 32 / BITS;
  const Shape& shape = w.shape;
  const int64_t stride = shape.words * LANES, padded = shape.padded();
  const uint32_t* words = w.words + row * stride;
  RowParams params[R];
  Word word[R];
  Levels levels[R];
  Floats sum[R][M];
  each<R>([&](auto r) {
    params[r] = RowParams(w.params, row + r);
    each<M>([&](auto m) { sum[r][m] = zero(); });
  });
  int64_t left = 0;  // steps left in the present words
  for (int64_t group = 0; group < shape.groups; ++group) {
    each<R>([&](auto r) { levels[r] = params[r].levels(group); });
    for (int64_t steps = Shape::steps_of(shape.width(group)); steps > 0;) {
      if (left == 0) {
        each<R>([&](auto r) { word[r] = load(words + r * stride); });
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

template <int BITS>
void few_tokens(const Weights& w, int64_t rows, int64_t tokens, const float* x, float* y) {
  const int64_t grain = std::max<int64_t>(4, WORK / (w.shape.columns * tokens));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    int64_t token = 0;
    while (token < tokens) {
      const float* from = x + token * w.shape.padded();
      float* to = y + token * rows;
      const int64_t left = tokens - token;
      if (left >= 8) {
        some_rows<BITS, 1, 8>(w, begin, end, rows, from, to);
        token += 8;
      } else if (left >= 4) {
        some_rows<BITS, 2, 4>(w, begin, end, rows, from, to);
        token += 4;
      } else if (left >= 2) {
        some_rows<BITS, 4, 2>(w, begin, end, rows, from, to);
        token += 2;
      } else {
        some_rows<BITS, 4, 1>(w, begin, end, rows, from, to);
        token += 1;
      }
    }
  });
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
  int64_t done = 0;
  for (int64_t group = 0; group < shape.groups; ++group) {
    const Levels levels = params.levels(group);
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
  at::parallel_for(begin, end, std::max<int64_t>(1, WORK / w.shape.columns), [&](int64_t first, int64_t last) {
    std::vector<float> room(w.shape.filled() ? 0 : w.shape.padded());
    for (int64_t row = first; row < last; ++row)
      expand_row<BITS>(w, row, out + (row - begin) * w.shape.columns, room.data());
  });
}

Weights weights_of(const Tensor& words, const Tensor& params, const std::optional<Tensor>& scale, int64_t columns,
                   int64_t length) {
  const int count = static_cast<int>(params.size(2));
  const Shape shape(columns, length, count / 2);
  TORCH_CHECK(words.scalar_type() == at::kInt && words.is_contiguous() && words.dim() == 3 &&
                  words.size(1) == shape.words && words.size(2) == LANES,
              "packed_linear: words must be the contiguous int32 tensor that pack_words makes of these sizes");
  TORCH_CHECK(params.is_contiguous() && params.size(0) == words.size(0) && params.size(1) == shape.groups &&
                  (count == 2 || count == 4) &&
                  params.scalar_type() == (scale ? at::kByte : at::kHalf),
              "packed_linear: params must be contiguous (rows, groups, 2 or 4), float16, or uint8 with a scale");
  const uint16_t* affine = nullptr;
  if (scale) {
    TORCH_CHECK(scale->is_contiguous() && scale->scalar_type() == at::kHalf &&
                    scale->numel() == words.size(0) * count * 2,
                "packed_linear: params_scale must be contiguous float16 (rows, levels, 2)");
    affine = static_cast<const uint16_t*>(scale->const_data_ptr());
  }
  return {shape, reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()),
          {params.const_data_ptr(), affine, shape.groups, count}};
}

// y (..., rows) = x (..., columns) W^T + bias, in x's dtype; summed in float32.
Tensor packed_linear(const Tensor& x, const Tensor& words, const Tensor& params, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& bias, int64_t columns, int64_t length) {
  const Weights w = weights_of(words, params, scale, columns, length);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == columns, "packed_linear: the last dimension of x must be ", columns);
  const int64_t rows = words.size(0), tokens = x.numel() / columns;
  const bool one = w.params.count == 2;
  Tensor input = x.reshape({tokens, columns}).to(at::kFloat).contiguous();
  Tensor y = at::empty({tokens, rows}, input.options());
  if (tokens <= FEW) {
    if (!w.shape.filled()) {
      Tensor laid = at::empty({tokens, w.shape.padded()}, input.options()).zero_();
      const float* from = input.const_data_ptr<float>();
      float* to = laid.data_ptr<float>();
      for (int64_t token = 0; token < tokens; ++token)
        w.shape.each_group([&](int64_t column, int64_t first, int64_t width) {
          std::copy_n(from + token * columns + column, width, to + token * w.shape.padded() + first);
        });
      input = laid;
    }
    (one ? few_tokens<1> : few_tokens<2>)(w, rows, tokens, input.const_data_ptr<float>(), y.data_ptr<float>());
  } else {
    const int64_t tile = std::max<int64_t>(64, EXPANDED / columns);
    Tensor dense = at::empty({std::min(tile, rows), columns}, input.options());
    for (int64_t row = 0; row < rows; row += tile) {
      const int64_t count = std::min(tile, rows - row);
      (one ? expand_rows<1> : expand_rows<2>)(w, row, row + count, dense.data_ptr<float>());
      Tensor part = y.narrow(1, row, count);
      part.copy_(at::mm(input, dense.narrow(0, 0, count).t()));
    }
  }
  if (bias) y.add_(*bias);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  return y.reshape(sizes).to(x.scalar_type());
}

// Planes uint8 (rows, bits, ceil(columns / 8)) of a checkpoint to words int32 (rows, words, LANES).
Tensor pack_words(const Tensor& planes, int64_t columns, int64_t length) {
  TORCH_CHECK(planes.scalar_type() == at::kByte && planes.is_contiguous() && planes.dim() == 3 &&
                  (planes.size(1) == 1 || planes.size(1) == 2) && planes.size(2) == (columns + 7) / 8,
              "pack_words: planes must be contiguous uint8 (rows, 1 or 2, ceil(columns / 8))");
  const int bits = static_cast<int>(planes.size(1));
  const Shape shape(columns, length, bits);
  const int64_t rows = planes.size(0), bytes = planes.size(2), per_word = 32 / bits;
  Tensor words = at::empty({rows, shape.words, LANES}, planes.options().dtype(at::kInt)).zero_();
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
  Tensor planes = at::empty({rows, bits, bytes}, words.options().dtype(at::kByte)).zero_();
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

// The piecewise quantizer of lbllm.activations, value for value: x (..., features) on the grid of each token.
Tensor quantize_activations(const Tensor& x, double knee, double clip_low, double clip_high, int64_t bits,
                            int64_t tail) {
  Tensor input = x.to(at::kFloat).contiguous();
  Tensor out = at::empty_like(input);
  const int64_t features = x.size(-1), tokens = x.numel() / features;
  const float steps = static_cast<float>((1 << bits) - 1 - 2 * tail), tails = static_cast<float>(tail);
  const float share = tail ? static_cast<float>(knee) : 1.0f;
  const float* from = input.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, tokens, std::max<int64_t>(1, WORK / features / 4), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const float* values = from + token * features;
      float* results = to + token * features;
      float least = 0, most = 0;
      for (int64_t i = 0; i < features; ++i) {
        least = std::min(least, values[i]);
        most = std::max(most, values[i]);
      }
      const float bottom = static_cast<float>(clip_low) * least, top = static_cast<float>(clip_high) * most;
      const float body = std::max(share * (top - bottom) / steps, 1e-12f);
      const float zero = std::nearbyint(-share * bottom / body), span = steps - zero;
      if (!tail) {
        for (int64_t i = 0; i < features; ++i)
          results[i] = body * std::min(std::max(std::nearbyint(values[i] / body), -zero), span);
        continue;
      }
      const float low = std::max(-zero * body - bottom, 0.0f) / tails, high = std::max(top - span * body, 0.0f) / tails;
      const float low_step = std::max(low, 1e-12f), high_step = std::max(high, 1e-12f);
      for (int64_t i = 0; i < features; ++i) {
        const float code = std::min(std::max(std::nearbyint(values[i] / body), -zero), span), edge = code * body;
        const float below = std::min(std::max(std::nearbyint((edge - values[i]) / low_step), 0.0f), tails);
        const float above = std::min(std::max(std::nearbyint((values[i] - edge) / high_step), 0.0f), tails);
        results[i] = edge - (code == -zero ? low * below : 0.0f) + (code == span ? high * above : 0.0f);
      }
    }
  });
  return out.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY(lbllm, m) {
  m.def("packed_linear(Tensor x, Tensor words, Tensor params, Tensor? scale, Tensor? bias, int columns, int length) -> Tensor");
  m.def("pack_words(Tensor planes, int columns, int length) -> Tensor");
  m.def("unpack_words(Tensor words, int columns, int length, int bits) -> Tensor");
  m.def("quantize_activations(Tensor x, float knee, float clip_low, float clip_high, int bits, int tail) -> Tensor");
}

TORCH_LIBRARY_IMPL(lbllm, CPU, m) {
  m.impl("packed_linear", packed_linear);
  m.impl("pack_words", pack_words);
  m.impl("unpack_words", unpack_words);
  m.impl("quantize_activations", quantize_activations);
}
