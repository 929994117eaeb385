// Exact attention in tiles: forward, backward, gradient of an additive mask, decoding. With lists of
// blocks the same kernels are block-sparse attention.
//
// Nothing of size tokens x keys is allocated; working memory is linear in both.
//
//   q, out, d_out, dq   [batch][heads][tokens][channels]       out and d_out: value_channels
//   k, v, dk, dv        [batch][kv_heads][keys][channels]      v and dv: value_channels
//   lse                 [batch][heads][tokens], dense; double where tensors are double, else float
//
// Packed sequences: batch counts them, Tensor::batch is 0, and cu_q / cu_k say where each begins.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace longspan {

/// Strides in elements; channels have stride 1.
struct AttentionTensor {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

/// Added to the scores (after scale and softcap), or a bool that says which keys are seen.
struct AttentionMask {
  void* data = nullptr;
  bool boolean = false;
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, head = 0, query = 0, key = 0;  ///< strides; 0 where broadcast
};

inline constexpr int64_t kLeastKeyBlock = 16;

/// Which blocks of scores there are: for each list (one for all, or a batch entry's, or a head's) and
/// block of queries the blocks of keys, ascending; and the same by block of keys, for the backward.
/// A block of pattern 0 is seen whole. Another pattern has a word for each key in
/// bits[pattern][query_block / 64][key_block], whose bit i says whether query i of those 64 sees it.
struct AttentionBlocks {
  int64_t query_block = 0, key_block = 0;  ///< tokens: multiples of 64, and of kLeastKeyBlock
  int64_t batch = 0, head = 0;             ///< strides in lists; 0 where shared
  const int64_t* row_begins = nullptr;     ///< [lists * query blocks + 1]; null: all blocks
  const int32_t *columns = nullptr, *row_patterns = nullptr;
  const int64_t* column_begins = nullptr;  ///< [lists * key blocks + 1]
  const int32_t *rows = nullptr, *column_patterns = nullptr;
  const uint64_t* bits = nullptr;
};

struct AttentionParams {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, heads = 0, kv_heads = 0;
  int64_t tokens = 0, keys = 0;  ///< of each sequence, or of all where they are packed
  int64_t channels = 0, value_channels = 0;
  AttentionTensor q, k, v, out;
  void* lse = nullptr;

  // Which keys a query sees. Query i stands at key position i + offset, where offset aligns the
  // last query with the last key unless `ranges` says otherwise.
  int64_t left = -1, right = -1;     ///< window around that position, -1: no bound
  int64_t sink_tokens = 0;           ///< so many first keys are exempt from `left`
  const int64_t* cu_q = nullptr;     ///< [batch + 1]
  const int64_t* cu_k = nullptr;
  const int64_t* ranges = nullptr;   ///< [batch][3]: first key, one past the last key, offset
  AttentionMask mask;
  AttentionBlocks blocks;            ///< without the bounds and ranges above, and not packed

  // The score: softcap * tanh(scale * q.k / softcap) - slope * |distance| + mask.
  double scale = 1, softcap = 0;
  const double* alibi_slopes = nullptr;  ///< [batch or 1][heads]
  int64_t alibi_batch = 0;              ///< stride between batches
  const double* sinks = nullptr;         ///< [heads]: a logit that takes weight and gives no value

  double dropout = 0;
  uint64_t seed = 0;
  int threads = 1;
};

struct AttentionGradients {
  AttentionTensor d_out;
  const void* d_lse = nullptr;  ///< as lse, or null
  AttentionTensor dq, dk, dv;
  double* d_sinks = nullptr;     ///< [heads], written where not null
};

/// Few queries over long caches: AttentionParams::k and v are the caches, of `keys` slots a row.
/// Keys and values lie in pages of `page` slots where block_table is given (then k.batch is the
/// stride between pages), else one after the other.
struct AttentionCache {
  const int64_t* lengths = nullptr;      ///< [batch]: keys to be seen, the new ones included
  const int64_t* starts = nullptr;       ///< [batch] or null: first key to be seen (left padding)
  const int64_t* block_table = nullptr;  ///< [batch][pages]
  int64_t pages = 0, page = 0;
  const int64_t* rows = nullptr;         ///< [batch] or null: which row of the cache

  // attention_append writes these to the last slots before `lengths`, and, where cos is given, rotates
  // the keys on the way and the queries into q_rotated. Positions count from `starts`.
  AttentionTensor k_new, v_new;
  int64_t new_tokens = 0;  ///< may be 0
  AttentionTensor q_rotated;
  const void *cos = nullptr, *sin = nullptr;  ///< [positions][rotary_channels], the halves equal
  Dtype rotary_dtype = Dtype::kFloat;
  int64_t rotary_channels = 0, rotary_stride = 0;
  bool interleaved = false;  ///< pairs (2i, 2i + 1) instead of (i, i + half)
};

// Called through kernels() (table.h).
void attention_forward(const AttentionParams&);
void attention_backward(const AttentionParams&, const AttentionGradients&);
/// Adds the gradient of an additive mask to d_mask, whose dtype is float (double for double); where
/// its strides are 0 it sums.
void attention_mask_backward(const AttentionParams&, const AttentionGradients&,
                             const AttentionMask& d_mask);
void attention_append(const AttentionParams&, const AttentionCache&);
void attention_decode(const AttentionParams&, const AttentionCache&);

}  // namespace longspan
