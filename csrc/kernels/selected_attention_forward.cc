// Attention over the blocks that each query names, forward (selected_blocks.h draws the tile). A task
// is a few tokens of one list head: what neighbours select is mostly the same, and stays in the cache.
//
// Counted for 16 heads of 64 channels and blocks of 64 keys in float on a 512-bit machine: 8192
// multiply-adds of 16 lanes a block, beside 64 exponentials at about 12 instructions each and 32 KiB
// of keys and values from the cache.

#include "kernels/selected_blocks.h"
#include "kernels/table.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kTokens = 16;  ///< of a task
constexpr int64_t kAtOnce = 8;   ///< blocks in one softmax

template <class Dot>
class Forward {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;

 public:
  explicit Forward(const SelectedParams& p)
      : p_(p), g_(p), keys_(p.k, p.dtype, p.kv_heads, p.keys, p.channels, p.block_size, true),
        values_(p.v, p.dtype, p.kv_heads, p.keys, p.value_channels, p.block_size, false) {
    width_ = keys_.width();
    value_width_ = round_up(p.value_channels, L);
  }

  void run() {
    const int64_t parts = ceil_div(p_.tokens, kTokens), heads = p_.batch * p_.list_heads;
    const int64_t tasks = heads * parts;
    if (tasks == 0) return;
    const int64_t ahead = g_.ahead() ? p_.batch * p_.kv_heads * g_.blocks : 0;
    Arena measure;
    lay_out(measure);
    const int threads = threads_for(tasks, p_.threads);
    Scratch forms(ahead * (keys_.size() + values_.size()) * int64_t(sizeof(T)));
    if (ahead) {
      T* all = reinterpret_cast<T*>(forms.at(0));
      keys_.make_ahead(p_.batch, p_.threads, all);
      values_.make_ahead(p_.batch, p_.threads, all + ahead * keys_.size());
    }
    Scratch scratch(measure.used() * threads);
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      const Workspace w = lay_out(arena);
      const int64_t b = task / parts / p_.list_heads, head = task / parts % p_.list_heads;
      const int64_t first = task % parts * kTokens;
      for (int64_t t = first; t < min_of(first + kTokens, p_.tokens); ++t) attend(b, head, t, w);
    });
  }

 private:
  struct Workspace {
    T* queries;         ///< [group][channels]
    T* scores;          ///< [group][kAtOnce * width]
    T *maximum, *sum;   ///< [group]; maximum in log2
    T* out;             ///< [group][value_width]
    T *keys, *values;   ///< forms made at a visit
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.queries = arena.take<T>(g_.group * round_up(p_.channels, L));
    w.scores = arena.take<T>(g_.group * kAtOnce * width_);
    w.maximum = arena.take<T>(g_.group);
    w.sum = arena.take<T>(g_.group);
    w.out = arena.take<T>(g_.group * value_width_);
    w.keys = arena.take<T>(keys_.size());
    w.values = arena.take<T>(values_.size());
    return w;
  }

  void attend(int64_t b, int64_t head, int64_t t, const Workspace& w) const {
    const int64_t query_width = round_up(p_.channels, L), kv_head = g_.kv_head(head);
    copy_rows<T>(g_.row(p_.q, b, head, t), g_.group, p_.channels, query_width, nullptr, w.queries);
    for (int64_t r = 0; r < g_.group; ++r) w.maximum[r] = -kInfinity<T>, w.sum[r] = T(0);
    __builtin_memset(w.out, 0, size_t(g_.group * value_width_) * sizeof(T));
    const int64_t list = (b * p_.list_heads + head) * p_.tokens + t, ld = kAtOnce * width_;
    int64_t at = p_.begins[list];
    const int64_t end = p_.begins[list + 1];
    while (at < end) {
      int64_t block[kAtOnce], seen[kAtOnce], n = 0;
      for (; at < end && n < kAtOnce; ++at) {
        seen[n] = g_.seen(b, t, p_.blocks[at]);
        if (seen[n] == 0) continue;
        block[n] = p_.blocks[at];
        const Operand<Dot> k = keys_.block(b, kv_head, block[n], w.keys);
        Product<Dot>{w.queries, query_width, 1, k.data, k.stride, w.scores + n * width_, ld}
            .template run_as<Start::kZero, false, true>(g_.group, width_, p_.channels);
        ++n;
      }
      for (int64_t r = 0; r < g_.group; ++r) softmax(r, n, seen, w);
      for (int64_t i = 0; i < n; ++i) {
        const Operand<Dot> v = values_.block(b, kv_head, block[i], w.values);
        Product<Dot>{w.scores + i * width_, ld, 1, v.data, v.stride, w.out, value_width_}
            .template run_as<Start::kAccumulate, false, true>(g_.group, value_width_, seen[i]);
      }
    }
    for (int64_t r = 0; r < g_.group; ++r) {
      const T sum = w.sum[r];
      const T log2 = sizeof(T) == 4 ? T(__builtin_log2f(float(sum))) : T(__builtin_log2(double(sum)));
      static_cast<T*>(p_.lse)[g_.lse_at(b, head, r, t)] =
          sum == T(0) ? -kInfinity<T> : (w.maximum[r] + log2) * T(kLn2);
      w.sum[r] = sum == T(0) ? T(0) : T(1) / sum;
    }
    store_rows<T>(w.out, value_width_, g_.group, p_.value_channels, w.sum, g_.row(p_.out, b, head, t));
  }

  /// Row r of n blocks: raw products to weights, relative to the row's new maximum.
  void softmax(int64_t r, int64_t n, const int64_t* seen, const Workspace& w) const {
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    const T unit = T(p_.scale * double(kLog2e));
    T* row = w.scores + r * kAtOnce * width_;
    Vec<T> greatest = broadcast(-kInfinity<T>);
    for (int64_t j = 0; j < n; ++j) {
      T* x = row + j * width_;
      const int64_t whole = seen[j] / L * L;
      for (int64_t i = 0; i < whole; i += L) {
        const Vec<T> y = load(x + i) * unit;
        store(x + i, y);
        greatest = maximum<T>(greatest, y);
      }
      if (whole < seen[j]) {
        const Vec<T> y =
            select<T>(lane < T(seen[j] - whole), load(x + whole) * unit, broadcast(-kInfinity<T>));
        store(x + whole, y);
        greatest = maximum<T>(greatest, y);
      }
    }
    const T before = w.maximum[r], here = max_of_lanes<T>(greatest);
    const T now = before < here ? here : before;
    const T reference = now == -kInfinity<T> ? T(0) : now;
    const T correction = exp2_nonpositive<T>(broadcast(before - reference))[0];
    Vec<T> sum = {};
    for (int64_t j = 0; j < n; ++j) {
      T* x = row + j * width_;
      for (int64_t i = 0; i < seen[j]; i += L) {
        const Vec<T> y = exp2_nonpositive<T>(load(x + i) - reference);
        sum += y;
        store(x + i, y);
      }
    }
    w.maximum[r] = now;
    w.sum[r] = w.sum[r] * correction + sum_of_lanes<T>(sum);
    if (correction == T(1)) return;
    T* out = w.out + r * value_width_;
    for (int64_t c = 0; c < value_width_; c += L) store(out + c, load(out + c) * correction);
  }

  const SelectedParams& p_;
  SelectedGeometry g_;
  BlockForm<Dot> keys_, values_;
  int64_t width_, value_width_;
};

}  // namespace

void selected_attention_forward(const SelectedParams& p) {
  if (p.dtype == Dtype::kDouble) return Forward<DotDouble>(p).run();
  Forward<DotFloat>(p).run();
}

}  // namespace longspan::LONGSPAN_ISA
