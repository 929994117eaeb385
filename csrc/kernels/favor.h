// FAVOR+'s positive features: exponentials of a product, forward and backward, without the passes over
// memory between.
//
//   forward    y[r][i] = sum over c of x[r][c] W[i][c],   top[r] = max over i of y[r][i],
//              and with own_maximum  y = exp(y - top - log_count / 2) + eps
//   exp_rows   the same in place with any offset for top: where the maximum is of more rows than one
//   backward   with e = d_y (y - eps):  dx[r] = sum over i of e[r][i] W[i] - x[r] * sum over i of
//   e[r][i]
//
// x, dx and W are of the type of accumulation, double or float, as y is in exp_rows.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace longspan {

inline constexpr int64_t kFavorPadding = 16;  ///< rows of W and of its transpose are multiples

struct FavorParams {
  Dtype sum = Dtype::kFloat;  ///< of x and W
  int64_t rows = 0, channels = 0, features = 0;
  const void* x = nullptr;           ///< [rows][channels]
  const void* directions = nullptr;  ///< forward: W^T [channels][features, padded]
                                     ///< backward: W [features][channels, padded]
  Dtype dtype = Dtype::kFloat;  ///< of y and d_y
  void* y = nullptr;  ///< [rows][features]
  void* top = nullptr;  ///< [rows]; exp_rows: the offset
  bool own_maximum = false;
  double log_count = 0, eps = 0;
  const void* d_y = nullptr;  ///< [rows][features]
  void* dx = nullptr;  ///< [rows][channels]
  int threads = 1;
};

// Called through kernels() (table.h).
void favor_forward(const FavorParams&);
void favor_exp_rows(const FavorParams&);
void favor_backward(const FavorParams&);

}  // namespace longspan
