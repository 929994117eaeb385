// One chunk of linear attention: a few tokens of a run, one head. Without gates, or with one a token,
// and a_t the sum of gates over the chunk's tokens up to and with t (decay.h),
//
//   M[t][s] = (q_t . k_s) exp(a_t - a_s)     for s <= t, else 0
//   Y       = M V + exp(a_t) q S             the output but for scale and normaliser
//   S'      = exp(a_n) S + sum of k_s exp(a_n - a_s) v_s^T
//
// The two products of Y are one sum in registers (More, tile.h), which is scaled, and divided by the
// normaliser, where it is stored.
#pragma once

#include "kernels/decay.h"
#include "kernels/linear_attention.h"
#include "kernels/linear_attention_gate.h"
#include "kernels/states.h"

namespace longspan::LONGSPAN_ISA {

/// Tokens of a chunk. Of 2 K V + chunk (K + V) / 2 multiply-adds a token the second part grows with it,
/// and the first runs no faster in larger ones: measured for K and V of 32 to 256.
inline constexpr int64_t kLinearChunk = 32;

template <class T>
struct LinearState {
  T* s;  ///< [key_channels][value_width]
  T* z;  ///< [key_width], where normalized
};

/// What the tokens of one chunk decay by, whatever the gates.
template <class T>
struct LinearDecay {
  static constexpr int L = kLanes<T>;

  Gate kind;
  Decay<T> token;           ///< where kind is kToken
  ChannelDecay<T> channel;  ///< where kind is kChannel
  T* whole;                 ///< [width]: what a state's rows decay by over the chunk; not for kNone
  int64_t width;

  void lay_out(Arena& arena, Gate gate, int64_t tokens, int64_t key_width) {
    kind = gate, width = key_width;
    token.lay_out(arena, kind == Gate::kToken ? tokens : 0);
    channel.lay_out(arena, kind == Gate::kChannel ? width : 0);
    whole = arena.take<T>(kind == Gate::kToken ? width : 0);
  }

  void prepare(const LinearAttentionParams& p, const Run& run, int64_t head, int64_t t0, int64_t n,
               int64_t tokens) {
    const GateTensor& g = p.gate;
    const int64_t at = run.batch * g.batch + head * g.head + t0 * g.token;
    if (kind == Gate::kToken) {
      token.prepare(n, tokens, [&](int64_t t) {
        return double(load_as<T>(g.data, g.dtype, at + t * g.token, 1)[0]) * kLog2e;
      });
      for (int64_t c = 0; c < width; c += L) store(whole + c, broadcast(token.whole));
    } else if (kind == Gate::kChannel) {
      channel.prepare(n, [&](int64_t t, int64_t c) {
        return load_as<T>(g.data, g.dtype, at + t * g.token + c, p.key_channels - c);
      });
      whole = channel.whole();
    }
  }

  /// `whole`, or null where nothing decays.
  const T* factors() const { return kind == Gate::kNone ? nullptr : whole; }

  /// out = exp(a_t) x_t, and exp(a_n - a_t) x_t, for rows of key channels; out may be x. Not for kNone.
  void from_start(const T* x, int64_t stride, int64_t n, T* out, int64_t out_stride) const {
    multiply(x, stride, n, token.from_start, channel.from_start, out, out_stride);
  }
  void to_end(const T* x, int64_t stride, int64_t n, T* out, int64_t out_stride) const {
    multiply(x, stride, n, token.to_end, channel.to_end, out, out_stride);
  }

 private:
  void multiply(const T* x, int64_t stride, int64_t n, const T* by_token, const T* by_channel, T* out,
                int64_t out_stride) const {
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t c = 0; c < width; c += L) {
        const Vec<T> factor =
            kind == Gate::kToken ? broadcast(by_token[t]) : load(by_channel + t * width + c);
        store(out + t * out_stride + c, load(x + t * stride + c) * factor);
      }
    }
  }
};

/// Which tokens a chunk has, of which head.
struct LinearPlace {
  const Run& run;
  int64_t head, t0, n;
};

template <class Dot>
class LinearChunk {
  using E = typename Dot::Element;
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;

 public:
  explicit LinearChunk(const LinearAttentionParams& params)
      : p(params), tokens(params.kind == Gate::kChannel ? kStrip : kLinearChunk),
        key_width(round_up(params.key_channels, L)), value_width(round_up(params.value_channels, L)),
        state_size(params.key_channels * value_width) {}

  const LinearAttentionParams& p;
  int64_t tokens;                  ///< of a chunk
  int64_t key_width, value_width;  ///< of rows in work
  int64_t state_size;              ///< of S in work

  /// The head's, or its key-value head's, rows from a token on.
  TokenRows rows(const SequenceTensor& x, const Run& run, int64_t head, int64_t token) const {
    return rows_of(x, p.dtype, run.batch, head, token);
  }
  TokenRows query_rows(const SequenceTensor& x, const LinearPlace& at) const {
    return rows(x, at.run, at.head, at.t0);
  }
  TokenRows key_rows(const SequenceTensor& x, const LinearPlace& at) const {
    return rows(x, at.run, kv_head(at.head), at.t0);
  }

  /// A state through a chunk: what it decays to, by rows or columns, and the product on top.
  template <Start kDecayed, class Besides = Nothing>
  void advance(Product<Dot> product, const LinearDecay<T>& decay, int64_t rows, int64_t columns,
               int64_t depth, const Besides& besides = {}) const {
    product.rescale = decay.factors();
    if (product.rescale == nullptr) {
      product.template run_as<Start::kAccumulate, false, false>(rows, columns, depth, besides);
    } else {
      product.template run_as<kDecayed, false, false>(rows, columns, depth, besides);
    }
  }
  int64_t kv_head(int64_t head) const { return head / (p.heads / p.kv_heads); }

  /// M from scores [n][tokens], as elements of rows ld apart: whole strips, zeros above the diagonal.
  /// sums: of each row, where normalized.
  void mix(const LinearDecay<T>& decay, const T* scores, int64_t n, E* out, int64_t ld, T* sums) const {
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    for (int64_t t = 0; t < n; ++t) {
      const int64_t end = t / kStrip * kStrip + kStrip;
      Vec<T> sum = {};
      for (int64_t i = 0; i < end; i += L) {
        Vec<T> m = load(scores + t * tokens + i);
        if (p.kind == Gate::kToken) m *= decay.token.between(t, i, lane);
        if (i + L > t) m = select<T>(lane + T(i) <= T(t), m, Vec<T>{});
        sum += m;
        store_scalars<Dot>(out + t * ld, i, m);
      }
      if (p.normalized) sums[t] = sum_of_lanes<T>(sum);
    }
  }

  /// z = whole z + sum of n rows, each times a factor where there are any; whole may be null.
  void advance_norm(const T* whole, const T* rows, int64_t stride, const T* factors, int64_t n,
                    T* z) const {
    for (int64_t c = 0; c < key_width; c += L) {
      Vec<T> sum = load(z + c);
      if (whole) sum *= load(whole + c);
      for (int64_t t = 0; t < n; ++t) {
        const Vec<T> x = load(rows + t * stride + c);
        sum += factors ? x * factors[t] : x;
      }
      store(z + c, sum);
    }
  }

  /// What rows of q S are multiplied by, and kept of it: the scale, over the normaliser where there is
  /// one. q_rows [n][key_width]; sums: what tokens of the chunk add to q.z, or null.
  void weigh(const T* q_rows, const T* z, const T* sums, int64_t n, T* kept, T* factor) const {
    const T scale = T(p.scale);
    for (int64_t t = 0; t < n; ++t) {
      if (!p.normalized) {
        factor[t] = scale;
        continue;
      }
      Vec<T> sum = {};
      for (int64_t c = 0; c < key_width; c += L) sum += load(q_rows + t * key_width + c) * load(z + c);
      const T denominator = scale * (sum_of_lanes<T>(sum) + (sums ? sums[t] : T(0))) + T(p.eps);
      factor[t] = denominator == T(0) ? T(0) : scale / denominator;
      if (kept) kept[t] = denominator;
    }
  }

  /// Backwards from that: dY [n][value_width] is d_out times the factor, r the gradient of q.z.
  void load_dy(TokenRows d_out, TokenRows out, const T* denominators, int64_t n, T* factor, T* dy,
               T* r) const {
    for (int64_t t = 0; t < n; ++t) {
      factor[t] = T(p.scale);
      if (!p.normalized) continue;
      factor[t] = denominators[t] == T(0) ? T(0) : T(p.scale) / denominators[t];
      Vec<T> sum = {};
      for (int64_t c = 0; c < p.value_channels; c += L) {
        const int64_t left = p.value_channels - c;
        sum += load_as<T>(out.from(t).data, p.dtype, c, left) *
               load_as<T>(d_out.from(t).data, p.dtype, c, left);
      }
      r[t] = -factor[t] * sum_of_lanes<T>(sum);
    }
    copy_rows<T>(d_out, n, p.value_channels, value_width, factor, dy);
  }

  /// States that the caller has, dense; a null pointer is zeros.
  void load_state(const T* s, const T* z, LinearState<T> to) const {
    LONGSPAN_ISA::load_state(s, p.value_channels, p.key_channels, p.value_channels, value_width, to.s);
    if (p.normalized) LONGSPAN_ISA::load_state(z, 0, 1, p.key_channels, key_width, to.z);
  }
  void store_state(LinearState<T> from, T* s, T* z) const {
    LONGSPAN_ISA::store_state(from.s, value_width, p.key_channels, p.value_channels, s,
                              p.value_channels);
    if (p.normalized) LONGSPAN_ISA::store_state(from.z, key_width, 1, p.key_channels, z, 0);
  }

  // Where one lies among all: of the sequences' states, and of those between spans.
  T* state_at(const void* states, int64_t index, int64_t head) const {
    return at(states, (index * p.heads + head) * p.key_channels * p.value_channels);
  }
  T* norm_at(const void* norms, int64_t index, int64_t head) const {
    return at(norms, (index * p.heads + head) * p.key_channels);
  }
  int64_t boundary_size() const { return p.key_channels * (p.value_channels + (p.normalized ? 1 : 0)); }
  T* boundary(int64_t index, int64_t head) const {
    return at(p.boundaries, (index * p.heads + head) * boundary_size());
  }
  template <class P>
  P* norm_of(P* boundary) const {
    return boundary + p.key_channels * p.value_channels;
  }
  /// Null where there are none.
  T* denominators(const Run& run, int64_t head, int64_t token) const {
    if (p.denominators == nullptr || !p.normalized) return nullptr;
    return at(p.denominators, (run.batch * p.heads + head) * p.tokens + token);
  }

  /// Boundaries: to += decay of each row * from; without decays, from.
  void add_decayed(const T* from, const T* decay, T* to) const {
    const int64_t columns = p.value_channels;
    for (int64_t i = 0; i < p.key_channels; ++i) {
      const T factor = decay ? decay[i] : T(1);
      for (int64_t c = 0; c < columns; c += L) {
        const int64_t cell = i * columns + c, n = min_of<int64_t>(columns - c, L);
        store_first(to + cell, load_first(to + cell, n) + factor * load_first(from + cell, n), n);
      }
      if (p.normalized) norm_of(to)[i] += factor * norm_of(from)[i];
    }
  }

  void load_initial(const Run& run, int64_t head, LinearState<T> to) const {
    const bool any = run.initial >= 0;
    load_state(any ? state_at(p.initial, run.initial, head) : nullptr,
               any ? norm_at(p.initial_norm, run.initial, head) : nullptr, to);
  }
  void load_boundary(int64_t index, int64_t head, LinearState<T> to) const {
    T* from = boundary(index, head);
    load_state(from, norm_of(from), to);
  }
  void store_boundary(LinearState<T> from, int64_t index, int64_t head) const {
    T* to = boundary(index, head);
    store_state(from, to, norm_of(to));
  }

 private:
  static T* at(const void* base, int64_t offset) {
    return static_cast<T*>(const_cast<void*>(base)) + offset;
  }
};

}  // namespace longspan::LONGSPAN_ISA
