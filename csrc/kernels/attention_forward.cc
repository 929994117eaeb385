// Exact attention, forward. A task is a block of 64 queries of one head (and, where blocks are few
// and keys many, a share of the keys). Per tile of 64 keys:
//
//     S^T [keys][queries]      = K   Q^T           K as it lies, Q turned once a block
//     P^T [keys][queries]      = online softmax    (softmax.h)
//     O^T [channels][queries]  = correction * O^T + V^T P^T      V as it lies, or attention_values.h
//
// Counted for 64 channels in float: a tile is 2 * 64^3 multiply-adds, 32768 FMA instructions of 16
// lanes, beside 256 exponentials of 16 lanes at about 10 instructions each: 7 % on top.

#include "kernels/attention_blocks.h"
#include "kernels/attention_values.h"
#include "kernels/parallel.h"
#include "kernels/softmax.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

/// Tasks that are worth having, at the least: few enough blocks split their keys to get there. A
/// constant, so that results do not depend on the machine.
constexpr int64_t kEnoughTasks = 16;
constexpr int64_t kLeastKeysPerSplit = 1024;

template <class Dot>
class Forward {
  using E = typename Dot::Element;
  using T = typename Dot::Sum;

 public:
  explicit Forward(const AttentionParams& p) : p_(p), values_(p) {
    depth_ = ceil_div(p.channels, Dot::kDepth);
    value_width_ = round_up(p.value_channels, kLanes<T>);
  }

  void run() {
    Scratch index((p_.batch + 1) * int64_t(sizeof(int64_t)));
    QueryBlocks blocks(p_, reinterpret_cast<int64_t*>(index.at(0)));
    const int64_t whole = blocks.count() * p_.heads;
    if (whole == 0) return;
    const int64_t wanted = ceil_div(kEnoughTasks, whole);
    splits_ = max_of<int64_t>(1, min_of(wanted, p_.keys / kLeastKeysPerSplit));
    const int64_t tasks = whole * splits_;
    const int threads = threads_for(tasks, p_.threads);

    Arena measure;
    lay_out(measure);
    const int64_t part = Partial(nullptr, value_width_).bytes();
    Scratch scratch(measure.used() * threads + (splits_ > 1 ? tasks * part : 0));
    Scratch turned(values_.bytes());
    values_.turn(turned.at(0), threads);
    char* parts = scratch.at(measure.used() * threads);

    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      const Workspace work = lay_out(arena);
      const Block block = block_of(blocks, task / splits_);
      attend(block, task % splits_, work);
      if (splits_ == 1) {
        finish(block, work.state, work.accumulator, work.factor);
      } else {
        Partial(parts + task * part, value_width_).save(work.state, work.accumulator);
      }
    });
    if (splits_ == 1) return;
    parallel_for(whole, threads, [&](int64_t i, int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      const Workspace work = lay_out(arena);
      work.state.reset();
      __builtin_memset(work.accumulator, 0, size_t(value_width_ * kQueryBlock) * sizeof(T));
      for (int64_t s = 0; s < splits_; ++s) {
        Partial(parts + (i * splits_ + s) * part, value_width_).merge_into(work.state, work.accumulator);
      }
      finish(block_of(blocks, i), work.state, work.accumulator, work.factor);
    });
  }

 private:
  struct Block {
    int64_t batch, head, q0, q1;
  };

  struct Workspace {
    E* queries;      ///< Q^T [depth][kQueryBlock]
    T* scores;       ///< S^T, then P^T where Dot is not Bf16
    E* weights;      ///< P^T
    T* bias;
    T* accumulator;  ///< O^T [value_width][kQueryBlock]
    T* factor;
    E* keys;         ///< copies, where memory does not have the form
    E* values;
    SoftmaxState<T> state;
  };

  /// One split's share of a block, before it is divided by its sum.
  struct Partial {
    T *maximum, *sum, *accumulator;
    int64_t width;
    Partial(char* at, int64_t value_width) : width(value_width) {
      maximum = reinterpret_cast<T*>(at);
      sum = maximum + kQueryBlock;
      accumulator = sum + kQueryBlock;
    }
    int64_t bytes() const { return (width + 2) * kQueryBlock * int64_t(sizeof(T)); }
    void save(const SoftmaxState<T>& state, const T* o) const {
      __builtin_memcpy(maximum, state.reference, kQueryBlock * sizeof(T));
      __builtin_memcpy(sum, state.sum, kQueryBlock * sizeof(T));
      __builtin_memcpy(accumulator, o, size_t(width * kQueryBlock) * sizeof(T));
    }
    void merge_into(const SoftmaxState<T>& state, T* o) const {
      for (int64_t i = 0; i < kQueryBlock; i += kLanes<T>) {
        const Vec<T> before = load(state.reference + i), other = load(maximum + i);
        const Vec<T> now = longspan::LONGSPAN_ISA::maximum<T>(before, other);
        const Vec<T> reference = select<T>(now == -kInfinity<T>, Vec<T>{}, now);
        const Vec<T> mine = exp2_nonpositive<T>(before - reference);
        const Vec<T> theirs = exp2_nonpositive<T>(other - reference);
        store(state.reference + i, now);
        store(state.sum + i, load(state.sum + i) * mine + load(sum + i) * theirs);
        for (int64_t c = 0; c < width; ++c) {
          const int64_t at = c * kQueryBlock + i;
          store(o + at, load(o + at) * mine + load(accumulator + at) * theirs);
        }
      }
    }
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.queries = arena.take<E>(depth_ * kQueryBlock);
    w.scores = arena.take<T>(kKeyBlock * kQueryBlock);
    w.weights =
        Dot::kDepth == 1 ? reinterpret_cast<E*>(w.scores) : arena.take<E>(kKeyBlock / 2 * kQueryBlock);
    w.bias = arena.take<T>(p_.mask.data ? kKeyBlock * kQueryBlock : 0);
    w.accumulator = arena.take<T>(value_width_ * kQueryBlock);
    w.factor = arena.take<T>(kQueryBlock);
    w.keys = arena.take<E>(kKeyBlock * depth_);
    w.values = arena.take<E>(kKeyBlock * value_width_);
    w.state.reference = arena.take<T>(kQueryBlock);
    w.state.sum = arena.take<T>(kQueryBlock);
    w.state.correction = arena.take<T>(kQueryBlock);
    return w;
  }

  /// Head by head, so that the threads share its keys in the cache; within a head late queries, which
  /// see most keys, first.
  Block block_of(const QueryBlocks& blocks, int64_t i) const {
    const int64_t b = blocks.sequence_of(i / p_.heads);
    const int64_t count = blocks.first(b + 1) - blocks.first(b);
    const int64_t within = i - blocks.first(b) * p_.heads;
    const int64_t q0 = (count - 1 - within % count) * kQueryBlock;
    return {b, within / count, q0, min_of(q0 + kQueryBlock, Sequence(p_, b).tokens)};
  }

  /// Tiles of the keys that the block sees, dealt out in turn to the splits.
  void attend(const Block& block, int64_t split, const Workspace& w) const {
    const ScoreRules<T> rules(p_, block.batch, block.head);
    const Sequence& s = rules.sequence;
    const int64_t row_batch = p_.cu_q ? 0 : block.batch;
    const TokenRows q = rows_of(p_.q, p_.dtype, row_batch, block.head, s.q_begin + block.q0);
    transposed<Dot>(q, block.q1 - block.q0, p_.channels, w.queries, kQueryBlock);
    w.state.reset();
    const int64_t kv_head = block.head / (p_.heads / p_.kv_heads);
    const int64_t kv_batch = p_.cu_k ? 0 : block.batch;
    const TokenRows k = rows_of(p_.k, p_.dtype, kv_batch, kv_head, s.k_begin);
    const TokenRows v = rows_of(p_.v, p_.dtype, kv_batch, kv_head, s.k_begin);

    bool started = false;
    int64_t turn = 0;
    const auto visit = [&](const Interval& range, const BlockRun& run) {
      // Tiles of about one size: 64 and 64 keys are faster than 96 and 32.
      const int64_t keys = range.end - range.begin;
      const int64_t step =
          round_up(ceil_div(keys, ceil_div(keys, kKeyBlock)), max_of<int64_t>(values_.alignment(), 16));
      for (int64_t k0 = range.begin; k0 < range.end; k0 += step) {
        if (turn++ % splits_ != split) continue;
        tile(rules, block, k, v, {k0, min_of(k0 + step, range.end)}, range.end, run, started, w);
        started = true;
      }
    };
    if (p_.blocks.row_begins) {
      // A tile of fewer queries leaves the others' sums as they are.
      __builtin_memset(w.accumulator, 0, size_t(value_width_ * kQueryBlock) * sizeof(T));
      started = true;
      for_each_run(p_, block.batch, block.head, block.q0, visit);
    } else {
      Interval ranges[2];
      s.key_ranges(block.q0, block.q1, ranges);
      const int64_t whole = values_.alignment();
      for (Interval& range : ranges) range.begin = range.begin / whole * whole;
      if (!ranges[1].empty() && ranges[1].begin < ranges[0].end) {
        ranges[0].end = ranges[1].end;
        ranges[1] = {0, 0};
      }
      for (const Interval& range : ranges) {
        if (!range.empty()) visit(range, BlockRun{});
      }
    }
    if (!started) {
      __builtin_memset(w.accumulator, 0, size_t(value_width_ * kQueryBlock) * sizeof(T));
    }
  }

  void tile(const ScoreRules<T>& rules, const Block& block, TokenRows k, TokenRows v, Interval range,
            int64_t range_end, const BlockRun& run, bool started, const Workspace& w) const {
    const int64_t k0 = range.begin, k1 = range.end, keys = k1 - k0;
    int64_t queries = block.q1 - block.q0;
    if (run.patterns) {
      queries = min_of(queries, queries_that_see(p_.blocks, run, block.q0, k0, k1));
    }
    const int64_t q1 = block.q0 + queries, columns = round_up(queries, kLanes<T>);
    prefetch(k.from(k1), min_of(range_end - k1, kKeyBlock), p_.channels);
    if (!values_) prefetch(v.from(k1), min_of(range_end - k1, kKeyBlock), p_.value_channels);
    const Operand<Dot> kt = by_channel<Dot>(k.from(k0), keys, p_.channels, w.keys);
    Product<Dot>{kt.data, kt.stride, 1, w.queries, kQueryBlock, w.scores, kQueryBlock}
        .template run_as<Start::kZero, false, true>(keys, columns, depth_);

    const bool within = rules.sequence.all_visible(block.q0, q1, k0, k1);
    const bool visible = within && sees_whole(p_.blocks, run, k0, k1);
    const bool plain = within && rules.plain();
    if (!plain) rules.apply(w.scores, w.bias, nullptr, block.q0, q1, k0, k1);
    if (run.patterns && !visible) {
      hide_unseen(p_.blocks, run, w.scores, block.q0, q1, k0, k1);
    }
    const T unit = plain ? rules.scale * T(kLog2e) : T(kLog2e);
    const bool moved = rules.drops ? online_softmax<Dot, true>(w.scores, w.weights, keys, queries, unit,
                                                               w.state, rules, block.q0, k0)
                                   : online_softmax<Dot, false>(w.scores, w.weights, keys, queries, unit,
                                                                w.state, rules, block.q0, k0);

    Product<Dot> product{nullptr, 1, 1, w.weights, kQueryBlock, w.accumulator, kQueryBlock};
    product.rescale = w.state.correction;
    int64_t depth = ceil_div(keys, Dot::kDepth);
    // A weight of zero must not meet an infinite value that its query does not see.
    bool safe = visible && rules.mask.data == nullptr;
    if constexpr (TurnedValues<Dot>::kUsed) {
      if (values_) {
        const int64_t kv_head = block.head / (p_.heads / p_.kv_heads);
        product.a = values_.at(block.batch, kv_head, k0);
        product.a_row = 16, product.a_group = values_.group();
        if (k1 == rules.sequence.keys) {  // behind which are zeros: whole groups
          const int64_t whole = round_up(depth, 16);
          __builtin_memset(w.weights + depth * kQueryBlock, 0,
                           size_t((whole - depth) * kQueryBlock) * sizeof(E));
          depth = whole;
        }
        for (int64_t k = 0; k < depth && !safe; k += 16) {
          if (!all_finite<Dot>({product.a + k / 16 * product.a_group, 16}, p_.value_channels, 16)) break;
          safe = k + 16 >= depth;
        }
        return accumulate<true>(product, columns, depth, started, moved, safe);
      }
    }
    const Operand<Dot> vt = by_token<Dot>(v.from(k0), keys, p_.value_channels, false, w.values);
    product.a = vt.data, product.a_depth = vt.stride;
    safe = safe || all_finite<Dot>(vt, depth, p_.value_channels);
    accumulate<false>(product, columns, depth, started, moved, safe);
  }

  /// O^T = correction * O^T + V^T P^T.
  template <bool kUnitDepth>
  void accumulate(const Product<Dot>& product, int64_t columns, int64_t depth, bool started, bool moved,
                  bool safe) const {
    const int64_t rows = p_.value_channels;
    if (!started) {
      safe ? product.template run_as<Start::kZero, false, kUnitDepth>(rows, columns, depth)
           : product.template run_as<Start::kZero, true, kUnitDepth>(rows, columns, depth);
    } else if (moved) {
      safe ? product.template run_as<Start::kRescale, false, kUnitDepth>(rows, columns, depth)
           : product.template run_as<Start::kRescale, true, kUnitDepth>(rows, columns, depth);
    } else {
      safe ? product.template run_as<Start::kAccumulate, false, kUnitDepth>(rows, columns, depth)
           : product.template run_as<Start::kAccumulate, true, kUnitDepth>(rows, columns, depth);
    }
  }

  /// O = O^T / sum, log-sum-exp = reference + log sum, the sink's share included.
  void finish(const Block& block, const SoftmaxState<T>& state, const T* accumulator, T* factor) const {
    const Sequence s(p_, block.batch);
    const int64_t row_batch = p_.cu_q ? 0 : block.batch;
    T* lse =
        static_cast<T*>(p_.lse) + (row_batch * p_.heads + block.head) * p_.tokens + s.q_begin + block.q0;
    for (int64_t i = 0; i < block.q1 - block.q0; ++i) {
      T maximum = state.reference[i], sum = state.sum[i], shrink = T(1);
      if (p_.sinks) {
        const T sink = T(p_.sinks[block.head]) * T(kLog2e);
        const T now = maximum < sink ? sink : maximum;
        if (now != -kInfinity<T>) {
          shrink = power_of_two(maximum - now);
          sum = sum * shrink + power_of_two(sink - now);
          maximum = now;
        }
      }
      factor[i] = sum == T(0) ? T(0) : shrink / sum;
      lse[i] = sum == T(0) ? -kInfinity<T> : (maximum + log2_of(sum)) * T(kLn2);
    }
    const TokenRows out = rows_of(p_.out, p_.dtype, row_batch, block.head, s.q_begin + block.q0);
    store_transposed<T>(accumulator, kQueryBlock, block.q1 - block.q0, p_.value_channels, factor,
                        const_cast<void*>(out.data), p_.dtype, out.stride);
  }

  static LS_INLINE T power_of_two(T x) {
    return sizeof(T) == 4 ? T(__builtin_exp2f(float(x))) : T(__builtin_exp2(double(x)));
  }
  static LS_INLINE T log2_of(T x) {
    return sizeof(T) == 4 ? T(__builtin_log2f(float(x))) : T(__builtin_log2(double(x)));
  }

  const AttentionParams& p_;
  TurnedValues<Dot> values_;
  int64_t depth_, value_width_, splits_ = 1;
};

}  // namespace

void attention_forward(const AttentionParams& p) {
  if (p.dtype == Dtype::kDouble) return Forward<DotDouble>(p).run();
#if defined(LONGSPAN_BF16_DOT)
  if (p.dtype == Dtype::kBfloat16 && p.channels % 2 == 0) return Forward<DotBf16>(p).run();
#endif
  Forward<DotFloat>(p).run();
}

}  // namespace longspan::LONGSPAN_ISA
