// Torch's tensors, as the kernels want them: pointers, strides, dtypes.
//
// Arguments were checked in Python, where a wrong one is named (ops/_checks.py); what stands here
// only keeps a direct call of torch.ops.longspan from reading memory that is not there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "kernels/dtype.h"
#include "kernels/scratch.h"

namespace longspan::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
}

/// The tensor itself if its last dimension has stride 1, else a contiguous copy.
inline Tensor with_unit_last_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) <= 1 || x.stride(last) == 1) return x;
  return torch::stable::contiguous(x);
}

inline Tensor empty_of(const Tensor& like, std::initializer_list<int64_t> shape,
                       std::optional<ScalarType> dtype = std::nullopt) {
  Tensor x = torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
  prefer_huge_pages(x.mutable_data_ptr(), size_t(x.numel()) * x.element_size());
  return x;
}

/// Empty, (B, H, T, D), with tokens outside heads in memory where `like` has them so: a caller who
/// transposed (B, T, H, D) gets back what transposes to a contiguous tensor. The fakes do the same.
inline Tensor empty_heads(const Tensor& like, int64_t channels) {
  const int64_t b = like.size(0), h = like.size(1), t = like.size(2);
  if (like.stride(1) < like.stride(2)) {
    return torch::stable::transpose(empty_of(like, {b, t, h, channels}), 1, 2);
  }
  return empty_of(like, {b, h, t, channels});
}

/// A small tensor's values, converted and copied.
template <class T>
std::vector<T> values_of(const Tensor& x, ScalarType as) {
  const bool ready = x.scalar_type() == as && x.is_contiguous();  // most are: no calls then
  const Tensor dense = ready ? x : torch::stable::contiguous(torch::stable::to(x, as));
  const T* p = static_cast<const T*>(dense.const_data_ptr());
  return std::vector<T>(p, p + dense.numel());
}

inline std::vector<int64_t> integers_of(const OptionalTensor& x) {
  return x ? values_of<int64_t>(*x, ScalarType::Long) : std::vector<int64_t>();
}

inline const int64_t* data_or_null(const std::vector<int64_t>& x) {
  return x.empty() ? nullptr : x.data();
}

/// What kernels accumulate in: double for double, else float.
inline ScalarType sum_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// Dense and of the accumulation's type: for parameters, which are small.
inline Tensor dense_parameter(const Tensor& x, const Tensor& like) {
  return torch::stable::contiguous(torch::stable::to(x, sum_type(like)));
}

inline int threads() { return int(torch::stable::get_num_threads()); }

}  // namespace longspan::binding
