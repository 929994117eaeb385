// One chunk of the delta rule: a few tokens of a run, one value head. With a_t the sum of gates over the
// chunk's tokens up to and with t (decay.h), S the state before it, and rows of q, k, v and r,
//
//   P[t][s] = (k_t . k_s) exp(a_t - a_s)     for s < t, else 0     M[t][s] likewise of q_t, s <= t
//   X_t     = v_t - exp(a_t) k_t S                                 what the state before gets wrong
//   r_t     = X_t - sum of P[t][s] beta_s r_s                      what the one at t does
//   N_t     = beta_t r_t                                           what is written
//   Y       = M N + exp(a_t) q S                                   the output but for the scale
//   S'      = exp(a_n) S + sum of k_s exp(a_n - a_s) N_s^T
//
// (Yang et al. 2024, Parallelizing linear transformers with the delta rule, section 3; with gates Yang
// et al. 2025, Gated delta networks, section 3.3.) The triangle of equations for r is solved once a
// chunk for all value channels. With B the diagonal of beta,
//
//   H = P - P B H      r = (1 - H B) X      and backwards      D = (1 - H^T B) dN,   dX = B D
//
// so one strictly lower H, which does not divide by beta, serves both ways; -H is kept. What depends on
// q, k, beta and gates alone, -H and M, is a chunk's "pair": it needs no state, so all chunks' can be
// calculated at once. What is left is done for each value channel by itself, so that where heads are few
// the value channels can be divided among threads, with the same bits as if they were not.
#pragma once

#include "kernels/decay.h"
#include "kernels/delta_rule.h"
#include "kernels/states.h"

namespace longspan::LONGSPAN_ISA {

/// Tokens of a chunk. Of 3 K V + 2 chunk (K + V) / 2 multiply-adds a token and a chunk's own work, the
/// second part grows with it; but products of fewer tokens read and write the state more often.
inline constexpr int64_t kDeltaChunk = 32;

/// Tasks that are worth having, at the least: a constant, so that results do not depend on the machine.
inline constexpr int64_t kEnoughTasks = 8;

/// Which tokens a chunk has, of which value head.
struct DeltaPlace {
  const Run& run;
  int64_t head, t0, n;
};

/// What the tokens of a chunk have a number of.
template <class T>
struct DeltaNumbers : Decay<T> {
  T* beta;  ///< zero past the last token
  T* minus;  ///< -exp(a_t)
  T* scale;  ///< the same for all
  T* rescale;  ///< [columns]: exp(a_n), the same for all

  void lay_out(Arena& arena, int64_t columns) {
    Decay<T>::lay_out(arena, kDeltaChunk);
    T** const arrays[] = {&beta, &minus, &scale};
    for (T** array : arrays) *array = arena.take<T>(kDeltaChunk);
    rescale = arena.take<T>(columns);
  }

  void read(const DeltaRuleParams& p, const DeltaPlace& at, int64_t columns) {
    constexpr int L = kLanes<T>;
    for (int64_t t = 0; t < kDeltaChunk; ++t) {
      beta[t] = t < at.n ? number_of<T>(p.beta, at.run.batch, at.head, at.t0 + t) : T(0);
      scale[t] = T(p.scale);
    }
    this->prepare(at.n, kDeltaChunk, [&](int64_t t) {
      if (p.gate.data == nullptr) return 0.0;
      return double(number_of<T>(p.gate, at.run.batch, at.head, at.t0 + t)) * kLog2e;
    });
    for (int64_t t = 0; t < kDeltaChunk; t += L) store(minus + t, -load(this->from_start + t));
    for (int64_t c = 0; c < columns; c += L) store(rescale + c, broadcast(this->whole));
  }
};

template <class Dot>
class DeltaChunk {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t C = kDeltaChunk;

 public:
  static constexpr int64_t kPair = 2 * C * C;  ///< elements of -H and M
  static constexpr int64_t kSpanPairs = kSpan / C * kPair;

  explicit DeltaChunk(const DeltaRuleParams& params)
      : p(params), key_width(round_up(params.key_channels, L)),
        value_width(round_up(params.value_channels, L)), group(params.value_heads / params.heads) {}

  const DeltaRuleParams& p;
  int64_t key_width, value_width;  ///< of rows in work
  int64_t group;  ///< value heads of a head

  TokenRows query_rows(const SequenceTensor& x, const DeltaPlace& at) const {
    return rows_of(x, p.dtype, at.run.batch, at.head / group, at.t0);
  }
  /// From channel `from` on.
  TokenRows value_rows(const SequenceTensor& x, const DeltaPlace& at, int64_t from = 0) const {
    const TokenRows rows = rows_of(x, p.dtype, at.run.batch, at.head, at.t0);
    return {static_cast<const char*>(rows.data) + from * size_of(p.dtype), rows.dtype, rows.stride};
  }

  // Where one lies among all: of the sequences' states, and of those between spans.
  T* state_at(const void* states, int64_t index, int64_t head) const {
    return static_cast<T*>(const_cast<void*>(states)) +
           (index * p.value_heads + head) * p.key_channels * p.value_channels;
  }
  /// Null where there is none.
  T* initial_of(const Run& run, int64_t head) const {
    return run.initial < 0 ? nullptr : state_at(p.initial, run.initial, head);
  }

  DeltaPlace place(const Run& run, int64_t span, int64_t head, int64_t chunk) const {
    const int64_t t0 = run.begin_of(span) + chunk * C;
    return {run, head, t0, min_of(C, run.end_of(span) - t0)};
  }
  int64_t chunks_of(const Run& run, int64_t span) const {
    return ceil_div(run.end_of(span) - run.begin_of(span), C);
  }

  // ---- pairs

  struct PairWorkspace {
    T* turned;  ///< k^T [key_channels][C]
    T *q, *k;  ///< copies, where memory does not have the form
    T* weighted;  ///< -P B [C][C]

    void lay_out(Arena& arena, int64_t key_channels) {
      turned = arena.take<T>(key_channels * C);
      q = arena.take<T>(key_channels * C);
      k = arena.take<T>(key_channels * C);
      weighted = arena.take<T>(C * C);
    }
  };

  /// Of all chunks of a span: [chunks][kPair].
  void span_pairs(const Run& run, int64_t span, int64_t head, DeltaNumbers<T>& numbers,
                  const PairWorkspace& w, T* pairs) const {
    for (int64_t c = 0; c < chunks_of(run, span); ++c) {
      const DeltaPlace at = place(run, span, head, c);
      numbers.read(p, at, 0);
      pair(at, numbers, w, pairs + c * kPair);
    }
  }

  /// -H, and M after it, [C][C] each: whole strips of rows up to n, with zeros on and above H's
  /// diagonal, and above M's.
  void pair(const DeltaPlace& at, const DeltaNumbers<T>& x, const PairWorkspace& w, T* out) const {
    T *h = out, *m = out + C * C;
    const TokenRows q_rows = query_rows(p.q, at), k_rows = query_rows(p.k, at);
    transposed<Dot>(k_rows, at.n, p.key_channels, w.turned, C);
    triangle(by_channel<Dot>(k_rows, at.n, p.key_channels, w.k), w.turned, p.key_channels, at.n, h);
    triangle(by_channel<Dot>(q_rows, at.n, p.key_channels, w.q), w.turned, p.key_channels, at.n, m);
    decay_scores(x, at.n, m, h);
    negate(x, at.n, h, w.weighted);
    for (int64_t t = 0; t < at.n; t += kStrip) {
      if (t > 0) {
        Product<Dot>{w.weighted + t * C, C, 1, h, C, h + t * C, C}
            .template run_as<Start::kAccumulate, false, true>(kStrip, t, t);
      }
      for (int64_t i = 0; i < t + kStrip; i += L) eliminate(w.weighted + t * C + t, h + t * C + i);
    }
  }

  /// a . b^T, strips of it up to the diagonal, b^T [depth][C].
  void triangle(Operand<Dot> a, const T* turned, int64_t depth, int64_t n, T* out) const {
    for (int64_t t = 0; t < n; t += kStrip) {
      const int64_t count = min_of(kStrip, n - t);
      Product<Dot>{a.data + t * a.stride, a.stride, 1, turned, C, out + t * C, C}
          .template run_as<Start::kZero, false, true>(count, round_up(t + count, L), depth);
    }
  }

  /// Scores become M, with its diagonal, and P, without: decays, and zeros from there on.
  void decay_scores(const DeltaNumbers<T>& x, int64_t n, T* m, T* p_scores) const {
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < t / kStrip * kStrip + kStrip; i += L) {
        const int64_t cell = t * C + i;
        Vec<T> of_m = load(m + cell), of_p = load(p_scores + cell);
        if (p.gate.data) {
          const Vec<T> e = x.between(t, i, lane);
          of_m *= e;
          of_p *= e;
        }
        if (i + L > t) {
          const auto index = lane + T(i);
          of_m = select<T>(index <= T(t), of_m, Vec<T>{});
          of_p = select<T>(index < T(t), of_p, Vec<T>{});
        }
        store(m + cell, of_m);
        store(p_scores + cell, of_p);
      }
    }
  }

  /// 1 - H B, or with its rows times beta: r, or N, from X. [C][C], whole strips.
  template <bool kTimesBeta>
  void solver(const DeltaNumbers<T>& x, int64_t n, const T* h, T* out) const {
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < t / kStrip * kStrip + kStrip; i += L) {
        const auto index = lane + T(i);
        Vec<T> v = load(h + t * C + i) * load(x.beta + i);
        if (i + L > t) {  // a zero times what is to come need not be one
          v = select<T>(index < T(t), v, select<T>(index == T(t), broadcast(T(1)), Vec<T>{}));
        }
        store(out + t * C + i, kTimesBeta ? v * x.beta[t] : v);
      }
    }
  }

  /// to[t] (+)= sum over s <= t of m[t][s] x[s]. A zero of m must not meet an infinite value of the
  /// future (tile.h).
  template <Start kStart>
  void add_from_earlier(const T* m, const T* x, int64_t width, int64_t n, T* to) const {
    all_finite<Dot>({x, width}, n, width) ? add_from_earlier_as<kStart, false>(m, x, width, n, to)
                                          : add_from_earlier_as<kStart, true>(m, x, width, n, to);
  }

  /// to[s] += sum over t >= s of m[t][s] x[t].
  void add_from_later(const T* m, const T* x, int64_t width, int64_t n, T* to) const {
    for (int64_t s = 0; s < n; s += kStrip) {
      const int64_t count = min_of(kStrip, n - s);
      Product<Dot>{m + s * C + s, 1, C, x + s * width, width, to + s * width, width}
          .template run_as<Start::kAccumulate, false, false>(count, width, n - s);
    }
  }

  /// The state over a chunk: what it decays to, and the product on top.
  void advance(const DeltaNumbers<T>& x, Product<Dot> product, int64_t width, int64_t depth) const {
    product.rescale = x.rescale;
    if (p.gate.data) {
      product.template run_as<Start::kRescale, false, false>(p.key_channels, width, depth);
    } else {
      product.template run_as<Start::kAccumulate, false, false>(p.key_channels, width, depth);
    }
  }

 private:
  template <Start kStart, bool kGuarded>
  void add_from_earlier_as(const T* m, const T* x, int64_t width, int64_t n, T* to) const {
    for (int64_t t = 0; t < n; t += kStrip) {
      const int64_t count = min_of(kStrip, n - t);
      Product<Dot>{m + t * C, C, 1, x, width, to + t * width, width}
          .template run_as<kStart, kGuarded, true>(count, width, t + count);
    }
  }

  /// h from P to -P, and -P B; the last strip is filled up with zeros.
  void negate(const DeltaNumbers<T>& x, int64_t n, T* h, T* weighted) const {
    for (int64_t t = 0; t < round_up(n, kStrip); ++t) {
      for (int64_t i = 0; i < t / kStrip * kStrip + kStrip; i += L) {
        const Vec<T> v = t < n ? -load(h + t * C + i) : Vec<T>{};
        store(h + t * C + i, v);
        store(weighted + t * C + i, v * load(x.beta + i));
      }
    }
  }

  /// Each of a strip's rows of -H, a vector of it, gets what the rows before it add.
  void eliminate(const T* weighted, T* h) const {
    Vec<T> row[kStrip];
#pragma GCC unroll 16
    for (int i = 0; i < kStrip; ++i) row[i] = load(h + i * C);
#pragma GCC unroll 16
    for (int j = 0; j < kStrip - 1; ++j) {
#pragma GCC unroll 16
      for (int i = j + 1; i < kStrip; ++i) row[i] += weighted[i * C + j] * row[j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kStrip; ++i) store(h + i * C, row[i]);
  }
};

}  // namespace longspan::LONGSPAN_ISA
