// Merging parts of attention: torch's tensors in, kernels/merge.h's structs out.
#include "kernels/merge.h"

#include "kernels/table.h"
#include "torch/attention_arguments.h"

namespace longspan::binding {
namespace {

/// What both directions share, and what must outlive the kernel's call.
struct Arguments {
  MergeParams params;
  Tensor own, own_lse, parts, parts_lse, place;

  Arguments(const Tensor& own_, const Tensor& own_lse_, const Tensor& parts_, const Tensor& parts_lse_,
            const Tensor& place_)
      : own(with_unit_last_stride(own_)), own_lse(torch::stable::contiguous(own_lse_)),
        parts(torch::stable::contiguous(parts_)), parts_lse(torch::stable::contiguous(parts_lse_)),
        place(torch::stable::contiguous(place_)) {
    STD_TORCH_CHECK(own.dim() == 4 && parts.dim() == 2 && place.dim() == 2,
                    "merge_parts: own, parts and place have 4, 2 and 2 dimensions");
    MergeParams& p = params;
    p.dtype = dtype_of(own, "merge_parts: own");
    p.batch = own.size(0), p.heads = own.size(1), p.tokens = own.size(2), p.channels = own.size(3);
    p.count = place.size(0), p.threads = threads();
    const int64_t places = parts.size(0);
    STD_TORCH_CHECK(parts.scalar_type() == own.scalar_type() && own_lse.scalar_type() == sum_type(own) &&
                        parts_lse.scalar_type() == sum_type(own) &&
                        place.scalar_type() == ScalarType::Long,
                    "merge_parts: a tensor has the wrong dtype");
    STD_TORCH_CHECK(own_lse.numel() == p.batch * p.heads * p.tokens && parts.size(1) == p.channels &&
                        parts_lse.numel() == places && place.size(1) == own_lse.numel() &&
                        place.numel() == places,
                    "merge_parts: shapes do not fit");
    p.own = heads(own);
    p.own_lse = own_lse.const_data_ptr(), p.parts = parts.const_data_ptr();
    p.parts_lse = parts_lse.const_data_ptr();
    p.place = static_cast<const int64_t*>(place.const_data_ptr());
    std::vector<bool> taken(size_t(places), false);
    for (int64_t i = 0; i < places; ++i) {
      const int64_t at = p.place[i];
      STD_TORCH_CHECK(at >= 0 && at < places && !taken[size_t(at)],
                      "merge_parts: place is a permutation of the parts");
      taken[size_t(at)] = true;
    }
  }
};

Tensor forward(Tensor own, Tensor own_lse, Tensor parts, Tensor parts_lse, Tensor place) {
  Arguments a(own, own_lse, parts, parts_lse, place);
  Tensor out = empty_heads(own, own.size(3));
  a.params.out = heads(out);
  kernels().merge_forward(a.params);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor d_out, Tensor own, Tensor own_lse,
                                                    Tensor parts, Tensor parts_lse, Tensor place) {
  Arguments a(own, own_lse, parts, parts_lse, place);
  const Tensor rows = with_unit_last_stride(d_out);
  Tensor d_own = empty_heads(own, own.size(3));
  Tensor d_own_lse = empty_of(own, {own.size(0), own.size(1), own.size(2)}, sum_type(own));
  Tensor d_parts = empty_of(own, {parts.size(0), parts.size(1)});
  Tensor d_parts_lse = empty_of(own, {parts.size(0)}, sum_type(own));
  MergeGradients g;
  g.d_out = heads(rows), g.d_own = heads(d_own);
  g.d_own_lse = d_own_lse.data_ptr(), g.d_parts = d_parts.data_ptr();
  g.d_parts_lse = d_parts_lse.data_ptr();
  kernels().merge_backward(a.params, g);
  return {d_own, d_own_lse, d_parts, d_parts_lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("merge_parts", TORCH_BOX(&forward));
  m.impl("merge_parts_backward", TORCH_BOX(&backward));
}

}  // namespace longspan::binding
