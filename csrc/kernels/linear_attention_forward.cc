// Linear attention, forward. A task is a head of a run, whose state stays in the cache from chunk to
// chunk; or, where those are too few to fill a machine, a head of a span:
//
//   1. each span's own last state, as if it began from zero     (spans in parallel)
//   2. boundary[k] += decay of span k * boundary[k - 1]         (in order)
//   3. each span's output, from the state at its boundary       (spans in parallel)
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

template <class Dot>
class Forward {
  using E = typename Dot::Element;
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;
  static constexpr bool kPairs = Dot::kDepth == 2;
  static constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat;

 public:
  explicit Forward(const LinearAttentionParams& p)
      : p_(p), chunk_(p_), depth_(ceil_div(p.key_channels, Dot::kDepth)),
        mixed_ld_(round_up(depth_ + chunk_.tokens / Dot::kDepth, L)),
        in_rows_(p.normalized || p.kind == Gate::kChannel) {}

  void run() {
    const int64_t whole = p_.runs.run_count * p_.heads, parts = p_.runs.span_count * p_.heads;
    const int64_t boundaries = p_.runs.boundary_count * p_.heads;
    const bool few = whole < kEnoughTasks && boundaries > 0;
    Scratch own(few && p_.boundaries == nullptr ? boundaries * chunk_.boundary_size() * kBytes : 0);
    if (few && p_.boundaries == nullptr) p_.boundaries = own.at(0);
    const int threads = threads_for(max_of(whole, few ? parts : 0), p_.threads);
    Arena measure;
    lay_out(measure);
    Scratch scratch(measure.used() * threads);
    const auto work = [&](int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      return lay_out(arena);
    };
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

 private:
  static constexpr int64_t kBytes = sizeof(T);

  struct Workspace {
    Decay<T> decay;
    ChannelDecay<T> channel_decay;
    LinearState<T> state;  ///< in the panel, where that is not of pairs
    E* panel;              ///< [depth + tokens / Dot::kDepth][value_width]
    E* mixed;              ///< [tokens][mixed_ld]: exp(a_t) q, M
    E* turned;             ///< k^T [depth][tokens]
    E* q;                  ///< a copy, where memory does not have the form
    E* k;                  ///< exp(a_n - a_s) k_s, by token
    T *q_rows, *k_rows;    ///< [tokens][key_width] each: q and k, then the same times their decays
    T* scores;             ///< [tokens][tokens]
    T* y;                  ///< [tokens][value_width]
    T* sums;               ///< [tokens]: of the rows of M
    T* factor;             ///< [tokens]: what y is multiplied by
    T* whole;              ///< [key_width]: what the state decays by over the chunk
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    const int64_t tokens = chunk_.tokens, rows = tokens / Dot::kDepth;
    w.decay.lay_out(arena, p_.kind == Gate::kToken ? tokens : 0);
    w.channel_decay.lay_out(arena, p_.kind == Gate::kChannel ? chunk_.key_width : 0);
    w.panel = arena.take<E>((depth_ + rows) * chunk_.value_width);
    w.state.s = kPairs ? arena.take<T>(chunk_.state_size) : reinterpret_cast<T*>(w.panel);
    w.state.z = arena.take<T>(p_.normalized ? chunk_.key_width : 0);
    w.mixed = arena.take<E>(tokens * mixed_ld_);
    w.turned = arena.take<E>(depth_ * tokens);
    w.q = arena.take<E>(tokens * depth_);
    w.k = arena.take<E>(rows * chunk_.key_width);
    w.q_rows = arena.take<T>(in_rows_ ? tokens * chunk_.key_width : 0);
    w.k_rows = arena.take<T>(in_rows_ ? tokens * chunk_.key_width : 0);
    w.scores = arena.take<T>(tokens * tokens);
    w.y = arena.take<T>(tokens * chunk_.value_width);
    w.sums = arena.take<T>(tokens);
    w.factor = arena.take<T>(tokens);
    w.whole = arena.take<T>(chunk_.key_width);
    return w;
  }

  /// Which tokens a chunk has, of which head.
  struct Place {
    const Run& run;
    int64_t head, t0, n;
  };
  TokenRows query_rows(const SequenceTensor& x, const Place& at) const {
    return chunk_.rows(x, at.run, at.head, at.t0);
  }
  TokenRows key_rows(const SequenceTensor& x, const Place& at) const {
    return chunk_.rows(x, at.run, chunk_.kv_head(at.head), at.t0);
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
  void own_state(const Span& span, int64_t head, T* decays, Workspace w) const {
    const Run& run = p_.runs.runs[span.run];
    if (span.index + 1 == run.spans()) return;
    if (span.index == 0) {
      chunk_.load_initial(run, head, w.state);
    } else {
      chunk_.load_state(nullptr, nullptr, w.state);
    }
    T* decay = decays + ((run.boundary + span.index) * p_.heads + head) * p_.key_channels;
    for (int64_t i = 0; i < p_.key_channels; ++i) decay[i] = T(1);
    for (int64_t t0 = run.begin_of(span.index); t0 < run.end_of(span.index); t0 += chunk_.tokens) {
      const Place at{run, head, t0, chunk_.tokens};
      chunk_.prepare(run, head, t0, at.n, w.decay, w.channel_decay);
      load_values(at, w);
      advance(at, w);
      if (p_.kind == Gate::kNone) continue;
      for (int64_t i = 0; i < p_.key_channels; ++i) decay[i] *= w.whole[i];
    }
    chunk_.store_boundary(w.state, run.boundary + span.index, head);
  }

  void join(const Run& run, int64_t head, const T* decays) const {
    for (int64_t k = 1; k + 1 < run.spans(); ++k) {
      const T* decay = decays + ((run.boundary + k) * p_.heads + head) * p_.key_channels;
      const T* before = chunk_.boundary(run.boundary + k - 1, head);
      T* state = chunk_.boundary(run.boundary + k, head);
      const int64_t columns = p_.value_channels;
      for (int64_t i = 0; i < p_.key_channels; ++i) {
        for (int64_t c = 0; c < columns; c += L) {
          const int64_t cell = i * columns + c, n = min_of<int64_t>(columns - c, L);
          store_first(state + cell,
                      load_first(state + cell, n) + decay[i] * load_first(before + cell, n), n);
        }
      }
      if (!p_.normalized) continue;
      for (int64_t i = 0; i < p_.key_channels; ++i) {
        chunk_.norm_of(state)[i] += decay[i] * chunk_.norm_of(before)[i];
      }
    }
  }

  // ---- chunk by chunk

  /// One span from the state in w.state, which is moved to the span's end if anyone wants it there.
  void walk(const Run& run, int64_t k, int64_t head, bool wanted, Workspace w) const {
    const int64_t last = run.end_of(k);
    for (int64_t t0 = run.begin_of(k); t0 < last; t0 += chunk_.tokens) {
      const Place at{run, head, t0, min_of(chunk_.tokens, last - t0)};
      const Place next{run, head, t0 + at.n, min_of(chunk_.tokens, run.end - t0 - at.n)};
      chunk_.prepare(run, head, t0, at.n, w.decay, w.channel_decay);
      // Memory is asked for a chunk ahead, a tensor at a time, so that it answers while products run.
      prefetch(query_rows(p_.q, next), next.n, p_.key_channels);
      prefetch<true>(query_rows(p_.out, at), at.n, p_.value_channels);
      load_queries(at, w);
      load_values(at, w);
      score(at, w);
      prefetch(key_rows(p_.k, next), next.n, p_.key_channels);
      chunk_.mix(w.decay, w.scores, at.n, w.mixed + depth_, mixed_ld_, w.sums);
      multiply(at.n, w);
      prefetch(key_rows(p_.v, next), next.n, p_.value_channels);
      weigh(at, w);
      store_rows<T>(w.y, chunk_.value_width, at.n, p_.value_channels, w.factor, query_rows(p_.out, at));
      if (wanted || t0 + at.n < last) advance(at, w);
    }
  }

  /// exp(a_t) q to where it is multiplied.
  void load_queries(const Place& at, const Workspace& w) const {
    const TokenRows q = query_rows(p_.q, at);
    const T* from_start = p_.kind == Gate::kToken ? w.decay.from_start : nullptr;
    if (p_.kind == Gate::kChannel) {
      load_padded(q, at.n, w.q_rows);
      load_padded(key_rows(p_.k, at), at.n, w.k_rows);
      w.channel_decay.scores(w.q_rows, w.k_rows, at.n, w.scores);
      chunk_.multiply_rows(w.q_rows, w.channel_decay.from_start, at.n, chunk_.key_width, w.q_rows);
    } else if (in_rows_) {
      copy_rows<T>(q, at.n, p_.key_channels, chunk_.key_width, from_start, w.q_rows);
    }
    copy_by_channel<Dot>(in_rows_ ? TokenRows{w.q_rows, kDtype, chunk_.key_width} : q, at.n,
                         p_.key_channels, in_rows_ ? nullptr : from_start, w.mixed, mixed_ld_);
  }

  /// Rows past the last token are zero.
  void load_padded(TokenRows x, int64_t n, T* out) const {
    copy_rows<T>(x, n, p_.key_channels, chunk_.key_width, nullptr, out);
    __builtin_memset(out + n * chunk_.key_width, 0,
                     size_t((chunk_.tokens - n) * chunk_.key_width) * sizeof(T));
  }

  void load_values(const Place& at, const Workspace& w) const {
    copy_by_token<Dot>(key_rows(p_.v, at), at.n, p_.value_channels, nullptr,
                       w.panel + depth_ * chunk_.value_width, chunk_.value_width);
  }

  /// q k^T, strips of it up to the diagonal.
  void score(const Place& at, const Workspace& w) const {
    if (p_.kind == Gate::kChannel) return;  // with the queries
    transposed<Dot>(key_rows(p_.k, at), at.n, p_.key_channels, w.turned, chunk_.tokens);
    const Operand<Dot> q = p_.kind == Gate::kNone
                               ? Operand<Dot>{w.mixed, mixed_ld_}
                               : by_channel<Dot>(query_rows(p_.q, at), at.n, p_.key_channels, w.q);
    for (int64_t t = 0; t < at.n; t += kStrip) {
      const int64_t count = min_of(kStrip, at.n - t);
      Product<Dot>{q.data + t * q.stride,        q.stride,     1, w.turned, chunk_.tokens,
                   w.scores + t * chunk_.tokens, chunk_.tokens}
          .template run_as<Start::kZero, false, true>(count, round_up(t + count, L), depth_);
    }
  }

  /// Y. A zero of M must not meet an infinite value of the future (tile.h).
  void multiply(int64_t n, const Workspace& w) const {
    if constexpr (kPairs) {
      copy_by_token<Dot>({w.state.s, kDtype, chunk_.value_width}, p_.key_channels, chunk_.value_width,
                         nullptr, w.panel, chunk_.value_width);
    }
    const Operand<Dot> values{w.panel + depth_ * chunk_.value_width, chunk_.value_width};
    all_finite<Dot>(values, ceil_div(n, Dot::kDepth), chunk_.value_width) ? multiply_as<false>(n, w)
                                                                          : multiply_as<true>(n, w);
  }
  template <bool kGuarded>
  void multiply_as(int64_t n, const Workspace& w) const {
    const int64_t width = chunk_.value_width;
    for (int64_t t = 0; t < n; t += kStrip) {
      const int64_t count = min_of(kStrip, n - t);
      Product<Dot>{w.mixed + t * mixed_ld_, mixed_ld_, 1, w.panel, width, w.y + t * width, width}
          .template run_as<Start::kZero, kGuarded, true>(count, width,
                                                         depth_ + ceil_div(t + count, Dot::kDepth));
    }
  }

  /// What rows of Y are multiplied by: the scale, over the normaliser where there is one.
  void weigh(const Place& at, const Workspace& w) const {
    const T scale = T(p_.scale);
    T* kept = p_.denominators ? chunk_.denominators(at.run, at.head, at.t0) : nullptr;
    for (int64_t t = 0; t < at.n; ++t) {
      if (!p_.normalized) {
        w.factor[t] = scale;
        continue;
      }
      Vec<T> sum = {};
      for (int64_t c = 0; c < chunk_.key_width; c += L) {
        sum += load(w.q_rows + t * chunk_.key_width + c) * load(w.state.z + c);
      }
      const T denominator = scale * (w.sums[t] + sum_of_lanes<T>(sum)) + T(p_.eps);
      w.factor[t] = denominator == T(0) ? T(0) : scale / denominator;
      if (kept) kept[t] = denominator;
    }
  }

  /// The state behind a chunk whose decays are prepared and whose values are loaded.
  void advance(const Place& at, const Workspace& w) const {
    const TokenRows key = key_rows(p_.k, at);
    const T* to_end = p_.kind == Gate::kToken ? w.decay.to_end : nullptr;
    Operand<Dot> k{w.k, chunk_.key_width};
    if (in_rows_) {
      copy_rows<T>(key, at.n, p_.key_channels, chunk_.key_width, to_end, w.k_rows);
      if (p_.kind == Gate::kChannel) {
        chunk_.multiply_rows(w.k_rows, w.channel_decay.to_end, at.n, chunk_.key_width, w.k_rows);
      }
      if constexpr (kPairs) {
        copy_by_token<Dot>({w.k_rows, kDtype, chunk_.key_width}, at.n, chunk_.key_width, nullptr, w.k,
                           chunk_.key_width);
      } else {
        k.data = w.k_rows;
      }
    } else if (to_end) {
      copy_by_token<Dot>(key, at.n, p_.key_channels, to_end, w.k, chunk_.key_width);
    } else {
      k = by_token<Dot>(key, at.n, p_.key_channels, false, w.k);
    }
    for (int64_t c = 0; c < chunk_.key_width && p_.kind != Gate::kNone; c += L) {
      store(w.whole + c,
            p_.kind == Gate::kToken ? broadcast(w.decay.whole) : load(w.channel_decay.whole() + c));
    }
    const int64_t width = chunk_.value_width, depth = ceil_div(at.n, Dot::kDepth);
    Product<Dot> product{k.data, 1, k.stride, w.panel + depth_ * width, width, w.state.s, width};
    product.rescale = w.whole;
    if (p_.kind == Gate::kNone) {
      product.template run_as<Start::kAccumulate, false, false>(p_.key_channels, width, depth);
    } else {
      product.template run_as<Start::kRescaleRows, false, false>(p_.key_channels, width, depth);
    }
    if (p_.normalized) advance_norm(at.n, w);
  }

  void advance_norm(int64_t n, const Workspace& w) const {
    for (int64_t c = 0; c < chunk_.key_width; c += L) {
      Vec<T> z = load(w.state.z + c);
      if (p_.kind != Gate::kNone) z *= load(w.whole + c);
      for (int64_t t = 0; t < n; ++t) z += load(w.k_rows + t * chunk_.key_width + c);
      store(w.state.z + c, z);
    }
  }

  LinearAttentionParams p_;  // a copy: boundaries may be our own
  LinearChunk<Dot> chunk_;
  int64_t depth_;     ///< elements of a row of key channels
  int64_t mixed_ld_;
  bool in_rows_;      ///< whether q and k are needed in the type of accumulation
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
