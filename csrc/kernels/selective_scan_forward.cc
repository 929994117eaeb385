// The scan itself: channels along the lanes, states in registers, time one step after the other.
//
//     a[n]  = exp(D_t A[n])              one exponential a state, step and lane: what it costs
//     h[n]  = a[n] h[n] + (D_t u_t) B_t[n]
//     y_t  += C_t[n] h[n]
//
// In float with AVX-512, 12 operations for 16 channels, 8 of them in the multiplier: 7.0 G states a
// second and core from registers, where the exponential alone, streamed, runs at 10.4.
//
// A task is a piece of time of a lane group's channels. Where those are fewer than a small machine has
// cores, states are shared out too: their outputs are added up in a second pass, but no exponential is
// calculated twice, which on two cores would eat all that they gain. Only where that leaves a single
// task is time shared out: every piece but the first is scanned from zero, the states between pieces
// follow from the decay over a whole piece, exp(A sum D_t), and those pieces are scanned again.

#include "kernels/selective_scan_steps.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kEnoughTasks = 4;  // constants: results must not depend on the machine
constexpr int64_t kMostPieces = 8;
constexpr int64_t kLeastSteps = 512;  // of a piece
constexpr int64_t kStatesPerTask = 8;  // fewer, and what a step costs besides its states weighs in

/// The block of states that fits into registers.
constexpr int kBlock = LONGSPAN_VECTOR_BYTES == 64 ? 16 : 8;

template <class N>
class Forward {
  using T = typename N::Scalar;
  static constexpr int L = kLanes<T>;

 public:
  explicit Forward(const SelectiveScanParams& p) : p_(p), shape_(p) {
    const int64_t scans = p.batch * shape_.lane_groups;
    if (scans < kEnoughTasks && p.steps >= 2 * kLeastSteps) {
      splits_ = min_of(ceil_div(kEnoughTasks, max_of<int64_t>(1, scans)),
                       max_of<int64_t>(1, p.states / kStatesPerTask));
      if (scans * splits_ == 1) {
        const int64_t steps = max_of(kLeastSteps, ceil_div(p.steps, kMostPieces));
        most_ = round_up(steps, shape_.chunk);
      }
    }
  }

  void run() {
    if (p_.batch == 0 || p_.channels == 0) return;
    const int64_t count = shape_.pieces(most_, nullptr);
    const int64_t scans = count * shape_.lane_groups, tasks = scans * splits_;
    const bool in_pieces = count > p_.batch;
    const int threads = threads_for(tasks, p_.threads);
    Arena measure;
    lay_out(measure);
    // For each scan where there are pieces: its state at the end, and the sum of its steps.
    const int64_t boundary = round_up(p_.states * kSize<N> + L, L);
    Scratch pieces(count * int64_t(sizeof(Piece))), scratch(measure.used() * threads),
        boundaries(in_pieces ? scans * boundary * int64_t(sizeof(T)) : 0),
        packed((p_.b_varies + p_.c_varies) * packed_size() * int64_t(sizeof(T))),
        partial(splits_ > 1 ? splits_ * shape_.lane_groups * p_.batch * p_.steps * L * int64_t(sizeof(T))
                            : 0);
    pack(threads, reinterpret_cast<T*>(packed.at(0)));
    pieces_ = reinterpret_cast<Piece*>(pieces.at(0));
    shape_.pieces(most_, pieces_);
    partial_ = splits_ > 1 ? reinterpret_cast<T*>(partial.at(0)) : nullptr;
    const auto at = [&](int64_t scan) {
      return reinterpret_cast<T*>(boundaries.at(0)) + scan * boundary;
    };

    for (int pass = 0; pass < (in_pieces ? 2 : 1); ++pass) {
      parallel_for(tasks, threads, [&](int64_t i, int thread) {
        const int64_t index = i / splits_, split = i % splits_;
        const Piece& piece = pieces_[index / shape_.lane_groups];
        if (pass == 1 && piece.first) return;
        Arena arena(scratch.at(measure.used() * thread));
        scan(piece, index % shape_.lane_groups, split, pass == 0 && !piece.first,
             pass == 1 ? at(index - shape_.lane_groups) : nullptr,
             in_pieces && pass == 0 ? at(index) : nullptr, lay_out(arena));
      });
      if (in_pieces && pass == 0) {
        Arena arena(scratch.at(0));
        join(at, lay_out(arena));
      }
    }
    if (splits_ > 1) {
      parallel_for(scans, threads, [&](int64_t i, int thread) {
        Arena arena(scratch.at(measure.used() * thread));
        add_up(pieces_[i / shape_.lane_groups], i % shape_.lane_groups, lay_out(arena));
      });
    }
  }

 private:
  struct Workspace {
    T *a, *h;                ///< [state][part][lane]
    T *b, *c;                ///< where they do not vary: [state][part][lane]
    T *step, *step_u, *y, *z;  ///< [time][lane]
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.a = arena.take<T>(p_.states * kSize<N>);
    w.h = arena.take<T>(p_.states * kSize<N>);
    w.b = arena.take<T>(p_.b_varies ? 0 : p_.states * kSize<N>);
    w.c = arena.take<T>(p_.c_varies ? 0 : p_.states * kSize<N>);
    w.step = arena.take<T>(shape_.chunk * L);
    w.step_u = arena.take<T>(shape_.chunk * L);
    w.y = arena.take<T>(shape_.chunk * L);
    w.z = arena.take<T>(shape_.chunk * L);
    return w;
  }

  // B and C of all time, turned once for all channels: [batch][group][time][part][state].
  LS_INLINE int64_t packed_at(int64_t batch, int64_t group, int64_t t) const {
    return ((batch * p_.groups + group) * p_.steps + t) * N::kParts * shape_.row;
  }
  LS_INLINE int64_t packed_size() const { return packed_at(p_.cu ? 1 : p_.batch, 0, 0); }

  void pack(int threads, T* to) {
    b_ = to;
    c_ = to + p_.b_varies * packed_size();
    const int64_t chunks = ceil_div(p_.steps, shape_.chunk);
    const int64_t tasks = (p_.cu ? 1 : p_.batch) * p_.groups * chunks;
    parallel_for(p_.b_varies || p_.c_varies ? tasks : 0, threads, [&](int64_t i, int) {
      const int64_t t = i % chunks * shape_.chunk, group = i / chunks % p_.groups;
      const int64_t batch = i / chunks / p_.groups, steps = min_of(shape_.chunk, p_.steps - t);
      const int64_t at = packed_at(batch, group, t);
      if (p_.b_varies) shape_.load_varying(p_.B, batch, group, t, steps, T(1), b_ + at);
      if (p_.c_varies) shape_.load_varying(p_.C, batch, group, t, steps, kOutputFactor<N>, c_ + at);
    });
  }

  /// Where a split's part of y lies: [split][lane group][batch][time][lane].
  LS_INLINE T* part_of_y(int64_t split, int64_t lane_group, const Piece& piece, int64_t t) const {
    const int64_t batch = p_.cu ? 0 : piece.sequence, rows = p_.cu ? 1 : p_.batch;
    return partial_ + (((split * shape_.lane_groups + lane_group) * rows + batch) * p_.steps + t) * L;
  }

  /// One piece of one lane group, and the states of one split. `from_zero`: only the state at the end
  /// is wanted. `before`: the state at the start, else the sequence's. `after`: where to leave the
  /// state at the end and the sum of the steps.
  void scan(const Piece& piece, int64_t lane_group, int64_t split, bool from_zero, const T* before,
            T* after, const Workspace& w) const {
    const LaneGroup g = shape_.lane_group(lane_group);
    const int64_t n0 = p_.states * split / splits_, n1 = p_.states * (split + 1) / splits_;
    shape_.load_channels(p_.A, g, T(kLog2e), w.a);
    if (before) {
      __builtin_memcpy(w.h, before, size_t(p_.states * kSize<N>) * sizeof(T));
    } else {
      shape_.load_state_of(from_zero ? ScanTensor{} : p_.initial, piece.sequence, g, w.h);
    }
    if (!p_.b_varies) shape_.load_channels(p_.B, g, T(1), w.b);
    if (!p_.c_varies) shape_.load_channels(p_.C, g, kOutputFactor<N>, w.c);
    const int64_t batch = p_.cu ? 0 : piece.sequence;
    const Rows u = channel_rows(p_.u, batch).from(g.channel, 0);
    const Rows delta = channel_rows(p_.delta, batch).from(g.channel, 0);
    const Vec<T> bias = shape_.per_channel(p_.bias, g), skip = shape_.per_channel(p_.D, g);
    Vec<T> sum = {};
    int64_t chunk_index = piece.chunk;
    for (int64_t t = piece.begin; t < piece.end; t += shape_.chunk, ++chunk_index) {
      const int64_t steps = min_of(shape_.chunk, piece.end - t);
      if (p_.chunk_states && !from_zero) shape_.keep(w.h, chunk_index, g, n0, n1);
      load_steps<T>(u.from(0, t), g.lanes, steps, w.step_u, L);
      load_steps<T>(delta.from(0, t), g.lanes, steps, w.step, L);
      T* y = splits_ > 1 ? part_of_y(split, lane_group, piece, t) : w.y;
      const Vec<T> factor = splits_ > 1 ? Vec<T>{} : skip;
      for (int64_t i = 0; i < steps * L; i += L) {
        const Vec<T> x = load(w.step_u + i), step = shape_.step_size(load(w.step + i) + bias);
        store(y + i, x * factor);
        store(w.step + i, step);
        store(w.step_u + i, step * x);
        sum += step;
      }
      const int64_t at = packed_at(batch, g.group, t);
      Ahead<T> ahead(steps, g.lanes, ceil_div(n1 - n0, kBlock));
      if (t + steps < piece.end) {
        ahead.read(u.from(0, t + steps));
        ahead.read(delta.from(0, t + steps));
        if (p_.z.data) ahead.read(channel_rows(p_.z, batch).from(g.channel, t + steps));
      }
      if (splits_ == 1 && !from_zero) ahead.write(channel_rows(p_.out, batch).from(g.channel, t));
      const T* b_steps = p_.b_varies ? b_ + at : w.b;
      const T* c_steps = p_.c_varies ? c_ + at : w.c;
      with_coefficients<N>(p_, b_steps, c_steps, shape_.row,
                           [&](auto b, auto c) { advance_all(w, b, c, y, n0, n1, steps, ahead); });
      if (splits_ == 1 && !from_zero) finish(piece, g, t, steps, y, w);
    }
    if (after) {
      for (int64_t n = n0; n < n1; ++n) store_state<N>(after, n, load_state<N>(w.h, n));
      if (split == 0) store(after + p_.states * kSize<N>, sum);
    }
    if (piece.last && !from_zero) shape_.store_state_of(w.h, p_.last, piece.sequence, g, n0, n1);
  }

  /// States [n0, n1) through a chunk, in blocks that registers hold.
  template <class B, class C>
  LS_INLINE void advance_all(const Workspace& w, B b, C c, T* y, int64_t n0, int64_t n1, int64_t steps,
                             Ahead<T>& ahead) const {
    int64_t n = n0;
    if constexpr (N::kParts == 1 && B::kVaries && C::kVaries) {
      for (; n + kBlock <= n1; n += kBlock) advance<kBlock>(w, b, c, y, n, steps, ahead);
    }
    if constexpr (N::kParts == 1) {
      for (; n + 4 <= n1; n += 4) advance<4>(w, b, c, y, n, steps, ahead);
    }
    for (; n < n1; ++n) advance<1>(w, b, c, y, n, steps, ahead);
  }

  template <int K, class B, class C>
  static void advance(const Workspace& w, B b, C c, T* __restrict__ y, int64_t n0, int64_t steps,
                      Ahead<T>& ahead) {
    N h[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) h[k] = load_state<N>(w.h, n0 + k);
    for (int64_t t = 0; t < steps; ++t) {
      ahead.touch();
      const Vec<T> step = load(w.step + t * L), step_u = load(w.step_u + t * L);
      Vec<T> sum = load(y + t * L);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        h[k] = decay(load_state<N>(w.a, n0 + k), step) * h[k] + scaled(b.at(t, n0 + k), step_u);
        sum += dot(conjugate(c.at(t, n0 + k)), h[k]);
      }
      store(y + t * L, sum);
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) store_state<N>(w.h, n0 + k, h[k]);
  }

  /// The gate, and y to where it belongs.
  void finish(const Piece& piece, LaneGroup g, int64_t t, int64_t steps, T* y,
              const Workspace& w) const {
    const int64_t batch = p_.cu ? 0 : piece.sequence;
    if (p_.z.data) {
      const Rows z = channel_rows(p_.z, batch).from(g.channel, t);
      load_steps<T>(z, g.lanes, steps, w.z, L);
      for (int64_t i = 0; i < steps * L; i += L) {
        const Vec<T> x = load(w.z + i);
        store(y + i, load(y + i) * x * sigmoid<T>(x));
      }
    }
    store_steps<T>(y, channel_rows(p_.out, batch).from(g.channel, t), g.lanes, steps);
  }

  /// The splits' parts of y and D u together.
  void add_up(const Piece& piece, int64_t lane_group, const Workspace& w) const {
    const LaneGroup g = shape_.lane_group(lane_group);
    const Rows u = channel_rows(p_.u, p_.cu ? 0 : piece.sequence).from(g.channel, 0);
    const Vec<T> skip = shape_.per_channel(p_.D, g);
    for (int64_t t = piece.begin; t < piece.end; t += shape_.chunk) {
      const int64_t steps = min_of(shape_.chunk, piece.end - t);
      load_steps<T>(u.from(0, t), g.lanes, steps, w.step_u, L);
      for (int64_t i = 0; i < steps * L; i += L) {
        Vec<T> y = load(w.step_u + i) * skip;
        for (int64_t s = 0; s < splits_; ++s) y += load(part_of_y(s, lane_group, piece, t) + i);
        store(w.y + i, y);
      }
      finish(piece, g, t, steps, w.y, w);
    }
  }

  /// From states at the ends of pieces that began with zero to the true ones.
  template <class At>
  void join(const At& at, const Workspace& w) const {
    const int64_t count = shape_.pieces(most_, nullptr);
    for (int64_t i = shape_.lane_groups; i < count * shape_.lane_groups; ++i) {
      if (pieces_[i / shape_.lane_groups].first) continue;
      const T* before = at(i - shape_.lane_groups);
      T* after = at(i);
      shape_.load_channels(p_.A, shape_.lane_group(i % shape_.lane_groups), T(kLog2e), w.a);
      const Vec<T> sum = load(after + p_.states * kSize<N>);
      for (int64_t n = 0; n < p_.states; ++n) {
        store_state<N>(
            after, n,
            decay(load_state<N>(w.a, n), sum) * load_state<N>(before, n) + load_state<N>(after, n));
      }
    }
  }

  const SelectiveScanParams& p_;
  const ScanShape<N> shape_;
  int64_t splits_ = 1;          ///< of the states
  int64_t most_ = INT64_MAX / 2;  ///< steps of a piece
  Piece* pieces_ = nullptr;
  T *b_ = nullptr, *c_ = nullptr, *partial_ = nullptr;
};

}  // namespace

void selective_scan_forward(const SelectiveScanParams& p) {
  if (p.in_double) {
    p.complex ? Forward<Complex<double>>(p).run() : Forward<Real<double>>(p).run();
  } else {
    p.complex ? Forward<Complex<float>>(p).run() : Forward<Real<float>>(p).run();
  }
}

}  // namespace longspan::LONGSPAN_ISA
