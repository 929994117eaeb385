// Causal depthwise convolution, forward and decoding. A task is a block of time of some channels: one
// tile after the other is read into the cache and written out, so that memory is read once and
// written once; a width of 4 costs 4 multiply-adds an element and an activation one exponential,
// which is less than moving it takes.

#include "kernels/conv_tile.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

template <class T, Lanes kAlong, int kWidth>
class Forward {
  using Tiles = ConvTiles<T, kAlong>;
  static constexpr int L = kLanes<T>;

 public:
  explicit Forward(const ConvParams& p) : p_(p), tiles_(p) {}

  void run() {
    const int64_t tasks = tiles_.tasks();
    const int threads = threads_for(tasks, p_.threads);
    Arena measure;
    lay_out(measure);
    Scratch scratch(measure.used() * threads);
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      run_block(tiles_.block(task), lay_out(arena));
    });
    if (p_.final) {
      parallel_for(p_.batch, p_.threads, [&](int64_t b, int) { write_final(b); });
    }
  }

 private:
  struct Workspace {
    T *tile, *weights;
    IntOf<T>* sequences;
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.tile = tiles_.take_tile(arena);
    w.weights = arena.take<T>((p_.width + 1) * Tiles::kRow);
    w.sequences = arena.take<IntOf<T>>(p_.seq_idx ? tiles_.tile_size : 0);
    return w;
  }

  void run_block(const ConvBlock& b, const Workspace& w) const {
    if (p_.seq_idx) tiles_.load_sequences(b, w.sequences);
    if constexpr (Tiles::kAlongTime) {
      for (int64_t c = b.c0; c < b.c0 + b.channels; ++c) {
        tiles_.load_weights(b, c, w.weights);
        tiles_.load_tile(p_.x, p_.initial, b, c, w.tile);
        const int64_t out = b.batch * p_.out.batch + c * p_.out.channel + b.t0;
        run_row(w, 0, b.n, out, tiles_.ahead(p_.x, b, c));
      }
    } else {
      tiles_.load_weights(b, 0, w.weights);
      tiles_.load_tile(p_.x, p_.initial, b, 0, w.tile);
      for (int64_t i = 0; i < b.n; ++i) {
        const int64_t out = b.batch * p_.out.batch + (b.t0 + i) * p_.out.time + b.c0;
        run_row(w, i, b.channels, out, nullptr);
      }
    }
  }

  LS_INLINE void run_row(const Workspace& w, int64_t i, int64_t n, int64_t out,
                         const char* ahead) const {
    // Copies: stores might change the parameters, for all that the compiler knows.
    const IntOf<T>* sequences = p_.seq_idx ? w.sequences : nullptr;
    const T *tile = w.tile, *weights = w.weights;
    const Dtype dtype = p_.dtype;
    const bool silu = p_.silu;
    void* data = p_.out.data;
    const int64_t at = tiles_.past + i;
    const int64_t size = size_of(dtype);
    for (int64_t lane = 0; lane < n; lane += L) {
      if constexpr (Tiles::kAlongTime) __builtin_prefetch(ahead + lane * size);
      Vec<T> y = tiles_.template convolve<kWidth>(tile, weights, sequences, at, lane);
      if (silu) y *= sigmoid<T>(y);
      store_as<T>(data, dtype, out + lane, y, n - lane);
    }
  }

  /// The last width - 1 inputs of the last token's sequence.
  void write_final(int64_t b) const {
    const int64_t past = tiles_.past, length = p_.length;
    const int32_t* seq = p_.seq_idx && length ? p_.seq_idx + b * length : nullptr;
    for (int64_t c = 0; c < p_.channels; ++c) {
      const int64_t row = (b * p_.channels + c) * past;
      for (int64_t j = 0; j < past; ++j) {
        const int64_t t = length - past + j;
        Vec<T> x = {};
        if (seq && seq[max_of<int64_t>(t, 0)] != seq[length - 1]) {
          // another sequence's
        } else if (t >= 0) {
          const int64_t at = b * p_.x.batch + c * p_.x.channel + t * p_.x.time;
          x = load_as<T>(p_.x.data, p_.dtype, at, 1);
        } else if (p_.initial) {
          x = load_as<T>(p_.initial, p_.dtype, row + past + t, 1);
        }
        store_as<T>(p_.final, p_.dtype, row + j, x, 1);
      }
    }
  }

  const ConvParams& p_;
  Tiles tiles_;
};

template <class T>
void forward(const ConvParams& p) {
  const bool four = p.width == 4 && p.seq_idx == nullptr;
  if (conv_lanes(p) == Lanes::kTime) {
    four ? Forward<T, Lanes::kTime, 4>(p).run() : Forward<T, Lanes::kTime, 0>(p).run();
  } else {
    four ? Forward<T, Lanes::kChannels, 4>(p).run() : Forward<T, Lanes::kChannels, 0>(p).run();
  }
}

/// Four vectors, taken as one list of 4 L numbers, whose halves are interleaved. Each time turns the
/// bits of a number's place in the list to the left by one: log2(L) times take [L][4] to [4][L], and two
/// times take it back.
template <class T>
LS_INLINE void interleave_halves(Vec<T> (&v)[4]) {
  const Vec<T> a = v[0], b = v[1];
  v[0] = interleave_low<T>(a, v[2]), v[1] = interleave_high<T>(a, v[2]);
  v[2] = interleave_low<T>(b, v[3]), v[3] = interleave_high<T>(b, v[3]);
}

template <class T>
LS_INLINE void columns_of_fours(Vec<T> (&v)[4]) {
#pragma GCC unroll 5
  for (int lanes = 1; lanes < kLanes<T>; lanes *= 2) interleave_halves<T>(v);
}

/// Channels along lanes. Of a vector's width of them a window is made, [slots + length] vectors with the
/// oldest input first, from which outputs are calculated and the state is written again. A task is some
/// channels of some sequences, for which their weights are turned once.
template <class T>
class Update {
  static constexpr int L = kLanes<T>;
  // Mostly whole rows: memory is then read in order, which was a third of the time.
  static constexpr int64_t kChannels = 2048, kSequences = 8;
  static constexpr Dtype kWeights = sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat;
  static constexpr int64_t kAhead = 2048;  ///< bytes of state to ask for early

 public:
  Update(const ConvParams& p, const ConvState& s) : p_(p), s_(s) {}

  void run() {
    const int64_t blocks = ceil_div(p_.channels, kChannels);
    const int64_t tasks = ceil_div(p_.batch, kSequences) * blocks;
    const int threads = threads_for(tasks, p_.threads);
    Arena measure;
    lay_out(measure);
    Scratch scratch(measure.used() * threads);
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      const Workspace w = lay_out(arena);
      const int64_t c0 = task % blocks * kChannels, b0 = task / blocks * kSequences;
      const int64_t channels = min_of(kChannels, p_.channels - c0);
      load_weights(c0, channels, w.weights);
      for (int64_t b = b0; b < min_of(b0 + kSequences, p_.batch); ++b) {
        with_dtype<T>(p_.dtype, [&]<Dtype kDtype>() { step<kDtype>(b, c0, channels, w); });
      }
    });
  }

 private:
  struct Workspace {
    T *weights, *window;  ///< weights: [width][kChannels], the bias behind them
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.weights = arena.take<T>((p_.width + 1) * kChannels);
    w.window = arena.take<T>((s_.slots + p_.length) * L);
    return w;
  }

  void load_weights(int64_t c0, int64_t channels, T* out) const {
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t n = min_of<int64_t>(L, channels - c), at = (c0 + c) * p_.width;
      if (p_.width == 4 && n == L) {
        Vec<T> v[4];
        for (int k = 0; k < 4; ++k) v[k] = load_as<T>(p_.weight, kWeights, at + k * L);
        columns_of_fours<T>(v);
        for (int k = 0; k < 4; ++k) store(out + k * kChannels + c, v[k]);
      } else {
        for (int64_t k = 0; k < p_.width; ++k) {
          store(out + k * kChannels + c, load_lanes<T>(p_.weight, kWeights, at + k, p_.width, n));
        }
      }
      const Vec<T> bias = p_.bias ? load_as<T>(p_.bias, kWeights, c0 + c, n) : Vec<T>{};
      store(out + p_.width * kChannels + c, bias);
    }
  }

  template <Dtype kDtype>
  void step(int64_t b, int64_t c0, int64_t channels, const Workspace& w) const {
    const int64_t row = s_.rows ? s_.rows[b] : b;
    int64_t done = 0;
    if (p_.length == 1 && p_.width == 4 && s_.slots == 4 && !s_.written && row >= 0 &&
        p_.x.channel == 1 && p_.out.channel == 1) {
      if (s_.state.time == 1 && s_.state.channel == 4) {
        done = step_dense<kDtype, true>(b, row, c0, channels, w.weights);
      } else if (s_.state.channel == 1) {
        done = step_dense<kDtype, false>(b, row, c0, channels, w.weights);
      }
    }
    for (int64_t i = done; i < channels; i += L) {
      step_lanes<kDtype>(b, row, c0 + i, min_of<int64_t>(L, channels - i), w.weights + i, w.window);
    }
  }

  /// One input and a width of 4 in 4 slots, as Mamba has it, for as many channels as fill vectors:
  /// returns how many. kTurned: the slots of a channel lie side by side, else the channels of a slot.
  template <Dtype kDtype, bool kTurned>
  int64_t step_dense(int64_t b, int64_t row, int64_t c0, int64_t channels, const T* weights) const {
    void *const state = s_.state.data, *const out = p_.out.data;
    const void* const x = p_.x.data;
    const int64_t x_at = b * p_.x.batch + c0, out_at = b * p_.out.batch + c0;
    const int64_t state_at = row * s_.state.batch + c0 * s_.state.channel;
    const int64_t apart = kTurned ? L : s_.state.time;
    const bool silu = p_.silu;
    int64_t i = 0;
    for (; i + L <= channels; i += L) {
      const int64_t at = state_at + i * (kTurned ? 4 : 1);
      Vec<T> v[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int64_t from = at + j * apart;
        __builtin_prefetch(static_cast<char*>(state) + from * size_of(kDtype) + kAhead, 1);
        v[j] = load_as<T>(state, kDtype, from);
      }
      if constexpr (kTurned) columns_of_fours<T>(v);
      v[0] = v[1], v[1] = v[2], v[2] = v[3], v[3] = load_as<T>(x, kDtype, x_at + i);
      Vec<T> y = load(weights + 4 * kChannels + i);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) y += load(weights + k * kChannels + i) * v[k];
      if constexpr (kTurned) {
        interleave_halves<T>(v);
        interleave_halves<T>(v);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store_as<T>(state, kDtype, at + j * apart, v[j]);
      if (silu) y *= sigmoid<T>(y);
      store_as<T>(out, kDtype, out_at + i, y);
    }
    return i;
  }

  /// Any shape and any strides, for n channels.
  template <Dtype kDtype>
  void step_lanes(int64_t b, int64_t row, int64_t c, int64_t n, const T* weights, T* window) const {
    const int64_t length = p_.length, width = p_.width, past = width - 1, slots = s_.slots;
    if (row < 0) {
      for (int64_t t = 0; t < length; ++t) put<kDtype>(p_.out, b, c, t, Vec<T>{}, n);
      return;
    }
    // Where new input t is kept, or that of -t inputs ago: in a ring, or before the new ones' arrival.
    const auto slot = [&](int64_t t) {
      return s_.written ? (s_.written[b] + t + slots) % slots : slots + t;
    };
    for (int64_t t = s_.written ? -past : -slots; t < 0; ++t) {
      store(window + (slots + t) * L, get<kDtype>(s_.state, row, c, slot(t), n));
    }
    for (int64_t t = 0; t < length; ++t) {
      store(window + (slots + t) * L, get<kDtype>(p_.x, b, c, t, n));
    }
    if (s_.written) {
      for (int64_t t = max_of<int64_t>(0, length - slots); t < length; ++t) {
        put<kDtype>(s_.state, row, c, slot(t), load(window + (slots + t) * L), n);
      }
    } else {
      for (int64_t j = 0; j < slots; ++j) {
        put<kDtype>(s_.state, row, c, j, load(window + (length + j) * L), n);
      }
    }
    for (int64_t t = 0; t < length; ++t) {
      const T* seen = window + (slots - past + t) * L;
      Vec<T> y = load(weights + width * kChannels);
      for (int64_t k = 0; k < width; ++k) y += load(weights + k * kChannels) * load(seen + k * L);
      if (p_.silu) y *= sigmoid<T>(y);
      put<kDtype>(p_.out, b, c, t, y, n);
    }
  }

  template <Dtype kDtype>
  static LS_INLINE Vec<T> get(const ConvTensor& x, int64_t b, int64_t c, int64_t t, int64_t n) {
    return load_lanes<T>(x.data, kDtype, b * x.batch + c * x.channel + t * x.time, x.channel, n);
  }
  template <Dtype kDtype>
  static LS_INLINE void put(const ConvTensor& x, int64_t b, int64_t c, int64_t t, Vec<T> v, int64_t n) {
    store_lanes<T>(x.data, kDtype, b * x.batch + c * x.channel + t * x.time, x.channel, v, n);
  }

  const ConvParams& p_;
  const ConvState& s_;
};

}  // namespace

void conv_forward(const ConvParams& p) {
  p.dtype == Dtype::kDouble ? forward<double>(p) : forward<float>(p);
}

void conv_update(const ConvParams& p, const ConvState& s) {
  p.dtype == Dtype::kDouble ? Update<double>(p, s).run() : Update<float>(p, s).run();
}

}  // namespace longspan::LONGSPAN_ISA
