// From q.k to the score: scale, softcap, ALiBi, mask, window, dropout.
//
// Scores are transposed: a tile holds S^T, keys along rows and queries along lanes,
//
//              q0 q1 q2 ...  q63
//        k0  [  .  .  .        ]      so that everything softmax does goes down a column
//        k1  [  .  .  .        ]      (no sums across lanes), and P^T comes out as the operand
//        ..                           that V^T P^T reads.
//
// and in natural units: a probability is exp2 of a difference of scores times log2 e, in that order,
// for the difference is small where the scores need not be.
#pragma once

#include "kernels/attention_geometry.h"
#include "kernels/random.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {

/// 2^x of scores less their reference. Where weights are rounded to bfloat16 (2^-9) a cubic is enough:
/// 8.6e-5, and exactly 1 at 0. There the fraction of -infinity is 0, and scalef takes the floor of x.
template <class Dot>
LS_INLINE Vec<typename Dot::Sum> weight_of(Vec<typename Dot::Sum> x) {
#if defined(LONGSPAN_BF16_DOT)
  if constexpr (Dot::kDepth == 2) {
    const auto f = Vec<float>(_mm512_reduce_ps(__m512(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    const Vec<float> p = ((f * 7.7067197e-2f + 2.2764482e-1f) * f + 6.9511683e-1f) * f + 1.0f;
    return Vec<float>(_mm512_scalef_ps(__m512(p), __m512(x)));
  }
#endif
  return exp2_nonpositive<typename Dot::Sum>(x);
}

/// What one head of one sequence does to its scores.
template <class T>
struct ScoreRules {
  Sequence sequence;
  T scale, softcap, slope;
  AttentionMask mask;  ///< data moved to this sequence and head
  bool drops;
  T keep_scale;        ///< 1 / (1 - p)
  uint32_t threshold;  ///< a random word below it drops
  RandomKey key;

  LS_INLINE ScoreRules(const AttentionParams& p, int64_t b, int64_t h) : sequence(p, b) {
    scale = T(p.scale);
    softcap = T(p.softcap);
    slope = p.alibi_slopes ? T(p.alibi_slopes[b * p.alibi_batch + h]) : T(0);
    mask = p.mask;
    if (mask.data) {
      const int64_t bytes = mask.boolean ? 1 : size_of(mask.dtype);
      mask.data = static_cast<char*>(mask.data) + (b * mask.batch + h * mask.head) * bytes;
    }
    drops = p.dropout > 0;
    keep_scale = T(1 / (1 - p.dropout));
    threshold = uint32_t(p.dropout * 4294967296.0);
    key = random_key(p.seed, b, h);
  }

  /// Nothing but a positive scale: the tile needs no pass of its own.
  LS_INLINE bool plain() const {
    return mask.data == nullptr && softcap == T(0) && slope == T(0) && scale > T(0);
  }

  /// Raw q.k -> scores, -infinity where the key is not seen. The tile is keys [k0, k1) by
  /// queries [q0, q1), rows kQueryBlock apart; bias is scratch of one tile. Where softcap is on and
  /// derivative is not null, it receives d score / d (scale q.k).
  void apply(T* tile, T* bias, T* derivative, int64_t q0, int64_t q1, int64_t k0, int64_t k1) const {
    constexpr int L = kLanes<T>;
    if (mask.data) load_mask(bias, q0, q1, k0, k1);
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    for (int64_t k = k0; k < k1; ++k) {
      // Query q0 + i sees key k from `from` to `to`, both of them lanes of the block.
      const int64_t at = k - sequence.offset - q0;
      const int64_t from = sequence.right < 0 ? 0 : at - sequence.right;
      const bool bounded = sequence.left >= 0 && k >= sequence.sink_end;
      int64_t to = bounded ? at + sequence.left : kQueryBlock;
      if (k < sequence.first || k >= sequence.end) to = -1;
      T* row = tile + (k - k0) * kQueryBlock;
      for (int64_t i = 0; i < q1 - q0; i += L) {
        Vec<T> x = load(row + i) * scale;
        if (softcap != T(0)) {
          const Vec<T> t = tanh<T>(x / softcap);
          x = t * softcap;
          if (derivative) store(derivative + (k - k0) * kQueryBlock + i, T(1) - t * t);
        }
        if (slope != T(0)) x -= absolute<T>(lane + T(i - at)) * slope;
        if (mask.data) x += load(bias + (k - k0) * kQueryBlock + i);
        const auto seen = (lane + T(i) >= T(clamp(from))) & (lane + T(i) <= T(clamp(to)));
        x = select<T>(seen, x, broadcast(-kInfinity<T>));
        if (mask.data) {  // -infinity hides even a NaN score
          const auto hidden = load(bias + (k - k0) * kQueryBlock + i) == -kInfinity<T>;
          x = select<T>(hidden, broadcast(-kInfinity<T>), x);
        }
        store(row + i, x);
      }
    }
  }

  /// 0 or 1 / (1 - p) for keys k and k + 1 and the lanes from query q. Both words of one counter:
  /// k must be even.
  LS_INLINE void dropout(int64_t q, int64_t k, Vec<T>& even, Vec<T>& odd) const {
    if constexpr (sizeof(T) == 4) {
      Vec<uint32_t> x = Vec<uint32_t>(iota<T>()) + uint32_t(q);
      Vec<uint32_t> y = Vec<uint32_t>{} + uint32_t(k / 2);
      threefry(key, x, y);
      const Vec<T> kept = broadcast(keep_scale);
      even = x < threshold ? Vec<T>{} : kept;
      odd = y < threshold ? Vec<T>{} : kept;
    } else {
      for (int i = 0; i < kLanes<T>; ++i) {
        uint32_t x = uint32_t(q + i), y = uint32_t(k / 2);
        threefry(key, x, y);
        even[i] = x < threshold ? T(0) : keep_scale;
        odd[i] = y < threshold ? T(0) : keep_scale;
      }
    }
  }

 private:
  /// Far bounds are cut to just outside the block, where every T is exact.
  static LS_INLINE int64_t clamp(int64_t x) {
    return max_of<int64_t>(-1, min_of<int64_t>(x, kQueryBlock));
  }

  /// The mask of a tile, transposed: -infinity where a key is hidden, else what is added.
  void load_mask(T* bias, int64_t q0, int64_t q1, int64_t k0, int64_t k1) const {
    constexpr int L = kLanes<T>;
    for (int64_t q = q0; q < q1; q += L) {
      for (int64_t k = k0; k < k1; k += L) {
        const int64_t width = min_of<int64_t>(k1 - k, L);
        Vec<T> square[L];
        for (int i = 0; i < L; ++i) {
          square[i] = q + i < q1 ? mask_row(q + i, k, width) : Vec<T>{};
        }
        transpose<T>(square);
        for (int64_t i = 0; i < width; ++i) {
          store(bias + (k + i - k0) * kQueryBlock + q - q0, square[i]);
        }
      }
    }
  }

  LS_INLINE Vec<T> mask_row(int64_t q, int64_t k, int64_t n) const {
    const int64_t at = q * mask.query + k * mask.key;
    Vec<T> row = {};
    if (mask.boolean) {
      const uint8_t* p = static_cast<const uint8_t*>(mask.data) + at;
      for (int64_t i = 0; i < n; ++i) row[i] = p[i * mask.key] ? T(0) : -kInfinity<T>;
    } else if (mask.key == 1) {
      row = load_as<T>(mask.data, mask.dtype, at, n);
    } else {
      for (int64_t i = 0; i < n; ++i)
        row[i] = load_as<T>(mask.data, mask.dtype, at + i * mask.key, 1)[0];
    }
    return row;
  }
};

}  // namespace longspan::LONGSPAN_ISA
