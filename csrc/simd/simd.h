// One vector vocabulary for every instruction set.
//
// A Vec<T> is as wide as the instruction set's own register (LONGSPAN_VECTOR_BYTES) and is
// written with the compilers' vector extensions, so + - * / < ? : mean what they mean for a
// scalar, lane by lane. Intrinsics appear only where the language has no word for the thing.
//
// Everything here lives in a namespace named after the instruction set and is inlined always:
// a vector passed by value across a call would change the calling convention between levels.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LS_INLINE inline __attribute__((always_inline))
#define LS_INLINE_LAMBDA __attribute__((always_inline))

namespace longspan::LONGSPAN_ISA {

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(LONGSPAN_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
inline constexpr int kLanes = LONGSPAN_VECTOR_BYTES / int(sizeof(T));

/// The integer of T's width: comparisons of Vec<T> give Vec<IntOf<T>> of 0 and -1.
template <class T>
struct IntOfImpl;
template <>
struct IntOfImpl<float> {
  using type = int32_t;
};
template <>
struct IntOfImpl<double> {
  using type = int64_t;
};
template <class T>
using IntOf = typename IntOfImpl<T>::type;

template <class T>
inline constexpr T kInfinity = T(__builtin_inff());

// Scalar helpers: std's would be instantiated in this namespace with external linkage.
template <class T>
LS_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
LS_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}
LS_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LS_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
LS_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
LS_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

/// The first n lanes from memory, the rest zero. Reads nothing beyond n.
template <class T>
LS_INLINE Vec<T> load_first(const T* p, int64_t n) {
  Vec<T> v = {};
  if (n > 0) __builtin_memcpy(&v, p, size_t(n) * sizeof(T));  // p may be null for none
  return v;
}

template <class T>
LS_INLINE void store_first(T* p, Vec<T> v, int64_t n) {
  if (n > 0) __builtin_memcpy(p, &v, size_t(n) * sizeof(T));
}

template <class T>
LS_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

/// 0, 1, 2, ... in the integer that compares with Vec<T>.
template <class T>
LS_INLINE Vec<IntOf<T>> iota() {
  Vec<IntOf<T>> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}

/// mask lanes are 0 or -1; a where set, else b. Never arithmetic: NaN in the other side is not seen.
template <class T>
LS_INLINE Vec<T> select(Vec<IntOf<T>> mask, Vec<T> a, Vec<T> b) {
  return mask ? a : b;
}

template <class To, class From>
LS_INLINE Vec<To> bit_cast(Vec<From> v) {
  return reinterpret_cast<Vec<To>>(v);
}

/// b where a is NaN or the comparison is false, as x86 has it; callers rely on NaN in b surviving.
template <class T>
LS_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return Vec<T>(_mm512_max_ps(__m512(a), __m512(b)));
  } else {
    return Vec<T>(_mm512_max_pd(__m512d(a), __m512d(b)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return Vec<T>(_mm256_max_ps(__m256(a), __m256(b)));
  } else {
    return Vec<T>(_mm256_max_pd(__m256d(a), __m256d(b)));
  }
#else
  return a > b ? a : b;
#endif
}

/// Halves the vector until one lane is left.
template <class T, class Combine>
LS_INLINE T reduce_lanes(Vec<T> v, const Combine& combine) {
  T lane[kLanes<T>];
  store(lane, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = combine(lane[i], lane[i + width]);
  }
  return lane[0];
}

template <class T>
LS_INLINE T sum_of_lanes(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps(__m512(v));
#endif
  return reduce_lanes<T>(v, [](T a, T b) { return a + b; });
}

/// NaN lanes may or may not be passed over.
template <class T>
LS_INLINE T max_of_lanes(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps(__m512(v));
#endif
  return reduce_lanes<T>(v, [](T a, T b) { return a < b ? b : a; });
}

// Interleaving and transposition -----------------------------------------------------------

#if defined(__clang__) || __GNUC__ >= 12
#define LS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#error "longspan needs gcc 12 or later, or clang"
#endif

/// a0 b0 a1 b1 ...: the lower (or upper) halves of a and b, lane beside lane.
template <class T>
LS_INLINE Vec<T> interleave_low(Vec<T> a, Vec<T> b) {
  constexpr int L = kLanes<T>;
  if constexpr (L == 2) {
    return LS_SHUFFLE(a, b, 0, 2);
  } else if constexpr (L == 4) {
    return LS_SHUFFLE(a, b, 0, 4, 1, 5);
  } else if constexpr (L == 8) {
    return LS_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else if constexpr (L == 16) {
    return LS_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  } else {
    static_assert(L == 32);
    return LS_SHUFFLE(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
  }
}

template <class T>
LS_INLINE Vec<T> interleave_high(Vec<T> a, Vec<T> b) {
  constexpr int L = kLanes<T>;
  if constexpr (L == 2) {
    return LS_SHUFFLE(a, b, 1, 3);
  } else if constexpr (L == 4) {
    return LS_SHUFFLE(a, b, 2, 6, 3, 7);
  } else if constexpr (L == 8) {
    return LS_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (L == 16) {
    return LS_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else {
    static_assert(L == 32);
    return LS_SHUFFLE(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25,
                      57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
  }
}

#if defined(__AVX512F__)
/// 16 by 16: pairs, then pairs of pairs within each quarter of a register, then the quarters. 64
/// shuffles as below, but each one without an index vector, and two registers at a time.
LS_INLINE void transpose_16(Vec<float> (&rows)[16]) {
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    Vec<float>* r = rows + i;
    const Vec<float> a =
        LS_SHUFFLE(r[0], r[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    const Vec<float> b =
        LS_SHUFFLE(r[0], r[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const Vec<float> c =
        LS_SHUFFLE(r[2], r[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    const Vec<float> d =
        LS_SHUFFLE(r[2], r[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    r[0] = LS_SHUFFLE(a, c, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    r[1] = LS_SHUFFLE(a, c, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    r[2] = LS_SHUFFLE(b, d, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    r[3] = LS_SHUFFLE(b, d, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Vec<float>* r = rows + i;
    const Vec<float> a = LS_SHUFFLE(r[0], r[4], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const Vec<float> b = LS_SHUFFLE(r[8], r[12], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const Vec<float> c =
        LS_SHUFFLE(r[0], r[4], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const Vec<float> d =
        LS_SHUFFLE(r[8], r[12], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    r[0] = LS_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    r[4] = LS_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    r[8] = LS_SHUFFLE(c, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    r[12] = LS_SHUFFLE(c, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
}
#endif

/// Turns a square of kLanes<T> vectors in place: log2(lanes) rounds of interleaving row i with
/// row i + lanes / 2 (the perfect shuffle), each round one bit of the index.
template <class T>
LS_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
#if defined(__AVX512F__)
  if constexpr (__is_same(T, float)) return transpose_16(rows);
#endif
  Vec<T> next[L];
#pragma GCC unroll 8
  for (int bit = 1; bit < L; bit *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave_low<T>(rows[i], rows[i + L / 2]);
      next[2 * i + 1] = interleave_high<T>(rows[i], rows[i + L / 2]);
    }
#pragma GCC unroll 32
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

}  // namespace longspan::LONGSPAN_ISA
