// Exact attention, backward. A task is a share of the key blocks of one key-value head; for each of
// its blocks it goes over the queries that see it, and each tile is computed once:
//
//     S^T, dP^T -> P^T, dS^T                              (attention_gradient.h)
//     dV [keys][channels]      += P^T  dO                 stays with the block of keys
//     dK [keys][channels]      += dS^T Q
//     dQ^T [channels][queries] += K^T dS^T                one sum a share; shares are added at the end,
//                                                         in order, so threads do not change a bit
//
// Five products a tile where the forward has two. Where heads are few a head's key blocks are shared
// out to several tasks: in turn, so that causal work is even, or in runs where a left window bounds
// the queries that a run touches, so that its dQ is short.

#include "kernels/attention_gradient.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kEnoughTasks = 16;  // a constant: results must not depend on the machine

template <class Dot>
class Backward {
  using E = typename Dot::Element;
  using T = typename Dot::Sum;
  using Gradient = AttentionGradient<Dot>;
  using Place = typename Gradient::Place;

 public:
  Backward(const AttentionParams& p, const AttentionGradients& g)
      : p_(p), g_(g), index_((p.batch + 1) * int64_t(sizeof(int64_t))),
        key_block_(p.channels + p.value_channels <= 256 ? 2 * kKeyBlock : kKeyBlock),
        gradient_(p, g, reinterpret_cast<int64_t*>(index_.at(0)), key_block_) {
    group_ = p.heads / p.kv_heads;
    splits_ = max_of<int64_t>(1, min_of(ceil_div(kEnoughTasks, max_of<int64_t>(1, p.batch * p.kv_heads)),
                                        ceil_div(p.keys, key_block_)));
  }

  void run() {
    const int64_t tasks = p_.batch * p_.kv_heads * splits_;
    const int64_t records = gradient_.blocks.count() * p_.heads;
    const int threads = threads_for(max_of(tasks, records), p_.threads);

    Arena measure;
    lay_out(measure);
    Arena measure_record;
    gradient_.lay_out_record(measure_record);
    record_bytes_ = measure_record.used();
    Scratch share_space(tasks * int64_t(sizeof(Share)));
    shares_ = reinterpret_cast<Share*>(share_space.at(0));
    const int64_t sums = lay_out_shares(tasks);
    Scratch work(measure.used() * threads);
    Scratch record_space(record_bytes_ * records);
    Scratch sum_space(sums * int64_t(sizeof(T)));
    records_ = record_space.at(0);
    sums_ = reinterpret_cast<T*>(sum_space.at(0));

    parallel_for(records, threads,
                 [&](int64_t i, int) { gradient_.prepare(gradient_.place_of(i), record(i)); });
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      Arena arena(work.at(measure.used() * thread));
      run_share(task, lay_out(arena));
    });
    parallel_for(records, threads, [&](int64_t i, int thread) {
      Arena arena(work.at(measure.used() * thread));
      finish_queries(i, lay_out(arena));
    });
    if (g_.d_sinks) add_sinks();
  }

 private:
  /// Key blocks first, first + step, ... below last, and the query blocks [low, high) that they touch.
  struct Share {
    int64_t first, last, step;
    int64_t low, high;
    int64_t sum;  ///< where its dQ begins, in T: [group][high - low][channels][kQueryBlock]
  };

  struct Workspace {
    typename Gradient::Workspace tile;
    T *dk, *dv;    ///< [key_block][width]
    E* keys_token; ///< K, contracted over keys
    E *weights, *d_scores, *d_scores_pairs;  ///< P^T, dS^T as operands; DotBf16 only
    T* sum;        ///< dQ^T of one block
    T* factor;
  };

  Workspace lay_out(Arena& arena) const {
    const int64_t pairs = Dot::kDepth == 2 ? key_block_ * kQueryBlock / 2 : 0;
    Workspace w;
    w.tile = gradient_.lay_out(arena);
    w.dk = arena.take<T>(key_block_ * gradient_.width);
    w.dv = arena.take<T>(key_block_ * gradient_.value_width);
    w.keys_token = arena.take<E>(key_block_ * gradient_.width);
    w.weights = arena.take<E>(pairs);
    w.d_scores = arena.take<E>(pairs);
    w.d_scores_pairs = arena.take<E>(pairs);
    w.sum = arena.take<T>(p_.channels * kQueryBlock);
    w.factor = arena.take<T>(kQueryBlock);
    return w;
  }

  QueryRecord<Dot> record(int64_t i) const {
    Arena arena(records_ + i * record_bytes_);
    return gradient_.lay_out_record(arena);
  }

  int64_t lay_out_shares(int64_t tasks) const {
    int64_t used = 0;
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t b = task / (p_.kv_heads * splits_), split = task % splits_;
      const Sequence s(p_, b);
      const int64_t blocks = ceil_div(s.keys, key_block_);
      Share& share = shares_[task];
      if (p_.blocks.row_begins) {
        const int64_t kv_head = task / splits_ % p_.kv_heads;
        share = {boundary(b, kv_head, split), boundary(b, kv_head, split + 1), 1, 0, 0, used};
      } else if (s.left < 0) {
        share = {split, blocks, splits_, 0, 0, used};
      } else {
        share = {blocks * split / splits_, blocks * (split + 1) / splits_, 1, 0, 0, used};
      }
      bool touched = false;
      for (int64_t kb = share.first; kb < share.last; kb += share.step) {
        const Interval q = query_blocks_of(s, task, kb);
        if (q.empty()) continue;
        const int64_t low = q.begin, high = q.end;
        share.low = touched ? min_of(share.low, low) : low;
        share.high = touched ? max_of(share.high, high) : high;
        touched = true;
      }
      used += group_ * (share.high - share.low) * p_.channels * kQueryBlock;
    }
    return used;
  }

  /// Query blocks that may see a block of keys; those between the first and the last.
  Interval query_blocks_of(const Sequence& s, int64_t task, int64_t kb) const {
    const int64_t b = task / (p_.kv_heads * splits_), kv_head = task / splits_ % p_.kv_heads;
    const int64_t k0 = kb * key_block_, k1 = min_of(k0 + key_block_, s.keys);
    if (!p_.blocks.row_begins) {
      const Interval q = s.query_range(k0, k1);
      return q.empty() ? q : Interval{q.begin / kQueryBlock, ceil_div(q.end, kQueryBlock)};
    }
    Interval hull = BlockColumns(p_, b, kv_head * group_, k0, k1).query_blocks();
    for (int64_t g = 1; g < group_; ++g) {
      const Interval q = BlockColumns(p_, b, kv_head * group_ + g, k0, k1).query_blocks();
      hull = {min_of(hull.begin, q.begin), max_of(hull.end, q.end)};
    }
    return hull;
  }

  /// Where a share begins: each gets as many blocks of scores, as far as blocks of keys allow.
  int64_t boundary(int64_t b, int64_t kv_head, int64_t split) const {
    const int64_t blocks = ceil_div(p_.keys, key_block_);
    const auto work = [&](int64_t first, int64_t last) {
      int64_t sum = 0;
      for (int64_t g = 0; g < group_; ++g) {
        const int64_t k1 = min_of(last * key_block_, p_.keys);
        sum += BlockColumns(p_, b, kv_head * group_ + g, first * key_block_, k1).size();
      }
      return sum;
    };
    const int64_t total = work(0, blocks);
    if (total == 0) return blocks * split / splits_;
    int64_t at = 0;
    for (int64_t before = 0; at < blocks && before * splits_ < total * split; ++at) {
      before += work(at, at + 1);
    }
    return split == splits_ ? blocks : at;
  }

  LS_INLINE T* sum_of(const Share& share, int64_t g, int64_t block) const {
    const int64_t at = g * (share.high - share.low) + block - share.low;
    return sums_ + share.sum + at * p_.channels * kQueryBlock;
  }

  void run_share(int64_t task, const Workspace& w) const {
    const Share& share = shares_[task];
    const int64_t b = task / (p_.kv_heads * splits_), kv_head = task / splits_ % p_.kv_heads;
    const Sequence s(p_, b);
    const int64_t count = group_ * (share.high - share.low) * p_.channels * kQueryBlock;
    __builtin_memset(sums_ + share.sum, 0, size_t(count) * sizeof(T));
    for (int64_t kb = share.first; kb < share.last; kb += share.step) {
      const int64_t k0 = kb * key_block_, k1 = min_of(k0 + key_block_, s.keys), keys = k1 - k0;
      const TokenRows k = gradient_.key_rows(p_.k, b, kv_head).from(k0);
      const TokenRows v = gradient_.key_rows(p_.v, b, kv_head).from(k0);
      const Operand<Dot> kc = by_channel<Dot>(k, keys, p_.channels, w.tile.keys);
      const Operand<Dot> vc = by_channel<Dot>(v, keys, p_.value_channels, w.tile.values);
      const Operand<Dot> kt = by_token<Dot>(k, keys, p_.channels, false, w.keys_token);
      const bool finite = all_finite<Dot>(kt, ceil_div(keys, Dot::kDepth), p_.channels);
      __builtin_memset(w.dk, 0, size_t(keys * gradient_.width) * sizeof(T));
      __builtin_memset(w.dv, 0, size_t(keys * gradient_.value_width) * sizeof(T));
      for (int64_t g = 0; g < group_; ++g) {
        const int64_t head = kv_head * group_ + g;
        const ScoreRules<T> rules(p_, b, head);
        const auto meet = [&](int64_t j, int64_t queries, const Interval& seen, const BlockRun& run) {
          const int64_t q0 = j * kQueryBlock;
          const Place at{b, head, j, q0, min_of(q0 + queries, s.tokens)};
          tile(rules, at, kc, vc, kt, finite, k0, seen, run, sum_of(share, g, j), w);
        };
        if (p_.blocks.row_begins) {
          BlockColumns(p_, b, head, k0, k1).for_each(meet);
          continue;
        }
        const Interval queries = query_blocks_of(s, task, kb);
        for (int64_t j = queries.begin; j < queries.end; ++j) {
          const Interval seen = seen_of(s, j * kQueryBlock, k0, k1);
          if (!seen.empty()) meet(j, kQueryBlock, seen, BlockRun{});
        }
      }
      finish_keys(b, kv_head, s.k_begin + k0, keys, w);
    }
  }

  /// The least run of keys of [k0, k1) that holds all which the queries may see; begins at an even one.
  LS_INLINE Interval seen_of(const Sequence& s, int64_t q0, int64_t k0, int64_t k1) const {
    Interval ranges[2];
    s.key_ranges(q0, min_of(q0 + kQueryBlock, s.tokens), ranges);
    Interval seen{k1, k0};
    for (const Interval& range : ranges) {
      const int64_t begin = max_of(range.begin, k0), end = min_of(range.end, k1);
      if (begin >= end) continue;
      seen = {min_of(seen.begin, begin & ~int64_t(1)), max_of(seen.end, end)};
    }
    return seen;
  }

  /// The keys `seen` of the block that begins at block_begin, against one block of queries.
  void tile(const ScoreRules<T>& rules, const Place& at, Operand<Dot> kc, Operand<Dot> vc,
            Operand<Dot> kt, bool keys_finite, int64_t block_begin, Interval seen, const BlockRun& run,
            T* dq, const Workspace& w) const {
    const int64_t k0 = seen.begin, k1 = seen.end, skip = k0 - block_begin;
    kc.data += skip * kc.stride;
    vc.data += skip * vc.stride;
    kt.data += skip / Dot::kDepth * kt.stride;
    const QueryRecord<Dot> r = record(gradient_.record_index(at.batch, at.head, at.block));
    const bool visible =
        rules.sequence.all_visible(at.q0, at.q1, k0, k1) && sees_whole(p_.blocks, run, k0, k1);
    gradient_.tile(rules, r, at, kc, vc, k0, k1, visible, w.tile, run);

    const int64_t keys = k1 - k0, queries = at.q1 - at.q0;
    const int64_t columns = round_up(queries, kLanes<T>);
    const E *weights, *d_scores, *d_scores_pairs;
    if constexpr (Dot::kDepth == 1) {
      weights = w.tile.scores;
      d_scores = d_scores_pairs = w.tile.d_scores;
    } else {
      round_tile(w, keys, columns);
      weights = w.weights, d_scores = w.d_scores, d_scores_pairs = w.d_scores_pairs;
    }
    // Zero weights must not meet what their query, or their key, does not see (tile.h).
    const bool exact = visible && p_.mask.data == nullptr;
    const bool guard_keys = !exact && !*r.finite, guard_queries = !exact && !keys_finite;
    constexpr int64_t row = kQueryBlock / Dot::kDepth;
    const int64_t depth = ceil_div(queries, Dot::kDepth);
    const Operand<Dot> d_out = gradient_.d_out_by_token(r, at), q = gradient_.q_by_token(r, at);
    const Product<Dot> dv{weights,
                          row,
                          1,
                          d_out.data,
                          d_out.stride,
                          w.dv + skip * gradient_.value_width,
                          gradient_.value_width};
    const Product<Dot> dk{d_scores,       row, 1, q.data, q.stride, w.dk + skip * gradient_.width,
                          gradient_.width};
    if (guard_keys) {
      dv.template run_as<Start::kAccumulate, true, true>(keys, gradient_.value_width, depth);
      dk.template run_as<Start::kAccumulate, true, true>(keys, gradient_.width, depth);
    } else {
      dv.template run_as<Start::kAccumulate, false, true>(keys, gradient_.value_width, depth);
      dk.template run_as<Start::kAccumulate, false, true>(keys, gradient_.width, depth);
    }
    const Product<Dot> product{kt.data, 1, kt.stride, d_scores_pairs, kQueryBlock, dq, kQueryBlock};
    const int64_t key_depth = ceil_div(keys, Dot::kDepth);
    guard_queries
        ? product.template run_as<Start::kAccumulate, true, false>(p_.channels, columns, key_depth)
        : product.template run_as<Start::kAccumulate, false, false>(p_.channels, columns, key_depth);
  }

  /// P^T and dS^T in bfloat16: as they lie, pairs of queries, and dS^T also in pairs of keys.
  void round_tile(const Workspace& w, int64_t keys, int64_t columns) const {
    if constexpr (Dot::kDepth == 2) {
      for (int64_t k = 0; k < keys; k += 2) {
        for (int64_t i = 0; i < columns; i += kLanes<T>) {
          const int64_t cell = k * kQueryBlock + i;
          const Vec<T> even = load(w.tile.d_scores + cell);
          const Vec<T> odd = load(w.tile.d_scores + cell + kQueryBlock);
          store_bf16(w.weights, cell, load(w.tile.scores + cell));
          store_bf16(w.d_scores, cell, even);
          if (k + 1 < keys) {
            store_bf16(w.weights, cell + kQueryBlock, load(w.tile.scores + cell + kQueryBlock));
            store_bf16(w.d_scores, cell + kQueryBlock, odd);
          }
          store_key_pair<Dot>(w.d_scores_pairs + i, k, even, odd);
        }
      }
    }
  }

  void finish_keys(int64_t b, int64_t kv_head, int64_t k_row, int64_t keys, const Workspace& w) const {
    const int64_t batch = p_.cu_k ? 0 : b;
    store_rows(rows_of(g_.dk, p_.dtype, batch, kv_head, k_row), w.dk, gradient_.width, keys, p_.channels,
               T(p_.scale));
    store_rows(rows_of(g_.dv, p_.dtype, batch, kv_head, k_row), w.dv, gradient_.value_width, keys,
               p_.value_channels, T(1));
  }

  void store_rows(TokenRows out, const T* in, int64_t ld, int64_t n, int64_t channels, T scale) const {
    for (int64_t t = 0; t < n; ++t) {
      void* row = const_cast<void*>(out.from(t).data);
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        store_as<T>(row, p_.dtype, c, load(in + t * ld + c) * scale, channels - c);
      }
    }
  }

  /// dQ of a block: the shares' sums in order, turned back.
  void finish_queries(int64_t i, const Workspace& w) const {
    const Place at = gradient_.place_of(i);
    const int64_t size = p_.channels * kQueryBlock;
    const int64_t kv_head = at.head / group_;
    const Share* shares = shares_ + (at.batch * p_.kv_heads + kv_head) * splits_;
    __builtin_memset(w.sum, 0, size_t(size) * sizeof(T));
    for (int64_t split = 0; split < splits_; ++split) {
      if (at.block < shares[split].low || at.block >= shares[split].high) continue;
      const T* part = sum_of(shares[split], at.head % group_, at.block);
      for (int64_t c = 0; c < size; c += kLanes<T>) store(w.sum + c, load(w.sum + c) + load(part + c));
    }
    for (int64_t c = 0; c < kQueryBlock; ++c) w.factor[c] = T(p_.scale);
    const TokenRows out = gradient_.query_rows(g_.dq, at);
    store_transposed<T>(w.sum, kQueryBlock, at.q1 - at.q0, p_.channels, w.factor,
                        const_cast<void*>(out.data), p_.dtype, out.stride);
  }

  void add_sinks() const {
    for (int64_t h = 0; h < p_.heads; ++h) g_.d_sinks[h] = 0;
    for (int64_t b = 0; b < p_.batch; ++b) {
      const int64_t count = gradient_.blocks.first(b + 1) - gradient_.blocks.first(b);
      for (int64_t h = 0; h < p_.heads; ++h) {
        for (int64_t j = 0; j < count; ++j) {
          g_.d_sinks[h] += *record(gradient_.record_index(b, h, j)).d_sink;
        }
      }
    }
  }

  const AttentionParams& p_;
  const AttentionGradients& g_;
  Scratch index_;
  int64_t key_block_;  ///< wide, so that queries stream past few times, while it all stays in L2
  Gradient gradient_;
  int64_t group_, splits_;
  Share* shares_ = nullptr;
  char* records_ = nullptr;
  int64_t record_bytes_ = 0;
  T* sums_ = nullptr;
};

}  // namespace

void attention_backward(const AttentionParams& p, const AttentionGradients& g) {
  if (p.dtype == Dtype::kDouble) return Backward<DotDouble>(p, g).run();
#if defined(LONGSPAN_BF16_DOT)
  if (p.dtype == Dtype::kBfloat16 && p.channels % 2 == 0 && p.value_channels % 2 == 0) {
    return Backward<DotBf16>(p, g).run();
  }
#endif
  Backward<DotFloat>(p, g).run();
}

}  // namespace longspan::LONGSPAN_ISA
