// Elementary functions on vectors: 2^x, e^x, tanh. Accurate to a few units in the last place over
// the whole range, infinities and NaN as in <cmath>; denormal results may be flushed to zero.
#pragma once

#include "simd/simd.h"

namespace longspan::LONGSPAN_ISA {

inline constexpr double kLog2e = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

template <class T>
LS_INLINE Vec<T> round_to_int(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return Vec<T>(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    return Vec<T>(_mm512_roundscale_pd(__m512d(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  // Adding 1.5 * 2^mantissa pushes the fraction off the end; right for |x| < 2^(mantissa - 1).
  const T magic = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);
  Vec<T> shifted = x + magic;
  asm("" : "+x"(shifted));  // the compiler must not fold (x + magic) - magic
  return shifted - magic;
#endif
}

/// x * 2^n for integral n; n beyond the exponent range gives 0 or infinity.
template <class T>
LS_INLINE Vec<T> scale_by_power(Vec<T> x, Vec<T> n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return Vec<T>(_mm512_scalef_ps(__m512(x), __m512(n)));
  } else {
    return Vec<T>(_mm512_scalef_pd(__m512d(x), __m512d(n)));
  }
#else
  // Two factors of half the exponent each, so that neither over- nor underflows on its own.
  using I = IntOf<T>;
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
  constexpr I kBias = sizeof(T) == 4 ? 127 : 1023;
  const Vec<I> whole = __builtin_convertvector(n, Vec<I>);
  const Vec<I> half = whole >> 1;
  const Vec<T> a = bit_cast<T, I>((half + kBias) << kMantissa);
  const Vec<T> b = bit_cast<T, I>((whole - half + kBias) << kMantissa);
  return x * a * b;
#endif
}

/// 2^f for f in [-0.5, 0.5]. Float: the degree-5 polynomial of least relative error (9.2e-8) among
/// those that are exactly 1 at 0. Double: the Taylor series of e^(f ln 2) to x^13 (2e-17).
LS_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = f * 1.326472731e-3f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  return p * f + 1.0f;
}

LS_INLINE Vec<double> exp2_fraction(Vec<double> f) {
  const Vec<double> x = f * kLn2;
  Vec<double> p = broadcast(1.0 / 6227020800.0);
  const double coefficients[] = {1.0 / 479001600.0,
                                 1.0 / 39916800.0,
                                 1.0 / 3628800.0,
                                 1.0 / 362880.0,
                                 1.0 / 40320.0,
                                 1.0 / 5040.0,
                                 1.0 / 720.0,
                                 1.0 / 120.0,
                                 1.0 / 24.0,
                                 1.0 / 6.0,
                                 0.5,
                                 1.0,
                                 1.0};
#pragma GCC unroll 16
  for (int i = 0; i < 13; ++i) p = p * x + coefficients[i];
  return p;
}

template <class T>
LS_INLINE Vec<T> exp2(Vec<T> x) {
#if !defined(__AVX512F__)
  // scale_by_power's integers need a bounded exponent; comparisons are false for NaN, which stays.
  const T limit = sizeof(T) == 4 ? T(252) : T(2044);
  x = select<T>(x > limit, broadcast(limit), x);
  x = select<T>(x < -limit, broadcast(-limit), x);
  const Vec<T> n = round_to_int<T>(x);
  return scale_by_power<T>(exp2_fraction(x - n), n);
#else
  const Vec<T> n = round_to_int<T>(x);
  Vec<T> f = x - n;
  f = select<T>(n == x, Vec<T>{}, f);  // infinity - infinity
  return scale_by_power<T>(exp2_fraction(f), n);
#endif
}

/// 2^x where x is never +infinity or above the exponent range: the one that softmax needs.
template <class T>
LS_INLINE Vec<T> exp2_nonpositive(Vec<T> x) {
#if defined(__AVX512F__)
  // -infinity: f is NaN there, so clamp x first; one max instead of a compare and a blend.
  x = maximum<T>(broadcast(sizeof(T) == 4 ? T(-256) : T(-2048)), x);
  const Vec<T> n = round_to_int<T>(x);
  return scale_by_power<T>(exp2_fraction(x - n), n);
#else
  return exp2<T>(x);
#endif
}

template <class T>
LS_INLINE Vec<T> exp(Vec<T> x) {
  // e^x = 2^n e^r with r = x - n ln 2 in two parts, so that the product does not lose bits.
  constexpr double high = sizeof(T) == 4 ? 0.693359375 : 0.693147180369123816490;
  constexpr double low = sizeof(T) == 4 ? -2.12194440e-4 : 1.90821492927058770002e-10;
  const T limit = sizeof(T) == 4 ? T(174) : T(1400);
  x = select<T>(x > limit, broadcast(limit), x);
  x = select<T>(x < -limit, broadcast(-limit), x);
  const Vec<T> n = round_to_int<T>(x * T(kLog2e));
  const Vec<T> r = (x - n * T(high)) - n * T(low);
  return scale_by_power<T>(exp2_fraction(r * T(kLog2e)), n);
}

template <class T>
LS_INLINE Vec<T> absolute(Vec<T> x) {
  return select<T>(x < T(0), -x, x);
}

/// tanh x = (1 - e) / (1 + e) with e = exp(-2|x|); near zero the odd series, where 1 - e cancels.
template <class T>
LS_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> a = absolute<T>(x);
  const Vec<T> e = exp<T>(T(-2) * a);
  Vec<T> y = (T(1) - e) / (T(1) + e);
  const Vec<T> s = x * x;
  // x - x^3/3 + 2x^5/15 - 17x^7/315 + 62x^9/2835 - ..., enough terms below the switch.
  Vec<T> series;
  T threshold;
  if constexpr (sizeof(T) == 4) {
    series = T(62.0 / 2835) * s - T(17.0 / 315);
    series = series * s + T(2.0 / 15);
    series = series * s - T(1.0 / 3);
    threshold = T(0.15);
  } else {
    series = T(929569.0 / 638512875) * -s + T(21844.0 / 6081075);
    series = series * s - T(1382.0 / 155925);
    series = series * s + T(62.0 / 2835);
    series = series * s - T(17.0 / 315);
    series = series * s + T(2.0 / 15);
    series = series * s - T(1.0 / 3);
    threshold = T(0.06);
  }
  y = select<T>(x < T(0), -y, y);
  return select<T>(a < threshold, x + x * s * series, y);
}

}  // namespace longspan::LONGSPAN_ISA
