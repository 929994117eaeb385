// A few queries over a long cache. Here the machine's limit is reading the cache once, so the roles
// of the tile are swapped: the queries of all heads that share a key-value head are the rows (there
// are few), keys and then channels the lanes.
//
//     S [rows][keys]        = Q [rows][channels] K^T       a tile of 64 keys is turned in registers
//     O [rows][channels]   += P [rows][keys] V             V as it lies
//
// With AMX it is S^T that is multiplied, whose A is K as it lies, and S^T that is turned: 16 columns a
// key instead of its channels.
//
// Counted for 3 rows of 64 channels on a 512-bit machine. Float: a key costs some 44 cycles to turn and
// 40 to multiply and weigh, 85 for its 512 bytes; a core that reads 15 GB/s takes 125 for them. bfloat16
// with AMX: 8 nanoseconds for its 256 bytes (3.3 the products and their turning, 1.8 the softmax, 2.9
// the sum), where a core that reads 12 GB/s takes 21. So memory must never idle: the next tile is asked
// for evenly all through this one, K and V in turn. A sequence's keys are shared out to as many tasks as
// fill a machine; the parts are merged in order.

#include "kernels/parallel.h"
#include "kernels/softmax.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kEnoughTasks = 64;  // constants: results must not depend on the machine
constexpr int64_t kRunsOfThread = 4;  // of tasks; their number changes no result
constexpr int64_t kLeastKeysPerSplit = 256;
constexpr int64_t kKeyTile = 64;
// Rows of the next tile that are asked for before each product, turning and sum of a row's weights. For
// two or three rows of queries that leaves a third to the sum over V, a row every third token.
constexpr int64_t kAsked = 4, kTokensOfAsk = 3;
constexpr int64_t kFewRows = 512;  // to be merged without waking threads

LS_INLINE int64_t first_key(const AttentionCache& c, int64_t b) {
  return c.starts ? max_of<int64_t>(0, c.starts[b]) : 0;
}

/// A slot of one head of a sequence's cache.
LS_INLINE TokenRows cache_row(const AttentionParams& p, const AttentionCache& c,
                              const AttentionTensor& x, int64_t b, int64_t kv_head, int64_t slot) {
  if (c.block_table) {
    return rows_of(x, p.dtype, c.block_table[b * c.pages + slot / c.page], kv_head, slot % c.page);
  }
  return rows_of(x, p.dtype, c.rows ? c.rows[b] : b, kv_head, slot);
}

/// The next tile of K and V, asked for a few rows at a time. A burst would wait for itself, as a core
/// has so many lines on the way, and where V came after K memory would answer 1.3 times more slowly.
class NextTile {
 public:
  NextTile(TokenRows k, int64_t channels, TokenRows v, int64_t value_channels, int64_t tokens)
      : k_(static_cast<const char*>(k.data)), v_(static_cast<const char*>(v.data)),
        k_step_(k.stride * size_of(k.dtype)), v_step_(v.stride * size_of(v.dtype)),
        k_bytes_(channels * size_of(k.dtype)), v_bytes_(value_channels * size_of(v.dtype)),
        left_(tokens) {}

  LS_INLINE void ask(int64_t tokens) {
    tokens = min_of(tokens, left_);
    left_ -= tokens;
    for (; tokens > 0; --tokens, k_ += k_step_, v_ += v_step_) {
      for (int64_t i = 0; i < k_bytes_; i += 64) __builtin_prefetch(k_ + i, 0, 2);
      for (int64_t i = 0; i < v_bytes_; i += 64) __builtin_prefetch(v_ + i, 0, 2);
    }
  }
  LS_INLINE void ask_all() { ask(left_); }

 private:
  const char *k_, *v_;
  int64_t k_step_, v_step_, k_bytes_, v_bytes_, left_;
};

/// out [rows][width] += weights [rows][tokens] V for V of bfloat16 as it lies: a word is an even and an
/// odd channel, of which each becomes a float by one instruction, and sums of both are dealt out at the
/// end. On AMX machines faster than vdpbf16ps, which they begin every other cycle.
class WeightedSum {
  static constexpr int L = kLanes<float>;

 public:
  const float* weights;
  int64_t weights_row;
  TokenRows v;
  int64_t tokens;
  NextTile& next;
  float* out;
  int64_t width;

  static bool suits(Dtype dtype, int64_t channels) {
    return dtype == Dtype::kBfloat16 && channels % (2 * L) == 0;
  }

  void add(int64_t rows, int64_t channels) const {
    constexpr int kWords = kTileColumns / 2;
    int64_t c = 0;
    for (; c + 2 * L * kWords <= channels; c += 2 * L * kWords) column<4, kWords>(0, rows, c);
    for (; c < channels; c += 2 * L) column<4, 1>(0, rows, c);
  }

 private:
  template <int kRows, int kWords>
  LS_INLINE void column(int64_t m, int64_t rows, int64_t c) const {
    for (; m + kRows <= rows; m += kRows) tile<kRows, kWords>(m, c);
    if constexpr (kRows > 1) column<kRows - 1, kWords>(m, rows, c);
  }

  template <int kRows, int kWords>
  LS_INLINE void tile(int64_t m, int64_t c) const {
    Vec<float> even[kRows][kWords] = {}, odd[kRows][kWords] = {};
    const uint16_t* row = static_cast<const uint16_t*>(v.data) + c;
    for (int64_t t = 0; t < tokens; ++t, row += v.stride) {
      if (t % kTokensOfAsk == 0) next.ask(1);
      Vec<float> x[kWords], y[kWords];
#pragma GCC unroll 2
      for (int j = 0; j < kWords; ++j) {
        Vec<uint32_t> words;
        __builtin_memcpy(&words, row + 2 * L * j, sizeof words);
        x[j] = bit_cast<float, uint32_t>(words << 16);
        y[j] = bit_cast<float, uint32_t>(words & 0xffff0000u);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec<float> w = broadcast(weights[(m + i) * weights_row + t]);
#pragma GCC unroll 2
        for (int j = 0; j < kWords; ++j) {
          even[i][j] = w * x[j] + even[i][j];
          odd[i][j] = w * y[j] + odd[i][j];
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      float* const to = out + (m + i) * width + c;
#pragma GCC unroll 2
      for (int j = 0; j < kWords; ++j) {
        float* const at = to + 2 * L * j;
        store(at, load(at) + interleave_low<float>(even[i][j], odd[i][j]));
        store(at + L, load(at + L) + interleave_high<float>(even[i][j], odd[i][j]));
      }
    }
  }
};

template <class Dot>
class Decode {
  using E = typename Dot::Element;
  using T = typename Dot::Sum;

 public:
  Decode(const AttentionParams& p, const AttentionCache& c) : p_(p), c_(c) {
    depth_ = ceil_div(p.channels, Dot::kDepth);
    width_ = round_up(p.value_channels, kLanes<T>);
    group_ = p.heads / p.kv_heads;
    rows_ = group_ * p.tokens;
    columns_ = round_up(rows_, kLanes<T>);
    in_place_ = WeightedSum::suits(p.dtype, p.value_channels);
    splits_ = max_of<int64_t>(1, min_of(ceil_div(kEnoughTasks, max_of<int64_t>(1, p.batch * p.kv_heads)),
                                        p.keys / kLeastKeysPerSplit));
  }

  void run() {
    const int64_t heads = p_.batch * p_.kv_heads, tasks = heads * splits_;
    if (tasks == 0 || rows_ == 0) return;
    const int threads = threads_for(tasks, p_.threads);
    Arena measure;
    lay_out(measure);
    Arena measure_part;
    lay_out_part(measure_part);
    Scratch scratch(measure.used() * threads);
    Scratch parts(measure_part.used() * tasks);
    const auto part = [&](int64_t i) {
      Arena arena(parts.at(measure_part.used() * i));
      return lay_out_part(arena);
    };
    // A thread takes several parts one after the other: there memory can be asked for ahead of the next.
    const int64_t runs = min_of<int64_t>(tasks, threads * kRunsOfThread);
    parallel_for(runs, threads, [&](int64_t run, int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      const Workspace w = lay_out(arena);
      const int64_t end = tasks * (run + 1) / runs;
      for (int64_t i = tasks * run / runs; i < end; ++i) {
        const int64_t head = i / splits_, split = i % splits_;
        const bool goes_on = i + 1 < end && split + 1 < splits_;
        attend(head / p_.kv_heads, head % p_.kv_heads, split, goes_on, part(i), w);
      }
    });
    parallel_for(heads, heads * rows_ < kFewRows ? 1 : threads, [&](int64_t i, int) {
      for (int64_t row = 0; row < rows_; ++row) {
        finish(i / p_.kv_heads, i % p_.kv_heads, row, [&](int64_t s) { return part(i * splits_ + s); });
      }
    });
  }

 private:
#if defined(LONGSPAN_AMX)
  static constexpr bool kByKey = Dot::kDepth == 2;
#else
  static constexpr bool kByKey = false;
#endif

  struct Part {
    T *maximum, *sum;  ///< [rows]
    T* out;  ///< [rows][width]
  };
  struct Workspace {
    E* queries;  ///< [rows][depth]
    E* turned;  ///< Q^T [depth][columns]; kByKey only
    E* keys;  ///< K^T [depth][kKeyTile]; kByKey: copies of K, where memory has another form
    E* values;  ///< copies of V, likewise
    T* by_key;  ///< S^T [kKeyTile][columns]; kByKey only
    T* scores;  ///< [rows][kKeyTile]; kByKey: [columns][kKeyTile]
    E* weights;  ///< the same rounded, in pairs of keys; DotBf16 only
  };

  Part lay_out_part(Arena& arena) const {
    Part part;
    part.maximum = arena.take<T>(rows_);
    part.sum = arena.take<T>(rows_);
    part.out = arena.take<T>(rows_ * width_);
    return part;
  }

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.queries = arena.take<E>(rows_ * depth_);
    w.turned = arena.take<E>(kByKey ? depth_ * columns_ : 0);
    w.keys = arena.take<E>(depth_ * kKeyTile);
    w.values = arena.take<E>(kKeyTile * width_);
    w.by_key = arena.take<T>(kByKey ? kKeyTile * columns_ : 0);
    w.scores = arena.take<T>((kByKey ? columns_ : rows_) * kKeyTile);
    w.weights = arena.take<E>(Dot::kDepth == 2 ? rows_ * kKeyTile / 2 : 0);
    return w;
  }

  LS_INLINE TokenRows cached(const AttentionTensor& x, int64_t b, int64_t kv_head, int64_t slot) const {
    return cache_row(p_, c_, x, b, kv_head, slot);
  }

  /// Rows are the group's heads, each with all its queries.
  void load_queries(int64_t b, int64_t kv_head, const Workspace& w) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t head = kv_head * group_ + r / p_.tokens, t = r % p_.tokens;
      const TokenRows q = rows_of(p_.q, p_.dtype, b, head, t);
      for (int64_t i = 0; i < depth_; i += kLanes<E>) {
        const int64_t n = min_of<int64_t>(depth_ - i, kLanes<E>);
        store_first(w.queries + r * depth_ + i, load_channels<Dot>(q, 0, i, n), n);
      }
    }
    if constexpr (kByKey) {
      transposed<Dot>({w.queries, p_.dtype, 2 * depth_}, rows_, 2 * depth_, w.turned, columns_);
    }
  }

  /// goes_on: the next split follows at once.
  void attend(int64_t b, int64_t kv_head, int64_t split, bool goes_on, const Part& part,
              const Workspace& w) const {
    for (int64_t r = 0; r < rows_; ++r) {
      part.maximum[r] = -kInfinity<T>;
      part.sum[r] = T(0);
    }
    __builtin_memset(part.out, 0, size_t(rows_ * width_) * sizeof(T));
    const int64_t length = c_.lengths[b], first = first_key(c_, b), offset = length - p_.tokens;
    const int64_t low = p_.left < 0 ? first : max_of(first, offset - p_.left);
    const int64_t sink_end = min_of(first + p_.sink_tokens, length);
    load_queries(b, kv_head, w);
    // Sinks before the window belong to the first split; the rest is cut in whole tiles.
    if (split == 0) span(b, kv_head, first, min_of(sink_end, low), low, part, w);
    const int64_t tiles = ceil_div(max_of<int64_t>(0, length - low), kKeyTile);
    const int64_t begin = low + tiles * split / splits_ * kKeyTile;
    const int64_t end = min_of(length, low + tiles * (split + 1) / splits_ * kKeyTile);
    span(b, kv_head, begin, end, goes_on ? length : end, part, w);
  }

  /// Keys below `known` may be asked for.
  void span(int64_t b, int64_t kv_head, int64_t begin, int64_t end, int64_t known, const Part& part,
            const Workspace& w) const {
    for (int64_t k0 = begin; k0 < end;) {
      int64_t k1 = min_of(k0 + kKeyTile, end);
      if (c_.block_table) k1 = min_of(k1, (k0 / c_.page + 1) * c_.page);
      tile(b, kv_head, k0, k1, known, part, w);
      k0 = k1;
    }
  }

  void tile(int64_t b, int64_t kv_head, int64_t k0, int64_t k1, int64_t known, const Part& part,
            const Workspace& w) const {
    constexpr int L = kLanes<T>;
    const int64_t keys = k1 - k0, columns = round_up(keys, L);
    const TokenRows k = cached(p_.k, b, kv_head, k0), v = cached(p_.v, b, kv_head, k0);
    // The next tile is asked for all through this one; of pages it may lie anywhere.
    const int64_t more = c_.block_table ? 0 : max_of<int64_t>(0, min_of(known - k1, kKeyTile));
    NextTile next(k.from(keys), p_.channels, v.from(keys), p_.value_channels, more);
    score(k, keys, columns, w, next);
    bool visible = true;
    for (int64_t r = 0; r < rows_; ++r) {
      visible &= softmax(b, kv_head, r, k0, keys, columns, part, w);
      next.ask(kAsked);
    }
    if constexpr (sizeof(T) == 4) {
      if (visible && in_place_) {
        const WeightedSum sum{w.scores, kKeyTile, v, keys, next, part.out, width_};
        return sum.add(rows_, p_.value_channels);
      }
    }
    next.ask_all();

    const E* weights;
    if constexpr (Dot::kDepth == 1) {
      weights = w.scores;
    } else {
      for (int64_t i = 0; i < rows_ * kKeyTile; i += L) store_bf16(w.weights, i, load(w.scores + i));
      weights = w.weights;
    }
    const Operand<Dot> vt = by_token<Dot>(v, keys, p_.value_channels, true, w.values);
    const int64_t depth = ceil_div(keys, Dot::kDepth);
    const Product<Dot> product{weights, kKeyTile / Dot::kDepth, 1, vt.data, vt.stride, part.out, width_};
    if (visible || all_finite<Dot>(vt, depth, p_.value_channels)) {
      product.template run_as<Start::kAccumulate, false, true>(rows_, width_, depth);
    } else {
      product.template run_as<Start::kAccumulate, true, true>(rows_, width_, depth);
    }
  }

  /// Raw products of a tile.
  LS_INLINE void score(TokenRows k, int64_t keys, int64_t columns, const Workspace& w,
                       NextTile& next) const {
    constexpr int L = kLanes<T>;
    if constexpr (kByKey) {
      const Operand<Dot> rows = by_channel<Dot>(k, keys, p_.channels, w.keys);
      for (int64_t t = 0; t < keys; t += L) {
        next.ask(kAsked);
        Product<Dot>{rows.data + t * rows.stride, rows.stride, 1, w.turned, columns_,
                     w.by_key + t * columns_,     columns_}
            .template run_as<Start::kZero, false, true>(min_of<int64_t>(keys - t, L), columns_, depth_);
      }
      for (int64_t t = 0; t < keys; t += L) {
        next.ask(kAsked);
        transposed<DotFloat>({w.by_key + t * columns_, Dtype::kFloat, columns_},
                             min_of<int64_t>(keys - t, L), columns_, w.scores + t, kKeyTile);
      }
    } else {
      for (int64_t t = 0; t < keys; t += L) {
        next.ask(L / 2);
        transposed<Dot>(k.from(t), min_of<int64_t>(keys - t, L), p_.channels, w.keys + t, kKeyTile);
      }
      next.ask(kKeyTile / 4);
      Product<Dot>{w.queries, depth_, 1, w.keys, kKeyTile, w.scores, kKeyTile}
          .template run_as<Start::kZero, false, true>(rows_, columns, depth_);
    }
  }

  /// One row of a tile: raw products to weights, relative to the row's new maximum. Whether the row
  /// sees every key.
  bool softmax(int64_t b, int64_t kv_head, int64_t r, int64_t k0, int64_t keys, int64_t columns,
               const Part& part, const Workspace& w) const {
    constexpr int L = kLanes<T>;
    T* row = w.scores + r * kKeyTile;
    const int64_t head = kv_head * group_ + r / p_.tokens;
    const int64_t at = c_.lengths[b] - p_.tokens + r % p_.tokens;  // where the query stands
    const T slope = p_.alibi_slopes ? T(p_.alibi_slopes[b * p_.alibi_batch + head]) : T(0);
    // Seen: keys [from, to) of the tile, and those below `sinks`.
    const int64_t to = p_.right < 0 ? keys : min_of(keys, at + p_.right + 1 - k0);
    const int64_t from = p_.left < 0 ? 0 : at - p_.left - k0;
    const int64_t sinks = first_key(c_, b) + p_.sink_tokens - k0;
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    const auto bound = [](int64_t x) { return T(max_of<int64_t>(-1, min_of<int64_t>(x, kKeyTile))); };
    Vec<T> greatest = broadcast(-kInfinity<T>);
    for (int64_t i = 0; i < columns; i += L) {
      Vec<T> x = load(row + i) * T(p_.scale);
      if (p_.softcap != 0) x = tanh<T>(x / T(p_.softcap)) * T(p_.softcap);
      if (slope != T(0)) x -= absolute<T>(lane + T(i + k0 - at)) * slope;
      const Vec<T> key = lane + T(i);
      const auto seen = (key < bound(to)) & ((key >= bound(from)) | (key < bound(sinks)));
      x = select<T>(seen, x * T(kLog2e), broadcast(-kInfinity<T>));
      greatest = maximum<T>(greatest, x);
      store(row + i, x);
    }
    const T before = part.maximum[r], here = max_of_lanes<T>(greatest);
    const T now = before < here ? here : before;
    const T reference = now == -kInfinity<T> ? T(0) : now;
    const T correction = exp2_nonpositive<T>(broadcast(before - reference))[0];
    Vec<T> sum = {};
    for (int64_t i = 0; i < columns; i += L) {
      const Vec<T> p = exp2_nonpositive<T>(load(row + i) - reference);
      sum += p;
      store(row + i, p);
    }
    for (int64_t i = columns; i < kKeyTile; i += L) store(row + i, Vec<T>{});
    part.maximum[r] = now;
    part.sum[r] = part.sum[r] * correction + sum_of_lanes<T>(sum);
    if (correction != T(1)) {
      T* out = part.out + r * width_;
      for (int64_t c = 0; c < width_; c += L) store(out + c, load(out + c) * correction);
    }
    return to >= keys && (from <= 0 || sinks >= keys);
  }

  template <class PartOf>
  void finish(int64_t b, int64_t kv_head, int64_t r, const PartOf& part) const {
    const int64_t head = kv_head * group_ + r / p_.tokens, t = r % p_.tokens;
    const T sink = p_.sinks ? T(p_.sinks[head]) * T(kLog2e) : -kInfinity<T>;
    T greatest = sink;
    for (int64_t s = 0; s < splits_; ++s) {
      const T m = part(s).maximum[r];
      greatest = greatest < m ? m : greatest;
    }
    const T reference = greatest == -kInfinity<T> ? T(0) : greatest;
    const auto power = [&](T x) { return exp2_nonpositive<T>(broadcast(x - reference))[0]; };
    T sum = power(sink);
    for (int64_t s = 0; s < splits_; ++s) {
      const Part of = part(s);
      of.maximum[r] = power(of.maximum[r]);  // from here on what its sums count for
      sum += of.sum[r] * of.maximum[r];
    }
    const T inverse = sum == T(0) ? T(0) : T(1) / sum;
    const TokenRows out = rows_of(p_.out, p_.dtype, b, head, t);
    for (int64_t c = 0; c < width_; c += kLanes<T>) {
      Vec<T> x = {};
      for (int64_t s = 0; s < splits_; ++s) {
        const Part of = part(s);
        x += load(of.out + r * width_ + c) * of.maximum[r];
      }
      store_as<T>(const_cast<void*>(out.data), p_.dtype, c, x * inverse, p_.value_channels - c);
    }
    const T log2 = sizeof(T) == 4 ? T(__builtin_log2f(float(sum))) : T(__builtin_log2(double(sum)));
    static_cast<T*>(p_.lse)[(b * p_.heads + head) * p_.tokens + t] =
        sum == T(0) ? -kInfinity<T> : (reference + log2) * T(kLn2);
  }

  const AttentionParams& p_;
  const AttentionCache& c_;
  int64_t depth_, width_, group_, rows_, columns_, splits_;
  bool in_place_;
};

/// Copies a row, rotated by its position where cos is given.
template <class T>
void rotate(const AttentionParams& p, const AttentionCache& c, TokenRows in, int64_t position,
            void* out) {
  if (!c.cos) {
    __builtin_memcpy(out, in.data, size_t(p.channels * size_of(p.dtype)));
    return;
  }
  const int64_t half = c.rotary_channels / 2;
  const auto one = [](const void* data, Dtype dtype, int64_t at) {
    return load_as<T>(data, dtype, at, 1)[0];
  };
  for (int64_t i = 0; i < half; ++i) {
    const int64_t first = c.interleaved ? 2 * i : i, second = c.interleaved ? 2 * i + 1 : i + half;
    const T a = one(in.data, p.dtype, first), b = one(in.data, p.dtype, second);
    const T cos = one(c.cos, c.rotary_dtype, position * c.rotary_stride + i);
    const T sin = one(c.sin, c.rotary_dtype, position * c.rotary_stride + i);
    store_as<T>(out, p.dtype, first, broadcast(a * cos - b * sin), 1);
    store_as<T>(out, p.dtype, second, broadcast(b * cos + a * sin), 1);
  }
  const int64_t size = size_of(p.dtype), done = 2 * half;
  __builtin_memcpy(static_cast<char*>(out) + done * size,
                   static_cast<const char*>(in.data) + done * size, size_t((p.channels - done) * size));
}

template <class T>
void append(const AttentionParams& p, const AttentionCache& c) {
  const auto write = [](TokenRows x) { return const_cast<void*>(x.data); };
  const auto position = [&](int64_t b, int64_t slot) {
    return max_of<int64_t>(0, slot - first_key(c, b));
  };
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      for (int64_t t = 0; t < c.new_tokens; ++t) {
        const int64_t slot = c.lengths[b] - c.new_tokens + t;
        rotate<T>(p, c, rows_of(c.k_new, p.dtype, b, h, t), position(b, slot),
                  write(cache_row(p, c, p.k, b, h, slot)));
        __builtin_memcpy(write(cache_row(p, c, p.v, b, h, slot)),
                         rows_of(c.v_new, p.dtype, b, h, t).data,
                         size_t(p.value_channels * size_of(p.dtype)));
      }
    }
    for (int64_t h = 0; h < (c.cos ? p.heads : 0); ++h) {
      for (int64_t t = 0; t < p.tokens; ++t) {
        rotate<T>(p, c, rows_of(p.q, p.dtype, b, h, t), position(b, c.lengths[b] - p.tokens + t),
                  write(rows_of(c.q_rotated, p.dtype, b, h, t)));
      }
    }
  }
}

}  // namespace

void attention_append(const AttentionParams& p, const AttentionCache& c) {
  p.dtype == Dtype::kDouble ? append<double>(p, c) : append<float>(p, c);
}

void attention_decode(const AttentionParams& p, const AttentionCache& c) {
  if (p.dtype == Dtype::kDouble) return Decode<DotDouble>(p, c).run();
#if defined(LONGSPAN_BF16_DOT)
  if (p.dtype == Dtype::kBfloat16 && p.channels % 2 == 0) return Decode<DotBf16>(p, c).run();
#endif
  Decode<DotFloat>(p, c).run();
}

}  // namespace longspan::LONGSPAN_ISA
