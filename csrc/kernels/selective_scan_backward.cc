// Gradients of the scan. With dy_t = d_out_t silu(z_t) and e_t what comes back from step t + 1,
//
//     g_t     = e_t + conj(C_t) dy_t            e_{t-1} = conj(a_t) g_t     (e_{-1}: d_initial)
//     dC_t    = sum over channels  conj(h_t) dy_t
//     dB_t    = sum over channels  g_t D_t u_t
//     q_t     = conj(a_t h_{t-1}) g_t           dA = sum over time  D_t q_t
//     du_t    = D_t <B_t, g_t> + D dy_t
//     dD_t    = <A, q_t> + u_t <B_t, g_t>       d_delta_t = dD_t sigmoid(delta_t + bias)
//
// and through the gate dz_t = d_out_t y_t silu'(z_t). A chunk's states are scanned again from the one
// that the forward kept; a_t and h_t of four states at a time lie in the nearest cache, so there is
// one exponential a state and step more, not two. Sums over channels (lanes) are taken for eight
// vectors at once, in a tree: 6 operations a vector.
//
// A task is a row (some pieces of time) of a slab (some lane groups of one group of B and C). Sums over
// time go to the row's own part of dA, sums over channels to the slab's own part of dB and dC; parts
// are added in order. There are at most 16 of either: memory grows with time or with channels,
// not with both. Where sequences times lane groups are few, time is cut into pieces, whose e follow
// from a first pass over A, C and dy alone.

#include "kernels/selective_scan_steps.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kEnoughTasks = 16;  // constants: results must not depend on the machine
constexpr int64_t kMostRows = 16;
constexpr int64_t kLeastSteps = 512;  // of a piece

template <class N>
class Backward {
  using T = typename N::Scalar;
  static constexpr int L = kLanes<T>;
  static constexpr int kBlock = N::kParts == 1 ? 4 : 1;  ///< states at a time

 public:
  Backward(const SelectiveScanParams& p, const SelectiveScanGradients& d) : p_(p), d_(d), shape_(p) {
    if (p.batch * shape_.lane_groups < kEnoughTasks) {
      most_ = round_up(max_of(kLeastSteps, ceil_div(p.steps, kMostRows)), shape_.chunk);
    }
    count_ = shape_.pieces(most_, nullptr);
    rows_ = min_of(count_, kMostRows);
    slabs_ = rows_ == 0 || p.groups == 0
                 ? 1
                 : min_of(ceil_div(kEnoughTasks, rows_ * p.groups), shape_.lane_groups_a_group);
    slabs_ = max_of<int64_t>(1, slabs_);
    varying_ = 2 * p.states * N::kParts;
  }

  void run() {
    if (p_.channels == 0) return;
    const int64_t tasks = rows_ * p_.groups * slabs_, scans = count_ * shape_.lane_groups;
    const bool in_pieces = count_ > p_.batch;
    const int threads = threads_for(tasks, p_.threads);
    Arena measure;
    lay_out(measure);
    const int64_t boundary = p_.states * kSize<N> + L;  // e where a piece ends, and the sum of its steps
    const int64_t word = int64_t(sizeof(T));
    Scratch pieces(count_ * int64_t(sizeof(Piece))), scratch(measure.used() * max_of(threads, 1)),
        boundaries(in_pieces ? scans * boundary * word : 0),
        per_row(rows_ * shape_.lane_groups * sums_of_row() * word),
        per_slab(slabs_ * p_.groups * times() * varying_ * word);
    pieces_ = reinterpret_cast<Piece*>(pieces.at(0));
    shape_.pieces(most_, pieces_);
    sums_ = reinterpret_cast<T*>(per_row.at(0));
    varying_sums_ = reinterpret_cast<T*>(per_slab.at(0));
    const auto at = [&](int64_t scan) {
      return reinterpret_cast<T*>(boundaries.at(0)) + scan * boundary;
    };

    if (in_pieces) {
      parallel_for(scans, threads, [&](int64_t i, int thread) {
        if (pieces_[i / shape_.lane_groups].first) return;  // nothing comes before it
        Arena arena(scratch.at(measure.used() * thread));
        adjoint(pieces_[i / shape_.lane_groups], shape_.lane_group(i % shape_.lane_groups), at(i),
                lay_out(arena));
      });
      Arena arena(scratch.at(0));
      join(at, lay_out(arena));
    }
    parallel_for(tasks, threads, [&](int64_t i, int thread) {
      const int64_t slab = i % slabs_, group = i / slabs_ % p_.groups, row = i / slabs_ / p_.groups;
      Arena arena(scratch.at(measure.used() * thread));
      const Workspace w = lay_out(arena);
      const int64_t first =
          group * shape_.lane_groups_a_group + shape_.lane_groups_a_group * slab / slabs_;
      const int64_t end =
          group * shape_.lane_groups_a_group + shape_.lane_groups_a_group * (slab + 1) / slabs_;
      for (int64_t k = first; k < end; ++k) clear(sums_of(row, k), sums_of_row());
      for (int64_t j = count_ * (row + 1) / rows_ - 1; j >= count_ * row / rows_; --j) {
        const Piece& piece = pieces_[j];
        for (int64_t k = first; k < end; ++k) {
          T* e = w.e + (k - first) * p_.states * kSize<N>;
          if (in_pieces) {
            __builtin_memcpy(e, at(j * shape_.lane_groups + k),
                             size_t(p_.states * kSize<N>) * sizeof(T));
          } else {
            shape_.load_state_of(d_.d_last, piece.sequence, shape_.lane_group(k), e);
          }
        }
        scan(piece, group, slab, row, first, end, w);
      }
    });
    add_up_channels(threads);
    add_up_times(threads);
  }

 private:
  struct Workspace {
    T *a, *h;  ///< [state][part][lane]
    T* e;  ///< [lane group of the slab][state][part][lane]
    T *b, *c;  ///< [time][part][state], or [state][part][lane]
    T *raw, *step, *u, *step_u, *z, *d_out, *dy;  ///< [time][lane]; raw is delta + bias
    T *y, *by_a, *by_b;  ///< sums over states: y, <A, q>, <B, g>
    T *decays, *states;  ///< [time (and one before)][kBlock][part][lane]
    T* varying;  ///< this chunk's dB and dC: [block of states][time][dB, dC][state][part]
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    const int64_t state = p_.states * kSize<N>, block = shape_.chunk * L;
    const int64_t coefficients = max_of(shape_.chunk * N::kParts * shape_.row, state);
    w.a = arena.take<T>(state);
    w.h = arena.take<T>(state);
    w.e = arena.take<T>(ceil_div(shape_.lane_groups_a_group, slabs_) * state);
    w.b = arena.take<T>(coefficients);
    w.c = arena.take<T>(coefficients);
    w.raw = arena.take<T>(block);
    w.step = arena.take<T>(block);
    w.u = arena.take<T>(block);
    w.step_u = arena.take<T>(block);
    w.z = arena.take<T>(block);
    w.d_out = arena.take<T>(block);
    w.dy = arena.take<T>(block);
    w.y = arena.take<T>(block);
    w.by_a = arena.take<T>(block);
    w.by_b = arena.take<T>(block);
    w.decays = arena.take<T>(shape_.chunk * kBlock * kSize<N>);
    w.states = arena.take<T>((shape_.chunk + 1) * kBlock * kSize<N>);
    w.varying = arena.take<T>(shape_.chunk * varying_);
    return w;
  }

  static void clear(T* p, int64_t n) { __builtin_memset(p, 0, size_t(n) * sizeof(T)); }

  /// All steps of the tensors, of which a packed one has only one row.
  LS_INLINE int64_t times() const { return p_.cu ? p_.steps : p_.batch * p_.steps; }

  // A row's sums for a lane group: dA, dB and dC where they are the same at all times, dD, d_bias.
  LS_INLINE int64_t sums_of_row() const {
    return p_.states * kSize<N> * (1 + !p_.b_varies + !p_.c_varies) + 2 * L;
  }
  LS_INLINE T* sums_of(int64_t row, int64_t lane_group) const {
    return sums_ + (row * shape_.lane_groups + lane_group) * sums_of_row();
  }
  LS_INLINE T* db_of(T* sums) const { return sums + p_.states * kSize<N>; }
  LS_INLINE T* dc_of(T* sums) const { return sums + p_.states * kSize<N> * (1 + !p_.b_varies); }
  LS_INLINE T* dd_of(T* sums) const { return sums + sums_of_row() - 2 * L; }

  /// A slab's dB and dC at a step: [slab][group][batch][time][varying_].
  LS_INLINE T* varying_of(int64_t slab, int64_t group, int64_t time) const {
    return varying_sums_ + ((slab * p_.groups + group) * times() + time) * varying_;
  }

  void scan(const Piece& piece, int64_t group, int64_t slab, int64_t row, int64_t first, int64_t end,
            const Workspace& w) const {
    const int64_t batch = p_.cu ? 0 : piece.sequence;
    const int64_t chunks = ceil_div(piece.end - piece.begin, shape_.chunk);
    for (int64_t i = chunks - 1; i >= 0; --i) {
      const int64_t t = piece.begin + i * shape_.chunk, steps = min_of(shape_.chunk, piece.end - t);
      if (p_.b_varies) shape_.load_varying(p_.B, batch, group, t, steps, T(1), w.b);
      if (p_.c_varies) shape_.load_varying(p_.C, batch, group, t, steps, kOutputFactor<N>, w.c);
      clear(w.varying, steps * varying_);
      for (int64_t k = first; k < end; ++k) {
        const LaneGroup g = shape_.lane_group(k);
        shape_.load_channels(p_.A, g, T(kLog2e), w.a);
        if (!p_.b_varies) shape_.load_channels(p_.B, g, T(1), w.b);
        if (!p_.c_varies) shape_.load_channels(p_.C, g, kOutputFactor<N>, w.c);
        shape_.recall(piece.chunk + i, g, w.h);
        StepsAhead<T> ahead(steps, g.lanes, 2 * ceil_div(p_.states, kBlock));
        const auto at = [&](const ScanTensor& x, LaneGroup of, int64_t from) {
          return channel_rows(x, batch).from(of.channel, from);
        };
        const ScanTensor* const written[] = {&d_.du, &d_.d_delta, &d_.dz};
        for (const ScanTensor* x : written) {
          if (x->data) ahead.write(at(*x, g, t));
        }
        if (k + 1 < end || i > 0) {
          const LaneGroup next = shape_.lane_group(k + 1 < end ? k + 1 : first);
          const int64_t from = k + 1 < end ? t : t - shape_.chunk;
          const ScanTensor* const read[] = {&p_.delta, &d_.d_out, &p_.z, &p_.u};
          for (const ScanTensor* x : read) {
            if (x->data) ahead.read(at(*x, next, from));
          }
        }
        chunk(batch, g, t, steps, w.e + (k - first) * p_.states * kSize<N>, sums_of(row, k), ahead, w);
      }
      store_varying_sums(w, steps, varying_of(slab, group, batch * p_.steps + t));
    }
    if (piece.first && d_.d_initial.data) {
      for (int64_t k = first; k < end; ++k) {
        shape_.store_state_of(w.e + (k - first) * p_.states * kSize<N>, d_.d_initial, piece.sequence,
                              shape_.lane_group(k), 0, p_.states);
      }
    }
  }

  /// delta, z and d_out of a chunk, and what follows from them alone.
  void load_chunk(int64_t batch, LaneGroup g, int64_t t, int64_t steps, const Workspace& w) const {
    const auto fetch = [&](const ScanTensor& x, T* out) {
      load_steps<T>(channel_rows(x, batch).from(g.channel, t), g.lanes, steps, out, L);
    };
    fetch(p_.delta, w.raw);
    fetch(d_.d_out, w.d_out);
    if (p_.z.data) fetch(p_.z, w.z);
    const Vec<T> bias = shape_.per_channel(p_.bias, g);
    for (int64_t i = 0; i < steps * L; i += L) {
      const Vec<T> raw = load(w.raw + i) + bias, d_out = load(w.d_out + i);
      store(w.raw + i, raw);
      store(w.step + i, shape_.step_size(raw));
      if (p_.z.data) {
        const Vec<T> z = load(w.z + i);
        store(w.dy + i, d_out * z * sigmoid<T>(z));
      } else {
        store(w.dy + i, d_out);
      }
    }
  }

  /// One chunk of one lane group; w.h holds the state before it, e what comes back from after it.
  void chunk(int64_t batch, LaneGroup g, int64_t t, int64_t steps, T* e, T* sums, StepsAhead<T>& ahead,
             const Workspace& w) const {
    load_chunk(batch, g, t, steps, w);
    load_steps<T>(channel_rows(p_.u, batch).from(g.channel, t), g.lanes, steps, w.u, L);
    const Vec<T> skip = shape_.per_channel(p_.D, g);
    for (int64_t i = 0; i < steps * L; i += L) {
      const Vec<T> u = load(w.u + i);
      store(w.step_u + i, load(w.step + i) * u);
      store(w.y + i, skip * u);
      store(w.by_a + i, Vec<T>{});
      store(w.by_b + i, Vec<T>{});
    }
    with_coefficients<N>(p_, w.b, w.c, shape_.row, [&](auto b, auto c) {
      int64_t n = 0;
      for (; n + kBlock <= p_.states; n += kBlock) block<kBlock>(w, b, c, e, sums, n, steps, ahead);
      if constexpr (kBlock > 1) {
        for (; n < p_.states; ++n) block<1>(w, b, c, e, sums, n, steps, ahead);
      }
    });
    finish(batch, g, t, steps, skip, sums, w);
  }

  /// K states: forward again, then back.
  template <int K, class B, class C>
  LS_INLINE void block(const Workspace& w, B b, C c, T* e, T* sums, int64_t n0, int64_t steps,
                       StepsAhead<T>& ahead) const {
    p_.z.data ? replay<K, true>(w, b, c, n0, steps, ahead) : replay<K, false>(w, b, c, n0, steps, ahead);
    reverse<K>(w, b, c, e, sums, n0, steps, ahead);
  }

  template <int K, bool kOutput, class B, class C>
  static void replay(const Workspace& w, B b, C c, int64_t n0, int64_t steps, StepsAhead<T>& ahead) {
    N h[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      h[k] = load_state<N>(w.h, n0 + k);
      store_state<N>(w.states, k, h[k]);
    }
    for (int64_t t = 0; t < steps; ++t) {
      ahead.touch();
      const Vec<T> step = load(w.step + t * L), step_u = load(w.step_u + t * L);
      Vec<T> y = kOutput ? load(w.y + t * L) : Vec<T>{};
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const N a = decay(load_state<N>(w.a, n0 + k), step);
        h[k] = a * h[k] + scaled(b.at(t, n0 + k), step_u);
        store_state<N>(w.decays, t * K + k, a);
        store_state<N>(w.states, (t + 1) * K + k, h[k]);
        if (kOutput) y += dot(conjugate(c.at(t, n0 + k)), h[k]);
      }
      if (kOutput) store(w.y + t * L, y);
    }
  }

  template <int K, class B, class C>
  void reverse(const Workspace& w, B b, C c, T* e_all, T* sums, int64_t n0, int64_t steps,
               StepsAhead<T>& ahead) const {
    N e[K], da[K], db[K], dc[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      e[k] = load_state<N>(e_all, n0 + k);
      da[k] = load_state<N>(sums, n0 + k);
      if constexpr (!B::kVaries) db[k] = load_state<N>(db_of(sums), n0 + k);
      if constexpr (!C::kVaries) dc[k] = load_state<N>(dc_of(sums), n0 + k);
    }
    // So many steps together as fill a vector with sums over channels.
    constexpr int kSums = 2 * K * N::kParts, kSteps = K < kBlock || kSums >= L ? 1 : L / kSums;
    T* varying = w.varying + steps * 2 * N::kParts * n0;
    const auto back = [&](int64_t t, Vec<T>* over_channels) LS_INLINE_LAMBDA {
      ahead.touch();
      const Vec<T> dy = load(w.dy + t * L), step = load(w.step + t * L);
      const Vec<T> step_u = load(w.step_u + t * L);
      Vec<T> by_a = load(w.by_a + t * L), by_b = load(w.by_b + t * L);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const N a = load_state<N>(w.decays, t * K + k);
        const N g = e[k] + scaled(conjugate(c.at(t, n0 + k)), dy);
        const N d_b = scaled(g, step_u);
        const N d_c = scaled(conjugate(load_state<N>(w.states, (t + 1) * K + k)), dy);
        const N q = conjugate(a * load_state<N>(w.states, t * K + k)) * g;
        by_b += dot(b.at(t, n0 + k), g);
        by_a += dot(load_state<N>(w.a, n0 + k), q);
        da[k] = da[k] + scaled(q, step);
        e[k] = conjugate(a) * g;
        if constexpr (!B::kVaries) db[k] = db[k] + d_b;
        if constexpr (!C::kVaries) dc[k] = dc[k] + d_c;
        put(over_channels, k, d_b);
        put(over_channels, K + k, d_c);
      }
      store(w.by_a + t * L, by_a);
      store(w.by_b + t * L, by_b);
    };
    int64_t t = steps;
    for (; t >= kSteps; t -= kSteps) {
      Vec<T> over_channels[kSteps * kSums];  // [step][dB, dC][state][part]
#pragma GCC unroll 4
      for (int s = kSteps - 1; s >= 0; --s) back(t - kSteps + s, over_channels + s * kSums);
      if constexpr (B::kVaries || C::kVaries) {
        add_sums_of_lanes<T>(over_channels, varying + (t - kSteps) * kSums);
      }
    }
    for (; t > 0; --t) {
      Vec<T> over_channels[kSums];
      back(t - 1, over_channels);
      if constexpr (B::kVaries || C::kVaries)
        add_sums_of_lanes<T>(over_channels, varying + (t - 1) * kSums);
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      store_state<N>(e_all, n0 + k, e[k]);
      store_state<N>(sums, n0 + k, da[k]);
      if constexpr (!B::kVaries) store_state<N>(db_of(sums), n0 + k, db[k]);
      if constexpr (!C::kVaries) store_state<N>(dc_of(sums), n0 + k, dc[k]);
    }
  }

  LS_INLINE static void put(Vec<T>* vectors, int i, N x) {
    vectors[i * N::kParts] = x.re;
    if constexpr (N::kParts == 2) vectors[i * 2 + 1] = x.im;
  }

  /// A chunk's dB and dC to [time][block of states][dB, dC][state][part].
  void store_varying_sums(const Workspace& w, int64_t steps, T* out) const {
    const T* from = w.varying;
    for (int64_t n = 0; n < p_.states;) {
      const int64_t block = n + kBlock <= p_.states ? kBlock : 1, sums = 2 * block * N::kParts;
      for (int64_t t = 0; t < steps; ++t, from += sums) {
        __builtin_memcpy(out + t * varying_ + 2 * n * N::kParts, from, size_t(sums) * sizeof(T));
      }
      n += block;
    }
  }

  /// Where state n's dB (which = 0) or dC (1) lies among varying_: blocks as `chunk` takes them.
  LS_INLINE int64_t varying_at(int64_t n, int which, int part) const {
    const int64_t whole = p_.states / kBlock * kBlock;
    const int64_t size = n < whole ? kBlock : 1, first = n < whole ? n / kBlock * kBlock : n;
    return (2 * first + which * size + n - first) * N::kParts + part;
  }

  /// From sums over states to the gradients of u, delta, z, D and bias.
  void finish(int64_t batch, LaneGroup g, int64_t t, int64_t steps, Vec<T> skip, T* sums,
              const Workspace& w) const {
    Vec<T> d_skip = load(dd_of(sums)), d_bias = load(dd_of(sums) + L);
    for (int64_t i = 0; i < steps * L; i += L) {
      const Vec<T> u = load(w.u + i), dy = load(w.dy + i), by_b = load(w.by_b + i);
      Vec<T> d_step = load(w.by_a + i) * T(kLn2) + u * by_b;
      if (p_.softplus) {
        const Vec<T> raw = load(w.raw + i);
        d_step = select<T>(raw > T(20), d_step, d_step * sigmoid<T>(raw));
      }
      d_skip += u * dy;
      d_bias += d_step;
      store(w.step_u + i, load(w.step + i) * by_b + skip * dy);
      store(w.by_a + i, d_step);
      if (p_.z.data) {
        const Vec<T> z = load(w.z + i), s = sigmoid<T>(z);
        store(w.y + i, load(w.d_out + i) * load(w.y + i) * s * (T(1) + z * (T(1) - s)));
      }
    }
    store(dd_of(sums), d_skip);
    store(dd_of(sums) + L, d_bias);
    store_steps<T>(w.step_u, channel_rows(d_.du, batch).from(g.channel, t), g.lanes, steps);
    store_steps<T>(w.by_a, channel_rows(d_.d_delta, batch).from(g.channel, t), g.lanes, steps);
    if (p_.z.data) store_steps<T>(w.y, channel_rows(d_.dz, batch).from(g.channel, t), g.lanes, steps);
  }

  /// A piece's e before its first step, if nothing came from after it but d_last, and the sum of its
  /// steps; to `out`.
  void adjoint(const Piece& piece, LaneGroup g, T* out, const Workspace& w) const {
    const int64_t batch = p_.cu ? 0 : piece.sequence;
    shape_.load_state_of(piece.last ? d_.d_last : ScanTensor{}, piece.sequence, g, out);
    shape_.load_channels(p_.A, g, T(kLog2e), w.a);
    if (!p_.c_varies) shape_.load_channels(p_.C, g, kOutputFactor<N>, w.c);
    Vec<T> sum = {};
    for (int64_t i = ceil_div(piece.end - piece.begin, shape_.chunk) - 1; i >= 0; --i) {
      const int64_t t = piece.begin + i * shape_.chunk, steps = min_of(shape_.chunk, piece.end - t);
      load_chunk(batch, g, t, steps, w);
      if (p_.c_varies) shape_.load_varying(p_.C, batch, g.group, t, steps, kOutputFactor<N>, w.c);
      for (int64_t s = 0; s < steps * L; s += L) sum += load(w.step + s);
      p_.c_varies ? send_back(w, Varying<N>{w.c, shape_.row}, out, steps)
                  : send_back(w, PerChannel<N>{w.c}, out, steps);
    }
    store(out + p_.states * kSize<N>, sum);
  }

  template <class C>
  void send_back(const Workspace& w, C c, T* e_all, int64_t steps) const {
    int64_t n = 0;
    if constexpr (kBlock > 1) {
      for (; n + kBlock <= p_.states; n += kBlock) send_block_back<kBlock>(w, c, e_all, n, steps);
    }
    for (; n < p_.states; ++n) send_block_back<1>(w, c, e_all, n, steps);
  }

  template <int K, class C>
  static void send_block_back(const Workspace& w, C c, T* e_all, int64_t n0, int64_t steps) {
    N e[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) e[k] = load_state<N>(e_all, n0 + k);
    for (int64_t t = steps - 1; t >= 0; --t) {
      const Vec<T> dy = load(w.dy + t * L), step = load(w.step + t * L);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const N g = e[k] + scaled(conjugate(c.at(t, n0 + k)), dy);
        e[k] = conjugate(decay(load_state<N>(w.a, n0 + k), step)) * g;
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) store_state<N>(e_all, n0 + k, e[k]);
  }

  /// From what `adjoint` left to what comes back into each piece from after it.
  template <class At>
  void join(const At& at, const Workspace& w) const {
    for (int64_t k = 0; k < shape_.lane_groups; ++k) {
      const LaneGroup g = shape_.lane_group(k);
      shape_.load_channels(p_.A, g, T(kLog2e), w.a);
      for (int64_t j = count_ - 1; j >= 0; --j) {
        T* x = at(j * shape_.lane_groups + k);
        // w.h carries e from the piece after this one.
        if (pieces_[j].last) shape_.load_state_of(d_.d_last, pieces_[j].sequence, g, w.h);
        const Vec<T> sum = load(x + p_.states * kSize<N>);
        for (int64_t n = 0; n < p_.states; ++n) {
          const N into = load_state<N>(w.h, n), local = load_state<N>(x, n);
          const N carried = conjugate(decay(load_state<N>(w.a, n), sum)) * into;
          store_state<N>(w.h, n, pieces_[j].last ? local : local + carried);
          store_state<N>(x, n, into);
        }
      }
    }
  }

  /// dA, dD, d_bias, and dB and dC that are the same at all times: rows together.
  void add_up_channels(int threads) const {
    parallel_for(shape_.lane_groups, threads, [&](int64_t k, int) {
      const LaneGroup g = shape_.lane_group(k);
      T* total = sums_of(0, k);
      if (rows_ == 0) return;
      for (int64_t r = 1; r < rows_; ++r) {
        const T* part = sums_of(r, k);
        for (int64_t i = 0; i < sums_of_row(); i += L)
          store(total + i, load(total + i) + load(part + i));
      }
      shape_.store_state_of(total, d_.dA, 0, g, 0, p_.states);
      if (!p_.b_varies) shape_.store_state_of(db_of(total), d_.dB, 0, g, 0, p_.states);
      if (!p_.c_varies) {
        double_if_complex(dc_of(total), p_.states * kSize<N>);
        shape_.store_state_of(dc_of(total), d_.dC, 0, g, 0, p_.states);
      }
      store_channels(dd_of(total), d_.dD, g);
      store_channels(dd_of(total) + L, d_.d_bias, g);
    });
  }

  static void double_if_complex(T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += L) store(p + i, load(p + i) * kOutputFactor<N>);
  }

  void store_channels(const T* lanes, const ScanTensor& x, LaneGroup g) const {
    if (x.data == nullptr) return;
    store_lanes<T>(x, g.channel * x.channel, x.channel, load(lanes), g.lanes);
  }

  /// dB and dC that vary: slabs together, and to where they belong.
  void add_up_times(int threads) const {
    if (!p_.b_varies && !p_.c_varies) return;
    const int64_t blocks = ceil_div(times(), shape_.chunk);
    parallel_for(p_.groups * blocks, threads, [&](int64_t i, int) {
      const int64_t group = i / blocks, begin = i % blocks * shape_.chunk;
      for (int64_t time = begin; time < min_of(begin + shape_.chunk, times()); ++time) {
        if (p_.cu && (time < p_.cu[0] || time >= p_.cu[p_.batch])) continue;  // of no sequence
        T* total = varying_of(0, group, time);
        for (int64_t s = 1; s < slabs_; ++s) {
          const T* part = varying_of(s, group, time);
          for (int64_t j = 0; j < varying_; ++j) total[j] += part[j];
        }
        const int64_t batch = p_.cu ? 0 : time / p_.steps, t = p_.cu ? time : time % p_.steps;
        if (p_.b_varies) store_varying(total, 0, T(1), d_.dB, batch, group, t);
        if (p_.c_varies) store_varying(total, 1, kOutputFactor<N>, d_.dC, batch, group, t);
      }
    });
  }

  void store_varying(const T* total, int which, T factor, const ScanTensor& x, int64_t batch,
                     int64_t group, int64_t t) const {
    const int64_t at = batch * x.batch + group * x.group + t * x.time;
    for (int64_t n = 0; n < p_.states; ++n) {
      for (int part = 0; part < N::kParts; ++part) {
        store_as<T>(x.data, x.dtype, at + n * x.state + part * x.part,
                    broadcast(total[varying_at(n, which, part)] * factor), 1);
      }
    }
  }

  const SelectiveScanParams& p_;
  const SelectiveScanGradients& d_;
  const ScanShape<N> shape_;
  int64_t most_ = INT64_MAX / 2;  ///< steps of a piece
  int64_t count_, rows_, slabs_;
  int64_t varying_;  ///< dB and dC of a step: [block of states][dB, dC][state][part]
  Piece* pieces_ = nullptr;
  T *sums_ = nullptr, *varying_sums_ = nullptr;
};

}  // namespace

void selective_scan_backward(const SelectiveScanParams& p, const SelectiveScanGradients& d) {
  if (p.in_double) {
    p.complex ? Backward<Complex<double>>(p, d).run() : Backward<Real<double>>(p, d).run();
  } else {
    p.complex ? Backward<Complex<float>>(p, d).run() : Backward<Real<float>>(p, d).run();
  }
}

}  // namespace longspan::LONGSPAN_ISA
