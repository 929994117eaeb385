// Linear attention, backward: one chunk of one head. With the forward's names
// (linear_attention_chunk.h), dY for d_out times the scale, over the normaliser where there is one, and
// r_t for what the normaliser itself passes on to q_t . z_t:
//
//   dM[t][s] = (dY_t . v_s + r_t) exp(a_t - a_s)       for s <= t
//   dV       = M^T dY + exp(a_n - a_s) k_s dS
//   dQ       = dM K   + exp(a_t) (dY S^T + r z^T)
//   dK       = dM^T Q + exp(a_n - a_s) (V dS^T + dz)
//   dS       = exp(a_n) dS + sum of exp(a_t) q_t dY_t^T,  dz likewise with r_t
//
// S and z are those before the chunk, dS and dz those behind it. A gate's gradient is that of all decays
// from its token on: with what is behind the chunk, sum over v of S dS at its end, and q_t dQ_t - k_t
// dK_t within (Yang et al. 2023, appendix C). S^T and dS^T, value channels by key channels, are what
// most products read.
#pragma once

#include "kernels/linear_attention_chunk.h"

namespace longspan::LONGSPAN_ISA {

template <class Dot>
class LinearGradient {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kBytes = sizeof(T);
  static constexpr Dtype kDtype = kDtypeOf<T>;
  /// Gates below make a decay of exactly zero, and have no gradient.
  static constexpr T kForgets = sizeof(T) == 8 ? T(-746) : T(-104);

 public:
  LinearGradient(const LinearAttentionParams& p, const LinearAttentionGradients& g)
      : chunk(p), p_(p), g_(g), group_(p.heads / p.kv_heads) {}

  const LinearChunk<Dot> chunk;

  /// Rows of a chunk's tokens: in memory if they have the form there, else copies, padded with zeros.
  struct Inputs {
    Operand<Dot> q, k, v, scaled_q, scaled_k;  ///< scaled: exp(a_t) q_t, exp(a_n - a_s) k_s
  };
  /// Where sums are made: in the result if that has the form, else in work.
  struct Rows {
    T* data;
    int64_t stride;
  };

  struct Workspace {
    LinearDecay<T> decay;
    T* d_turned;  ///< dS^T
    T *q, *k, *v, *scaled_q, *scaled_k;  ///< copies [tokens][key_width or value_width]
    T* dy;  ///< [tokens][value_width]
    T *r, *factor;  ///< [tokens]
    T* turned;  ///< k^T, then v^T [channels][tokens]
    T *m, *dm;  ///< [tokens][tokens]
    T *dq, *dk, *dv;  ///< [tokens][key_width or value_width]
    T* end;  ///< [key_width]: the gradient of all decays up to the chunk's end
    T *dk_sum, *dv_sum;  ///< of the span, over the group's heads
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    const int64_t tokens = chunk.tokens, key = chunk.key_width, value = chunk.value_width;
    w.decay.lay_out(arena, p_.kind, tokens, key);
    w.d_turned = arena.take<T>(state_size());
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

  /// S or S^T in work, whichever is larger, and z.
  int64_t state_size() const {
    return max_of(chunk.state_size, p_.value_channels * chunk.key_width) + chunk.key_width;
  }
  int64_t state_bytes() const { return state_size() * kBytes; }

  LinearState<T> state_in(T* space) const { return {space, space + state_size() - chunk.key_width}; }
  void turn(const T* state, T* out) const {
    transposed<Dot>({state, kDtype, chunk.value_width}, p_.key_channels, p_.value_channels, out,
                    chunk.key_width);
  }

  // ---- what a chunk reads and writes

  /// For gates a key channel with zeros behind the last token, which are read.
  Operand<Dot> load_rows(TokenRows x, int64_t n, int64_t channels, int64_t width, T* copy) const {
    if (p_.kind != Gate::kChannel) return by_token<Dot>(x, n, channels, true, copy);
    copy_rows<T>(x, n, channels, width, nullptr, copy);
    __builtin_memset(copy + n * width, 0, size_t((chunk.tokens - n) * width * kBytes));
    return {copy, width};
  }
  void load_queries(const LinearPlace& at, const Workspace& w, Inputs& in) const {
    const int64_t key = chunk.key_width;
    in.q = in.scaled_q = load_rows(chunk.query_rows(p_.q, at), at.n, p_.key_channels, key, w.q);
    if (p_.kind == Gate::kNone) return;
    in.scaled_q = {w.scaled_q, key};
    w.decay.from_start(in.q.data, in.q.stride, at.n, w.scaled_q, key);
  }
  void load_keys(const LinearPlace& at, const Workspace& w, Inputs& in) const {
    const int64_t key = chunk.key_width;
    in.k = in.scaled_k = load_rows(chunk.key_rows(p_.k, at), at.n, p_.key_channels, key, w.k);
    in.v = load_rows(chunk.key_rows(p_.v, at), at.n, p_.value_channels, chunk.value_width, w.v);
    if (p_.kind == Gate::kNone) return;
    in.scaled_k = {w.scaled_k, key};
    w.decay.to_end(in.k.data, in.k.stride, at.n, w.scaled_k, key);
  }

  /// kv: of a key-value head, which several heads may share.
  Rows rows_for(TokenRows to, int64_t channels, int64_t width, T* work, bool kv) const {
    const bool fits = is_native<Dot>(to.dtype) && channels == width && !(kv && group_ > 1) &&
                      p_.kind != Gate::kChannel;
    return fits ? Rows{static_cast<T*>(const_cast<void*>(to.data)), to.stride} : Rows{work, width};
  }
  struct Outputs {
    Rows dq, dk, dv;
  };
  Rows dq_rows(const LinearPlace& at, const Workspace& w) const {
    return rows_for(chunk.query_rows(g_.dq, at), p_.key_channels, chunk.key_width, w.dq, false);
  }
  Rows dk_rows(const LinearPlace& at, const Workspace& w) const {
    return rows_for(chunk.key_rows(g_.dk, at), p_.key_channels, chunk.key_width, w.dk, true);
  }
  Rows dv_rows(const LinearPlace& at, const Workspace& w) const {
    return rows_for(chunk.key_rows(g_.dv, at), p_.value_channels, chunk.value_width, w.dv, true);
  }
  /// Takes them there if they are not.
  void finish(Rows rows, const T* work, int64_t n, int64_t channels, TokenRows to) const {
    if (rows.data == work) store_rows<T>(work, rows.stride, n, channels, nullptr, to);
  }
  static void clear(Rows rows, int64_t n, int64_t width) {
    for (int64_t t = 0; t < n; ++t) {
      __builtin_memset(rows.data + t * rows.stride, 0, size_t(width * kBytes));
    }
  }

  void load_dy(const LinearPlace& at, const Workspace& w) const {
    chunk.load_dy(chunk.query_rows(g_.d_out, at), chunk.query_rows(p_.out, at),
                  chunk.denominators(at.run, at.head, at.t0), at.n, w.factor, w.dy, w.r);
  }

  /// What a chunk reads and writes, but for keys and values: those were read for the states.
  void ask_for(const LinearPlace& at, Ahead& ahead) const {
    ahead.add(chunk.query_rows(g_.d_out, at), at.n, p_.value_channels);
    ahead.add(chunk.query_rows(p_.q, at), at.n, p_.key_channels);
    ahead.add(chunk.query_rows(g_.dq, at), at.n, p_.key_channels);
    ahead.add(chunk.key_rows(g_.dk, at), at.n, p_.key_channels);
    ahead.add(chunk.key_rows(g_.dv, at), at.n, p_.value_channels);
  }

  // ---- the chunk

  /// dS and dz before a chunk, from those behind it.
  void retreat(const LinearPlace& at, Operand<Dot> scaled_q, LinearState<T> d, const Workspace& w,
               Ahead& ahead) const {
    const int64_t width = chunk.value_width;
    const Product<Dot> product{scaled_q.data, 1, scaled_q.stride, w.dy, width, d.s, width};
    chunk.template advance<Start::kRescaleRows>(product, w.decay, p_.key_channels, width, at.n,
                                                Between{ahead});
    if (!p_.normalized) return;
    chunk.advance_norm(w.decay.factors(), scaled_q.data, scaled_q.stride, w.r, at.n, d.z);
  }

  /// One chunk of one head, of which everything is loaded. state: before it, where `before` says that it
  /// is not zero; d: behind it, likewise.
  void differentiate(const LinearPlace& at, const Inputs& in, LinearState<T> state, bool before,
                     LinearState<T> d, bool behind, const Workspace& w, Ahead& ahead) const {
    const int64_t n = at.n, key = chunk.key_width, value = chunk.value_width;
    const Outputs to{dq_rows(at, w), dk_rows(at, w), dv_rows(at, w)};
    before ? read_state(n, state, to.dq, w, ahead) : clear(to.dq, n, key);
    for (int64_t c = 0; c < key; c += L) store(w.end + c, Vec<T>{});
    if (behind) {
      write_state(n, in, d, to, w, ahead);
    } else {
      clear(to.dk, n, key);
      clear(to.dv, n, value);
    }
    if (before && behind && p_.kind != Gate::kNone) meet(state, d, w);
    within(n, in, to, w, ahead);
    if (p_.kind != Gate::kNone) gate_gradient(at, in, to, w);
    finish(to.dq, w.dq, n, p_.key_channels, chunk.query_rows(g_.dq, at));
    store_shared(at, to.dk, w.dk, w.dk_sum, key, p_.key_channels, chunk.key_rows(g_.dk, at));
    store_shared(at, to.dv, w.dv, w.dv_sum, value, p_.value_channels, chunk.key_rows(g_.dv, at));
  }

  /// What the queries get from reading the state before the chunk.
  void read_state(int64_t n, LinearState<T> state, Rows dq, const Workspace& w, Ahead& ahead) const {
    const int64_t key = chunk.key_width;
    Product<Dot>{w.dy, chunk.value_width, 1, state.s, key, dq.data, dq.stride}
        .template run_as<Start::kZero, false, true>(n, key, p_.value_channels, Between{ahead});
    for (int64_t t = 0; t < n && p_.normalized; ++t) add_row(w.r[t], state.z, dq.data + t * dq.stride);
    if (p_.kind != Gate::kNone) w.decay.from_start(dq.data, dq.stride, n, dq.data, dq.stride);
  }

  /// What keys and values get from writing to the state behind it, and the decays to the chunk's end
  /// with them.
  void write_state(int64_t n, const Inputs& in, LinearState<T> d, const Outputs& to, const Workspace& w,
                   Ahead& ahead) const {
    const int64_t key = chunk.key_width, value = chunk.value_width;
    const Rows dk = to.dk;
    turn(d.s, w.d_turned);
    Product<Dot>{in.v.data, in.v.stride, 1, w.d_turned, key, dk.data, dk.stride}
        .template run_as<Start::kZero, false, true>(n, key, p_.value_channels, Between{ahead});
    Product<Dot>{in.scaled_k.data, in.scaled_k.stride, 1, d.s, value, to.dv.data, to.dv.stride}
        .template run_as<Start::kZero, false, true>(n, value, p_.key_channels, Between{ahead});
    for (int64_t t = 0; t < n && p_.normalized; ++t) add_row(T(1), d.z, dk.data + t * dk.stride);
    if (p_.kind == Gate::kNone) return;
    w.decay.to_end(dk.data, dk.stride, n, dk.data, dk.stride);
    for (int64_t c = 0; c < key; c += L) {
      Vec<T> sum = {};
      for (int64_t t = 0; t < n; ++t) {
        sum += load(in.k.data + t * in.k.stride + c) * load(dk.data + t * dk.stride + c);
      }
      store(w.end + c, sum);
    }
  }

 private:
  void add_row(T factor, const T* x, T* to) const {
    for (int64_t c = 0; c < chunk.key_width; c += L) {
      store(to + c, load(to + c) + factor * load(x + c));
    }
  }

  /// The decay of the whole chunk: the state before it meets the gradient behind it.
  void meet(LinearState<T> state, LinearState<T> d, const Workspace& w) const {
    const int64_t key = chunk.key_width;
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
  void within(int64_t n, const Inputs& in, const Outputs& to, const Workspace& w, Ahead& ahead) const {
    const int64_t key = chunk.key_width, value = chunk.value_width;
    const Operand<Dot> dy{w.dy, value}, dm{w.dm, chunk.tokens};
    transposed<Dot>(rows_in_work(in.v), n, p_.value_channels, w.turned, chunk.tokens);
    triangle(dy, p_.value_channels, n, w.dm, w, ahead);
    if (p_.kind != Gate::kChannel) {
      transposed<Dot>(rows_in_work(in.k), n, p_.key_channels, w.turned, chunk.tokens);
      triangle(in.q, p_.key_channels, n, w.m, w, ahead);
      mix(n, w);
      for (int64_t t = 0; t < n; t += kStrip) {
        const int64_t count = min_of(kStrip, n - t);
        Product<Dot>{dm.data + t * dm.stride,       dm.stride,   1, in.k.data, in.k.stride,
                     to.dq.data + t * to.dq.stride, to.dq.stride}
            .template run_as<Start::kAccumulate, false, true>(count, key, t + count, Between{ahead});
      }
      add_from_later(w.dm, in.q, key, n, to.dk, ahead);
    } else {
      mix(n, w);
      __builtin_memset(w.dm + n * kStrip, 0, size_t((kStrip - n) * kStrip * kBytes));
      w.decay.channel.scores_and_gradient(in.q.data, in.k.data, w.dm, n, w.m, to.dq.data, to.dk.data);
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t s = t + 1; s < n; ++s) w.m[t * kStrip + s] = T(0);
      }
    }
    add_from_later(w.m, dy, value, n, to.dv, ahead);
  }
  static TokenRows rows_in_work(Operand<Dot> x) { return {x.data, kDtype, x.stride}; }

  /// a . b^T, strips of it up to the diagonal, with b^T in w.turned.
  void triangle(Operand<Dot> a, int64_t depth, int64_t n, T* out, const Workspace& w,
                Ahead& ahead) const {
    const int64_t tokens = chunk.tokens;
    for (int64_t t = 0; t < n; t += kStrip) {
      const int64_t count = min_of(kStrip, n - t);
      Product<Dot>{a.data + t * a.stride, a.stride, 1, w.turned, tokens, out + t * tokens, tokens}
          .template run_as<Start::kZero, false, true>(count, round_up(t + count, L), depth,
                                                      Between{ahead});
    }
  }

  /// to[s] += sum over t >= s of m[t][s] x[t].
  void add_from_later(const T* m, Operand<Dot> x, int64_t width, int64_t n, Rows to,
                      Ahead& ahead) const {
    const int64_t tokens = chunk.tokens;
    for (int64_t s = 0; s < n; s += kStrip) {
      const int64_t count = min_of(kStrip, n - s);
      Product<Dot>{m + s * tokens + s,      1,        tokens, x.data + s * x.stride, x.stride,
                   to.data + s * to.stride, to.stride}
          .template run_as<Start::kAccumulate, false, false>(count, width, n - s, Between{ahead});
    }
  }

  /// M and dM from their products: decays, and zeros above the diagonal.
  void mix(int64_t n, const Workspace& w) const {
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    const bool products = p_.kind != Gate::kChannel;
    for (int64_t t = 0; t < n; ++t) {
      const int64_t end = round_up(min_of(t / kStrip * kStrip + kStrip, n), L);
      for (int64_t i = 0; i < end; i += L) {
        const int64_t cell = t * chunk.tokens + i;
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

  void gate_gradient(const LinearPlace& at, const Inputs& in, const Outputs& x,
                     const Workspace& w) const {
    const GateTensor &gate = p_.gate, &to = g_.d_gate;
    const int64_t from = at.run.batch * gate.batch + at.head * gate.head + at.t0 * gate.token;
    const int64_t there = at.run.batch * to.batch + at.head * to.head + at.t0 * to.token;
    const int64_t key = chunk.key_width;
    const auto change = [&](int64_t t, int64_t c) {
      const Vec<T> q = load(in.q.data + t * in.q.stride + c), k = load(in.k.data + t * in.k.stride + c);
      return q * load(x.dq.data + t * x.dq.stride + c) - k * load(x.dk.data + t * x.dk.stride + c);
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
  void store_shared(const LinearPlace& at, Rows rows, const T* work, T* sums, int64_t width,
                    int64_t channels, TokenRows to) const {
    if (group_ == 1) return finish(rows, work, at.n, channels, to);
    const int64_t of_group = at.head % group_;
    T* sum = sums + (at.t0 - at.run.begin) % kSpan * width;
    for (int64_t i = 0; i < at.n * width; i += L) {
      const Vec<T> x = load(work + i);
      store(sum + i, of_group == 0 ? x : load(sum + i) + x);
    }
    if (of_group + 1 == group_) store_rows<T>(sum, width, at.n, channels, nullptr, to);
  }

  const LinearAttentionParams& p_;
  const LinearAttentionGradients& g_;
  int64_t group_;  ///< heads of a key-value head
};

}  // namespace longspan::LONGSPAN_ISA
