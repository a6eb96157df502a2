// The operator that runs one token through all decoder blocks.

#include "attention.h"
#include "lookup.h"
#include "operators.h"
#include "packed.h"
#include "team.h"

namespace lbllm {

using at::Tensor;

namespace {

constexpr int LAYERS = 7;           // q, k, v, o, gate, up, down
constexpr int64_t PIECE = 1 << 16;  // weights that a thread takes at a time, about 10 microseconds

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
  Pass(Team& team, int64_t size, int64_t dim, int64_t heads, int64_t kv_heads, int64_t position, float scaling,
       float epsilon)
      : team_(team), size_(size), dim_(dim), heads_(heads), kv_heads_(kv_heads), tokens_(position + 1),
        scaling_(scaling), epsilon_(epsilon), normed_(size), attended_(heads * dim), projected_(size),
        room_(kv_heads * attention_room(position + 1, dim, heads / kv_heads)) {}

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

// Runs one token (1, 1, hidden) through all decoder blocks of a model with the structure of LLaMA and through the norm
// after them. Keys and values are stored in 4, 8 or 16 bits.
//
// `norms`: for each block the norms before attention and before the MLP, then the norms of each head's query and key if
// the model has them; after all blocks the last norm. `words`, `params`, `scales`, `biases`, `columns`, `lengths`: for
// each block those of the layers q, k, v, o, gate, up, down. `quantizers`: six numbers per layer, namely bits (0: no
// quantization), tail, knee, the two clips, and how many features share a range. `cache`: for each block codes and
// scales of the keys, then of the values, with room for a token at `position`; with 16 bits float16 values and empty
// scales.
Tensor decode(const Tensor& hidden, const Tensor& cosine, const Tensor& sine, at::TensorList norms,
              at::TensorList words, at::TensorList params, at::ArrayRef<std::optional<Tensor>> scales,
              at::ArrayRef<std::optional<Tensor>> biases, at::ArrayRef<double> quantizers,
              at::IntArrayRef columns, at::IntArrayRef lengths, at::TensorList cache, int64_t position,
              int64_t heads, int64_t kv_heads, double scaling, double epsilon) {
  const int64_t size = hidden.numel(), dim = cosine.size(-1);
  const size_t blocks = words.size() / LAYERS, layers = blocks * LAYERS;
  TORCH_CHECK(blocks > 0 && words.size() == layers && params.size() == layers && scales.size() == layers &&
                  biases.size() == layers && quantizers.size() == 6 * layers && columns.size() == layers &&
                  lengths.size() == layers && cache.size() == 4 * blocks &&
                  (norms.size() == 2 * blocks + 1 || norms.size() == 4 * blocks + 1),
              "decode: seven layers, two or four norms and four tensors of cache a block, and one norm more are "
              "expected");
  TORCH_CHECK(hidden.scalar_type() == at::kFloat && hidden.is_contiguous() && size == columns[0],
              "decode: one token is expected, contiguous float32");
  for (const Tensor& tensor : {cosine, sine})
    TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous() && tensor.numel() == dim,
                "decode: one position's rotary embedding is expected, contiguous float32");
  TORCH_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && dim % 2 == 0,
              "decode: whole groups of heads, and heads of even length, are expected");
  const size_t each_norms = (norms.size() - 1) / blocks;
  const auto norm_at = [&](size_t index, int64_t count) {
    const Tensor& norm = norms[index];
    TORCH_CHECK(norm.scalar_type() == at::kFloat && norm.is_contiguous() && norm.numel() == count,
                "decode: norms must be float32, of the size that they are for");
    return norm.const_data_ptr<float>();
  };

  std::vector<Block> program(blocks);
  std::vector<Tensor> held;  // biases in float32
  for (size_t b = 0; b < blocks; ++b) {
    Block& block = program[b];
    for (size_t n = 0; n < 4; ++n)
      block.norms[n] = n < each_norms ? norm_at(b * each_norms + n, n < 2 ? size : dim) : nullptr;
    for (int k = 0; k < LAYERS; ++k) {
      const size_t at = b * LAYERS + k;
      Layer& layer = block.layers[k];
      layer.tiled = words[at].scalar_type() == at::kByte;
      layer.columns = columns[at];
      layer.length = lengths[at];
      layer.rows = params[at].size(0) * (layer.tiled ? TILE : 1);
      const double* six = quantizers.data() + 6 * at;
      const auto bits = static_cast<int64_t>(six[0]), tail = static_cast<int64_t>(six[1]);
      layer.quantizer = quantizer_of(bits, tail, six[2], six[3], six[4]);
      layer.quantizer.size = static_cast<int64_t>(six[5]);
      TORCH_CHECK(layer.quantizer.size > 0, "decode: ranges have one feature or more");
      if (layer.tiled) {
        TORCH_CHECK(layer.quantizer.bits == 4 && layer.quantizer.size == layer.columns,
                    "decode: layers in tiles have 4-bit activations, one range a token");
        layer.tiles = tiles_of(words[at], params[at], layer.columns, layer.length);
      } else {
        layer.words = weights_of(words[at], params[at], scales[at], layer.columns, layer.length);
      }
      layer.bias = nullptr;
      if (const std::optional<Tensor>& bias = biases[at]) {
        TORCH_CHECK(bias->numel() == layer.rows, "decode: a bias of another size");
        held.push_back(bias->to(at::kFloat).contiguous());
        layer.bias = held.back().const_data_ptr<float>();
      }
    }
    const Layer* at = block.layers;
    const int64_t wide = heads * dim, narrow = kv_heads * dim, middle = at[6].columns;
    const int64_t sizes[LAYERS][2] = {{size, wide}, {size, narrow}, {size, narrow}, {wide, size},
                                      {size, middle}, {size, middle}, {middle, size}};
    for (int k = 0; k < LAYERS; ++k)
      TORCH_CHECK(at[k].columns == sizes[k][0] && at[k].rows == sizes[k][1],
                  "decode: the layers' sizes don't fit each other");
    for (int which = 0; which < 2; ++which) {
      const Tensor &codes = cache[4 * b + 2 * which], &scale = cache[4 * b + 2 * which + 1];
      const bool halves = codes.scalar_type() == at::kHalf;
      const int bits = halves ? 16 : codes.size(-1) == dim ? 8 : 4;
      TORCH_CHECK(codes.is_contiguous() && scale.is_contiguous() && (halves || codes.scalar_type() == at::kByte) &&
                      scale.scalar_type() == at::kHalf && codes.dim() == 4 && codes.size(0) == 1 &&
                      codes.size(1) == kv_heads && codes.size(2) > position &&
                      codes.size(3) == (bits == 4 ? dim / 2 : dim) && scale.dim() == 4 &&
                      scale.size(1) == kv_heads && scale.size(2) == codes.size(2) &&
                      scale.size(3) == (halves ? 0 : 2),
                  "decode: the cache has no room, or another shape");
      block.kept[which] = {bits, codes.data_ptr(), reinterpret_cast<uint16_t*>(scale.data_ptr<at::Half>()),
                           codes.size(2), dim};
    }
  }
  const float* last = norm_at(norms.size() - 1, size);

  std::vector<float> stream(hidden.const_data_ptr<float>(), hidden.const_data_ptr<float>() + size);
  Tensor out = hidden.new_empty(hidden.sizes());
  const float *turn = cosine.const_data_ptr<float>(), *tilt = sine.const_data_ptr<float>();
  float* result = out.data_ptr<float>();
  with_team([&](Team& team) {
    Pass pass(team, size, dim, heads, kv_heads, position, static_cast<float>(scaling), static_cast<float>(epsilon));
    for (Block& block : program) pass.run(block, stream.data(), turn, tilt);
    rms_norm(last, stream.data(), result, size, static_cast<float>(epsilon));
  });
  return out;
}

}  // namespace lbllm
