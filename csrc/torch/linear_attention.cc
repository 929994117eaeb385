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
  Runs runs, key_runs;

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
                        k.size(2) == v.size(2) && (k.size(2) == p.tokens || !(causal || cu_)) &&
                        k.size(3) == p.key_channels && p.kv_heads > 0 && p.heads % p.kv_heads == 0,
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
    p.causal = causal, p.scale = scale, p.normalized = normalize, p.eps = eps;
    p.threads = threads();
    cut(runs, p.tokens);
    p.runs = runs.table();
    if (!causal) {
      STD_TORCH_CHECK(!gate_, "linear_attention: gate: expected none without causal");
      cut(key_runs, k.size(2));
      p.key_runs = key_runs.table();
    }
  }

  /// How many states there are.
  int64_t sequences() const { return cu.empty() ? params.batch : int64_t(cu.size()) - 1; }
  int64_t state_size() const { return params.heads * params.key_channels; }

  /// What is kept for the backward: how many states.
  int64_t boundaries() const {
    return params.causal ? most_boundaries(params.batch, params.tokens) : sequences();
  }

 private:
  void cut(Runs& to, int64_t tokens) const {
    for (int64_t s = 0; s < sequences(); ++s) {
      const int64_t initial_of = params.initial ? s : -1;
      if (cu.empty()) {
        to.add({s, 0, tokens, initial_of, s});
      } else {
        to.add({0, cu[s], cu[s + 1], initial_of, s});
      }
    }
  }

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
  const int64_t most = a.boundaries();
  Tensor boundaries =
      wanted(keep, {most, p.heads, p.key_channels * (p.value_channels + (normalize ? 1 : 0))});
  p.out = layout(out);
  p.last = last.data_ptr(), p.last_norm = last_norm.data_ptr();
  if (!return_final_state) {
    for (Runs* runs : {&a.runs, &a.key_runs}) {
      for (Run& run : runs->runs) run.last = -1;
    }
  }
  if (keep && normalize) p.denominators = denominators.data_ptr();
  if (keep) {
    if (causal) clear_unused(boundaries, p.runs.boundary_count);
    p.boundaries = boundaries.data_ptr();
  }
  kernels().linear_attention_forward(p);
  return {out, last, last_norm, denominators, boundaries};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor d_out_, OptionalTensor d_state, OptionalTensor d_norm, OptionalTensor out_,
    Tensor denominators_, Tensor boundaries_, Tensor q, Tensor k, Tensor v, OptionalTensor gate,
    OptionalTensor initial_state, OptionalTensor initial_norm, OptionalTensor cu_seqlens, bool causal,
    double scale, bool normalize, double eps) {
  Arguments a(q, k, v, gate, initial_state, initial_norm, cu_seqlens, causal, scale, normalize, eps);
  LinearAttentionParams& p = a.params;
  const ScalarType sums = sum_type(q);
  const Tensor d_out = with_unit_last_stride(d_out_);
  const Tensor boundaries = torch::stable::contiguous(boundaries_);
  const Tensor denominators = torch::stable::contiguous(denominators_);
  const int64_t boundary_size = p.heads * p.key_channels * (p.value_channels + (normalize ? 1 : 0));
  STD_TORCH_CHECK(boundaries.numel() >= a.boundaries() * boundary_size &&
                      denominators.numel() >= (normalize ? p.batch * p.heads * p.tokens : 0),
                  "linear_attention: expected what linear_attention_forward returned with keep");
  p.boundaries = const_cast<void*>(boundaries.data_ptr());
  p.denominators = const_cast<void*>(denominators.data_ptr());
  OptionalTensor out;
  if (normalize) {
    STD_TORCH_CHECK(out_ && out_->numel() == d_out.numel() && out_->dim() == 4,
                    "linear_attention: expected out beside normalize");
    out = with_unit_last_stride(*out_);
    p.out = layout(*out);
  }
  Tensor dq = empty_heads(q, p.key_channels), dk = empty_heads(k, p.key_channels),
         dv = empty_heads(v, p.value_channels), d_gate = empty_of(q, {0}, sums);
  const auto wanted = [&](const OptionalTensor& x, std::initializer_list<int64_t> shape) {
    return x ? empty_of(q, shape, sums) : empty_of(q, {0}, sums);
  };
  Tensor d_initial = wanted(initial_state, {a.sequences(), p.heads, p.key_channels, p.value_channels});
  Tensor d_initial_norm = wanted(initial_norm, {a.sequences(), p.heads, p.key_channels});
  LinearAttentionGradients g;
  g.d_out = layout(d_out), g.dq = layout(dq), g.dk = layout(dk), g.dv = layout(dv);
  if (p.kind == Gate::kChannel) {
    d_gate = empty_heads(*gate, p.key_channels);
    g.d_gate = {d_gate.data_ptr(), p.gate.dtype, d_gate.stride(0), d_gate.stride(2), d_gate.stride(1)};
  } else if (p.kind == Gate::kToken) {
    d_gate = empty_of(*gate, {p.batch, p.heads, p.tokens});
    g.d_gate = {d_gate.data_ptr(), p.gate.dtype, p.heads * p.tokens, 1, p.tokens};
  }
  OptionalTensor d_state_dense, d_norm_dense;
  if (d_state) {
    d_state_dense = dense_parameter(*d_state, q);
    g.d_last = d_state_dense->const_data_ptr();
  }
  if (d_norm) {
    d_norm_dense = dense_parameter(*d_norm, q);
    g.d_last_norm = d_norm_dense->const_data_ptr();
  }
  if (initial_state) g.d_initial = d_initial.data_ptr();
  if (initial_norm) g.d_initial_norm = d_initial_norm.data_ptr();
  kernels().linear_attention_backward(p, g);
  return {dq, dk, dv, d_gate, d_initial, d_initial_norm};
}

Tensor step(Tensor q_, Tensor k_, Tensor v_, Tensor state, OptionalTensor norm, OptionalTensor gate_,
            double scale, double eps) {
  const Tensor q = with_unit_last_stride(q_), k = with_unit_last_stride(k_),
               v = with_unit_last_stride(v_);
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && state.dim() == 4,
                  "linear_attention_step: expected q, k and v of 3 dimensions, state of 4");
  const auto layout_of = [](const Tensor& x) -> SequenceTensor {
    return {const_cast<void*>(x.data_ptr()), x.stride(0), 0, x.stride(1)};
  };
  LinearAttentionStep p;
  p.dtype = dtype_of(q, "linear_attention_step: q");
  p.batch = q.size(0), p.heads = q.size(1), p.kv_heads = k.size(1);
  p.key_channels = q.size(2), p.value_channels = v.size(2);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                      state.scalar_type() == sum_type(q) &&
                      (!norm || norm->scalar_type() == sum_type(q)),
                  "linear_attention_step: dtypes of q, k, v and state do not fit");
  STD_TORCH_CHECK(k.size(0) == p.batch && k.size(2) == p.key_channels && v.size(0) == p.batch &&
                      v.size(1) == p.kv_heads && p.kv_heads > 0 && p.heads % p.kv_heads == 0 &&
                      state.size(0) == p.batch && state.size(1) == p.heads &&
                      state.size(2) == p.key_channels && state.size(3) == p.value_channels &&
                      (p.value_channels < 2 || state.stride(3) == 1),
                  "linear_attention_step: shapes of q, k, v and state do not fit");
  p.q = layout_of(q), p.k = layout_of(k), p.v = layout_of(v);
  OptionalTensor gate;
  if (gate_) {
    gate = gate_->dim() == 3 ? with_unit_last_stride(*gate_) : *gate_;
    STD_TORCH_CHECK((gate->dim() == 2 || gate->dim() == 3) && gate->size(0) == p.batch &&
                        gate->size(1) == p.heads &&
                        (gate->dim() == 2 || gate->size(2) == p.key_channels),
                    "linear_attention_step: gate is (batch, heads) and maybe key channels here");
    p.kind = gate->dim() == 3 ? Gate::kChannel : Gate::kToken;
    p.gate = {const_cast<void*>(gate->data_ptr()), dtype_of(*gate, "linear_attention_step: gate"),
              gate->stride(0), 0, gate->stride(1)};
    STD_TORCH_CHECK((p.gate.dtype == Dtype::kDouble) == (p.dtype == Dtype::kDouble),
                    "linear_attention_step: gate must have q's dtype or float32");
  }
  p.state = state.data_ptr();
  p.state_batch = state.stride(0), p.state_head = state.stride(1), p.state_row = state.stride(2);
  if (norm) {
    STD_TORCH_CHECK(norm->dim() == 3 && norm->size(0) == p.batch && norm->size(1) == p.heads &&
                        norm->size(2) == p.key_channels && (p.key_channels < 2 || norm->stride(2) == 1),
                    "linear_attention_step: the normaliser's state is (batch, heads, key channels)");
    p.norm = norm->data_ptr(), p.norm_batch = norm->stride(0), p.norm_head = norm->stride(1);
  }
  Tensor out = empty_of(q, {p.batch, p.heads, p.value_channels});
  p.out = layout_of(out);
  p.scale = scale, p.eps = eps, p.threads = threads();
  kernels().linear_attention_step(p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&forward));
  m.impl("linear_attention_backward", TORCH_BOX(&backward));
  m.impl("linear_attention_step", TORCH_BOX(&step));
}

}  // namespace longspan::binding
