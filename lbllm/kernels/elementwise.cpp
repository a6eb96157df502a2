// Computations without a matrix product, on pointers.

#include "elementwise.h"

#include "divergence.h"
#include "work.h"

#include <ATen/Parallel.h>

namespace lbllm {

void quantize(const Quantizer& quantizer, const float* from, float* to, int64_t tokens, int64_t features) {
  at::parallel_for(0, tokens, std::max<int64_t>(1, EACH / features), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      quantizer.apply_one(from + token * features, to + token * features, features);
  });
}

void quantize_backward(const Quantizer& quantizer, const float* from, const float* slope, float* to, double* act,
                       float tau, int64_t tokens, int64_t features) {
  at::parallel_for(0, tokens, std::max<int64_t>(1, EACH / features), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      quantizer.backward(from + token * features, slope + token * features, to + token * features,
                         act + 3 * token, tau, features);
  });
}

namespace {

// Calls work(group) for `groups` groups of `length` weights.
template <class Work>
void each_group(int64_t groups, int64_t length, const Work& work) {
  at::parallel_for(0, groups, std::max<int64_t>(1, EACH / std::max<int64_t>(1, length)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t group = begin; group < end; ++group) work(group);
                   });
}

}  // namespace

void round_to_levels(const float* from, const float* of, float* to, int64_t groups, int64_t length, int64_t count) {
  each_group(groups, length, [&](int64_t group) {
    const float *x = from + group * length, *level = of + group * count;
    float* y = to + group * length;
    if (count == 8) {
      float borders[7];
      for (int j = 0; j < 7; ++j) borders[j] = (level[j] + level[j + 1]) / 2;
#pragma omp simd
      for (int64_t k = 0; k < length; ++k) {
        float found = level[0];
        for (int j = 0; j < 7; ++j) found = x[k] > borders[j] ? level[j + 1] : found;
        y[k] = found;
      }
      return;
    }
    const float first = level[0], second = level[1], low = (first + second) / 2;
    if (count == 2) {
#pragma omp simd
      for (int64_t k = 0; k < length; ++k) y[k] = x[k] > low ? second : first;
      return;
    }
    const float third = level[2], fourth = level[3], middle = (second + third) / 2, high = (third + fourth) / 2;
#pragma omp simd
    for (int64_t k = 0; k < length; ++k) {
      const float inner = x[k] > middle ? third : second;
      const float above = x[k] > high ? fourth : inner;
      y[k] = x[k] > low ? above : first;
    }
  });
}

void round_to_levels_backward(const float* from, const float* of, const float* slope, float* to, int64_t groups,
                              int64_t length, int64_t count) {
  each_group(groups, length, [&](int64_t group) {
    const float *x = from + group * length, *g = slope + group * length, *level = of + group * count;
    float* sums = to + group * count;
    if (count == 8) {
      constexpr float END = std::numeric_limits<float>::infinity();
      for (int j = 0; j < 8; ++j) {
        const float low = j > 0 ? (level[j - 1] + level[j]) / 2 : -END;
        const float high = j < 7 ? (level[j] + level[j + 1]) / 2 : END;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < length; ++k) sum += x[k] > low && !(x[k] > high) ? g[k] : 0.0f;
        sums[j] = sum;
      }
      return;
    }
    // With two levels the upper two have no members.
    const float low = (level[0] + level[1]) / 2;
    const float middle = count == 4 ? (level[1] + level[2]) / 2 : std::numeric_limits<float>::infinity();
    const float high = count == 4 ? (level[2] + level[3]) / 2 : middle;
    float first = 0, second = 0, third = 0, fourth = 0;
#pragma omp simd reduction(+ : first, second, third, fourth)
    for (int64_t k = 0; k < length; ++k) {
      const bool one = x[k] > low, two = x[k] > middle, three = x[k] > high;
      first += one ? 0.0f : g[k];
      second += one && !two ? g[k] : 0.0f;
      third += two && !three ? g[k] : 0.0f;
      fourth += three ? g[k] : 0.0f;
    }
    sums[0] = first;
    sums[1] = second;
    if (count == 4) {
      sums[2] = third;
      sums[3] = fourth;
    }
  });
}

template <class T>
void forward_kl_rows(const T* student, const T* teacher, T* grad, float* loss, int64_t tokens, int64_t count) {
  const float factor = 1.0f / static_cast<float>(tokens);
  at::parallel_for(0, tokens, std::max<int64_t>(1, EACH / count), [&](int64_t begin, int64_t end) {
    std::vector<float> room(4 * count);
    for (int64_t token = begin; token < end; ++token)
      loss[token] = forward_kl_row(student + token * count, teacher + token * count, grad + token * count, factor,
                                   count, room.data());
  });
}

template void forward_kl_rows(const float*, const float*, float*, float*, int64_t, int64_t);
template void forward_kl_rows(const c10::BFloat16*, const c10::BFloat16*, c10::BFloat16*, float*, int64_t, int64_t);

}  // namespace lbllm
