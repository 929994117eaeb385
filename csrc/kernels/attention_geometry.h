// Which keys a block of queries can see, and how sequences are cut into blocks.
#pragma once

#include "kernels/attention.h"
#include "kernels/pack.h"

namespace longspan::LONGSPAN_ISA {

inline constexpr int64_t kQueryBlock = 64;  ///< queries along the lanes of a tile
inline constexpr int64_t kKeyBlock = 96;    ///< keys along its rows

struct Interval {
  int64_t begin, end;
  LS_INLINE bool empty() const { return begin >= end; }
};

/// One sequence: where its rows begin, and the visibility rule in its own indices.
struct Sequence {
  int64_t q_begin, tokens;  ///< rows of q that belong to it
  int64_t k_begin, keys;
  int64_t first, end;       ///< keys outside are not seen by anyone
  int64_t offset;           ///< query i stands at key i + offset
  int64_t left, right, sink_end;

  LS_INLINE Sequence(const AttentionParams& p, int64_t b) {
    q_begin = p.cu_q ? p.cu_q[b] : 0;
    k_begin = p.cu_k ? p.cu_k[b] : 0;
    tokens = p.cu_q ? p.cu_q[b + 1] - q_begin : p.tokens;
    keys = p.cu_k ? p.cu_k[b + 1] - k_begin : p.keys;
    first = p.ranges ? max_of<int64_t>(p.ranges[3 * b], 0) : 0;
    end = p.ranges ? min_of(p.ranges[3 * b + 1], keys) : keys;
    offset = p.ranges ? p.ranges[3 * b + 2] : keys - tokens;
    left = p.left;
    right = p.right;
    sink_end = first + p.sink_tokens;
  }

  /// Keys that at least one of queries [q0, q1) may see: the sinks, then the window. Ascending and
  /// disjoint; either may be empty.
  LS_INLINE void key_ranges(int64_t q0, int64_t q1, Interval (&ranges)[2]) const {
    const int64_t high = right < 0 ? end : min_of(end, q1 + offset + right);
    const int64_t low = left < 0 ? first : max_of(first, q0 + offset - left);
    if (low <= sink_end) {
      ranges[0] = {first, high};
      ranges[1] = {0, 0};
    } else {
      ranges[0] = {first, min_of(sink_end, high)};
      ranges[1] = {low, high};
    }
  }

  /// Queries that may see at least one of keys [k0, k1).
  LS_INLINE Interval query_range(int64_t k0, int64_t k1) const {
    if (max_of(k0, first) >= min_of(k1, end)) return {0, 0};
    const int64_t low = right < 0 ? 0 : max_of<int64_t>(0, k0 - offset - right);
    int64_t high = tokens;
    if (left >= 0 && max_of(k0, first) >= sink_end) high = min_of(tokens, k1 - offset + left);
    return {low, high};
  }

  /// Whether every query of [q0, q1) sees every key of [k0, k1).
  LS_INLINE bool all_visible(int64_t q0, int64_t q1, int64_t k0, int64_t k1) const {
    return k0 >= first && k1 <= end && (right < 0 || k1 - 1 <= q0 + offset + right) &&
           (left < 0 || k0 >= q1 - 1 + offset - left || k1 <= sink_end);
  }
};

/// The rows of one head of one sequence.
LS_INLINE TokenRows rows_of(const AttentionTensor& x, Dtype dtype, int64_t batch, int64_t head,
                            int64_t token) {
  const int64_t at = batch * x.batch + head * x.head + token * x.token;
  return {static_cast<char*>(x.data) + at * size_of(dtype), dtype, x.token};
}

/// Numbers the query blocks of all sequences; prefix[b] is the first block of sequence b.
class QueryBlocks {
 public:
  QueryBlocks(const AttentionParams& p, int64_t* prefix) : batch_(p.batch), prefix_(prefix) {
    prefix[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      prefix[b + 1] = prefix[b] + ceil_div(Sequence(p, b).tokens, kQueryBlock);
    }
  }
  LS_INLINE int64_t count() const { return prefix_[batch_]; }
  LS_INLINE int64_t first(int64_t b) const { return prefix_[b]; }
  LS_INLINE int64_t sequence_of(int64_t block) const {
    int64_t low = 0, high = batch_ - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (prefix_[middle] <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

 private:
  int64_t batch_;
  int64_t* prefix_;
};

}  // namespace longspan::LONGSPAN_ISA
