// Attention of one token over keys and values stored in 4, 8 or 16 bits.

#pragma once

#include "simd.h"

#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace lbllm {

// Rotary position embedding by halves (Su et al. 2021): rotates x (heads, dim) by the angles of a position, in place.
inline void rotate(float* x, int64_t heads, int64_t dim, const float* cosine, const float* sine) {
  for (int64_t head = 0; head < heads; ++head, x += dim)
    for (int64_t i = 0; i < dim / 2; ++i) {
      const float first = x[i], second = x[i + dim / 2];
      x[i] = first * cosine[i] - second * sine[i];
      x[i + dim / 2] = second * cosine[i + dim / 2] + first * sine[i + dim / 2];
    }
}

inline uint16_t float_to_half(float value) { return c10::Half(value).x; }

inline void half_to_floats(const uint16_t* halves, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
#endif
  for (; i < count; ++i) out[i] = half_to_float(halves[i]);
}

// Which tokens of a cache share ranges (lbllm/quant/kv_groups.py). `size` 0: each token has one. Else keys have a range
// for each channel over `size` tokens, and the `first` tokens and those after the last whole group are in 16 bits.
struct Groups {
  int64_t size = 0, first = 0;

  // The number of tokens in groups that are encoded, as the token at `position` sees them.
  int64_t encoded(int64_t position) const { return std::max<int64_t>(0, (position - first) / size) * size; }

  // Where the float16 values of a token are.
  int64_t slot(int64_t position) const { return position < first ? position : first + (position - first) % size; }
};

// The keys or the values of (kv_heads, room) tokens in 4, 8 or 16 bits. With 4 and 8 bits: codes, and `scale`
// (kv_heads, room, 2) with minimum and step. Two 4-bit codes share a byte; the even column is in the lower half. With
// 16 bits: float16 values. With groups the codes are those of the tokens in groups, `halves` (kv_heads, first + size,
// dim) has the others, and the scale of keys is (kv_heads, room / size, 2, dim). The numbers equal those of encode_kv
// and encode_keys in Python.
struct Cache {
  int bits;
  void* kept;
  uint16_t* scale;
  int64_t room, dim;
  Groups groups = {};
  bool by_channel = false;
  uint16_t* halves = nullptr;

  uint8_t* codes(int64_t head, int64_t position) const {
    return static_cast<uint8_t*>(kept) + (head * room + position) * dim * bits / 8;
  }

  uint16_t* half(int64_t head, int64_t position) const {
    return halves + (head * (groups.first + groups.size) + groups.slot(position)) * dim;
  }

  uint16_t* ranges(int64_t head, int64_t group) const {
    return scale + (head * (room / groups.size) + group) * 2 * dim;
  }

  static void to_halves(const float* x, uint16_t* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = float_to_half(std::clamp(x[i], -65504.0f, 65504.0f));
  }

  // Rounds a range to minimum and step, which it writes to `low` and `step`.
  void range(float least, float most, uint16_t* low, uint16_t* step) const {
    *low = float_to_half(least);
    const float wide = half_to_float(float_to_half((most - half_to_float(*low)) / (bits == 4 ? 15.0f : 255.0f)));
    *step = float_to_half(std::max(wide, 0x1p-22f));
  }

  uint8_t code(float value, float low, float step) const {
    return static_cast<uint8_t>(
        std::min(std::max(std::nearbyint((value - low) / step), 0.0f), bits == 4 ? 15.0f : 255.0f));
  }

  void put(uint8_t* bytes, int64_t i, uint8_t value) const {
    if (bits == 8)
      bytes[i] = value;
    else if (i % 2 == 0)
      bytes[i / 2] = value;
    else
      bytes[i / 2] = static_cast<uint8_t>(bytes[i / 2] | value << 4);
  }

  // Encodes a token with a range of its own.
  void encode(int64_t head, int64_t position, const float* x) {
    const auto [least, most] = std::minmax_element(x, x + dim);
    uint16_t* affine = scale + (head * room + position) * 2;
    range(*least, *most, affine, affine + 1);
    const float low = half_to_float(affine[0]), step = half_to_float(affine[1]);
    uint8_t* bytes = codes(head, position);
    for (int64_t i = 0; i < dim; ++i) put(bytes, i, code(x[i], low, step));
  }

  // Encodes the group in `halves`, whose first token is `start`, counted from the first group.
  void encode_group(int64_t head, int64_t start) {
    std::vector<float> x(groups.size * dim);
    half_to_floats(half(head, groups.first), groups.size * dim, x.data());
    if (!by_channel) {
      for (int64_t t = 0; t < groups.size; ++t) encode(head, start + t, x.data() + t * dim);
      return;
    }
    uint16_t* affine = ranges(head, start / groups.size);
    for (int64_t i = 0; i < dim; ++i) {
      float least = x[i], most = x[i];
      for (int64_t t = 1; t < groups.size; ++t) {
        least = std::min(least, x[t * dim + i]);
        most = std::max(most, x[t * dim + i]);
      }
      range(least, most, affine + i, affine + dim + i);
      const float low = half_to_float(affine[i]), step = half_to_float(affine[dim + i]);
      for (int64_t t = 0; t < groups.size; ++t) put(codes(head, start + t), i, code(x[t * dim + i], low, step));
    }
  }

  void append(int64_t head, int64_t position, const float* x) {
    if (groups.size) {
      const int64_t whole = groups.encoded(position);
      if (position > groups.first && groups.slot(position) == groups.first) encode_group(head, whole - groups.size);
      to_halves(x, half(head, position), dim);
    } else if (bits == 16) {
      to_halves(x, reinterpret_cast<uint16_t*>(codes(head, position)), dim);
    } else {
      encode(head, position, x);
    }
  }

  // The index in a token that is read where column i is: with 4 bits the even columns come first, then the odd ones.
  int64_t place(int64_t i) const { return bits == 4 ? i / 2 + i % 2 * (dim / 2) : i; }
};

// Reads the tokens of a head in order, as the token at position `last` sees them; `room` has 2 * dim floats.
struct Reader {
  const Cache& cache;
  int64_t head, last;
  float* room;
  int64_t known = -1;  // the group whose minima and steps are in `room`

  void read(int64_t position, float* out) {
    const int64_t dim = cache.dim;
    if (cache.groups.size) {
      const int64_t index = position - cache.groups.first;
      if (index < 0 || index >= cache.groups.encoded(last)) {
        half_to_floats(cache.half(head, position), dim, room);
        known = -1;
        for (int64_t i = 0; i < dim; ++i) out[cache.place(i)] = room[i];
      } else if (cache.by_channel) {
        by_channel(index, out);
      } else {
        by_token(index, out);
      }
    } else if (cache.bits == 16) {
      half_to_floats(reinterpret_cast<const uint16_t*>(cache.codes(head, position)), dim, out);
    } else {
      by_token(position, out);
    }
  }

 private:
  void by_token(int64_t position, float* out) const {
    const int64_t dim = cache.dim;
    const uint8_t* bytes = cache.codes(head, position);
    const uint16_t* affine = cache.scale + (head * cache.room + position) * 2;
    const float low = half_to_float(affine[0]), step = half_to_float(affine[1]);
    if (cache.bits == 8) {
      for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<float>(bytes[i]) * step + low;
      return;
    }
    for (int64_t i = 0; i < dim / 2; ++i) out[i] = static_cast<float>(bytes[i] & 15) * step + low;
    for (int64_t i = 0; i < dim / 2; ++i) out[dim / 2 + i] = static_cast<float>(bytes[i] >> 4) * step + low;
  }

  void by_channel(int64_t position, float* out) {
    const int64_t dim = cache.dim, group = position / cache.groups.size;
    float *lows = room, *steps = room + dim;
    if (group != known) {
      const uint16_t* affine = cache.ranges(head, group);
      for (int64_t i = 0; i < dim; ++i) {
        lows[cache.place(i)] = half_to_float(affine[i]);
        steps[cache.place(i)] = half_to_float(affine[dim + i]);
      }
      known = group;
    }
    const uint8_t* bytes = cache.codes(head, position);
    if (cache.bits == 8) {
      for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<float>(bytes[i]) * steps[i] + lows[i];
      return;
    }
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) out[i] = static_cast<float>(bytes[i] & 15) * steps[i] + lows[i];
    for (int64_t i = 0; i < half; ++i)
      out[half + i] = static_cast<float>(bytes[i] >> 4) * steps[half + i] + lows[half + i];
  }
};

// A dot product in eight partial sums, which the compiler keeps in registers.
inline float dot(const float* a, const float* b, int64_t count) {
  float sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int k = 0; k < 8; ++k) sums[k] += a[i + k] * b[i + k];
  float sum = 0;
  for (float one : sums) sum += one;
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// The number of floats that attend() needs as working memory.
inline int64_t attention_room(int64_t tokens, int64_t dim, int64_t group) {
  return 3 * dim + group * (2 * dim + tokens);
}

// softmax(q K^T scaling) V over `tokens` tokens, for the `group` query heads of key and value head `kv`. q and out have
// the shape (heads, dim); `room` has attention_room() floats.
inline void attend(const float* q, const Cache& keys, const Cache& values, int64_t kv, int64_t tokens, int64_t group,
                   float scaling, float* room, float* out) {
  const int64_t dim = keys.dim;
  float *ranges = room, *token = ranges + 2 * dim, *queries = token + dim, *sums = queries + group * dim, *weights = sums + group * dim;
  for (int64_t g = 0; g < group; ++g)
    for (int64_t i = 0; i < dim; ++i) queries[g * dim + keys.place(i)] = q[(kv * group + g) * dim + i] * scaling;
  Reader key{keys, kv, tokens - 1, ranges}, value{values, kv, tokens - 1, ranges};
  for (int64_t t = 0; t < tokens; ++t) {
    key.read(t, token);
    for (int64_t g = 0; g < group; ++g) weights[g * tokens + t] = dot(queries + g * dim, token, dim);
  }
  for (int64_t g = 0; g < group; ++g) {
    float* scores = weights + g * tokens;
    const float most = *std::max_element(scores, scores + tokens);
    float total = 0;
    for (int64_t t = 0; t < tokens; ++t) total += scores[t] = std::exp(scores[t] - most);
    for (int64_t t = 0; t < tokens; ++t) scores[t] /= total;
  }
  std::fill_n(sums, group * dim, 0.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    value.read(t, token);
    for (int64_t g = 0; g < group; ++g) {
      const float weight = weights[g * tokens + t];
      for (int64_t i = 0; i < dim; ++i) sums[g * dim + i] += weight * token[i];
    }
  }
  for (int64_t g = 0; g < group; ++g)
    for (int64_t i = 0; i < dim; ++i) out[(kv * group + g) * dim + i] = sums[g * dim + values.place(i)];
}

}  // namespace lbllm
