// attention_append and attention_decode against the dense reference: each sequence's cache gathered into
// a problem of its own.
#include <numeric>

#include "attention_problem.h"
#include "catch.h"
#include "levels.h"

using namespace longspan;
using namespace longspan::test;

namespace {

struct Cache {
  const char* name = "";
  Problem p;  ///< options; keys are the slots of a row
  std::vector<int64_t> lengths, starts, rows;
  int64_t page = 0;  ///< slots of a page, 0: not paged
  int64_t new_tokens = 0;
  int64_t rotary = 0;  ///< rotated channels, 0: none
  bool interleaved = false;
};

template <class Change>
Cache make(const char* name, const Change& change) {
  Cache c;
  c.name = name;
  c.p.batch = 3, c.p.tokens = 1, c.p.keys = 300;
  c.lengths = {300, 1, 137};
  change(c);
  return c;
}

std::vector<Cache> caches() {
  std::vector<Cache> all;
  const auto add = [&](const char* name, const auto& change) { all.push_back(make(name, change)); };
  add("plain", [](Cache&) {});
  add("several queries, causal",
      [](Cache& c) { c.p.tokens = 5, c.p.right = 0, c.lengths = {300, 5, 137}; });
  add("nothing cached", [](Cache& c) { c.lengths = {0, 300, 0}; });
  add("window and sink tokens", [](Cache& c) { c.p.left = 70, c.p.right = 0, c.p.sink_tokens = 4; });
  add("several queries, window", [](Cache& c) {
    c.p.tokens = 3, c.p.left = 20, c.p.right = 0, c.p.sink_tokens = 2, c.lengths = {300, 3, 137};
  });
  add("left padding",
      [](Cache& c) { c.starts = {290, 0, 64}, c.p.left = 100, c.p.sink_tokens = 3, c.p.right = 0; });
  add("sinks", [](Cache& c) { c.p.sinks = {0.5, -1, 3, 0}, c.lengths = {300, 0, 137}; });
  add("softcap and ALiBi",
      [](Cache& c) { c.p.softcap = 2, c.p.scale = 1, c.p.slopes = {.5, .25, .125, .0625}; });
  add("rows of the cache", [](Cache& c) { c.rows = {3, 1, 0}; });
  add("heads of 40 and 24", [](Cache& c) { c.p.channels = 40, c.p.value_channels = 24; });
  add("heads of 7 and 5", [](Cache& c) { c.p.channels = 7, c.p.value_channels = 5; });
  add("tokens outside heads", [](Cache& c) { c.p.tokens_outside = true; });
  add("pages", [](Cache& c) { c.page = 16, c.p.tokens = 2, c.p.right = 0, c.lengths = {300, 2, 137}; });
  add("pages, window", [](Cache& c) { c.page = 100, c.p.left = 33, c.p.right = 0; });
  add("new tokens",
      [](Cache& c) { c.new_tokens = c.p.tokens = 3, c.p.right = 0, c.lengths = {300, 3, 137}; });
  add("new tokens, rotated", [](Cache& c) {
    c.new_tokens = c.p.tokens = 3, c.p.right = 0, c.lengths = {300, 3, 137}, c.rotary = 16;
    c.starts = {10, 0, 0};
  });
  add("new tokens, rotated in pairs, into pages", [](Cache& c) {
    c.new_tokens = c.p.tokens = 2, c.p.right = 0, c.lengths = {300, 2, 137}, c.rotary = 8;
    c.interleaved = true, c.page = 32;
  });
  add("one sequence in many shares", [](Cache& c) {
    c.p.batch = 1, c.p.heads = 3, c.p.kv_heads = 1, c.p.keys = 5000, c.lengths = {4999},
    c.p.sinks = {1, 0, 2};
  });
  return all;
}

/// A cache in memory and what the test knows of it.
struct Stored {
  Heads k, v;
  std::vector<int64_t> table;
  int64_t pages = 0;

  /// Where a slot lies: (row or page, token within).
  std::pair<int64_t, int64_t> place(const Cache& c, int64_t b, int64_t slot) const {
    if (c.page) return {table[size_t(b * pages + slot / c.page)], slot % c.page};
    return {c.rows.empty() ? b : c.rows[size_t(b)], slot};
  }
};

std::vector<double> rotated(const Cache& c, Dtype dtype, const Array& cos, const Array& sin,
                            std::vector<double> x, int64_t position) {
  const std::vector<double> before = x;
  for (int64_t i = 0; i < c.rotary / 2; ++i) {
    const size_t at = size_t(std::max<int64_t>(0, position) * c.rotary + i);
    const size_t a = size_t(c.interleaved ? 2 * i : i),
                 b = size_t(c.interleaved ? 2 * i + 1 : i + c.rotary / 2);
    x[a] = before[a] * cos[at] - before[b] * sin[at];
    x[b] = before[b] * cos[at] + before[a] * sin[at];
  }
  return Array(dtype, x).values();
}

std::vector<double> row_of(const Heads& x, int64_t b, int64_t h, int64_t t) {
  std::vector<double> row(size_t(x.shape[3]));
  for (int64_t c = 0; c < x.shape[3]; ++c) row[size_t(c)] = x.at(b, h, t, c);
  return row;
}

void set_row(Heads& x, int64_t b, int64_t h, int64_t t, const std::vector<double>& row) {
  for (int64_t c = 0; c < x.shape[3]; ++c) x.memory.set(x.index(b, h, t, c), row[size_t(c)]);
}

/// Slots beyond a sequence's length, and those before its start, hold NaN.
Stored store(const Cache& c, Random& random) {
  const Problem& p = c.p;
  Stored s;
  std::array<int64_t, 4> shape = {p.batch + 1, p.kv_heads, p.keys, p.channels};
  if (c.page) {
    s.pages = (p.keys + c.page - 1) / c.page;
    s.table.resize(size_t(p.batch * s.pages));
    std::iota(s.table.begin(), s.table.end(), 1);
    for (size_t i = s.table.size(); i-- > 1;)
      std::swap(s.table[i], s.table[size_t(random.below(int64_t(i) + 1))]);
    shape[0] = p.batch * s.pages + 1, shape[2] = c.page;
  }
  s.k = Heads(p.dtype, shape, p.tokens_outside || c.page, 0);
  shape[3] = p.value_channels;
  s.v = Heads(p.dtype, shape, p.tokens_outside || c.page, 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t start = c.starts.empty() ? 0 : c.starts[size_t(b)];
    for (int64_t slot = start; slot < c.lengths[size_t(b)] - c.new_tokens; ++slot) {
      const auto [row, t] = s.place(c, b, slot);
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        set_row(s.k, row, h, t, random.normals(size_t(p.channels)));
        set_row(s.v, row, h, t, random.normals(size_t(p.value_channels)));
      }
    }
  }
  return s;
}

void check_decode(const KernelTable& kernels, const Cache& c, int threads) {
  const Problem& p = c.p;
  Random random(7);
  Stored s = store(c, random);
  const auto heads = [&](int64_t h, int64_t t, int64_t channels) {
    Heads x(p.dtype, {p.batch, h, t, channels}, p.tokens_outside, 0);
    x.fill(random);
    return x;
  };
  Heads q = heads(p.heads, p.tokens, p.channels), k_new = heads(p.kv_heads, c.new_tokens, p.channels),
        v_new = heads(p.kv_heads, c.new_tokens, p.value_channels);
  Heads out(p.dtype, {p.batch, p.heads, p.tokens, p.value_channels}, p.tokens_outside, 0);
  Array lse(p.lse_dtype(), size_t(p.batch * p.heads * p.tokens), NAN);
  std::vector<double> angles = random.normals(size_t(p.keys * c.rotary)), cosines, sines;
  for (size_t i = 0; i < angles.size(); ++i) {  // halves are equal
    const size_t half = size_t(c.rotary / 2);
    const double angle = angles[i % size_t(c.rotary) < half ? i : i - half];
    cosines.push_back(std::cos(angle)), sines.push_back(std::sin(angle));
  }
  const Array cos(p.lse_dtype(), cosines), sin(p.lse_dtype(), sines);

  AttentionParams a;
  a.dtype = p.dtype;
  a.batch = p.batch, a.heads = p.heads, a.kv_heads = p.kv_heads, a.tokens = p.tokens, a.keys = p.keys;
  a.channels = p.channels, a.value_channels = p.value_channels;
  a.q = q.view(), a.k = s.k.view(), a.v = s.v.view(), a.out = out.view(), a.lse = lse.data();
  a.left = p.left, a.right = p.right, a.sink_tokens = p.sink_tokens;
  a.scale = p.scale, a.softcap = p.softcap;
  if (!p.slopes.empty()) a.alibi_slopes = p.slopes.data();
  if (!p.sinks.empty()) a.sinks = p.sinks.data();
  a.threads = threads;
  AttentionCache cache;
  cache.lengths = c.lengths.data();
  if (!c.starts.empty()) cache.starts = c.starts.data();
  if (!c.rows.empty()) cache.rows = c.rows.data();
  if (c.page) cache.block_table = s.table.data(), cache.pages = s.pages, cache.page = c.page;
  if (c.new_tokens)
    cache.k_new = k_new.view(), cache.v_new = v_new.view(), cache.new_tokens = c.new_tokens;
  if (c.rotary) {
    cache.cos = cos.data(), cache.sin = sin.data();
    cache.rotary_dtype = p.lse_dtype();
    cache.rotary_channels = cache.rotary_stride = c.rotary, cache.interleaved = c.interleaved;
  }
  Heads q_rotated(p.dtype, q.shape, !p.tokens_outside, 0);
  cache.q_rotated = q_rotated.view();
  kernels.attention_append(a, cache);
  if (c.rotary) a.q = q_rotated.view();
  kernels.attention_decode(a, cache);

  const double unit = epsilon_of(p.dtype);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = c.lengths[size_t(b)], start = c.starts.empty() ? 0 : c.starts[size_t(b)];
    Problem one = p;
    one.batch = 1, one.keys = length, one.ranges = {start, length, length - p.tokens};
    one.tokens_outside = false;
    Inputs in(one, 1);
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t t = 0; t < p.tokens; ++t) {
        set_row(in.q, 0, h, t,
                rotated(c, p.dtype, cos, sin, row_of(q, b, h, t), length - p.tokens + t - start));
      }
    }
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      for (int64_t slot = 0; slot < length; ++slot) {
        const auto [row, t] = s.place(c, b, slot);
        const int64_t fresh = slot - (length - c.new_tokens);
        if (fresh >= 0) {  // must have been written
          const auto expected = rotated(c, p.dtype, cos, sin, row_of(k_new, b, h, fresh), slot - start);
          CHECK(distance(row_of(s.k, row, h, t), expected) <= 2 * unit);
          CHECK(row_of(s.v, row, h, t) == row_of(v_new, b, h, fresh));
        }
        set_row(in.k, 0, h, slot, row_of(s.k, row, h, t));
        set_row(in.v, 0, h, slot, row_of(s.v, row, h, t));
      }
    }
    const Results expected = reference(one, in);
    std::vector<double> got_out, got_lse;
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t t = 0; t < p.tokens; ++t) {
        for (const double x : row_of(out, b, h, t)) got_out.push_back(x);
        got_lse.push_back(lse[size_t((b * p.heads + h) * p.tokens + t)]);
      }
    }
    INFO("sequence " << b);
    const bool wide = p.dtype == Dtype::kFloat || p.dtype == Dtype::kDouble;
    CHECK(distance(got_out, expected.out) <= unit * (wide ? 32 : c.rotary ? 6 : 3));
    CHECK(distance(got_lse, expected.lse) <= unit * (wide ? 32 : c.rotary ? 6 : 3));
  }
}

}  // namespace

TEST_CASE("decoding agrees with the dense reference", "[decode]") {
  for (const Level& level : levels()) {
    for (Cache c : caches()) {
      for (const Dtype dtype : {Dtype::kFloat, Dtype::kDouble, Dtype::kBfloat16, Dtype::kHalf}) {
        c.p.dtype = dtype;
        INFO(level.name << ", " << name_of(dtype) << ", " << c.name);
        check_decode(*level.kernels, c, 2);
      }
    }
  }
}
