// The delta rule, backward. Per span and value head the states before each chunk, r and N are calculated
// again, forwards from the boundary; then its chunks are walked backwards with dS, the gradient of the
// state behind the chunk (delta_rule_chunk.h has the forward's names; dY is d_out times the scale):
//
//   dN  = M^T dY + exp(a_n - a_s) k_s dS            D = (1 - H^T B) dN      dX = B D
//   dV  = dX                                        d_beta_t = r_t . D_t
//
//          ( dY )                                     ( dQ  )
//   G  =   (-dX )      exp(a_t) G S^T + (G N^T) K  =  ( dK+ )       what q_t and k_t get as readers
//
//   dK- = (dY N^T)^T Q - (dX N^T)^T K + exp(a_n - a_s) N dS^T       what k_s gets as what is read
//   dS  = exp(a_n) dS + (exp(a_t) q_t, exp(a_t) k_t)^T G
//
// dY N^T is lower triangular, dX N^T strictly, with the decays of M and P in them. A gate's gradient is
// that of all decays from its token on: with what is behind the chunk, sum of S dS at its end, and
// q_t dQ_t + k_t dK+_t - k_t dK-_t within. S^T and dS^T, value channels by key channels, are what most
// products read.
//
// A task is a head of a run with all its value heads, or, where those are too few:
//
//   1. the pairs of all chunks                                    (spans and value heads in parallel)
//   2. dS at each boundary, a block of value channels             (blocks and value heads in parallel)
//   3. everything else                                            (spans and heads in parallel)
//
// Counted as the forward is: 9 * 4096 multiply-adds with states and 9 * 1536 inside the chunk, a quarter
// of it for calculating again. 2 is a third more by count, and half by the clock.

#include "kernels/delta_rule_chunk.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

template <class Dot>
class Backward {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t C = kDeltaChunk;
  static constexpr int64_t kBytes = sizeof(T);
  static constexpr int64_t kChunks = kSpan / C;  ///< of a span, at most
  /// Gates below make a decay of exactly zero, and have no gradient.
  static constexpr T kForgets = sizeof(T) == 8 ? T(-746) : T(-104);
  using Chunk = DeltaChunk<Dot>;

 public:
  Backward(const DeltaRuleParams& p, const DeltaRuleGradients& g) : p_(p), g_(g), chunk_(p) {}

  void run() {
    const RunTable& table = p_.runs;
    const int64_t whole = table.run_count * p_.heads, values = table.run_count * p_.value_heads;
    const int64_t parts = table.span_count * p_.value_heads;
    few_ = whole < kEnoughTasks && table.boundary_count > 0;
    block_ = max_of<int64_t>(chunk_.value_width, L);
    if (few_) {
      const int64_t wanted = ceil_div(kEnoughTasks, max_of<int64_t>(values, 1));
      block_ = max_of<int64_t>(round_up(ceil_div(block_, wanted), L), 2 * L);
    }
    const int64_t blocks = ceil_div(chunk_.value_width, block_);
    const int threads = threads_for(few_ ? max_of(parts, values * blocks) : whole, p_.threads);
    Scratch scratch(workspace_bytes() * threads);
    const auto work = [&](int thread) { return workspace(scratch, thread); };
    if (!few_) {
      parallel_for(whole, threads, [&](int64_t task, int thread) {
        const Run& run = table.runs[task / p_.heads];
        const Workspace w = work(thread);
        for (int64_t k = run.spans() - 1; k >= 0; --k) run_span(run, k, task % p_.heads, w);
        if (run.spans() == 0) pass_through(run, task % p_.heads, w);
      });
      return;
    }
    Scratch pair_space(parts * Chunk::kSpanPairs * kBytes);
    Scratch state_space(table.boundary_count * p_.value_heads * state_size() * kBytes);
    pairs_ = reinterpret_cast<T*>(pair_space.at(0));
    d_boundaries_ = reinterpret_cast<T*>(state_space.at(0));
    parallel_for(parts, threads, [&](int64_t task, int thread) {
      const Span& span = table.spans[task / p_.value_heads];
      Workspace w = work(thread);
      chunk_.span_pairs(table.runs[span.run], span.index, task % p_.value_heads, w.numbers, w.pairing,
                        pairs_ + task * Chunk::kSpanPairs);
    });
    parallel_for(values * blocks, threads, [&](int64_t task, int thread) {
      const int64_t head = task / blocks % p_.value_heads;
      retreat_all(table.runs[task / blocks / p_.value_heads], head, task % blocks * block_,
                  work(thread));
    });
    parallel_for(table.span_count * p_.heads, threads, [&](int64_t task, int thread) {
      const Span& span = table.spans[task / p_.heads];
      run_span(table.runs[span.run], span.index, task % p_.heads, work(thread));
    });
    for (int64_t task = 0; task < whole; ++task) {
      const Run& run = table.runs[task / p_.heads];
      if (run.spans() == 0) pass_through(run, task % p_.heads, work(0));
    }
  }

 private:
  struct Workspace {
    DeltaNumbers<T> numbers;
    typename Chunk::PairWorkspace pairing;
    T* pairs;  ///< of a span's chunks, where they are not kept for all
    T* solver;  ///< [C][C]: r from X
    T* state;  ///< [key_channels][value_width]
    T* states;  ///< S^T before each chunk of the span
    T *r, *written;  ///< r and N of each chunk of the span [C][value_width]
    T* d_states;  ///< dS of each value head of the group, or of one
    T* d_turned;  ///< dS^T
    T* tokens;  ///< q, then k [2 C][key_width]
    T* readers;  ///< exp(a_t) of that
    T* ends;  ///< exp(a_n - a_t) k_t [C][key_width]
    T* g;  ///< dY, then -dX [2 C][value_width]
    T *d, *weighted;  ///< D, B dN [C][value_width]
    T* turned;  ///< N^T [value_channels][C]
    T* d_scores;  ///< dY N^T, then -dX N^T [2 C][C]
    T* d_readers;  ///< dQ, then dK+ [2 C][key_width]
    T* d_read;  ///< dK- [C][key_width]
    T *dq_sum, *dk_sum;  ///< of the span, over the group's value heads
  };

  /// S or S^T in work, whichever is larger.
  int64_t state_size() const {
    return max_of(p_.key_channels * chunk_.value_width, p_.value_channels * chunk_.key_width);
  }

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    const int64_t key = chunk_.key_width, value = chunk_.value_width, group = chunk_.group;
    w.numbers.lay_out(arena, value);
    w.pairing.lay_out(arena, p_.key_channels);
    w.pairs = arena.take<T>(few_ ? 0 : Chunk::kSpanPairs);
    w.solver = arena.take<T>(C * C);
    w.state = arena.take<T>(state_size());
    w.states = arena.take<T>(kChunks * state_size());
    w.r = arena.take<T>(kSpan * value);
    w.written = arena.take<T>(kSpan * value);
    w.d_states = arena.take<T>((few_ ? 1 : group) * state_size());
    w.d_turned = arena.take<T>(state_size());
    T** const by_key[] = {&w.tokens, &w.readers, &w.d_readers};
    for (T** rows : by_key) *rows = arena.take<T>(2 * C * key);
    w.ends = arena.take<T>(C * key);
    w.d_read = arena.take<T>(C * key);
    w.g = arena.take<T>(2 * C * value);
    w.d = arena.take<T>(C * value);
    w.weighted = arena.take<T>(C * value);
    w.turned = arena.take<T>(p_.value_channels * C);
    w.d_scores = arena.take<T>(2 * C * C);
    w.dq_sum = arena.take<T>(group > 1 ? kSpan * key : 0);
    w.dk_sum = arena.take<T>(group > 1 ? kSpan * key : 0);
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

  const T* pairs_of(const Run& run, int64_t span, int64_t head, const Workspace& w) const {
    if (!few_) return w.pairs;
    return pairs_ + ((run.first_span + span) * p_.value_heads + head) * Chunk::kSpanPairs;
  }
  T* d_boundary(int64_t index, int64_t head) const {
    return d_boundaries_ + (index * p_.value_heads + head) * state_size();
  }

  /// The gradient of a run's last state, zeros where there is none; value channels [from, from + count).
  void load_last(const Run& run, int64_t head, int64_t from, int64_t count, int64_t width, T* d) const {
    const T* last =
        run.last < 0 || g_.d_last == nullptr ? nullptr : chunk_.state_at(g_.d_last, run.last, head);
    load_state(last ? last + from : nullptr, p_.value_channels, p_.key_channels, count, width, d);
  }
  void keep_initial(const Run& run, int64_t head, const T* d) const {
    if (run.initial < 0 || g_.d_initial == nullptr) return;
    store_state(d, chunk_.value_width, p_.key_channels, p_.value_channels,
                chunk_.state_at(g_.d_initial, run.initial, head), p_.value_channels);
  }
  /// A run without tokens.
  void pass_through(const Run& run, int64_t key_head, const Workspace& w) const {
    for (int64_t i = 0; i < chunk_.group; ++i) {
      const int64_t head = key_head * chunk_.group + i;
      load_last(run, head, 0, p_.value_channels, chunk_.value_width, w.state);
      keep_initial(run, head, w.state);
    }
  }

  // ---- one chunk, some value channels: dS alone

  /// Rows of q and k, and what they are as readers and as what is read.
  void load_tokens(const DeltaPlace& at, const Workspace& w) const {
    const int64_t key = chunk_.key_width;
    const TokenRows q = chunk_.query_rows(p_.q, at), k = chunk_.query_rows(p_.k, at);
    copy_rows<T>(q, at.n, p_.key_channels, key, w.numbers.from_start, w.readers);
    copy_rows<T>(k, at.n, p_.key_channels, key, w.numbers.from_start, w.readers + at.n * key);
    copy_rows<T>(k, at.n, p_.key_channels, key, w.numbers.to_end, w.ends);
  }

  /// D and G from dY and the dS behind the chunk, rows of `width`; pair: -H and M.
  void differentiate_written(int64_t n, const T* pair, const T* d_state, int64_t width,
                             const Workspace& w) const {
    Product<Dot>{w.ends, chunk_.key_width, 1, d_state, width, w.d, width}
        .template run_as<Start::kZero, false, true>(n, width, p_.key_channels);
    chunk_.add_from_later(pair + C * C, w.g, width, n, w.d);
    scale_rows(w.d, n, width, w.numbers.beta, T(1), w.weighted);
    chunk_.add_from_later(pair, w.weighted, width, n, w.d);
    scale_rows(w.d, n, width, w.numbers.beta, T(-1), w.g + n * width);
  }

  static void scale_rows(const T* x, int64_t n, int64_t width, const T* scale, T sign, T* out) {
    for (int64_t t = 0; t < n; ++t) {
      const T factor = sign * scale[t];
      for (int64_t c = t * width; c < (t + 1) * width; c += L) store(out + c, load(x + c) * factor);
    }
  }

  /// dS before the chunk from the one behind it.
  void retreat(int64_t n, T* d_state, int64_t width, const Workspace& w) const {
    chunk_.advance(w.numbers, {w.readers, 1, chunk_.key_width, w.g, width, d_state, width}, width,
                   2 * n);
  }

  /// 2: dS at the end of each span but the last.
  void retreat_all(const Run& run, int64_t head, int64_t from, Workspace w) const {
    const int64_t count = min_of(p_.value_channels - from, block_), width = round_up(count, L);
    load_last(run, head, from, count, width, w.state);
    for (int64_t k = run.spans() - 1; k > 0; --k) {
      const T* pairs = pairs_of(run, k, head, w);
      for (int64_t c = chunk_.chunks_of(run, k) - 1; c >= 0; --c) {
        const DeltaPlace at = chunk_.place(run, k, head, c);
        w.numbers.read(p_, at, width);
        load_tokens(at, w);
        copy_rows<T>(chunk_.value_rows(g_.d_out, at, from), at.n, count, width, w.numbers.scale, w.g);
        differentiate_written(at.n, pairs + c * Chunk::kPair, w.state, width, w);
        retreat(at.n, w.state, width, w);
      }
      store_state(w.state, width, p_.key_channels, width, d_boundary(run.boundary + k - 1, head) + from,
                  chunk_.value_width);
    }
  }

  // ---- 3

  void run_span(const Run& run, int64_t span, int64_t key_head, Workspace w) const {
    for (int64_t i = 0; i < chunk_.group; ++i) {
      const int64_t head = key_head * chunk_.group + i;
      T* d = w.d_states + (few_ ? 0 : i * state_size());
      if (span + 1 == run.spans()) {
        load_last(run, head, 0, p_.value_channels, chunk_.value_width, d);
      } else if (few_) {
        __builtin_memcpy(d, d_boundary(run.boundary + span, head),
                         size_t(p_.key_channels * chunk_.value_width * kBytes));
      }
      if (!few_) chunk_.span_pairs(run, span, head, w.numbers, w.pairing, w.pairs);
      const T* pairs = pairs_of(run, span, head, w);
      calculate_again(run, span, head, pairs, w);
      for (int64_t c = chunk_.chunks_of(run, span) - 1; c >= 0; --c) {
        differentiate(chunk_.place(run, span, head, c), c, pairs + c * Chunk::kPair, d, w);
      }
      if (span == 0) keep_initial(run, head, d);
    }
  }

  /// S^T before each chunk of a span, r and N.
  void calculate_again(const Run& run, int64_t span, int64_t head, const T* pairs, Workspace& w) const {
    const int64_t value = chunk_.value_width, key = chunk_.key_width;
    const int64_t chunks = chunk_.chunks_of(run, span);
    const T* from = span == 0 ? chunk_.initial_of(run, head)
                              : chunk_.state_at(p_.boundaries, run.boundary + span - 1, head);
    load_state(from, p_.value_channels, p_.key_channels, p_.value_channels, value, w.state);
    for (int64_t c = 0; c < chunks; ++c) {
      const DeltaPlace at = chunk_.place(run, span, head, c);
      const TokenRows k = chunk_.query_rows(p_.k, at);
      T *x = w.g, *keys = w.readers, *r = w.r + c * C * value, *written = w.written + c * C * value;
      w.numbers.read(p_, at, value);
      turn(w.state, w.states + c * state_size());
      copy_rows<T>(chunk_.value_rows(p_.v, at), at.n, p_.value_channels, value, nullptr, x);
      copy_rows<T>(k, at.n, p_.key_channels, key, w.numbers.minus, keys);
      Product<Dot>{keys, key, 1, w.state, value, x, value}
          .template run_as<Start::kAccumulate, false, true>(at.n, value, p_.key_channels);
      chunk_.template solver<false>(w.numbers, at.n, pairs + c * Chunk::kPair, w.solver);
      chunk_.template add_from_earlier<Start::kZero>(w.solver, x, value, at.n, r);
      scale_rows(r, at.n, value, w.numbers.beta, T(1), written);
      if (c + 1 == chunks) break;
      copy_rows<T>(k, at.n, p_.key_channels, key, w.numbers.to_end, w.ends);
      chunk_.advance(w.numbers, {w.ends, 1, key, written, value, w.state, value}, value, at.n);
    }
  }

  void turn(const T* state, T* out) const {
    transposed<Dot>({state, kDtypeOf<T>, chunk_.value_width}, p_.key_channels, p_.value_channels, out,
                    chunk_.key_width);
  }

  /// Chunk c of its span; d_state: from behind it to before it.
  void differentiate(const DeltaPlace& at, int64_t c, const T* pair, T* d_state, Workspace& w) const {
    const int64_t n = at.n, key = chunk_.key_width, value = chunk_.value_width;
    const T *r = w.r + c * C * value, *written = w.written + c * C * value;
    const T* state = w.states + c * state_size();
    w.numbers.read(p_, at, value);
    load_tokens(at, w);
    copy_rows<T>(chunk_.query_rows(p_.q, at), n, p_.key_channels, key, nullptr, w.tokens);
    copy_rows<T>(chunk_.query_rows(p_.k, at), n, p_.key_channels, key, nullptr, w.tokens + n * key);
    copy_rows<T>(chunk_.value_rows(g_.d_out, at), n, p_.value_channels, value, w.numbers.scale, w.g);
    differentiate_written(n, pair, d_state, value, w);
    store_rows<T>(w.d, value, n, p_.value_channels, w.numbers.beta, chunk_.value_rows(g_.dv, at));
    for (int64_t t = 0; t < n; ++t) {
      set_number<T>(g_.d_beta, at.run.batch, at.head, at.t0 + t,
                    dot(r + t * value, w.d + t * value, value));
    }
    read_state(n, state, w);
    const T end = write_state(n, written, state, d_state, w);
    within(n, written, w);
    if (p_.gate.data) gate_gradient(at, end, w);
    for (int64_t i = 0; i < n * key; i += L) {
      store(w.d_read + i, load(w.d_read + i) + load(w.d_readers + n * key + i));
    }
    store_shared(at, w.d_readers, w.dq_sum, chunk_.query_rows(g_.dq, at));
    store_shared(at, w.d_read, w.dk_sum, chunk_.query_rows(g_.dk, at));
    retreat(n, d_state, value, w);
  }

  static T dot(const T* a, const T* b, int64_t width) {
    Vec<T> sum = {};
    for (int64_t c = 0; c < width; c += L) sum += load(a + c) * load(b + c);
    return sum_of_lanes<T>(sum);
  }

  /// What q and k get from reading the state before the chunk.
  void read_state(int64_t n, const T* state, const Workspace& w) const {
    const int64_t key = chunk_.key_width;
    Product<Dot>{w.g, chunk_.value_width, 1, state, key, w.d_readers, key}
        .template run_as<Start::kZero, false, true>(2 * n, key, p_.value_channels);
    scale_rows(w.d_readers, n, key, w.numbers.from_start, T(1), w.d_readers);
    T* of_k = w.d_readers + n * key;
    scale_rows(of_k, n, key, w.numbers.from_start, T(1), of_k);
  }

  /// What k gets from writing to the state behind it. -> the gradient of all decays to the chunk's end:
  /// those of the keys, and that of the state before, which meets the gradient behind.
  T write_state(int64_t n, const T* written, const T* state, const T* d_state,
                const Workspace& w) const {
    const int64_t key = chunk_.key_width;
    turn(d_state, w.d_turned);
    Product<Dot>{written, chunk_.value_width, 1, w.d_turned, key, w.d_read, key}
        .template run_as<Start::kZero, false, true>(n, key, p_.value_channels);
    scale_rows(w.d_read, n, key, w.numbers.to_end, T(1), w.d_read);
    if (p_.gate.data == nullptr) return T(0);
    return dot(w.tokens + n * key, w.d_read, n * key) +
           w.numbers.whole * dot(state, w.d_turned, p_.value_channels * key);
  }

  /// What the chunk's tokens give each other.
  void within(int64_t n, const T* written, const Workspace& w) const {
    const int64_t key = chunk_.key_width, value = chunk_.value_width;
    T *of_q = w.d_scores, *of_k = w.d_scores + C * C;
    const T *q = w.tokens, *k = w.tokens + n * key;
    transposed<Dot>({written, kDtypeOf<T>, value}, n, p_.value_channels, w.turned, C);
    chunk_.triangle({w.g, value}, w.turned, p_.value_channels, n, of_q);
    chunk_.triangle({w.g + n * value, value}, w.turned, p_.value_channels, n, of_k);
    chunk_.decay_scores(w.numbers, n, of_q, of_k);
    add_keys(of_q, k, n, w.d_readers);
    add_keys(of_k, k, n, w.d_readers + n * key);
    chunk_.add_from_later(of_q, q, key, n, w.d_read);
    chunk_.add_from_later(of_k, k, key, n, w.d_read);
  }

  /// to[t] += sum over s <= t of scores[t][s] k[s].
  void add_keys(const T* scores, const T* k, int64_t n, T* to) const {
    const int64_t key = chunk_.key_width;
    for (int64_t t = 0; t < n; t += kStrip) {
      const int64_t count = min_of(kStrip, n - t);
      Product<Dot>{scores + t * C, C, 1, k, key, to + t * key, key}
          .template run_as<Start::kAccumulate, false, true>(count, key, t + count);
    }
  }

  void gate_gradient(const DeltaPlace& at, T end, const Workspace& w) const {
    const int64_t key = chunk_.key_width, of_k = at.n * key;
    double sum = double(end);
    for (int64_t t = at.n - 1; t >= 0; --t) {
      Vec<T> row = {};
      for (int64_t i = t * key; i < (t + 1) * key; i += L) {
        row += load(w.tokens + i) * load(w.d_readers + i);
        row += load(w.tokens + of_k + i) * (load(w.d_readers + of_k + i) - load(w.d_read + i));
      }
      sum += double(sum_of_lanes<T>(row));
      const T gate = number_of<T>(p_.gate, at.run.batch, at.head, at.t0 + t);
      set_number<T>(g_.d_gate, at.run.batch, at.head, at.t0 + t, gate < kForgets ? T(0) : T(sum));
    }
  }

  /// dq or dk: a value head's own, or the sum over its group, whose heads come one after the other.
  void store_shared(const DeltaPlace& at, const T* rows, T* sums, TokenRows to) const {
    const int64_t key = chunk_.key_width;
    if (chunk_.group == 1) return store_rows<T>(rows, key, at.n, p_.key_channels, nullptr, to);
    const int64_t of_group = at.head % chunk_.group;
    T* sum = sums + (at.t0 - at.run.begin) % kSpan * key;
    for (int64_t i = 0; i < at.n * key; i += L) {
      const Vec<T> x = load(rows + i);
      store(sum + i, of_group == 0 ? x : load(sum + i) + x);
    }
    if (of_group + 1 == chunk_.group) store_rows<T>(sum, key, at.n, p_.key_channels, nullptr, to);
  }

  const DeltaRuleParams& p_;
  const DeltaRuleGradients& g_;
  Chunk chunk_;
  int64_t block_ = 0;  ///< value channels of a task of 2
  bool few_ = false;
  T *pairs_ = nullptr, *d_boundaries_ = nullptr;
};

}  // namespace

void delta_rule_backward(const DeltaRuleParams& p, const DeltaRuleGradients& g) {
  p.dtype == Dtype::kDouble ? Backward<DotDouble>(p, g).run() : Backward<DotFloat>(p, g).run();
}

}  // namespace longspan::LONGSPAN_ISA
