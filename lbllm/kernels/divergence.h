// KL(p || q) of softmaxes over a vocabulary and its gradient, in one pass over the logits of each token.
//
// Composed of PyTorch's operators it writes tensors of the logits' size a dozen times, which takes a tenth of a
// training step of stage 4.

#pragma once

#include "simd.h"

#include <c10/util/BFloat16.h>

#include <limits>

namespace lbllm {

// For `count` logits x with maximum m: writes x - m to `less` and e^(x - m) to `power`, returns the sum of the powers.
template <class T>
float powers(const T* logits, float* less, float* power, int64_t count) {
  float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) {
    less[i] = static_cast<float>(logits[i]);
    most = std::max(most, less[i]);
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    less[i] -= most;
    power[i] = exponential(less[i]);
    sum += power[i];
  }
  return sum;
}

// KL(p_T || p_S) of one token. Writes its gradient to the student's logits, times `factor`, to `grad`. `room` has 4
// `count` floats.
template <class T>
float forward_kl_row(const T* student, const T* teacher, T* grad, float factor, int64_t count, float* room) {
  float *own = room, *wanted = room + count, *p = room + 2 * count, *q = room + 3 * count;
  const float sum_q = powers(student, own, q, count), sum_p = powers(teacher, wanted, p, count);
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < count; ++i) dot += p[i] * (wanted[i] - own[i]);
  const float by_q = factor / sum_q, by_p = factor / sum_p;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) grad[i] = static_cast<T>(q[i] * by_q - p[i] * by_p);
  return dot / sum_p - std::log(sum_p) + std::log(sum_q);
}

}  // namespace lbllm
