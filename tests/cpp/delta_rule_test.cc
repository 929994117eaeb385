// The delta rule against a scalar loop, token by token.
#include "agreement.h"
#include "kernels/table.h"
#include "sequences.h"

using namespace longspan;
using namespace longspan::test;

namespace {

struct Case {
  const char* name;
  int64_t batch = 2, tokens = 37, heads = 2, group = 1, keys = 5, values = 7;
  bool options = true;             ///< a gate, and initial states
  std::vector<int64_t> cuts = {};  ///< where sequences end within the single row

  int64_t value_heads() const { return heads * group; }
  int64_t sequences() const { return cuts.empty() ? batch : int64_t(cuts.size()) + 1; }
  Sequences cut() const {
    Sequences all;
    int64_t begin = 0;
    for (int64_t s = 0; s < sequences(); ++s) {
      const int64_t initial = options ? s : -1;
      if (cuts.empty()) {
        all.add({s, 0, tokens, initial, s});
      } else {
        const int64_t end = s + 1 < sequences() ? cuts[size_t(s)] : tokens;
        all.add({0, begin, end, initial, s});
        begin = end;
      }
    }
    return all;
  }
};

std::vector<Case> cases() {
  return {
      {.name = "plain"},
      {.name = "no options", .options = false},
      {.name = "value heads", .group = 3},
      {.name = "a vector's width", .batch = 1, .keys = 16, .values = 32},
      {.name = "one token", .tokens = 1},
      {.name = "no token", .tokens = 0},
      {.name = "packed", .batch = 1, .tokens = 50, .cuts = {1, 1, 20}},
      {.name = "two spans, few heads", .batch = 1, .tokens = 290, .heads = 1, .keys = 3, .values = 40},
      {.name = "two spans, few heads, packed",
       .batch = 1,
       .tokens = 330,
       .heads = 1,
       .group = 2,
       .keys = 2,
       .values = 3,
       .cuts = {0, 30}},
      {.name = "two spans, many heads", .batch = 1, .tokens = 290, .heads = 8, .keys = 1, .values = 2},
  };
}

struct Inputs {
  Strided q, k, v, beta, gate, initial, d_out, d_last;

  Inputs(const Case& s, Dtype dtype) {
    Random random(11);
    const Dtype sums = sum_dtype(dtype);
    const auto states = [&] {
      return Strided(sums, {s.sequences(), s.value_heads(), s.keys, s.values});
    };
    // Tokens outside heads, as a layer's projections leave them; v's and d_out's are inside.
    q = Strided(dtype, {s.batch, s.heads, s.tokens, s.keys}, {0, 2, 1, 3}, 3);
    k = Strided(dtype, {s.batch, s.heads, s.tokens, s.keys}, {0, 2, 1, 3});
    v = Strided(dtype, {s.batch, s.value_heads(), s.tokens, s.values}, {}, 1);
    d_out = Strided(dtype, {s.batch, s.value_heads(), s.tokens, s.values}, {}, 2);
    beta = Strided(sums, {s.batch, s.value_heads(), s.tokens}, {0, 2, 1});
    d_last = states();
    if (s.options) {
      gate = Strided(dtype, {s.batch, s.value_heads(), s.tokens});
      initial = states();
    }
    for (Strided* each : {&q, &v, &initial, &d_out, &d_last}) each->fill(random);
    k.fill(random, 1 / std::sqrt(2.0 * double(s.keys)));
    beta.fill(random, 0.25, 0.7);
    gate.fill(random, 0.1, -0.4);
  }
};

/// Outputs and gradients as the loop has them, in the order of compute().
std::vector<std::vector<double>> reference(const Case& s, const Inputs& in) {
  const Numbers q = in.q.leaves(), k = in.k.leaves(), v = in.v.leaves(), beta = in.beta.leaves(),
                gate = in.gate.leaves(), initial = in.initial.leaves();
  Numbers out(v.size()), last;
  for (const Run& run : s.cut().runs) {
    for (int64_t head = 0; head < s.value_heads(); ++head) {
      Numbers state(size_t(s.keys * s.values), Number(0));
      if (run.initial >= 0) {
        const auto from = initial.begin() + (run.initial * s.value_heads() + head) * s.keys * s.values;
        state.assign(from, from + s.keys * s.values);
      }
      for (int64_t t = run.begin; t < run.end; ++t) {
        const size_t of_value = size_t((run.batch * s.value_heads() + head) * s.tokens + t);
        const size_t of_key = size_t((run.batch * s.heads + head / s.group) * s.tokens + t);
        for (Number& each : state) each = s.options ? exp(gate[of_value]) * each : each;
        for (int64_t c = 0; c < s.values; ++c) {
          Number answer, y;
          for (int64_t i = 0; i < s.keys; ++i) {
            answer += k[of_key * size_t(s.keys) + size_t(i)] * state[size_t(i * s.values + c)];
          }
          const size_t at = of_value * size_t(s.values) + size_t(c);
          const Number written = beta[of_value] * (v[at] - answer);
          for (int64_t i = 0; i < s.keys; ++i) {
            Number& cell = state[size_t(i * s.values + c)];
            cell += k[of_key * size_t(s.keys) + size_t(i)] * written;
            y += q[of_key * size_t(s.keys) + size_t(i)] * cell;
          }
          out[at] = 0.5 * y;
        }
      }
      last.insert(last.end(), state.begin(), state.end());
    }
  }
  const Gradients g(weighted_sum(out, in.d_out.values()) + weighted_sum(last, in.d_last.values()));
  return {values_of(out), values_of(last), g.by(q),    g.by(k),
          g.by(v),        g.by(beta),      g.by(gate), g.by(initial)};
}

Named compute(const KernelTable& kernels, const Case& s, Inputs in, int threads) {
  const auto like = [](const Strided& x) { return Strided(x.memory.dtype(), x); };
  const auto layout = [](Strided& x) {
    return SequenceTensor{x.data(), x.stride(0), x.stride(2), x.stride(1)};
  };
  const auto numbers = [](Strided& x) {
    return GateTensor{x.data(), x.memory.dtype(), x.stride(0), x.stride(2), x.stride(1)};
  };
  Named results = {{"out", like(in.v)},       {"last", like(in.d_last)},
                   {"dq", like(in.q)},        {"dk", like(in.k)},
                   {"dv", like(in.v)},        {"d_beta", like(in.beta)},
                   {"d_gate", like(in.gate)}, {"d_initial", like(in.initial)}};
  const Sequences cut = s.cut();
  Array kept(sum_dtype(in.q.memory.dtype()),
             size_t(cut.boundaries * s.value_heads() * s.keys * s.values), NAN);
  DeltaRuleParams p;
  p.dtype = in.q.memory.dtype();
  p.batch = s.batch, p.heads = s.heads, p.value_heads = s.value_heads(), p.tokens = s.tokens;
  p.key_channels = s.keys, p.value_channels = s.values;
  p.q = layout(in.q), p.k = layout(in.k), p.v = layout(in.v), p.out = layout(results[0].second);
  p.beta = numbers(in.beta);
  if (s.options) p.gate = numbers(in.gate);
  p.scale = 0.5, p.runs = cut.table();
  p.initial = in.initial.data(), p.last = results[1].second.data();
  p.boundaries = kept.data(), p.threads = threads;
  kernels.delta_rule_forward(p);

  DeltaRuleGradients g;
  g.d_out = layout(in.d_out), g.dq = layout(results[2].second), g.dk = layout(results[3].second);
  g.dv = layout(results[4].second), g.d_beta = numbers(results[5].second);
  if (s.options) g.d_gate = numbers(results[6].second);
  g.d_last = in.d_last.data(), g.d_initial = results[7].second.data();
  kernels.delta_rule_backward(p, g);
  return results;
}

}  // namespace

TEST_CASE("the delta rule and its gradients agree with a scalar loop", "[delta_rule]") {
  // A gate's gradient is a sum over all tokens behind it, whose terms cancel.
  const auto units = [](const Case& s, size_t result) {
    return 64 + (result == 6 ? double(s.tokens) : 0);
  };
  check_agreement<Inputs>(cases(), {Dtype::kFloat, Dtype::kDouble, Dtype::kBfloat16}, reference, compute,
                          units);
}

TEST_CASE("a step of the delta rule is the whole of one token", "[delta_rule]") {
  const Case s{.name = "one token", .batch = 3, .tokens = 1, .group = 2, .keys = 9, .values = 70};
  for (const Dtype dtype : {Dtype::kFloat, Dtype::kDouble, Dtype::kBfloat16}) {
    Inputs in(s, dtype);
    for (const Level& level : levels()) {
      INFO(level.name << ", " << name_of(dtype));
      const Named whole = compute(*level.kernels, s, in, 1);
      Strided state = in.initial, out(dtype, in.v);
      const auto layout = [](Strided& x) {
        return SequenceTensor{x.data(), x.stride(0), 0, x.stride(1)};
      };
      const auto numbers = [](Strided& x) {
        return GateTensor{x.data(), x.memory.dtype(), x.stride(0), 0, x.stride(1)};
      };
      DeltaRuleStep p;
      p.dtype = dtype, p.batch = s.batch, p.heads = s.heads, p.value_heads = s.value_heads();
      p.key_channels = s.keys, p.value_channels = s.values;
      p.q = layout(in.q), p.k = layout(in.k), p.v = layout(in.v), p.out = layout(out);
      p.beta = numbers(in.beta), p.gate = numbers(in.gate), p.scale = 0.5;
      p.state = state.data();
      p.state_batch = state.stride(0), p.state_head = state.stride(1), p.state_row = state.stride(2);
      level.kernels->delta_rule_step(p);
      CHECK(distance(out.values(), whole[0].second.values()) <= allowed(dtype, 64, 2));
      CHECK(distance(state.values(), whole[1].second.values()) <= allowed(sum_dtype(dtype), 64, 2));
    }
  }
}
