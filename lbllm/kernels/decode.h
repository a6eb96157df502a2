// One token through all decoder blocks, defined in decode.cpp.

#pragma once

#include "attention.h"
#include "lookup.h"
#include "packed.h"

#include <vector>

namespace lbllm {

constexpr int LAYERS = 7;  // q, k, v, o, gate, up, down

// A packed layer, in words or in tiles.
struct Layer {
  bool tiled;
  Weights words;
  Tiles tiles;
  int64_t rows, columns, length;
  Quantizer quantizer;
  const float* bias;
};

// A decoder block with the structure of LLaMA's.
struct Block {
  const float* norms[4];  // before attention, before the MLP, and of each head's query and key if the model has them
  Layer layers[LAYERS];
  Cache kept[2];
};

// What all blocks have in common. `position` is the number of tokens before this one.
struct Sizes {
  int64_t hidden, dim, heads, kv_heads, position;
  float scaling, epsilon;
};

// Runs `stream` (hidden,) through the blocks, in place, and writes it to `out` after the last norm. `cosine` and `sine`
// (dim,) are the rotary embedding of the position.
void run_blocks(std::vector<Block>& blocks, const Sizes& sizes, float* stream, const float* cosine, const float* sine,
                const float* last_norm, float* out);

}  // namespace lbllm
