// AMX: products of bfloat16 pairs in tile registers of 16 rows of 64 bytes, 16 x 16 sums by 16 pairs of
// depth an instruction (tdpbf16ps): eight times what vdpbf16ps does.
//
//             B0   B1       C, 32 x 32 floats at a time, stays in four tiles for a block of depth. B's
//        A0   C00  C01      rows of pairs are what the instruction wants. So are A's where a row's
//        A1   C10  C11      pairs are adjacent; else blocks of 16 x 16 are turned on the way.
//
// Tile registers are a thread's own, hold nothing but what is set up, and slow down switches between
// threads while they do: a scope that multiplies has a TileUnit. Without AMX it is nothing.
#pragma once

#include "simd/simd.h"

namespace longspan::LONGSPAN_ISA {

#if defined(LONGSPAN_AMX)

/// What ldtilecfg reads. A constant: the compiler knows of its first 8 bytes only that they are read.
struct alignas(64) TileLayout {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileLayout) == 64);
constexpr TileLayout kTileLayout;

class TileUnit {
 public:
  LS_INLINE TileUnit() { _tile_loadconfig(&kTileLayout); }
  LS_INLINE ~TileUnit() { _tile_release(); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

/// C (+)= A B for whole tiles: rows, columns and depth (in pairs) are multiples of 16. Strides are in
/// elements; exactly one of A's is 1. Groups of 16 of A's depth lie a_group apart.
class AmxProduct {
 public:
  const uint32_t* a;
  int64_t a_row, a_depth, a_group;
  const uint32_t* b;
  int64_t ldb;
  float* c;
  int64_t ldc;

  void run(bool from_zero, int64_t rows, int64_t columns, int64_t depth) const {
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t steps = min_of(kDepth, depth - k) / 16;
      const bool zero = from_zero && k == 0;
      int64_t m = 0;
      for (; m + 32 <= rows; m += 32) strip<2>(zero, m, k, steps, columns);
      if (m < rows) strip<1>(zero, m, k, steps, columns);
    }
  }

 private:
  static constexpr int64_t kDepth = 64;  ///< pairs of depth before C goes back to memory

  template <int kRowTiles>
  LS_INLINE void strip(bool zero, int64_t m, int64_t k, int64_t steps, int64_t columns) const {
    alignas(64) uint32_t turned[kRowTiles * 16 * kDepth];
    const uint32_t* const first = a + m * a_row + k / 16 * a_group;
    const uint32_t* rows[2] = {first, first + 16 * a_row};
    int64_t stride = a_row, group = a_group;
    if (a_depth != 1) {
      for (int i = 0; i < kRowTiles; ++i) {
        for (int64_t s = 0; s < steps; ++s)
          turn(rows[i] + s * a_group, turned + i * 16 * kDepth + s * 16);
        rows[i] = turned + i * 16 * kDepth;
      }
      stride = kDepth;
      group = 16;
    }
    // The compiler does not know that tile loads read memory.
    asm volatile("" ::: "memory");
    const uint32_t* from = b + k * ldb;
    int64_t n = 0;
    for (; n + 32 <= columns; n += 32)
      block<kRowTiles, 2>(zero, rows, stride, group, from + n, steps, m, n);
    if (n < columns) block<kRowTiles, 1>(zero, rows, stride, group, from + n, steps, m, n);
  }

  /// 16 rows of A from where they are columns, to rows kDepth apart.
  LS_INLINE void turn(const uint32_t* columns, uint32_t* rows) const {
    Vec<float> x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = bit_cast<float, uint32_t>(load(columns + i * a_depth));
    transpose<float>(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(rows + i * kDepth, bit_cast<uint32_t, float>(x[i]));
  }

  template <int kRowTiles, int kColumnTiles>
  LS_INLINE void block(bool zero, const uint32_t* const (&rows)[2], int64_t stride, int64_t group,
                       const uint32_t* from, int64_t steps, int64_t m, int64_t n) const {
    float* const to = c + m * ldc + n;
    const int64_t c_bytes = ldc * 4, a_bytes = stride * 4, b_bytes = ldb * 4;
    if (zero) {
      _tile_zero(0);
      if constexpr (kColumnTiles == 2) _tile_zero(1);
      if constexpr (kRowTiles == 2) _tile_zero(2);
      if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_zero(3);
    } else {
      _tile_loadd(0, to, c_bytes);
      if constexpr (kColumnTiles == 2) _tile_loadd(1, to + 16, c_bytes);
      if constexpr (kRowTiles == 2) _tile_loadd(2, to + 16 * ldc, c_bytes);
      if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_loadd(3, to + 16 * ldc + 16, c_bytes);
    }
    for (int64_t s = 0; s < steps; ++s) {
      _tile_loadd(6, from + s * 16 * ldb, b_bytes);
      _tile_loadd(4, rows[0] + s * group, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kRowTiles == 2) {
        _tile_loadd(5, rows[1] + s * group, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kColumnTiles == 2) {
        _tile_loadd(7, from + s * 16 * ldb + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kRowTiles == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, to, c_bytes);
    if constexpr (kColumnTiles == 2) _tile_stored(1, to + 16, c_bytes);
    if constexpr (kRowTiles == 2) _tile_stored(2, to + 16 * ldc, c_bytes);
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_stored(3, to + 16 * ldc + 16, c_bytes);
  }
};

#else

class TileUnit {};

#endif

}  // namespace longspan::LONGSPAN_ISA
