// Attention of one token over keys and values stored in 4, 8 or 16 bits.

#pragma once

#include "simd.h"

#include <c10/util/Half.h>

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

// The keys or the values of (kv_heads, room) tokens in 4, 8 or 16 bits. With 4 and 8 bits: codes, and `scale`
// (kv_heads, room, 2) with minimum and step. Two 4-bit codes share a byte; the even column is in the lower half. With
// 16 bits: float16 values. The numbers equal those of encode_kv in Python.
struct Cache {
  int bits;
  void* kept;
  uint16_t* scale;
  int64_t room, dim;

  uint8_t* codes(int64_t head, int64_t position) const {
    return static_cast<uint8_t*>(kept) + (head * room + position) * dim * bits / 8;
  }

  void append(int64_t head, int64_t position, const float* x) {
    uint8_t* bytes = codes(head, position);
    if (bits == 16) {
      auto* halves = reinterpret_cast<uint16_t*>(bytes);
      for (int64_t i = 0; i < dim; ++i) halves[i] = float_to_half(std::clamp(x[i], -65504.0f, 65504.0f));
      return;
    }
    const auto [least, most] = std::minmax_element(x, x + dim);
    const float last = bits == 4 ? 15.0f : 255.0f;
    uint16_t* affine = scale + (head * room + position) * 2;
    affine[0] = float_to_half(*least);
    const float low = half_to_float(affine[0]);
    const float wide = half_to_float(float_to_half((*most - low) / last));
    affine[1] = float_to_half(std::max(wide, 0x1p-22f));
    const float step = half_to_float(affine[1]);
    const auto code = [&](float value) {
      return static_cast<uint8_t>(std::min(std::max(std::nearbyint((value - low) / step), 0.0f), last));
    };
    if (bits == 8)
      for (int64_t i = 0; i < dim; ++i) bytes[i] = code(x[i]);
    else
      for (int64_t i = 0; i < dim / 2; ++i) bytes[i] = static_cast<uint8_t>(code(x[2 * i]) | code(x[2 * i + 1]) << 4);
  }

  // Reads the columns of a token. With 4 bits the even columns come first, in out[0 .. dim / 2), and the odd ones after
  // them.
  void read(int64_t head, int64_t position, float* out) const {
    const uint8_t* bytes = codes(head, position);
    if (bits == 16) {
      half_to_floats(reinterpret_cast<const uint16_t*>(bytes), dim, out);
      return;
    }
    const uint16_t* affine = scale + (head * room + position) * 2;
    const float low = half_to_float(affine[0]), step = half_to_float(affine[1]);
    if (bits == 8) {
      for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<float>(bytes[i]) * step + low;
      return;
    }
    for (int64_t i = 0; i < dim / 2; ++i) out[i] = static_cast<float>(bytes[i] & 15) * step + low;
    for (int64_t i = 0; i < dim / 2; ++i) out[dim / 2 + i] = static_cast<float>(bytes[i] >> 4) * step + low;
  }

  // The index in `out` where read() puts column i.
  int64_t place(int64_t i) const { return bits == 4 ? i / 2 + i % 2 * (dim / 2) : i; }
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
inline int64_t attention_room(int64_t tokens, int64_t dim, int64_t group) { return dim + group * (2 * dim + tokens); }

// softmax(q K^T scaling) V over `tokens` tokens, for the `group` query heads of key and value head `kv`. q and out have
// the shape (heads, dim); `room` has attention_room() floats.
inline void attend(const float* q, const Cache& keys, const Cache& values, int64_t kv, int64_t tokens, int64_t group,
                   float scaling, float* room, float* out) {
  const int64_t dim = keys.dim;
  float *token = room, *queries = token + dim, *sums = queries + group * dim, *weights = sums + group * dim;
  for (int64_t g = 0; g < group; ++g)
    for (int64_t i = 0; i < dim; ++i) queries[g * dim + keys.place(i)] = q[(kv * group + g) * dim + i] * scaling;
  for (int64_t t = 0; t < tokens; ++t) {
    keys.read(kv, t, token);
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
    values.read(kv, t, token);
    for (int64_t g = 0; g < group; ++g) {
      const float weight = weights[g * tokens + t];
      for (int64_t i = 0; i < dim; ++i) sums[g * dim + i] += weight * token[i];
    }
  }
  for (int64_t g = 0; g < group; ++g)
    for (int64_t i = 0; i < dim; ++i) out[(kv * group + g) * dim + i] = sums[g * dim + values.place(i)];
}

}  // namespace lbllm
