// A block of the input of a causal convolution, converted to the type of accumulation, with the
// width - 1 inputs before it and after it:
//
//     position      -(width-1) ...  -1 | 0  ...  n-1 | n ... n+(width-1)-1
//                     before the block |             | after it
//
// Lanes go along whichever of time and channels has stride 1 in memory. Along time a tile is one
// channel, [positions], and neighbouring taps are 1 apart; along channels it is
// [positions][kConvChannels], and taps are a row apart. What lies before the first token comes from the
// initial state, what lies past the last is zero.
#pragma once

#include "kernels/conv.h"
#include "kernels/parallel.h"
#include "simd/convert.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {

inline constexpr int64_t kConvChannels = 128;  ///< a row of a tile along channels

enum class Lanes { kTime, kChannels };

LS_INLINE Lanes conv_lanes(const ConvParams& p) {
  return p.x.time == 1 || p.length <= 1 ? Lanes::kTime : Lanes::kChannels;
}

/// What one task works on. Constants and shapes decide it, never the number of threads.
struct ConvBlock {
  int64_t batch, index;    ///< index: which block of time
  int64_t t0, n;           ///< tokens [t0, t0 + n)
  int64_t c0, channels;    ///< channels [c0, c0 + channels)
};

template <class T, Lanes kLanesAlong>
struct ConvTiles {
  static constexpr bool kAlongTime = kLanesAlong == Lanes::kTime;
  // Along time 8 KB a channel, along channels 32 KB: tile and results stay in the first caches.
  static constexpr int64_t kTokens = kAlongTime ? 2048 : 64;
  static constexpr int64_t kChannels = kAlongTime ? 16 : kConvChannels;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kRow = kAlongTime ? 1 : kConvChannels;  ///< between positions

  const ConvParams& p;
  int64_t past;                            ///< width - 1
  int64_t time_blocks, channel_blocks, tile_size;

  explicit ConvTiles(const ConvParams& params) : p(params), past(params.width - 1) {
    time_blocks = max_of<int64_t>(1, ceil_div(p.length, kTokens));
    channel_blocks = ceil_div(p.channels, kChannels);
    const int64_t positions = min_of(kTokens, p.length) + 2 * past;
    tile_size = kAlongTime ? round_up(positions, L) + 2 * L : positions * kRow;
  }

  /// Room for a tile. Along time it begins so that position 0 is at the start of a cache line: most
  /// vectors, all stores among them, then lie in one.
  T* take_tile(Arena& arena) const {
    const int64_t lead = kAlongTime ? (L - past % L) % L : 0;
    return arena.take<T>(lead + tile_size) + lead;
  }

  int64_t tasks() const { return p.batch * time_blocks * channel_blocks; }

  ConvBlock block(int64_t task) const {
    ConvBlock b;
    b.c0 = task % channel_blocks * kChannels;
    b.channels = min_of(kChannels, p.channels - b.c0);
    b.index = task / channel_blocks % time_blocks;
    b.batch = task / channel_blocks / time_blocks;
    b.t0 = b.index * kTokens;
    b.n = min_of(kTokens, p.length - b.t0);
    return b;
  }

  /// The tile of x; channel only counts along time.
  void load_tile(const ConvTensor& x, const void* before, const ConvBlock& b, int64_t channel,
                 T* tile) const {
    const int64_t begin = b.t0 - past, end = min_of(p.length, b.t0 + b.n + past);
    const Dtype dtype = p.dtype;  // a copy: stores might change p, for all that the compiler knows
    for (int64_t t = begin; t < 0; ++t) {
      for (int64_t c = 0; c < (kAlongTime ? 1 : b.channels); ++c) {
        const int64_t row = b.batch * p.channels + (kAlongTime ? channel : b.c0 + c);
        const int64_t at = row * past + past + t;
        tile[(t - begin) * kRow + c] = before ? load_as<T>(before, p.dtype, at, 1)[0] : T(0);
      }
    }
    const int64_t first = max_of<int64_t>(begin, 0);
    if constexpr (kAlongTime) {
      const int64_t at = b.batch * x.batch + channel * x.channel + first;
      T* out = tile + first - begin;
      int64_t i = 0;
      for (; i + L <= end - first; i += L) store(out + i, load_as<T>(x.data, dtype, at + i));
      for (; i < end - first; i += L) store(out + i, load_as<T>(x.data, dtype, at + i, end - first - i));
      for (T* rest = out + max_of<int64_t>(i, 0); rest < tile + tile_size; ++rest) *rest = T(0);
    } else {
      for (int64_t t = first; t < b.t0 + b.n + past; ++t) {
        const int64_t at = b.batch * x.batch + t * x.time + b.c0;
        T* row = tile + (t - begin) * kRow;
        for (int64_t c = 0; c < b.channels; c += L) {
          store(row + c, t < end ? load_as<T>(x.data, dtype, at + c, b.channels - c) : Vec<T>{});
        }
      }
    }
  }

  /// Where the next channel's tile of x lies in memory, to be prefetched while this one is worked on:
  /// one channel's block is too short for the processor to see it coming.
  const char* ahead(const ConvTensor& x, const ConvBlock& b, int64_t channel) const {
    const int64_t at = b.batch * x.batch + (channel + 1) * x.channel + b.t0;
    return static_cast<const char*>(x.data) + at * size_of(p.dtype);
  }

  /// Sequence of each position. Along time a lane each, in the integers that compare with T.
  void load_sequences(const ConvBlock& b, IntOf<T>* out) const {
    const int32_t* row = p.seq_idx + b.batch * p.length;
    const int64_t size = kAlongTime ? tile_size : tile_size / kRow;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t t = b.t0 - past + i;
      out[i] = p.length == 0 ? 0 : row[min_of(max_of<int64_t>(t, 0), p.length - 1)];
    }
  }

  /// Weights as taps are read: [width], or [width][kConvChannels]. With bias behind them.
  void load_weights(const ConvBlock& b, int64_t channel, T* out) const {
    const T* weight = static_cast<const T*>(p.weight);
    const T* bias = static_cast<const T*>(p.bias);
    const int64_t count = kAlongTime ? 1 : b.channels;
    for (int64_t c = 0; c < (kAlongTime ? 1 : kRow); ++c) {
      const int64_t from = kAlongTime ? channel : b.c0 + c;
      for (int64_t k = 0; k < p.width; ++k) {
        out[k * kRow + c] = c < count ? weight[from * p.width + k] : T(0);
      }
      out[p.width * kRow + c] = c < count && bias ? bias[from] : T(0);
    }
  }

  /// Weight of tap k (the bias for k = width) for the lanes from `lane`.
  static LS_INLINE Vec<T> tap(const T* weights, int64_t k, int64_t lane) {
    if constexpr (kAlongTime) {
      return broadcast(weights[k]);
    } else {
      return load(weights + k * kRow + lane);
    }
  }

  /// Lanes in which positions i and j, both seen from `lane`, are of one sequence.
  static LS_INLINE Vec<IntOf<T>> together(const IntOf<T>* sequences, int64_t i, int64_t j,
                                          int64_t lane) {
    if constexpr (kAlongTime) {
      return load(sequences + i + lane) == load(sequences + j + lane);
    } else {
      return Vec<IntOf<T>>{} - IntOf<T>(sequences[i] == sequences[j] ? 1 : 0);
    }
  }

  /// Convolution at position `at` (counted from the tile's first) and the lanes from `lane`. kWidth 0:
  /// any width, and sequences where not null.
  template <int kWidth>
  LS_INLINE Vec<T> convolve(const T* tile, const T* weights, const IntOf<T>* sequences, int64_t at,
                            int64_t lane) const {
    const int64_t width = kWidth ? kWidth : p.width;
    Vec<T> sum = tap(weights, width, lane);
#pragma GCC unroll 4
    for (int64_t k = 0; k < width; ++k) {
      Vec<T> x = load(tile + (at - (width - 1) + k) * kRow + lane);
      if (kWidth == 0 && sequences) {
        x = select<T>(together(sequences, at - past + k, at, lane), x, Vec<T>{});
      }
      sum += tap(weights, k, lane) * x;
    }
    return sum;
  }
};

}  // namespace longspan::LONGSPAN_ISA
