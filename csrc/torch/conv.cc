// Causal depthwise convolution: torch's tensors in, kernels/conv.h's structs out.
#include "kernels/conv.h"

#include <algorithm>

#include "kernels/table.h"
#include "torch/tensors.h"

namespace longspan::binding {
namespace {

ConvTensor layout(const Tensor& x) {
  return {const_cast<void*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

/// Whether channels, rather than time, have stride 1; ops/conv.py's fake asks the same.
bool channels_last(const Tensor& x) { return x.stride(1) == 1 && x.stride(2) != 1 && x.size(2) > 1; }

/// (B, C, L) with a unit stride, copied only where there is none.
Tensor with_unit_stride(const Tensor& x) {
  if (channels_last(x) || x.stride(2) == 1 || x.size(2) <= 1) return x;
  return torch::stable::contiguous(x);
}

Tensor empty_as(const Tensor& x) {
  if (channels_last(x)) {
    return torch::stable::transpose(empty_of(x, {x.size(0), x.size(2), x.size(1)}), 1, 2);
  }
  return empty_of(x, {x.size(0), x.size(1), x.size(2)});
}

/// The arguments that forward, backward and update share, and what must outlive the kernel's call.
struct Arguments {
  ConvParams params;
  Tensor x, weight;
  OptionalTensor bias, initial, sequences;

  Arguments(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, bool silu)
      : x(with_unit_stride(x_)), weight(dense_parameter(weight_, x_)) {
    STD_TORCH_CHECK(
        x.dim() == 3 && weight.dim() == 2 && weight.size(0) == x.size(1) && weight.size(1) >= 1,
        "causal_conv1d: shapes of x and weight do not fit");
    ConvParams& p = params;
    p.dtype = dtype_of(x, "causal_conv1d: x");
    p.batch = x.size(0), p.channels = x.size(1), p.length = x.size(2), p.width = weight.size(1);
    p.x = layout(x);
    p.weight = weight.const_data_ptr();
    if (bias_) {
      STD_TORCH_CHECK(bias_->numel() == p.channels, "causal_conv1d: bias is (channels,)");
      bias = dense_parameter(*bias_, x);
      p.bias = bias->const_data_ptr();
    }
    p.silu = silu;
    p.threads = threads();
  }

  void set_past(const OptionalTensor& initial_, const OptionalTensor& sequences_) {
    if (initial_) {
      STD_TORCH_CHECK(initial_->numel() == params.batch * params.channels * (params.width - 1) &&
                          initial_->scalar_type() == x.scalar_type(),
                      "causal_conv1d: initial_state is (batch, channels, width - 1), of x's dtype");
      initial = torch::stable::contiguous(*initial_);
      params.initial = initial->const_data_ptr();
    }
    if (sequences_) {
      STD_TORCH_CHECK(sequences_->numel() == params.batch * params.length,
                      "causal_conv1d: seq_idx is (batch, length)");
      sequences = torch::stable::contiguous(torch::stable::to(*sequences_, ScalarType::Int));
      params.seq_idx = static_cast<const int32_t*>(sequences->const_data_ptr());
    }
  }
};

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor initial,
                                   OptionalTensor seq_idx, bool silu, bool return_final_state) {
  Arguments a(x, weight, bias, silu);
  a.set_past(initial, seq_idx);
  ConvParams& p = a.params;
  Tensor out = empty_as(x);
  Tensor final = return_final_state ? empty_of(x, {p.batch, p.channels, p.width - 1}) : empty_of(x, {0});
  // x may have been copied where it has no unit stride; out has x's order of dimensions either way.
  p.out = layout(out);
  if (return_final_state) p.final = final.data_ptr();
  kernels().conv_forward(p);
  return {out, final};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor d_out_, OptionalTensor d_final, Tensor x,
                                                    Tensor weight, OptionalTensor bias,
                                                    OptionalTensor initial, OptionalTensor seq_idx,
                                                    bool silu) {
  Arguments a(x, weight, bias, silu);
  a.set_past(initial, seq_idx);
  const ConvParams& p = a.params;
  Tensor dx = empty_as(x);
  Tensor d_out = d_out_;
  // The kernel reads d_out the way x lies.
  if (channels_last(x) ? d_out.stride(1) != 1 : d_out.stride(2) != 1) {
    d_out = empty_as(x);
    torch::stable::copy_(d_out, d_out_);
  }
  Tensor d_weight = empty_of(x, {p.channels, p.width}, sum_type(x));
  Tensor d_bias = empty_of(x, {bias ? p.channels : 0}, sum_type(x));
  Tensor d_initial = initial ? empty_of(x, {p.batch, p.channels, p.width - 1}) : empty_of(x, {0});
  ConvGradients g;
  g.d_out = layout(d_out), g.dx = layout(dx);
  g.d_weight = d_weight.data_ptr();
  if (bias) g.d_bias = d_bias.data_ptr();
  if (initial) g.d_initial = d_initial.data_ptr();
  OptionalTensor d_final_dense;
  if (d_final) {
    d_final_dense = torch::stable::contiguous(torch::stable::to(*d_final, x.scalar_type()));
    g.d_final = d_final_dense->const_data_ptr();
  }
  kernels().conv_backward(p, g);
  return {dx, d_weight, d_bias, d_initial};
}

Tensor update(Tensor x, Tensor conv_state, Tensor weight, OptionalTensor bias,
              OptionalTensor cache_seqlens, OptionalTensor conv_state_indices, bool silu) {
  Arguments a(x, weight, bias, silu);
  ConvParams& p = a.params;
  STD_TORCH_CHECK(
      conv_state.dim() == 3 && conv_state.size(1) == p.channels &&
          conv_state.size(2) >= std::max<int64_t>(p.width - 1, 1) &&
          conv_state.scalar_type() == x.scalar_type(),
      "causal_conv1d_update: conv_state is (rows, channels, at least width - 1), of x's dtype");
  const std::vector<int64_t> written = integers_of(cache_seqlens),
                             rows = integers_of(conv_state_indices);
  STD_TORCH_CHECK(
      (!cache_seqlens || int64_t(written.size()) == p.batch) &&
          (conv_state_indices ? int64_t(rows.size()) == p.batch : conv_state.size(0) == p.batch),
      "causal_conv1d_update: cache_seqlens and conv_state_indices are (batch,)");
  for (size_t b = 0; b < rows.size(); ++b) {
    STD_TORCH_CHECK(rows[b] < conv_state.size(0), "causal_conv1d_update: conv_state_indices[", b,
                    "] is ", rows[b], ", expected a row of conv_state, below ", conv_state.size(0),
                    ", or a negative number for padding");
  }
  for (size_t b = 0; b < written.size(); ++b) {
    STD_TORCH_CHECK(written[b] >= 0, "causal_conv1d_update: cache_seqlens[", b, "] is ", written[b],
                    ", expected 0 or more");
  }
  Tensor out = empty_as(x);
  p.out = layout(out);
  ConvState s;
  s.state = layout(conv_state);
  s.slots = conv_state.size(2);
  s.written = data_or_null(written), s.rows = data_or_null(rows);
  kernels().conv_update(p, s);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&backward));
  m.impl("causal_conv1d_update", TORCH_BOX(&update));
}

}  // namespace longspan::binding
