// The delta rule, forward. A task is a value head of a run, whose state stays in the cache from chunk to
// chunk; or, where those are too few to fill a machine:
//
//   1. the pairs of all chunks (delta_rule_chunk.h)            (spans and heads in parallel)
//   2. everything else, in order, a block of value channels    (blocks and heads in parallel)
//
// Unlike a decay, what a chunk does to a state is a matrix, which costs more to multiply than the state
// itself; so time is not divided, and nothing is calculated twice.
//
// Counted for 64 channels and chunks of 32, a token and head: 3 * 4096 multiply-adds with the state (its
// answers to k and q, and what is written), 4 * 1536 inside the chunk (24 of 32 tokens a row, on
// average: two triangles of scores, two applied), 170 to solve it. Chunks of 16: 4 * 1024 inside, of 64:
// 4 * 2560.

#include "kernels/delta_rule_chunk.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

template <class Dot>
class Forward {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t C = kDeltaChunk;
  static constexpr int64_t kBytes = sizeof(T);
  using Chunk = DeltaChunk<Dot>;

 public:
  explicit Forward(const DeltaRuleParams& p) : p_(p), chunk_(p) {}

  void run() {
    const RunTable& table = p_.runs;
    const int64_t whole = table.run_count * p_.value_heads, parts = table.span_count * p_.value_heads;
    const bool few = whole < kEnoughTasks && table.boundary_count > 0;
    block_ = max_of<int64_t>(chunk_.value_width, L);
    if (few) {
      const int64_t wanted = ceil_div(kEnoughTasks, max_of<int64_t>(whole, 1));
      block_ = max_of<int64_t>(round_up(ceil_div(block_, wanted), L), 2 * L);
    }
    const int64_t blocks = ceil_div(chunk_.value_width, block_);
    const int threads = threads_for(max_of(few ? parts : 0, whole * blocks), p_.threads);
    Scratch scratch(workspace_bytes() * threads);
    Scratch pair_space(few ? parts * Chunk::kSpanPairs * kBytes : 0);
    T* pairs = few ? reinterpret_cast<T*>(pair_space.at(0)) : nullptr;
    if (few) {
      parallel_for(parts, threads, [&](int64_t task, int thread) {
        const Span& span = table.spans[task / p_.value_heads];
        Workspace w = workspace(scratch, thread);
        chunk_.span_pairs(table.runs[span.run], span.index, task % p_.value_heads, w.numbers, w.pairs,
                          pairs + task * Chunk::kSpanPairs);
      });
    }
    parallel_for(whole * blocks, threads, [&](int64_t task, int thread) {
      const int64_t head = task / blocks % p_.value_heads;
      run_block(table.runs[task / blocks / p_.value_heads], head, task % blocks * block_, pairs,
                workspace(scratch, thread));
    });
  }

 private:
  struct Workspace {
    DeltaNumbers<T> numbers;
    typename Chunk::PairWorkspace pairs;
    T* pair;  ///< of one chunk
    T* state;  ///< [key_channels][width]
    T *queries, *keys, *ends;  ///< exp(a_t) q_t, -exp(a_t) k_t, exp(a_n - a_t) k_t [C][key_width]
    T *x, *written, *y;  ///< X, N and Y [C][width]
    T* solver;  ///< [C][C]: N from X
  };

  /// Where value channels are divided, a block of them.
  struct Columns {
    int64_t from, count, width;
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.numbers.lay_out(arena, block_);
    w.pairs.lay_out(arena, p_.key_channels);
    w.pair = arena.take<T>(Chunk::kPair);
    w.state = arena.take<T>(p_.key_channels * block_);
    T** const by_key[] = {&w.queries, &w.keys, &w.ends};
    for (T** rows : by_key) *rows = arena.take<T>(C * chunk_.key_width);
    T** const by_value[] = {&w.x, &w.written, &w.y};
    for (T** rows : by_value) *rows = arena.take<T>(C * block_);
    w.solver = arena.take<T>(C * C);
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

  void run_block(const Run& run, int64_t head, int64_t from, const T* pairs, Workspace w) const {
    const int64_t count = min_of(p_.value_channels - from, block_);
    const Columns columns{from, count, round_up(count, L)};
    const T* initial = chunk_.initial_of(run, head);
    load_state(initial ? initial + from : nullptr, p_.value_channels, p_.key_channels, count,
               columns.width, w.state);
    for (int64_t k = 0; k < run.spans(); ++k) {
      const bool last = k + 1 == run.spans();
      for (int64_t c = 0; c < chunk_.chunks_of(run, k); ++c) {
        const DeltaPlace at = chunk_.place(run, k, head, c);
        const T* pair = w.pair;
        w.numbers.read(p_, at, columns.width);
        if (pairs) {
          const int64_t part = (run.first_span + k) * p_.value_heads + head;
          pair = pairs + part * Chunk::kSpanPairs + c * Chunk::kPair;
        } else {
          chunk_.pair(at, w.numbers, w.pairs, w.pair);
        }
        walk(at, columns, pair, !last || at.t0 + at.n < run.end || run.last >= 0, w);
      }
      if (!last && p_.boundaries)
        keep(columns, chunk_.state_at(p_.boundaries, run.boundary + k, head), w);
    }
    if (run.last >= 0) keep(columns, chunk_.state_at(p_.last, run.last, head), w);
  }

  void keep(const Columns& columns, T* state, const Workspace& w) const {
    store_state(w.state, columns.width, p_.key_channels, columns.count, state + columns.from,
                p_.value_channels);
  }

  /// One chunk, from the state before it; moves the state on where anyone wants it.
  void walk(const DeltaPlace& at, const Columns& columns, const T* pair, bool wanted,
            const Workspace& w) const {
    const int64_t width = columns.width, keys = p_.key_channels, key_width = chunk_.key_width;
    const DeltaPlace next{at.run, at.head, at.t0 + at.n, min_of(C, at.run.end - at.t0 - at.n)};
    const TokenRows k = chunk_.query_rows(p_.k, at), out = chunk_.value_rows(p_.out, at, columns.from);
    // Memory is asked for a chunk ahead, so that it answers while products run.
    prefetch(chunk_.query_rows(p_.k, next), next.n, keys);
    prefetch<true>(out, at.n, columns.count);
    copy_rows<T>(chunk_.value_rows(p_.v, at, columns.from), at.n, columns.count, width, nullptr, w.x);
    copy_rows<T>(k, at.n, keys, key_width, w.numbers.minus, w.keys);
    Product<Dot>{w.keys, key_width, 1, w.state, width, w.x, width}
        .template run_as<Start::kAccumulate, false, true>(at.n, width, keys);
    prefetch(chunk_.value_rows(p_.v, next, columns.from), next.n, columns.count);
    chunk_.template solver<true>(w.numbers, at.n, pair, w.solver);
    chunk_.template add_from_earlier<Start::kZero>(w.solver, w.x, width, at.n, w.written);
    copy_rows<T>(chunk_.query_rows(p_.q, at), at.n, keys, key_width, w.numbers.from_start, w.queries);
    Product<Dot>{w.queries, key_width, 1, w.state, width, w.y, width}
        .template run_as<Start::kZero, false, true>(at.n, width, keys);
    chunk_.template add_from_earlier<Start::kAccumulate>(pair + C * C, w.written, width, at.n, w.y);
    prefetch(chunk_.query_rows(p_.q, next), next.n, keys);
    store_rows<T>(w.y, width, at.n, columns.count, w.numbers.scale, out);
    if (!wanted) return;
    copy_rows<T>(k, at.n, keys, key_width, w.numbers.to_end, w.ends);
    chunk_.advance(w.numbers, {w.ends, 1, key_width, w.written, width, w.state, width}, width, at.n);
  }

  const DeltaRuleParams& p_;
  Chunk chunk_;
  int64_t block_ = 0;  ///< value channels of a task
};

}  // namespace

void delta_rule_forward(const DeltaRuleParams& p) {
  p.dtype == Dtype::kDouble ? Forward<DotDouble>(p).run() : Forward<DotFloat>(p).run();
}

}  // namespace longspan::LONGSPAN_ISA
