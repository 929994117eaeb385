// RMS normalisation with a gate: torch's tensors in, kernels/norm.h's structs out.
#include "kernels/norm.h"

#include "kernels/table.h"
#include "torch/tensors.h"

namespace longspan::binding {
namespace {

NormRows rows(const Tensor& x) { return {const_cast<void*>(x.data_ptr()), x.stride(0)}; }

/// What forward and backward share, and what must outlive the kernel's call.
struct Arguments {
  NormParams params;
  Tensor x, weight;
  OptionalTensor bias, z;

  Arguments(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_,
            const OptionalTensor& z_, double eps, int64_t group_size, bool norm_before_gate)
      : x(with_unit_last_stride(x_)), weight(dense_parameter(weight_, x_)) {
    NormParams& p = params;
    STD_TORCH_CHECK(
        x.dim() == 2 && weight.numel() == x.size(1) && group_size > 0 && x.size(1) % group_size == 0,
        "rms_norm_gated: shapes of x and weight do not fit");
    p.dtype = dtype_of(x, "rms_norm_gated: x");
    p.rows = x.size(0), p.channels = x.size(1), p.group = group_size;
    p.x = rows(x);
    p.weight = weight.const_data_ptr();
    if (bias_) {
      STD_TORCH_CHECK(bias_->numel() == p.channels, "rms_norm_gated: bias is (channels,)");
      bias = dense_parameter(*bias_, x);
      p.bias = bias->const_data_ptr();
    }
    if (z_) {
      STD_TORCH_CHECK(z_->dim() == 2 && z_->size(0) == p.rows && z_->size(1) == p.channels &&
                          z_->scalar_type() == x.scalar_type(),
                      "rms_norm_gated: z is as x");
      z = with_unit_last_stride(*z_);
      p.z = rows(*z);
    }
    p.eps = eps;
    p.norm_before_gate = norm_before_gate;
    p.threads = threads();
  }
};

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor z,
                                   double eps, int64_t group_size, bool norm_before_gate) {
  Arguments a(x, weight, bias, z, eps, group_size, norm_before_gate);
  Tensor out = empty_of(x, {x.size(0), x.size(1)});
  Tensor rstd = empty_of(x, {x.size(0), x.size(1) / group_size}, sum_type(x));
  a.params.out = rows(out);
  a.params.rstd = rstd.data_ptr();
  kernels().norm_gated_forward(a.params);
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor d_out_, Tensor x, Tensor weight,
                                                    OptionalTensor bias, OptionalTensor z, Tensor rstd_,
                                                    double eps, int64_t group_size,
                                                    bool norm_before_gate) {
  Arguments a(x, weight, bias, z, eps, group_size, norm_before_gate);
  const Tensor d_out = with_unit_last_stride(d_out_), rstd = torch::stable::contiguous(rstd_);
  Tensor dx = empty_of(x, {x.size(0), x.size(1)});
  Tensor dz = z ? empty_of(x, {x.size(0), x.size(1)}) : empty_of(x, {0});
  Tensor d_weight = empty_of(x, {x.size(1)}, sum_type(x));
  Tensor d_bias = empty_of(x, {bias ? x.size(1) : 0}, sum_type(x));
  a.params.rstd = const_cast<void*>(rstd.data_ptr());
  NormGradients g;
  g.d_out = rows(d_out), g.dx = rows(dx);
  if (z) g.dz = rows(dz);
  g.d_weight = d_weight.data_ptr();
  if (bias) g.d_bias = d_bias.data_ptr();
  kernels().norm_gated_backward(a.params, g);
  return {dx, d_weight, d_bias, dz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("rms_norm_gated_forward", TORCH_BOX(&forward));
  m.impl("rms_norm_gated_backward", TORCH_BOX(&backward));
}

}  // namespace longspan::binding
