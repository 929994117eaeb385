// Exact attention: torch's tensors in, kernels/attention.h's structs out.
#include "kernels/attention.h"

#include <cmath>

#include "kernels/table.h"
#include "torch/tensors.h"

namespace longspan::binding {
namespace {

AttentionTensor heads(const Tensor& x) {
  return {const_cast<void*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

/// Where a mask lies; dimensions of size 1 are broadcast.
AttentionMask mask_layout(const Tensor& x) {
  AttentionMask m;
  int64_t* stride[4] = {&m.batch, &m.head, &m.query, &m.key};
  for (int i = 0; i < 4; ++i) *stride[i] = x.size(i) == 1 ? 0 : x.stride(i);
  m.data = const_cast<void*>(x.data_ptr());
  m.boolean = x.scalar_type() == ScalarType::Bool;
  return m;
}

/// The arguments that every attention operator shares, and what must outlive the kernel's call.
struct Arguments {
  AttentionParams params;
  Tensor q, k, v;
  OptionalTensor mask;
  std::vector<double> sinks, slopes;
  std::vector<int64_t> cu_q, cu_k, ranges;

  Arguments(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& mask_,
            const OptionalTensor& sinks_, const OptionalTensor& slopes_, const OptionalTensor& cu_q_,
            const OptionalTensor& cu_k_, const OptionalTensor& ranges_, const OptionalTensor& seed,
            int64_t left, int64_t right, int64_t sink_tokens, double scale, double softcap,
            double dropout_p)
      : q(with_unit_last_stride(q_)), k(with_unit_last_stride(k_)), v(with_unit_last_stride(v_)),
        cu_q(integers_of(cu_q_)), cu_k(integers_of(cu_k_)), ranges(integers_of(ranges_)) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                    "attention: expected q, k and v of 4 dimensions");
    STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                    "attention: q, k and v must have one dtype");
    AttentionParams& p = params;
    p.dtype = dtype_of(q, "attention: q");
    p.batch = q.size(0), p.heads = q.size(1), p.tokens = q.size(2), p.channels = q.size(3);
    p.kv_heads = k.size(1), p.keys = k.size(2), p.value_channels = v.size(3);
    STD_TORCH_CHECK(k.size(3) == p.channels && k.size(0) == p.batch && v.size(0) == p.batch &&
                        v.size(1) == p.kv_heads && v.size(2) == p.keys && p.kv_heads > 0 &&
                        p.heads % p.kv_heads == 0,
                    "attention: shapes of q, k and v do not fit");
    if (!cu_q.empty()) {
      STD_TORCH_CHECK(p.batch == 1 && cu_q.size() == cu_k.size(), "attention: packed batches are 1");
      check_offsets("cu_seqlens_q", cu_q, p.tokens);
      check_offsets("cu_seqlens_k", cu_k, p.keys);
      p.batch = int64_t(cu_q.size()) - 1;
      p.cu_q = cu_q.data(), p.cu_k = cu_k.data();
    }
    if (ranges_) {
      STD_TORCH_CHECK(int64_t(ranges.size()) == 3 * p.batch, "attention: key_ranges is (batch, 3)");
      p.ranges = ranges.data();
    }
    p.q = heads(q), p.k = heads(k), p.v = heads(v);
    p.left = left, p.right = right, p.sink_tokens = sink_tokens;
    p.scale = scale, p.softcap = softcap;
    if (mask_) set_mask(*mask_);
    if (sinks_) {
      sinks = values_of<double>(*sinks_, ScalarType::Double);
      STD_TORCH_CHECK(int64_t(sinks.size()) == p.heads, "attention: sinks is (heads,)");
      p.sinks = sinks.data();
    }
    if (slopes_) {
      slopes = values_of<double>(*slopes_, ScalarType::Double);
      const int64_t count = int64_t(slopes.size());
      STD_TORCH_CHECK(count == p.heads || count == p.batch * p.heads,
                      "attention: alibi_slopes is (heads,) or (batch, heads)");
      p.alibi_slopes = slopes.data();
      p.alibi_batch = slopes_->dim() == 2 ? p.heads : 0;
    }
    if (dropout_p > 0) {
      STD_TORCH_CHECK(seed.has_value(), "attention: dropout needs a seed");
      p.dropout = dropout_p;
      p.seed = uint64_t(values_of<int64_t>(*seed, ScalarType::Long).at(0));
    }
    p.threads = threads();
  }

 private:
  static void check_offsets(const char* name, const std::vector<int64_t>& cu, int64_t total) {
    STD_TORCH_CHECK(cu.size() >= 2 && cu.front() >= 0 && cu.back() <= total, "attention_varlen: ", name,
                    ": expected entries from 0 to the ", total, " rows, got ", cu.front(), " to ",
                    cu.back());
    for (size_t i = 1; i < cu.size(); ++i) {
      STD_TORCH_CHECK(cu[i] >= cu[i - 1], "attention_varlen: ", name, ": expected no decrease, got ",
                      cu[i - 1], " before ", cu[i]);
    }
  }

  void set_mask(const Tensor& x) {
    mask = x;
    const int64_t full[4] = {params.batch, params.heads, params.tokens, params.keys};
    STD_TORCH_CHECK(x.dim() == 4, "attention: attn_mask has 4 dimensions here");
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(x.size(i) == full[i] || x.size(i) == 1, "attention: attn_mask's dimension ", i,
                      " is ", x.size(i), ", expected 1 or ", full[i]);
    }
    AttentionMask& m = params.mask = mask_layout(x);
    if (!m.boolean) m.dtype = dtype_of(x, "attention: attn_mask");
    STD_TORCH_CHECK(m.boolean || m.dtype == params.dtype ||
                        (m.dtype == Dtype::kFloat && params.dtype != Dtype::kDouble),
                    "attention: attn_mask must be bool, float32 or q's dtype");
  }
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor mask,
                                   OptionalTensor sinks, OptionalTensor slopes, OptionalTensor cu_q,
                                   OptionalTensor cu_k, OptionalTensor ranges, OptionalTensor seed,
                                   int64_t left, int64_t right, int64_t sink_tokens, double scale,
                                   double softcap, double dropout_p) {
  Arguments a(q, k, v, mask, sinks, slopes, cu_q, cu_k, ranges, seed, left, right, sink_tokens, scale,
              softcap, dropout_p);
  Tensor out = empty_heads(q, v.size(3));
  Tensor lse = empty_of(q, {q.size(0), q.size(1), q.size(2)}, sum_type(q));
  a.params.out = heads(out);
  a.params.lse = lse.data_ptr();
  if (a.params.cu_q) {  // rows of no sequence
    const bool whole = a.cu_q.front() == 0 && a.cu_q.back() == q.size(2);
    if (!whole) {
      torch::stable::fill_(out, 0.0);
      torch::stable::fill_(lse, -INFINITY);
    }
  }
  kernels().attention_forward(a.params);
  return {out, lse};
}

/// The forward's arguments again, with what its backward adds.
struct BackwardArguments : Arguments {
  AttentionGradients gradients;
  Tensor d_out, out, lse;
  OptionalTensor d_lse;

  template <class... Rest>
  BackwardArguments(const Tensor& d_out_, const OptionalTensor& d_lse_, const Tensor& q_,
                    const Tensor& k_, const Tensor& v_, const Tensor& out_, const Tensor& lse_,
                    const Rest&... rest)
      : Arguments(q_, k_, v_, rest...), d_out(with_unit_last_stride(d_out_)),
        out(with_unit_last_stride(out_)), lse(torch::stable::contiguous(lse_)) {
    if (d_lse_) d_lse = torch::stable::contiguous(torch::stable::to(*d_lse_, sum_type(q)));
    params.out = heads(out);
    params.lse = lse.data_ptr();
    gradients.d_out = heads(d_out);
    gradients.d_lse = d_lse ? d_lse->const_data_ptr() : nullptr;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor d_out, OptionalTensor d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor mask, OptionalTensor sinks, OptionalTensor slopes, OptionalTensor cu_q,
    OptionalTensor cu_k, OptionalTensor ranges, OptionalTensor seed, int64_t left, int64_t right,
    int64_t sink_tokens, double scale, double softcap, double dropout_p) {
  BackwardArguments a(d_out, d_lse, q, k, v, out, lse, mask, sinks, slopes, cu_q, cu_k, ranges, seed,
                      left, right, sink_tokens, scale, softcap, dropout_p);
  Tensor dq = empty_heads(q, q.size(3)), dk = empty_heads(k, k.size(3)), dv = empty_heads(v, v.size(3));
  a.gradients.dq = heads(dq), a.gradients.dk = heads(dk), a.gradients.dv = heads(dv);
  Tensor d_sinks = empty_of(q, {sinks ? q.size(1) : 0}, ScalarType::Double);
  if (sinks) a.gradients.d_sinks = static_cast<double*>(d_sinks.data_ptr());
  if (a.params.cu_q) {  // rows of no sequence
    if (a.cu_q.front() != 0 || a.cu_q.back() != q.size(2)) torch::stable::fill_(dq, 0.0);
    if (a.cu_k.front() != 0 || a.cu_k.back() != k.size(2)) {
      torch::stable::fill_(dk, 0.0);
      torch::stable::fill_(dv, 0.0);
    }
  }
  kernels().attention_backward(a.params, a.gradients);
  return {dq, dk, dv, d_sinks};
}

Tensor mask_backward(Tensor d_out, OptionalTensor d_lse, Tensor q, Tensor k, Tensor v, Tensor out,
                     Tensor lse, Tensor mask, OptionalTensor sinks, OptionalTensor slopes,
                     OptionalTensor cu_q, OptionalTensor cu_k, OptionalTensor ranges,
                     OptionalTensor seed, int64_t left, int64_t right, int64_t sink_tokens, double scale,
                     double softcap, double dropout_p) {
  BackwardArguments a(d_out, d_lse, q, k, v, out, lse, OptionalTensor(mask), sinks, slopes, cu_q, cu_k,
                      ranges, seed, left, right, sink_tokens, scale, softcap, dropout_p);
  Tensor d_mask = torch::stable::new_zeros(q, mask.sizes(), sum_type(q));
  AttentionMask layout = mask_layout(d_mask);
  layout.dtype = dtype_of(d_mask, "attention: attn_mask");
  kernels().attention_mask_backward(a.params, a.gradients, layout);
  return d_mask;
}

/// More new tokens than this fill the lanes of attention_forward's tiles well enough (measured over
/// 4096 keys: decoding takes 0.8 to 1.1 of its time at 8 tokens, 1.5 to 1.8 at 16).
constexpr int64_t kDecodedTokens = 8;

std::tuple<Tensor, Tensor> decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths,
                                  OptionalTensor k_new, OptionalTensor v_new, OptionalTensor cos,
                                  OptionalTensor sin, OptionalTensor block_table, OptionalTensor starts,
                                  OptionalTensor rows, OptionalTensor sinks, OptionalTensor slopes,
                                  bool interleaved, int64_t left, int64_t right, int64_t sink_tokens,
                                  double scale, double softcap) {
  q = with_unit_last_stride(q);
  STD_TORCH_CHECK(q.dim() == 4 && k_cache.dim() == 4 && v_cache.dim() == 4,
                  "attention_decode: expected q and caches of 4 dimensions");
  STD_TORCH_CHECK(k_cache.stride(3) == 1 && v_cache.stride(3) == 1,
                  "attention_decode: a cache is written in place, so its last stride must be 1");
  const Dtype dtype = dtype_of(q, "attention_decode: q");
  STD_TORCH_CHECK(k_cache.scalar_type() == q.scalar_type() && v_cache.scalar_type() == q.scalar_type(),
                  "attention_decode: q and caches must have one dtype");
  AttentionParams p;
  AttentionCache c;
  p.dtype = dtype;
  p.batch = q.size(0), p.heads = q.size(1), p.tokens = q.size(2), p.channels = q.size(3);
  p.value_channels = v_cache.size(3);
  const std::vector<int64_t> length_values = integers_of(lengths), start_values = integers_of(starts),
                             row_values = integers_of(rows), table = integers_of(block_table);
  STD_TORCH_CHECK(int64_t(length_values.size()) == p.batch, "attention_decode: cache_seqlens is (B,)");
  STD_TORCH_CHECK(!starts || int64_t(start_values.size()) == p.batch,
                  "attention_decode: cache_starts is (B,)");
  STD_TORCH_CHECK(!rows || int64_t(row_values.size()) == p.batch,
                  "attention_decode: cache_batch_idx is (B,)");
  p.k = heads(k_cache), p.v = heads(v_cache);
  if (block_table) {  // pages (n, page, H_kv, D)
    c.page = k_cache.size(1), c.pages = block_table->size(1);
    p.kv_heads = k_cache.size(2), p.keys = c.pages * c.page;
    std::swap(p.k.head, p.k.token);
    std::swap(p.v.head, p.v.token);
    c.block_table = table.data();
  } else {
    p.kv_heads = k_cache.size(1), p.keys = k_cache.size(2);
  }
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0 && k_cache.size(3) == p.channels,
                  "attention_decode: shapes of q and the caches do not fit");
  c.new_tokens = k_new ? k_new->size(2) : 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t row = rows ? row_values[b] : b;
    STD_TORCH_CHECK(length_values[b] >= c.new_tokens && length_values[b] <= p.keys,
                    "attention_decode: cache_seqlens[", b, "] is ", length_values[b],
                    ", expected between the new tokens, ", c.new_tokens, ", and the cache's slots, ",
                    p.keys);
    STD_TORCH_CHECK(block_table || (row >= 0 && row < k_cache.size(0)),
                    "attention_decode: cache_batch_idx: expected rows of the cache, 0 to ",
                    k_cache.size(0) - 1, ", got ", row);
    for (int64_t i = 0; block_table && i * c.page < length_values[b]; ++i) {
      const int64_t page = table[b * c.pages + i];
      STD_TORCH_CHECK(page >= 0 && page < k_cache.size(0), "attention_decode: block_table[", b, "][", i,
                      "] is ", page, ", expected a page below ", k_cache.size(0));
    }
  }
  c.lengths = length_values.data();
  c.starts = data_or_null(start_values);
  c.rows = data_or_null(row_values);
  Tensor k_rows = q, v_rows = q, cos_rows = q, sin_rows = q;  // keep copies alive
  if (k_new) {
    k_rows = with_unit_last_stride(*k_new), v_rows = with_unit_last_stride(*v_new);
    c.k_new = heads(k_rows), c.v_new = heads(v_rows);
  }
  if (cos) {
    cos_rows = torch::stable::contiguous(*cos), sin_rows = torch::stable::contiguous(*sin);
    c.cos = cos_rows.const_data_ptr(), c.sin = sin_rows.const_data_ptr();
    c.rotary_dtype = dtype_of(cos_rows, "attention_decode: cos");
    c.rotary_channels = c.rotary_stride = cos_rows.size(1);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t last = length_values[b] - (starts ? start_values[b] : 0);
      STD_TORCH_CHECK(last <= cos_rows.size(0), "attention_decode: cos has ", cos_rows.size(0),
                      " positions, expected at least ", last);
    }
    c.interleaved = interleaved;
  }
  std::vector<double> sink_values, slope_values;
  if (sinks) {
    sink_values = values_of<double>(*sinks, ScalarType::Double);
    p.sinks = sink_values.data();
  }
  if (slopes) {
    slope_values = values_of<double>(*slopes, ScalarType::Double);
    p.alibi_slopes = slope_values.data();
    p.alibi_batch = slopes->dim() == 2 ? p.heads : 0;
  }
  p.left = left, p.right = right, p.sink_tokens = sink_tokens, p.scale = scale, p.softcap = softcap;
  p.threads = threads();
  Tensor out = empty_heads(q, p.value_channels);
  Tensor lse = empty_of(q, {q.size(0), q.size(1), q.size(2)}, sum_type(q));
  p.q = heads(q), p.out = heads(out), p.lse = lse.data_ptr();
  Tensor rotated = cos ? empty_heads(q, p.channels) : q;
  c.q_rotated = heads(rotated);
  kernels().attention_append(p, c);
  p.q = heads(rotated);
  if (p.tokens <= kDecodedTokens || block_table || rows) {
    kernels().attention_decode(p, c);
    return {out, lse};
  }
  std::vector<int64_t> ranges;
  for (int64_t b = 0; b < p.batch; ++b) {
    ranges.insert(ranges.end(),
                  {starts ? start_values[b] : 0, length_values[b], length_values[b] - p.tokens});
  }
  p.ranges = ranges.data();
  kernels().attention_forward(p);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
  m.impl("attention_mask_backward", TORCH_BOX(&mask_backward));
  m.impl("attention_decode", TORCH_BOX(&decode));
}

}  // namespace longspan::binding
