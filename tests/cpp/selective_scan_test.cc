// The selective scan's kernels, and the step of decoding, against scalar loops.
#include "agreement.h"
#include "kernels/table.h"

using namespace longspan;
using namespace longspan::test;

namespace {

constexpr std::initializer_list<Dtype> kDtypes = {Dtype::kFloat, Dtype::kDouble, Dtype::kBfloat16};

/// What a dimension is to the kernels.
using Stride = int64_t ScanTensor::*;
constexpr Stride kBatch = &ScanTensor::batch, kGroup = &ScanTensor::group,
                 kChannel = &ScanTensor::channel, kState = &ScanTensor::state, kTime = &ScanTensor::time,
                 kPart = &ScanTensor::part, kHead = &ScanTensor::time;

ScanTensor layout(Strided& x, const std::vector<Stride>& dimensions) {
  ScanTensor s;
  if (!x.present) return s;
  s.data = x.data(), s.dtype = x.memory.dtype();
  for (size_t d = 0; d < dimensions.size(); ++d) s.*dimensions[d] = x.stride(d);
  return s;
}

struct Case {
  const char* name;
  int64_t batch = 2, channels = 5, states = 3, steps = 37, groups = 1;
  bool complex = false, b_varies = true, c_varies = true, options = true, channels_last = false;
  std::vector<int64_t> cu = {};  ///< packed, in a batch of one

  int64_t sequences() const { return cu.empty() ? batch : int64_t(cu.size()) - 1; }
  int64_t parts() const { return complex ? 2 : 1; }
};

std::vector<Case> cases() {
  return {
      {.name = "plain"},
      {.name = "sixteen states, three chunks", .batch = 1, .channels = 18, .states = 16, .steps = 70},
      {.name = "channels last", .channels = 21, .states = 4, .steps = 33, .channels_last = true},
      {.name = "groups", .channels = 6, .groups = 2},
      {.name = "no options", .options = false},
      {.name = "constant B and C", .b_varies = false, .c_varies = false},
      {.name = "constant B, channels last", .b_varies = false, .channels_last = true},
      {.name = "complex", .complex = true},
      {.name = "complex, constant C, groups",
       .channels = 4,
       .groups = 2,
       .complex = true,
       .c_varies = false},
      {.name = "one step", .steps = 1},
      {.name = "no step", .steps = 0},
      {.name = "packed", .batch = 1, .steps = 75, .cu = {0, 1, 1, 40, 75}},
      {.name = "packed, channels last",
       .batch = 1,
       .channels = 17,
       .steps = 40,
       .channels_last = true,
       .cu = {0, 7, 40}},
      {.name = "long, in pieces of time", .batch = 1, .channels = 2, .states = 2, .steps = 1100},
      {.name = "many states, in splits", .batch = 1, .channels = 2, .states = 40, .steps = 20},
  };
}

struct Inputs {
  Strided u, delta, A, B, C, D, z, bias, initial, d_out, d_last;

  Inputs(const Case& c, Dtype dtype) {
    Random random(3);
    const std::vector<size_t> order =
        c.channels_last ? std::vector<size_t>{0, 2, 1} : std::vector<size_t>{0, 1, 2};
    const Dtype real = sum_dtype(dtype);
    const auto numbers = [&](Dtype type, std::vector<int64_t> shape) {
      if (c.complex) shape.push_back(2);
      return Strided(type, shape);
    };
    u = Strided(dtype, {c.batch, c.channels, c.steps}, order, 2);
    delta = Strided(dtype, {c.batch, c.channels, c.steps}, order, 3);
    d_out = Strided(dtype, {c.batch, c.channels, c.steps}, order);
    const std::vector<int64_t> constant = {c.channels, c.states},
                               varying = {c.batch, c.groups, c.states, c.steps};
    A = numbers(real, constant);
    B = c.b_varies ? numbers(dtype, varying) : numbers(real, constant);
    C = c.c_varies ? numbers(dtype, varying) : numbers(real, constant);
    d_last = numbers(real, {c.sequences(), c.channels, c.states});
    if (c.options) {
      z = Strided(dtype, u), initial = Strided(real, d_last);
      D = Strided(real, {c.channels}), bias = Strided(real, {c.channels});
    }
    for (Strided* x : {&u, &B, &C, &D, &z, &bias, &initial, &d_out, &d_last}) x->fill(random);
    A.fill(random, 0.2, -0.7);
    c.options ? delta.fill(random) : delta.fill(random, 0.1, 0.5);
  }
};

struct Complex {
  Number re, im;
};
Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

/// Outputs and gradients as the loops have them, in the order of compute().
std::vector<std::vector<double>> reference(const Case& c, const Inputs& in) {
  const Numbers u = in.u.leaves(), delta = in.delta.leaves(), A = in.A.leaves(), B = in.B.leaves(),
                C = in.C.leaves(), D = in.D.leaves(), z = in.z.leaves(), bias = in.bias.leaves(),
                initial = in.initial.leaves();
  const auto complex = [&](const Numbers& x, int64_t i) {
    const size_t at = size_t(i * c.parts());
    return Complex{x[at], c.complex ? x[at + 1] : Number(0)};
  };
  Numbers out(u.size()), last;
  for (int64_t s = 0; s < c.sequences(); ++s) {
    const int64_t b = c.cu.empty() ? s : 0, begin = c.cu.empty() ? 0 : c.cu[size_t(s)],
                  end = c.cu.empty() ? c.steps : c.cu[size_t(s) + 1];
    for (int64_t d = 0; d < c.channels; ++d) {
      std::vector<Complex> h(size_t(c.states), Complex{});
      for (int64_t n = 0; n < c.states && c.options; ++n) {
        h[size_t(n)] = complex(initial, (s * c.channels + d) * c.states + n);
      }
      for (int64_t t = begin; t < end; ++t) {
        const size_t at = size_t((b * c.channels + d) * c.steps + t);
        const Number step = c.options ? softplus(delta[at] + bias[size_t(d)]) : delta[at];
        Number y = c.options ? D[size_t(d)] * u[at] : Number(0);
        for (int64_t n = 0; n < c.states; ++n) {
          const int64_t constant = d * c.states + n, group = d / (c.channels / c.groups);
          const int64_t varying = ((b * c.groups + group) * c.states + n) * c.steps + t;
          const Complex a = complex(A, constant), input = {step * u[at], 0};
          const Number size = exp(step * a.re), angle = step * a.im;
          const Complex decayed = Complex{size * cos(angle), size * sin(angle)} * h[size_t(n)];
          const Complex added = complex(B, c.b_varies ? varying : constant) * input;
          h[size_t(n)] = {decayed.re + added.re, decayed.im + added.im};
          const Complex seen = complex(C, c.c_varies ? varying : constant) * h[size_t(n)];
          y += c.complex ? 2 * seen.re : seen.re;
        }
        out[at] = c.options ? y * silu(z[at]) : y;
      }
      for (const Complex& x : h) {
        last.push_back(x.re);
        if (c.complex) last.push_back(x.im);
      }
    }
  }
  const Gradients g(weighted_sum(out, in.d_out.values()) + weighted_sum(last, in.d_last.values()));
  return {values_of(out), values_of(last), g.by(u), g.by(delta), g.by(A),      g.by(B),
          g.by(C),        g.by(D),         g.by(z), g.by(bias),  g.by(initial)};
}

Named compute(const KernelTable& kernels, const Case& c, Inputs in, int threads) {
  const auto like = [](const Strided& x) { return Strided(x.memory.dtype(), x); };
  Named results = {{"out", like(in.u)},
                   {"last", like(in.d_last)},
                   {"du", like(in.u)},
                   {"d_delta", like(in.delta)},
                   {"dA", like(in.A)},
                   {"dB", like(in.B)},
                   {"dC", like(in.C)},
                   {"dD", like(in.D)},
                   {"dz", like(in.z)},
                   {"d_bias", like(in.bias)},
                   {"d_initial", like(in.initial)}};
  const std::vector<Stride> time = {kBatch, kChannel, kTime}, channel = {kChannel},
                            constant = {kChannel, kState, kPart},
                            varying = {kBatch, kGroup, kState, kTime, kPart},
                            sequence = {kBatch, kChannel, kState, kPart};
  const std::vector<Stride>&b = c.b_varies ? varying : constant, &cc = c.c_varies ? varying : constant;
  const auto view = [&](Strided& x, std::vector<Stride> names) {
    if (!c.complex && names.back() == kPart) names.pop_back();
    ScanTensor s = layout(x, names);
    if (!c.cu.empty() && names.back() == kTime) s.batch = 0;
    return s;
  };
  const auto result = [&](size_t i, const std::vector<Stride>& names) {
    return view(results[i].second, names);
  };
  SelectiveScanParams p;
  p.in_double = in.u.memory.dtype() == Dtype::kDouble, p.complex = c.complex;
  p.b_varies = c.b_varies, p.c_varies = c.c_varies, p.softplus = c.options;
  p.batch = c.sequences(), p.groups = c.groups, p.channels = c.channels, p.states = c.states;
  p.steps = c.steps, p.cu = c.cu.empty() ? nullptr : c.cu.data();
  p.u = view(in.u, time), p.delta = view(in.delta, time), p.z = view(in.z, time);
  p.A = view(in.A, constant), p.B = view(in.B, b), p.C = view(in.C, cc);
  p.D = view(in.D, channel), p.bias = view(in.bias, channel);
  p.initial = view(in.initial, sequence);
  p.out = result(0, time), p.last = result(1, sequence);
  const int64_t chunks = (c.steps / scan_chunk(c.states) + 1) * c.batch + c.sequences();
  Array kept(sum_dtype(in.u.memory.dtype()), size_t(chunks * c.states * c.parts() * c.channels), NAN);
  p.chunk_states = kept.data(), p.threads = threads;
  kernels.selective_scan_forward(p);

  SelectiveScanGradients g;
  g.d_out = view(in.d_out, time), g.d_last = view(in.d_last, sequence);
  g.du = result(2, time), g.d_delta = result(3, time), g.dA = result(4, constant);
  g.dB = result(5, b), g.dC = result(6, cc), g.dD = result(7, channel), g.dz = result(8, time);
  g.d_bias = result(9, channel), g.d_initial = result(10, sequence);
  kernels.selective_scan_backward(p, g);
  return results;
}

// ---- decoding

struct Step {
  const char* name;
  int64_t batch = 3, heads = 1, groups = 1, channels = 37, states = 16;
  bool options = true, slots = false, one_decay = false, states_outside = false;
};

const Step kSteps[] = {
    {.name = "plain"},
    {.name = "odd states", .states = 5},
    {.name = "neither D, z, bias nor softplus", .states = 3, .options = false},
    {.name = "slots", .states = 32, .slots = true},
    {.name = "heads of one decay", .heads = 4, .groups = 2, .channels = 9, .one_decay = true},
    {.name = "odd states of one decay", .heads = 2, .channels = 3, .states = 7, .one_decay = true},
    {.name = "states outside channels", .states = 6, .states_outside = true},
    {.name = "several tasks", .batch = 9, .channels = 300},
};

void check_step(const Level& level, const Step& s, Dtype dtype) {
  INFO(level.name << ", " << name_of(dtype) << ", " << s.name);
  Random random(4);
  const Dtype real = sum_dtype(dtype);
  const std::vector<size_t> order =
      s.states_outside ? std::vector<size_t>{0, 1, 3, 2} : std::vector<size_t>{0, 1, 2, 3};
  Strided state(dtype, {s.batch + 2, s.heads, s.channels, s.states}, order);
  Strided x(dtype, {s.batch, s.heads, s.channels}, {}, 3), B(dtype, {s.batch, s.groups, s.states});
  Strided dt(dtype, x), C(dtype, B), A(real, {s.heads, s.channels, s.states}), z, D, bias;
  if (s.options) {
    z = Strided(dtype, x), D = Strided(real, {s.heads, s.channels}), bias = Strided(real, D);
  }
  for (Strided* each : {&state, &x, &B, &C, &z, &D, &bias}) each->fill(random);
  s.options ? dt.fill(random) : dt.fill(random, 0.1, 0.5);
  A.fill(random, 0.2, -0.7);
  std::vector<int64_t> slots;
  for (int64_t b = 0; b < s.batch; ++b) slots.push_back(!s.slots ? b : b == 1 ? -1 : s.batch + 1 - b);

  const auto run = [&](int threads) {
    Named results = {{"out", Strided(dtype, x)}, {"state", state}};
    const std::vector<Stride> row = {kBatch, kHead, kChannel}, group = {kBatch, kGroup, kState},
                              head = {kHead, kChannel};
    StateUpdateParams p;
    p.in_double = dtype == Dtype::kDouble, p.softplus = s.options;
    p.batch = s.batch, p.heads = s.heads, p.groups = s.groups, p.channels = s.channels;
    p.states = s.states, p.slots = s.slots ? slots.data() : nullptr, p.threads = threads;
    p.state = layout(results[1].second, {kBatch, kHead, kChannel, kState});
    p.x = layout(x, row), p.dt = layout(dt, row), p.z = layout(z, row);
    p.A = layout(A, {kHead, kChannel, kState});
    if (s.one_decay) p.A.channel = p.A.state = 0;
    p.B = layout(B, group), p.C = layout(C, group), p.D = layout(D, head);
    p.bias = layout(bias, head), p.out = layout(results[0].second, row);
    level.kernels->selective_state_update(p);
    return results;
  };

  std::vector<double> out, after = state.values();
  const std::vector<double> xs = x.values(), dts = dt.values(), As = A.values(), Bs = B.values(),
                            Cs = C.values(), zs = z.values(), Ds = D.values(), biases = bias.values();
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t i = 0; i < s.heads * s.channels; ++i) {
      const int64_t slot = slots[size_t(b)], head = i / s.channels;
      const size_t at = size_t(b * s.heads * s.channels + i), parameter = size_t(i);
      if (slot < 0) {
        out.push_back(0);
        continue;
      }
      const double step = s.options ? softplus(dts[at] + biases[parameter]) : dts[at];
      double y = s.options ? Ds[parameter] * xs[at] : 0;
      for (int64_t n = 0; n < s.states; ++n) {
        const size_t bc = size_t((b * s.groups + head / (s.heads / s.groups)) * s.states + n);
        const double a = As[size_t(s.one_decay ? head * s.channels * s.states : i * s.states + n)];
        double& h = after[size_t((slot * s.heads * s.channels + i) * s.states + n)];
        h = std::exp(step * a) * h + step * Bs[bc] * xs[at];
        y += Cs[bc] * h;
      }
      out.push_back(s.options ? y * zs[at] * sigmoid(zs[at]) : y);
    }
  }
  const Named one = run(1), three = run(3);
  CHECK(distance(one[0].second.values(), out) <= allowed(dtype, 64, 2));
  CHECK(distance(one[1].second.values(), after) <= allowed(dtype, 16, 2));
  check_same_bits(one, three);
}

}  // namespace

TEST_CASE("the selective scan and its gradients agree with scalar loops", "[selective_scan]") {
  check_agreement<Inputs>(cases(), kDtypes, reference, compute, [](const Case&, size_t) { return 128; });
}

TEST_CASE("a step of the selective scan agrees with a scalar loop", "[selective_scan]") {
  for (const Step& s : kSteps) {
    for (const Dtype dtype : kDtypes) {
      for (const Level& level : levels()) check_step(level, s, dtype);
    }
  }
}
