// The operators of embeddings and output heads in 8, 6 or 4 bits, on tensors.

#include "operators.h"
#include "embedding.h"
#include "work.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace lbllm {

using at::Tensor;

namespace {

constexpr int64_t FEW = 8;             // up to this number of tokens the packed rows are multiplied directly
constexpr int64_t EXPANDED = 1 << 21;  // for more tokens, weights that are expanded together: they fit into the cache

EmbeddingRows table_of(const char* operation, const Tensor& packed, int64_t bits, int64_t columns) {
  TORCH_CHECK((bits == 8 || bits == 6 || bits == 4) && columns > 0, operation, ": 8, 6 or 4 bits are expected");
  const int64_t bytes = embedding_row_bytes(static_cast<int>(bits), columns);
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.is_contiguous() && packed.dim() == 2 &&
                  packed.size(1) == bytes,
              operation, ": the rows must be contiguous uint8 (rows, ", bytes, ")");
  return {packed.const_data_ptr<uint8_t>(), columns, bytes, static_cast<int>(bits)};
}

void expand_rows(const EmbeddingRows& table, const int64_t* rows, int64_t first, int64_t count, float* out) {
  at::parallel_for(0, count, std::max<int64_t>(1, EACH / table.columns), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at)
      expand_embedding_row(table, rows ? rows[at] : first + at, out + at * table.columns);
  });
}

}  // namespace

// The rows with these numbers, int64 (n,), as float32 (n, columns).
Tensor embedding_rows(const Tensor& packed, const Tensor& rows, int64_t bits, int64_t columns) {
  const EmbeddingRows table = table_of("embedding_rows", packed, bits, columns);
  TORCH_CHECK(rows.scalar_type() == at::kLong && rows.is_contiguous() && rows.dim() == 1,
              "embedding_rows: the numbers of rows must be contiguous int64 (n,)");
  const int64_t* wanted = rows.const_data_ptr<int64_t>();
  for (int64_t at = 0; at < rows.numel(); ++at)
    TORCH_CHECK_INDEX(wanted[at] >= 0 && wanted[at] < packed.size(0), "embedding_rows: there is no row ", wanted[at], " of ",
                      packed.size(0));
  Tensor out = packed.new_empty({rows.numel(), columns}, at::kFloat);
  expand_rows(table, wanted, 0, rows.numel(), out.data_ptr<float>());
  return out;
}

// x (..., columns) W^T for packed W (rows, columns); the result is float32.
Tensor embedding_linear(const Tensor& x, const Tensor& packed, int64_t bits) {
  TORCH_CHECK(x.dim() >= 1, "embedding_linear: x must have a last dimension");
  const int64_t columns = x.size(-1), rows = packed.size(0), tokens = columns ? x.numel() / columns : 0;
  const EmbeddingRows table = table_of("embedding_linear", packed, bits, columns);
  const Tensor input = x.reshape({tokens, columns}).to(at::kFloat).contiguous();
  Tensor y = input.new_empty({tokens, rows});
  if (tokens <= FEW) {
    const int64_t group = embedding_group(table.bits), stride = (columns + group - 1) / group * group;
    const float* from = input.const_data_ptr<float>();
    std::vector<float> room;
    if (stride != columns) {
      room.resize(tokens * stride);
      for (int64_t token = 0; token < tokens; ++token)
        std::copy_n(from + token * columns, columns, room.data() + token * stride);
      from = room.data();
    }
    multiply_embedding(table, rows, from, stride, tokens, y.data_ptr<float>());
  } else {
    const int64_t tile = std::min(rows, std::max<int64_t>(64, EXPANDED / columns));
    Tensor dense = input.new_empty({tile, columns});
    for (int64_t row = 0; row < rows; row += tile) {
      const int64_t count = std::min(tile, rows - row);
      expand_rows(table, nullptr, row, count, dense.data_ptr<float>());
      Tensor part = y.narrow(1, row, count);
      part.copy_(input.mm(dense.narrow(0, 0, count).t()));
    }
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  return y.reshape(sizes);
}

}  // namespace lbllm
