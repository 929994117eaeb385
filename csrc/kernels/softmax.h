// The online softmax over a tile of transposed scores (attention_scores.h).
//
// For each query (a lane): a reference m, and l the sum of 2^(score - m) over the keys seen so far. A
// tile brings them up to date and says by which factor what was accumulated under the old m must
// shrink. (Dao et al. 2022, "FlashAttention", algorithm 1; SPEC section 1.) There m is the greatest
// score so far. Here it stays until that is kSlack above it: any reference gives the same quotient, and
// most tiles leave the sums and what was accumulated as they are.
#pragma once

#include "kernels/attention_scores.h"

namespace longspan::LONGSPAN_ISA {

/// Weights stay at or below 2^kSlack, far from overflow, and keep the precision of their format.
inline constexpr int kSlack = 8;

template <class T>
struct SoftmaxState {
  T* reference;   ///< [kQueryBlock], in log2
  T* sum;         ///< [kQueryBlock]
  T* correction;  ///< [kQueryBlock]: 2^(old reference - new reference) of the last tile

  LS_INLINE void reset() const {
    for (int64_t i = 0; i < kQueryBlock; ++i) {
      reference[i] = -kInfinity<T>;
      sum[i] = T(0);
    }
  }
};

#if defined(LONGSPAN_BF16_DOT)
/// bf16_pair of weights, which are 0 or more: halves round up, and a NaN makes its query's sum one.
/// Where a permutation of 16-bit lanes and the conversion take the ports that exponentials wait for.
LS_INLINE Vec<uint32_t> weight_pair(Vec<float> lower, Vec<float> upper) {
#if defined(LONGSPAN_AMX)
  const auto a = bit_cast<uint32_t, float>(lower) + 0x8000u;
  const auto b = bit_cast<uint32_t, float>(upper) + 0x8000u;
  return Vec<uint32_t>(_mm512_mask_blend_epi16(0xaaaaaaaau, __m512i(a >> 16), __m512i(b)));
#else
  return bf16_pair(lower, upper);
#endif
}
#endif

/// Stores the probabilities of two keys as the operand of a product that contracts over keys: two
/// rows, or one row of pairs.
template <class Dot>
LS_INLINE void store_key_pair(typename Dot::Element* rows, int64_t key, Vec<typename Dot::Sum> even,
                              Vec<typename Dot::Sum> odd) {
  if constexpr (Dot::kDepth == 1) {
    store(rows + key * kQueryBlock, even);
    store(rows + (key + 1) * kQueryBlock, odd);
  } else {
    store(rows + key / 2 * kQueryBlock, weight_pair(even, odd));
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

/// One tile: `scores` [keys][kQueryBlock] become probabilities relative to the new reference, in
/// `weights` (which may be `scores` where Dot is not Bf16). scores * unit is in log2. With an odd
/// number of keys, row `keys` of both is written too. q0 and k0 place the tile for dropout; k0 is even.
/// Returns whether a reference moved: if none did, all corrections are 1.
template <class Dot, bool kDropout>
bool online_softmax(typename Dot::Sum* scores, typename Dot::Element* weights, int64_t keys,
                    int64_t queries, typename Dot::Sum unit, SoftmaxState<typename Dot::Sum> state,
                    const ScoreRules<typename Dot::Sum>& rules, int64_t q0, int64_t k0) {
  using T = typename Dot::Sum;
  constexpr int L = kLanes<T>;
  Vec<T> moved = {};
  for (int64_t i = 0; i < queries; i += L) {
    const Vec<T> greatest = column_maximum(scores + i, keys) * unit;
    const Vec<T> before = load(state.reference + i);
    const Vec<T> now = select<T>(greatest > before + T(kSlack), greatest, before);
    // A query that has seen nothing yet: any finite reference gives it weights of 2^-infinity.
    const Vec<T> reference = select<T>(now == -kInfinity<T>, Vec<T>{}, now);
    const Vec<T> correction = exp2_nonpositive<T>(before - reference);
    moved += T(1) - correction;
    Vec<T> sum = load(state.sum + i) * correction;
    if (keys % 2) store(scores + keys * kQueryBlock + i, broadcast(-kInfinity<T>));
    for (int64_t k = 0; k < keys; k += 2) {
      const T* row = scores + k * kQueryBlock + i;
      Vec<T> even = weight_of<Dot>(load(row) * unit - reference);
      Vec<T> odd = weight_of<Dot>(load(row + kQueryBlock) * unit - reference);
      sum += even + odd;
      if constexpr (kDropout) {
        Vec<T> keep_even, keep_odd;
        rules.dropout(q0 + i, k0 + k, keep_even, keep_odd);
        even *= keep_even;
        odd *= keep_odd;
      }
      store_key_pair<Dot>(weights + i, k, even, odd);
    }
    store(state.reference + i, now);
    store(state.sum + i, sum);
    store(state.correction + i, correction);
  }
  return sum_of_lanes<T>(moved) != T(0);
}

}  // namespace longspan::LONGSPAN_ISA
