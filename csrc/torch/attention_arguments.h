// What attention's operators share: their tensors and options as kernels/attention.h's structs.
#pragma once

#include "kernels/attention.h"
#include "torch/tensors.h"

namespace longspan::binding {

inline AttentionTensor heads(const Tensor& x) {
  return {const_cast<void*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

/// Where a mask lies; dimensions of size 1 are broadcast.
inline AttentionMask mask_layout(const Tensor& x) {
  AttentionMask m;
  int64_t* stride[4] = {&m.batch, &m.head, &m.query, &m.key};
  for (int i = 0; i < 4; ++i) *stride[i] = x.size(i) == 1 ? 0 : x.stride(i);
  m.data = const_cast<void*>(x.data_ptr());
  m.boolean = x.scalar_type() == ScalarType::Bool;
  return m;
}

/// The arguments that every attention operator shares, and what must outlive the kernel's call.
struct AttentionArguments {
  AttentionParams params;
  Tensor q, k, v;
  OptionalTensor mask;
  std::vector<double> sinks, slopes;
  std::vector<int64_t> cu_q, cu_k, ranges;

  AttentionArguments(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& mask_,
                     const OptionalTensor& sinks_, const OptionalTensor& slopes_,
                     const OptionalTensor& cu_q_, const OptionalTensor& cu_k_,
                     const OptionalTensor& ranges_, const OptionalTensor& seed, int64_t left,
                     int64_t right, int64_t sink_tokens, double scale, double softcap, double dropout_p)
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

/// The forward's arguments again, with what its backward adds.
struct AttentionBackwardArguments : AttentionArguments {
  AttentionGradients gradients;
  Tensor d_out, out, lse;
  OptionalTensor d_lse;

  template <class... Rest>
  AttentionBackwardArguments(const Tensor& d_out_, const OptionalTensor& d_lse_, const Tensor& q_,
                             const Tensor& k_, const Tensor& v_, const Tensor& out_, const Tensor& lse_,
                             const Rest&... rest)
      : AttentionArguments(q_, k_, v_, rest...), d_out(with_unit_last_stride(d_out_)),
        out(with_unit_last_stride(out_)), lse(torch::stable::contiguous(lse_)) {
    if (d_lse_) d_lse = torch::stable::contiguous(torch::stable::to(*d_lse_, sum_type(q)));
    params.out = heads(out);
    params.lse = lse.data_ptr();
    gradients.d_out = heads(d_out);
    gradients.d_lse = d_lse ? d_lse->const_data_ptr() : nullptr;
  }
};

}  // namespace longspan::binding
