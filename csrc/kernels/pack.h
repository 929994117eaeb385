// The forms in which a matrix X of n tokens by d channels enters a Product (tile.h).
//
//   by channel   a row a token, contracted over channels          the A of  K Q^T
//   by token     a row a token (or a pair of them), contracted    the A of  V^T P^T, K^T dS^T
//                over tokens, channels side by side                the B of  P^T dO, dS^T Q
//   transposed   a row a channel (or a pair), tokens along lanes   the B of  K Q^T, V dO^T
//
// Where memory already has the form, nothing is copied. With DotBf16 an element is a pair along
// the contracted dimension; odd ends are filled with zeros.
#pragma once

#include "kernels/tile.h"
#include "simd/convert.h"

namespace longspan::LONGSPAN_ISA {

/// X in memory: channels have stride 1, tokens any.
struct TokenRows {
  const void* data;
  Dtype dtype;
  int64_t stride;  ///< between tokens, in elements

  LS_INLINE TokenRows from(int64_t token) const {
    return {static_cast<const char*>(data) + token * stride * size_of(dtype), dtype, stride};
  }
};

/// Asks for n tokens that will be read soon; n may be 0 or less.
LS_INLINE void prefetch(TokenRows x, int64_t n, int64_t channels) {
  const int64_t bytes = channels * size_of(x.dtype);
  for (int64_t t = 0; t < n; ++t) {
    const char* row = static_cast<const char*>(x.from(t).data);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
  }
}

template <class Dot>
struct Operand {
  const typename Dot::Element* data;
  int64_t stride;
};

template <class Dot>
LS_INLINE bool is_native(Dtype dtype) {
  if constexpr (Dot::kDepth == 2) {
    return dtype == Dtype::kBfloat16;
  } else {
    return sizeof(typename Dot::Element) == 8 ? dtype == Dtype::kDouble : dtype == Dtype::kFloat;
  }
}

/// Lanes of elements along channels: channel (or channel pair) `at` onwards, n of them.
template <class Dot>
LS_INLINE Vec<typename Dot::Element> load_channels(TokenRows x, int64_t token, int64_t at, int64_t n) {
  using E = typename Dot::Element;
  const TokenRows row = x.from(token);
  if constexpr (Dot::kDepth == 2) {
    const E* p = reinterpret_cast<const E*>(static_cast<const uint16_t*>(row.data) + 2 * at);
    return n >= kLanes<E> ? load(p) : load_first(p, n);
  } else {
    return load_as<E>(row.data, row.dtype, at, n);
  }
}

/// by channel. Scratch: n * ceil(channels / depth) elements, used only when a copy is needed.
template <class Dot>
LS_INLINE Operand<Dot> by_channel(TokenRows x, int64_t n, int64_t channels,
                                  typename Dot::Element* scratch) {
  using E = typename Dot::Element;
  if (is_native<Dot>(x.dtype) && x.stride % Dot::kDepth == 0) {
    return {static_cast<const E*>(x.data), x.stride / Dot::kDepth};
  }
  const int64_t width = channels / Dot::kDepth;
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t c = 0; c < width; c += kLanes<E>) {
      const int64_t left = width - c;
      const Vec<E> v = load_channels<Dot>(x, t, c, left);
      left >= kLanes<E> ? store(scratch + t * width + c, v)
                        : store_first(scratch + t * width + c, v, left);
    }
  }
  return {scratch, width};
}

/// by token. Scratch: ceil(n / depth) * round_up(channels, lanes). `padded` asks for rows that may be
/// read up to a whole number of vectors.
template <class Dot>
LS_INLINE Operand<Dot> by_token(TokenRows x, int64_t n, int64_t channels, bool padded,
                                typename Dot::Element* scratch) {
  using E = typename Dot::Element;
  constexpr int L = kLanes<E>;
  if constexpr (Dot::kDepth == 1) {
    if (is_native<Dot>(x.dtype) && (!padded || channels % L == 0)) {
      return {static_cast<const E*>(x.data), x.stride};
    }
  }
  const int64_t width = round_up(channels, L);
  for (int64_t t = 0; t < n; t += Dot::kDepth) {
    E* row = scratch + t / Dot::kDepth * width;
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t left = channels - c;
      if constexpr (Dot::kDepth == 1) {
        store(row + c, load_as<E>(x.from(t).data, x.dtype, c, left));
      } else {
        const uint16_t* lower = static_cast<const uint16_t*>(x.from(t).data) + c;
        Vec<E> pair = __builtin_convertvector(load_half16(lower, left), Vec<E>);
        if (t + 1 < n) {
          const Half16 upper = load_half16(lower + x.stride, left);
          pair |= __builtin_convertvector(upper, Vec<E>) << 16;
        }
        store(row + c, pair);
      }
    }
  }
  return {scratch, width};
}

/// transposed, into out[ceil(channels / depth)][ld]: tokens [0, n) along lanes, zeros up to a whole
/// number of vectors.
template <class Dot>
void transposed(TokenRows x, int64_t n, int64_t channels, typename Dot::Element* out, int64_t ld) {
  using E = typename Dot::Element;
  constexpr int L = kLanes<E>;
  const int64_t rows = ceil_div(channels, Dot::kDepth);
  for (int64_t t = 0; t < n; t += L) {
    for (int64_t c = 0; c < rows; c += L) {
      Vec<E> square[L];
      for (int i = 0; i < L; ++i) {
        square[i] = t + i < n ? load_channels<Dot>(x, t + i, c, rows - c) : Vec<E>{};
      }
      transpose<E>(square);
      const int64_t height = min_of<int64_t>(rows - c, L);
      for (int64_t i = 0; i < height; ++i) store(out + (c + i) * ld + t, square[i]);
    }
  }
}

/// The way back: x[t][c] = scale[t] * in[c][t], from sums with tokens along lanes to rows of dtype.
template <class T>
void store_transposed(const T* in, int64_t ld, int64_t n, int64_t channels, const T* scale, void* out,
                      Dtype dtype, int64_t stride) {
  constexpr int L = kLanes<T>;
  for (int64_t t = 0; t < n; t += L) {
    const Vec<T> factor = load(scale + t);
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t height = min_of<int64_t>(channels - c, L);
      Vec<T> square[L];
      for (int i = 0; i < L; ++i) {
        square[i] = i < height ? load(in + (c + i) * ld + t) * factor : Vec<T>{};
      }
      transpose<T>(square);
      const int64_t width = min_of<int64_t>(n - t, L);
      for (int64_t i = 0; i < width; ++i) {
        store_as<T>(out, dtype, (t + i) * stride + c, square[i], height);
      }
    }
  }
}

/// Whether every element is finite: x * 0 is NaN for infinities and NaN.
template <class Dot>
bool all_finite(Operand<Dot> x, int64_t rows, int64_t columns) {
  using E = typename Dot::Element;
  using T = typename Dot::Sum;
  constexpr int L = kLanes<E>;
  Vec<T> bad = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += L) {
      const E* p = x.data + r * x.stride + c;
      const Vec<E> v = columns - c >= L ? load(p) : load_first(p, columns - c);
      if constexpr (Dot::kDepth == 2) {
        bad += bit_cast<T, E>(v << 16) * T(0);
        bad += bit_cast<T, E>(v & 0xffff0000u) * T(0);
      } else {
        bad += v * T(0);
      }
    }
  }
  return sum_of_lanes<T>(bad) == T(0);
}

}  // namespace longspan::LONGSPAN_ISA
