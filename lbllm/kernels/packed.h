// Linear layers that multiply packed weights directly, on the CPU.
//
// A weight has 1 to 3 bits, its code. A register holds LANES words of 32 bits, and each word holds the codes of many
// steps: bits [s BITS, (s + 1) BITS) of lane l belong to column s LANES + l. One step covers LANES neighbouring columns
// and costs a shift, a lookup of LANES levels by the low bits of the lanes, and a multiply-add. The weights are never
// unpacked. Every group of a row starts a new step, so a shorter last group needs no special case: the input is laid
// out the same way, with zeros where a group does not fill its last step.
//
// The sums are float32. The input of a layer with quantized activations arrives here as the values of its codes, so the
// layer computes what it computed in training.

#pragma once

#include "params.h"
#include "work.h"

#include <ATen/Parallel.h>

#include <vector>

namespace lbllm {

// Where the columns of a layer lie among its `steps * LANES` places. If every group fills its steps, the two are equal.
struct Shape {
  int64_t columns = 0, length = 0, groups = 0, steps = 0, words = 0;

  Shape() = default;
  Shape(int64_t columns, int64_t length, int bits) : columns(columns), length(length) {
    groups = (columns + length - 1) / length;
    steps = (groups - 1) * steps_of(length) + steps_of(columns - (groups - 1) * length);
    words = (steps + 32 / bits - 1) / (32 / bits);
  }
  static int64_t steps_of(int64_t width) { return (width + LANES - 1) / LANES; }
  int64_t width(int64_t group) const { return std::min(length, columns - group * length); }
  int64_t padded() const { return steps * LANES; }
  bool filled() const { return padded() == columns; }

  template <class Move>
  void each_group(Move move) const {  // calls move(first column, first place, width)
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

// Prefetches memory. The rows of a layer are too short for the processor to predict the next one; without this, a third
// of a token's time is spent waiting for memory.
INLINE void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// The products of R rows, starting at `row`, with M tokens x (M, padded): sums[r][m].
template <int BITS, int R, int M>
void multiply(const Weights& w, int64_t row, const float* x, float sums[R][M]) {
  constexpr int64_t PER_WORD = 32 / BITS;
  const Shape& shape = w.shape;
  const int64_t stride = shape.words * LANES, padded = shape.padded();
  const uint32_t* words = w.words + row * stride;
  RowParams params[R];
  Word word[R];
  constexpr int COUNT = levels_of(BITS);
  alignas(64) float ahead[R][AHEAD * COUNT];
  Levels levels[R];
  Floats sum[R][M];
  each<R>([&](auto r) {
    params[r] = RowParams(w.params, row + r);
    each<M>([&](auto m) { sum[r][m] = zero(); });
  });
  const int64_t bytes = w.params.row_bytes();
  fetch(static_cast<const char*>(w.params.values) + (row + 2 * R) * bytes, R * bytes);
  int64_t left = 0;  // steps left in the current words
  for (int64_t group = 0; group < shape.groups; ++group) {
    const int64_t place = group % AHEAD;
    if (place == 0)
      each<R>([&](auto r) { params[r].template levels<BITS>(group, std::min(AHEAD, shape.groups - group), ahead[r]); });
    each<R>([&](auto r) { levels[r] = spread<COUNT>(ahead[r] + place * COUNT); });
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
          const Floats weight = pick<COUNT>(levels[r], word[r]);
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

// Computes the rows [begin, end) of y (M, rows) for M tokens x (M, padded).
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

// A layer with its input x (tokens, padded) and its output y (tokens, rows).
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

// x (tokens, columns) in the order of the words: x itself if it has this order, else a copy in `room`.
inline const float* laid_out(const Shape& shape, const float* x, int64_t tokens, std::vector<float>& room) {
  if (shape.filled()) return x;
  room.assign(tokens * shape.padded(), 0.0f);
  for (int64_t token = 0; token < tokens; ++token)
    shape.each_group([&](int64_t column, int64_t first, int64_t width) {
      std::copy_n(x + token * shape.columns + column, width, room.data() + token * shape.padded() + first);
    });
  return room.data();
}

// Expands the weights of one row to floats (columns,). `room` has padded() floats; it is not used if the groups
// fill their steps.
template <int BITS>
void expand_row(const Weights& w, int64_t row, float* out, float* room) {
  constexpr int PER_WORD = 32 / BITS, COUNT = levels_of(BITS);
  const Shape& shape = w.shape;
  const uint32_t* words = w.words + row * shape.words * LANES;
  const RowParams params(w.params, row);
  float* place = shape.filled() ? out : room;
  Word word = load(words);
  alignas(64) float ahead[AHEAD * COUNT];
  int64_t done = 0;
  for (int64_t group = 0; group < shape.groups; ++group) {
    if (group % AHEAD == 0) params.levels<BITS>(group, std::min(AHEAD, shape.groups - group), ahead);
    const Levels levels = spread<COUNT>(ahead + group % AHEAD * COUNT);
    for (int64_t step = Shape::steps_of(shape.width(group)); step > 0; --step, ++done, place += LANES) {
      if (done > 0 && done % PER_WORD == 0) word = load(words += LANES);
      write(place, pick<COUNT>(levels, word));
      word = next<BITS>(word);
    }
  }
  if (!shape.filled())
    shape.each_group([&](int64_t column, int64_t first, int64_t width) {
      std::copy_n(room + first, width, out + column);
    });
}

template <int BITS>
void expand_some_rows(const Weights& w, int64_t begin, int64_t end, float* out) {
  at::parallel_for(begin, end, std::max<int64_t>(1, EACH / w.shape.columns), [&](int64_t first, int64_t last) {
    std::vector<float> room(w.shape.filled() ? 0 : w.shape.padded());
    for (int64_t row = first; row < last; ++row)
      expand_row<BITS>(w, row, out + (row - begin) * w.shape.columns, room.data());
  });
}

// Defined in linear.cpp, so the templates above are compiled only once.

// Computes the rows [begin, end) of a job.
void some_rows_of(const Job& job, int64_t begin, int64_t end, int64_t tokens);
// Expands the rows [begin, end) to floats (end - begin, columns).
void expand_rows(const Weights& w, int64_t begin, int64_t end, float* out);
// From planes (rows, bits, ceil(columns / 8)) to words (rows, shape.words, LANES), which are zero before.
void pack(const Shape& shape, int bits, int64_t rows, const uint8_t* planes, uint32_t* words);
// The inverse of pack. The planes are zero before.
void unpack(const Shape& shape, int bits, int64_t rows, const uint32_t* words, uint8_t* planes);

}  // namespace lbllm
