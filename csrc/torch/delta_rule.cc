// The delta rule: torch's tensors in, kernels/delta_rule.h's structs out.
#include "kernels/delta_rule.h"

#include "kernels/table.h"
#include "torch/runs.h"

namespace longspan::binding {
namespace {

/// (B, H, T, channels), or of one token (B, H, channels).
SequenceTensor layout(const Tensor& x) {
  return {const_cast<void*>(x.data_ptr()), x.stride(0), x.dim() == 4 ? x.stride(2) : 0, x.stride(1)};
}

/// A number a token: (B, H, T), or of one token (B, H).
GateTensor numbers(const Tensor& x, const char* name) {
  return {const_cast<void*>(x.data_ptr()), dtype_of(x, name), x.stride(0),
          x.dim() == 3 ? x.stride(2) : 0, x.stride(1)};
}

/// What every call checks and fills in: `tokens` (1 where there are none) and dimensions of q.
template <class Params>
void set_inputs(Params& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                const OptionalTensor& gate, int64_t dimensions) {
  STD_TORCH_CHECK(q.dim() == dimensions && k.dim() == dimensions && v.dim() == dimensions,
                  "delta_rule: expected q, k and v of ", dimensions, " dimensions");
  p.dtype = dtype_of(q, "delta_rule: q");
  p.batch = q.size(0), p.heads = q.size(1), p.value_heads = v.size(1);
  p.key_channels = q.size(dimensions - 1), p.value_channels = v.size(dimensions - 1);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "delta_rule: q, k and v must have one dtype");
  bool fits = k.size(0) == p.batch && k.size(1) == p.heads && k.size(dimensions - 1) == p.key_channels &&
              v.size(0) == p.batch && p.heads > 0 && p.value_heads % p.heads == 0;
  if (dimensions == 4) fits = fits && k.size(2) == q.size(2) && v.size(2) == q.size(2);
  STD_TORCH_CHECK(fits, "delta_rule: shapes of q, k and v do not fit");
  p.q = layout(q), p.k = layout(k), p.v = layout(v);
  const auto number_of_tokens = [&](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == dimensions - 1 && x.size(0) == p.batch && x.size(1) == p.value_heads &&
                        (dimensions == 3 || x.size(2) == q.size(2)),
                    "delta_rule: beta and gate have v's shape without channels");
    const GateTensor found = numbers(x, name);
    STD_TORCH_CHECK((found.dtype == Dtype::kDouble) == (p.dtype == Dtype::kDouble),
                    "delta_rule: beta and gate must have q's dtype or float32");
    return found;
  };
  p.beta = number_of_tokens(beta, "delta_rule: beta");
  if (gate) p.gate = number_of_tokens(*gate, "delta_rule: gate");
  p.threads = threads();
}

/// The arguments that forward and backward share, and what must outlive the kernel's call.
struct Arguments {
  DeltaRuleParams params;
  Tensor q, k, v, beta;
  OptionalTensor gate, initial;
  std::vector<int64_t> cu;
  Runs runs;

  Arguments(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& beta_,
            const OptionalTensor& gate_, const OptionalTensor& initial_, const OptionalTensor& cu_,
            double scale, bool keep_last)
      : q(with_unit_last_stride(q_)), k(with_unit_last_stride(k_)), v(with_unit_last_stride(v_)),
        beta(beta_), gate(gate_), cu(integers_of(cu_)) {
    DeltaRuleParams& p = params;
    set_inputs(p, q, k, v, beta, gate, 4);
    p.tokens = q.size(2), p.scale = scale;
    if (cu_) check_offsets("delta_rule", "q", cu, p.batch, p.tokens);
    if (initial_) {
      STD_TORCH_CHECK(
          initial_->numel() == sequences() * p.value_heads * p.key_channels * p.value_channels,
          "delta_rule: initial_state is (sequences, value heads, key and value channels)");
      initial = dense_parameter(*initial_, q);
      p.initial = initial->const_data_ptr();
    }
    for (int64_t s = 0; s < sequences(); ++s) {
      const int64_t initial_of = initial ? s : -1, last_of = keep_last ? s : -1;
      if (cu.empty()) {
        runs.add({s, 0, p.tokens, initial_of, last_of});
      } else {
        runs.add({0, cu[s], cu[s + 1], initial_of, last_of});
      }
    }
    p.runs = runs.table();
  }

  /// How many states there are.
  int64_t sequences() const { return cu.empty() ? params.batch : int64_t(cu.size()) - 1; }

  /// (count, value heads, key channels, value channels), or empty where not wanted.
  Tensor states(bool wanted, int64_t count) const {
    const DeltaRuleParams& p = params;
    if (!wanted) return empty_of(q, {0}, sum_type(q));
    return empty_of(q, {count, p.value_heads, p.key_channels, p.value_channels}, sum_type(q));
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor beta,
                                           OptionalTensor gate, OptionalTensor initial_state,
                                           OptionalTensor cu_seqlens, double scale,
                                           bool return_final_state, bool keep) {
  Arguments a(q, k, v, beta, gate, initial_state, cu_seqlens, scale, return_final_state);
  DeltaRuleParams& p = a.params;
  Tensor out = empty_heads(v, p.value_channels);
  Tensor last = a.states(return_final_state, a.sequences());
  Tensor boundaries = a.states(keep, most_boundaries(p.batch, p.tokens));
  p.out = layout(out), p.last = last.data_ptr();
  if (keep) {
    clear_unused(boundaries, p.runs.boundary_count);
    p.boundaries = boundaries.data_ptr();
  }
  kernels().delta_rule_forward(p);
  return {out, last, boundaries};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor d_out_, OptionalTensor d_state_, Tensor boundaries_, Tensor q, Tensor k, Tensor v,
    Tensor beta, OptionalTensor gate, OptionalTensor initial_state, OptionalTensor cu_seqlens,
    double scale) {
  Arguments a(q, k, v, beta, gate, initial_state, cu_seqlens, scale, d_state_.has_value());
  DeltaRuleParams& p = a.params;
  const Tensor d_out = with_unit_last_stride(d_out_);
  const Tensor boundaries = torch::stable::contiguous(boundaries_);
  STD_TORCH_CHECK(d_out.dim() == 4 && d_out.numel() == v.numel(), "delta_rule: d_out has out's shape");
  STD_TORCH_CHECK(
      boundaries.numel() >= p.runs.boundary_count * p.value_heads * p.key_channels * p.value_channels,
      "delta_rule: expected what delta_rule_forward returned with keep");
  p.boundaries = const_cast<void*>(boundaries.data_ptr());
  Tensor dq = empty_heads(q, p.key_channels), dk = empty_heads(k, p.key_channels),
         dv = empty_heads(v, p.value_channels);
  Tensor d_beta = empty_of(beta, {p.batch, p.value_heads, p.tokens});
  Tensor d_gate =
      gate ? empty_of(*gate, {p.batch, p.value_heads, p.tokens}) : empty_of(q, {0}, sum_type(q));
  Tensor d_initial = a.states(initial_state.has_value(), a.sequences());
  DeltaRuleGradients g;
  g.d_out = layout(d_out), g.dq = layout(dq), g.dk = layout(dk), g.dv = layout(dv);
  g.d_beta = numbers(d_beta, "delta_rule: d_beta");
  if (gate) g.d_gate = numbers(d_gate, "delta_rule: d_gate");
  OptionalTensor d_state;
  if (d_state_) {
    STD_TORCH_CHECK(
        d_state_->numel() == a.sequences() * p.value_heads * p.key_channels * p.value_channels,
        "delta_rule: d_state has the state's shape");
    d_state = dense_parameter(*d_state_, q);
    g.d_last = d_state->const_data_ptr();
  }
  if (initial_state) g.d_initial = d_initial.data_ptr();
  kernels().delta_rule_backward(p, g);
  return {dq, dk, dv, d_beta, d_gate, d_initial};
}

Tensor step(Tensor q_, Tensor k_, Tensor v_, Tensor beta, Tensor state, OptionalTensor gate,
            double scale) {
  const Tensor q = with_unit_last_stride(q_), k = with_unit_last_stride(k_),
               v = with_unit_last_stride(v_);
  DeltaRuleStep p;
  set_inputs(p, q, k, v, beta, gate, 3);
  STD_TORCH_CHECK(state.scalar_type() == sum_type(q) && state.dim() == 4 && state.size(0) == p.batch &&
                      state.size(1) == p.value_heads && state.size(2) == p.key_channels &&
                      state.size(3) == p.value_channels &&
                      (p.value_channels < 2 || state.stride(3) == 1),
                  "delta_rule_step: state is (batch, value heads, key channels, value channels) in the "
                  "type of accumulation, with a last stride of 1");
  Tensor out = empty_of(q, {p.batch, p.value_heads, p.value_channels});
  p.out = layout(out), p.scale = scale;
  p.state = state.data_ptr();
  p.state_batch = state.stride(0), p.state_head = state.stride(1), p.state_row = state.stride(2);
  kernels().delta_rule_step(p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("delta_rule_forward", TORCH_BOX(&forward));
  m.impl("delta_rule_backward", TORCH_BOX(&backward));
  m.impl("delta_rule_step", TORCH_BOX(&step));
}

}  // namespace longspan::binding
