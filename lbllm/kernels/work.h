// How much work is worth another thread.

#pragma once

#include <cstdint>

namespace lbllm {

constexpr int64_t WORK = 1 << 21;      // weights times tokens that are worth waking an idle thread for, some 0.1 ms
constexpr int64_t EACH = 1 << 16;      // weights to expand, or values to quantize, that are worth the same

}  // namespace lbllm
