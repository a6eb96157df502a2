// Registers torch.ops.lbllm: the schemas of the operators and the functions that compute them on the CPU.

#include "operators.h"

#include <torch/library.h>

using namespace lbllm;

TORCH_LIBRARY(lbllm, m) {
  m.def(
      "packed_linear(Tensor x, Tensor words, Tensor params, Tensor? scale, Tensor? bias, int columns, int length) -> "
      "Tensor");
  m.def(
      "packed_lookup(Tensor x, Tensor tiles, Tensor params, Tensor? bias, int columns, int length, float knee, "
      "float clip_low, float clip_high, int tail) -> Tensor");
  m.def("pack_words(Tensor planes, int columns, int length) -> Tensor");
  m.def("unpack_words(Tensor words, int columns, int length, int bits) -> Tensor");
  m.def("bfloat16_linear(Tensor x, Tensor weight) -> Tensor");
  m.def("embedding_linear(Tensor x, Tensor packed, int bits) -> Tensor");
  m.def("embedding_rows(Tensor packed, Tensor rows, int bits, int columns) -> Tensor");
  m.def(
      "decode(Tensor hidden, Tensor cosine, Tensor sine, Tensor[] norms, Tensor[] words, Tensor[] params, "
      "Tensor?[] scales, Tensor?[] biases, float[] quantizers, int[] columns, int[] lengths, Tensor(a!)[] cache, "
      "int position, int heads, int kv_heads, float scaling, float epsilon, int group_size=0, int first=0) -> Tensor");
  m.def("quantize_activations(Tensor x, float knee, float clip_low, float clip_high, int bits, int tail) -> Tensor");
  m.def(
      "quantize_activations_backward(Tensor grad, Tensor x, float knee, float clip_low, float clip_high, int bits, "
      "int tail, float temperature) -> (Tensor, Tensor)");
  m.def("forward_kl(Tensor student, Tensor teacher) -> (Tensor, Tensor)");
  m.def("nearest_level(Tensor groups, Tensor levels) -> Tensor");
  m.def("nearest_level_backward(Tensor grad, Tensor groups, Tensor levels) -> Tensor");
}

TORCH_LIBRARY_IMPL(lbllm, CPU, m) {
  m.impl("packed_linear", packed_linear);
  m.impl("packed_lookup", packed_lookup);
  m.impl("pack_words", pack_words);
  m.impl("unpack_words", unpack_words);
  m.impl("bfloat16_linear", bfloat16_linear);
  m.impl("embedding_linear", embedding_linear);
  m.impl("embedding_rows", embedding_rows);
  m.impl("decode", decode);
  m.impl("quantize_activations", quantize_activations);
  m.impl("quantize_activations_backward", quantize_activations_backward);
  m.impl("forward_kl", forward_kl);
  m.impl("nearest_level", nearest_level);
  m.impl("nearest_level_backward", nearest_level_backward);
}
