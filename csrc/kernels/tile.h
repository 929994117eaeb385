// The register-tiled matrix product that every attention-like kernel shares.
//
//     C[m][n] (+)= sum over k of A(m, k) * B[k][n]
//
//            n: lanes                   B is read a vector at a time, rows ldb apart;
//          +---------+                  A is read a scalar at a time and broadcast, so it may
//       k  |    B    |                  have any strides: a matrix as it lies in memory or its
//          +---------+                  transpose cost the same;
//    +---+ +---------+                  C stays in registers for the whole depth, a tile of
//  m | A | |    C    |                  kRows x kColumns vectors at a time.
//    +---+ +---------+
//
// A "Dot" says what one step of depth is. DotFloat and DotDouble: one multiply-add of scalars.
// DotBf16: an element is a pair of bfloat16 in 32 bits, lower half first, and a step adds the
// products of both halves to a float (vdpbf16ps), so K counts pairs. Where the level has AMX, whole
// blocks of 16 x 16 x 16 of them go there (tile_amx.h; scopes that multiply have a TileUnit).
#pragma once

#include "kernels/tile_amx.h"
#include "simd/simd.h"

namespace longspan::LONGSPAN_ISA {

struct DotFloat {
  using Element = float;
  using Sum = float;
  static constexpr int kDepth = 1;
  static LS_INLINE Vec<float> step(Vec<float> sum, Vec<float> a, Vec<float> b) { return a * b + sum; }
  /// A product in which either side is exactly zero adds nothing, not even zero times infinity.
  static LS_INLINE Vec<float> guarded_step(Vec<float> sum, Vec<float> a, Vec<float> b) {
    return select<float>((a == 0.0f) | (b == 0.0f), sum, a * b + sum);
  }
};

struct DotDouble {
  using Element = double;
  using Sum = double;
  static constexpr int kDepth = 1;
  static LS_INLINE Vec<double> step(Vec<double> sum, Vec<double> a, Vec<double> b) {
    return a * b + sum;
  }
  static LS_INLINE Vec<double> guarded_step(Vec<double> sum, Vec<double> a, Vec<double> b) {
    return select<double>((a == 0.0) | (b == 0.0), sum, a * b + sum);
  }
};

#if defined(LONGSPAN_BF16_DOT)
struct DotBf16 {
  using Element = uint32_t;
  using Sum = float;
  static constexpr int kDepth = 2;
  static LS_INLINE Vec<float> step(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
    return Vec<float>(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
  }
  static LS_INLINE Vec<float> guarded_step(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
    sum = DotFloat::guarded_step(sum, bit_cast<float, uint32_t>(a << 16),
                                 bit_cast<float, uint32_t>(b << 16));
    const uint32_t upper = 0xffff0000u;
    return DotFloat::guarded_step(sum, bit_cast<float, uint32_t>(a & upper),
                                  bit_cast<float, uint32_t>(b & upper));
  }
};
#endif

// 512-bit and NEON machines have 32 vector registers, the others 16: sums, one row of B, one scalar.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kTileRows = 6;
inline constexpr int kTileColumns = 4;
#else
inline constexpr int kTileRows = 4;
inline constexpr int kTileColumns = 2;
#endif

/// Of a tile with fewer columns: taller, for a step of depth must be many independent sums.
template <int kColumns>
inline constexpr int kRowsOfTile = kColumns == kTileColumns       ? kTileRows
                                   : kTileColumns == 2            ? 8
                                   : 2 * kColumns == kTileColumns ? 12
                                                                  : 16;

/// What C holds before the products are added.
enum class Start {
  kZero,        ///< nothing: C is written
  kAccumulate,  ///< C itself
  kRescale,     ///< C times a factor per column (the online softmax's correction)
  kRescaleRows, ///< C times a factor per row (a state's decay)
};

/// What a product does besides, by default: nothing.
struct Nothing {
  static constexpr bool kMore = false;
  LS_INLINE void operator()() const {}
};

/// Before a tile is begun, a function: there memory can be asked for that is needed later (Ahead,
/// pack.h).
template <class Function>
struct Between {
  static constexpr bool kMore = false;
  Function& function;
  LS_INLINE void operator()() const { function(); }
};

/// Likewise; and another product is added while C is in registers, its A by rows, and every row of C
/// then multiplied by a factor:
///
///   C = factor (A B + A' B')
template <class Dot, bool kGuard, class Function>
struct More {
  static constexpr bool kMore = true, kGuarded = kGuard;
  const typename Dot::Element* a;
  int64_t a_row;
  const typename Dot::Element* b;
  int64_t ldb, depth;
  const typename Dot::Sum* factor;
  Function& function;
  LS_INLINE void operator()() const { function(); }
};

template <class Dot>
struct Product {
  using Element = typename Dot::Element;
  using Sum = typename Dot::Sum;

  const Element* a;
  int64_t a_row, a_depth;  ///< strides of A along m and along k
  const Element* b;
  int64_t ldb;
  Sum* c;
  int64_t ldc;
  const Sum* rescale = nullptr;  ///< one factor a column or row, for Start::kRescale, kRescaleRows
  /// Pairs, a_depth 1: where groups of 16 of A's depth lie apart, from one to the next; else 0.
  int64_t a_group = 0;

  template <int kRows, int kColumns, Start kStart, bool kGuarded, bool kUnitDepth, class Besides>
  LS_INLINE void tile(int64_t m, int64_t n, int64_t depth, const Besides& besides) const {
    constexpr int L = kLanes<Sum>;
    static_assert(kLanes<Element> == L);
    besides();
    Vec<Sum> sum[kRows][kColumns];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        if constexpr (kStart == Start::kZero) {
          sum[i][j] = Vec<Sum>{};
        } else {
          sum[i][j] = load(c + (m + i) * ldc + n + j * L);
        }
        if constexpr (kStart == Start::kRescale) sum[i][j] *= load(rescale + n + j * L);
        if constexpr (kStart == Start::kRescaleRows) sum[i][j] *= broadcast(rescale[m + i]);
      }
    }
    add<kGuarded, kUnitDepth>(a + m * a_row, a_row, a_depth, b + n, ldb, depth, sum);
    if constexpr (Besides::kMore) {
      const Besides& x = besides;
      add<Besides::kGuarded, true>(x.a + m * x.a_row, x.a_row, 1, x.b + n, x.ldb, x.depth, sum);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        if constexpr (Besides::kMore) sum[i][j] *= broadcast(besides.factor[m + i]);
        store(c + (m + i) * ldc + n + j * L, sum[i][j]);
      }
    }
  }

  template <bool kGuarded, bool kUnitDepth, int kRows, int kColumns>
  static LS_INLINE void add(const Element* a, int64_t a_row, int64_t a_depth, const Element* b,
                            int64_t ldb, int64_t depth, Vec<Sum> (&sum)[kRows][kColumns]) {
    const Element* arow[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) arow[i] = kUnitDepth ? a + i * a_row : a + i;
    for (int64_t k = 0; k < depth; ++k) {
      Vec<Element> bk[kColumns];
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) bk[j] = load(b + j * kLanes<Sum>);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec<Element> x = broadcast<Element>(kUnitDepth ? arow[i][k] : arow[0][i]);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
          sum[i][j] = kGuarded ? Dot::guarded_step(sum[i][j], x, bk[j]) : Dot::step(sum[i][j], x, bk[j]);
        }
      }
      b += ldb;
      if constexpr (!kUnitDepth) arow[0] += a_depth;
    }
  }

  /// Rows from m on, as many tiles of kRows as there are, then lower ones.
  template <int kRows, int kColumns, Start kStart, bool kGuarded, bool kUnitDepth, class Besides>
  LS_INLINE void column(int64_t m, int64_t rows, int64_t n, int64_t depth,
                        const Besides& besides) const {
    for (; m + kRows <= rows; m += kRows) {
      tile<kRows, kColumns, kStart, kGuarded, kUnitDepth>(m, n, depth, besides);
    }
    constexpr int kNext = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows / 2;
    if constexpr (kNext > 0) {
      column<kNext, kColumns, kStart, kGuarded, kUnitDepth>(m, rows, n, depth, besides);
    }
  }

  /// columns is a multiple of the lanes. Exactly one of A's strides is 1. besides: Nothing, Between or
  /// More.
  template <Start kStart, bool kGuarded, bool kUnitDepth, class Besides = Nothing>
  void run_as(int64_t rows, int64_t columns, int64_t depth, const Besides& besides = {}) const {
#if defined(LONGSPAN_AMX)
    if constexpr (Dot::kDepth == 2 && !kGuarded && !Besides::kMore) {
      const int64_t m = rows / 16 * 16, k = depth / 16 * 16;
      if (m != 0 && k != 0) {
        if constexpr (kStart == Start::kRescale || kStart == Start::kRescaleRows) {
          scale<kStart>(m, columns);
        }
        const int64_t group = a_group ? a_group : 16 * a_depth;
        AmxProduct{a, a_row, a_depth, group, b, ldb, c, ldc}.run(kStart == Start::kZero, m, columns, k);
        if (k < depth) {
          Product rest = *this;
          rest.a += k / 16 * group, rest.b += k * ldb;
          rest.template run_in_vectors<Start::kAccumulate, false, kUnitDepth>(m, columns, depth - k);
        }
        if (m == rows) return;
        Product rest = *this;
        rest.a += m * a_row, rest.c += m * ldc;
        if (kStart == Start::kRescaleRows) rest.rescale += m;
        return rest.template run_in_vectors<kStart, false, kUnitDepth>(rows - m, columns, depth);
      }
    }
#endif
    run_in_vectors<kStart, kGuarded, kUnitDepth>(rows, columns, depth, besides);
  }

  template <Start kStart>
  LS_INLINE void scale(int64_t rows, int64_t columns) const {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t n = 0; n < columns; n += kLanes<Sum>) {
        Sum* at = c + m * ldc + n;
        store(at, load(at) * (kStart == Start::kRescale ? load(rescale + n) : broadcast(rescale[m])));
      }
    }
  }

  template <Start kStart, bool kGuarded, bool kUnitDepth, class Besides = Nothing>
  LS_INLINE void run_in_vectors(int64_t rows, int64_t columns, int64_t depth,
                                const Besides& besides = {}) const {
    constexpr int L = kLanes<Sum>;
    if constexpr (kUnitDepth && Dot::kDepth == 2 && !Besides::kMore) {
      if (a_group != 0) return run_in_groups<kStart, kGuarded, kUnitDepth>(rows, columns, depth);
    }
    const auto side = [&]<int kColumns>(int64_t n) {
      column<kRowsOfTile<kColumns>, kColumns, kStart, kGuarded, kUnitDepth>(0, rows, n, depth, besides);
    };
    int64_t n = 0;
    for (; n + kTileColumns * L <= columns; n += kTileColumns * L) {
      side.template operator()<kTileColumns>(n);
    }
    if constexpr (kTileColumns > 2) {
      for (; n + 2 * L <= columns; n += 2 * L) side.template operator()<2>(n);
    }
    for (; n < columns; n += L) side.template operator()<1>(n);
  }

  template <Start kStart, bool kGuarded, bool kUnitDepth>
  void run_in_groups(int64_t rows, int64_t columns, int64_t depth) const {
    Product one = *this;
    one.a_group = 0;
    one.template run_in_vectors<kStart, kGuarded, kUnitDepth>(rows, columns, min_of<int64_t>(depth, 16));
    for (int64_t k = 16; k < depth; k += 16) {
      one.a += a_group, one.b += 16 * ldb;
      one.template run_in_vectors<Start::kAccumulate, kGuarded, kUnitDepth>(
          rows, columns, min_of<int64_t>(depth - k, 16));
    }
  }

  template <Start kStart, bool kGuarded = false>
  LS_INLINE void run(int64_t rows, int64_t columns, int64_t depth) const {
    if (a_depth == 1) {
      run_as<kStart, kGuarded, true>(rows, columns, depth);
    } else {
      run_as<kStart, kGuarded, false>(rows, columns, depth);
    }
  }
};

}  // namespace longspan::LONGSPAN_ISA
