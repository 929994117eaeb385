// One token of the delta rule for each of many states: the limit is reading and writing them once.
//
//     y = S^T k, z = S^T q      u = beta (v - exp(gate) y)
//     S = exp(gate) S + k u^T   out = scale (exp(gate) z + (q . k) u)
//
// Value channels along the lanes, row after row of S, with the sums in registers; then the same rows
// once more, from the cache. The processor reads ahead by itself as long as rows are read in order, so
// asking for memory only bridges the writing: for the next state a little, where one fits into the first
// cache, for what comes soon where it does not. Asking for all of it, or a task's states too few, is
// slower.

#include "kernels/delta_rule.h"
#include "kernels/parallel.h"
#include "kernels/states.h"
#include "kernels/table.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kTaskBytes = 1 << 18;  // of states; a task is not worth handing out below
constexpr int64_t kTasks = 16;  // as many are enough
constexpr int64_t kFirstCache = 1 << 15;
constexpr int64_t kAhead = 4096;  // bytes of a larger state to ask for early

template <class T>
class Step {
  static constexpr int L = kLanes<T>;
  static constexpr int kMost = 2 * kTileColumns;  ///< vectors of each sum in registers

 public:
  explicit Step(const DeltaRuleStep& p)
      : p_(p), key_width_(round_up(p.key_channels, L)), value_width_(round_up(p.value_channels, L)) {}

  void run() {
    const int64_t states = p_.batch * p_.value_heads;
    if (states == 0) return;
    const int64_t bytes = max_of<int64_t>(1, p_.key_channels * p_.value_channels * int64_t(sizeof(T)));
    const int64_t a_task = max_of(ceil_div(kTaskBytes, bytes), states / kTasks);
    const int64_t tasks = ceil_div(states, a_task);
    const int threads = threads_for(tasks, p_.threads);
    const int64_t space = 2 * key_width_ + 2 * value_width_;
    Scratch scratch(threads * space * int64_t(sizeof(T)));
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      T* rows = reinterpret_cast<T*>(scratch.at(0)) + thread * space;
      const int64_t end = min_of(states, (task + 1) * a_task);
      for (int64_t i = task * a_task; i < end; ++i) update(i / p_.value_heads, i % p_.value_heads, rows);
    });
  }

 private:
  /// One token of one state.
  struct Token {
    T *q, *k, *v, *out;
    T decay, beta, qk;
  };

  void update(int64_t batch, int64_t head, T* rows) const {
    T *q = rows, *k = q + key_width_, *v = k + key_width_, *out = v + value_width_;
    Token x{q, k, v, out, T(1), number_of<T>(p_.beta, batch, head, 0), T(0)};
    const int64_t key_head = head / (p_.value_heads / p_.heads);
    load_row(p_.q, batch, key_head, p_.key_channels, q);
    load_row(p_.k, batch, key_head, p_.key_channels, k);
    load_row(p_.v, batch, head, p_.value_channels, v);
    if (p_.gate.data) x.decay = exp<T>(broadcast(number_of<T>(p_.gate, batch, head, 0)))[0];
    Vec<T> sum = {};
    for (int64_t c = 0; c < key_width_; c += L) sum += load(x.q + c) * load(x.k + c);
    x.qk = sum_of_lanes<T>(sum);
    T* state = static_cast<T*>(p_.state) + batch * p_.state_batch + head * p_.state_head;
    const int64_t whole = p_.value_channels / L * L;
    if (p_.key_channels * p_.state_row * int64_t(sizeof(T)) <= kFirstCache) {
      all_columns<true, kMost>(state, 0, whole, x);
    } else {
      all_columns<false, kMost>(state, 0, whole, x);
    }
    if (whole < p_.value_channels) last_columns(state, whole, x);
    const T scale = T(p_.scale);
    store_rows<T>(x.out, value_width_, 1, p_.value_channels, &scale,
                  rows_of(p_.out, p_.dtype, batch, head, 0));
  }

  /// Padded with zeros.
  void load_row(const SequenceTensor& x, int64_t batch, int64_t head, int64_t n, T* row) const {
    copy_rows<T>(rows_of(x, p_.dtype, batch, head, 0), 1, n, round_up(n, L), nullptr, row);
  }

  template <bool kFits, int kVectors>
  LS_INLINE void all_columns(T* state, int64_t c, int64_t end, const Token& x) const {
    for (; c + kVectors * L <= end; c += kVectors * L) columns<kFits, kVectors>(state, c, x);
    if constexpr (kVectors > 1) all_columns<kFits, kVectors / 2>(state, c, end, x);
  }

  template <bool kFits, int kVectors>
  LS_INLINE void columns(T* state, int64_t c, const Token& x) const {
    Vec<T> y[kVectors] = {}, z[kVectors] = {};
    T* row = state + c;
    const int64_t next = p_.key_channels * p_.state_row;  // where states are dense
    for (int64_t i = 0; i < p_.key_channels; ++i, row += p_.state_row) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        if (!kFits) __builtin_prefetch(reinterpret_cast<char*>(row + j * L) + kAhead, 1, 2);
        const Vec<T> s = load(row + j * L);
        y[j] += s * x.k[i];
        z[j] += s * x.q[i];
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      y[j] = (load(x.v + c + j * L) - x.decay * y[j]) * x.beta;  // u
      store(x.out + c + j * L, x.decay * z[j] + x.qk * y[j]);
    }
    row = state + c;
    for (int64_t i = 0; i < p_.key_channels; ++i, row += p_.state_row) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        if (kFits && i % 8 == 0) __builtin_prefetch(row + next + j * L, 1, 2);
        store(row + j * L, x.decay * load(row + j * L) + y[j] * x.k[i]);
      }
    }
  }

  /// Less than a vector of them.
  void last_columns(T* state, int64_t c, const Token& x) const {
    const int64_t n = p_.value_channels - c;
    Vec<T> y = {}, z = {};
    for (int64_t i = 0; i < p_.key_channels; ++i) {
      const Vec<T> s = load_first(state + i * p_.state_row + c, n);
      y += s * x.k[i];
      z += s * x.q[i];
    }
    y = (load(x.v + c) - x.decay * y) * x.beta;
    store(x.out + c, x.decay * z + x.qk * y);
    for (int64_t i = 0; i < p_.key_channels; ++i) {
      T* row = state + i * p_.state_row + c;
      store_first(row, x.decay * load_first(row, n) + y * x.k[i], n);
    }
  }

  const DeltaRuleStep& p_;
  const int64_t key_width_, value_width_;
};

}  // namespace

void delta_rule_step(const DeltaRuleStep& p) {
  p.dtype == Dtype::kDouble ? Step<double>(p).run() : Step<float>(p).run();
}

}  // namespace longspan::LONGSPAN_ISA
