// What a state and its tokens decay by over one chunk, for recurrences with one decay a step.
#pragma once

#include "kernels/parallel.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {

/// Sums over a triangle are cut into strips of so many rows, each only as deep as it needs.
inline constexpr int64_t kStrip = 16;

/// With a_t the sum of log decays over the chunk's tokens up to and with t. Arrays of a number a token,
/// logarithms to base 2.
template <class T>
struct Decay {
  T *high, *low;  ///< a_t in two parts, so that differences of large sums keep their bits
  T* from_start;  ///< exp(a_t)
  T* to_end;      ///< exp(a_n - a_t)
  T whole;        ///< exp(a_n)

  /// Beyond 2^-4096 any state is forgotten, and sums of such numbers stay finite.
  static constexpr double kLimit = 4096;

  void lay_out(Arena& arena, int64_t tokens) {
    T** const arrays[] = {&high, &low, &from_start, &to_end};
    for (T** array : arrays) *array = arena.take<T>(tokens);
  }

  /// step(t): token t's log decay, n of them; the arrays are filled up to `tokens`.
  template <class Step>
  LS_INLINE void prepare(int64_t n, int64_t tokens, const Step& step) {
    constexpr int L = kLanes<T>;
    double sum = 0, rest = 0;  // the sum is both: what an addition loses is exactly known
    for (int64_t t = 0; t < tokens; ++t) {
      if (t < n) {
        const double given = step(t);
        const double x = given < -kLimit ? -kLimit : given > kLimit ? kLimit : given;
        const double next = sum + x, added = next - sum;
        rest += (sum - (next - added)) + (x - added);
        sum = next;
      }
      high[t] = T(sum);
      low[t] = T((sum - double(high[t])) + rest);
    }
    const T end_high = high[n - 1], end_low = low[n - 1];
    for (int64_t t = 0; t < tokens; t += L) {
      const Vec<T> h = load(high + t), l = load(low + t);
      store(from_start + t, exp2<T>(h + l));
      store(to_end + t, exp2<T>((end_high - h) + (end_low - l)));
    }
    whole = from_start[n - 1];
  }

  /// exp(a_t - a_s) for the lanes s from i; 0 for s > t, masked before the exponential.
  LS_INLINE Vec<T> between(int64_t t, int64_t i, Vec<T> lane) const {
    Vec<T> a = (high[t] - load(high + i)) + (low[t] - load(low + i));
    if (i + kLanes<T> > t) a = select<T>(lane + T(i) <= T(t), a, broadcast(-kInfinity<T>));
    return exp2<T>(a);
  }
};

}  // namespace longspan::LONGSPAN_ISA
