// Linear attention, forward. A task is a head of a run, whose state stays in the cache from chunk to
// chunk; or, where those are too few to fill a machine, a head of a span:
//
//   1. each span's own last state, as if it began from zero     (spans in parallel)
//   2. boundary[k] += decay of span k * boundary[k - 1]         (in order)
//   3. each span's output, from the state at its boundary       (spans in parallel)
//
// Not causal, 2 is the sum over the spans, and a span's output is its queries times that.
//
// Counted for 64 channels and chunks of 32, a token and head: 4096 multiply-adds for the state, 4096 to
// read it, 3072 inside the chunk (24 of 32 keys a row, on average).

#include "kernels/linear_attention_chunk.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

/// Tasks that are worth having, at the least: a constant, so that results do not depend on the machine.
/// States of spans cost a third more arithmetic.
constexpr int64_t kEnoughTasks = 8;

/// Lines of the next chunk's rows to ask for before each tile of a product: measured.
constexpr int64_t kLines = 20;

template <class Dot>
class Forward {
  using E = typename Dot::Element;
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kBytes = sizeof(T);
  static constexpr bool kPairs = Dot::kDepth == 2;
  static constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat;

 public:
  explicit Forward(const LinearAttentionParams& p)
      : p_(p), chunk_(p_), depth_(ceil_div(p.key_channels, Dot::kDepth)),
        in_rows_(p.normalized || p.kind == Gate::kChannel),
        in_place_(is_native<Dot>(p.dtype) && !kPairs && p.value_channels % L == 0) {}

  void run() { p_.causal ? run_causal() : run_full(); }

 private:
  struct Workspace {
    LinearDecay<T> decay;
    LinearState<T> state;
    E* packed;             ///< S, where it is multiplied in pairs
    E* decayed;            ///< exp(a_t) q [tokens][decayed_ld()]
    E* mixed;              ///< M [tokens][tokens / Dot::kDepth], in the place of scores if it fits
    E* turned;             ///< k^T [depth][tokens]
    E *q, *v;              ///< copies, where memory does not have the form
    E* k;                  ///< exp(a_n - a_s) k_s, by token
    T *q_rows, *k_rows;    ///< [tokens][key_width] each: q and k, then the same times their decays
    T* scores;             ///< [tokens][tokens]
    T* y;                  ///< [tokens][value_width]
    T* sums;               ///< [tokens]: of the rows of M
    T* factor;             ///< [tokens]: what y is multiplied by
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    const int64_t tokens = chunk_.tokens, rows = tokens / Dot::kDepth;
    w.decay.lay_out(arena, p_.kind, tokens, chunk_.key_width);
    w.state.s = arena.take<T>(chunk_.state_size);
    w.state.z = arena.take<T>(p_.normalized ? chunk_.key_width : 0);
    w.packed = arena.take<E>(kPairs ? depth_ * chunk_.value_width : 0);
    w.decayed = arena.take<E>(tokens * decayed_ld());
    w.turned = arena.take<E>(depth_ * tokens);
    w.q = arena.take<E>(tokens * depth_);
    w.v = arena.take<E>(rows * chunk_.value_width);
    w.k = arena.take<E>(rows * chunk_.key_width);
    w.q_rows = arena.take<T>(in_rows_ ? tokens * chunk_.key_width : 0);
    w.k_rows = arena.take<T>(in_rows_ ? tokens * chunk_.key_width : 0);
    w.scores = arena.take<T>(tokens * tokens);
    w.mixed = kPairs ? arena.take<E>(tokens * rows) : reinterpret_cast<E*>(w.scores);
    w.y = arena.take<T>(tokens * chunk_.value_width);
    w.sums = arena.take<T>(tokens);
    w.factor = arena.take<T>(tokens);
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

  void run_causal() {
    const int64_t whole = p_.runs.run_count * p_.heads, parts = p_.runs.span_count * p_.heads;
    const int64_t boundaries = p_.runs.boundary_count * p_.heads;
    const bool few = whole < kEnoughTasks && boundaries > 0;
    Scratch own(few && p_.boundaries == nullptr ? boundaries * chunk_.boundary_size() * kBytes : 0);
    if (few && p_.boundaries == nullptr) p_.boundaries = own.at(0);
    const int threads = threads_for(few ? parts : whole, p_.threads);
    Scratch scratch(workspace_bytes() * threads);
    const auto work = [&](int thread) { return workspace(scratch, thread); };
    if (!few) {
      parallel_for(whole, threads, [&](int64_t task, int thread) {
        run_whole(p_.runs.runs[task / p_.heads], task % p_.heads, work(thread));
      });
      return;
    }
    Scratch decay_space(boundaries * p_.key_channels * kBytes);
    T* decays = reinterpret_cast<T*>(decay_space.at(0));
    parallel_for(parts, threads, [&](int64_t task, int thread) {
      own_state(p_.runs.spans[task / p_.heads], task % p_.heads, decays, work(thread));
    });
    parallel_for(whole, threads, [&](int64_t task, int) {
      join(p_.runs.runs[task / p_.heads], task % p_.heads, decays);
    });
    parallel_for(parts, threads, [&](int64_t task, int thread) {
      const Span& span = p_.runs.spans[task / p_.heads];
      run_span(p_.runs.runs[span.run], span.index, task % p_.heads, work(thread));
    });
    for (int64_t task = 0; task < whole; ++task) {
      const Run& run = p_.runs.runs[task / p_.heads];
      if (run.spans() == 0) run_whole(run, task % p_.heads, work(0));
    }
  }

  // ---- a head of a run

  void run_whole(const Run& run, int64_t head, const Workspace& w) const {
    chunk_.load_initial(run, head, w.state);
    for (int64_t k = 0; k < run.spans(); ++k) {
      walk(run, k, head, k + 1 < run.spans() || run.last >= 0, w);
      if (p_.boundaries && k + 1 < run.spans()) chunk_.store_boundary(w.state, run.boundary + k, head);
    }
    keep_last(run, head, w);
  }

  void keep_last(const Run& run, int64_t head, const Workspace& w) const {
    if (run.last < 0) return;
    chunk_.store_state(w.state, chunk_.state_at(p_.last, run.last, head),
                       chunk_.norm_at(p_.last_norm, run.last, head));
  }

  // ---- a head of a span

  void run_span(const Run& run, int64_t k, int64_t head, const Workspace& w) const {
    if (k == 0) {
      chunk_.load_initial(run, head, w.state);
    } else {
      chunk_.load_boundary(run.boundary + k - 1, head, w.state);
    }
    walk(run, k, head, k + 1 == run.spans() && run.last >= 0, w);
    if (k + 1 == run.spans()) keep_last(run, head, w);
  }

  /// The state that a span leaves if it begins from zero (the first: from the run's initial state), and
  /// how much of what it began from is left.
  void own_state(const Span& span, int64_t head, T* decays, const Workspace& w) const {
    const Run& run = p_.runs.runs[span.run];
    if (span.index + 1 == run.spans()) return;
    if (span.index == 0) {
      chunk_.load_initial(run, head, w.state);
    } else {
      chunk_.load_state(nullptr, nullptr, w.state);
    }
    T* decay = decays + ((run.boundary + span.index) * p_.heads + head) * p_.key_channels;
    for (int64_t i = 0; i < p_.key_channels; ++i) decay[i] = T(1);
    add_keys(run, span.index, head, decay, w);
    chunk_.store_boundary(w.state, run.boundary + span.index, head);
  }

  /// Moves the state over a span; its decays are multiplied into `decay`, a number a row of the state.
  void add_keys(const Run& run, int64_t span, int64_t head, T* decay, Workspace w) const {
    const int64_t last = run.end_of(span);
    for (int64_t t0 = run.begin_of(span); t0 < last; t0 += chunk_.tokens) {
      const LinearPlace at{run, head, t0, min_of(chunk_.tokens, last - t0)};
      const LinearPlace next{run, head, t0 + at.n, min_of(chunk_.tokens, last - t0 - at.n)};
      Ahead ahead(kLines);
      ahead.add(chunk_.key_rows(p_.v, next), next.n, p_.value_channels);
      ahead.add(chunk_.key_rows(p_.k, next), next.n, p_.key_channels);
      w.decay.prepare(p_, run, head, t0, at.n, chunk_.tokens);
      advance(at, values(at, w), w, ahead);
      ahead.ask_all();
      if (p_.kind == Gate::kNone) continue;
      for (int64_t i = 0; i < p_.key_channels; ++i) decay[i] *= w.decay.whole[i];
    }
  }

  void join(const Run& run, int64_t head, const T* decays) const {
    for (int64_t k = 1; k + 1 < run.spans(); ++k) {
      chunk_.add_decayed(chunk_.boundary(run.boundary + k - 1, head),
                         decays + ((run.boundary + k) * p_.heads + head) * p_.key_channels,
                         chunk_.boundary(run.boundary + k, head));
    }
  }

  // ---- not causal

  void run_full() {
    const int64_t parts = p_.key_runs.span_count * p_.heads, whole = p_.runs.run_count * p_.heads;
    const int64_t size = chunk_.boundary_size();
    Scratch own(p_.boundaries ? 0 : whole * size * kBytes);
    if (p_.boundaries == nullptr) p_.boundaries = own.at(0);
    const int threads = threads_for(max_of(parts, p_.runs.span_count * p_.heads), p_.threads);
    Scratch scratch(workspace_bytes() * threads), part_space(parts * size * kBytes);
    T* sums = reinterpret_cast<T*>(part_space.at(0));
    parallel_for(parts, threads, [&](int64_t task, int thread) {
      const Workspace w = workspace(scratch, thread);
      const Span& span = p_.key_runs.spans[task / p_.heads];
      chunk_.load_state(nullptr, nullptr, w.state);
      add_keys(p_.key_runs.runs[span.run], span.index, task % p_.heads, nullptr, w);
      chunk_.store_state(w.state, sums + task * size, chunk_.norm_of(sums + task * size));
    });
    parallel_for(whole, threads, [&](int64_t task, int thread) {
      add_up(task / p_.heads, task % p_.heads, sums, workspace(scratch, thread));
    });
    parallel_for(p_.runs.span_count * p_.heads, threads, [&](int64_t task, int thread) {
      const Span& span = p_.runs.spans[task / p_.heads];
      read_all(span, task % p_.heads, workspace(scratch, thread));
    });
  }

  /// A run's state: what it began with, and the sums of its spans in order.
  void add_up(int64_t index, int64_t head, const T* sums, const Workspace& w) const {
    const Run& run = p_.key_runs.runs[index];
    chunk_.load_initial(run, head, w.state);
    chunk_.store_boundary(w.state, index, head);
    T* total = chunk_.boundary(index, head);
    const int64_t size = chunk_.boundary_size();
    for (int64_t k = 0; k < run.spans(); ++k) {
      chunk_.add_decayed(sums + ((run.first_span + k) * p_.heads + head) * size, nullptr, total);
    }
    chunk_.load_boundary(index, head, w.state);
    keep_last(run, head, w);
  }

  void read_all(const Span& span, int64_t head, const Workspace& w) const {
    const Run& run = p_.runs.runs[span.run];
    chunk_.load_boundary(span.run, head, w.state);
    const E* state = pack_state(w);
    const int64_t last = run.end_of(span.index);
    for (int64_t t0 = run.begin_of(span.index); t0 < last; t0 += chunk_.tokens) {
      const LinearPlace at{run, head, t0, min_of(chunk_.tokens, last - t0)};
      const LinearPlace next{run, head, t0 + at.n, min_of(chunk_.tokens, last - t0 - at.n)};
      Ahead ahead(kLines);
      ahead.add(chunk_.query_rows(p_.q, next), next.n, p_.key_channels);
      ahead.add(chunk_.query_rows(p_.out, next), next.n, p_.value_channels);
      const Operand<Dot> q = queries(at, w);
      chunk_.weigh(w.q_rows, w.state.z, nullptr, at.n, chunk_.denominators(run, head, t0), w.factor);
      const Target y = target(at, w);
      read<false>(0, at.n, q, state, {}, 0, y, w, ahead);
      ahead.ask_all();
      finish(at, y, w);
    }
  }

  // ---- chunk by chunk

  /// One span from the state in w.state, which is moved to the span's end if anyone wants it there.
  void walk(const Run& run, int64_t k, int64_t head, bool wanted, Workspace w) const {
    const int64_t last = run.end_of(k);
    for (int64_t t0 = run.begin_of(k); t0 < last; t0 += chunk_.tokens) {
      const LinearPlace at{run, head, t0, min_of(chunk_.tokens, last - t0)};
      const LinearPlace next{run, head, t0 + at.n, min_of(chunk_.tokens, run.end - t0 - at.n)};
      Ahead ahead(kLines);
      ahead.add(chunk_.query_rows(p_.q, next), next.n, p_.key_channels);
      ahead.add(chunk_.key_rows(p_.k, next), next.n, p_.key_channels);
      ahead.add(chunk_.key_rows(p_.v, next), next.n, p_.value_channels);
      ahead.add(chunk_.query_rows(p_.out, next), next.n, p_.value_channels);
      w.decay.prepare(p_, run, head, t0, at.n, chunk_.tokens);
      const Operand<Dot> q = queries(at, w), v = values(at, w);
      score(at, q, w, ahead);
      chunk_.mix(w.decay, w.scores, at.n, w.mixed, chunk_.tokens / Dot::kDepth, w.sums);
      chunk_.weigh(w.q_rows, w.state.z, w.sums, at.n, chunk_.denominators(run, head, t0), w.factor);
      multiply(at, q, v, w, ahead);
      if (wanted || t0 + at.n < last) advance(at, v, w, ahead);
      ahead.ask_all();
    }
  }

  /// exp(a_t) q.
  Operand<Dot> queries(const LinearPlace& at, const Workspace& w) const {
    TokenRows q = chunk_.query_rows(p_.q, at);
    const T* from_start = p_.kind == Gate::kToken ? w.decay.token.from_start : nullptr;
    const int64_t width = chunk_.key_width;
    if (in_rows_) {
      load_padded(q, at.n, w.q_rows);
      if (p_.kind == Gate::kChannel) {
        load_padded(chunk_.key_rows(p_.k, at), at.n, w.k_rows);
        w.decay.channel.scores(w.q_rows, w.k_rows, at.n, w.scores);
      }
      if (p_.kind != Gate::kNone) w.decay.from_start(w.q_rows, width, at.n, w.q_rows, width);
      q = {w.q_rows, kDtype, width}, from_start = nullptr;
      if (!kPairs) return by_channel<Dot>(q, at.n, p_.key_channels, w.decayed);
    } else if (p_.kind == Gate::kNone) {
      return by_channel<Dot>(q, at.n, p_.key_channels, w.decayed);
    }
    copy_by_channel<Dot>(q, at.n, p_.key_channels, from_start, w.decayed, decayed_ld());
    return {w.decayed, decayed_ld()};
  }
  int64_t decayed_ld() const { return round_up(depth_, L); }

  /// Rows past the last token are zero.
  void load_padded(TokenRows x, int64_t n, T* out) const {
    copy_rows<T>(x, n, p_.key_channels, chunk_.key_width, nullptr, out);
    __builtin_memset(out + n * chunk_.key_width, 0,
                     size_t((chunk_.tokens - n) * chunk_.key_width) * sizeof(T));
  }

  Operand<Dot> values(const LinearPlace& at, const Workspace& w) const {
    return by_token<Dot>(chunk_.key_rows(p_.v, at), at.n, p_.value_channels, true, w.v);
  }

  /// q k^T, strips of it up to the diagonal. decayed: what queries() gave, which are q without gates.
  void score(const LinearPlace& at, Operand<Dot> decayed, const Workspace& w, Ahead& ahead) const {
    if (p_.kind == Gate::kChannel) return;  // with the queries
    transposed<Dot>(chunk_.key_rows(p_.k, at), at.n, p_.key_channels, w.turned, chunk_.tokens);
    const Operand<Dot> q = p_.kind == Gate::kNone ? decayed
                                                  : by_channel<Dot>(chunk_.query_rows(p_.q, at), at.n,
                                                                    p_.key_channels, w.q);
    for (int64_t t = 0; t < at.n; t += kStrip) {
      const int64_t count = min_of(kStrip, at.n - t);
      Product<Dot>{q.data + t * q.stride,        q.stride,     1, w.turned, chunk_.tokens,
                   w.scores + t * chunk_.tokens, chunk_.tokens}
          .template run_as<Start::kZero, false, true>(count, round_up(t + count, L), depth_,
                                                      Between{ahead});
    }
  }

  /// The state as products read it.
  const E* pack_state(const Workspace& w) const {
    if constexpr (kPairs) {
      copy_by_token<Dot>({w.state.s, kDtype, chunk_.value_width}, p_.key_channels, chunk_.value_width,
                         nullptr, w.packed, chunk_.value_width);
      return w.packed;
    } else {
      return w.state.s;
    }
  }

  /// Where Y is summed up: in the result itself if that has its form.
  struct Target {
    T* data;
    int64_t stride;
  };
  Target target(const LinearPlace& at, const Workspace& w) const {
    if (!in_place_) return {w.y, chunk_.value_width};
    const TokenRows out = chunk_.query_rows(p_.out, at);
    return {static_cast<T*>(const_cast<void*>(out.data)), out.stride};
  }
  void finish(const LinearPlace& at, Target y, const Workspace& w) const {
    if (in_place_) return;
    store_rows<T>(y.data, y.stride, at.n, p_.value_channels, kPairs ? w.factor : nullptr,
                  chunk_.query_rows(p_.out, at));
  }

  /// Y. A zero of M must not meet an infinite value of the future (tile.h).
  void multiply(const LinearPlace& at, Operand<Dot> q, Operand<Dot> v, const Workspace& w,
                Ahead& ahead) const {
    const E* state = pack_state(w);
    const Target y = target(at, w);
    const bool finite = all_finite<Dot>(v, ceil_div(at.n, Dot::kDepth), chunk_.value_width);
    for (int64_t t = 0; t < at.n; t += kStrip) {
      const int64_t count = min_of(kStrip, at.n - t), depth = ceil_div(t + count, Dot::kDepth);
      finite ? read<false>(t, count, q, state, v, depth, y, w, ahead)
             : read<true>(t, count, q, state, v, depth, y, w, ahead);
    }
    finish(at, y, w);
  }

  /// Rows of Y: of queries in the state, and of M, so deep, in the values.
  template <bool kGuarded>
  void read(int64_t t, int64_t count, Operand<Dot> q, const E* state, Operand<Dot> v, int64_t depth,
            Target y, const Workspace& w, Ahead& ahead) const {
    const int64_t width = chunk_.value_width, ld = chunk_.tokens / Dot::kDepth;
    const Product<Dot> product{q.data + t * q.stride, q.stride, 1, state, width,
                               y.data + t * y.stride, y.stride};
    if constexpr (kPairs) {
      product.template run_as<Start::kZero, false, true>(count, width, depth_, Between{ahead});
      Product<Dot>{w.mixed + t * ld, ld, 1, v.data, v.stride, product.c, y.stride}
          .template run_as<Start::kAccumulate, kGuarded, true>(count, width, depth, Between{ahead});
    } else {
      product.template run_as<Start::kZero, false, true>(
          count, width, depth_,
          More<Dot, kGuarded, Ahead>{w.mixed + t * ld, ld, v.data, v.stride, depth, w.factor + t,
                                     ahead});
    }
  }

  /// The state behind a chunk whose decays are prepared.
  void advance(const LinearPlace& at, Operand<Dot> v, const Workspace& w, Ahead& ahead) const {
    const TokenRows key = chunk_.key_rows(p_.k, at);
    Operand<Dot> k{w.k, chunk_.key_width};
    if (in_rows_) {
      copy_rows<T>(key, at.n, p_.key_channels, chunk_.key_width, nullptr, w.k_rows);
      if (p_.kind != Gate::kNone) w.decay.to_end(w.k_rows, k.stride, at.n, w.k_rows, k.stride);
      if constexpr (kPairs) {
        copy_by_token<Dot>({w.k_rows, kDtype, chunk_.key_width}, at.n, chunk_.key_width, nullptr, w.k,
                           chunk_.key_width);
      } else {
        k.data = w.k_rows;
      }
    } else if (p_.kind == Gate::kToken) {
      copy_by_token<Dot>(key, at.n, p_.key_channels, w.decay.token.to_end, w.k, chunk_.key_width);
    } else {
      k = by_token<Dot>(key, at.n, p_.key_channels, false, w.k);
    }
    const int64_t width = chunk_.value_width, depth = ceil_div(at.n, Dot::kDepth);
    const Product<Dot> product{k.data, 1, k.stride, v.data, v.stride, w.state.s, width};
    chunk_.template advance<Start::kRescaleRows>(product, w.decay, p_.key_channels, width, depth,
                                                 Between{ahead});
    if (p_.normalized) {
      chunk_.advance_norm(w.decay.factors(), w.k_rows, chunk_.key_width, nullptr, at.n, w.state.z);
    }
  }

  LinearAttentionParams p_;  // a copy: boundaries may be our own
  LinearChunk<Dot> chunk_;
  int64_t depth_;     ///< elements of a row of key channels
  bool in_rows_;      ///< whether q and k are needed in the type of accumulation
  bool in_place_;     ///< whether Y is summed up where the result lies
};

}  // namespace

void linear_attention_forward(const LinearAttentionParams& p) {
  if (p.dtype == Dtype::kDouble) return Forward<DotDouble>(p).run();
#if defined(LONGSPAN_BF16_DOT)
  if (p.dtype == Dtype::kBfloat16 && p.key_channels % 2 == 0) return Forward<DotBf16>(p).run();
#endif
  Forward<DotFloat>(p).run();
}

}  // namespace longspan::LONGSPAN_ISA
