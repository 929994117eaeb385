// What the backward of attention needs of each block of queries, and the tile that it computes
// from it: probabilities and the gradient of the scores.
//
// From the saved log-sum-exp, with Delta_i = dO_i . O_i (SPEC section 1):
//
//     P_ij  = exp(S_ij - lse_i)                     dP_ij = dO_i . V_j
//     dS_ij = P_ij (dP_ij - Delta_i + d_lse_i)      times the softcap's derivative
//
// As in the forward, tiles are transposed: S^T = K Q^T and dP^T = V dO^T, keys along rows.
#pragma once

#include "kernels/attention_blocks.h"
#include "kernels/parallel.h"
#include "kernels/softmax.h"

namespace longspan::LONGSPAN_ISA {

/// A block of queries in the forms in which products read it, made once and read by every block of
/// keys. Lanes past the last query hold zeros, and a log-sum-exp of infinity: probability zero.
template <class Dot>
struct QueryRecord {
  using E = typename Dot::Element;
  using T = typename Dot::Sum;
  E *q_transposed, *d_out_transposed;  ///< [depth][kQueryBlock]
  E *q_copy, *d_out_copy;              ///< by token, padded, where memory does not have the form
  T* lse;                              ///< [kQueryBlock], +infinity for rows without keys
  T* delta;                            ///< [kQueryBlock]: Delta - d_lse
  double* d_sink;                      ///< [1]
  int64_t* finite;                     ///< [1]: whether q and d_out are
};

template <class Dot>
class AttentionGradient {
 public:
  using E = typename Dot::Element;
  using T = typename Dot::Sum;

  struct Workspace {
    T* scores;      ///< S^T [most_keys][kQueryBlock], then P^T
    T* d_scores;    ///< dP^T, then dS^T
    T* bias;
    T* derivative;  ///< of the softcap
    E* keys;        ///< copies, where memory does not have the form
    E* values;
  };

  AttentionGradient(const AttentionParams& p, const AttentionGradients& g, int64_t* prefix,
                    int64_t most_keys)
      : p_(p), g_(g), blocks(p, prefix), most_keys(most_keys) {
    depth = ceil_div(p.channels, Dot::kDepth);
    value_depth = ceil_div(p.value_channels, Dot::kDepth);
    width = round_up(p.channels, kLanes<T>);
    value_width = round_up(p.value_channels, kLanes<T>);
    copies_ = Dot::kDepth != 1 || !is_native<Dot>(p.dtype) || p.channels != width ||
              p.value_channels != value_width;
  }

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.scores = arena.take<T>(most_keys * kQueryBlock);
    w.d_scores = arena.take<T>(most_keys * kQueryBlock);
    w.bias = arena.take<T>(p_.mask.data ? most_keys * kQueryBlock : 0);
    w.derivative = arena.take<T>(p_.softcap != 0 ? most_keys * kQueryBlock : 0);
    w.keys = arena.take<E>(most_keys * depth);
    w.values = arena.take<E>(most_keys * value_depth);
    return w;
  }

  QueryRecord<Dot> lay_out_record(Arena& arena) const {
    QueryRecord<Dot> r;
    r.q_transposed = arena.take<E>(depth * kQueryBlock);
    r.d_out_transposed = arena.take<E>(value_depth * kQueryBlock);
    r.q_copy = arena.take<E>(copies_ ? kQueryBlock / Dot::kDepth * width : 0);
    r.d_out_copy = arena.take<E>(copies_ ? kQueryBlock / Dot::kDepth * value_width : 0);
    r.lse = arena.take<T>(kQueryBlock);
    r.delta = arena.take<T>(kQueryBlock);
    r.d_sink = arena.take<double>(1);
    r.finite = arena.take<int64_t>(1);
    return r;
  }

  /// Records are numbered sequence by sequence, head by head, block by block.
  LS_INLINE int64_t record_index(int64_t b, int64_t head, int64_t block) const {
    return blocks.first(b) * p_.heads + head * (blocks.first(b + 1) - blocks.first(b)) + block;
  }
  struct Place {
    int64_t batch, head, block, q0, q1;
  };
  LS_INLINE Place place_of(int64_t record) const {
    const int64_t b = blocks.sequence_of(record / p_.heads);
    const int64_t count = blocks.first(b + 1) - blocks.first(b);
    const int64_t within = record - blocks.first(b) * p_.heads;
    const int64_t q0 = within % count * kQueryBlock;
    return {b, within / count, within % count, q0, min_of(q0 + kQueryBlock, Sequence(p_, b).tokens)};
  }

  LS_INLINE TokenRows query_rows(const AttentionTensor& x, const Place& at) const {
    const Sequence s(p_, at.batch);
    return rows_of(x, p_.dtype, p_.cu_q ? 0 : at.batch, at.head, s.q_begin + at.q0);
  }
  LS_INLINE TokenRows key_rows(const AttentionTensor& x, int64_t batch, int64_t kv_head) const {
    const Sequence s(p_, batch);
    return rows_of(x, p_.dtype, p_.cu_k ? 0 : batch, kv_head, s.k_begin);
  }

  /// q and d_out of a block, contracted over tokens.
  LS_INLINE Operand<Dot> q_by_token(const QueryRecord<Dot>& r, const Place& at) const {
    if (copies_) return {r.q_copy, width};
    const TokenRows rows = query_rows(p_.q, at);
    return {static_cast<const E*>(rows.data), rows.stride};
  }
  LS_INLINE Operand<Dot> d_out_by_token(const QueryRecord<Dot>& r, const Place& at) const {
    if (copies_) return {r.d_out_copy, value_width};
    const TokenRows rows = query_rows(g_.d_out, at);
    return {static_cast<const E*>(rows.data), rows.stride};
  }

  void prepare(const Place& at, const QueryRecord<Dot>& r) const {
    const int64_t queries = at.q1 - at.q0;
    const TokenRows q = query_rows(p_.q, at), d_out = query_rows(g_.d_out, at);
    transposed<Dot>(q, queries, p_.channels, r.q_transposed, kQueryBlock);
    transposed<Dot>(d_out, queries, p_.value_channels, r.d_out_transposed, kQueryBlock);
    if (copies_) {
      copy_by_token(q, queries, p_.channels, width, r.q_copy);
      copy_by_token(d_out, queries, p_.value_channels, value_width, r.d_out_copy);
    }
    const int64_t columns = round_up(queries, kLanes<T>);
    *r.finite = all_finite<Dot>(Operand<Dot>{r.q_transposed, kQueryBlock}, depth, columns) &&
                all_finite<Dot>(Operand<Dot>{r.d_out_transposed, kQueryBlock}, value_depth, columns);

    const TokenRows out = query_rows(p_.out, at);
    const int64_t row = ((p_.cu_q ? 0 : at.batch) * p_.heads + at.head) * p_.tokens +
                        Sequence(p_, at.batch).q_begin + at.q0;
    const T* lse = static_cast<const T*>(p_.lse) + row;
    const T* d_lse = g_.d_lse ? static_cast<const T*>(g_.d_lse) + row : nullptr;
    double d_sink = 0;
    for (int64_t i = 0; i < kQueryBlock; ++i) {
      if (i >= queries) {
        r.lse[i] = kInfinity<T>;
        r.delta[i] = T(0);
        continue;
      }
      Vec<T> sum = {};
      for (int64_t c = 0; c < p_.value_channels; c += kLanes<T>) {
        const int64_t n = p_.value_channels - c;
        sum += load_as<T>(out.from(i).data, p_.dtype, c, n) *
               load_as<T>(d_out.from(i).data, p_.dtype, c, n);
      }
      r.delta[i] = sum_of_lanes<T>(sum) - (d_lse ? d_lse[i] : T(0));
      const bool empty = lse[i] == -kInfinity<T>;
      r.lse[i] = empty ? kInfinity<T> : lse[i];
      if (p_.sinks && !empty) {
        d_sink -= __builtin_exp(p_.sinks[at.head] - double(lse[i])) * double(r.delta[i]);
      }
    }
    *r.d_sink = d_sink;
  }

  /// scores: P^T; d_scores: dS^T with respect to the score before scale, up to that scale. With
  /// `biased`, dS^T with respect to what the mask adds. Rows up to an even number of keys and all
  /// lanes up to a whole vector are written. Dropout is in both.
  template <bool biased = false>
  void tile(const ScoreRules<T>& rules, const QueryRecord<Dot>& r, const Place& at, Operand<Dot> keys,
            Operand<Dot> values, int64_t k0, int64_t k1, bool visible, const Workspace& w,
            const BlockRun& run = {}) const {
    const int64_t count = k1 - k0, columns = round_up(at.q1 - at.q0, kLanes<T>);
    Product<Dot>{keys.data, keys.stride, 1, r.q_transposed, kQueryBlock, w.scores, kQueryBlock}
        .template run_as<Start::kZero, false, true>(count, columns, depth);
    Product<Dot>{values.data, values.stride, 1, r.d_out_transposed, kQueryBlock, w.d_scores, kQueryBlock}
        .template run_as<Start::kZero, false, true>(count, columns, value_depth);
    const bool capped = !biased && p_.softcap != 0;
    const bool plain = visible && rules.plain() && !rules.drops;
    if (!plain) rules.apply(w.scores, w.bias, capped ? w.derivative : nullptr, at.q0, at.q1, k0, k1);
    if (run.patterns && !visible) hide_unseen(p_.blocks, run, w.scores, at.q0, at.q1, k0, k1);
    if (plain) {
      differentiate<true>(rules, r, at, k0, count, columns, nullptr, w);
    } else {
      differentiate<false>(rules, r, at, k0, count, columns, capped ? w.derivative : nullptr, w);
    }
  }

  const AttentionParams& p_;
  const AttentionGradients& g_;
  QueryBlocks blocks;
  int64_t most_keys;  ///< of a tile
  int64_t depth, value_depth, width, value_width;

 private:
  void copy_by_token(TokenRows x, int64_t n, int64_t channels, int64_t ld, E* out) const {
    const Operand<Dot> form = by_token<Dot>(x, n, channels, true, out);
    if (form.data == out) return;
    for (int64_t t = 0; t < n; ++t) {
      __builtin_memcpy(out + t * ld, form.data + t * form.stride, size_t(ld) * sizeof(E));
    }
  }

  template <bool kPlain>
  void differentiate(const ScoreRules<T>& rules, const QueryRecord<Dot>& r, const Place& at, int64_t k0,
                     int64_t keys, int64_t columns, const T* derivative, const Workspace& w) const {
    constexpr int L = kLanes<T>;
    const T unit = kPlain ? rules.scale : T(1);
    for (int64_t i = 0; i < columns; i += L) {
      const Vec<T> lse = load(r.lse + i), delta = load(r.delta + i);
      for (int64_t k = 0; k < keys; k += 2) {
        Vec<T> keep[2] = {broadcast(T(1)), broadcast(T(1))};
        if (!kPlain && rules.drops) rules.dropout(at.q0 + i, k0 + k, keep[0], keep[1]);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          const int64_t cell = (k + odd) * kQueryBlock + i;
          if (k + odd == keys) {  // the odd row out
            store(w.scores + cell, Vec<T>{});
            store(w.d_scores + cell, Vec<T>{});
            continue;
          }
          const Vec<T> s = load(w.scores + cell), dp = load(w.d_scores + cell);
          Vec<T> p = weight_of<Dot>((s * unit - lse) * T(kLog2e));
          if constexpr (kPlain) {
            store(w.scores + cell, p);
            store(w.d_scores + cell, p * (dp - delta));
          } else {
            const auto hidden = s == -kInfinity<T>;
            p = select<T>(hidden, Vec<T>{}, p);
            Vec<T> ds = p * (dp * keep[odd] - delta);
            if (derivative) ds *= load(derivative + cell);
            store(w.scores + cell, p * keep[odd]);
            store(w.d_scores + cell, select<T>(hidden, Vec<T>{}, ds));
          }
        }
      }
    }
  }

  bool copies_;
};

}  // namespace longspan::LONGSPAN_ISA
