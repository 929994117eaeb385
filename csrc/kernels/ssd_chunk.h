// One chunk of Mamba-2's scan: at most SsdParams::chunk tokens of a run, one head.
//
// With a_t the sum of dt A over the chunk's tokens up to and with t, and H the state before it,
//
//   M[t][s] = (C_t . B_s) exp(a_t - a_s) dt_s        for s <= t, else 0
//   Y       = M X + exp(a_t) C H                     [tokens][channels]
//   H'      = exp(a_n) H + sum of B_s w_s x_s^T      w_s = exp(a_n - a_s) dt_s
//
// (Dao and Gu 2024, section 6.) States are [states][channels] here, as both products have them:
// channels along lanes. C B^T is the same for all heads of a group and is calculated once.
#pragma once

#include "kernels/decay.h"
#include "kernels/pack.h"
#include "kernels/ssd.h"

namespace longspan::LONGSPAN_ISA {

/// What the time steps of one head do over one chunk. Arrays of a number a token.
template <class T>
struct SsdSteps : Decay<T> {
  T* raw;     ///< dt + dt_bias
  T* dt;      ///< after softplus and clamp
  T* slope;   ///< d dt / d raw
  T* weight;  ///< to_end * dt

  void lay_out(Arena& arena, int64_t tokens) {
    Decay<T>::lay_out(arena, tokens);
    T** const arrays[] = {&raw, &dt, &slope, &weight};
    for (T** array : arrays) *array = arena.take<T>(tokens);
  }

  void prepare(const SsdParams& p, int64_t batch, int64_t head, int64_t t0, int64_t n) {
    constexpr int L = kLanes<T>;
    const T bias = p.dt_bias ? static_cast<const T*>(p.dt_bias)[head] : T(0);
    const int64_t at = batch * p.dt.batch + head * p.dt.head + t0 * p.dt.token;
    for (int64_t t = 0; t < p.chunk; ++t) {
      raw[t] = t < n ? load_as<T>(p.dt.data, p.dt_dtype, at + t * p.dt.token, 1)[0] + bias : T(0);
    }
    const Vec<T> least = broadcast(T(p.dt_min)), most = broadcast(T(p.dt_max));
    for (int64_t t = 0; t < p.chunk; t += L) {
      Vec<T> x = load(raw + t), derivative = broadcast(T(1));
      if (p.softplus) {
        derivative = sigmoid<T>(x);
        x = softplus<T>(x);
      }
      store(slope + t, select<T>((x < least) | (x > most), Vec<T>{}, derivative));
      x = select<T>(x < least, least, x);
      store(dt + t, select<T>(x > most, most, x));
    }
    const double rate = double(static_cast<const T*>(p.a)[head]) * kLog2e;
    Decay<T>::prepare(n, p.chunk, [&](int64_t t) { return double(dt[t]) * rate; });
    for (int64_t t = 0; t < p.chunk; t += L) {
      store(weight + t, load(this->to_end + t) * load(dt + t));
    }
  }
};

template <class Dot>
class SsdChunk {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;
  static constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat;

 public:
  explicit SsdChunk(const SsdParams& params)
      : p(params), width(round_up(params.channels, L)), state_width(round_up(params.states, L)),
        state_size(params.states * width) {}

  const SsdParams& p;
  int64_t width;        ///< of a row of channels
  int64_t state_width;  ///< of a row of states
  int64_t state_size;   ///< of a state in work

  TokenRows rows(const SequenceTensor& x, int64_t batch, int64_t head, int64_t token) const {
    const int64_t at = batch * x.batch + token * x.token + head * x.head;
    return {static_cast<char*>(x.data) + at * size_of(p.dtype), p.dtype, x.token};
  }
  int64_t group_of(int64_t head) const { return head / (p.heads / p.groups); }

  /// Where C B^T of the chunk that begins at a token lies: [n][p.chunk].
  template <class S>
  S* scores_at(S* scores, int64_t batch, int64_t group, int64_t token) const {
    return scores + ((batch * p.groups + group) * p.length + token) * p.chunk;
  }
  int64_t scores_size() const { return p.batch * p.groups * p.length * p.chunk; }

  T* boundary(int64_t index, int64_t head) const {
    return static_cast<T*>(p.boundaries) + (index * p.heads + head) * p.states * p.channels;
  }

  /// C B^T of every chunk of a span, one group. Scratch: state_width * p.chunk for B^T, and as much
  /// for a copy of C.
  void group_scores(const Span& span, int64_t group, T* scores, T* scratch) const {
    const Run& run = p.runs.runs[span.run];
    const int64_t last = run.end_of(span.index);
    for (int64_t t0 = run.begin_of(span.index); t0 < last; t0 += p.chunk) {
      const int64_t n = min_of(p.chunk, last - t0);
      T* turned = scratch;
      transposed<Dot>(rows(p.b, run.batch, group, t0), n, p.states, turned, p.chunk);
      const Operand<Dot> c =
          by_channel<Dot>(rows(p.c, run.batch, group, t0), n, p.states, scratch + state_width * p.chunk);
      T* out = scores_at(scores, run.batch, group, t0);
      for (int64_t t = 0; t < n; t += kStrip) {
        const int64_t count = min_of(kStrip, n - t);
        Product<Dot>{c.data + t * c.stride, c.stride, 1, turned, p.chunk, out + t * p.chunk, p.chunk}
            .template run_as<Start::kZero, false, true>(count, round_up(t + count, L), p.states);
      }
    }
  }

  /// M from C B^T: lanes are s. Whole vectors up to the diagonal are written, zeros above it.
  void mix(const SsdSteps<T>& s, const T* scores, int64_t n, T* out) const {
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    for (int64_t t = 0; t < n; ++t) {
      const int64_t strip_end = round_up(min_of(t / kStrip * kStrip + kStrip, n), L);
      for (int64_t i = 0; i < strip_end; i += L) {
        Vec<T> m = load(scores + t * p.chunk + i) * s.between(t, i, lane) * load(s.dt + i);
        if (i + L > t) m = select<T>(lane + T(i) <= T(t), m, Vec<T>{});
        store(out + t * p.chunk + i, m);
      }
    }
  }

  /// Y += M X, or Y = M X. A zero of M must not meet an infinite x of the future (tile.h).
  template <Start kStart>
  void add_mixed(const T* m, Operand<Dot> x, int64_t n, T* y) const {
    all_finite<Dot>(x, n, p.channels) ? add_mixed_as<kStart, false>(m, x, n, y)
                                      : add_mixed_as<kStart, true>(m, x, n, y);
  }
  template <Start kStart, bool kGuarded>
  void add_mixed_as(const T* m, Operand<Dot> x, int64_t n, T* y) const {
    for (int64_t t = 0; t < n; t += kStrip) {
      const int64_t count = min_of(kStrip, n - t);
      Product<Dot>{m + t * p.chunk, p.chunk, 1, x.data, x.stride, y + t * width, width}
          .template run_as<kStart, kGuarded, true>(count, width, t + count);
    }
  }

  /// H = decay H + sum over tokens of (weighted B) x^T; `b` [n][state_width] is B already scaled.
  /// Scratch: width numbers.
  void advance(const T* b, T decay, Operand<Dot> x, int64_t n, T* state, T* scratch) const {
    for (int64_t c = 0; c < width; c += L) store(scratch + c, broadcast(decay));
    Product<Dot> product{b, 1, state_width, x.data, x.stride, state, width};
    product.rescale = scratch;
    product.template run_as<Start::kRescale, false, false>(p.states, width, n);
  }

  /// Between states in work, [states][width], and those kept between spans, [states][channels].
  void load_boundary(const T* from, T* state) const {
    copy_rows<T>({from, kDtype, p.channels}, p.states, p.channels, width, nullptr, state);
  }
  void store_boundary(const T* state, T* to) const {
    for (int64_t i = 0; i < p.states; ++i) {
      for (int64_t c = 0; c < p.channels; c += L) {
        store_as<T>(to, kDtype, i * p.channels + c, load(state + i * width + c), p.channels - c);
      }
    }
  }

  /// And the caller's, [channels][states]; a null pointer is zeros.
  void load_state(const T* from, T* state) const {
    if (from == nullptr) {
      __builtin_memset(state, 0, size_t(state_size) * sizeof(T));
      return;
    }
    for (int64_t c = 0; c < p.channels; c += L) {
      const int64_t height = min_of<int64_t>(p.channels - c, L);
      for (int64_t i = 0; i < p.states; i += L) {
        const int64_t across = min_of<int64_t>(p.states - i, L);
        Vec<T> square[L];
        for (int k = 0; k < L; ++k) {
          square[k] = k < height ? load_as<T>(from, kDtype, (c + k) * p.states + i, across) : Vec<T>{};
        }
        transpose<T>(square);
        for (int64_t k = 0; k < across; ++k) store(state + (i + k) * width + c, square[k]);
      }
    }
  }
  void store_state(const T* state, T* to) const {
    for (int64_t i = 0; i < p.states; i += L) {
      const int64_t across = min_of<int64_t>(p.states - i, L);
      for (int64_t c = 0; c < p.channels; c += L) {
        const int64_t height = min_of<int64_t>(p.channels - c, L);
        Vec<T> square[L];
        for (int k = 0; k < L; ++k) {
          square[k] = k < across ? load(state + (i + k) * width + c) : Vec<T>{};
        }
        transpose<T>(square);
        for (int64_t k = 0; k < height; ++k) {
          store_as<T>(to, kDtype, (c + k) * p.states + i, square[k], across);
        }
      }
    }
  }
  T* state_at(const void* states, int64_t index, int64_t head) const {
    return static_cast<T*>(const_cast<void*>(states)) + (index * p.heads + head) * p.channels * p.states;
  }
  /// Which of the batch rows' final states a run's last state is, or -1.
  int64_t final_of(const Run& run) const {
    return p.packed == 0 ? run.last : run.last + 1 == p.packed ? 0 : -1;
  }
  const T* initial_of(const Run& run, int64_t head) const {
    return run.initial < 0 ? nullptr : state_at(p.initial, run.initial, head);
  }
};

}  // namespace longspan::LONGSPAN_ISA
