// The gated norm's kernels against a scalar loop.
#include "agreement.h"
#include "kernels/table.h"

using namespace longspan;
using namespace longspan::test;

namespace {

struct Case {
  const char* name;
  int64_t rows = 3, channels = 37, group = 37, gap = 0;
  bool before_gate = false, gate = true, bias = true;
};

const Case kCases[] = {
    {.name = "after the gate"},
    {.name = "before the gate", .before_gate = true},
    {.name = "groups, gaps between rows", .rows = 19, .channels = 45, .group = 15, .gap = 3},
    {.name = "groups, before the gate", .channels = 96, .group = 32, .before_gate = true},
    {.name = "no gate, no bias", .gate = false, .bias = false},
    {.name = "groups of one", .channels = 5, .group = 1},
    {.name = "more rows than tasks", .rows = 600, .channels = 6, .group = 3},
    {.name = "no rows", .rows = 0},
};

struct Inputs {
  Strided x, z, weight, bias, d_out;

  Inputs(const Case& c, Dtype dtype) {
    Random random(5);
    x = Strided(dtype, {c.rows, c.channels}, {}, c.gap);
    d_out = Strided(dtype, {c.rows, c.channels});
    if (c.gate) z = Strided(dtype, {c.rows, c.channels}, {}, 2 * c.gap);
    weight = Strided(sum_dtype(dtype), {c.channels});
    if (c.bias) bias = Strided(sum_dtype(dtype), {c.channels});
    for (Strided* each : {&x, &d_out, &z, &weight, &bias}) each->fill(random);
  }
};

constexpr double kEps = 1e-2;

/// Output and gradients as the loop has them, in the order of compute().
std::vector<std::vector<double>> reference(const Case& c, const Inputs& in) {
  const Numbers x = in.x.leaves(), z = in.z.leaves(), weight = in.weight.leaves(),
                bias = in.bias.leaves();
  Numbers out(x.size());
  for (size_t begin = 0; begin < x.size(); begin += size_t(c.group)) {
    const size_t end = begin + size_t(c.group);
    const auto gated = [&](Number y, size_t i) { return c.gate ? y * silu(z[i]) : y; };
    Number squares;
    for (size_t i = begin; i < end; ++i) {
      out[i] = c.before_gate ? x[i] : gated(x[i], i);
      squares += out[i] * out[i];
    }
    const Number scale = inverse_root(squares * (1. / double(c.group)) + kEps);
    for (size_t i = begin; i < end; ++i) {
      const size_t channel = i % size_t(c.channels);
      out[i] = out[i] * scale * weight[channel];
      if (c.bias) out[i] += bias[channel];
      if (c.before_gate) out[i] = gated(out[i], i);
    }
  }
  const Gradients d(weighted_sum(out, in.d_out.values()));
  return {values_of(out), d.by(x), d.by(z), d.by(weight), d.by(bias)};
}

Named compute(const KernelTable& kernels, const Case& c, Inputs in, int threads) {
  const auto like = [](const Strided& x) { return Strided(x.memory.dtype(), x); };
  Named results = {{"out", like(in.x)},
                   {"dx", like(in.x)},
                   {"dz", like(in.z)},
                   {"d_weight", like(in.weight)},
                   {"d_bias", like(in.bias)}};
  const auto rows = [](Strided& x) { return NormRows{x.data(), x.stride(0)}; };
  NormParams p;
  p.dtype = in.x.memory.dtype();
  p.rows = c.rows, p.channels = c.channels, p.group = c.group;
  p.x = rows(in.x), p.z = rows(in.z), p.out = rows(results[0].second);
  p.weight = in.weight.data(), p.bias = in.bias.data();
  Array rstd(sum_dtype(p.dtype), size_t(c.rows * c.channels / c.group), NAN);
  p.rstd = rstd.data();
  p.eps = kEps, p.norm_before_gate = c.before_gate, p.threads = threads;
  kernels.norm_gated_forward(p);
  NormGradients g;
  g.d_out = rows(in.d_out), g.dx = rows(results[1].second), g.dz = rows(results[2].second);
  g.d_weight = results[3].second.data(), g.d_bias = results[4].second.data();
  kernels.norm_gated_backward(p, g);
  return results;
}

}  // namespace

TEST_CASE("the gated norm and its gradients agree with a scalar loop", "[norm]") {
  check_agreement<Inputs>(kCases, {Dtype::kFloat, Dtype::kDouble, Dtype::kHalf}, reference, compute,
                          [](const Case&, size_t) { return 64; });
}
