// Rotary position embedding of queries and keys, in one pass over both.
//
//   pair i of a token's channels, (x_i, x_{i + R/2}), interleaved (x_{2i}, x_{2i + 1}), becomes
//   (a cos_i - b sin_i, b cos_i + a sin_i), or with `inverse` its turn by the opposite angle
//
//   q, k       [batch][heads][tokens][channels]       channels have stride 1; in and out may be one
//   cos, sin   [batch or 1][rows][at least R / 2]     a token's row is its index, or its position
//   positions  [batch or 1][tokens]                   rows of cos and sin; null where they are indices
//
// Channels from R on are copied. The gradient by q is the inverse turn of that by the output.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace longspan {

/// Strides in elements; channels have stride 1.
struct RotaryHeads {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

struct RotaryTable {
  const void* data = nullptr;
  int64_t batch = 0, row = 0;  ///< strides in elements
};

struct RotaryParams {
  Dtype dtype = Dtype::kFloat;
  Dtype table_dtype = Dtype::kFloat;  ///< double where tensors are double, and only there
  int64_t batch = 0, tokens = 0, q_heads = 0, k_heads = 0;  ///< k_heads may be 0
  int64_t channels = 0, rotary_channels = 0;
  RotaryHeads q, k, q_out, k_out;
  RotaryTable cos, sin;
  const int64_t* positions = nullptr;
  int64_t positions_batch = 0;  ///< stride
  bool interleaved = false, inverse = false;
  int threads = 1;
};

// Called through kernels() (table.h).
void rotary_apply(const RotaryParams&);

}  // namespace longspan
