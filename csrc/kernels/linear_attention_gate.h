// A chunk whose gates are one a key channel: what its tokens decay by, and what they weigh for each
// other. With b_t the sum of gates over the chunk's tokens up to and with t, a vector of key channels,
//
//   M[t][s] = sum over channels of q_t k_s exp(b_t - b_s)        for s <= t
//
// is no product of matrices: exp(b_t) and exp(-b_s) apart over- and underflow. So exponentials are of
// single gates, and everything is a product of them, which is right for gates of any size and for
// -infinity. A chunk is short, kStrip tokens: between chunks, where most of the arithmetic is, all
// decays have one sign and products of matrices serve. (Yang et al. 2023, Gated linear attention,
// section 4, which needs a second level of chunks because tensor cores want larger ones.)
#pragma once

#include "kernels/decay.h"
#include "kernels/tile.h"

namespace longspan::LONGSPAN_ISA {

/// Arrays [kStrip][width], a row a token. Rows past the last token have a decay of 1.
template <class T>
struct ChannelDecay {
  static constexpr int L = kLanes<T>;
  static constexpr int kSide = kTileColumns;  ///< M is worked out in squares of so many rows

  T* step;        ///< exp(gate_t)
  T* from_start;  ///< exp(b_t)
  T* to_end;      ///< exp(b_n - b_t)
  T* weighted;    ///< [kSide][width]: k_s exp(b_t - b_s), as t goes on
  int64_t width;

  void lay_out(Arena& arena, int64_t row) {
    width = row;
    T** const arrays[] = {&step, &from_start, &to_end};
    for (T** array : arrays) *array = arena.take<T>(kStrip * width);
    weighted = arena.take<T>(kSide * width);
  }

  /// exp(b_n): [width].
  LS_INLINE T* whole() const { return from_start + (kStrip - 1) * width; }

  /// gate(t, channel): a vector of token t's gates.
  template <class Gate>
  LS_INLINE void prepare(int64_t n, const Gate& gate) {
    for (int64_t c = 0; c < width; c += L) {
      Vec<T> product = broadcast(T(1));
      for (int64_t t = 0; t < kStrip; ++t) {
        const Vec<T> e = t < n ? exp<T>(gate(t, c)) : broadcast(T(1));
        product *= e;
        store(step + t * width + c, e);
        store(from_start + t * width + c, product);
      }
      product = broadcast(T(1));
      for (int64_t t = kStrip - 1; t >= 0; --t) {
        store(to_end + t * width + c, product);
        product *= load(step + t * width + c);
      }
    }
  }

  /// M [kStrip][kStrip] from q and k [kStrip][width], all of whose rows are read. Above its diagonal M
  /// is written in part.
  void scores(const T* q, const T* k, int64_t n, T* m) const {
    for (int64_t s = 0; s < n; s += kSide) {
      __builtin_memcpy(weighted, k + s * width, size_t(kSide * width) * sizeof(T));
      square<true>(q, s, s, m);
      for (int64_t t = s + kSide; t < n; t += kSide) square<false>(q, t, s, m);
    }
  }

  /// The same, and from dM what it gives to q and k, which is added to dq and dk:
  ///
  ///   dq_t += sum of dM[t][s] k_s exp(b_t - b_s)        dk_s += sum of dM[t][s] q_t exp(b_t - b_s)
  ///
  /// Rows of dM past the last token are read, and must be zero.
  void scores_and_gradient(const T* q, const T* k, const T* dm, int64_t n, T* m, T* dq, T* dk) const {
    for (int64_t s = 0; s < n; s += kSide) {
      __builtin_memcpy(weighted, k + s * width, size_t(kSide * width) * sizeof(T));
      square<true, true>(q, s, s, m, dm, dq);
      for (int64_t t = s + kSide; t < n; t += kSide) square<false, true>(q, t, s, m, dm, dq);
    }
    for (int64_t t = 0; t < n; t += kSide) {
      __builtin_memcpy(weighted, q + t * width, size_t(kSide * width) * sizeof(T));
      back<true>(t, t, dm, dk);
      for (int64_t s = t - kSide; s >= 0; s -= kSide) back<false>(t, s, dm, dk);
    }
  }

 private:
  template <bool kDiagonal, bool kGradient = false>
  LS_INLINE void square(const T* q, int64_t t, int64_t s, T* m, const T* dm = nullptr,
                        T* dq = nullptr) const {
    Vec<T> sums[kSide * kSide] = {};
    for (int64_t c = 0; c < width; c += L) {
      Vec<T> x[kSide];
#pragma GCC unroll 4
      for (int j = 0; j < kSide; ++j) x[j] = load(weighted + j * width + c);
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) {
        const Vec<T> e = load(step + (t + i) * width + c), query = load(q + (t + i) * width + c);
        Vec<T> gradient = kGradient ? load(dq + (t + i) * width + c) : Vec<T>{};
#pragma GCC unroll 4
        for (int j = 0; j < kSide; ++j) {
          if (kDiagonal && j > i) continue;
          if (!kDiagonal || j < i) x[j] *= e;
          sums[i * kSide + j] += query * x[j];
          if (kGradient) gradient += dm[(t + i) * kStrip + s + j] * x[j];
        }
        if (kGradient) store(dq + (t + i) * width + c, gradient);
      }
#pragma GCC unroll 4
      for (int j = 0; j < kSide; ++j) store(weighted + j * width + c, x[j]);
    }
    T found[kSide * kSide] = {};
    add_sums_of_lanes<T>(sums, found);
    for (int i = 0; i < kSide; ++i) {
      for (int j = 0; j < kSide; ++j) m[(t + i) * kStrip + s + j] = found[i * kSide + j];
    }
  }

  /// weighted: q_t exp(b_t - b_s), as s goes back from t.
  template <bool kDiagonal>
  LS_INLINE void back(int64_t t, int64_t s, const T* dm, T* dk) const {
    for (int64_t c = 0; c < width; c += L) {
      Vec<T> x[kSide];
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) x[i] = load(weighted + i * width + c);
#pragma GCC unroll 4
      for (int j = kSide - 1; j >= 0; --j) {
        const Vec<T> e = load(step + (s + j) * width + c);
        Vec<T> gradient = load(dk + (s + j) * width + c);
#pragma GCC unroll 4
        for (int i = kDiagonal ? j : 0; i < kSide; ++i) {
          gradient += dm[(t + i) * kStrip + s + j] * x[i];
          x[i] *= e;
        }
        store(dk + (s + j) * width + c, gradient);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) store(weighted + i * width + c, x[i]);
    }
  }
};

}  // namespace longspan::LONGSPAN_ISA
