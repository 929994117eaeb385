// The scan itself: channels along the lanes, states in registers, time one step after the other.
//
//     a[n]  = exp(D_t A[n])              one exponential a state, step and lane: what it costs
//     h[n]  = a[n] h[n] + (D_t u_t) B_t[n]
//     y_t  += C_t[n] h[n]
//
// In float with AVX-512, 12 operations for 16 channels, 8 of them in the multiplier: 7.0 G states a
// second and core from registers, where the exponential alone, streamed, runs at 10.4.
//
// A task is a lane group's channels of a sequence. Where those are fewer than a small machine has cores,
// states are shared out too, segment by segment of time: steps are made ready by all, each task takes
// its states through the segment, and all add up what these gave. No exponential is calculated twice,
// which on two cores would eat all that they gain. Only where that leaves a single task is time shared
// out: every piece but the first is scanned from zero, the states between pieces follow from the decay
// over a whole piece, exp(A sum D_t), and those pieces are scanned again.

#include "kernels/selective_scan_steps.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kEnoughTasks = 4;  // constants: results must not depend on the machine
constexpr int64_t kMostPieces = 8;
constexpr int64_t kLeastSteps = 512;  // of a piece
constexpr int64_t kStatesPerTask = 8;  // fewer, and what a step costs besides its states weighs in
constexpr int64_t kSegment = 2048;  // steps: so many stay in the nearer caches
constexpr int64_t kRun = 256;  // of them that are made ready at a time

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
    // B and C turned once for all channels: [batch][group][time][part][state], of all time, or of a
    // segment of each sequence.
    const int64_t rows = splits_ > 1 || !p_.cu ? p_.batch : 1;
    held_ = splits_ > 1 ? kSegment : p_.steps;
    const int64_t size = coefficients_at(rows, 0, 0);
    Scratch packed((p_.b_varies + p_.c_varies) * size * int64_t(sizeof(T)));
    b_ = reinterpret_cast<T*>(packed.at(0));
    c_ = b_ + p_.b_varies * size;
    splits_ > 1 ? run_in_segments() : run_in_pieces();
  }

 private:
  void run_in_pieces() {
    const int64_t count = shape_.pieces(most_, nullptr), scans = count * shape_.lane_groups;
    const bool in_pieces = count > p_.batch;
    const int threads = threads_for(scans, p_.threads);
    Arena measure;
    lay_out(measure);
    // For each scan where there are pieces: its state at the end, and the sum of its steps.
    const int64_t boundary = round_up(p_.states * kSize<N> + L, L);
    Scratch pieces(count * int64_t(sizeof(Piece))), scratch(measure.used() * threads),
        boundaries(in_pieces ? scans * boundary * int64_t(sizeof(T)) : 0);
    pieces_ = reinterpret_cast<Piece*>(pieces.at(0));
    shape_.pieces(most_, pieces_);
    pack_all();
    const auto at = [&](int64_t scan) {
      return reinterpret_cast<T*>(boundaries.at(0)) + scan * boundary;
    };
    for (int pass = 0; pass < (in_pieces ? 2 : 1); ++pass) {
      parallel_for(scans, threads, [&](int64_t i, int thread) {
        const Piece& piece = pieces_[i / shape_.lane_groups];
        if (pass == 1 && piece.first) return;
        Arena arena(scratch.at(measure.used() * thread));
        scan(piece, i % shape_.lane_groups, pass == 0 && !piece.first,
             pass == 1 ? at(i - shape_.lane_groups) : nullptr, in_pieces && pass == 0 ? at(i) : nullptr,
             lay_out(arena));
      });
      if (in_pieces && pass == 0) {
        Arena arena(scratch.at(0));
        join(at, lay_out(arena));
      }
    }
  }

  /// States shared out, where sequences and lane groups are few; there are no pieces then.
  void run_in_segments() {
    const int64_t scans = p_.batch * shape_.lane_groups, part = kSegment * L;
    Arena measure;
    lay_out(measure);
    Scratch scratch(measure.used() * scans), pieces(p_.batch * int64_t(sizeof(Piece)));
    pieces_ = reinterpret_cast<Piece*>(pieces.at(0));
    shape_.pieces(most_, pieces_);  // whole sequences
    int64_t longest = 0;
    for (int64_t s = 0; s < p_.batch; ++s) longest = max_of(longest, pieces_[s].end - pieces_[s].begin);
    /// body(sequence, its lane group, their workspace)
    const auto with_scan = [&](int64_t scan, const auto& body) {
      Arena arena(scratch.at(measure.used() * scan));
      body(pieces_[scan / shape_.lane_groups], shape_.lane_group(scan % shape_.lane_groups),
           lay_out(arena));
    };
    for (int64_t scan = 0; scan < scans; ++scan) {
      with_scan(scan, [&](const Piece& piece, LaneGroup g, const Workspace& w) {
        load_parameters(piece.sequence, g, nullptr, w);
      });
    }
    const int64_t runs = kSegment / kRun;
    for (int64_t segment = 0; segment < longest || segment == 0; segment += kSegment) {
      /// body(sequence, lane group, first step, steps, workspace): for each run of the segment.
      const auto each_run = [&](const auto& body) {
        parallel_for(scans * runs, p_.threads, [&](int64_t i, int) {
          with_scan(i / runs, [&](const Piece& piece, LaneGroup g, Workspace w) {
            const int64_t into = i % runs * kRun, t = piece.begin + segment + into;
            if (t >= piece.end) return;
            w.step += into * L, w.step_u += into * L, w.y += into * L, w.z += into * L;
            body(piece, g, t, min_of(kRun, piece.end - t), w);
          });
        });
      };
      each_run([&](const Piece& piece, LaneGroup g, int64_t t, int64_t steps, const Workspace& w) {
        if (g.channel % shape_.width == 0) {  // the first of its group
          pack(batch_of(piece), g.group, t, steps, coefficients_of(piece, g, t));
        }
        make_ready(piece, g, t, steps, w);
        for (int64_t k = 1; k < splits_; ++k) {
          __builtin_memset(w.y + k * part, 0, size_t(steps * L) * sizeof(T));
        }
      });
      parallel_for(scans * splits_, p_.threads, [&](int64_t i, int) {
        with_scan(i / splits_, [&](const Piece& piece, LaneGroup g, Workspace w) {
          const int64_t split = i % splits_;
          w.y += split * part;
          advance_segment(piece, g, segment, p_.states * split / splits_,
                          p_.states * (split + 1) / splits_, w);
        });
      });
      each_run([&](const Piece& piece, LaneGroup g, int64_t t, int64_t steps, const Workspace& w) {
        for (int64_t i = 0; i < steps * L; i += L) {
          Vec<T> y = load(w.y + i);
          for (int64_t k = 1; k < splits_; ++k) y += load(w.y + k * part + i);
          store(w.y + i, y);
        }
        finish(piece, g, t, steps, w);
      });
    }
  }

  struct Workspace {
    T *a, *h;  ///< [state][part][lane]
    T *b, *c;  ///< where they do not vary: [state][part][lane]
    T *step, *step_u, *z;  ///< [time][lane]
    T* y;  ///< [split][time][lane]
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    const int64_t steps = splits_ > 1 ? kSegment : shape_.chunk;
    w.a = arena.take<T>(p_.states * kSize<N>);
    w.h = arena.take<T>(p_.states * kSize<N>);
    w.b = arena.take<T>(p_.b_varies ? 0 : p_.states * kSize<N>);
    w.c = arena.take<T>(p_.c_varies ? 0 : p_.states * kSize<N>);
    w.step = arena.take<T>(steps * L);
    w.step_u = arena.take<T>(steps * L);
    w.y = arena.take<T>(splits_ * steps * L);
    w.z = arena.take<T>(steps * L);
    return w;
  }

  LS_INLINE int64_t coefficients_at(int64_t row, int64_t group, int64_t t) const {
    return ((row * p_.groups + group) * held_ + t) * N::kParts * shape_.row;
  }

  /// B and C of `steps` from t on, to where coefficients_at says.
  void pack(int64_t batch, int64_t group, int64_t t, int64_t steps, int64_t at) const {
    if (p_.b_varies) shape_.load_varying(p_.B, batch, group, t, steps, T(1), b_ + at);
    if (p_.c_varies) shape_.load_varying(p_.C, batch, group, t, steps, kOutputFactor<N>, c_ + at);
  }

  void pack_all() const {
    const int64_t chunks = ceil_div(p_.steps, shape_.chunk);
    const int64_t tasks = (p_.cu ? 1 : p_.batch) * p_.groups * chunks;
    parallel_for(p_.b_varies || p_.c_varies ? tasks : 0, p_.threads, [&](int64_t i, int) {
      const int64_t t = i % chunks * shape_.chunk, group = i / chunks % p_.groups;
      const int64_t batch = i / chunks / p_.groups;
      pack(batch, group, t, min_of(shape_.chunk, p_.steps - t), coefficients_at(batch, group, t));
    });
  }

  /// A, and B and C that do not vary, of a lane group; its state: `before`, or else the sequence's.
  void load_parameters(int64_t sequence, LaneGroup g, const T* before, const Workspace& w) const {
    shape_.load_channels(p_.A, g, T(kLog2e), w.a);
    if (!p_.b_varies) shape_.load_channels(p_.B, g, T(1), w.b);
    if (!p_.c_varies) shape_.load_channels(p_.C, g, kOutputFactor<N>, w.c);
    if (before) {
      __builtin_memcpy(w.h, before, size_t(p_.states * kSize<N>) * sizeof(T));
    } else {
      shape_.load_state_of(p_.initial, sequence, g, w.h);
    }
  }

  LS_INLINE int64_t batch_of(const Piece& piece) const { return p_.cu ? 0 : piece.sequence; }
  LS_INLINE int64_t coefficients_of(const Piece& piece, LaneGroup g, int64_t t) const {
    if (splits_ == 1) return coefficients_at(batch_of(piece), g.group, t);
    return coefficients_at(piece.sequence, g.group, (t - piece.begin) % kSegment);
  }
  LS_INLINE Rows rows(const ScanTensor& x, const Piece& piece, LaneGroup g, int64_t t) const {
    return channel_rows(x, batch_of(piece)).from(g.channel, t);
  }

  /// D_t, D_t u_t and the y that the states add to, D u. -> the sum of the steps.
  LS_INLINE Vec<T> make_ready(const Piece& piece, LaneGroup g, int64_t t, int64_t steps,
                              const Workspace& w) const {
    const Vec<T> bias = shape_.per_channel(p_.bias, g), skip = shape_.per_channel(p_.D, g);
    load_steps<T>(rows(p_.u, piece, g, t), g.lanes, steps, w.step_u, L);
    load_steps<T>(rows(p_.delta, piece, g, t), g.lanes, steps, w.step, L);
    Vec<T> sum = {};
    for (int64_t i = 0; i < steps * L; i += L) {
      const Vec<T> x = load(w.step_u + i), step = shape_.step_size(load(w.step + i) + bias);
      store(w.y + i, x * skip);
      store(w.step + i, step);
      store(w.step_u + i, step * x);
      sum += step;
    }
    return sum;
  }

  /// One piece of one lane group. `from_zero`: only the state at the end is wanted. `before`: the state
  /// at the start, else the sequence's. `after`: where to leave the state at the end and the sum of the
  /// steps.
  void scan(const Piece& piece, int64_t lane_group, bool from_zero, const T* before, T* after,
            const Workspace& w) const {
    const LaneGroup g = shape_.lane_group(lane_group);
    load_parameters(piece.sequence, g, before, w);
    if (from_zero) shape_.load_state_of(ScanTensor{}, piece.sequence, g, w.h);
    Vec<T> sum = {};
    int64_t chunk_index = piece.chunk;
    for (int64_t t = piece.begin; t < piece.end; t += shape_.chunk, ++chunk_index) {
      const int64_t steps = min_of(shape_.chunk, piece.end - t);
      if (p_.chunk_states && !from_zero) shape_.keep(w.h, chunk_index, g, 0, p_.states);
      sum += make_ready(piece, g, t, steps, w);
      StepsAhead<T> ahead(steps, g.lanes, ceil_div(p_.states, kBlock));
      if (t + steps < piece.end) {
        ahead.read(rows(p_.u, piece, g, t + steps));
        ahead.read(rows(p_.delta, piece, g, t + steps));
        if (p_.z.data) ahead.read(rows(p_.z, piece, g, t + steps));
      }
      if (!from_zero) ahead.write(rows(p_.out, piece, g, t));
      advance_chunk(piece, g, t, 0, p_.states, steps, ahead, w);
      if (!from_zero) finish(piece, g, t, steps, w);
    }
    if (after) {
      for (int64_t n = 0; n < p_.states; ++n) store_state<N>(after, n, load_state<N>(w.h, n));
      store(after + p_.states * kSize<N>, sum);
    }
    if (piece.last && !from_zero) shape_.store_state_of(w.h, p_.last, piece.sequence, g, 0, p_.states);
  }

  /// States [n0, n1) through a segment, whose steps are ready.
  void advance_segment(const Piece& piece, LaneGroup g, int64_t segment, int64_t n0, int64_t n1,
                       Workspace w) const {
    const int64_t first = piece.begin + segment, end = min_of(first + kSegment, piece.end);
    int64_t chunk_index = piece.chunk + segment / shape_.chunk;
    for (int64_t t = first; t < end; t += shape_.chunk, ++chunk_index) {
      const int64_t steps = min_of(shape_.chunk, end - t);
      if (p_.chunk_states) shape_.keep(w.h, chunk_index, g, n0, n1);
      StepsAhead<T> nothing(steps, g.lanes, 1);
      advance_chunk(piece, g, t, n0, n1, steps, nothing, w);
      w.step += steps * L, w.step_u += steps * L, w.y += steps * L;
    }
    const bool last = first < piece.end ? end == piece.end : segment == 0;
    if (last) shape_.store_state_of(w.h, p_.last, piece.sequence, g, n0, n1);
  }

  /// States [n0, n1) through the chunk at step t.
  LS_INLINE void advance_chunk(const Piece& piece, LaneGroup g, int64_t t, int64_t n0, int64_t n1,
                               int64_t steps, StepsAhead<T>& ahead, const Workspace& w) const {
    const int64_t at = coefficients_of(piece, g, t);
    with_coefficients<N>(p_, p_.b_varies ? b_ + at : w.b, p_.c_varies ? c_ + at : w.c, shape_.row,
                         [&](auto b, auto c) { advance_all(w, b, c, w.y, n0, n1, steps, ahead); });
  }

  /// States [n0, n1) through a chunk, in blocks that registers hold.
  template <class B, class C>
  LS_INLINE void advance_all(const Workspace& w, B b, C c, T* y, int64_t n0, int64_t n1, int64_t steps,
                             StepsAhead<T>& ahead) const {
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
                      StepsAhead<T>& ahead) {
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
  void finish(const Piece& piece, LaneGroup g, int64_t t, int64_t steps, const Workspace& w) const {
    if (p_.z.data) {
      load_steps<T>(rows(p_.z, piece, g, t), g.lanes, steps, w.z, L);
      for (int64_t i = 0; i < steps * L; i += L) {
        const Vec<T> x = load(w.z + i);
        store(w.y + i, load(w.y + i) * x * sigmoid<T>(x));
      }
    }
    store_steps<T>(w.y, rows(p_.out, piece, g, t), g.lanes, steps);
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
  int64_t splits_ = 1;  ///< of the states
  int64_t most_ = INT64_MAX / 2;  ///< steps of a piece
  Piece* pieces_ = nullptr;
  int64_t held_ = 0;  ///< steps of B and C that b_ and c_ hold
  T *b_ = nullptr, *c_ = nullptr;
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
