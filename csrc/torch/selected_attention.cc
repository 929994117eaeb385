// Attention over the blocks that each query names: torch's tensors in, kernels/selected_attention.h's
// structs out.
#include "kernels/selected_attention.h"

#include <cmath>

#include "kernels/table.h"
#include "torch/attention_arguments.h"

namespace longspan::binding {
namespace {

std::vector<int64_t> lengths_of(const OptionalTensor& lengths, int64_t batch, int64_t keys) {
  std::vector<int64_t> values = integers_of(lengths);
  STD_TORCH_CHECK(!lengths || int64_t(values.size()) == batch,
                  "selected_attention: cache_seqlens is (batch,)");
  for (const int64_t n : values) {
    STD_TORCH_CHECK(n >= 0 && n <= keys, "selected_attention: cache_seqlens: expected 0 to the ", keys,
                    " keys, got ", n);
  }
  return values;
}

/// The arguments that both directions share, and what must outlive the kernel's call.
struct Arguments {
  SelectedParams params;
  Tensor q, k, v;
  std::vector<int64_t> begins, lengths;
  std::vector<int32_t> blocks;

  Arguments(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& indices,
            const OptionalTensor& lengths_, int64_t block_size, bool causal, double scale)
      : q(with_unit_last_stride(q_)), k(with_unit_last_stride(k_)), v(with_unit_last_stride(v_)) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && indices.dim() == 4,
                    "selected_attention: expected q, k, v and block_indices of 4 dimensions");
    STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                    "selected_attention: q, k and v must have one dtype");
    SelectedParams& p = params;
    p.dtype = dtype_of(q, "selected_attention: q");
    p.batch = q.size(0), p.heads = q.size(1), p.tokens = q.size(2), p.channels = q.size(3);
    p.kv_heads = k.size(1), p.keys = k.size(2), p.value_channels = v.size(3);
    p.list_heads = indices.size(1), p.block_size = block_size;
    STD_TORCH_CHECK(block_size > 0 && k.size(3) == p.channels && k.size(0) == p.batch &&
                        v.size(0) == p.batch && v.size(1) == p.kv_heads && v.size(2) == p.keys &&
                        p.kv_heads > 0 && p.heads % p.kv_heads == 0 &&
                        (p.list_heads == p.kv_heads || p.list_heads == p.heads) &&
                        indices.size(0) == p.batch && indices.size(2) == p.tokens,
                    "selected_attention: shapes of q, k, v and block_indices do not fit");
    lengths = lengths_of(lengths_, p.batch, p.keys);
    p.lengths = data_or_null(lengths);
    p.q = heads(q), p.k = heads(k), p.v = heads(v);
    p.causal = causal, p.scale = scale, p.threads = threads();
    make_lists(indices);
  }

 private:
  /// Ascending and without the unused entries, -1.
  void make_lists(const Tensor& indices) {
    const Tensor dense = torch::stable::contiguous(torch::stable::to(indices, ScalarType::Long));
    const int64_t* from = static_cast<const int64_t*>(dense.const_data_ptr());
    const int64_t count = indices.size(3), lists = params.batch * params.list_heads * params.tokens;
    const int64_t limit = (params.keys + params.block_size - 1) / params.block_size;
    begins.assign(size_t(lists) + 1, 0);
    blocks.resize(size_t(lists * count));
    int64_t used = 0;
    for (int64_t list = 0; list < lists; ++list) {
      const int64_t begin = used;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t j = from[list * count + i];
        if (j == -1) continue;
        STD_TORCH_CHECK(j >= 0 && j < limit,
                        "selected_attention: block_indices: expected -1 or a block "
                        "below ",
                        limit, ", got ", j);
        int64_t place = used++;
        for (; place > begin && blocks[place - 1] > j; --place) blocks[place] = blocks[place - 1];
        STD_TORCH_CHECK(place == begin || blocks[place - 1] != j,
                        "selected_attention: block_indices: expected no block twice for a query, got ",
                        j, " twice");
        blocks[place] = int32_t(j);
      }
      begins[list + 1] = used;
    }
    params.begins = begins.data(), params.blocks = blocks.data();
  }
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor indices, OptionalTensor lengths,
                                   int64_t block_size, bool causal, double scale) {
  Arguments a(q, k, v, indices, lengths, block_size, causal, scale);
  Tensor out = empty_heads(q, v.size(3));
  Tensor lse = empty_of(q, {q.size(0), q.size(1), q.size(2)}, sum_type(q));
  a.params.out = heads(out);
  a.params.lse = lse.data_ptr();
  kernels().selected_attention_forward(a.params);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor d_out, OptionalTensor d_lse, Tensor q, Tensor k,
                                            Tensor v, Tensor out, Tensor lse, Tensor indices,
                                            OptionalTensor lengths, int64_t block_size, bool causal,
                                            double scale) {
  Arguments a(q, k, v, indices, lengths, block_size, causal, scale);
  const Tensor d_rows = with_unit_last_stride(d_out), out_rows = with_unit_last_stride(out);
  const Tensor sums = torch::stable::contiguous(lse);
  Tensor d_sums = sums;
  if (d_lse) d_sums = torch::stable::contiguous(torch::stable::to(*d_lse, sum_type(q)));
  a.params.out = heads(out_rows);
  a.params.lse = sums.data_ptr();
  Tensor dq = empty_heads(q, q.size(3)), dk = empty_heads(k, k.size(3)), dv = empty_heads(v, v.size(3));
  SelectedGradients g;
  g.d_out = heads(d_rows);
  g.d_lse = d_lse ? d_sums.const_data_ptr() : nullptr;
  g.dq = heads(dq), g.dk = heads(dk), g.dv = heads(dv);
  kernels().selected_attention_backward(a.params, g);
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor, Tensor> select(Tensor q, Tensor k, OptionalTensor v, OptionalTensor lengths,
                                          OptionalTensor counts, int64_t keys, int64_t length,
                                          int64_t stride, int64_t block_size, int64_t count, bool causal,
                                          double scale) {
  q = with_unit_last_stride(q), k = with_unit_last_stride(k);
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.scalar_type() == k.scalar_type(),
                  "select_blocks: expected q and k_cmp of 4 dimensions and one dtype");
  SelectBlocksParams p;
  p.dtype = dtype_of(q, "select_blocks: q");
  p.batch = q.size(0), p.heads = q.size(1), p.tokens = q.size(2), p.channels = q.size(3);
  p.kv_heads = k.size(1), p.compressed = k.size(2), p.keys = keys;
  STD_TORCH_CHECK(
      k.size(0) == p.batch && k.size(3) == p.channels && p.kv_heads > 0 && p.heads % p.kv_heads == 0,
      "select_blocks: shapes of q and k_cmp do not fit");
  STD_TORCH_CHECK(stride > 0 && length > 0 && block_size > 0 && count >= 0 && keys >= 0 &&
                      length % stride == 0 && block_size % stride == 0,
                  "select_blocks: the stride divides the length and the block size");
  const std::vector<int64_t> ends = lengths_of(lengths, p.batch, keys);
  p.lengths = data_or_null(ends);
  const std::vector<int64_t> limits = integers_of(counts);
  STD_TORCH_CHECK(!counts || int64_t(limits.size()) == p.batch * p.kv_heads * p.tokens,
                  "select_blocks: counts is (batch, kv_heads, tokens)");
  p.counts = data_or_null(limits);
  p.q = heads(q), p.k = heads(k);
  p.length = length, p.stride = stride, p.block_size = block_size, p.count = count;
  p.causal = causal, p.scale = scale, p.threads = threads();
  Tensor indices = empty_of(q, {p.batch, p.kv_heads, p.tokens, count}, ScalarType::Long);
  p.indices = static_cast<int64_t*>(indices.data_ptr());
  Tensor values = q, out = empty_of(q, {0}), lse = empty_of(q, {0}, sum_type(q));
  if (v) {
    values = with_unit_last_stride(*v);
    STD_TORCH_CHECK(values.dim() == 4 && values.scalar_type() == q.scalar_type() &&
                        values.size(0) == p.batch && values.size(1) == p.kv_heads &&
                        values.size(2) == p.compressed,
                    "select_blocks: v_cmp is as k_cmp but for its channels");
    p.value_channels = values.size(3);
    out = empty_heads(q, p.value_channels);
    lse = empty_of(q, {p.batch, p.heads, p.tokens}, sum_type(q));
    p.v = heads(values), p.out = heads(out), p.lse = lse.data_ptr();
    if (p.compressed == 0) {
      torch::stable::fill_(out, 0.0);
      torch::stable::fill_(lse, -INFINITY);
      p.v = {};
    }
  }
  kernels().select_blocks(p);
  return {indices, out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("selected_attention_forward", TORCH_BOX(&forward));
  m.impl("selected_attention_backward", TORCH_BOX(&backward));
  m.impl("select_blocks", TORCH_BOX(&select));
}

}  // namespace longspan::binding
