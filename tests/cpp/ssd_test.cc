// Mamba-2's scan against a scalar loop, token by token.
#include "agreement.h"
#include "kernels/table.h"
#include "sequences.h"

using namespace longspan;
using namespace longspan::test;

namespace {

struct Case {
  const char* name;
  int64_t batch = 2, length = 37, heads = 2, groups = 1, channels = 5, states = 7, chunk = 16;
  bool options = true;
  std::vector<int64_t> cuts = {};  ///< where runs end within each row
  bool packed = false;  ///< the runs (of a single row) are sequences, with states of their own

  int64_t sequences() const { return packed ? int64_t(cuts.size()) + 1 : batch; }

  /// Each row cut into runs. A row's first has its initial state and its last one's is kept; packed,
  /// each has both.
  Sequences cut() const {
    Sequences all;
    for (int64_t b = 0; b < batch; ++b) {
      int64_t begin = 0;
      for (size_t i = 0; i <= cuts.size(); ++i) {
        const int64_t end = i < cuts.size() ? cuts[i] : length, own = packed ? int64_t(i) : b;
        const bool first = packed || i == 0, last = packed || i == cuts.size();
        all.add({b, begin, end, first && options ? own : -1, last ? own : -1});
        begin = end;
      }
    }
    return all;
  }

  /// Whether a run's last state is its row's.
  bool is_final(const Run& run) const { return run.last >= 0 && (!packed || run.end == length); }
};

std::vector<Case> cases() {
  return {
      {.name = "plain"},
      {.name = "no options", .options = false},
      {.name = "groups", .heads = 4, .groups = 2},
      {.name = "a vector's width", .batch = 1, .channels = 16, .states = 32, .chunk = 32},
      {.name = "one token", .length = 1},
      {.name = "no token", .length = 0},
      {.name = "runs", .length = 50, .cuts = {1, 1, 20}},
      {.name = "packed", .batch = 1, .length = 50, .cuts = {1, 1, 20}, .packed = true},
      {.name = "two spans, long chunks",
       .batch = 1,
       .length = 300,
       .channels = 3,
       .states = 4,
       .chunk = 64},
      {.name = "many heads, two spans and a run",
       .length = 290,
       .heads = 9,
       .channels = 1,
       .states = 2,
       .chunk = 128,
       .cuts = {30}},
  };
}

struct Inputs {
  Strided x, dt, z, b, c, a, d, bias, initial, d_out, d_final, d_sequences;

  Inputs(const Case& s, Dtype dtype) {
    Random random(6);
    const Dtype sums = sum_dtype(dtype);
    const std::vector<int64_t> shape = {s.batch, s.length, s.heads, s.channels};
    const auto states = [&](int64_t count) {
      return Strided(sums, {count, s.heads, s.channels, s.states});
    };
    x = Strided(dtype, shape, {}, 3), d_out = Strided(dtype, shape);
    // The projection's dt of a token lies with its heads; here heads are outside of tokens.
    dt = Strided(dtype, {s.batch, s.length, s.heads}, {0, 2, 1});
    b = Strided(dtype, {s.batch, s.length, s.groups, s.states}, {}, 1);
    c = Strided(dtype, {s.batch, s.length, s.groups, s.states});
    a = Strided(sums, {s.heads});
    d_final = states(s.batch), d_sequences = states(s.sequences());
    if (s.options) {
      z = Strided(dtype, shape, {}, 2), initial = states(s.sequences());
      d = Strided(sums, {s.heads, s.channels}), bias = Strided(sums, {s.heads});
    }
    for (Strided* each : {&x, &z, &b, &c, &d, &bias, &initial, &d_out, &d_final, &d_sequences}) {
      each->fill(random);
    }
    a.fill(random, 0.1, -0.5);
    s.options ? dt.fill(random) : dt.fill(random, 0.1, 0.5);
  }
};

constexpr double kLeast = 0.1, kMost = 2;  // of a step

/// Outputs and gradients as the loop has them, in the order of compute().
std::vector<std::vector<double>> reference(const Case& s, const Inputs& in) {
  const Numbers x = in.x.leaves(), dt = in.dt.leaves(), z = in.z.leaves(), b = in.b.leaves(),
                c = in.c.leaves(), a = in.a.leaves(), d = in.d.leaves(), bias = in.bias.leaves(),
                initial = in.initial.leaves();
  const auto step_of = [&](int64_t row, int64_t t, int64_t head) -> Number {
    const Number raw = dt[size_t((row * s.length + t) * s.heads + head)];
    const Number step = s.options ? softplus(raw + bias[size_t(head)]) : raw;
    return step.value < kLeast ? Number(kLeast) : step.value > kMost ? Number(kMost) : step;
  };
  Numbers out(x.size()), final, sequences;
  for (const Run& run : s.cut().runs) {
    for (int64_t head = 0; head < s.heads; ++head) {
      for (int64_t p = 0; p < s.channels; ++p) {
        Numbers h(size_t(s.states), Number(0));
        for (int64_t n = 0; n < s.states && run.initial >= 0; ++n) {
          h[size_t(n)] =
              initial[size_t(((run.initial * s.heads + head) * s.channels + p) * s.states + n)];
        }
        for (int64_t t = run.begin; t < run.end; ++t) {
          const int64_t token = run.batch * s.length + t;
          const size_t at = size_t((token * s.heads + head) * s.channels + p);
          const Number step = step_of(run.batch, t, head), decay = exp(step * a[size_t(head)]);
          Number y = s.options ? d[size_t(head * s.channels + p)] * x[at] : Number(0);
          for (int64_t n = 0; n < s.states; ++n) {
            const int64_t group = head / (s.heads / s.groups);
            const size_t bc = size_t((token * s.groups + group) * s.states + n);
            h[size_t(n)] = decay * h[size_t(n)] + step * x[at] * b[bc];
            y += c[bc] * h[size_t(n)];
          }
          out[at] = s.options ? y * silu(z[at]) : y;
        }
        if (run.last >= 0) sequences.insert(sequences.end(), h.begin(), h.end());
        if (s.is_final(run)) final.insert(final.end(), h.begin(), h.end());
      }
    }
  }
  const Gradients g(weighted_sum(out, in.d_out.values()) + weighted_sum(final, in.d_final.values()) +
                    weighted_sum(sequences, in.d_sequences.values()));
  return {values_of(out), values_of(final), values_of(sequences),
          g.by(x),        g.by(dt),         g.by(z),
          g.by(b),        g.by(c),          g.by(a),
          g.by(d),        g.by(bias),       g.by(initial)};
}

Named compute(const KernelTable& kernels, const Case& s, Inputs in, int threads) {
  const auto like = [](const Strided& x) { return Strided(x.memory.dtype(), x); };
  const Dtype sums = in.a.memory.dtype();
  Named results = {{"out", like(in.x)}, {"final", like(in.d_final)}, {"sequences", like(in.d_sequences)},
                   {"dx", like(in.x)},  {"ddt", like(in.dt)},        {"dz", like(in.z)},
                   {"db", like(in.b)},  {"dc", like(in.c)},          {"da", like(in.a)},
                   {"dd", like(in.d)},  {"d_bias", like(in.bias)},   {"d_initial", like(in.initial)}};
  const auto layout = [](Strided& x) {
    return SequenceTensor{x.data(), x.stride(0), x.stride(1), x.stride(2)};
  };
  const Sequences cut = s.cut();
  Array kept(sums, size_t(cut.boundaries * s.heads * s.states * s.channels), NAN);
  SsdParams p;
  p.dtype = in.x.memory.dtype(), p.dt_dtype = in.dt.memory.dtype();
  p.batch = s.batch, p.length = s.length, p.heads = s.heads, p.groups = s.groups;
  p.channels = s.channels, p.states = s.states, p.chunk = s.chunk;
  p.x = layout(in.x), p.z = layout(in.z), p.dt = layout(in.dt), p.b = layout(in.b), p.c = layout(in.c);
  p.out = layout(results[0].second);
  p.a = in.a.data(), p.d = in.d.data(), p.dt_bias = in.bias.data();
  p.softplus = s.options, p.dt_min = kLeast, p.dt_max = kMost;
  p.runs = cut.table();
  p.packed = s.packed ? s.sequences() : 0;
  p.initial = in.initial.data();
  p.final = results[1].second.data(), p.sequence_states = results[2].second.data();
  p.boundaries = kept.data(), p.threads = threads;
  kernels.ssd_forward(p);

  // The kernel writes d_bias also where there is no bias.
  Strided d_bias(sums, in.a);
  SsdGradients g;
  g.d_out = layout(in.d_out), g.dx = layout(results[3].second), g.ddt = layout(results[4].second);
  g.dz = layout(results[5].second), g.db = layout(results[6].second), g.dc = layout(results[7].second);
  g.d_final = in.d_final.data(), g.d_sequence_states = in.d_sequences.data();
  g.da = results[8].second.data(), g.dd = results[9].second.data(), g.d_bias = d_bias.data();
  g.d_initial = results[11].second.data();
  kernels.ssd_backward(p, g);
  if (s.options) results[10].second = d_bias;
  return results;
}

}  // namespace

TEST_CASE("Mamba-2's scan and its gradients agree with a scalar loop", "[ssd]") {
  // Sums over all tokens (da, dd, d_bias), whose terms cancel, get a unit more for each.
  const auto units = [](const Case& s, size_t result) {
    return 128 + (result >= 8 && result <= 10 ? double(s.batch * s.length) : 0);
  };
  check_agreement<Inputs>(cases(), {Dtype::kFloat, Dtype::kDouble, Dtype::kBfloat16}, reference, compute,
                          units);
}
