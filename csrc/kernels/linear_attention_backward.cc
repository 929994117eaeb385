// Linear attention, backward. Per span and head the states before each chunk are calculated again,
// forwards from the boundary; then its chunks are walked backwards with dS, the gradient of the state
// behind the chunk (linear_attention_chunk.h has the forward's names; dY is d_out times the scale, over
// the normaliser where there is one, and r_t what the normaliser itself passes on to q_t . z_t):
//
//   dM[t][s] = (dY_t . v_s + r_t) exp(a_t - a_s)       for s <= t
//   dV       = M^T dY + exp(a_n - a_s) k_s dS
//   dQ       = dM K   + exp(a_t) (dY S^T + r z^T)
//   dK       = dM^T Q + exp(a_n - a_s) (V dS^T + dz)
//   dS       = exp(a_n) dS + sum of exp(a_t) q_t dY_t^T,  dz likewise with r_t
//
// S and z are those before the chunk. A gate's gradient is that of all decays from its token on: with
// what is behind the chunk, sum over v of S dS at its end, and q_t dQ_t - k_t dK_t within (Yang et al.
// 2023, appendix C). S^T and dS^T, value channels by key channels, are what most products read.
//
// A task is a key-value head of a run, or, where those are too few, of a span:
//
//   1. each span's own gradient of the state it began from      (spans in parallel)
//   2. the gradient at each boundary, from the last to the first (in order)
//   3. everything else                                           (spans in parallel)

#include "kernels/linear_attention_chunk.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

/// As the forward's.
constexpr int64_t kEnoughTasks = 8;

template <class Dot>
class Backward {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kBytes = sizeof(T);
  static constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat;
  /// Gates below make a decay of exactly zero, and have no gradient.
  static constexpr T kForgets = sizeof(T) == 8 ? T(-746) : T(-104);

 public:
  Backward(const LinearAttentionParams& p, const LinearAttentionGradients& g)
      : p_(p), g_(g), chunk_(p), group_(p.heads / p.kv_heads), chunks_(kSpan / chunk_.tokens) {}

  void run() { p_.causal ? run_causal() : run_full(); }

 private:
  struct Workspace {
    LinearDecay<T> decay;
    T* states;         ///< S^T, and z after it, before each chunk of the span
    T* d_states;       ///< dS and dz of each head of the group, or of one
    T* d_turned;       ///< dS^T
    T* state;          ///< a state as the forward has it, to be turned
    T *q, *k, *v, *dy; ///< [tokens][key_width or value_width]; rows past the last token are zero
    T *scaled_q, *scaled_k;  ///< exp(a_t) q_t, exp(a_n - a_s) k_s
    T* r;                    ///< [tokens]
    T* factor;               ///< [tokens]
    T* turned;               ///< k^T, then v^T [channels][tokens]
    T *m, *dm;               ///< [tokens][tokens]
    T *dq, *dk, *dv;         ///< [tokens][key_width or value_width]
    T* end;                  ///< [key_width]: the gradient of all decays up to the chunk's end
    T *dk_sum, *dv_sum;      ///< of the span, over the group's heads
  };

  /// S or S^T in work, whichever is larger, and z.
  int64_t state_size() const {
    return max_of(chunk_.state_size, p_.value_channels * chunk_.key_width) + chunk_.key_width;
  }
  int64_t state_bytes() const { return state_size() * kBytes; }

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    const int64_t tokens = chunk_.tokens, key = chunk_.key_width, value = chunk_.value_width;
    w.decay.lay_out(arena, p_.kind, tokens, key);
    w.states = arena.take<T>(chunks_ * state_size());
    w.d_states = arena.take<T>((few_ ? 1 : group_) * state_size());
    w.d_turned = arena.take<T>(state_size());
    w.state = arena.take<T>(state_size());
    T** const by_key[] = {&w.q, &w.k, &w.scaled_q, &w.scaled_k, &w.dq, &w.dk};
    for (T** rows : by_key) *rows = arena.take<T>(tokens * key);
    T** const by_value[] = {&w.v, &w.dy, &w.dv};
    for (T** rows : by_value) *rows = arena.take<T>(tokens * value);
    w.r = arena.take<T>(tokens);
    w.factor = arena.take<T>(tokens);
    w.turned = arena.take<T>(max_of(p_.key_channels, p_.value_channels) * tokens);
    w.m = arena.take<T>(tokens * tokens);
    w.dm = arena.take<T>(tokens * tokens);
    w.end = arena.take<T>(key);
    w.dk_sum = arena.take<T>(group_ > 1 ? kSpan * key : 0);
    w.dv_sum = arena.take<T>(group_ > 1 ? kSpan * value : 0);
    return w;
  }

  int64_t workspace_bytes() const {
    Arena measure;
    lay_out(measure);
    return measure.used();
  }
  Workspace workspace(const Scratch& scratch, int thread) const {
    Arena arena(scratch.at(workspace_bytes() * thread));
    return lay_out(arena);
  }

  LinearPlace place(const Run& run, int64_t span, int64_t head, int64_t chunk) const {
    const int64_t t0 = run.begin_of(span) + chunk * chunk_.tokens;
    return {run, head, t0, min_of(chunk_.tokens, run.end_of(span) - t0)};
  }
  int64_t chunks_of(const Run& run, int64_t span) const {
    return ceil_div(run.end_of(span) - run.begin_of(span), chunk_.tokens);
  }

  LinearState<T> state_in(T* space) const { return {space, space + state_size() - chunk_.key_width}; }
  T* d_boundary(int64_t index, int64_t head) const {
    return d_boundaries_ + (index * p_.heads + head) * state_size();
  }
  void turn(const T* state, T* out) const {
    transposed<Dot>({state, kDtype, chunk_.value_width}, p_.key_channels, p_.value_channels, out,
                    chunk_.key_width);
  }

  void load_rows(TokenRows x, int64_t n, int64_t channels, int64_t width, const T* scale, T* out) const {
    copy_rows<T>(x, n, channels, width, scale, out);
    __builtin_memset(out + n * width, 0, size_t((chunk_.tokens - n) * width * kBytes));
  }
  void load_queries(const LinearPlace& at, const Workspace& w) const {
    load_rows(chunk_.query_rows(p_.q, at), at.n, p_.key_channels, chunk_.key_width, nullptr, w.q);
    w.decay.from_start(w.q, at.n, w.scaled_q);
  }
  void load_keys(const LinearPlace& at, const Workspace& w) const {
    load_rows(chunk_.key_rows(p_.k, at), at.n, p_.key_channels, chunk_.key_width, nullptr, w.k);
    load_rows(chunk_.key_rows(p_.v, at), at.n, p_.value_channels, chunk_.value_width, nullptr, w.v);
    w.decay.to_end(w.k, at.n, w.scaled_k);
  }

  void load_dy(const LinearPlace& at, const Workspace& w) const {
    chunk_.load_dy(chunk_.query_rows(g_.d_out, at), chunk_.query_rows(p_.out, at),
                   chunk_.denominators(at.run, at.head, at.t0), at.n, w.factor, w.dy, w.r);
  }

  void run_causal() {
    const RunTable& table = p_.runs;
    const int64_t whole = table.run_count * p_.kv_heads, parts = table.span_count * p_.kv_heads;
    const int64_t boundaries = table.boundary_count * p_.heads;
    few_ = whole < kEnoughTasks && boundaries > 0;
    const int threads = threads_for(few_ ? parts * group_ : whole, p_.threads);
    Scratch scratch(workspace_bytes() * threads);
    const auto work = [&](int thread) { return workspace(scratch, thread); };
    if (!few_) {
      parallel_for(whole, threads, [&](int64_t task, int thread) {
        run_whole(table.runs[task / p_.kv_heads], task % p_.kv_heads, work(thread));
      });
      return;
    }
    Scratch state_space(boundaries * state_bytes());
    Scratch decay_space(boundaries * chunk_.key_width * kBytes);
    d_boundaries_ = reinterpret_cast<T*>(state_space.at(0));
    decays_ = reinterpret_cast<T*>(decay_space.at(0));
    parallel_for(table.span_count * p_.heads, threads, [&](int64_t task, int thread) {
      own_gradient(table.spans[task / p_.heads], task % p_.heads, work(thread));
    });
    parallel_for(table.run_count * p_.heads, threads, [&](int64_t task, int thread) {
      join(table.runs[task / p_.heads], task % p_.heads, work(thread));
    });
    parallel_for(parts, threads, [&](int64_t task, int thread) {
      const Span& span = table.spans[task / p_.kv_heads];
      run_span(table.runs[span.run], span.index, task % p_.kv_heads, work(thread));
    });
  }

  // ---- 1 and 2: gradients at the boundaries

  void own_gradient(const Span& span, int64_t head, const Workspace& w) const {
    if (span.index == 0) return;
    const Run& run = p_.runs.runs[span.run];
    const int64_t boundary = run.boundary + span.index - 1;
    T* decay = decays_ + (boundary * p_.heads + head) * chunk_.key_width;
    for (int64_t i = 0; i < chunk_.key_width; ++i) decay[i] = T(1);
    add_queries(run, span.index, head, decay, w);
    __builtin_memcpy(d_boundary(boundary, head), w.d_states, size_t(state_bytes()));
  }

  /// The gradient of the state before a span, from zero behind it; the span's decays are multiplied into
  /// `decay`, a number a row of the state.
  void add_queries(const Run& run, int64_t span, int64_t head, T* decay, Workspace w) const {
    __builtin_memset(w.d_states, 0, size_t(state_bytes()));
    for (int64_t c = chunks_of(run, span) - 1; c >= 0; --c) {
      const LinearPlace at = place(run, span, head, c);
      w.decay.prepare(p_, run, head, at.t0, at.n, chunk_.tokens);
      load_queries(at, w);
      load_dy(at, w);
      retreat(at, state_in(w.d_states), w);
      if (p_.kind == Gate::kNone) continue;
      for (int64_t i = 0; i < chunk_.key_width; ++i) decay[i] *= w.decay.whole[i];
    }
  }

  /// dS and dz before a chunk, from those behind it.
  void retreat(const LinearPlace& at, LinearState<T> d, const Workspace& w) const {
    const int64_t width = chunk_.value_width;
    const Product<Dot> product{w.scaled_q, 1, chunk_.key_width, w.dy, width, d.s, width};
    chunk_.template advance<Start::kRescaleRows>(product, w.decay, p_.key_channels, width, at.n);
    if (p_.normalized) chunk_.advance_norm(w.decay.factors(), w.scaled_q, w.r, at.n, d.z);
  }

  /// The gradient of a run's last state; whether there is any.
  bool load_last(const Run& run, int64_t head, LinearState<T> d) const {
    const bool any = run.last >= 0 && (g_.d_last || g_.d_last_norm);
    chunk_.load_state(any && g_.d_last ? chunk_.state_at(g_.d_last, run.last, head) : nullptr,
                      any && g_.d_last_norm ? chunk_.norm_at(g_.d_last_norm, run.last, head) : nullptr,
                      d);
    return any;
  }

  void keep_initial(const Run& run, int64_t head, LinearState<T> d) const {
    if (run.initial < 0 || g_.d_initial == nullptr) return;
    chunk_.store_state(d, chunk_.state_at(g_.d_initial, run.initial, head),
                       chunk_.norm_at(g_.d_initial_norm, run.initial, head));
  }

  void join(const Run& run, int64_t head, const Workspace& w) const {
    const bool any = load_last(run, head, state_in(w.d_states));
    if (run.spans() == 0) keep_initial(run, head, state_in(w.d_states));
    const T* after = any ? w.d_states : nullptr;
    for (int64_t k = run.spans() - 2; k >= 0; --k) {
      T* d = d_boundary(run.boundary + k, head);
      const T* decay = decays_ + ((run.boundary + k) * p_.heads + head) * chunk_.key_width;
      if (after) add_decayed(after, decay, d);
      after = d;
    }
  }

  /// d += decay of each row * after; without decays, after.
  void add_decayed(const T* after, const T* decay, T* d) const {
    const LinearState<T> mine = state_in(d), other = state_in(const_cast<T*>(after));
    for (int64_t i = 0; i < p_.key_channels; ++i) {
      const T factor = decay ? decay[i] : T(1);
      for (int64_t c = i * chunk_.value_width; c < (i + 1) * chunk_.value_width; c += L) {
        store(d + c, load(d + c) + factor * load(after + c));
      }
      if (p_.normalized) mine.z[i] += factor * other.z[i];
    }
  }

  // ---- not causal

  void run_full() {
    const RunTable &queries = p_.runs, &keys = p_.key_runs;
    const int64_t parts = queries.span_count * p_.heads, key_parts = keys.span_count * p_.kv_heads;
    const int threads = threads_for(max_of(parts, key_parts), p_.threads);
    Scratch scratch(workspace_bytes() * threads), part_space(parts * state_bytes());
    Scratch total_space(queries.run_count * p_.heads * state_bytes());
    T* sums = reinterpret_cast<T*>(part_space.at(0));
    d_boundaries_ = reinterpret_cast<T*>(total_space.at(0));
    parallel_for(parts, threads, [&](int64_t task, int thread) {
      const Workspace w = workspace(scratch, thread);
      const Span& span = queries.spans[task / p_.heads];
      add_queries(queries.runs[span.run], span.index, task % p_.heads, nullptr, w);
      __builtin_memcpy(sums + task * state_size(), w.d_states, size_t(state_bytes()));
    });
    parallel_for(queries.run_count * p_.heads, threads, [&](int64_t task, int) {
      const Run& run = queries.runs[task / p_.heads];
      T* total = d_boundaries_ + task * state_size();
      load_last(run, task % p_.heads, state_in(total));
      for (int64_t k = 0; k < run.spans(); ++k) {
        const int64_t part = (run.first_span + k) * p_.heads + task % p_.heads;
        add_decayed(sums + part * state_size(), nullptr, total);
      }
      keep_initial(run, task % p_.heads, state_in(total));
    });
    parallel_for(parts, threads, [&](int64_t task, int thread) {
      differentiate_queries(queries.spans[task / p_.heads], task % p_.heads, workspace(scratch, thread));
    });
    parallel_for(key_parts, threads, [&](int64_t task, int thread) {
      differentiate_keys(keys.spans[task / p_.kv_heads], task % p_.kv_heads, workspace(scratch, thread));
    });
  }

  void differentiate_queries(const Span& span, int64_t head, const Workspace& w) const {
    const Run& run = p_.runs.runs[span.run];
    const LinearState<T> state = state_in(w.state);
    chunk_.load_boundary(span.run, head, state);
    turn(state.s, w.states);
    for (int64_t c = 0; c < chunks_of(run, span.index); ++c) {
      const LinearPlace at = place(run, span.index, head, c);
      load_dy(at, w);
      read_state(at.n, {w.states, state.z}, w);
      store_rows<T>(w.dq, chunk_.key_width, at.n, p_.key_channels, nullptr,
                    chunk_.query_rows(g_.dq, at));
    }
  }

  /// What keys and values get is linear in dS, so the heads of the group add theirs up first.
  void differentiate_keys(const Span& span, int64_t kv_head, const Workspace& w) const {
    const Run& run = p_.key_runs.runs[span.run];
    const int64_t first = kv_head * group_, value = chunk_.value_width;
    __builtin_memcpy(w.d_states, d_boundary(span.run, first), size_t(state_bytes()));
    for (int64_t i = 1; i < group_; ++i)
      add_decayed(d_boundary(span.run, first + i), nullptr, w.d_states);
    const LinearState<T> d = state_in(w.d_states);
    for (int64_t c = 0; c < chunks_of(run, span.index); ++c) {
      const LinearPlace at = place(run, span.index, first, c);
      load_keys(at, w);
      write_state(at.n, d, w);
      Product<Dot>{w.k, chunk_.key_width, 1, d.s, value, w.dv, value}
          .template run_as<Start::kZero, false, true>(at.n, value, p_.key_channels);
      store_rows<T>(w.dk, chunk_.key_width, at.n, p_.key_channels, nullptr, chunk_.key_rows(g_.dk, at));
      store_rows<T>(w.dv, value, at.n, p_.value_channels, nullptr, chunk_.key_rows(g_.dv, at));
    }
  }

  // ---- 3

  void run_whole(const Run& run, int64_t kv_head, const Workspace& w) const {
    for (int64_t k = run.spans() - 1; k >= 0; --k) run_span(run, k, kv_head, w);
    for (int64_t i = 0; i < group_ && run.spans() == 0; ++i) {
      load_last(run, kv_head * group_ + i, state_in(w.d_states));
      keep_initial(run, kv_head * group_ + i, state_in(w.d_states));
    }
  }

  void run_span(const Run& run, int64_t span, int64_t kv_head, Workspace w) const {
    for (int64_t i = 0; i < group_; ++i) {
      const int64_t head = kv_head * group_ + i;
      const LinearState<T> d = state_in(w.d_states + (few_ ? 0 : i * state_size()));
      bool behind = true;  // whether anything after the chunk depends on its state
      if (span + 1 == run.spans()) {
        behind = load_last(run, head, d);
      } else if (few_) {
        __builtin_memcpy(d.s, d_boundary(run.boundary + span, head), size_t(state_bytes()));
      }
      run_head(run, span, head, d, behind, w);
    }
  }

  void run_head(const Run& run, int64_t span, int64_t head, LinearState<T> d, bool behind,
                Workspace& w) const {
    const int64_t chunks = chunks_of(run, span);
    calculate_states(run, span, head, chunks, w);
    const bool from_zero = span == 0 && run.initial < 0;
    for (int64_t c = chunks - 1; c >= 0; --c) {
      const LinearPlace at = place(run, span, head, c);
      w.decay.prepare(p_, run, head, at.t0, at.n, chunk_.tokens);
      load_queries(at, w);
      load_keys(at, w);
      load_dy(at, w);
      const bool before = !(from_zero && c == 0);
      differentiate(at, state_in(w.states + c * state_size()), before, d, behind, w);
      if (before) retreat(at, d, w);
      behind = true;
    }
    if (span == 0) keep_initial(run, head, d);
  }

  /// S^T and z before each chunk of a span.
  void calculate_states(const Run& run, int64_t span, int64_t head, int64_t chunks, Workspace& w) const {
    const LinearState<T> first = state_in(w.state);
    if (span == 0) {
      chunk_.load_initial(run, head, first);
    } else {
      chunk_.load_boundary(run.boundary + span - 1, head, first);
    }
    turn(first.s, w.states);
    if (p_.normalized) {
      __builtin_memcpy(state_in(w.states).z, first.z, size_t(chunk_.key_width * kBytes));
    }
    for (int64_t c = 0; c + 1 < chunks; ++c) {
      const LinearPlace at = place(run, span, head, c);
      const LinearState<T> next = state_in(w.states + (c + 1) * state_size());
      __builtin_memcpy(next.s, next.s - state_size(), size_t(state_bytes()));
      w.decay.prepare(p_, run, head, at.t0, at.n, chunk_.tokens);
      load_keys(at, w);
      const int64_t width = chunk_.key_width;
      const Product<Dot> product{w.v, 1, chunk_.value_width, w.scaled_k, width, next.s, width};
      chunk_.template advance<Start::kRescale>(product, w.decay, p_.value_channels, width, at.n);
      if (p_.normalized) chunk_.advance_norm(w.decay.factors(), w.scaled_k, nullptr, at.n, next.z);
    }
  }

  /// One chunk of one head, of which everything is loaded. state: before it, where `before` says that it
  /// is not zero; d: behind it, likewise.
  void differentiate(const LinearPlace& at, LinearState<T> state, bool before, LinearState<T> d,
                     bool behind, const Workspace& w) const {
    const int64_t n = at.n, key = chunk_.key_width, value = chunk_.value_width;
    before ? read_state(n, state, w) : (void)__builtin_memset(w.dq, 0, size_t(n * key * kBytes));
    for (int64_t c = 0; c < key; c += L) store(w.end + c, Vec<T>{});
    if (behind) {
      write_state(n, d, w);
      Product<Dot>{w.scaled_k, key, 1, d.s, value, w.dv, value}
          .template run_as<Start::kZero, false, true>(n, value, p_.key_channels);
    } else {
      __builtin_memset(w.dk, 0, size_t(n * key * kBytes));
      __builtin_memset(w.dv, 0, size_t(n * value * kBytes));
    }
    if (before && behind && p_.kind != Gate::kNone) meet(state, d, w);
    within(n, w);
    if (p_.kind != Gate::kNone) gate_gradient(at, w);
    store_rows<T>(w.dq, key, n, p_.key_channels, nullptr, chunk_.query_rows(g_.dq, at));
    store_shared(at, w.dk, w.dk_sum, key, p_.key_channels, chunk_.key_rows(g_.dk, at));
    store_shared(at, w.dv, w.dv_sum, value, p_.value_channels, chunk_.key_rows(g_.dv, at));
  }

  /// What the queries get from reading the state before the chunk.
  void read_state(int64_t n, LinearState<T> state, const Workspace& w) const {
    const int64_t key = chunk_.key_width;
    Product<Dot>{w.dy, chunk_.value_width, 1, state.s, key, w.dq, key}
        .template run_as<Start::kZero, false, true>(n, key, p_.value_channels);
    for (int64_t t = 0; t < n && p_.normalized; ++t) add_row(w.r[t], state.z, w.dq + t * key);
    if (p_.kind != Gate::kNone) w.decay.from_start(w.dq, n, w.dq);
  }

  /// What the keys get from writing to the state behind it, and the decays to the chunk's end with it.
  void write_state(int64_t n, LinearState<T> d, const Workspace& w) const {
    const int64_t key = chunk_.key_width;
    turn(d.s, w.d_turned);
    Product<Dot>{w.v, chunk_.value_width, 1, w.d_turned, key, w.dk, key}
        .template run_as<Start::kZero, false, true>(n, key, p_.value_channels);
    for (int64_t t = 0; t < n && p_.normalized; ++t) add_row(T(1), d.z, w.dk + t * key);
    if (p_.kind == Gate::kNone) return;
    w.decay.to_end(w.dk, n, w.dk);
    for (int64_t c = 0; c < key; c += L) {
      Vec<T> sum = {};
      for (int64_t t = c; t < n * key; t += key) {
        sum += load(w.k + t) * load(w.dk + t);
      }
      store(w.end + c, sum);
    }
  }

  void add_row(T factor, const T* x, T* to) const {
    for (int64_t c = 0; c < chunk_.key_width; c += L) {
      store(to + c, load(to + c) + factor * load(x + c));
    }
  }

  /// The decay of the whole chunk: the state before it meets the gradient behind it.
  void meet(LinearState<T> state, LinearState<T> d, const Workspace& w) const {
    const int64_t key = chunk_.key_width;
    for (int64_t c = 0; c < key; c += L) {
      Vec<T> sum = {};
      for (int64_t i = c; i < p_.value_channels * key; i += key) {
        sum += load(state.s + i) * load(w.d_turned + i);
      }
      if (p_.normalized) {
        sum += load(state.z + c) * load(d.z + c);
      }
      store(w.end + c, load(w.end + c) + load(w.decay.whole + c) * sum);
    }
  }

  /// What the chunk's tokens give each other.
  void within(int64_t n, const Workspace& w) const {
    const int64_t key = chunk_.key_width, value = chunk_.value_width;
    transposed<Dot>({w.v, kDtype, value}, n, p_.value_channels, w.turned, chunk_.tokens);
    triangle(w.dy, value, p_.value_channels, n, w.dm, w);
    if (p_.kind != Gate::kChannel) {
      transposed<Dot>({w.k, kDtype, key}, n, p_.key_channels, w.turned, chunk_.tokens);
      triangle(w.q, key, p_.key_channels, n, w.m, w);
      mix(n, w);
      for (int64_t t = 0; t < n; t += kStrip) {
        const int64_t count = min_of(kStrip, n - t);
        Product<Dot>{w.dm + t * chunk_.tokens, chunk_.tokens, 1, w.k, key, w.dq + t * key, key}
            .template run_as<Start::kAccumulate, false, true>(count, key, t + count);
      }
      add_from_later(w.dm, w.q, key, n, w.dk);
    } else {
      mix(n, w);
      __builtin_memset(w.dm + n * kStrip, 0, size_t((kStrip - n) * kStrip * kBytes));
      w.decay.channel.scores_and_gradient(w.q, w.k, w.dm, n, w.m, w.dq, w.dk);
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t s = t + 1; s < n; ++s) w.m[t * kStrip + s] = T(0);
      }
    }
    add_from_later(w.m, w.dy, value, n, w.dv);
  }

  /// a . b^T, strips of it up to the diagonal, with b^T in w.turned.
  void triangle(const T* a, int64_t width, int64_t depth, int64_t n, T* out, const Workspace& w) const {
    const int64_t tokens = chunk_.tokens;
    for (int64_t t = 0; t < n; t += kStrip) {
      const int64_t count = min_of(kStrip, n - t);
      Product<Dot>{a + t * width, width, 1, w.turned, tokens, out + t * tokens, tokens}
          .template run_as<Start::kZero, false, true>(count, round_up(t + count, L), depth);
    }
  }

  /// to[s] += sum over t >= s of m[t][s] x[t].
  void add_from_later(const T* m, const T* x, int64_t width, int64_t n, T* to) const {
    const int64_t tokens = chunk_.tokens;
    for (int64_t s = 0; s < n; s += kStrip) {
      const int64_t count = min_of(kStrip, n - s);
      Product<Dot>{m + s * tokens + s, 1, tokens, x + s * width, width, to + s * width, width}
          .template run_as<Start::kAccumulate, false, false>(count, width, n - s);
    }
  }

  /// M and dM from their products: decays, and zeros above the diagonal.
  void mix(int64_t n, const Workspace& w) const {
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    const bool products = p_.kind != Gate::kChannel;
    for (int64_t t = 0; t < n; ++t) {
      const int64_t end = round_up(min_of(t / kStrip * kStrip + kStrip, n), L);
      for (int64_t i = 0; i < end; i += L) {
        const int64_t cell = t * chunk_.tokens + i;
        Vec<T> dm = load(w.dm + cell);
        if (p_.normalized) dm += w.r[t];
        Vec<T> m = products ? load(w.m + cell) : Vec<T>{};
        if (p_.kind == Gate::kToken) {
          const Vec<T> e = w.decay.token.between(t, i, lane);
          m *= e;
          dm *= e;
        }
        if (i + L > t) {
          const auto seen = lane + T(i) <= T(t);
          m = select<T>(seen, m, Vec<T>{});
          dm = select<T>(seen, dm, Vec<T>{});
        }
        if (products) store(w.m + cell, m);
        store(w.dm + cell, dm);
      }
    }
  }

  void gate_gradient(const LinearPlace& at, const Workspace& w) const {
    const GateTensor &gate = p_.gate, &to = g_.d_gate;
    const int64_t from = at.run.batch * gate.batch + at.head * gate.head + at.t0 * gate.token;
    const int64_t there = at.run.batch * to.batch + at.head * to.head + at.t0 * to.token;
    const int64_t key = chunk_.key_width;
    const auto change = [&](int64_t t, int64_t c) {
      const int64_t i = t * key + c;
      return load(w.q + i) * load(w.dq + i) - load(w.k + i) * load(w.dk + i);
    };
    if (p_.kind == Gate::kChannel) {
      for (int64_t c = 0; c < p_.key_channels; c += L) {
        const int64_t left = p_.key_channels - c;
        Vec<T> sum = load(w.end + c);
        for (int64_t t = at.n - 1; t >= 0; --t) {
          sum += change(t, c);
          const Vec<T> g = load_as<T>(gate.data, gate.dtype, from + t * gate.token + c, left);
          store_as<T>(to.data, to.dtype, there + t * to.token + c,
                      select<T>(g < kForgets, Vec<T>{}, sum), left);
        }
      }
      return;
    }
    double sum = 0;
    for (int64_t c = 0; c < key; c += L) {
      sum += double(sum_of_lanes<T>(load(w.end + c)));
    }
    for (int64_t t = at.n - 1; t >= 0; --t) {
      Vec<T> row = {};
      for (int64_t c = 0; c < key; c += L) row += change(t, c);
      sum += double(sum_of_lanes<T>(row));
      const T g = load_as<T>(gate.data, gate.dtype, from + t * gate.token, 1)[0];
      store_as<T>(to.data, to.dtype, there + t * to.token, broadcast(g < kForgets ? T(0) : T(sum)), 1);
    }
  }

  /// dk or dv: a head's own, or the sum over its group's heads, which come one after the other.
  void store_shared(const LinearPlace& at, const T* rows, T* sums, int64_t width, int64_t channels,
                    TokenRows to) const {
    if (group_ == 1) return store_rows<T>(rows, width, at.n, channels, nullptr, to);
    const int64_t of_group = at.head % group_;
    T* sum = sums + (at.t0 - at.run.begin) % kSpan * width;
    for (int64_t i = 0; i < at.n * width; i += L) {
      const Vec<T> x = load(rows + i);
      store(sum + i, of_group == 0 ? x : load(sum + i) + x);
    }
    if (of_group + 1 == group_) store_rows<T>(sum, width, at.n, channels, nullptr, to);
  }

  const LinearAttentionParams& p_;
  const LinearAttentionGradients& g_;
  LinearChunk<Dot> chunk_;
  int64_t group_;   ///< heads of a key-value head
  int64_t chunks_;  ///< of a span, at most
  bool few_ = false;
  T *d_boundaries_ = nullptr, *decays_ = nullptr;
};

}  // namespace

void linear_attention_backward(const LinearAttentionParams& p, const LinearAttentionGradients& g) {
  p.dtype == Dtype::kDouble ? Backward<DotDouble>(p, g).run() : Backward<DotFloat>(p, g).run();
}

}  // namespace longspan::LONGSPAN_ISA
