// RMS normalisation with a gate, fused: forward and backward.
//
//   before the gate:  out = (rms(x) * weight + bias) * silu(z)
//   after it:         out = rms(x * silu(z)) * weight + bias
//
// where rms(v) = v / sqrt(mean(v^2) + eps), the mean taken over each group of channels.
//
//   x, z, out, d_out, dx, dz   [rows][channels]          channels have stride 1
//   weight, bias               [channels]                in the type of accumulation: double where
//   rstd                       [rows][channels / group]  tensors are double, else float
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace longspan {

struct NormRows {
  void* data = nullptr;
  int64_t stride = 0;  ///< between rows, in elements
};

struct NormParams {
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0, channels = 0, group = 0;
  NormRows x, z, out;  ///< z.data may be null: no gate
  const void *weight = nullptr, *bias = nullptr;  ///< bias may be null
  void* rstd = nullptr;
  double eps = 0;
  bool norm_before_gate = false;
  int threads = 1;
};

struct NormGradients {
  NormRows d_out, dx, dz;
  void *d_weight = nullptr, *d_bias = nullptr;  ///< d_bias may be null
};

// Called through kernels() (table.h).
void norm_gated_forward(const NormParams&);
void norm_gated_backward(const NormParams&, const NormGradients&);

}  // namespace longspan
