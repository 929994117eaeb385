// FAVOR+'s features: torch's tensors in, kernels/favor.h's structs out.
#include "kernels/favor.h"

#include <cmath>

#include "kernels/table.h"
#include "torch/tensors.h"

namespace longspan::binding {
namespace {

void check_matrix(const Tensor& x, ScalarType type, const char* what) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == type, "favor: ", what,
                  ": expected a dense matrix of the dtype of sums");
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor directions_t, int64_t features, bool own_maximum,
                                   double eps) {
  check_matrix(x, sum_type(x), "x");
  check_matrix(directions_t, x.scalar_type(), "directions_t");
  STD_TORCH_CHECK(features > 0 && directions_t.size(0) == x.size(1) &&
                      directions_t.size(1) % kFavorPadding == 0 && directions_t.size(1) >= features &&
                      directions_t.size(1) - features < kFavorPadding,
                  "favor: directions_t is (channels, features rounded up to ", kFavorPadding, ")");
  Tensor y = empty_of(x, {x.size(0), features});
  Tensor top = empty_of(x, {x.size(0)});
  FavorParams p;
  p.sum = p.dtype = dtype_of(x, "favor: x");
  p.rows = x.size(0), p.channels = x.size(1), p.features = features;
  p.x = x.const_data_ptr(), p.directions = directions_t.const_data_ptr();
  p.y = y.mutable_data_ptr(), p.top = top.mutable_data_ptr();
  p.own_maximum = own_maximum, p.log_count = std::log(double(features)), p.eps = eps;
  p.threads = threads();
  kernels().favor_forward(p);
  return {y, top};
}

void exp_rows(Tensor y, Tensor offset, double eps) {
  check_matrix(y, sum_type(y), "y");
  STD_TORCH_CHECK(offset.dim() == 1 && offset.size(0) == y.size(0) && offset.is_contiguous() &&
                      offset.scalar_type() == y.scalar_type(),
                  "favor: offset: expected one of each row");
  FavorParams p;
  p.sum = p.dtype = dtype_of(y, "favor: y");
  p.rows = y.size(0), p.features = y.size(1);
  p.y = y.mutable_data_ptr(), p.top = const_cast<void*>(offset.const_data_ptr());
  p.log_count = std::log(double(p.features)), p.eps = eps;
  p.threads = threads();
  kernels().favor_exp_rows(p);
}

Tensor backward(Tensor d_y_, Tensor y_, Tensor x, Tensor directions, double eps) {
  const Tensor d_y = torch::stable::contiguous(d_y_), y = torch::stable::contiguous(y_);
  check_matrix(x, sum_type(x), "x");
  check_matrix(directions, x.scalar_type(), "directions");
  STD_TORCH_CHECK(d_y.dim() == 2 && y.dim() == 2 && d_y.size(0) == x.size(0) && y.size(0) == x.size(0) &&
                      d_y.size(1) == y.size(1) && d_y.scalar_type() == y.scalar_type() &&
                      sum_type(y) == x.scalar_type(),
                  "favor: d_y and y: expected of one shape and dtype, with x's rows");
  STD_TORCH_CHECK(directions.size(0) == y.size(1) && directions.size(1) % kFavorPadding == 0 &&
                      directions.size(1) >= x.size(1) && directions.size(1) - x.size(1) < kFavorPadding,
                  "favor: directions is (features, channels rounded up to ", kFavorPadding, ")");
  Tensor dx = empty_of(x, {x.size(0), x.size(1)});
  FavorParams p;
  p.sum = dtype_of(x, "favor: x");
  p.rows = x.size(0), p.channels = x.size(1), p.features = y.size(1);
  p.x = x.const_data_ptr(), p.directions = directions.const_data_ptr();
  p.dtype = dtype_of(y, "favor: y");
  p.y = const_cast<void*>(y.const_data_ptr()), p.d_y = d_y.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.eps = eps;
  p.threads = threads();
  kernels().favor_backward(p);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("favor_forward", TORCH_BOX(&forward));
  m.impl("favor_exp_rows", TORCH_BOX(&exp_rows));
  m.impl("favor_backward", TORCH_BOX(&backward));
}

}  // namespace longspan::binding
