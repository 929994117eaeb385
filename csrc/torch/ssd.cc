// Mamba-2's scan: torch's tensors in, kernels/ssd.h's structs out, and sequences cut into runs.
#include "kernels/ssd.h"

#include "kernels/table.h"
#include "torch/runs.h"

namespace longspan::binding {
namespace {

/// (B, L, heads or groups, ...) or (B, L, H).
SequenceTensor layout(const Tensor& x) {
  return {const_cast<void*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

/// The arguments that forward and backward share, and what must outlive the kernel's call.
struct Arguments {
  SsdParams params;
  Tensor x, dt, b, c, a;
  OptionalTensor d, z, dt_bias, initial;
  std::vector<int64_t> cu;
  Runs runs;

  Arguments(const Tensor& x_, const Tensor& dt_, const Tensor& a_, const Tensor& b_, const Tensor& c_,
            const OptionalTensor& d_, const OptionalTensor& z_, const OptionalTensor& dt_bias_,
            const OptionalTensor& initial_, const OptionalTensor& seq_idx, const OptionalTensor& cu_,
            int64_t chunk_size, bool softplus, double dt_min, double dt_max)
      : x(with_unit_last_stride(x_)), dt(dt_), b(with_unit_last_stride(b_)),
        c(with_unit_last_stride(c_)), a(dense_parameter(a_, x_)), cu(integers_of(cu_)) {
    STD_TORCH_CHECK(x.dim() == 4 && dt.dim() == 3 && b.dim() == 4 && c.dim() == 4,
                    "ssd: expected x, B and C of 4 dimensions, dt of 3");
    SsdParams& p = params;
    p.dtype = dtype_of(x, "ssd: x"), p.dt_dtype = dtype_of(dt, "ssd: dt");
    p.batch = x.size(0), p.length = x.size(1), p.heads = x.size(2), p.channels = x.size(3);
    p.groups = b.size(2), p.states = b.size(3);
    STD_TORCH_CHECK(b.scalar_type() == x.scalar_type() && c.scalar_type() == x.scalar_type() &&
                        (p.dt_dtype == Dtype::kDouble) == (p.dtype == Dtype::kDouble),
                    "ssd: x, B and C must have one dtype, dt the same or float32");
    STD_TORCH_CHECK(dt.size(0) == p.batch && dt.size(1) == p.length && dt.size(2) == p.heads &&
                        b.size(0) == p.batch && b.size(1) == p.length && c.size(0) == p.batch &&
                        c.size(1) == p.length && c.size(2) == p.groups && c.size(3) == p.states &&
                        a.numel() == p.heads && p.groups > 0 && p.heads % p.groups == 0,
                    "ssd: shapes of x, dt, A, B and C do not fit");
    STD_TORCH_CHECK(chunk_size >= 16 && chunk_size <= kSpan && (chunk_size & (chunk_size - 1)) == 0,
                    "ssd: chunk_size is a power of two from 16 to ", kSpan);
    p.chunk = chunk_size;
    p.x = layout(x), p.dt = layout(dt), p.b = layout(b), p.c = layout(c);
    p.a = a.const_data_ptr();
    if (d_) {
      STD_TORCH_CHECK(d_->numel() == p.heads * p.channels, "ssd: D is (heads, channels) here");
      d = dense_parameter(*d_, x);
      p.d = d->const_data_ptr();
    }
    if (z_) {
      STD_TORCH_CHECK(z_->dim() == 4 && z_->numel() == x.numel() && z_->size(3) == p.channels &&
                          z_->size(1) == p.length && z_->size(2) == p.heads &&
                          z_->scalar_type() == x.scalar_type(),
                      "ssd: z is as x");
      z = with_unit_last_stride(*z_);
      p.z = layout(*z);
    }
    if (dt_bias_) {
      STD_TORCH_CHECK(dt_bias_->numel() == p.heads, "ssd: dt_bias is (heads,)");
      dt_bias = dense_parameter(*dt_bias_, x);
      p.dt_bias = dt_bias->const_data_ptr();
    }
    if (cu_) {
      check_offsets("ssd", "x", cu, p.batch, p.length);
      p.packed = sequences();
    }
    if (initial_) {
      STD_TORCH_CHECK(initial_->numel() == sequences() * p.heads * p.channels * p.states,
                      "ssd: initial_states is (sequences, heads, channels, states)");
      initial = dense_parameter(*initial_, x);
      p.initial = initial->const_data_ptr();
    }
    p.softplus = softplus, p.dt_min = dt_min, p.dt_max = dt_max;
    p.threads = threads();
    cut(seq_idx);
  }

  /// How many initial states there are.
  int64_t sequences() const { return cu.empty() ? params.batch : int64_t(cu.size()) - 1; }

 private:
  /// Runs: each batch row, or each packed sequence, cut where seq_idx changes.
  void cut(const OptionalTensor& seq_idx) {
    SsdParams& p = params;
    std::vector<int64_t> index = integers_of(seq_idx);
    STD_TORCH_CHECK(!seq_idx || int64_t(index.size()) == p.batch * p.length,
                    "ssd: seq_idx is (batch, length)");
    for (int64_t s = 0; s < sequences(); ++s) {
      const int64_t row = cu.empty() ? s : 0;
      const int64_t begin = cu.empty() ? 0 : cu[s], end = cu.empty() ? p.length : cu[s + 1];
      int64_t from = begin;
      for (int64_t t = begin + 1; t < end && seq_idx; ++t) {
        if (index[row * p.length + t] == index[row * p.length + t - 1]) continue;
        runs.add({row, from, t, from == begin && initial ? s : -1, -1});
        from = t;
      }
      runs.add({row, from, end, from == begin && initial ? s : -1, s});
    }
    p.runs = runs.table();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Tensor dt, Tensor a_, Tensor b, Tensor c,
                                                   OptionalTensor d, OptionalTensor z,
                                                   OptionalTensor dt_bias, OptionalTensor initial,
                                                   OptionalTensor seq_idx, OptionalTensor cu_seqlens,
                                                   int64_t chunk_size, bool softplus, double dt_min,
                                                   double dt_max, bool return_final_states,
                                                   bool return_varlen_states, bool keep_boundaries) {
  Arguments a(x, dt, a_, b, c, d, z, dt_bias, initial, seq_idx, cu_seqlens, chunk_size, softplus, dt_min,
              dt_max);
  SsdParams& p = a.params;
  const ScalarType sums = sum_type(x);
  const auto states = [&](bool wanted, int64_t count) {
    return wanted ? empty_of(x, {count, p.heads, p.channels, p.states}, sums) : empty_of(x, {0}, sums);
  };
  Tensor out = empty_of(x, {p.batch, p.length, p.heads, p.channels});
  Tensor final = states(return_final_states, p.batch);
  Tensor varlen = states(return_varlen_states, a.sequences());
  const int64_t most = most_boundaries(p.batch, p.length);
  Tensor boundaries = keep_boundaries ? empty_of(x, {most, p.heads, p.states, p.channels}, sums)
                                      : empty_of(x, {0}, sums);
  p.out = layout(out);
  if (return_final_states) p.final = final.data_ptr();
  if (return_varlen_states && a.cu.size() > 0) p.sequence_states = varlen.data_ptr();
  if (keep_boundaries) {
    clear_unused(boundaries, p.runs.boundary_count);
    p.boundaries = boundaries.data_ptr();
  }
  kernels().ssd_forward(p);
  return {out, final, varlen, boundaries};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor d_out_, OptionalTensor d_final, OptionalTensor d_varlen, Tensor boundaries_, Tensor x,
    Tensor dt, Tensor a_, Tensor b, Tensor c, OptionalTensor d, OptionalTensor z, OptionalTensor dt_bias,
    OptionalTensor initial, OptionalTensor seq_idx, OptionalTensor cu_seqlens, int64_t chunk_size,
    bool softplus, double dt_min, double dt_max) {
  Arguments a(x, dt, a_, b, c, d, z, dt_bias, initial, seq_idx, cu_seqlens, chunk_size, softplus, dt_min,
              dt_max);
  SsdParams& p = a.params;
  const Tensor d_out = with_unit_last_stride(d_out_),
               boundaries = torch::stable::contiguous(boundaries_);
  STD_TORCH_CHECK(boundaries.numel() >= p.runs.boundary_count * p.heads * p.states * p.channels,
                  "ssd: boundaries: expected what ssd_forward returned with keep_boundaries");
  p.boundaries = const_cast<void*>(boundaries.data_ptr());
  const ScalarType sums = sum_type(x);
  const auto like_x = [&] { return empty_of(x, {p.batch, p.length, p.heads, p.channels}); };
  const auto like_b = [&] { return empty_of(x, {p.batch, p.length, p.groups, p.states}); };
  Tensor dx = like_x(), db = like_b(), dc = like_b();
  Tensor ddt = empty_of(dt, {p.batch, p.length, p.heads});
  Tensor da = empty_of(x, {p.heads}, sums), d_bias = empty_of(x, {p.heads}, sums);
  Tensor dd = d ? empty_of(x, {p.heads, p.channels}, sums) : empty_of(x, {0}, sums);
  Tensor dz = z ? like_x() : empty_of(x, {0});
  Tensor d_initial = initial ? empty_of(x, {a.sequences(), p.heads, p.channels, p.states}, sums)
                             : empty_of(x, {0}, sums);
  OptionalTensor d_final_dense, d_varlen_dense;
  SsdGradients g;
  if (d_final) {
    d_final_dense = dense_parameter(*d_final, x);
    g.d_final = d_final_dense->const_data_ptr();
  }
  if (d_varlen) {
    d_varlen_dense = dense_parameter(*d_varlen, x);
    g.d_sequence_states = d_varlen_dense->const_data_ptr();
  }
  g.d_out = layout(d_out), g.dx = layout(dx), g.ddt = layout(ddt), g.db = layout(db), g.dc = layout(dc);
  if (z) g.dz = layout(dz);
  if (initial) g.d_initial = d_initial.data_ptr();
  if (d) g.dd = dd.data_ptr();
  g.da = da.data_ptr(), g.d_bias = d_bias.data_ptr();
  kernels().ssd_backward(p, g);
  return {dx, ddt, da, db, dc, dd, dz, d_bias, d_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("ssd_forward", TORCH_BOX(&forward));
  m.impl("ssd_backward", TORCH_BOX(&backward));
}

}  // namespace longspan::binding
