// The causal convolution's kernels against scalar loops.
#include "agreement.h"
#include "kernels/table.h"

using namespace longspan;
using namespace longspan::test;

namespace {

struct Case {
  const char* name;
  int64_t batch = 2, channels = 5, length = 37, width = 4;
  bool channels_last = false, silu = true, bias = true, initial = true;
  int64_t sequence = 0;  ///< tokens of each packed sequence, 0: not packed
};

const Case kCases[] = {
    {.name = "plain"},
    {.name = "channels last", .channels = 21, .channels_last = true},
    {.name = "width 1", .width = 1},
    {.name = "width 1, channels last", .width = 1, .channels_last = true},
    {.name = "wider than long", .length = 3, .width = 7},
    {.name = "one token", .length = 1},
    {.name = "no token", .length = 0},
    {.name = "neither bias nor state nor activation", .silu = false, .bias = false, .initial = false},
    {.name = "packed", .sequence = 5},
    {.name = "packed, channels last", .channels = 130, .channels_last = true, .sequence = 2},
    {.name = "two blocks of time", .batch = 1, .channels = 2, .length = 2100, .width = 3},
    {.name = "two blocks, channels last", .batch = 1, .length = 70, .width = 5, .channels_last = true},
};

struct Inputs {
  Strided x, weight, bias, initial, d_out, d_final;
  std::vector<int32_t> sequences;

  Inputs(const Case& c, Dtype dtype) {
    Random random(1);
    const std::vector<size_t> order =
        c.channels_last ? std::vector<size_t>{0, 2, 1} : std::vector<size_t>{0, 1, 2};
    x = Strided(dtype, {c.batch, c.channels, c.length}, order, 3);
    d_out = Strided(dtype, {c.batch, c.channels, c.length}, order, 1);
    weight = Strided(sum_dtype(dtype), {c.channels, c.width});
    if (c.bias) bias = Strided(sum_dtype(dtype), {c.channels});
    d_final = Strided(dtype, {c.batch, c.channels, c.width - 1});
    if (c.initial) initial = Strided(dtype, d_final);
    for (Strided* each : {&x, &d_out, &weight, &bias, &d_final, &initial}) each->fill(random);
    for (int64_t i = 0; c.sequence > 0 && i < c.batch * c.length; ++i) {
      sequences.push_back(int32_t(i % c.length / c.sequence));
    }
  }
};

/// Outputs and gradients as the loops have them, in the order of compute().
std::vector<std::vector<double>> reference(const Case& c, const Inputs& in) {
  const Numbers x = in.x.leaves(), weight = in.weight.leaves(), bias = in.bias.leaves(),
                initial = in.initial.leaves();
  const int64_t past = c.width - 1;
  const auto sequence = [&](int64_t b, int64_t t) {
    return c.sequence ? in.sequences[size_t(b * c.length + std::max<int64_t>(t, 0))] : 0;
  };
  const auto input = [&](int64_t b, int64_t channel, int64_t t, int64_t seen_by) -> Number {
    if (c.length && sequence(b, t) != sequence(b, seen_by)) return 0;
    if (t >= 0) return x[size_t((b * c.channels + channel) * c.length + t)];
    return c.initial ? initial[size_t((b * c.channels + channel) * past + past + t)] : Number(0);
  };
  Numbers out, final;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t channel = 0; channel < c.channels; ++channel) {
      for (int64_t t = 0; t < c.length; ++t) {
        Number y = c.bias ? bias[size_t(channel)] : Number(0);
        for (int64_t k = 0; k < c.width; ++k) {
          y += weight[size_t(channel * c.width + k)] * input(b, channel, t - past + k, t);
        }
        out.push_back(c.silu ? silu(y) : y);
      }
      for (int64_t t = c.length - past; t < c.length; ++t) {
        final.push_back(input(b, channel, t, c.length - 1));
      }
    }
  }
  const Gradients d(weighted_sum(out, in.d_out.values()) + weighted_sum(final, in.d_final.values()));
  return {values_of(out), values_of(final), d.by(x), d.by(weight), d.by(bias), d.by(initial)};
}

Named compute(const KernelTable& kernels, const Case& c, Inputs in, int threads) {
  Named results = {{"out", Strided(in.x.memory.dtype(), in.x)},
                   {"final", Strided(in.x.memory.dtype(), in.d_final)},
                   {"dx", Strided(in.x.memory.dtype(), in.x)},
                   {"d_weight", Strided(in.weight.memory.dtype(), in.weight)},
                   {"d_bias", Strided(in.weight.memory.dtype(), in.bias)},
                   {"d_initial", Strided(in.x.memory.dtype(), in.initial)}};
  const auto layout = [](Strided& x) {
    return ConvTensor{x.data(), x.stride(0), x.stride(1), x.stride(2)};
  };
  ConvParams p;
  p.dtype = in.x.memory.dtype();
  p.batch = c.batch, p.channels = c.channels, p.length = c.length, p.width = c.width;
  p.x = layout(in.x), p.out = layout(results[0].second);
  p.weight = in.weight.data(), p.bias = in.bias.data(), p.initial = in.initial.data();
  p.final = results[1].second.data();
  p.seq_idx = c.sequence ? in.sequences.data() : nullptr;
  p.silu = c.silu, p.threads = threads;
  kernels.conv_forward(p);
  ConvGradients g;
  g.d_out = layout(in.d_out), g.d_final = in.d_final.data();
  g.dx = layout(results[2].second);
  g.d_weight = results[3].second.data(), g.d_bias = results[4].second.data();
  g.d_initial = results[5].second.data();
  kernels.conv_backward(p, g);
  return results;
}

// ---- decoding

struct Step {
  const char* name;
  int64_t batch = 3, channels = 37, length = 1, width = 4, slots = 4;
  std::vector<size_t> state_order = {0, 1, 2};
  bool ring = false, rows = false;
};

std::vector<Step> steps() {
  const std::vector<size_t> channels_last = {0, 2, 1};
  return {
      {.name = "plain"},
      {.name = "slots outside channels", .state_order = channels_last},
      {.name = "more sequences and channels than a task's", .batch = 9, .channels = 2070},
      {.name = "narrower than the slots", .width = 3},
      {.name = "width 4 in 3 slots", .slots = 3},
      {.name = "width 4 in 9 slots, rows", .slots = 9, .rows = true},
      {.name = "width 1", .width = 1, .slots = 1},
      {.name = "several inputs", .length = 3},
      {.name = "more inputs than slots", .length = 6, .slots = 5, .rows = true},
      {.name = "rows", .rows = true},
      {.name = "ring", .slots = 5, .ring = true},
      {.name = "ring, more inputs than slots", .length = 8, .ring = true, .rows = true},
      {.name = "ring, slots outside", .slots = 3, .state_order = channels_last, .ring = true},
  };
}

/// One sequence's channel: the state before it, oldest first where it is no ring -> outputs, state
/// after.
std::vector<double> step_channel(const Step& s, const std::vector<double>& x, int64_t written,
                                 const double* weight, double bias, std::vector<double>& state) {
  std::vector<double> out;
  const auto slot = [&](int64_t i) { return size_t((i + s.slots) % s.slots); };
  for (const double input : x) {
    double y = bias + weight[s.width - 1] * input;
    for (int64_t ago = 1; ago < s.width; ++ago) {
      y += weight[s.width - 1 - ago] * state[s.ring ? slot(written - ago) : size_t(s.slots - ago)];
    }
    out.push_back(y * sigmoid(y));
    if (s.ring) {
      state[slot(written++)] = input;
    } else {
      state.erase(state.begin());
      state.push_back(input);
    }
  }
  return out;
}

void check_step(const Level& level, const Step& s, Dtype dtype) {
  INFO(level.name << ", " << name_of(dtype) << ", " << s.name);
  Random random(2);
  // Channels are innermost, as a projection leaves them, and rows have a gap between them.
  Strided x(dtype, {s.batch, s.channels, s.length}, {0, 2, 1}, 5);
  Strided state(dtype, {s.batch + 2, s.channels, s.slots}, s.state_order);
  Strided weight(sum_dtype(dtype), {s.channels, s.width}), bias(sum_dtype(dtype), {s.channels});
  for (Strided* each : {&x, &state, &weight, &bias}) each->fill(random);
  std::vector<int64_t> rows, written;
  for (int64_t b = 0; b < s.batch; ++b) {
    rows.push_back(!s.rows ? b : b == 1 ? -1 : s.batch + 1 - b);
    written.push_back(7 * b);
  }

  const auto run = [&](int threads) {
    Named results = {{"out", Strided(dtype, x)}, {"state", state}};
    Strided &out = results[0].second, &after = results[1].second;
    ConvParams p;
    p.dtype = dtype;
    p.batch = s.batch, p.channels = s.channels, p.length = s.length, p.width = s.width;
    p.x = {x.data(), x.stride(0), x.stride(1), x.stride(2)};
    p.out = {out.data(), out.stride(0), out.stride(1), out.stride(2)};
    p.weight = weight.data(), p.bias = bias.data(), p.silu = true, p.threads = threads;
    ConvState c;
    c.state = {after.data(), after.stride(0), after.stride(1), after.stride(2)};
    c.slots = s.slots;
    if (s.rows) c.rows = rows.data();
    if (s.ring) c.written = written.data();
    level.kernels->conv_update(p, c);
    return results;
  };

  const std::vector<double> inputs = x.values(), weights = weight.values(), biases = bias.values();
  std::vector<double> out, after = state.values();
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t c = 0; c < s.channels; ++c) {
      if (rows[size_t(b)] < 0) {
        out.insert(out.end(), size_t(s.length), 0);
        continue;
      }
      const auto first = inputs.begin() + (b * s.channels + c) * s.length;
      const auto place = after.begin() + (rows[size_t(b)] * s.channels + c) * s.slots;
      std::vector<double> slots(place, place + s.slots);
      const std::vector<double> y =
          step_channel(s, {first, first + s.length}, written[size_t(b)], &weights[size_t(c * s.width)],
                       biases[size_t(c)], slots);
      out.insert(out.end(), y.begin(), y.end());
      std::copy(slots.begin(), slots.end(), place);
    }
  }
  const Named one = run(1), three = run(3);
  CHECK(distance(one[0].second.values(), out) <= allowed(dtype, 16, 2));
  CHECK(one[1].second.values() == after);
  check_same_bits(one, three);
}

}  // namespace

TEST_CASE("the convolution and its gradients agree with scalar loops", "[conv]") {
  check_agreement<Inputs>(kCases, {Dtype::kFloat, Dtype::kDouble, Dtype::kBfloat16}, reference, compute,
                          [](const Case&, size_t) { return 64; });
}

TEST_CASE("a step of the convolution agrees with a scalar loop", "[conv]") {
  for (const Step& s : steps()) {
    for (const Dtype dtype : {Dtype::kFloat, Dtype::kDouble, Dtype::kBfloat16, Dtype::kHalf}) {
      for (const Level& level : levels()) check_step(level, s, dtype);
    }
  }
}
