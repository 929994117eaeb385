// One chunk of linear attention: a few tokens of a run, one head. Without gates, or with one a token,
// and a_t the sum of gates over the chunk's tokens up to and with t (decay.h),
//
//   M[t][s] = (q_t . k_s) exp(a_t - a_s)     for s <= t, else 0
//   Y       = M V + exp(a_t) q S             the output but for scale and normaliser
//   S'      = exp(a_n) S + sum of k_s exp(a_n - a_s) v_s^T
//
// The two products of Y are one, over a depth of key channels and then of tokens, so that its sums stay
// in registers and M and S need no copies:
//
//              [tokens][key_channels | tokens]      [key_channels + tokens][value_channels]
//
//   Y    =     (      exp(a_t) q     |   M   )   .   ( S )      "panel": a state in work, and below it
//                                                    ( V )      the chunk's values
#pragma once

#include "kernels/decay.h"
#include "kernels/linear_attention.h"
#include "kernels/linear_attention_gate.h"
#include "kernels/pack.h"

namespace longspan::LONGSPAN_ISA {

/// Tokens of a chunk. Of 2 K V + chunk (K + V) / 2 multiply-adds a token the second part grows with it,
/// and the first runs no faster in larger ones: measured for K and V of 32 to 256.
inline constexpr int64_t kLinearChunk = 32;

template <class T>
struct LinearState {
  T* s;  ///< [key_channels][value_width]
  T* z;  ///< [key_width], where normalized
};

template <class Dot>
class LinearChunk {
  using E = typename Dot::Element;
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;
  static constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat;

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
    const int64_t at = run.batch * x.batch + token * x.token + head * x.head;
    return {static_cast<char*>(x.data) + at * size_of(p.dtype), p.dtype, x.token};
  }
  int64_t kv_head(int64_t head) const { return head / (p.heads / p.kv_heads); }

  /// What the chunk's tokens decay by, in the form of the kind of gate.
  void prepare(const Run& run, int64_t head, int64_t t0, int64_t n, Decay<T>& decay,
               ChannelDecay<T>& channels) const {
    const GateTensor& g = p.gate;
    const int64_t at = run.batch * g.batch + head * g.head + t0 * g.token;
    if (p.kind == Gate::kToken) {
      decay.prepare(n, tokens, [&](int64_t t) {
        return double(load_as<T>(g.data, g.dtype, at + t * g.token, 1)[0]) * kLog2e;
      });
    } else if (p.kind == Gate::kChannel) {
      channels.prepare(n, [&](int64_t t, int64_t c) {
        return load_as<T>(g.data, g.dtype, at + t * g.token + c, p.key_channels - c);
      });
    }
  }

  /// M from scores [n][tokens], as elements of rows ld apart: whole strips, zeros above the diagonal.
  /// sums: of each row.
  void mix(const Decay<T>& decay, const T* scores, int64_t n, E* out, int64_t ld, T* sums) const {
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    for (int64_t t = 0; t < n; ++t) {
      const int64_t end = t / kStrip * kStrip + kStrip;
      Vec<T> sum = {};
      for (int64_t i = 0; i < end; i += L) {
        Vec<T> m = load(scores + t * tokens + i);
        if (p.kind == Gate::kToken) m *= decay.between(t, i, lane);
        if (i + L > t) m = select<T>(lane + T(i) <= T(t), m, Vec<T>{});
        sum += m;
        store_scalars<Dot>(out + t * ld, i, m);
      }
      sums[t] = sum_of_lanes<T>(sum);
    }
  }

  /// x [n][width] times a factor a number each.
  static void multiply_rows(const T* x, const T* factor, int64_t n, int64_t width, T* out) {
    for (int64_t i = 0; i < n * width; i += L) store(out + i, load(x + i) * load(factor + i));
  }

  /// States that the caller has, dense; a null pointer is zeros.
  void load_state(const T* s, const T* z, LinearState<T> to) const {
    if (s == nullptr) {
      __builtin_memset(to.s, 0, size_t(state_size) * sizeof(T));
    } else {
      copy_rows<T>({s, kDtype, p.value_channels}, p.key_channels, p.value_channels, value_width, nullptr,
                   to.s);
    }
    if (!p.normalized) return;
    if (z == nullptr) {
      __builtin_memset(to.z, 0, size_t(key_width) * sizeof(T));
    } else {
      copy_rows<T>({z, kDtype, p.key_channels}, 1, p.key_channels, key_width, nullptr, to.z);
    }
  }
  void store_state(LinearState<T> from, T* s, T* z) const {
    for (int64_t i = 0; i < p.key_channels; ++i) {
      for (int64_t c = 0; c < p.value_channels; c += L) {
        store_as<T>(s, kDtype, i * p.value_channels + c, load(from.s + i * value_width + c),
                    p.value_channels - c);
      }
    }
    if (!p.normalized) return;
    for (int64_t i = 0; i < p.key_channels; i += L) {
      store_as<T>(z, kDtype, i, load(from.z + i), p.key_channels - i);
    }
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
  T* denominators(const Run& run, int64_t head, int64_t token) const {
    return at(p.denominators, (run.batch * p.heads + head) * p.tokens + token);
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
