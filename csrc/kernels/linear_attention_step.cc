// One token of linear attention for each of many states: the limit is reading and writing them once.
//
//     S = exp(gate) S + k v^T        out = scale q S
//
// value channels along the lanes, row after row of S, with v and the sums of out in registers.

#include "kernels/linear_attention.h"
#include "kernels/parallel.h"
#include "kernels/states.h"
#include "kernels/table.h"
#include "kernels/tile.h"
#include "simd/convert.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kTaskBytes = 1 << 18;  // of states; a task is not worth handing out below
constexpr int64_t kAhead = 2048;         // bytes of state to ask for early

template <class T>
class Step {
  static constexpr int L = kLanes<T>;
  static constexpr int kMost = 2 * kTileColumns;  ///< vectors of v, and of sums, in registers

 public:
  explicit Step(const LinearAttentionStep& p)
      : p_(p), key_width_(round_up(p.key_channels, L)), value_width_(round_up(p.value_channels, L)) {}

  void run() {
    const int64_t states = p_.batch * p_.heads;
    if (states == 0) return;
    const int64_t bytes = max_of<int64_t>(1, p_.key_channels * p_.value_channels * int64_t(sizeof(T)));
    const int64_t a_task = max_of<int64_t>(1, kTaskBytes / bytes), tasks = ceil_div(states, a_task);
    const int threads = threads_for(tasks, p_.threads);
    const int64_t space = 3 * key_width_ + 2 * value_width_;
    Scratch scratch(threads * space * int64_t(sizeof(T)));
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      T* rows = reinterpret_cast<T*>(scratch.at(0)) + thread * space;
      const int64_t end = min_of(states, (task + 1) * a_task);
      for (int64_t i = task * a_task; i < end; ++i) {
        if (i + 1 < end) ask_for((i + 1) / p_.heads, (i + 1) % p_.heads);
        update(i / p_.heads, i % p_.heads, rows);
      }
    });
  }

 private:
  /// What a state's update begins with; it would wait for one after the other.
  void ask_for(int64_t batch, int64_t head) const {
    const int64_t kv_head = head / (p_.heads / p_.kv_heads);
    prefetch(rows_of(p_.q, p_.dtype, batch, head, 0), 1, p_.key_channels);
    prefetch(rows_of(p_.k, p_.dtype, batch, kv_head, 0), 1, p_.key_channels);
    prefetch(rows_of(p_.v, p_.dtype, batch, kv_head, 0), 1, p_.value_channels);
    const T* norm = static_cast<const T*>(p_.norm) + batch * p_.norm_batch + head * p_.norm_head;
    if (p_.norm) prefetch({norm, kDtypeOf<T>, 0}, 1, p_.key_channels);
  }

  void update(int64_t batch, int64_t head, T* q) const {
    T *k = q + key_width_, *decay = k + key_width_, *v = decay + key_width_, *out = v + value_width_;
    const int64_t kv_head = head / (p_.heads / p_.kv_heads);
    load_row(p_.q, batch, head, p_.key_channels, q);
    load_row(p_.k, batch, kv_head, p_.key_channels, k);
    load_row(p_.v, batch, kv_head, p_.value_channels, v);
    load_decay(batch, head, decay);
    T factor = T(p_.scale);
    if (p_.norm) factor = normalize(batch, head, q, k, decay);
    T* state = static_cast<T*>(p_.state) + batch * p_.state_batch + head * p_.state_head;
    const int64_t whole = p_.value_channels / L * L;
    if (p_.kind == Gate::kNone) {
      all_columns<false, kMost>(state, 0, whole, q, k, decay, v, out);
    } else {
      all_columns<true, kMost>(state, 0, whole, q, k, decay, v, out);
    }
    if (whole < p_.value_channels) last_columns(state, whole, q, k, decay, v, out);
    const int64_t to = batch * p_.out.batch + head * p_.out.head;
    for (int64_t c = 0; c < p_.value_channels; c += L) {
      store_as<T>(p_.out.data, p_.dtype, to + c, load(out + c) * factor, p_.value_channels - c);
    }
  }

  /// Padded with zeros.
  void load_row(const SequenceTensor& x, int64_t batch, int64_t head, int64_t n, T* row) const {
    const int64_t at = batch * x.batch + head * x.head;
    for (int64_t c = 0; c < n; c += L) store(row + c, load_as<T>(x.data, p_.dtype, at + c, n - c));
  }

  void load_decay(int64_t batch, int64_t head, T* decay) const {
    const GateTensor& g = p_.gate;
    const int64_t at = batch * g.batch + head * g.head;
    Vec<T> e = broadcast(T(1));
    if (p_.kind == Gate::kToken) e = broadcast(exp<T>(load_as<T>(g.data, g.dtype, at, 1))[0]);
    for (int64_t c = 0; c < p_.key_channels; c += L) {
      if (p_.kind == Gate::kChannel) {
        e = exp<T>(load_as<T>(g.data, g.dtype, at + c, p_.key_channels - c));
      }
      store(decay + c, e);
    }
  }

  /// Moves z on; what q S is multiplied by.
  T normalize(int64_t batch, int64_t head, const T* q, const T* k, const T* decay) const {
    T* norm = static_cast<T*>(p_.norm) + batch * p_.norm_batch + head * p_.norm_head;
    Vec<T> sum = {};
    for (int64_t c = 0; c < p_.key_channels; c += L) {
      const int64_t n = min_of<int64_t>(L, p_.key_channels - c);
      const Vec<T> z = load_first(norm + c, n) * load(decay + c) + load(k + c);
      store_first(norm + c, z, n);
      sum += z * load(q + c);
    }
    const T denominator = T(p_.scale) * sum_of_lanes<T>(sum) + T(p_.eps);
    return denominator == T(0) ? T(0) : T(p_.scale) / denominator;
  }

  template <bool kDecays, int kVectors>
  LS_INLINE void all_columns(T* state, int64_t c, int64_t end, const T* q, const T* k, const T* decay,
                             const T* v, T* out) const {
    for (; c + kVectors * L <= end; c += kVectors * L)
      columns<kDecays, kVectors>(state, c, q, k, decay, v, out);
    if constexpr (kVectors > 1) {
      all_columns<kDecays, kVectors / 2>(state, c, end, q, k, decay, v, out);
    }
  }

  template <bool kDecays, int kVectors>
  LS_INLINE void columns(T* state, int64_t c, const T* q, const T* k, const T* decay, const T* v,
                         T* out) const {
    Vec<T> values[kVectors], sums[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      values[j] = load(v + c + j * L);
      sums[j] = Vec<T>{};
    }
    T* row = state + c;
    for (int64_t i = 0; i < p_.key_channels; ++i, row += p_.state_row) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        __builtin_prefetch(reinterpret_cast<char*>(row + j * L) + kAhead, 1, 2);
        Vec<T> s = load(row + j * L);
        s = (kDecays ? s * decay[i] : s) + values[j] * k[i];
        store(row + j * L, s);
        sums[j] += s * q[i];
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(out + c + j * L, sums[j]);
  }

  /// Less than a vector of them.
  void last_columns(T* state, int64_t c, const T* q, const T* k, const T* decay, const T* v,
                    T* out) const {
    const int64_t n = p_.value_channels - c;
    Vec<T> sum = {};
    for (int64_t i = 0; i < p_.key_channels; ++i) {
      T* row = state + i * p_.state_row + c;
      const Vec<T> s = load_first(row, n) * decay[i] + load(v + c) * k[i];
      store_first(row, s, n);
      sum += s * q[i];
    }
    store(out + c, sum);
  }

  const LinearAttentionStep& p_;
  const int64_t key_width_, value_width_;
};

}  // namespace

void linear_attention_step(const LinearAttentionStep& p) {
  p.dtype == Dtype::kDouble ? Step<double>(p).run() : Step<float>(p).run();
}

}  // namespace longspan::LONGSPAN_ISA
