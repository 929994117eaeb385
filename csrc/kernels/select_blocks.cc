// Native Sparse Attention's choice of blocks. A task is a few tokens of one key head: all their heads
// are the rows of a tile, compressed keys the lanes, 64 at a time,
//
//     S [tokens * heads][compressed keys] = Q Kc^T  ->  softmax a row  ->  sum over a token's heads
//         ->  scores of blocks  ->  the best
//     O [heads][channels] = P Vc
//
// A row of scores is kept whole, so that nothing is computed twice: O(keys / stride) a thread.

#include "kernels/selected_blocks.h"
#include "kernels/table.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kPanel = 64;      ///< compressed keys turned together
constexpr int64_t kRows = 32;       ///< of a tile, at the least one token's heads
constexpr int64_t kLocalBlocks = 2; ///< always chosen: a query's own block and the one before it

template <class Dot>
class Select {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;

 public:
  explicit Select(const SelectBlocksParams& p)
      : p_(p), keys_(p.k, p.dtype, p.kv_heads, p.compressed, p.channels, kPanel, true),
        values_(p.v, p.dtype, p.kv_heads, p.compressed, p.value_channels, kPanel, false) {
    group_ = p.heads / p.kv_heads;
    tokens_ = max_of<int64_t>(1, kRows / group_);
    panels_ = ceil_div(p.compressed, kPanel);
    ld_ = panels_ * kPanel + L;  // not a power of two: rows would share the sets of a cache
    query_width_ = round_up(p.channels, L);
    value_width_ = round_up(p.value_channels, L);
  }

  void run() {
    const int64_t parts = ceil_div(p_.tokens, tokens_), tasks = p_.batch * p_.kv_heads * parts;
    if (tasks == 0) return;
    const int64_t ahead = p_.tokens > tokens_ ? p_.batch * p_.kv_heads * panels_ : 0;
    const int64_t value_size = p_.v.data ? values_.size() : 0;
    Scratch forms(ahead * (keys_.size() + value_size) * int64_t(sizeof(T)));
    if (ahead) {
      T* all = reinterpret_cast<T*>(forms.at(0));
      keys_.make_ahead(p_.batch, p_.threads, all);
      if (p_.v.data) values_.make_ahead(p_.batch, p_.threads, all + ahead * keys_.size());
    }
    Arena measure;
    lay_out(measure);
    const int threads = threads_for(tasks, p_.threads);
    Scratch scratch(measure.used() * threads);
    parallel_for(tasks, threads, [&](int64_t i, int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      const int64_t task = tasks - 1 - i;  // late tokens, which see most, first
      const int64_t first = task % parts * tokens_;
      choose(task / parts / p_.kv_heads, task / parts % p_.kv_heads, first,
             min_of(first + tokens_, p_.tokens), lay_out(arena));
    });
  }

 private:
  struct Workspace {
    T* queries;       ///< [rows][query_width], times the scale in log2
    T* scores;        ///< [rows][ld]
    T* probability;   ///< [panels * kPanel]: summed over a token's heads
    T *sum, *lse;     ///< [group]
    T* out;           ///< [group][value_width]
    T *keys, *values; ///< forms made at a visit
    T* best;          ///< [count], descending; the chosen blocks beside
    int64_t* chosen;
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.queries = arena.take<T>(tokens_ * group_ * query_width_);
    w.scores = arena.take<T>(tokens_ * group_ * ld_);
    w.probability = arena.take<T>(panels_ * kPanel);
    w.sum = arena.take<T>(group_);
    w.lse = arena.take<T>(group_);
    w.out = arena.take<T>(group_ * value_width_);
    w.keys = arena.take<T>(keys_.size());
    w.values = arena.take<T>(values_.size());
    w.best = arena.take<T>(p_.count);
    w.chosen = arena.take<int64_t>(p_.count);
    return w;
  }

  LS_INLINE int64_t end_of(int64_t b) const { return p_.lengths ? p_.lengths[b] : p_.keys; }
  LS_INLINE int64_t position(int64_t b, int64_t t) const { return t + end_of(b) - p_.tokens; }

  /// Compressed keys that a query sees, from the first on.
  LS_INLINE int64_t visible(int64_t b, int64_t t) const {
    const int64_t end = end_of(b);
    if (!p_.causal) return min_of(p_.compressed, end <= 0 ? 0 : ceil_div(end, p_.stride));
    const int64_t past = position(b, t) + 1 - p_.length;
    return past < 0 ? 0 : min_of(p_.compressed, past / p_.stride + 1);
  }

  void choose(int64_t b, int64_t kv_head, int64_t first, int64_t last, const Workspace& w) const {
    const int64_t rows = (last - first) * group_;
    for (int64_t t = first; t < last; ++t) {
      TokenRows q = rows_of(p_.q, p_.dtype, b, kv_head * group_, t);
      q.stride = p_.q.head;
      T* to = w.queries + (t - first) * group_ * query_width_;
      copy_rows<T>(q, group_, p_.channels, query_width_, nullptr, to);
    }
    for (int64_t c = 0; c < visible(b, last - 1); c += kPanel) {
      const Operand<Dot> k = keys_.block(b, kv_head, c / kPanel, w.keys);
      Product<Dot>{w.queries, query_width_, 1, k.data, k.stride, w.scores + c, ld_}
          .template run_as<Start::kZero, false, true>(rows, kPanel, p_.channels);
    }
    for (int64_t t = first; t < last; ++t) {
      const int64_t seen = visible(b, t);
      for (int64_t c = 0; c < round_up(seen, L); c += L) store(w.probability + c, Vec<T>{});
      T* scores = w.scores + (t - first) * group_ * ld_;
      for (int64_t r = 0; r < group_; ++r) {
        add_probabilities(scores + r * ld_, seen, w.probability, w.sum + r, w.lse + r);
      }
      if (p_.v.data) attend(b, kv_head, t, seen, scores, w);
      const int64_t list = (b * p_.kv_heads + kv_head) * p_.tokens + t;
      const int64_t count = p_.counts ? min_of(p_.count, p_.counts[list]) : p_.count;
      best(b, t, seen, count, w, p_.indices + list * p_.count);
    }
  }

  /// P Vc, from weights that are not yet divided by their sum.
  void attend(int64_t b, int64_t kv_head, int64_t t, int64_t seen, const T* scores,
              const Workspace& w) const {
    __builtin_memset(w.out, 0, size_t(group_ * value_width_) * sizeof(T));
    for (int64_t c = 0; c < seen; c += kPanel) {
      const Operand<Dot> v = values_.block(b, kv_head, c / kPanel, w.values);
      Product<Dot>{scores + c, ld_, 1, v.data, v.stride, w.out, value_width_}
          .template run_as<Start::kAccumulate, false, true>(group_, value_width_,
                                                            min_of(kPanel, seen - c));
    }
    for (int64_t r = 0; r < group_; ++r) {
      static_cast<T*>(p_.lse)[(b * p_.heads + kv_head * group_ + r) * p_.tokens + t] = w.lse[r];
    }
    TokenRows out = rows_of(p_.out, p_.dtype, b, kv_head * group_, t);
    out.stride = p_.out.head;
    store_rows<T>(w.out, value_width_, group_, p_.value_channels, w.sum, out);
  }

  /// A row's products to weights, which are added, divided by their sum, to `probability`; one over
  /// that sum, and the log-sum-exp.
  void add_probabilities(T* row, int64_t seen, T* probability, T* inverse_sum, T* lse) const {
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    const T unit = T(p_.scale * double(kLog2e));
    Vec<T> greatest = broadcast(-kInfinity<T>);
    for (int64_t c = 0; c < seen; c += L) {
      Vec<T> x = load(row + c) * unit;
      if (c + L > seen) x = select<T>(lane < T(seen - c), x, broadcast(-kInfinity<T>));
      greatest = maximum<T>(greatest, x);
      store(row + c, x);
    }
    const T most = max_of_lanes<T>(greatest), reference = most == -kInfinity<T> ? T(0) : most;
    Vec<T> sum = {};
    for (int64_t c = 0; c < seen; c += L) {
      const Vec<T> x = exp2_nonpositive<T>(load(row + c) - reference);
      sum += x;
      store(row + c, x);
    }
    const T total = sum_of_lanes<T>(sum), inverse = total == T(0) ? T(0) : T(1) / total;
    const T log2 = sizeof(T) == 4 ? T(__builtin_log2f(float(total))) : T(__builtin_log2(double(total)));
    *inverse_sum = inverse;
    *lse = total == T(0) ? -kInfinity<T> : (reference + log2) * T(kLn2);
    for (int64_t c = 0; c < seen; c += L) {
      store(probability + c, load(probability + c) + load(row + c) * inverse);
    }
  }

  /// The first and the local blocks, then those of the greatest scores, of equals the first.
  void best(int64_t b, int64_t t, int64_t seen, int64_t count, const Workspace& w, int64_t* out) const {
    const int64_t end = end_of(b), at = position(b, t);
    const int64_t all = ceil_div(p_.causal ? min_of(end, at + 1) : end, p_.block_size);
    int64_t n = 0;
    if (at >= 0 && all > 0) {
      const int64_t own = min_of(at / p_.block_size, all - 1);
      for (int64_t j = own; j > own - kLocalBlocks && j >= 0 && n < count; --j) w.chosen[n++] = j;
      if (own >= kLocalBlocks && n < count) w.chosen[n++] = 0;
      const int64_t forced = n;
      const bool here = forced < count;
      for (int64_t j = 0; here && j < all; ++j) {
        bool is_forced = false;
        for (int64_t i = 0; i < forced; ++i) is_forced |= w.chosen[i] == j;
        if (is_forced) continue;
        const T score = score_of(j, seen, w.probability);
        if (n == count && !(score > w.best[n - 1])) continue;
        int64_t place = n == count ? n - 1 : n++;
        for (; place > forced && score > w.best[place - 1]; --place) {
          w.best[place] = w.best[place - 1];
          w.chosen[place] = w.chosen[place - 1];
        }
        w.best[place] = score;
        w.chosen[place] = j;
      }
    }
    for (int64_t i = 1; i < n; ++i) {  // ascending
      const int64_t j = w.chosen[i];
      int64_t place = i;
      for (; place > 0 && w.chosen[place - 1] > j; --place) w.chosen[place] = w.chosen[place - 1];
      w.chosen[place] = j;
    }
    for (int64_t i = 0; i < p_.count; ++i) out[i] = i < n ? w.chosen[i] : -1;
  }

  /// NaN is the least: -1, where probabilities are 0 or more.
  LS_INLINE T score_of(int64_t j, int64_t seen, const T* probability) const {
    const int64_t low = j * p_.block_size, high = low + p_.block_size;
    const int64_t first = max_of<int64_t>(0, (low - p_.length) / p_.stride + (low >= p_.length));
    T score = 0;
    for (int64_t c = first; c < seen && c * p_.stride < high; ++c) {
      const int64_t begin = max_of(low, c * p_.stride), end = min_of(high, c * p_.stride + p_.length);
      if (begin < end) score += probability[c] * T((end - begin) / p_.stride);
    }
    return score >= T(0) ? score : T(-1);
  }

  const SelectBlocksParams& p_;
  BlockForm<Dot> keys_, values_;
  int64_t group_, tokens_, panels_, ld_, query_width_, value_width_;
};

}  // namespace

void select_blocks(const SelectBlocksParams& p) {
  if (p.dtype == Dtype::kDouble) return Select<DotDouble>(p).run();
  Select<DotFloat>(p).run();
}

}  // namespace longspan::LONGSPAN_ISA
