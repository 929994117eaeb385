// Exact attention: torch's tensors in, kernels/attention.h's structs out.
#include <cmath>

#include "kernels/table.h"
#include "torch/attention_arguments.h"

namespace longspan::binding {
namespace {

/// More new tokens than this fill the lanes of attention_forward's tiles well enough (measured over 256
/// and 4096 keys: decoding takes 0.2 to 0.5 of its time at 1 token, 0.5 to 0.9 at 8).
constexpr int64_t kDecodedTokens = 8;

/// Below, neither way takes long.
constexpr int64_t kDecodedKeys = 256;

/// Attention of a few queries over many keys, as decoding does it, where decoding knows all that is
/// asked for. -> whether it did.
bool decode_few(const AttentionParams& p) {
  if (p.tokens > kDecodedTokens || p.keys < kDecodedKeys) return false;
  if (p.cu_q || p.mask.data || p.dropout > 0) return false;
  std::vector<int64_t> ends(p.batch, p.keys), starts;
  if (p.ranges) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t *range = p.ranges + 3 * b, first = range[0], end = range[1];
      if (first < 0 || end > p.keys || end < 0 || range[2] != end - p.tokens) return false;
      starts.push_back(first);
      ends[b] = end;
    }
  }
  AttentionCache c;
  c.lengths = ends.data();
  c.starts = data_or_null(starts);
  kernels().attention_decode(p, c);
  return true;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor mask,
                                   OptionalTensor sinks, OptionalTensor slopes, OptionalTensor cu_q,
                                   OptionalTensor cu_k, OptionalTensor ranges, OptionalTensor seed,
                                   int64_t left, int64_t right, int64_t sink_tokens, double scale,
                                   double softcap, double dropout_p) {
  AttentionArguments a(q, k, v, mask, sinks, slopes, cu_q, cu_k, ranges, seed, left, right, sink_tokens,
                       scale, softcap, dropout_p);
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
  if (!decode_few(a.params)) kernels().attention_forward(a.params);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor d_out, OptionalTensor d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor mask, OptionalTensor sinks, OptionalTensor slopes, OptionalTensor cu_q,
    OptionalTensor cu_k, OptionalTensor ranges, OptionalTensor seed, int64_t left, int64_t right,
    int64_t sink_tokens, double scale, double softcap, double dropout_p) {
  AttentionBackwardArguments a(d_out, d_lse, q, k, v, out, lse, mask, sinks, slopes, cu_q, cu_k, ranges,
                               seed, left, right, sink_tokens, scale, softcap, dropout_p);
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
  AttentionBackwardArguments a(d_out, d_lse, q, k, v, out, lse, OptionalTensor(mask), sinks, slopes,
                               cu_q, cu_k, ranges, seed, left, right, sink_tokens, scale, softcap,
                               dropout_p);
  Tensor d_mask = torch::stable::new_zeros(q, mask.sizes(), sum_type(q));
  AttentionMask layout = mask_layout(d_mask);
  layout.dtype = dtype_of(d_mask, "attention: attn_mask");
  kernels().attention_mask_backward(a.params, a.gradients, layout);
  return d_mask;
}

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
