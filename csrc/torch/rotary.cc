// Rotary position embedding: torch's tensors in, kernels/rotary.h's structs out.
#include "kernels/rotary.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "kernels/table.h"
#include "torch/tensors.h"

namespace longspan::binding {
namespace {

RotaryHeads heads(const Tensor& x) {
  return {const_cast<void*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

RotaryTable table(const Tensor& x) {
  const bool batched = x.dim() == 3;
  return {x.const_data_ptr(), batched && x.size(0) > 1 ? x.stride(0) : 0, x.stride(batched ? 1 : 0)};
}

/// What both operators share, and what must outlive the kernel's call; the outputs are theirs to set.
struct Arguments {
  RotaryParams params;
  Tensor cos, sin;
  std::vector<int64_t> positions;

  Arguments(const Tensor& q, const OptionalTensor& k, const Tensor& cos_, const Tensor& sin_,
            const OptionalTensor& positions_, const OptionalTensor& cu_seqlens, bool interleaved,
            bool inverse)
      : cos(with_unit_last_stride(cos_)), sin(with_unit_last_stride(sin_)),
        positions(integers_of(positions_)) {
    RotaryParams& p = params;
    STD_TORCH_CHECK(q.dim() == 4, "apply_rotary: q has 4 dimensions here");
    p.dtype = dtype_of(q, "apply_rotary: q");
    p.table_dtype = dtype_of(cos, "apply_rotary: cos");
    p.batch = q.size(0), p.q_heads = q.size(1), p.tokens = q.size(2), p.channels = q.size(3);
    if (k) {
      p.k_heads = k->size(1);
      STD_TORCH_CHECK(k->dim() == 4 && k->size(0) == p.batch && k->size(2) == p.tokens &&
                          k->size(3) == p.channels && k->scalar_type() == q.scalar_type(),
                      "apply_rotary: k is as q but for its heads");
    }
    const bool doubles = p.dtype == Dtype::kDouble;
    STD_TORCH_CHECK(
        cos.scalar_type() == sin.scalar_type() && doubles == (p.table_dtype == Dtype::kDouble),
        "apply_rotary: cos and sin have one dtype, float64 with float64 and only then");
    const int64_t dims = cos.dim();
    STD_TORCH_CHECK((dims == 2 || dims == 3) && sin.dim() == dims,
                    "apply_rotary: cos and sin have 2 or 3 dimensions");
    for (int64_t i = 0; i < dims; ++i) {
      STD_TORCH_CHECK(cos.size(i) == sin.size(i), "apply_rotary: cos and sin have one shape");
    }
    p.rotary_channels = cos.size(dims - 1);
    STD_TORCH_CHECK(p.rotary_channels % 2 == 0 && p.rotary_channels <= p.channels,
                    "apply_rotary: cos has an even number of channels, at most q's");
    STD_TORCH_CHECK(dims == 2 || cos.size(0) == 1 || cos.size(0) == p.batch,
                    "apply_rotary: cos has q's batch or 1");
    p.cos = table(cos), p.sin = table(sin);
    p.interleaved = interleaved, p.inverse = inverse;
    p.threads = threads();
    if (cu_seqlens) {
      STD_TORCH_CHECK(p.batch == 1 && !positions_, "apply_rotary: packed sequences are one batch");
      count_from_starts(integers_of(cu_seqlens));
    }
    const int64_t count = int64_t(positions.size()), rows = cos.size(dims - 2);
    int64_t greatest = p.tokens - 1;
    if (positions_ || cu_seqlens) {
      STD_TORCH_CHECK(dims == 2 && (count == p.tokens || count == p.batch * p.tokens),
                      "apply_rotary: positions are (tokens,) or (batch, tokens), cos (positions, R)");
      p.positions = positions.data();
      p.positions_batch = count == p.tokens ? 0 : p.tokens;
      greatest = -1;
      for (int64_t at : positions) {
        STD_TORCH_CHECK(at >= 0 && at < rows, "apply_rotary: ",
                        cu_seqlens ? "cu_seqlens: expected sequences of at most "
                                   : "positions: expected positions from 0 up to below ",
                        rows, ", the rows of cos, got ", cu_seqlens ? at + 1 : at,
                        cu_seqlens ? " tokens or more" : "");
        greatest = at > greatest ? at : greatest;
      }
    } else {
      STD_TORCH_CHECK(rows == p.tokens, "apply_rotary: cos has a row a token");
    }
    if (greatest >= 0 && p.rotary_channels > 0) check_halves(greatest);
  }

 private:
  void count_from_starts(const std::vector<int64_t>& cu) {
    const int64_t total = params.tokens;
    STD_TORCH_CHECK(cu.size() >= 2 && cu.front() == 0 && cu.back() == total,
                    "apply_rotary: cu_seqlens: expected entries from 0 to the ", total, " rows, got ",
                    cu.empty() ? -1 : cu.front(), " to ", cu.empty() ? -1 : cu.back());
    positions.resize(size_t(total));
    for (size_t i = 1; i < cu.size(); ++i) {
      STD_TORCH_CHECK(cu[i] >= cu[i - 1] && cu[i] <= total,
                      "apply_rotary: cu_seqlens: expected no decrease, got ", cu[i - 1], " before ",
                      cu[i]);
      for (int64_t t = cu[i - 1]; t < cu[i]; ++t) positions[size_t(t)] = t - cu[i - 1];
    }
  }

  /// Tables with neighbours repeated, as some models have them, would silently turn by wrong angles:
  /// one row tells. The halves may differ by roundings, of compiled code with a scalar tail.
  void check_halves(int64_t row) const {
    const int64_t width = params.rotary_channels, half = width / 2;
    for (int64_t b = 0; b < (params.cos.batch ? params.batch : 1); ++b) {
      const int64_t at = b * params.cos.batch + row * params.cos.row;
      for (int64_t c = 0; c < half; ++c) {
        const double one = number(at + c), other = number(at + c + half);
        STD_TORCH_CHECK(!(one - other > 1e-3 || one - other < -1e-3),
                        "apply_rotary: cos: expected the angles of the pairs twice, one half after the "
                        "other (also where interleaved), got ",
                        one, " in channel ", c, " and ", other, " in channel ", c + half, " of row ",
                        row);
      }
    }
  }

  double number(int64_t at) const {
    const void* p = params.cos.data;
    switch (params.table_dtype) {
      case Dtype::kFloat:
        return static_cast<const float*>(p)[at];
      case Dtype::kDouble:
        return static_cast<const double*>(p)[at];
      case Dtype::kBfloat16:
        return float(static_cast<const torch::headeronly::BFloat16*>(p)[at]);
      case Dtype::kHalf:
        return float(static_cast<const torch::headeronly::Half*>(p)[at]);
    }
    return 0;
  }
};

std::tuple<Tensor, Tensor> apply(Tensor q_, OptionalTensor k_, Tensor cos, Tensor sin,
                                 OptionalTensor positions, OptionalTensor cu_seqlens, bool interleaved,
                                 bool inverse) {
  const Tensor q = with_unit_last_stride(q_);
  const OptionalTensor k = k_ ? OptionalTensor(with_unit_last_stride(*k_)) : std::nullopt;
  Arguments a(q, k, cos, sin, positions, cu_seqlens, interleaved, inverse);
  Tensor q_out = empty_heads(q_, q.size(3));
  Tensor k_out = k ? empty_heads(*k_, k->size(3)) : empty_of(q, {0});
  a.params.q = heads(q), a.params.q_out = heads(q_out);
  if (k) a.params.k = heads(*k), a.params.k_out = heads(k_out);
  kernels().rotary_apply(a.params);
  return {q_out, k_out};
}

void apply_in_place(Tensor q, OptionalTensor k, Tensor cos, Tensor sin, OptionalTensor positions,
                    OptionalTensor cu_seqlens, bool interleaved) {
  Arguments a(q, k, cos, sin, positions, cu_seqlens, interleaved, false);
  STD_TORCH_CHECK(q.size(3) <= 1 || (q.stride(3) == 1 && (!k || k->stride(3) == 1)),
                  "apply_rotary: q and k have unit last strides where they are written in place");
  a.params.q = a.params.q_out = heads(q);
  if (k) a.params.k = a.params.k_out = heads(*k);
  kernels().rotary_apply(a.params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("apply_rotary", TORCH_BOX(&apply));
  m.impl("apply_rotary_", TORCH_BOX(&apply_in_place));
}

}  // namespace longspan::binding
