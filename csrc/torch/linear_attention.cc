// Linear attention: torch's tensors in, kernels/linear_attention.h's structs out.
#include "kernels/linear_attention.h"

#include "kernels/table.h"
#include "torch/runs.h"

namespace longspan::binding {
namespace {

/// (B, H, T, channels).
SequenceTensor layout(const Tensor& x) {
  return {const_cast<void*>(x.data_ptr()), x.stride(0), x.stride(2), x.stride(1)};
}

/// The arguments that forward and backward share, and what must outlive the kernel's call.
struct Arguments {
  LinearAttentionParams params;
  Tensor q, k, v;
  OptionalTensor gate, initial, initial_norm;
  std::vector<int64_t> cu;
  Runs runs;

  Arguments(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& gate_,
            const OptionalTensor& initial_, const OptionalTensor& initial_norm_,
            const OptionalTensor& cu_, bool causal, double scale, bool normalize, double eps)
      : q(with_unit_last_stride(q_)), k(with_unit_last_stride(k_)), v(with_unit_last_stride(v_)),
        cu(integers_of(cu_)) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                    "linear_attention: expected q, k and v of 4 dimensions");
    LinearAttentionParams& p = params;
    p.dtype = dtype_of(q, "linear_attention: q");
    p.batch = q.size(0), p.heads = q.size(1), p.tokens = q.size(2), p.key_channels = q.size(3);
    p.kv_heads = k.size(1), p.value_channels = v.size(3);
    STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "linear_attention: q, k and v must have one dtype");
    STD_TORCH_CHECK(k.size(0) == p.batch && v.size(0) == p.batch && v.size(1) == p.kv_heads &&
                        k.size(2) == p.tokens && v.size(2) == p.tokens && k.size(3) == p.key_channels &&
                        p.kv_heads > 0 && p.heads % p.kv_heads == 0,
                    "linear_attention: shapes of q, k and v do not fit");
    p.q = layout(q), p.k = layout(k), p.v = layout(v);
    if (gate_) set_gate(*gate_);
    if (cu_) check_offsets("linear_attention", "q", cu, p.batch, p.tokens);
    if (initial_) {
      STD_TORCH_CHECK(initial_->numel() == sequences() * state_size() * p.value_channels,
                      "linear_attention: initial_state is (sequences, heads, key and value channels)");
      initial = dense_parameter(*initial_, q);
      p.initial = initial->const_data_ptr();
    }
    if (initial_ && normalize) {
      STD_TORCH_CHECK(initial_norm_ && initial_norm_->numel() == sequences() * state_size(),
                      "linear_attention: the normaliser's state is (sequences, heads, key channels)");
      initial_norm = dense_parameter(*initial_norm_, q);
      p.initial_norm = initial_norm->const_data_ptr();
    }
    (void)causal;
    p.scale = scale, p.normalized = normalize, p.eps = eps;
    p.threads = threads();
    for (int64_t s = 0; s < sequences(); ++s) {
      const bool packed = !cu.empty();
      runs.add(
          {packed ? 0 : s, packed ? cu[s] : 0, packed ? cu[s + 1] : p.tokens, initial_ ? s : -1, s});
    }
    p.runs = runs.table();
  }

  /// How many states there are.
  int64_t sequences() const { return cu.empty() ? params.batch : int64_t(cu.size()) - 1; }
  int64_t state_size() const { return params.heads * params.key_channels; }

 private:
  void set_gate(const Tensor& x) {
    LinearAttentionParams& p = params;
    gate = x.dim() == 4 ? with_unit_last_stride(x) : x;
    p.kind = x.dim() == 4 ? Gate::kChannel : Gate::kToken;
    p.gate = {const_cast<void*>(gate->data_ptr()), dtype_of(x, "linear_attention: gate"),
              gate->stride(0), gate->stride(2), gate->stride(1)};
    STD_TORCH_CHECK((p.gate.dtype == Dtype::kDouble) == (p.dtype == Dtype::kDouble),
                    "linear_attention: gate must have q's dtype or float32");
    STD_TORCH_CHECK((x.dim() == 3 || x.dim() == 4) && x.size(0) == p.batch && x.size(1) == p.heads &&
                        x.size(2) == p.tokens && (x.dim() == 3 || x.size(3) == p.key_channels),
                    "linear_attention: gate is (batch, heads, tokens) and maybe key channels here");
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor q, Tensor k, Tensor v, OptionalTensor gate, OptionalTensor initial_state,
    OptionalTensor initial_norm, OptionalTensor cu_seqlens, bool causal, double scale, bool normalize,
    double eps, bool return_final_state, bool keep) {
  Arguments a(q, k, v, gate, initial_state, initial_norm, cu_seqlens, causal, scale, normalize, eps);
  LinearAttentionParams& p = a.params;
  const ScalarType sums = sum_type(q);
  const auto wanted = [&](bool is, std::initializer_list<int64_t> shape) {
    return is ? empty_of(q, shape, sums) : empty_of(q, {0}, sums);
  };
  Tensor out = empty_heads(q, p.value_channels);
  Tensor last = wanted(return_final_state, {a.sequences(), p.heads, p.key_channels, p.value_channels});
  Tensor last_norm = wanted(return_final_state && normalize, {a.sequences(), p.heads, p.key_channels});
  Tensor denominators = wanted(keep && normalize, {p.batch, p.heads, p.tokens});
  const int64_t most = most_boundaries(p.batch, p.tokens);
  Tensor boundaries =
      wanted(keep, {most, p.heads, p.key_channels * (p.value_channels + (normalize ? 1 : 0))});
  p.out = layout(out);
  p.last = last.data_ptr(), p.last_norm = last_norm.data_ptr();
  if (!return_final_state) {
    for (Run& run : a.runs.runs) run.last = -1;
  }
  if (keep && normalize) p.denominators = denominators.data_ptr();
  if (keep) {
    if (p.runs.boundary_count < most) torch::stable::fill_(boundaries, 0.0);
    p.boundaries = boundaries.data_ptr();
  }
  kernels().linear_attention_forward(p);
  return {out, last, last_norm, denominators, boundaries};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) { m.impl("linear_attention_forward", TORCH_BOX(&forward)); }

}  // namespace longspan::binding
