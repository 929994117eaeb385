// The element types that tensors may have.
#pragma once

#include <cstdint>

namespace longspan {

enum class Dtype : int { kFloat, kDouble, kBfloat16, kHalf };

inline constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

}  // namespace longspan
