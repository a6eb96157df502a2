// The operators without a matrix product: quantized activations, nearest levels and a loss, with their gradients.

#include "divergence.h"
#include "operators.h"
#include "quantizer.h"
#include "work.h"

#include <ATen/Parallel.h>

namespace lbllm {

using at::Tensor;

// Quantizes x (..., features) with one range per token; the result has the dtype of x.
Tensor quantize_activations(const Tensor& x, double knee, double clip_low, double clip_high, int64_t bits,
                            int64_t tail) {
  const Quantizer quantizer = quantizer_of(bits, tail, knee, clip_low, clip_high);
  const Tensor input = x.to(at::kFloat).contiguous();
  Tensor out = input.new_empty(input.sizes());
  const int64_t features = x.size(-1), tokens = x.numel() / features;
  const float* from = input.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, tokens, std::max<int64_t>(1, EACH / features), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      quantizer.apply_one(from + token * features, to + token * features, features);
  });
  return out.to(x.scalar_type());
}

// From the gradient of quantize_activations' result to the gradients of x, in the dtype of x, and of knee, clip_low and
// clip_high, float32 (3,).
std::tuple<Tensor, Tensor> quantize_activations_backward(const Tensor& grad, const Tensor& x, double knee,
                                                         double clip_low, double clip_high, int64_t bits,
                                                         int64_t tail, double temperature) {
  const Quantizer quantizer = quantizer_of(bits, tail, knee, clip_low, clip_high);
  TORCH_CHECK(grad.sizes() == x.sizes(), "quantize_activations_backward: grad and x must have one shape");
  const Tensor input = x.to(at::kFloat).contiguous(), given = grad.to(at::kFloat).contiguous();
  Tensor out = input.new_empty(input.sizes());
  const int64_t features = x.size(-1), tokens = x.numel() / features;
  const float *from = input.const_data_ptr<float>(), *slope = given.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  std::vector<double> act(3 * tokens);  // per token, so the sum is the same for any number of threads
  at::parallel_for(0, tokens, std::max<int64_t>(1, EACH / features), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      quantizer.backward(from + token * features, slope + token * features, to + token * features,
                         act.data() + 3 * token, static_cast<float>(temperature), features);
  });
  Tensor by_act = input.new_empty({3});
  for (int k = 0; k < 3; ++k) {
    double sum = 0;
    for (int64_t token = 0; token < tokens; ++token) sum += act[3 * token + k];
    by_act.data_ptr<float>()[k] = static_cast<float>(sum);
  }
  return {out.to(x.scalar_type()), by_act};
}

namespace {

// Checks the weights `groups` (rows, n, length) and their `levels` (rows, n, 2 or 4), which are in ascending order.
void check_groups(const Tensor& groups, const Tensor& levels) {
  TORCH_CHECK(groups.dim() == 3 && levels.dim() == 3 && groups.size(0) == levels.size(0) &&
                  groups.size(1) == levels.size(1) && (levels.size(2) == 2 || levels.size(2) == 4) &&
                  groups.is_contiguous() && levels.is_contiguous() && groups.scalar_type() == at::kFloat &&
                  levels.scalar_type() == at::kFloat,
              "nearest_level: contiguous float32 groups (rows, n, length) and levels (rows, n, 2 or 4) are needed");
}

// Calls work(group) for every group of weights.
template <class Work>
void each_group(const Tensor& groups, const Work& work) {
  const int64_t count = groups.size(0) * groups.size(1);
  at::parallel_for(0, count, std::max<int64_t>(1, EACH / std::max<int64_t>(1, groups.size(2))),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t group = begin; group < end; ++group) work(group);
                   });
}

}  // namespace

// The level nearest to each weight, or the lower of two at the same distance: float32 (rows, n, length).
Tensor nearest_level(const Tensor& groups, const Tensor& levels) {
  check_groups(groups, levels);
  Tensor out = groups.new_empty(groups.sizes());
  const int64_t length = groups.size(2), count = levels.size(2);
  const float *from = groups.const_data_ptr<float>(), *of = levels.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  each_group(groups, [&](int64_t group) {
    const float *x = from + group * length, *level = of + group * count;
    float* y = to + group * length;
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
  return out;
}

// From the gradient of nearest_level's result to the gradient of the levels: for each level the sum over its members.
Tensor nearest_level_backward(const Tensor& grad, const Tensor& groups, const Tensor& levels) {
  check_groups(groups, levels);
  TORCH_CHECK(grad.sizes() == groups.sizes(), "nearest_level_backward: grad and groups must have one shape");
  const Tensor given = grad.to(at::kFloat).contiguous();
  Tensor out = levels.new_empty(levels.sizes());
  const int64_t length = groups.size(2), count = levels.size(2);
  const float *from = groups.const_data_ptr<float>(), *of = levels.const_data_ptr<float>();
  const float* slope = given.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  each_group(groups, [&](int64_t group) {
    const float *x = from + group * length, *g = slope + group * length, *level = of + group * count;
    float* sums = to + group * count;
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
  return out;
}

// KL(p_T || p_S) of the softmaxes of logits (tokens, vocabulary) in float32 or bfloat16, averaged over the tokens, and
// its gradient to the student's logits.
std::tuple<Tensor, Tensor> forward_kl(const Tensor& student, const Tensor& teacher) {
  TORCH_CHECK(student.dim() == 2 && student.sizes() == teacher.sizes() && student.numel() > 0 &&
                  student.is_contiguous() && teacher.is_contiguous() &&
                  student.scalar_type() == teacher.scalar_type() &&
                  (student.scalar_type() == at::kFloat || student.scalar_type() == at::kBFloat16),
              "forward_kl: two contiguous tensors (tokens, vocabulary) of float32 or bfloat16 are needed");
  const int64_t tokens = student.size(0), count = student.size(1);
  Tensor grad = student.new_empty(student.sizes()), losses = student.new_empty({tokens}, at::kFloat);
  float* to = losses.data_ptr<float>();
  if (student.scalar_type() == at::kFloat)
    forward_kl_rows(student.const_data_ptr<float>(), teacher.const_data_ptr<float>(), grad.data_ptr<float>(), to,
                    tokens, count);
  else
    forward_kl_rows(student.const_data_ptr<at::BFloat16>(), teacher.const_data_ptr<at::BFloat16>(),
                    grad.data_ptr<at::BFloat16>(), to, tokens, count);
  return {losses.mean(), grad};
}

}  // namespace lbllm
