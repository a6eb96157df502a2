// The quantizer of activations, with its gradients.

#pragma once

#include "simd.h"

#include <limits>

namespace lbllm {

// The piecewise quantizer. It gives exactly the values of ActQuantizer, the same quantizer in Python. With 0 bits
// nothing is quantized. `size` is the number of features that share a range in `apply`.
struct Quantizer {
  int bits = 0, tail = 0;
  float knee = 0, clip_low = 0, clip_high = 0;
  int64_t size = 0;

  bool operator==(const Quantizer&) const = default;

  // The grid of one range.
  struct Grid {
    float body, zero, span, low, high, tails;
  };
  // The minimum and maximum of the values and zero.
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

  // The codes of a value: of the body, and the steps into the tail below and above it.
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

  // Quantizes one token, range by range.
  void apply(const float* x, float* out, int64_t features) const {
    for (int64_t first = 0; first < features; first += size)
      apply_one(x + first, out + first, std::min(size, features - first));
  }

  // Quantizes features that share one range.
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

  // The same, but gives codes: x is steps[0] body + steps[1] below + steps[2] above, with below <= 0 <= above. Needs a
  // quantizer of at most 4 bits. Returns false if a value of x is not finite.
  bool encode(const float* x, int64_t features, int8_t* body_codes, int8_t* below_codes, int8_t* above_codes,
              float* steps) const {
    const Grid on = grid(range(x, features));
    steps[0] = on.body;
    steps[1] = on.low;
    steps[2] = on.high;
    int not_finite = 0;
    for (int64_t i = 0; i < features; ++i) {
      not_finite |= !(std::abs(x[i]) <= std::numeric_limits<float>::max());
      const auto [code, below, above] = place(x[i], on);
      body_codes[i] = static_cast<int8_t>(static_cast<int>(code));
      below_codes[i] = static_cast<int8_t>(-static_cast<int>(below));
      above_codes[i] = static_cast<int8_t>(static_cast<int>(above));
    }
    return !not_finite;
  }

  // The gradients of quantized features that share one range: to x, and to knee and clips, which are added to `act`
  // (3,). ActQuantizer in Python has the same formulas. `tau` is the temperature of the soft mask.
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
        // If an edge moves, values near it change from the tail's grid to the body's. The slope of the soft mask says
        // how fast.
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
    // From the gradients of the steps to those of knee and clips. Where a step was clamped, no gradient passes.
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
  // m (1 - m) with m = sigmoid(t).
  static INLINE float bell(float t) {
    const float e = exponential(-std::abs(t));
    return e / ((1 + e) * (1 + e));
  }
};

// The quantizer with the settings that an operator receives.
inline Quantizer quantizer_of(int64_t bits, int64_t tail, double knee, double clip_low, double clip_high) {
  return {static_cast<int>(bits), static_cast<int>(tail), static_cast<float>(knee), static_cast<float>(clip_low),
          static_cast<float>(clip_high)};
}

}  // namespace lbllm
