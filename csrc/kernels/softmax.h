// The online softmax over a tile of transposed scores (attention_scores.h).
//
// For each query (a lane): m the greatest score so far, l the sum of 2^(score - m), both over the
// keys seen so far. A tile brings them up to date and says by which factor what was accumulated
// under the old m must shrink. (Dao et al. 2022, "FlashAttention", algorithm 1; SPEC section 1.)
#pragma once

#include "kernels/attention_scores.h"

namespace longspan::LONGSPAN_ISA {

template <class T>
struct SoftmaxState {
  T* maximum;     ///< [kQueryBlock], in log2
  T* sum;         ///< [kQueryBlock]
  T* correction;  ///< [kQueryBlock]: 2^(old maximum - new maximum) of the last tile

  LS_INLINE void reset() const {
    for (int64_t i = 0; i < kQueryBlock; ++i) {
      maximum[i] = -kInfinity<T>;
      sum[i] = T(0);
    }
  }
};

/// Stores the probabilities of two keys as the operand of a product that contracts over keys: two
/// rows, or one row of pairs.
template <class Dot>
LS_INLINE void store_key_pair(typename Dot::Element* rows, int64_t key, Vec<typename Dot::Sum> even,
                              Vec<typename Dot::Sum> odd) {
  if constexpr (Dot::kDepth == 1) {
    store(rows + key * kQueryBlock, even);
    store(rows + (key + 1) * kQueryBlock, odd);
  } else {
    store(rows + key / 2 * kQueryBlock, bf16_pair(even, odd));
  }
}

/// The greatest of a column of `keys` vectors. Four at a time: one chain would wait for each maximum.
template <class T>
LS_INLINE Vec<T> column_maximum(const T* scores, int64_t keys) {
  Vec<T> greatest[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) greatest[j] = broadcast(-kInfinity<T>);
  int64_t k = 0;
  for (; k + 4 <= keys; k += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      greatest[j] = maximum<T>(greatest[j], load(scores + (k + j) * kQueryBlock));
  }
  for (; k < keys; ++k) greatest[0] = maximum<T>(greatest[0], load(scores + k * kQueryBlock));
  return maximum<T>(maximum<T>(greatest[0], greatest[1]), maximum<T>(greatest[2], greatest[3]));
}

/// One tile: `scores` [keys][kQueryBlock] become probabilities relative to the new maximum, in
/// `weights` (which may be `scores` where Dot is not Bf16). scores * unit is in log2. With an odd
/// number of keys, row `keys` of both is written too. q0 and k0 place the tile for dropout; k0 is even.
template <class Dot, bool kDropout>
void online_softmax(typename Dot::Sum* scores, typename Dot::Element* weights, int64_t keys,
                    int64_t queries, typename Dot::Sum unit, SoftmaxState<typename Dot::Sum> state,
                    const ScoreRules<typename Dot::Sum>& rules, int64_t q0, int64_t k0) {
  using T = typename Dot::Sum;
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < queries; i += L) {
    const Vec<T> greatest = column_maximum(scores + i, keys);
    const Vec<T> before = load(state.maximum + i);
    const Vec<T> now = maximum<T>(before, greatest * unit);
    // A query that has seen nothing yet: any finite reference gives it weights of 2^-infinity.
    const Vec<T> reference = select<T>(now == -kInfinity<T>, Vec<T>{}, now);
    const Vec<T> correction = exp2_nonpositive<T>(before - reference);
    Vec<T> sum = load(state.sum + i) * correction;
    if (keys % 2) store(scores + keys * kQueryBlock + i, broadcast(-kInfinity<T>));
    for (int64_t k = 0; k < keys; k += 2) {
      const T* row = scores + k * kQueryBlock + i;
      Vec<T> even = exp2_nonpositive<T>(load(row) * unit - reference);
      Vec<T> odd = exp2_nonpositive<T>(load(row + kQueryBlock) * unit - reference);
      sum += even + odd;
      if constexpr (kDropout) {
        Vec<T> keep_even, keep_odd;
        rules.dropout(q0 + i, k0 + k, keep_even, keep_odd);
        even *= keep_even;
        odd *= keep_odd;
      }
      store_key_pair<Dot>(weights + i, k, even, odd);
    }
    store(state.maximum + i, now);
    store(state.sum + i, sum);
    store(state.correction + i, correction);
  }
}

}  // namespace longspan::LONGSPAN_ISA
