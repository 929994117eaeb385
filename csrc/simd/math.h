// Elementary functions on vectors: 2^x, e^x, tanh, softplus, sigmoid, sin and cos. Accurate to a few
// units in the last place over the whole range, infinities and NaN as in <cmath>; denormal results may
// be flushed to zero.
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

/// 2^(a * b) for products of any size and sign: what a scan spends its time on. In float, AVX-512 has
/// 2^x = 2^q 2^(i/32) (1 + f r(f)) with x = q + f, q a multiple of 1/32 and i its last five bits. Two
/// registers hold the 32 roots, a quadratic does the rest (5.4e-8, exactly 1 at 0), and the
/// multiplier, which a scan saturates, has 4 operations of the 5 of exp2_fraction besides a * b.
template <class T>
LS_INLINE Vec<T> exp2_product(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    static constexpr float roots[32] = {
        1.0f,        1.02189715f, 1.04427378f, 1.06714040f, 1.09050773f, 1.11438674f, 1.13878863f,
        1.16372486f, 1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f,
        1.35425555f, 1.38390988f, 1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f,
        1.57598085f, 1.61049033f, 1.64575548f, 1.68179283f, 1.71861930f, 1.75625216f, 1.79470908f,
        1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};
    const Vec<T> x = a * b;
    // The last bits of x + 1.5 * 2^18 count 32nds; f is x less its nearest 32nd, 0 for infinities.
    const Vec<T> counted = x + 393216.0f;
    const Vec<T> f = Vec<T>(_mm512_reduce_ps(__m512(x), 5 << 4 | _MM_FROUND_TO_NEAREST_INT | 8));
    const Vec<T> root =
        Vec<T>(_mm512_permutex2var_ps(__m512(load(roots)), __m512i(counted), __m512(load(roots + 16))));
    const Vec<T> r = f * 2.4022827e-1f + 6.9315732e-1f;
    return scale_by_power<T>((root * f) * r + root, x - f);
  }
#endif
  return exp2<T>(a * b);
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

/// 1 / (1 + e^-x). In float, AVX-512 has the reciprocal to 14 bits and one Newton step takes it to 28,
/// in a third of a division's time; where 1 + e^-x overflows the step would be infinity times zero.
template <class T>
LS_INLINE Vec<T> sigmoid(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> d = T(1) + exp2<T>(x * T(-kLog2e));
    const Vec<T> r = Vec<T>(_mm512_rcp14_ps(__m512(d)));
    return select<T>(d == kInfinity<T>, Vec<T>{}, r * (T(2) - d * r));
  }
#endif
  return T(1) / (T(1) + exp<T>(-x));
}

/// log(1 + e^x), and x where x > 20, as torch has it. With e = e^-|x|, log1p(e) is 2 artanh(e / (2 +
/// e)), whose series keeps its relative accuracy where the result is small.
template <class T>
LS_INLINE Vec<T> softplus(Vec<T> x) {
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 18;  // (1/9)^terms is below the rounding
  const Vec<T> e = exp<T>(-absolute<T>(x));
  const Vec<T> s = e / (T(2) + e), square = s * s;
  Vec<T> series = broadcast(T(1) / T(2 * kTerms - 1));
#pragma GCC unroll 18
  for (int k = kTerms - 2; k >= 0; --k) series = series * square + T(1) / T(2 * k + 1);
  return select<T>(x > T(20), x, maximum<T>(x, Vec<T>{}) + T(2) * s * series);
}

/// sin x and cos x: x less its nearest multiple of pi / 2, in three parts, and the Taylor series
/// there. Lanes beyond the reach of three parts go to libm.
template <class T>
LS_INLINE void sin_cos(Vec<T> x, Vec<T>* sin, Vec<T>* cos) {
  constexpr bool kFloat = sizeof(T) == 4;
  const T reach = kFloat ? T(8192) : T(1e6);
  const Vec<T> turns = round_to_int<T>(x * T(0.63661977236758134308));
  Vec<T> r = x - turns * T(kFloat ? 1.5703125 : 1.57079632673412561417);
  r = r - turns * T(kFloat ? 4.837512969970703125e-4 : 6.07710050630396597660e-11);
  r = r - turns * T(kFloat ? 7.549789954891889e-8 : 2.02226624879595063154e-21);
  const Vec<T> square = r * r;
  Vec<T> odd = broadcast(T(1)), even = broadcast(T(1));
#pragma GCC unroll 9
  for (int k = kFloat ? 5 : 9; k >= 1; --k) {
    odd = T(1) - square * odd / T(2 * k * (2 * k + 1));
    even = T(1) - square * even / T(2 * k * (2 * k - 1));
  }
  odd = odd * r;
  const Vec<IntOf<T>> quadrant = __builtin_convertvector(turns, Vec<IntOf<T>>);
  const Vec<IntOf<T>> swapped = -(quadrant & 1);
  *sin = select<T>(swapped, even, odd);
  *cos = select<T>(swapped, odd, even);
  *sin = select<T>(-((quadrant >> 1) & 1), -*sin, *sin);
  *cos = select<T>(-(((quadrant + 1) >> 1) & 1), -*cos, *cos);
  for (int i = 0; i < kLanes<T>; ++i) {
    if (!(x[i] > -reach && x[i] < reach)) {
      (*sin)[i] = T(__builtin_sin(double(x[i])));
      (*cos)[i] = T(__builtin_cos(double(x[i])));
    }
  }
}

/// out[i] += the sum of v[i]'s lanes. Each round of interleaving halves the vectors, as in transpose.
template <class T, int N>
LS_INLINE void add_sums_of_lanes(Vec<T> (&v)[N], T* out) {
  constexpr int L = kLanes<T>, kWidth = N < L ? N : L;
  static_assert((N & (N - 1)) == 0);
#pragma GCC unroll 8
  for (int first = 0; first < N; first += kWidth) {
#pragma GCC unroll 4
    for (int half = kWidth / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = first; i < first + half; ++i) {
        v[i] = interleave_low<T>(v[i], v[i + half]) + interleave_high<T>(v[i], v[i + half]);
      }
    }
    if constexpr (kWidth == L) {  // then a lane is a sum
      store(out + first, load(out + first) + v[first]);
      continue;
    }
    alignas(LONGSPAN_VECTOR_BYTES) T lanes[L];
    store(lanes, v[first]);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      T sum = lanes[i];
#pragma GCC unroll 16
      for (int j = i + kWidth; j < L; j += kWidth) sum += lanes[j];
      out[first + i] += sum;
    }
  }
}

}  // namespace longspan::LONGSPAN_ISA
