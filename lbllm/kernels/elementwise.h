// Computations without a matrix product, defined in elementwise.cpp.

#pragma once

#include "quantizer.h"

#include <cstdint>

namespace lbllm {

// Quantizes `from` (tokens, features) with one range per token.
void quantize(const Quantizer& quantizer, const float* from, float* to, int64_t tokens, int64_t features);
// From the gradient `slope` of quantize()'s result to the gradients of `from` and, added to `act` (tokens, 3), of knee
// and clips. `tau` is the temperature of the soft mask.
void quantize_backward(const Quantizer& quantizer, const float* from, const float* slope, float* to, double* act,
                       float tau, int64_t tokens, int64_t features);

// Rounds `from` (groups, length) to the nearest of the levels `of` (groups, count), count 2 or 4, in ascending order.
// Of two levels at the same distance it takes the lower.
void round_to_levels(const float* from, const float* of, float* to, int64_t groups, int64_t length, int64_t count);
// From the gradient `slope` of round_to_levels()' result to the gradient of the levels: for each level the sum over its
// members.
void round_to_levels_backward(const float* from, const float* of, const float* slope, float* to, int64_t groups,
                              int64_t length, int64_t count);

// KL(p_T || p_S) of each token for logits (tokens, count), float or c10::BFloat16, and the gradient of the mean loss to
// the student's logits.
template <class T>
void forward_kl_rows(const T* student, const T* teacher, T* grad, float* loss, int64_t tokens, int64_t count);

}  // namespace lbllm
