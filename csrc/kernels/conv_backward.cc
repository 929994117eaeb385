// Causal depthwise convolution, backward. Per block of time (conv_tile.h), with past = width - 1:
//
//   g[t]         = d_out[t] * activation'(pre[t])      t in [0, n + past); pre is calculated again
//   dx[t]        = sum over k of weight[k] * g[t + past - k]       t in [-past, n)
//   d_weight[k] += sum over t of g[t] * x[t - past + k]            t in [0, n)
//
// dx before the first token is the gradient of the initial state. Each block leaves its share of
// d_weight and d_bias, and shares are added in order of time.

#include "kernels/conv_tile.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

template <class T, Lanes kAlong, int kWidth>
class Backward {
  using Tiles = ConvTiles<T, kAlong>;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kRow = Tiles::kRow;

 public:
  Backward(const ConvParams& p, const ConvGradients& g) : p_(p), g_(g), tiles_(p) {}

  void run() {
    const int64_t tasks = tiles_.tasks();
    const int threads = threads_for(tasks, p_.threads);
    Arena measure;
    lay_out(measure);
    Scratch scratch(measure.used() * threads);
    const int64_t share = p_.channels * (p_.width + 1);
    const int64_t blocks = p_.batch * tiles_.time_blocks;
    Scratch sums(blocks * share * int64_t(sizeof(T)));
    T* shares = reinterpret_cast<T*>(sums.at(0));
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      const ConvBlock b = tiles_.block(task);
      run_block(b, shares + (b.batch * tiles_.time_blocks + b.index) * share, lay_out(arena));
    });
    T *d_weight = static_cast<T*>(g_.d_weight), *d_bias = static_cast<T*>(g_.d_bias);
    constexpr int64_t kChannelsPerTask = 256;
    parallel_for(ceil_div(p_.channels, kChannelsPerTask), threads, [&](int64_t task, int) {
      const int64_t last = min_of((task + 1) * kChannelsPerTask, p_.channels);
      for (int64_t c = task * kChannelsPerTask; c < last; ++c) {
        for (int64_t k = 0; k <= p_.width; ++k) {
          T sum = 0;
          for (int64_t i = 0; i < blocks; ++i) sum += shares[i * share + c * (p_.width + 1) + k];
          if (k < p_.width) {
            d_weight[c * p_.width + k] = sum;
          } else if (d_bias) {
            d_bias[c] = sum;
          }
        }
      }
    });
  }

 private:
  struct Workspace {
    T *x, *g, *dx, *weights;
    T* sums;  ///< [kRow] lanes, along channels
    IntOf<T>* sequences;
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.x = tiles_.take_tile(arena);
    w.g = tiles_.take_tile(arena);
    w.dx = tiles_.take_tile(arena);
    w.weights = arena.take<T>((p_.width + 1) * kRow);
    w.sums = arena.take<T>((p_.width + 1) * kRow);
    w.sequences = arena.take<IntOf<T>>(p_.seq_idx ? tiles_.tile_size : 0);
    return w;
  }

  void run_block(const ConvBlock& b, T* share, const Workspace& w) const {
    if (p_.seq_idx) tiles_.load_sequences(b, w.sequences);
    const int64_t tiles = Tiles::kAlongTime ? b.channels : 1;
    for (int64_t i = 0; i < tiles; ++i) run_tile(b, b.c0 + i, share, w);
  }

  void run_tile(const ConvBlock& b, int64_t channel, T* share, const Workspace& w) const {
    const int64_t past = tiles_.past;
    tiles_.load_weights(b, channel, w.weights);
    tiles_.load_tile(p_.x, p_.initial, b, channel, w.x);
    tiles_.load_tile(g_.d_out, nullptr, b, channel, w.g);
    // Positions before the block have gradients of their own blocks; only its own initial state's
    // taps are wanted, and those meet nothing earlier.
    for (int64_t i = 0; i < past * kRow; ++i) w.g[i] = T(0);
    const int64_t rows = Tiles::kAlongTime ? 1 : b.n, lanes = Tiles::kAlongTime ? b.n : b.channels;
    const int64_t rows_after = Tiles::kAlongTime ? 1 : b.n + past;
    const int64_t lanes_after = Tiles::kAlongTime ? b.n + past : b.channels;
    const IntOf<T>* sequences = p_.seq_idx ? w.sequences : nullptr;
    if (p_.silu) {
      for (int64_t i = 0; i < rows_after; ++i) {
        for (int64_t lane = 0; lane < lanes_after; lane += L) {
          T* at = w.g + (past + i) * kRow + lane;
          const Vec<T> pre = tiles_.template convolve<kWidth>(w.x, w.weights, sequences, past + i, lane);
          const Vec<T> s = sigmoid<T>(pre);
          store(at, load(at) * s * (T(1) + pre * (T(1) - s)));
        }
      }
    }
    const int64_t before = b.t0 == 0 ? past : 0;
    if constexpr (Tiles::kAlongTime) {
      const char *x = tiles_.ahead(p_.x, b, channel), *d_out = tiles_.ahead(g_.d_out, b, channel);
      const int64_t size = size_of(p_.dtype);
      for (int64_t lane = -before; lane < b.n; lane += L) {
        __builtin_prefetch(x + lane * size);
        __builtin_prefetch(d_out + lane * size);
        input_gradient(w, sequences, past, lane);
      }
    } else {
      for (int64_t i = -before; i < b.n; ++i) {
        for (int64_t lane = 0; lane < b.channels; lane += L)
          input_gradient(w, sequences, past + i, lane);
      }
    }
    if (g_.d_final) add_final(b, channel, w);
    store_input(b, channel, w);

    if constexpr (Tiles::kAlongTime) {  // lanes past the block's end must not count
      for (int64_t i = past + b.n; i < past + round_up(b.n, L); ++i) w.g[i] = T(0);
    }
    const int64_t columns = Tiles::kAlongTime ? L : lanes;
    for (int64_t column = 0; column < columns; column += L) {
      weight_gradient(w, sequences, rows, lanes, column);
    }
    for (int64_t c = 0; c < (Tiles::kAlongTime ? 1 : b.channels); ++c) {
      T* to = share + (channel + c) * (p_.width + 1);
      for (int64_t k = 0; k <= p_.width; ++k) to[k] = w.sums[k * kRow + c];
    }
  }

  LS_INLINE void input_gradient(const Workspace& w, const IntOf<T>* sequences, int64_t at,
                                int64_t lane) const {
    const int64_t width = kWidth ? kWidth : p_.width, past = width - 1;
    Vec<T> sum = {};
#pragma GCC unroll 4
    for (int64_t k = 0; k < width; ++k) {
      Vec<T> g = load(w.g + (at + past - k) * kRow + lane);
      if (kWidth == 0 && sequences) {
        g = select<T>(Tiles::together(sequences, at, at + past - k, lane), g, Vec<T>{});
      }
      sum += Tiles::tap(w.weights, k, lane) * g;
    }
    store(w.dx + at * kRow + lane, sum);
  }

  /// Sums over the tile of g times the input of each tap, and of g: along time one number each, along
  /// channels the lanes from `column`.
  LS_INLINE void weight_gradient(const Workspace& w, const IntOf<T>* sequences, int64_t rows,
                                 int64_t lanes, int64_t column) const {
    const int64_t past = tiles_.past;
    const int64_t first = Tiles::kAlongTime ? 0 : column, last = Tiles::kAlongTime ? lanes : column + L;
    const auto keep = [&](int64_t k, Vec<T> sum) {
      if constexpr (Tiles::kAlongTime) {
        w.sums[k] = sum_of_lanes<T>(sum);
      } else {
        store(w.sums + k * kRow + column, sum);
      }
    };
    if constexpr (kWidth != 0) {
      Vec<T> sum[kWidth + 1] = {};
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t lane = first; lane < last; lane += L) {
          const Vec<T> g = load(w.g + (past + i) * kRow + lane);
#pragma GCC unroll 4
          for (int k = 0; k < kWidth; ++k) sum[k] += g * load(w.x + (i + k) * kRow + lane);
          sum[kWidth] += g;
        }
      }
      for (int k = 0; k <= kWidth; ++k) keep(k, sum[k]);
    } else {
      for (int64_t k = 0; k <= p_.width; ++k) {
        Vec<T> sum = {};
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t lane = first; lane < last; lane += L) {
            const Vec<T> g = load(w.g + (past + i) * kRow + lane);
            Vec<T> x = k < p_.width ? load(w.x + (i + k) * kRow + lane) : broadcast(T(1));
            if (sequences && k < p_.width) {
              x = select<T>(Tiles::together(sequences, i + k, past + i, lane), x, Vec<T>{});
            }
            sum += g * x;
          }
        }
        keep(k, sum);
      }
    }
  }

  /// The final state is the last inputs; those before the first token are the initial state's.
  void add_final(const ConvBlock& b, int64_t channel, const Workspace& w) const {
    const int64_t past = tiles_.past;
    const int32_t* seq = p_.seq_idx && p_.length ? p_.seq_idx + b.batch * p_.length : nullptr;
    for (int64_t j = 0; j < past; ++j) {
      const int64_t t = p_.length - past + j, at = t - b.t0;
      if (at >= b.n || at < (b.t0 == 0 ? -past : 0)) continue;
      if (seq && seq[max_of<int64_t>(t, 0)] != seq[p_.length - 1]) continue;
      for (int64_t c = 0; c < (Tiles::kAlongTime ? 1 : b.channels); ++c) {
        const int64_t from = (b.batch * p_.channels + channel + c) * past + j;
        w.dx[(past + at) * kRow + c] += load_as<T>(g_.d_final, p_.dtype, from, 1)[0];
      }
    }
  }

  void store_input(const ConvBlock& b, int64_t channel, const Workspace& w) const {
    const int64_t past = tiles_.past;
    const ConvTensor& dx = g_.dx;
    if constexpr (Tiles::kAlongTime) {
      const int64_t at = b.batch * dx.batch + channel * dx.channel + b.t0;
      const Dtype dtype = p_.dtype;
      void* data = dx.data;
      for (int64_t i = 0; i < b.n; i += L) {
        store_as<T>(data, dtype, at + i, load(w.dx + past + i), b.n - i);
      }
    } else {
      for (int64_t i = 0; i < b.n; ++i) {
        const int64_t at = b.batch * dx.batch + (b.t0 + i) * dx.time + b.c0;
        for (int64_t c = 0; c < b.channels; c += L) {
          store_as<T>(dx.data, p_.dtype, at + c, load(w.dx + (past + i) * kRow + c), b.channels - c);
        }
      }
    }
    if (g_.d_initial == nullptr || b.t0 != 0) return;
    for (int64_t c = 0; c < (Tiles::kAlongTime ? 1 : b.channels); ++c) {
      for (int64_t j = 0; j < past; ++j) {
        const int64_t to = (b.batch * p_.channels + channel + c) * past + j;
        store_as<T>(g_.d_initial, p_.dtype, to, broadcast(w.dx[j * kRow + c]), 1);
      }
    }
  }

  const ConvParams& p_;
  const ConvGradients& g_;
  Tiles tiles_;
};

template <class T>
void backward(const ConvParams& p, const ConvGradients& g) {
  const bool four = p.width == 4 && p.seq_idx == nullptr;
  if (conv_lanes(p) == Lanes::kTime) {
    four ? Backward<T, Lanes::kTime, 4>(p, g).run() : Backward<T, Lanes::kTime, 0>(p, g).run();
  } else {
    four ? Backward<T, Lanes::kChannels, 4>(p, g).run() : Backward<T, Lanes::kChannels, 0>(p, g).run();
  }
}

}  // namespace

void conv_backward(const ConvParams& p, const ConvGradients& g) {
  p.dtype == Dtype::kDouble ? backward<double>(p, g) : backward<float>(p, g);
}

}  // namespace longspan::LONGSPAN_ISA
