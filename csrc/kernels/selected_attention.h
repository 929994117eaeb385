// Attention in which each query names the blocks of keys that it sees, and the choice of those blocks:
// the selected branch of Native Sparse Attention, and decoding of Mixture of Block Attention.
//
//   q, out, d_out, dq   [batch][heads][tokens][channels]       out and d_out: value_channels
//   k, v, dk, dv        [batch][kv_heads][keys][channels]      v and dv: value_channels
//   lse                 [batch][heads][tokens], dense; double where tensors are double, else float
//   lists               [batch][list_heads][tokens]            heads / list_heads heads share one
//
// Query t stands at key position t + end - tokens, where end is `keys` or the sequence's length. Block
// j is keys [j, j + 1) * block_size before `end`; where causal, a query sees those up to its own.
#pragma once

#include "kernels/attention.h"

namespace longspan {

struct SelectedParams {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, heads = 0, kv_heads = 0, list_heads = 0;
  int64_t tokens = 0, keys = 0, channels = 0, value_channels = 0, block_size = 0;
  AttentionTensor q, k, v, out;
  void* lse = nullptr;
  const int64_t* begins = nullptr;   ///< [batch * list_heads * tokens + 1]
  const int32_t* blocks = nullptr;   ///< of each list ascending, none twice
  const int64_t* lengths = nullptr;  ///< [batch], or null
  bool causal = true;
  double scale = 1;
  int threads = 1;
};

struct SelectedGradients {
  AttentionTensor d_out;
  const void* d_lse = nullptr;  ///< as lse, or null
  AttentionTensor dq, dk, dv;
};

/// Softmax of q over compressed keys, folded into scores of blocks, and the best of those; and, where
/// there are values, attention to these keys.
/// Compressed key c stands for keys [c * stride, c * stride + length) and is seen, where causal, by
/// queries from its last key on. Block j's score is the sum of the probabilities of the compressed keys
/// that overlap it, each times the strides that they share, over the heads of a group.
struct SelectBlocksParams {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, heads = 0, kv_heads = 0;
  int64_t tokens = 0, keys = 0, compressed = 0, channels = 0;
  AttentionTensor q, k;              ///< k: compressed keys
  int64_t value_channels = 0;
  AttentionTensor v, out;            ///< compressed values; data may be null
  void* lse = nullptr;               ///< written where there are values
  const int64_t* lengths = nullptr;  ///< [batch], or null: in keys, not compressed
  int64_t length = 0, stride = 0, block_size = 0;  ///< stride divides the other two
  int64_t count = 0;                 ///< blocks to be chosen, at most
  const int64_t* counts = nullptr;   ///< [batch][kv_heads][tokens], of each query; or null: count
  bool causal = true;
  double scale = 1;
  int64_t* indices = nullptr;        ///< [batch][kv_heads][tokens][count], ascending, then -1
  int threads = 1;
};

// Called through kernels() (table.h).
void selected_attention_forward(const SelectedParams&);
void selected_attention_backward(const SelectedParams&, const SelectedGradients&);
void select_blocks(const SelectBlocksParams&);

}  // namespace longspan
