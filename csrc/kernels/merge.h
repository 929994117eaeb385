// Merging attention over parts of the keys by their log-sum-exps (SPEC section 0): one part for every
// row, and others in lists that say where.
//
//     lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i
//
//   own, out          [batch][heads][tokens][channels]
//   own_lse           [rows], rows = batch * heads * tokens; double where tensors are double, else float
//   parts             [places][channels]            parts_lse [places]
//   place             [parts a row][rows]: which place is the row's; each is one row's
#pragma once

#include "kernels/attention.h"

namespace longspan {

struct MergeParams {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, heads = 0, tokens = 0, channels = 0, count = 0;
  AttentionTensor own, out;
  const void* own_lse = nullptr;
  const void* parts = nullptr;
  const void* parts_lse = nullptr;
  const int64_t* place = nullptr;
  int threads = 1;
};

/// As the forward's tensors; d_parts and d_parts_lse are written at every place.
struct MergeGradients {
  AttentionTensor d_out, d_own;
  void *d_own_lse = nullptr, *d_parts = nullptr, *d_parts_lse = nullptr;
};

// Called through kernels() (table.h).
void merge_forward(const MergeParams&);
void merge_backward(const MergeParams&, const MergeGradients&);

}  // namespace longspan
