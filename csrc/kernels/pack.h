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

#if defined(LONGSPAN_BF16_DOT)
typedef uint16_t Half32 __attribute__((vector_size(64)));

/// Vector i of an array of bfloat16 that is kept as pairs.
LS_INLINE void store_bf16(uint32_t* array, int64_t at, Vec<float> x) {
  const __m256i h = __m256i(_mm512_cvtneps_pbh(__m512(x)));
  __builtin_memcpy(reinterpret_cast<uint16_t*>(array) + at, &h, sizeof h);
}

/// (lower, upper) of each lane rounded to bfloat16, lower in the lower half.
LS_INLINE Vec<uint32_t> bf16_pair(Vec<float> lower, Vec<float> upper) {
  // The instruction puts the 16 of `lower` before the 16 of `upper`; this order deals them out.
  static constexpr Half32 kDeal = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = __m512i(_mm512_cvtne2ps_pbh(__m512(upper), __m512(lower)));
  return Vec<uint32_t>(_mm512_permutexvar_epi16(__m512i(kDeal), both));
}
#endif

/// Asks for n tokens that will be read (or written) soon; n may be 0 or less.
template <bool kToWrite = false>
LS_INLINE void prefetch(TokenRows x, int64_t n, int64_t channels) {
  const int64_t bytes = channels * size_of(x.dtype);
  for (int64_t t = 0; t < n; ++t) {
    const char* row = static_cast<const char*>(x.from(t).data);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, kToWrite ? 1 : 0, 2);
  }
}

/// The same a few rows at a time, between the tiles of products (tile.h): memory then answers while they
/// are worked on. A burst waits for itself, as a processor keeps account of so many lines on the way.
class Ahead {
 public:
  explicit LS_INLINE Ahead(int64_t lines) : lines_(lines) {}  ///< so many a call

  /// At most kMost times.
  LS_INLINE void add(TokenRows x, int64_t n, int64_t channels) {
    if (n <= 0) return;
    const int64_t size = size_of(x.dtype);
    parts_[count_++] = {static_cast<const char*>(x.data), x.stride * size, channels * size, n};
  }
  LS_INLINE void operator()() {
    for (int64_t left = lines_; left > 0 && at_ < count_;) left -= ask_row();
  }
  LS_INLINE void ask_all() {
    while (at_ < count_) ask_row();
  }

 private:
  struct Part {
    const char* row;
    int64_t stride, bytes, rows;
  };
  static constexpr int kMost = 6;

  /// -> how many lines.
  LS_INLINE int64_t ask_row() {
    Part& part = parts_[at_];
    for (int64_t i = 0; i < part.bytes; i += 64) __builtin_prefetch(part.row + i, 0, 2);
    part.row += part.stride;
    if (--part.rows == 0) ++at_;
    return ceil_div(part.bytes, 64);
  }

  int64_t lines_;
  Part parts_[kMost];
  int count_ = 0, at_ = 0;
};

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
  // Pairs are read as such: neither rows nor their begin may lie between two.
  const bool aligned = reinterpret_cast<uintptr_t>(x.data) % sizeof(E) == 0;
  if (is_native<Dot>(x.dtype) && aligned && x.stride % Dot::kDepth == 0) {
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
  // Whole squares of rows that have the form stay in registers.
  const bool native = is_native<Dot>(x.dtype);
  for (int64_t t = 0; t < n; t += L) {
    for (int64_t c = 0; c < rows; c += L) {
      Vec<E> square[L];
      if (native && n - t >= L && rows - c >= L) {
        const char* from = static_cast<const char*>(x.from(t).data) + c * int64_t(sizeof(E));
        const int64_t step = x.stride * size_of(x.dtype);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) square[i] = load(reinterpret_cast<const E*>(from + i * step));
        transpose<E>(square);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(out + (c + i) * ld + t, square[i]);
        continue;
      }
      for (int i = 0; i < L; ++i) {
        square[i] = t + i < n ? load_channels<Dot>(x, t + i, c, rows - c) : Vec<E>{};
      }
      transpose<E>(square);
      const int64_t height = min_of<int64_t>(rows - c, L);
      for (int64_t i = 0; i < height; ++i) store(out + (c + i) * ld + t, square[i]);
    }
  }
}

#if defined(LONGSPAN_BF16_DOT)
/// Pairs of 32 tokens, a row a channel: out [channels][16], zeros beyond token n. What contracts over
/// tokens reads it row by row, as tile registers do (tile_amx.h).
LS_INLINE void pairs_by_channel(TokenRows x, int64_t n, int64_t channels, uint32_t* out) {
  for (int64_t c = 0; c < channels; c += 16) {
    const int64_t left = channels - c;
    Vec<float> square[16];
    for (int64_t i = 0; i < 16; ++i) {
      const uint16_t* lower = static_cast<const uint16_t*>(x.from(2 * i).data) + c;
      Vec<uint32_t> pair = {};
      if (2 * i < n) pair = __builtin_convertvector(load_half16(lower, left), Vec<uint32_t>);
      if (2 * i + 1 < n) {
        pair |= __builtin_convertvector(load_half16(lower + x.stride, left), Vec<uint32_t>) << 16;
      }
      square[i] = bit_cast<float, uint32_t>(pair);
    }
    transpose<float>(square);
    for (int64_t i = 0; i < min_of<int64_t>(left, 16); ++i) {
      store(out + (c + i) * 16, bit_cast<uint32_t, float>(square[i]));
    }
  }
}
#endif

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

/// Rows with a unit stride, converted and padded with zeros: out [n][width], scaled a row each where
/// scale is not null.
template <class T>
void copy_rows(TokenRows x, int64_t n, int64_t columns, int64_t width, const T* scale, T* out) {
  constexpr int L = kLanes<T>;
  with_dtype<T>(x.dtype, [&]<Dtype kDtype>() {
    const int64_t whole = columns / L * L;
    for (int64_t t = 0; t < n; ++t) {
      const Vec<T> factor = broadcast(scale ? scale[t] : T(1));
      const void* row = x.from(t).data;
      T* to = out + t * width;
      for (int64_t c = 0; c < whole; c += L) store(to + c, load_as<T>(row, kDtype, c) * factor);
      for (int64_t c = whole; c < width; c += L) {
        store(to + c, load_as<T>(row, kDtype, c, max_of<int64_t>(columns - c, 0)) * factor);
      }
    }
  });
}

/// The way back, to rows of dtype, scaled a row each where scale is not null.
template <class T>
void store_rows(const T* in, int64_t width, int64_t n, int64_t columns, const T* scale, TokenRows x) {
  constexpr int L = kLanes<T>;
  with_dtype<T>(x.dtype, [&]<Dtype kDtype>() {
    const int64_t whole = columns / L * L;
    for (int64_t t = 0; t < n; ++t) {
      const Vec<T> f = broadcast(scale ? scale[t] : T(1));
      void* row = const_cast<void*>(x.from(t).data);
      for (int64_t c = 0; c < whole; c += L) store_as<T>(row, kDtype, c, load(in + t * width + c) * f);
      if (whole < columns) {
        store_as<T>(row, kDtype, whole, load(in + t * width + whole) * f, columns - whole);
      }
    }
  });
}

/// Element number `at`, counted in scalars, of an array whose elements may be pairs.
template <class Dot>
LS_INLINE void store_scalars(typename Dot::Element* array, int64_t at, Vec<typename Dot::Sum> x) {
  if constexpr (Dot::kDepth == 1) {
    store(array + at, x);
  } else {
    store_bf16(array, at, x);
  }
}

/// By channel, into rows of `ld` elements, scaled a row each where scale is not null. The rest of a
/// row's last vector is overwritten.
template <class Dot>
void copy_by_channel(TokenRows x, int64_t n, int64_t channels, const typename Dot::Sum* scale,
                     typename Dot::Element* out, int64_t ld) {
  using T = typename Dot::Sum;
  constexpr int L = kLanes<T>;
  with_dtype<T>(x.dtype, [&]<Dtype kDtype>() {
    for (int64_t t = 0; t < n; ++t) {
      const Vec<T> factor = broadcast(scale ? scale[t] : T(1));
      const void* row = x.from(t).data;
      for (int64_t c = 0; c < channels; c += L) {
        store_scalars<Dot>(out + t * ld, c, load_as<T>(row, kDtype, c, channels - c) * factor);
      }
    }
  });
}

/// By token, into rows of `width` elements with zeros up to it, scaled a row each where scale is not
/// null.
template <class Dot>
void copy_by_token(TokenRows x, int64_t n, int64_t channels, const typename Dot::Sum* scale,
                   typename Dot::Element* out, int64_t width) {
  using T = typename Dot::Sum;
  if constexpr (Dot::kDepth == 1) {
    copy_rows<T>(x, n, channels, width, scale, out);
  } else {
    with_dtype<T>(x.dtype, [&]<Dtype kDtype>() {
      for (int64_t t = 0; t < n; t += 2) {
        const bool odd = t + 1 == n;
        const Vec<T> even_factor = broadcast(scale ? scale[t] : T(1));
        const Vec<T> odd_factor = broadcast(scale && !odd ? scale[t + 1] : T(1));
        for (int64_t c = 0; c < width; c += kLanes<T>) {
          const int64_t left = max_of<int64_t>(channels - c, 0);
          const Vec<T> lower = load_as<T>(x.from(t).data, kDtype, c, left) * even_factor;
          const Vec<T> upper =
              odd ? Vec<T>{} : load_as<T>(x.from(t + 1).data, kDtype, c, left) * odd_factor;
          store(out + t / 2 * width + c, bf16_pair(lower, upper));
        }
      }
    });
  }
}

/// Whether every element is finite: x * 0 is NaN for infinities and NaN.
template <class Dot>
bool all_finite(Operand<Dot> x, int64_t rows, int64_t columns) {
  using E = typename Dot::Element;
  using T = typename Dot::Sum;
  constexpr int L = kLanes<E>;
  constexpr int64_t kRows = 4;  // sums of their own, which need not wait for each other
  Vec<T> bad[kRows] = {};
  for (int64_t r = 0; r < rows; r += kRows) {
    for (int64_t c = 0; c < columns; c += L) {
      const int64_t left = columns - c;
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) {
        if (r + i >= rows) break;
        const E* p = x.data + (r + i) * x.stride + c;
        const Vec<E> v = left >= L ? load(p) : load_first(p, left);
        if constexpr (Dot::kDepth == 2) {
          bad[i] += bit_cast<T, E>(v << 16) * T(0) + bit_cast<T, E>(v & 0xffff0000u) * T(0);
        } else {
          bad[i] += v * T(0);
        }
      }
    }
  }
  return sum_of_lanes<T>(bad[0] + bad[1] + bad[2] + bad[3]) == T(0);
}

}  // namespace longspan::LONGSPAN_ISA
