// The operators of torch.ops.lbllm on the CPU. To add one: write its kernel in a header and a .cpp file without
// tensors, declare the operator here, define it in operators.cpp, and register it in library.cpp.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace lbllm {

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& words, const at::Tensor& params,
                         const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& bias,
                         int64_t columns, int64_t length);
at::Tensor packed_lookup(const at::Tensor& x, const at::Tensor& tiles, const at::Tensor& params,
                         const std::optional<at::Tensor>& bias, int64_t columns, int64_t length, double knee,
                         double clip_low, double clip_high, int64_t tail);
at::Tensor pack_words(const at::Tensor& planes, int64_t columns, int64_t length);
at::Tensor unpack_words(const at::Tensor& words, int64_t columns, int64_t length, int64_t bits);
at::Tensor bfloat16_linear(const at::Tensor& x, const at::Tensor& weight);
at::Tensor embedding_linear(const at::Tensor& x, const at::Tensor& packed, int64_t bits);
at::Tensor embedding_rows(const at::Tensor& packed, const at::Tensor& rows, int64_t bits, int64_t columns);

at::Tensor quantize_activations(const at::Tensor& x, double knee, double clip_low, double clip_high, int64_t bits,
                                int64_t tail);
std::tuple<at::Tensor, at::Tensor> quantize_activations_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                 double knee, double clip_low, double clip_high,
                                                                 int64_t bits, int64_t tail, double temperature);
at::Tensor nearest_level(const at::Tensor& groups, const at::Tensor& levels);
at::Tensor nearest_level_backward(const at::Tensor& grad, const at::Tensor& groups, const at::Tensor& levels);
std::tuple<at::Tensor, at::Tensor> forward_kl(const at::Tensor& student, const at::Tensor& teacher);

at::Tensor decode(const at::Tensor& hidden, const at::Tensor& cosine, const at::Tensor& sine, at::TensorList norms,
                  at::TensorList words, at::TensorList params, at::ArrayRef<std::optional<at::Tensor>> scales,
                  at::ArrayRef<std::optional<at::Tensor>> biases, at::ArrayRef<double> quantizers,
                  at::IntArrayRef columns, at::IntArrayRef lengths, at::TensorList cache, int64_t position,
                  int64_t heads, int64_t kv_heads, double scaling, double epsilon, int64_t group_size, int64_t first);

}  // namespace lbllm
