// One token through all decoder blocks, on pointers.

#include "decode.h"

#include "team.h"

#include <cmath>

namespace lbllm {

namespace {

constexpr int64_t PIECE = 1 << 16;  // weights that a thread takes at a time, about 10 microseconds

inline void rms_norm(const float* weight, const float* x, float* out, int64_t count, float epsilon) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) sums[k] += static_cast<double>(x[i + k]) * x[i + k];
  for (; i < count; ++i) sums[0] += static_cast<double>(x[i]) * x[i];
  const double mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<double>(count);
  const float factor = 1.0f / std::sqrt(static_cast<float>(mean) + epsilon);
  for (int64_t j = 0; j < count; ++j) out[j] = weight[j] * (x[j] * factor);
}

// Runs a token through the blocks. Holds the working memory that all blocks share.
class Pass {
 public:
  Pass(Team& team, const Sizes& sizes)
      : team_(team), size_(sizes.hidden), dim_(sizes.dim), heads_(sizes.heads), kv_heads_(sizes.kv_heads),
        tokens_(sizes.position + 1), scaling_(sizes.scaling), epsilon_(sizes.epsilon), normed_(size_),
        attended_(heads_ * dim_), projected_(size_),
        room_(kv_heads_ * attention_room(tokens_, dim_, heads_ / kv_heads_)) {}

  void run(Block& block, float* stream, const float* cosine, const float* sine) {
    const int64_t group = heads_ / kv_heads_;
    for (int k = 0; k < LAYERS; ++k)
      if (k != 3 && k != 6) outputs_[k].resize(block.layers[k].rows);
    float *q = outputs_[0].data(), *k = outputs_[1].data(), *v = outputs_[2].data();

    rms_norm(block.norms[0], stream, normed_.data(), size_, epsilon_);
    float* queries[] = {q, k, v};
    multiply(block, 0, 3, normed_.data(), queries);
    if (block.norms[2]) {
      for (int64_t head = 0; head < heads_; ++head)
        rms_norm(block.norms[2], q + head * dim_, q + head * dim_, dim_, epsilon_);
      for (int64_t head = 0; head < kv_heads_; ++head)
        rms_norm(block.norms[3], k + head * dim_, k + head * dim_, dim_, epsilon_);
    }
    rotate(q, heads_, dim_, cosine, sine);
    rotate(k, kv_heads_, dim_, cosine, sine);
    for (int64_t head = 0; head < kv_heads_; ++head) {
      block.kept[0].append(head, tokens_ - 1, k + head * dim_);
      block.kept[1].append(head, tokens_ - 1, v + head * dim_);
    }
    const int64_t room = static_cast<int64_t>(room_.size()) / kv_heads_;
    team_.share(kv_heads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t kv = begin; kv < end; ++kv)
        attend(q, block.kept[0], block.kept[1], kv, tokens_, group, scaling_, room_.data() + kv * room,
               attended_.data());
    });
    float* projected[] = {projected_.data()};
    multiply(block, 3, 1, attended_.data(), projected);
    for (int64_t i = 0; i < size_; ++i) stream[i] += projected_[i];

    rms_norm(block.norms[1], stream, normed_.data(), size_, epsilon_);
    float *gate = outputs_[4].data(), *up = outputs_[5].data();
    float* gated[] = {gate, up};
    multiply(block, 4, 2, normed_.data(), gated);
    team_.share(block.layers[4].rows, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    });
    multiply(block, 6, 1, gate, projected);
    for (int64_t i = 0; i < size_; ++i) stream[i] += projected_[i];
  }

 private:
  // Multiplies by the layers first .. first + count - 1, which read the same input. Layers with equal quantizers share
  // the quantized input.
  void multiply(const Block& block, int first, int count, const float* input, float** outputs) {
    Job jobs[3];
    const Lookup* lookups[3] = {};
    const float* last = nullptr;
    int64_t units = 0, rows = 0, weights = 0;  // a unit is 32 rows of one layer
    for (int j = 0; j < count; ++j) {
      const Layer &layer = block.layers[first + j], &before = block.layers[first + j - (j > 0)];
      const bool same = j > 0 && layer.quantizer == before.quantizer && layer.tiled == before.tiled;
      if (layer.tiled) {
        if (same && layer.length == before.length) {
          lookups[j] = lookups[j - 1];
        } else {
          lookups_[j].build(layer.quantizer, input, layer.columns, layer.length);
          lookups[j] = &lookups_[j];
        }
      } else {
        const float* from = input;
        if (layer.quantizer.bits) {
          if (!same) {
            quantized_[j].resize(layer.columns);
            layer.quantizer.apply(input, quantized_[j].data(), layer.columns);
            last = quantized_[j].data();
          }
          from = last;
        }
        jobs[j] = {layer.words, layer.rows, laid_out(layer.words.shape, from, 1, laid_[j]), outputs[j]};
      }
      units += (layer.rows + TILE - 1) / TILE;
      rows += layer.rows;
      weights += layer.rows * layer.columns;
    }
    team_.share(units, std::max<int64_t>(1, rows * PIECE / weights / TILE), [&](int64_t begin, int64_t end) {
      int64_t passed = 0;
      for (int j = 0; j < count; ++j) {
        const Layer& layer = block.layers[first + j];
        const int64_t own = (layer.rows + TILE - 1) / TILE;
        const int64_t from = std::max(begin, passed) - passed, to = std::min(end, passed + own) - passed;
        passed += own;
        if (from >= to) continue;
        const int64_t top = from * TILE, bottom = std::min(layer.rows, to * TILE);
        if (layer.tiled)
          look_up(layer.tiles, from, to, *lookups[j], outputs[j]);
        else
          some_rows_of(jobs[j], top, bottom, 1);
        if (layer.bias)
          for (int64_t row = top; row < bottom; ++row) outputs[j][row] += layer.bias[row];
      }
    });
  }

  Team& team_;
  const int64_t size_, dim_, heads_, kv_heads_, tokens_;
  const float scaling_, epsilon_;
  std::vector<float> normed_, attended_, projected_, room_, outputs_[LAYERS], quantized_[3], laid_[3];
  Lookup lookups_[3];
};

}  // namespace

void run_blocks(std::vector<Block>& blocks, const Sizes& sizes, float* stream, const float* cosine, const float* sine,
                const float* last_norm, float* out) {
  with_team([&](Team& team) {
    Pass pass(team, sizes);
    for (Block& block : blocks) pass.run(block, stream, cosine, sine);
    rms_norm(last_norm, stream, out, sizes.hidden, sizes.epsilon);
  });
}

}  // namespace lbllm
