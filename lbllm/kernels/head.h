// An output head with bfloat16 weights.

#pragma once

#include <cstdint>

namespace lbllm {

// y (tokens, rows) = x (tokens, columns) W^T for W (rows, columns) in bfloat16, summed in float32.
void multiply_bfloat16(const uint16_t* weight, int64_t rows, int64_t columns, const float* x, int64_t tokens, float* y);

}  // namespace lbllm
