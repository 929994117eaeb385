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

/// Channels along lanes: 16 of them (in float) are gathered from where they lie, state and inputs,
/// [width - 1 + length] vectors, worked on, and put back.
template <class T>
class Update {
  static constexpr int L = kLanes<T>;

 public:
  Update(const ConvParams& p, const ConvState& s) : p_(p), s_(s), past_(p.width - 1) {}

  void run() {
    // Some thousand channels a task: less is not worth waking a thread for.
    constexpr int64_t kChannelsPerTask = 512;
    const int64_t blocks = ceil_div(p_.channels, kChannelsPerTask), tasks = p_.batch * blocks;
    const int threads = threads_for(tasks, p_.threads);
    const int64_t bytes = round_up((past_ + p_.length) * L * int64_t(sizeof(T)), 64);
    Scratch scratch(bytes * threads);
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      T* window = reinterpret_cast<T*>(scratch.at(bytes * thread));
      const int64_t b = task / blocks, first = task % blocks * kChannelsPerTask;
      const int64_t last = min_of(first + kChannelsPerTask, p_.channels);
      for (int64_t c = first; c < last; c += L) step(b, c, min_of<int64_t>(last - c, L), window);
    });
  }

 private:
  LS_INLINE T get(const ConvTensor& x, int64_t b, int64_t c, int64_t t) const {
    return load_as<T>(x.data, p_.dtype, b * x.batch + c * x.channel + t * x.time, 1)[0];
  }
  LS_INLINE void put(const ConvTensor& x, int64_t b, int64_t c, int64_t t, T value) const {
    store_as<T>(x.data, p_.dtype, b * x.batch + c * x.channel + t * x.time, broadcast(value), 1);
  }

  /// Which slot holds the input `ago` before the first new one (ago < 0: a new one).
  LS_INLINE int64_t slot(int64_t b, int64_t ago) const {
    if (!s_.written) return s_.slots - ago;
    return ((s_.written[b] - ago) % s_.slots + s_.slots) % s_.slots;
  }

  void step(int64_t b, int64_t c0, int64_t n, T* window) const {
    const int64_t row = s_.rows ? s_.rows[b] : b;
    if (row < 0) {
      for (int64_t t = 0; t < p_.length; ++t) {
        for (int64_t i = 0; i < n; ++i) put(p_.out, b, c0 + i, t, T(0));
      }
      return;
    }
    for (int64_t i = 0; i < L; ++i) {
      const int64_t c = c0 + min_of(i, n - 1);
      for (int64_t k = 0; k < past_; ++k) window[k * L + i] = get(s_.state, row, c, slot(b, past_ - k));
      for (int64_t t = 0; t < p_.length; ++t) window[(past_ + t) * L + i] = get(p_.x, b, c, t);
    }
    for (int64_t i = 0; i < n; ++i) remember(b, row, c0 + i, window + i);

    const T* weight = static_cast<const T*>(p_.weight) + c0 * p_.width;
    const T* bias = static_cast<const T*>(p_.bias);
    for (int64_t t = 0; t < p_.length; ++t) {
      Vec<T> y = bias ? load_first(bias + c0, n) : Vec<T>{};
      for (int64_t k = 0; k < p_.width; ++k) {
        Vec<T> factor = {};
        for (int64_t i = 0; i < n; ++i) factor[i] = weight[i * p_.width + k];
        y += factor * load(window + (t + k) * L);
      }
      if (p_.silu) y *= sigmoid<T>(y);
      for (int64_t i = 0; i < n; ++i) put(p_.out, b, c0 + i, t, y[i]);
    }
  }

  /// The newest inputs into the state of one channel, whose window is `inputs`, L apart.
  LS_INLINE void remember(int64_t b, int64_t row, int64_t c, const T* inputs) const {
    if (s_.written) {
      for (int64_t t = max_of<int64_t>(0, p_.length - s_.slots); t < p_.length; ++t) {
        put(s_.state, row, c, slot(b, -t), inputs[(past_ + t) * L]);
      }
      return;
    }
    for (int64_t j = 0; j < s_.slots; ++j) {
      const int64_t t = p_.length - s_.slots + j;  // new input t, or the state's own slot j + length
      const T value = t >= 0 ? inputs[(past_ + t) * L] : get(s_.state, row, c, j + p_.length);
      put(s_.state, row, c, j, value);
    }
  }

  const ConvParams& p_;
  const ConvState& s_;
  int64_t past_;
};

}  // namespace

void conv_forward(const ConvParams& p) {
  p.dtype == Dtype::kDouble ? forward<double>(p) : forward<float>(p);
}

void conv_update(const ConvParams& p, const ConvState& s) {
  p.dtype == Dtype::kDouble ? Update<double>(p, s).run() : Update<float>(p, s).run();
}

}  // namespace longspan::LONGSPAN_ISA
