// Mamba's scan: torch's tensors in, kernels/selective_scan.h's structs out.
#include "kernels/selective_scan.h"

#include "kernels/table.h"
#include "torch/tensors.h"

namespace longspan::binding {
namespace {

constexpr int64_t ScanTensor::* kBatch = &ScanTensor::batch;
constexpr int64_t ScanTensor::* kGroup = &ScanTensor::group;
constexpr int64_t ScanTensor::* kChannel = &ScanTensor::channel;
constexpr int64_t ScanTensor::* kState = &ScanTensor::state;
constexpr int64_t ScanTensor::* kTime = &ScanTensor::time;
constexpr int64_t ScanTensor::* kPart = &ScanTensor::part;
constexpr int64_t ScanTensor::* kHead = &ScanTensor::time;  // of a state update

/// Strides by the names of the dimensions; one more dimension is the part of a complex number.
ScanTensor layout(const Tensor& x, std::initializer_list<int64_t ScanTensor::*> names,
                  const char* what) {
  const int64_t dims = int64_t(names.size());
  STD_TORCH_CHECK(x.dim() == dims || (x.dim() == dims + 1 && x.size(dims) == 2), what, ": expected ",
                  dims, " dimensions, got ", x.dim());
  ScanTensor s;
  s.data = const_cast<void*>(x.data_ptr());
  s.dtype = dtype_of(x, what);
  int64_t i = 0;
  for (auto name : names) s.*name = x.stride(i++);
  if (x.dim() > dims) s.part = x.stride(dims);
  return s;
}

ScanTensor layout(const OptionalTensor& x, std::initializer_list<int64_t ScanTensor::*> names,
                  const char* what) {
  return x ? layout(*x, names, what) : ScanTensor{};
}

/// A new tensor with its dimensions in memory as `like` has them, where they are (B, D, L) with
/// channels inside time; the fakes do the same.
Tensor empty_scan(const Tensor& like, bool zero = false) {
  const int64_t b = like.size(0), d = like.size(1), l = like.size(2);
  Tensor x = like;
  if (like.stride(1) < like.stride(2)) {
    x = torch::stable::transpose(empty_of(like, {b, l, d}), 1, 2);
  } else {
    x = empty_of(like, {b, d, l});
  }
  if (zero) torch::stable::fill_(x, 0.0);
  return x;
}

ScalarType state_type(const Tensor& u) {
  return u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// What forward and backward share.
struct Arguments {
  SelectiveScanParams params;
  std::vector<int64_t> cu;
  bool whole = true;  ///< every step belongs to a sequence
  int64_t chunks = 0;

  Arguments(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
            const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& bias,
            const OptionalTensor& initial, const OptionalTensor& cu_, bool softplus)
      : cu(integers_of(cu_)) {
    SelectiveScanParams& p = params;
    STD_TORCH_CHECK(u.dim() == 3, "selective_scan: u is (batch, channels, steps)");
    p.in_double = u.scalar_type() == ScalarType::Double;
    p.batch = u.size(0), p.channels = u.size(1), p.steps = u.size(2), p.states = A.size(1);
    p.complex = A.dim() == 3;
    p.softplus = softplus;
    const int64_t parts = p.complex ? 1 : 0;
    p.b_varies = B.dim() - parts == 4, p.c_varies = C.dim() - parts == 4;
    p.groups = p.b_varies ? B.size(1) : p.c_varies ? C.size(1) : 1;
    STD_TORCH_CHECK(p.groups > 0 && p.channels % p.groups == 0,
                    "selective_scan: groups of B and C must divide the channels");
    if (!cu.empty()) {
      STD_TORCH_CHECK(p.batch == 1 && cu.size() >= 2 && cu.front() >= 0 && cu.back() <= p.steps,
                      "selective_scan: cu_seqlens must lie in 0 ... ", p.steps, ", with a batch of 1");
      for (size_t i = 1; i < cu.size(); ++i) {
        STD_TORCH_CHECK(cu[i] >= cu[i - 1], "selective_scan: cu_seqlens must not decrease");
      }
      whole = cu.front() == 0 && cu.back() == p.steps;
      p.cu = cu.data();
      p.batch = int64_t(cu.size()) - 1;
    }
    const int64_t chunk = scan_chunk(p.states);
    chunks =
        cu.empty() ? p.batch * ((p.steps + chunk - 1) / chunk) : (p.steps + chunk - 1) / chunk + p.batch;
    p.u = time_layout(u, u, "u"), p.delta = time_layout(delta, u, "delta");
    if (z) p.z = time_layout(*z, u, "z");
    p.A = state_layout(A, "A");
    p.B = coefficient(B, u, p.b_varies, "B"), p.C = coefficient(C, u, p.c_varies, "C");
    p.D = channel_layout(D, "D"), p.bias = channel_layout(bias, "delta_bias");
    if (initial) p.initial = sequence_layout(*initial, "initial_state");
    p.threads = threads();
  }

  ScanTensor time_layout(const Tensor& x, const Tensor& u, const char* what) const {
    STD_TORCH_CHECK(
        x.dim() == 3 && x.size(0) == u.size(0) && x.size(1) == u.size(1) && x.size(2) == u.size(2),
        "selective_scan: ", what, " must have u's shape");
    return checked(layout(x, {kBatch, kChannel, kTime}, what), what);
  }
  ScanTensor state_layout(const Tensor& x, const char* what) const {
    STD_TORCH_CHECK(x.dim() == (params.complex ? 3 : 2) && x.size(0) == params.channels &&
                        x.size(1) == params.states,
                    "selective_scan: ", what, " is (channels, states)");
    return checked(layout(x, {kChannel, kState}, what), what);
  }
  ScanTensor coefficient(const Tensor& x, const Tensor& u, bool varies, const char* what) const {
    if (!varies) return state_layout(x, what);
    STD_TORCH_CHECK(x.dim() == (params.complex ? 5 : 4) && x.size(0) == u.size(0) &&
                        x.size(1) == params.groups && x.size(2) == params.states &&
                        x.size(3) == params.steps,
                    "selective_scan: ", what, " is (batch, groups, states, steps)");
    return checked(layout(x, {kBatch, kGroup, kState, kTime}, what), what);
  }
  ScanTensor channel_layout(const OptionalTensor& x, const char* what) const {
    if (!x) return {};
    STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == params.channels, "selective_scan: ", what,
                    " is (channels,)");
    return checked(layout(x, {kChannel}, what), what);
  }
  ScanTensor sequence_layout(const Tensor& x, const char* what) const {
    STD_TORCH_CHECK(x.dim() == (params.complex ? 4 : 3) && x.size(0) == params.batch &&
                        x.size(1) == params.channels && x.size(2) == params.states,
                    "selective_scan: ", what, " is (sequences, channels, states)");
    return checked(layout(x, {kBatch, kChannel, kState}, what), what);
  }

  Tensor new_state(const Tensor& u) const {
    const SelectiveScanParams& p = params;
    return p.complex ? empty_of(u, {p.batch, p.channels, p.states, 2}, state_type(u))
                     : empty_of(u, {p.batch, p.channels, p.states}, state_type(u));
  }
  std::array<int64_t, 3> chunk_states_shape() const {
    return {chunks, params.states * (params.complex ? 2 : 1), params.channels};
  }

 private:
  ScanTensor checked(ScanTensor x, const char* what) const {
    STD_TORCH_CHECK((x.dtype == Dtype::kDouble) == params.in_double, "selective_scan: ", what,
                    " must be float64 with u, and only then");
    return x;
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                           OptionalTensor D, OptionalTensor z, OptionalTensor bias,
                                           OptionalTensor initial, OptionalTensor cu, bool softplus,
                                           bool keep_states) {
  Arguments a(u, delta, A, B, C, D, z, bias, initial, cu, softplus);
  Tensor out = empty_scan(u, !a.whole), last = a.new_state(u);
  a.params.out = a.time_layout(out, u, "out");
  a.params.last = a.sequence_layout(last, "last state");
  const auto [chunks, states, channels] = a.chunk_states_shape();
  Tensor kept = empty_of(u, {keep_states ? chunks : 0, states, channels}, state_type(u));
  if (keep_states) a.params.chunk_states = kept.data_ptr();
  kernels().selective_scan_forward(a.params);
  return {out, last, kept};
}

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors backward(Tensor d_out, OptionalTensor d_last, Tensor kept, Tensor u, Tensor delta, Tensor A,
                     Tensor B, Tensor C, OptionalTensor D, OptionalTensor z, OptionalTensor bias,
                     OptionalTensor initial, OptionalTensor cu, bool softplus) {
  Arguments a(u, delta, A, B, C, D, z, bias, initial, cu, softplus);
  const auto [chunks, states, channels] = a.chunk_states_shape();
  STD_TORCH_CHECK(kept.dim() == 3 && kept.size(0) == chunks && kept.size(1) == states &&
                      kept.size(2) == channels && kept.scalar_type() == state_type(u) &&
                      kept.is_contiguous(),
                  "selective_scan: chunk_states are not those of this scan's forward");
  a.params.chunk_states = kept.data_ptr();
  SelectiveScanGradients g;
  g.d_out = a.time_layout(d_out, u, "d_out");
  if (d_last) g.d_last = a.sequence_layout(*d_last, "d_last_state");
  // Sums over no sequence, and steps of no sequence, are zero.
  const auto dense = [&](const OptionalTensor& x, bool zero) {
    Tensor y = x ? torch::stable::new_empty(*x, x->sizes()) : empty_of(u, {0});
    if (zero) torch::stable::fill_(y, 0.0);
    return y;
  };
  const bool none = a.params.batch == 0;
  Tensor du = empty_scan(u, !a.whole), d_delta = empty_scan(delta, !a.whole);
  Tensor dz = z ? empty_scan(*z, !a.whole) : empty_of(u, {0});
  Tensor dA = dense(A, none), dB = dense(B, none || !a.whole), dC = dense(C, none || !a.whole);
  Tensor dD = dense(D, none), d_bias = dense(bias, none), d_initial = dense(initial, false);
  g.du = a.time_layout(du, u, "du"), g.d_delta = a.time_layout(d_delta, u, "d_delta");
  if (z) g.dz = a.time_layout(dz, u, "dz");
  g.dA = a.state_layout(dA, "dA");
  g.dB = a.coefficient(dB, u, a.params.b_varies, "dB");
  g.dC = a.coefficient(dC, u, a.params.c_varies, "dC");
  if (D) g.dD = a.channel_layout(dD, "dD");
  if (bias) g.d_bias = a.channel_layout(d_bias, "d_bias");
  if (initial) g.d_initial = a.sequence_layout(d_initial, "d_initial_state");
  kernels().selective_scan_backward(a.params, g);
  return {du, d_delta, dA, dB, dC, dD, dz, d_bias, d_initial};
}

Tensor state_update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                    OptionalTensor z, OptionalTensor bias, OptionalTensor slots, bool softplus) {
  STD_TORCH_CHECK(state.dim() == 4 && x.dim() == 3 && B.dim() == 3,
                  "selective_state_update: state is (slots, heads, channels, states), x (batch, heads, "
                  "channels), B (batch, groups, states)");
  StateUpdateParams p;
  p.batch = x.size(0), p.heads = x.size(1), p.channels = x.size(2), p.states = state.size(3);
  p.groups = B.size(1);
  p.in_double = x.scalar_type() == ScalarType::Double, p.softplus = softplus;
  STD_TORCH_CHECK(p.groups > 0 && p.heads % p.groups == 0,
                  "selective_state_update: groups of B and C must divide the heads");
  const auto expect = [&](const Tensor& t, std::initializer_list<int64_t> shape,
                          std::initializer_list<int64_t ScanTensor::*> names, const char* what) {
    bool fits = t.dim() == int64_t(shape.size());
    int64_t i = 0;
    for (int64_t n : shape) fits = fits && t.size(i++) == n;
    STD_TORCH_CHECK(fits, "selective_state_update: ", what, " has the wrong shape");
    const ScanTensor s = layout(t, names, what);
    STD_TORCH_CHECK((s.dtype == Dtype::kDouble) == p.in_double, "selective_state_update: ", what,
                    " must be float64 with x, and only then");
    return s;
  };
  const auto of_heads = [&](const OptionalTensor& t, const char* what) {
    return t ? expect(*t, {p.heads, p.channels}, {kHead, kChannel}, what) : ScanTensor{};
  };
  const std::initializer_list<int64_t ScanTensor::*> row = {kBatch, kHead, kChannel};
  p.state = expect(state, {state.size(0), p.heads, p.channels, p.states},
                   {kBatch, kHead, kChannel, kState}, "state");
  p.x = expect(x, {p.batch, p.heads, p.channels}, row, "x");
  p.dt = expect(dt, {p.batch, p.heads, p.channels}, row, "dt");
  if (z) p.z = expect(*z, {p.batch, p.heads, p.channels}, row, "z");
  p.A = expect(A, {p.heads, p.channels, p.states}, {kHead, kChannel, kState}, "A");
  p.B = expect(B, {p.batch, p.groups, p.states}, {kBatch, kGroup, kState}, "B");
  p.C = expect(C, {p.batch, p.groups, p.states}, {kBatch, kGroup, kState}, "C");
  p.D = of_heads(D, "D"), p.bias = of_heads(bias, "dt_bias");
  const std::vector<int64_t> rows = integers_of(slots);
  STD_TORCH_CHECK(slots ? int64_t(rows.size()) == p.batch : state.size(0) == p.batch,
                  "selective_state_update: one state (or one index) a row of x is expected");
  for (int64_t slot : rows) {
    STD_TORCH_CHECK(slot < state.size(0), "selective_state_update: state_batch_indices has ", slot,
                    ", expected below ", state.size(0));
  }
  p.slots = data_or_null(rows);
  Tensor out = empty_of(x, {p.batch, p.heads, p.channels});
  p.out = layout(out, row, "out");
  p.threads = threads();
  kernels().selective_state_update(p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("selective_scan_forward", TORCH_BOX(&forward));
  m.impl("selective_scan_backward", TORCH_BOX(&backward));
  m.impl("selective_state_update", TORCH_BOX(&state_update));
}

}  // namespace longspan::binding
