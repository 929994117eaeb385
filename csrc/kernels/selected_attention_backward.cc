// Attention over the blocks that each query names, backward, with P and dS as in attention_gradient.h:
//
//     a token, block by block:  S, dP [heads][keys] -> dS       dQ [heads][channels] += dS K
//     a block, token by token:  S, dP [rows][keys] -> P, dS     dV [keys][channels]  += P^T dO
//                               rows: the heads of tokens       dK [keys][channels]  += dS^T Q
//
// Seven products where one pass would need five, but no two tasks write to the same place: the second
// pass goes over the lists turned round, in segments (a block that everybody selects is many), whose
// sums are added in order.

#include "kernels/selected_blocks.h"
#include "kernels/table.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kTokens = 16;     ///< of a task of the first pass
constexpr int64_t kRows = 64;       ///< of a tile of the second, or one token's heads
constexpr int64_t kSegments = 64;   ///< about so many more than there are blocks
constexpr int64_t kLeastSegment = 256;

template <class Dot>
class Backward {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;

 public:
  Backward(const SelectedParams& p, const SelectedGradients& g)
      : p_(p), d_(g), g_(p),
        keys_turned_(p.k, p.dtype, p.kv_heads, p.keys, p.channels, p.block_size, true),
        values_turned_(p.v, p.dtype, p.kv_heads, p.keys, p.value_channels, p.block_size, true),
        keys_(p.k, p.dtype, p.kv_heads, p.keys, p.channels, p.block_size, false) {
    width_ = keys_turned_.width();
    query_width_ = round_up(p.channels, L);
    value_width_ = round_up(p.value_channels, L);
    rows_ = max_of(kRows / g_.group, int64_t(1)) * g_.group;
    columns_ = p.batch * p.kv_heads * g_.blocks;
  }

  void run() {
    const int64_t parts = ceil_div(p_.tokens, kTokens), heads = p_.batch * p_.list_heads;
    const int64_t ahead = g_.ahead() ? columns_ : 0;
    Scratch forms(ahead * (keys_turned_.size() + values_turned_.size() + keys_.size()) *
                  int64_t(sizeof(T)));
    if (ahead) {
      T* all = reinterpret_cast<T*>(forms.at(0));
      keys_turned_.make_ahead(p_.batch, p_.threads, all);
      values_turned_.make_ahead(p_.batch, p_.threads, all += ahead * keys_turned_.size());
      keys_.make_ahead(p_.batch, p_.threads, all + ahead * values_turned_.size());
    }
    Scratch deltas(p_.batch * p_.heads * p_.tokens * int64_t(sizeof(T)));
    delta_ = reinterpret_cast<T*>(deltas.at(0));
    Scratch index(((columns_ + 1) * 2 + g_.entries()) * int64_t(sizeof(int64_t)));
    begins_ = reinterpret_cast<int64_t*>(index.at(0));
    segments_ = begins_ + columns_ + 1;
    lists_ = segments_ + columns_ + 1;
    turn_lists();
    const int64_t sums = segments_[columns_], sum_size = p_.block_size * (query_width_ + value_width_);
    const int threads = threads_for(max_of(heads * parts, max_of(sums, columns_)), p_.threads);
    Scratch sum_space(sums * sum_size * int64_t(sizeof(T)));
    T* all_sums = reinterpret_cast<T*>(sum_space.at(0));
    Arena measure;
    lay_out(measure);
    Scratch scratch(measure.used() * threads);
    const auto workspace = [&](int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      return lay_out(arena);
    };
    parallel_for(heads * parts, threads, [&](int64_t task, int thread) {
      const Workspace w = workspace(thread);
      const int64_t b = task / parts / p_.list_heads, head = task / parts % p_.list_heads;
      const int64_t first = task % parts * kTokens;
      for (int64_t t = first; t < min_of(first + kTokens, p_.tokens); ++t) query(b, head, t, w);
    });
    parallel_for(sums, threads,
                 [&](int64_t i, int thread) { segment(i, all_sums + i * sum_size, workspace(thread)); });
    parallel_for(columns_, threads, [&](int64_t column, int) {
      finish(column, all_sums + segments_[column] * sum_size, sum_size);
    });
  }

 private:
  struct Workspace {
    T *queries, *d_out;       ///< [rows][width of each]
    T *lse, *delta;           ///< [rows]
    T *scores, *d_scores;     ///< [rows][width]
    T* dq;                    ///< [group][query_width]
    T *keys_turned, *values_turned, *keys;  ///< forms made at a visit
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.queries = arena.take<T>(rows_ * query_width_);
    w.d_out = arena.take<T>(rows_ * value_width_);
    w.lse = arena.take<T>(rows_);
    w.delta = arena.take<T>(rows_);
    w.scores = arena.take<T>(rows_ * width_);
    w.d_scores = arena.take<T>(rows_ * width_);
    w.dq = arena.take<T>(g_.group * query_width_);
    w.keys_turned = arena.take<T>(keys_turned_.size());
    w.values_turned = arena.take<T>(values_turned_.size());
    w.keys = arena.take<T>(keys_.size());
    return w;
  }

  /// For each block of each key head, the lists that name it and see some of it, in order, and how its
  /// share is cut into segments.
  void turn_lists() {
    for (int64_t c = 0; c <= columns_; ++c) begins_[c] = 0;
    for_each_entry([&](int64_t, int64_t column) { ++begins_[column + 1]; });
    for (int64_t c = 0; c < columns_; ++c) begins_[c + 1] += begins_[c];
    for_each_entry([&](int64_t list, int64_t column) { lists_[begins_[column]++] = list; });
    for (int64_t c = columns_; c > 0; --c) begins_[c] = begins_[c - 1];
    begins_[0] = 0;
    segment_ = max_of(kLeastSegment, ceil_div(begins_[columns_], kSegments));
    segments_[0] = 0;
    for (int64_t c = 0; c < columns_; ++c) {
      segments_[c + 1] = segments_[c] + ceil_div(begins_[c + 1] - begins_[c], segment_);
    }
  }

  template <class Visit>
  void for_each_entry(const Visit& visit) const {
    for (int64_t list = 0; list < g_.lists; ++list) {
      const int64_t b = list / p_.tokens / p_.list_heads, t = list % p_.tokens;
      const int64_t kv_head = g_.kv_head(list / p_.tokens % p_.list_heads);
      for (int64_t i = p_.begins[list]; i < p_.begins[list + 1]; ++i) {
        const int64_t j = p_.blocks[i];
        if (g_.seen(b, t, j)) visit(list, (b * p_.kv_heads + kv_head) * g_.blocks + j);
      }
    }
  }

  /// A token's rows of q and d_out, with their log-sum-exps; those of rows without keys are infinity.
  void load_rows(int64_t b, int64_t head, int64_t t, int64_t at, const Workspace& w) const {
    copy_rows<T>(g_.row(p_.q, b, head, t), g_.group, p_.channels, query_width_, nullptr,
                 w.queries + at * query_width_);
    copy_rows<T>(g_.row(d_.d_out, b, head, t), g_.group, p_.value_channels, value_width_, nullptr,
                 w.d_out + at * value_width_);
    for (int64_t r = 0; r < g_.group; ++r) {
      const T lse = static_cast<const T*>(p_.lse)[g_.lse_at(b, head, r, t)];
      w.lse[at + r] = lse == -kInfinity<T> ? kInfinity<T> : lse;
    }
  }

  /// scores: P; d_scores: dS up to the scale; both 0 for keys that a row does not see.
  void tile(int64_t rows, Operand<Dot> k, Operand<Dot> v, const int64_t* seen, int64_t rows_of_seen,
            const Workspace& w) const {
    Product<Dot>{w.queries, query_width_, 1, k.data, k.stride, w.scores, width_}
        .template run_as<Start::kZero, false, true>(rows, width_, p_.channels);
    Product<Dot>{w.d_out, value_width_, 1, v.data, v.stride, w.d_scores, width_}
        .template run_as<Start::kZero, false, true>(rows, width_, p_.value_channels);
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t count = seen[r / rows_of_seen];
      T *s = w.scores + r * width_, *ds = w.d_scores + r * width_;
      for (int64_t i = 0; i < width_; i += L) {
        const auto hidden = lane >= T(count - i);
        const Vec<T> p = exp2<T>((load(s + i) * T(p_.scale) - w.lse[r]) * T(kLog2e));
        const Vec<T> d = p * (load(ds + i) - w.delta[r]);
        store(s + i, select<T>(hidden, Vec<T>{}, p));
        store(ds + i, select<T>(hidden, Vec<T>{}, d));
      }
    }
  }

  void query(int64_t b, int64_t head, int64_t t, const Workspace& w) const {
    const int64_t kv_head = g_.kv_head(head), list = (b * p_.list_heads + head) * p_.tokens + t;
    load_rows(b, head, t, 0, w);
    const TokenRows out = g_.row(p_.out, b, head, t);
    for (int64_t r = 0; r < g_.group; ++r) {
      Vec<T> sum = {};
      for (int64_t c = 0; c < p_.value_channels; c += L) {
        sum += load_as<T>(out.from(r).data, p_.dtype, c, p_.value_channels - c) *
               load(w.d_out + r * value_width_ + c);
      }
      const int64_t at = g_.lse_at(b, head, r, t);
      const T d_lse = d_.d_lse ? static_cast<const T*>(d_.d_lse)[at] : T(0);
      delta_[at] = w.delta[r] = sum_of_lanes<T>(sum) - d_lse;
    }
    __builtin_memset(w.dq, 0, size_t(g_.group * query_width_) * sizeof(T));
    for (int64_t i = p_.begins[list]; i < p_.begins[list + 1]; ++i) {
      const int64_t j = p_.blocks[i], seen = g_.seen(b, t, j);
      if (seen == 0) continue;
      tile(g_.group, keys_turned_.block(b, kv_head, j, w.keys_turned),
           values_turned_.block(b, kv_head, j, w.values_turned), &seen, g_.group, w);
      const Operand<Dot> k = keys_.block(b, kv_head, j, w.keys);
      Product<Dot>{w.d_scores, width_, 1, k.data, k.stride, w.dq, query_width_}
          .template run_as<Start::kAccumulate, false, true>(g_.group, query_width_, seen);
    }
    for (int64_t r = 0; r < g_.group; ++r) w.delta[r] = T(p_.scale);
    store_rows<T>(w.dq, query_width_, g_.group, p_.channels, w.delta, g_.row(d_.dq, b, head, t));
  }

  LS_INLINE int64_t keys_of(int64_t column) const {
    return min_of(p_.block_size, p_.keys - column % g_.blocks * p_.block_size);
  }

  /// Its sum: dK [block][query_width], then dV [block][value_width].
  void segment(int64_t i, T* dk, const Workspace& w) const {
    int64_t low = 0, high = columns_ - 1;  // which block's it is
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (segments_[middle] <= i) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int64_t column = low, j = column % g_.blocks, keys = keys_of(column);
    const int64_t b = column / g_.blocks / p_.kv_heads, kv_head = column / g_.blocks % p_.kv_heads;
    T* dv = dk + p_.block_size * query_width_;
    __builtin_memset(dk, 0, size_t(p_.block_size * (query_width_ + value_width_)) * sizeof(T));
    const Operand<Dot> k = keys_turned_.block(b, kv_head, j, w.keys_turned);
    const Operand<Dot> v = values_turned_.block(b, kv_head, j, w.values_turned);
    int64_t at = begins_[column] + (i - segments_[column]) * segment_;
    const int64_t end = min_of(at + segment_, begins_[column + 1]), step = rows_ / g_.group;
    for (; at < end; at += step) {
      const int64_t n = min_of(step, end - at), rows = n * g_.group;
      int64_t seen[kRows];
      bool whole = true;
      for (int64_t e = 0; e < n; ++e) {
        const int64_t list = lists_[at + e], t = list % p_.tokens;
        const int64_t head = list / p_.tokens % p_.list_heads;
        load_rows(b, head, t, e * g_.group, w);
        for (int64_t r = 0; r < g_.group; ++r) {
          w.delta[e * g_.group + r] = delta_[g_.lse_at(b, head, r, t)];
        }
        seen[e] = g_.seen(b, t, j);
        whole &= seen[e] == keys;
      }
      tile(rows, k, v, seen, g_.group, w);
      const Product<Dot> to_dv{w.scores, 1, width_, w.d_out, value_width_, dv, value_width_};
      const Product<Dot> to_dk{w.d_scores, 1, width_, w.queries, query_width_, dk, query_width_};
      // Zero weights must not meet what a key's query does not show to it (tile.h).
      if (whole || (all_finite<Dot>(Operand<Dot>{w.queries, query_width_}, rows, query_width_) &&
                    all_finite<Dot>(Operand<Dot>{w.d_out, value_width_}, rows, value_width_))) {
        to_dv.template run_as<Start::kAccumulate, false, false>(keys, value_width_, rows);
        to_dk.template run_as<Start::kAccumulate, false, false>(keys, query_width_, rows);
      } else {
        to_dv.template run_as<Start::kAccumulate, true, false>(keys, value_width_, rows);
        to_dk.template run_as<Start::kAccumulate, true, false>(keys, query_width_, rows);
      }
    }
  }

  /// dK and dV of a block: its segments' sums, added to the first in order.
  void finish(int64_t column, T* sums, int64_t size) const {
    const int64_t j = column % g_.blocks, b = column / g_.blocks / p_.kv_heads;
    const int64_t kv_head = column / g_.blocks % p_.kv_heads, keys = keys_of(column);
    const TokenRows dk = rows_of(d_.dk, p_.dtype, b, kv_head, j * p_.block_size);
    const TokenRows dv = rows_of(d_.dv, p_.dtype, b, kv_head, j * p_.block_size);
    const int64_t count = segments_[column + 1] - segments_[column];
    if (count == 0) {
      for (int64_t t = 0; t < keys; ++t) {
        for (int64_t c = 0; c < p_.channels; c += L) {
          store_as<T>(const_cast<void*>(dk.from(t).data), p_.dtype, c, Vec<T>{}, p_.channels - c);
        }
        for (int64_t c = 0; c < p_.value_channels; c += L) {
          store_as<T>(const_cast<void*>(dv.from(t).data), p_.dtype, c, Vec<T>{}, p_.value_channels - c);
        }
      }
      return;
    }
    for (int64_t s = 1; s < count; ++s) {
      for (int64_t i = 0; i < size; i += L) store(sums + i, load(sums + i) + load(sums + s * size + i));
    }
    for (int64_t i = 0; i < keys * query_width_; i += L) store(sums + i, load(sums + i) * T(p_.scale));
    store_rows<T>(sums, query_width_, keys, p_.channels, nullptr, dk);
    store_rows<T>(sums + p_.block_size * query_width_, value_width_, keys, p_.value_channels, nullptr,
                  dv);
  }

  const SelectedParams& p_;
  const SelectedGradients& d_;
  SelectedGeometry g_;
  BlockForm<Dot> keys_turned_, values_turned_, keys_;
  int64_t width_, query_width_, value_width_, rows_, columns_;
  int64_t segment_ = 0;  ///< lists of a segment
  T* delta_ = nullptr;   ///< as lse: Delta - d_lse
  int64_t *begins_ = nullptr, *segments_ = nullptr;  ///< [columns + 1]
  int64_t* lists_ = nullptr;
};

}  // namespace

void selected_attention_backward(const SelectedParams& p, const SelectedGradients& g) {
  if (p.dtype == Dtype::kDouble) return Backward<DotDouble>(p, g).run();
  Backward<DotFloat>(p, g).run();
}

}  // namespace longspan::LONGSPAN_ISA
