// Linear attention, backward. Per span and head the states before each chunk are calculated again,
// forwards from the boundary; then its chunks are walked backwards with dS, the gradient of the state
// behind the chunk (linear_attention_gradient.h).
//
// A task is a key-value head of a run, or, where those are too few, of a span:
//
//   1. each span's own gradient of the state it began from      (spans in parallel)
//   2. the gradient at each boundary, from the last to the first (in order)
//   3. everything else                                           (spans in parallel)

#include "kernels/linear_attention_gradient.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

/// As the forward's.
constexpr int64_t kEnoughTasks = 8;

/// As the forward's; there are more tiles.
constexpr int64_t kLines = 16;

template <class Dot>
class Backward {
  using Gradient = LinearGradient<Dot>;
  using Inputs = typename Gradient::Inputs;
  using Outputs = typename Gradient::Outputs;
  using Rows = typename Gradient::Rows;
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kBytes = sizeof(T);

 public:
  Backward(const LinearAttentionParams& p, const LinearAttentionGradients& g)
      : p_(p), g_(g), gradient_(p, g), chunk_(gradient_.chunk), group_(p.heads / p.kv_heads),
        chunks_(kSpan / chunk_.tokens) {}

  void run() { p_.causal ? run_causal() : run_full(); }

 private:
  struct Workspace : Gradient::Workspace {
    T* states;    ///< S^T, and z after it, before each chunk of the span
    T* d_states;  ///< dS and dz of each head of the group, or of one
    T* state;     ///< a state as the forward has it, to be turned
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w{gradient_.lay_out(arena), {}, {}, {}};
    w.states = arena.take<T>(chunks_ * state_size());
    w.d_states = arena.take<T>((few_ ? 1 : group_) * state_size());
    w.state = arena.take<T>(state_size());
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

  int64_t state_size() const { return gradient_.state_size(); }
  int64_t state_bytes() const { return state_size() * kBytes; }
  LinearState<T> state_in(T* space) const { return gradient_.state_in(space); }
  T* d_boundary(int64_t index, int64_t head) const {
    return d_boundaries_ + (index * p_.heads + head) * state_size();
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
      Inputs in;
      gradient_.load_queries(at, w, in);
      gradient_.load_dy(at, w);
      Ahead ahead(kLines);
      if (c > 0) {
        const LinearPlace next = place(run, span, head, c - 1);
        ahead.add(chunk_.query_rows(g_.d_out, next), next.n, p_.value_channels);
        ahead.add(chunk_.query_rows(p_.q, next), next.n, p_.key_channels);
      }
      gradient_.retreat(at, in.scaled_q, state_in(w.d_states), w, ahead);
      ahead.ask_all();
      if (p_.kind == Gate::kNone) continue;
      for (int64_t i = 0; i < chunk_.key_width; ++i) decay[i] *= w.decay.whole[i];
    }
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
    gradient_.turn(state.s, w.states);
    for (int64_t c = 0; c < chunks_of(run, span.index); ++c) {
      const LinearPlace at = place(run, span.index, head, c);
      const Rows dq = gradient_.dq_rows(at, w);
      Ahead ahead(kLines);
      gradient_.load_dy(at, w);
      gradient_.read_state(at.n, {w.states, state.z}, dq, w, ahead);
      gradient_.finish(dq, w.dq, at.n, p_.key_channels, chunk_.query_rows(g_.dq, at));
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
      // The sum over the group is made: there is no other head to come.
      const Outputs to{{}, {w.dk, chunk_.key_width}, {w.dv, value}};
      Inputs in;
      Ahead ahead(kLines);
      gradient_.load_keys(at, w, in);
      gradient_.write_state(at.n, in, d, to, w, ahead);
      gradient_.finish(to.dk, w.dk, at.n, p_.key_channels, chunk_.key_rows(g_.dk, at));
      gradient_.finish(to.dv, w.dv, at.n, p_.value_channels, chunk_.key_rows(g_.dv, at));
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
      Ahead ahead(kLines);
      if (c > 0) gradient_.ask_for(place(run, span, head, c - 1), ahead);
      w.decay.prepare(p_, run, head, at.t0, at.n, chunk_.tokens);
      Inputs in;
      gradient_.load_queries(at, w, in);
      gradient_.load_keys(at, w, in);
      gradient_.load_dy(at, w);
      const bool before = !(from_zero && c == 0);
      gradient_.differentiate(at, in, state_in(w.states + c * state_size()), before, d, behind, w,
                              ahead);
      if (before) gradient_.retreat(at, in.scaled_q, d, w, ahead);
      ahead.ask_all();
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
    gradient_.turn(first.s, w.states);
    if (p_.normalized) {
      __builtin_memcpy(state_in(w.states).z, first.z, size_t(chunk_.key_width * kBytes));
    }
    for (int64_t c = 0; c + 1 < chunks; ++c) {
      const LinearPlace at = place(run, span, head, c);
      const LinearState<T> next = state_in(w.states + (c + 1) * state_size());
      const LinearPlace behind = place(run, span, head, c + 1);
      Ahead ahead(kLines);
      ahead.add(chunk_.key_rows(p_.k, behind), behind.n, p_.key_channels);
      ahead.add(chunk_.key_rows(p_.v, behind), behind.n, p_.value_channels);
      __builtin_memcpy(next.s, next.s - state_size(), size_t(state_bytes()));
      w.decay.prepare(p_, run, head, at.t0, at.n, chunk_.tokens);
      Inputs in;
      gradient_.load_keys(at, w, in);
      const int64_t width = chunk_.key_width;
      const Operand<Dot> k = in.scaled_k;
      const Product<Dot> product{in.v.data, 1, in.v.stride, k.data, k.stride, next.s, width};
      chunk_.template advance<Start::kRescale>(product, w.decay, p_.value_channels, width, at.n,
                                               Between{ahead});
      ahead.ask_all();
      if (p_.normalized) {
        chunk_.advance_norm(w.decay.factors(), k.data, k.stride, nullptr, at.n, next.z);
      }
    }
  }

  const LinearAttentionParams& p_;
  const LinearAttentionGradients& g_;
  const Gradient gradient_;
  const LinearChunk<Dot>& chunk_;
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
