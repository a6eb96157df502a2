// How much work justifies another thread. Waking a thread takes about 0.1 ms.

#pragma once

#include <cstdint>

namespace lbllm {

constexpr int64_t WORK = 1 << 21;  // weights times tokens that a thread multiplies
constexpr int64_t EACH = 1 << 16;  // weights that a thread expands, or values that it quantizes

}  // namespace lbllm
