#include "attention_problem.h"

#include <algorithm>
#include <limits>

namespace longspan::test {

Heads::Heads(Dtype dtype, std::array<int64_t, 4> shape_, bool tokens_outside, int64_t gap)
    : shape(shape_) {
  const auto [b, h, t, c] = shape;
  const int64_t row = c + gap;
  token_ = tokens_outside ? h * row : row;
  head_ = tokens_outside ? row : t * row;
  batch_ = h * t * row;
  memory = Array(dtype, size_t(b * batch_), NAN);
}

AttentionTensor Heads::view() { return {memory.data(), batch_, head_, token_}; }

void Heads::fill(Random& random) {
  for (int64_t b = 0; b < shape[0]; ++b) {
    for (int64_t h = 0; h < shape[1]; ++h) {
      for (int64_t t = 0; t < shape[2]; ++t) {
        for (int64_t c = 0; c < shape[3]; ++c) memory.set(index(b, h, t, c), random.normal());
      }
    }
  }
}

void Heads::fill_row(int64_t t, double x) {
  for (int64_t b = 0; b < shape[0]; ++b) {
    for (int64_t h = 0; h < shape[1]; ++h) {
      for (int64_t c = 0; c < shape[3]; ++c) memory.set(index(b, h, t, c), x);
    }
  }
}

std::vector<double> Heads::values() const {
  std::vector<double> all;
  for (int64_t b = 0; b < shape[0]; ++b) {
    for (int64_t h = 0; h < shape[1]; ++h) {
      for (int64_t t = 0; t < shape[2]; ++t) {
        for (int64_t c = 0; c < shape[3]; ++c) all.push_back(at(b, h, t, c));
      }
    }
  }
  return all;
}

std::array<int64_t, 4> Problem::mask_shape() const {
  return {mask_full[0] ? batch : 1, mask_full[1] ? heads : 1, mask_full[2] ? tokens : 1,
          mask_full[3] ? keys : 1};
}

BlockLists::BlockLists(const Problem& p, Random& random)
    : tokens(p.tokens), keys(p.keys), query_block(p.query_block), key_block(p.key_block),
      batch_stride(p.lists_by_batch ? p.lists() / p.batch : 0), head_stride(p.lists_by_head),
      seen(size_t(p.lists() * p.tokens * p.keys)) {
  const int64_t words = query_block / 64 * key_block;  // a pattern's
  const int64_t row_count = (tokens + query_block - 1) / query_block;
  const int64_t column_count = (keys + key_block - 1) / key_block;
  bits.assign(size_t(words), ~uint64_t(0));  // pattern 0: seen whole
  row_begins = {0}, column_begins = {0};
  for (int64_t list = 0; list < p.lists(); ++list) {
    std::vector<int32_t> patterns(size_t(row_count * column_count), -1);
    for (int32_t& pattern : patterns) {
      const auto kind = random.below(3);
      if (kind == 0) continue;
      pattern = kind == 1 ? 0 : int32_t(int64_t(bits.size()) / words);
      for (int64_t i = 0; kind == 2 && i < words; ++i) {
        uint64_t word = 0;
        for (int bit = 0; bit < 64; ++bit) word |= uint64_t(random.below(3) != 0) << bit;
        // Keys that nobody sees at both ends, and queries that see nothing at one.
        const int64_t key = i % key_block;
        bits.push_back(key < 3 || key > 11 ? 0 : word >> 7);
      }
    }
    for (int64_t q = 0; q < tokens; ++q) {
      for (int64_t k = 0; k < keys; ++k) {
        const int32_t pattern = patterns[size_t(q / query_block * column_count + k / key_block)];
        if (pattern < 0) continue;
        const int64_t part = pattern * (query_block / 64) + q % query_block / 64;
        const uint64_t word = bits[size_t(part * key_block + k % key_block)];
        seen[size_t((list * tokens + q) * keys + k)] = word >> (q % 64) & 1;
      }
    }
    const auto append = [&](int64_t row, int64_t column, int64_t to, std::vector<int32_t>& at,
                            std::vector<int32_t>& patterns_there) {
      const int32_t pattern = patterns[size_t(row * column_count + column)];
      if (pattern >= 0) at.push_back(int32_t(to)), patterns_there.push_back(pattern);
    };
    for (int64_t row = 0; row < row_count; ++row) {
      for (int64_t c = 0; c < column_count; ++c) append(row, c, c, columns, row_patterns);
      row_begins.push_back(int64_t(columns.size()));
    }
    for (int64_t column = 0; column < column_count; ++column) {
      for (int64_t r = 0; r < row_count; ++r) append(r, column, r, rows, column_patterns);
      column_begins.push_back(int64_t(rows.size()));
    }
  }
}

AttentionBlocks BlockLists::view() const {
  AttentionBlocks x;
  x.query_block = query_block, x.key_block = key_block;
  x.batch = batch_stride, x.head = head_stride;
  x.row_begins = row_begins.data(), x.columns = columns.data(), x.row_patterns = row_patterns.data();
  x.column_begins = column_begins.data(), x.rows = rows.data();
  x.column_patterns = column_patterns.data();
  x.bits = bits.data();
  return x;
}

Inputs::Inputs(const Problem& p, uint32_t seed) {
  Random random(seed);
  const auto heads = [&](int64_t h, int64_t t, int64_t c) {
    Heads x(p.dtype, {p.rows(), h, t, c}, p.tokens_outside, p.gap);
    x.fill(random);
    return x;
  };
  q = heads(p.heads, p.tokens, p.channels);
  k = heads(p.kv_heads, p.keys, p.channels);
  v = heads(p.kv_heads, p.keys, p.value_channels);
  d_out = heads(p.heads, p.tokens, p.value_channels);
  d_lse = Array(p.lse_dtype(), random.normals(size_t(p.rows() * p.heads * p.tokens)));
  const auto [b, h, t, s] = p.mask_shape();
  const size_t cells = size_t(b * h * t * s);
  if (p.mask == MaskKind::kAdditive) {
    mask = Array(p.dtype, random.normals(cells));
    for (size_t i = 0; i < cells; i += 5) mask.set(i, -INFINITY);
  } else if (p.mask == MaskKind::kBoolean) {
    visible.resize(cells);
    for (unsigned char& each : visible) each = random.below(3) != 0;
  }
  if (p.query_block != 0) blocks.emplace(p, random);
}

namespace {

/// Threefry-2x32-20, written apart from the kernels' own (parallel_test.cc has its known answers).
std::array<uint32_t, 2> threefry(std::array<uint32_t, 2> key, std::array<uint32_t, 2> counter) {
  const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1bd11bda};
  uint32_t x = counter[0] + keys[0], y = counter[1] + keys[1];
  for (uint32_t group = 0; group < 5; ++group) {
    for (const int r : rotations[group % 2]) {
      x += y;
      y = std::rotl(y, r) ^ x;
    }
    x += keys[(group + 1) % 3];
    y += keys[(group + 2) % 3] + group + 1;
  }
  return {x, y};
}

/// One head of one sequence: where it lies and which keys its queries see.
struct Slice {
  const Problem& p;
  int64_t b, head, row, kv_head, q0, k0, tokens, keys, first, end, offset;

  Slice(const Problem& p_, int64_t b_, int64_t head_) : p(p_), b(b_), head(head_) {
    const bool packed = !p.cu_q.empty();
    row = packed ? 0 : b;
    kv_head = head / (p.heads / p.kv_heads);
    q0 = packed ? p.cu_q[size_t(b)] : 0, k0 = packed ? p.cu_k[size_t(b)] : 0;
    tokens = packed ? p.cu_q[size_t(b) + 1] - q0 : p.tokens;
    keys = packed ? p.cu_k[size_t(b) + 1] - k0 : p.keys;
    first = 0, end = keys, offset = keys - tokens;
    if (!p.ranges.empty()) {
      const int64_t* range = &p.ranges[size_t(3 * b)];
      first = range[0], end = range[1], offset = range[2];
    }
  }
  size_t mask_index(int64_t i, int64_t j) const {
    const auto shape = p.mask_shape();
    const std::array<int64_t, 4> at = {b, head, i, j};
    int64_t index = 0;
    for (size_t d = 0; d < 4; ++d) index = index * shape[d] + (p.mask_full[d] ? at[d] : 0);
    return size_t(index);
  }
  bool sees(const Inputs& in, int64_t i, int64_t j) const {
    const int64_t distance = j - i - offset;
    if (j < first || j >= end) return false;
    if (p.right >= 0 && distance > p.right) return false;
    if (p.left >= 0 && distance < -p.left && j >= first + p.sink_tokens) return false;
    if (in.blocks) {
      const int64_t by_batch = p.lists_by_batch ? b : 0, by_head = p.lists_by_head ? head : 0;
      if (!in.blocks->sees(by_batch * (p.lists() / (p.lists_by_batch ? p.batch : 1)) + by_head, i, j))
        return false;
    }
    return p.mask != MaskKind::kBoolean || in.visible[mask_index(i, j)];
  }
  double slope() const {
    if (p.slopes.empty()) return 0;
    return p.slopes[size_t(p.slopes_by_batch ? b * p.heads + head : head)];
  }
  double keep(int64_t i, int64_t j) const {
    if (p.dropout == 0) return 1;
    const auto key = threefry({uint32_t(p.seed), uint32_t(p.seed >> 32)}, {uint32_t(b), uint32_t(head)});
    const uint32_t word = threefry(key, {uint32_t(i), uint32_t(j / 2)})[size_t(j % 2)];
    return word < uint32_t(p.dropout * 4294967296.0) ? 0 : 1 / (1 - p.dropout);
  }
};

void slice_reference(const Slice& s, const Inputs& in, Results& r) {
  const Problem& p = s.p;
  const auto dense = [&](int64_t h, int64_t heads, int64_t t, int64_t count, int64_t channels) {
    return size_t(((s.row * heads + h) * count + t) * channels);
  };
  const double sink = p.sinks.empty() ? -INFINITY : p.sinks[size_t(s.head)];
  std::vector<double> score(size_t(s.keys)), slope_of_cap(size_t(s.keys)), d_weight(size_t(s.keys));
  for (int64_t i = 0; i < s.tokens; ++i) {
    const int64_t t = s.q0 + i;
    double greatest = sink;
    for (int64_t j = 0; j < s.keys; ++j) {
      double x = 0;
      score[size_t(j)] = -INFINITY;
      if (!s.sees(in, i, j)) continue;
      for (int64_t c = 0; c < p.channels; ++c) {
        x += in.q.at(s.row, s.head, t, c) * in.k.at(s.row, s.kv_head, s.k0 + j, c);
      }
      x *= p.scale;
      slope_of_cap[size_t(j)] = 1;
      if (p.softcap != 0) {
        const double capped = std::tanh(x / p.softcap);
        x = p.softcap * capped;
        slope_of_cap[size_t(j)] = 1 - capped * capped;
      }
      x -= s.slope() * std::fabs(double(i + s.offset - j));
      if (p.mask == MaskKind::kAdditive) x += in.mask[s.mask_index(i, j)];
      score[size_t(j)] = x;
      greatest = std::max(greatest, x);
    }
    const size_t lse_at = dense(s.head, p.heads, t, p.tokens, 1);
    if (greatest == -INFINITY) continue;  // sees nothing: zeros and a log-sum-exp of -infinity
    double sum = std::exp(sink - greatest);
    for (const double x : score) sum += std::exp(x - greatest);
    const double lse = greatest + std::log(sum), d_lse = in.d_lse[lse_at];
    r.lse[lse_at] = lse;

    double* out = &r.out[dense(s.head, p.heads, t, p.tokens, p.value_channels)];
    double delta = 0;
    for (int64_t j = 0; j < s.keys; ++j) {
      const double weight = std::exp(score[size_t(j)] - lse);
      if (weight == 0) continue;
      double product = 0;
      for (int64_t c = 0; c < p.value_channels; ++c) {
        const double value = in.v.at(s.row, s.kv_head, s.k0 + j, c);
        const double d_out = in.d_out.at(s.row, s.head, t, c);
        out[c] += weight * s.keep(i, j) * value;
        product += d_out * value;
        r.dv[dense(s.kv_head, p.kv_heads, s.k0 + j, p.keys, p.value_channels) + size_t(c)] +=
            weight * s.keep(i, j) * d_out;
      }
      d_weight[size_t(j)] = product * s.keep(i, j);
      delta += weight * d_weight[size_t(j)];
    }
    for (int64_t j = 0; j < s.keys; ++j) {
      const double weight = std::exp(score[size_t(j)] - lse);
      if (weight == 0) continue;
      const double d_score = weight * (d_weight[size_t(j)] - delta + d_lse);
      if (p.mask == MaskKind::kAdditive) r.d_mask[s.mask_index(i, j)] += d_score;
      const double d_product = d_score * slope_of_cap[size_t(j)] * p.scale;
      double* dq = &r.dq[dense(s.head, p.heads, t, p.tokens, p.channels)];
      double* dk = &r.dk[dense(s.kv_head, p.kv_heads, s.k0 + j, p.keys, p.channels)];
      for (int64_t c = 0; c < p.channels; ++c) {
        dq[c] += d_product * in.k.at(s.row, s.kv_head, s.k0 + j, c);
        dk[c] += d_product * in.q.at(s.row, s.head, t, c);
      }
    }
    if (!p.sinks.empty()) r.d_sinks[size_t(s.head)] += std::exp(sink - lse) * (d_lse - delta);
  }
}

}  // namespace

Results reference(const Problem& p, const Inputs& in) {
  Results r;
  const int64_t q_rows = p.rows() * p.heads * p.tokens, k_rows = p.rows() * p.kv_heads * p.keys;
  r.out.resize(size_t(q_rows * p.value_channels));
  r.lse.assign(size_t(q_rows), -INFINITY);
  r.dq.resize(size_t(q_rows * p.channels));
  r.dk.resize(size_t(k_rows * p.channels));
  r.dv.resize(size_t(k_rows * p.value_channels));
  r.d_mask.resize(p.mask == MaskKind::kAdditive ? in.mask.size() : 0);
  r.d_sinks.resize(p.sinks.size());
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) slice_reference(Slice(p, b, h), in, r);
  }
  return r;
}

Results compute(const KernelTable& kernels, const Problem& p, Inputs& in, int threads, bool backward) {
  const auto like = [&](const Heads& x, int64_t channels) {
    return Heads(p.dtype, {x.shape[0], x.shape[1], x.shape[2], channels}, p.tokens_outside, p.gap);
  };
  Heads out = like(in.q, p.value_channels), dq = like(in.q, p.channels), dk = like(in.k, p.channels),
        dv = like(in.k, p.value_channels);
  Array lse(p.lse_dtype(), size_t(p.rows() * p.heads * p.tokens), NAN);

  AttentionParams a;
  a.dtype = p.dtype;
  a.batch = p.batch, a.heads = p.heads, a.kv_heads = p.kv_heads;
  a.tokens = p.tokens, a.keys = p.keys, a.channels = p.channels, a.value_channels = p.value_channels;
  a.q = in.q.view(), a.k = in.k.view(), a.v = in.v.view(), a.out = out.view();
  a.lse = lse.data();
  a.left = p.left, a.right = p.right, a.sink_tokens = p.sink_tokens;
  if (!p.cu_q.empty()) {
    a.cu_q = p.cu_q.data(), a.cu_k = p.cu_k.data();
    for (AttentionTensor* x : {&a.q, &a.k, &a.v, &a.out}) x->batch = 0;
  }
  if (!p.ranges.empty()) a.ranges = p.ranges.data();
  if (in.blocks) a.blocks = in.blocks->view();
  AttentionMask layout;
  layout.dtype = p.dtype;
  int64_t* const strides[] = {&layout.batch, &layout.head, &layout.query, &layout.key};
  int64_t stride = 1;
  for (size_t d = 4; d-- > 0;) {
    *strides[d] = p.mask_full[d] ? stride : 0;
    stride *= p.mask_shape()[d];
  }
  if (p.mask != MaskKind::kNone) {
    a.mask = layout;
    a.mask.boolean = p.mask == MaskKind::kBoolean;
    a.mask.data = a.mask.boolean ? static_cast<void*>(in.visible.data()) : in.mask.data();
  }
  a.scale = p.scale, a.softcap = p.softcap;
  if (!p.slopes.empty())
    a.alibi_slopes = p.slopes.data(), a.alibi_batch = p.slopes_by_batch ? p.heads : 0;
  if (!p.sinks.empty()) a.sinks = p.sinks.data();
  a.dropout = p.dropout, a.seed = p.seed, a.threads = threads;
  kernels.attention_forward(a);

  Results r;
  r.out = out.values(), r.lse = lse.values();
  if (!backward) return r;
  AttentionGradients g;
  g.d_out = in.d_out.view(), g.d_lse = in.d_lse.data();
  g.dq = dq.view(), g.dk = dk.view(), g.dv = dv.view();
  if (!p.cu_q.empty()) {
    for (AttentionTensor* x : {&g.d_out, &g.dq, &g.dk, &g.dv}) x->batch = 0;
  }
  r.d_sinks.assign(p.sinks.size(), NAN);
  if (!p.sinks.empty()) g.d_sinks = r.d_sinks.data();
  kernels.attention_backward(a, g);
  r.dq = dq.values(), r.dk = dk.values(), r.dv = dv.values();
  if (p.mask == MaskKind::kAdditive) {
    Array d_mask(p.lse_dtype(), in.mask.size(), 0);
    layout.dtype = p.lse_dtype();
    layout.data = d_mask.data();
    kernels.attention_mask_backward(a, g, layout);
    r.d_mask = d_mask.values();
  }
  return r;
}

}  // namespace longspan::test
