// Token embeddings and output heads in 8, 6 or 4 bits a weight; lbllm/quant/embedding_code.py describes the layout.

#pragma once

#include <cstdint>

namespace lbllm {

// Packed rows: `bits` 8, 6 or 4, `columns` weights a row, `row_bytes` bytes from a row to the next.
struct EmbeddingRows {
  const uint8_t* bytes;
  int64_t columns, row_bytes;
  int bits;
};

// Weights of a group, and bytes of a packed row of `columns` weights.
inline int64_t embedding_group(int bits) { return bits == 6 ? 64 : 32; }
inline int64_t embedding_row_bytes(int bits, int64_t columns) {
  const int64_t group = embedding_group(bits);
  return (columns + group - 1) / group * (2 + group * bits / 8);
}

// y (tokens, rows) = x (tokens, stride) W^T for the rows of W, summed in float32. `stride` is a multiple of the group,
// and x is 0 behind a row's last column.
void multiply_embedding(const EmbeddingRows& table, int64_t rows, const float* x, int64_t stride, int64_t tokens, float* y);

// The weights of one row, float32 (columns,).
void expand_embedding_row(const EmbeddingRows& table, int64_t row, float* out);

}  // namespace lbllm
