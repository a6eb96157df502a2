// What operators take as tensors, checked, as the kernels read it. Only operators.cpp includes this.

#pragma once

#include "lookup.h"
#include "packed.h"

#include <ATen/core/Tensor.h>

#include <optional>

namespace lbllm {

using at::Tensor;

// The packed weights in these tensors, as pack_words and a checkpoint give them.
inline Weights weights_of(const Tensor& words, const Tensor& params, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& table, int64_t columns, int64_t length) {
  TORCH_CHECK(params.dim() == 3 && (!scale || scale->dim() == 3),
              "packed_linear: params must be (rows, groups, codes), a scale (rows, levels, 2)");
  const int count = static_cast<int>(scale ? scale->size(1) : params.size(2));
  const Shape shape(columns, length, table ? 3 : count / 2);
  // With one code a group, two groups share a byte; a single group reads the same with 8 bits.
  const bool whole = table ? params.size(1) == shape.groups : params.size(2) == count;
  const int bits = !scale ? 16 : whole ? 8 : 4;
  TORCH_CHECK(words.scalar_type() == at::kInt && words.is_contiguous() && words.dim() == 3 &&
                  words.size(1) == shape.words && words.size(2) == LANES,
              "packed_linear: words must be the contiguous int32 tensor that pack_words makes of these sizes");
  TORCH_CHECK(!table || (table->is_contiguous() && table->scalar_type() == at::kHalf && table->numel() == 8),
              "packed_linear: a table must be contiguous float16 (8,)");
  const bool halved = bits == 4;
  TORCH_CHECK(params.is_contiguous() && params.size(0) == words.size(0) &&
                  params.size(1) == (table && halved ? (shape.groups + 1) / 2 : shape.groups) &&
                  (table ? count == 1 : count == 2 || count == 4) &&
                  params.size(2) == (halved && !table ? count / 2 : count) &&
                  params.scalar_type() == (scale ? at::kByte : at::kHalf),
              "packed_linear: params must be contiguous (rows, groups, 2 or 4, or 1 with a table) float16, or with a "
              "scale uint8, two codes of 4 bits a byte");
  const uint16_t* affine = nullptr;
  if (scale) {
    TORCH_CHECK(scale->is_contiguous() && scale->scalar_type() == at::kHalf &&
                    scale->numel() == words.size(0) * count * 2,
                "packed_linear: params_scale must be contiguous float16 (rows, levels, 2)");
    affine = static_cast<const uint16_t*>(scale->const_data_ptr());
  }
  Weights w{shape, reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()),
            {params.const_data_ptr(), affine, shape.groups, count, bits}};
  if (table) w.params.set_table(static_cast<const uint16_t*>(table->const_data_ptr()));
  return w;
}

// The packed layer in these tensors.
inline Tiles tiles_of(const Tensor& tiles, const Tensor& params, int64_t columns, int64_t length) {
  TORCH_CHECK(tiles.scalar_type() == at::kByte && tiles.is_contiguous() && tiles.dim() == 4 && columns % 8 == 0 &&
                  tiles.size(1) == columns / 8 && (tiles.size(2) == 1 || tiles.size(2) == 2) && tiles.size(3) == TILE,
              "packed_lookup: tiles must be contiguous uint8 (rows / 32, columns / 8, 1 or 2, 32)");
  // The sums of longer groups would not fit into 16 bits.
  TORCH_CHECK(length % 8 == 0 && length > 0 && length <= 2048, "packed_lookup: groups have 8, 16, .. 2048 columns");
  const int64_t groups = (columns + length - 1) / length, bits = tiles.size(2);
  TORCH_CHECK(params.is_contiguous() && params.scalar_type() == at::kHalf && params.dim() == 4 &&
                  params.size(0) == tiles.size(0) && params.size(1) == groups && params.size(2) == 2 * bits &&
                  params.size(3) == TILE,
              "packed_lookup: params must be contiguous float16 (rows / 32, groups, 2 or 4, 32)");
  return {tiles.const_data_ptr<uint8_t>(), static_cast<const uint16_t*>(params.const_data_ptr()), columns, length,
          groups, static_cast<int>(bits)};
}

// Checks the weights `groups` (rows, n, length) and their `levels` (rows, n, 2, 4 or 8), which are in ascending order.
inline void check_groups(const Tensor& groups, const Tensor& levels) {
  TORCH_CHECK(groups.dim() == 3 && levels.dim() == 3 && groups.size(0) == levels.size(0) &&
                  groups.size(1) == levels.size(1) &&
                  (levels.size(2) == 2 || levels.size(2) == 4 || levels.size(2) == 8) && groups.is_contiguous() &&
                  levels.is_contiguous() && groups.scalar_type() == at::kFloat && levels.scalar_type() == at::kFloat,
              "nearest_level: contiguous float32 groups (rows, n, length) and levels (rows, n, 2, 4 or 8) are needed");
}

}  // namespace lbllm
