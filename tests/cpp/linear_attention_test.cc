// Linear attention against a scalar loop, token by token.
#include "agreement.h"
#include "kernels/table.h"
#include "sequences.h"

using namespace longspan;
using namespace longspan::test;

namespace {

struct Case {
  const char* name;
  int64_t batch = 2, tokens = 37, kv_heads = 2, group = 1, channels = 5, values = 7;
  Gate gate = Gate::kNone;
  bool normalized = false, initial = true;
  int64_t keys = -1;               ///< not causal: how many tokens k and v have
  std::vector<int64_t> cuts = {};  ///< where sequences end within the single row

  int64_t heads() const { return kv_heads * group; }
  bool causal() const { return keys < 0; }
  int64_t key_tokens() const { return causal() ? tokens : keys; }
  int64_t sequences() const { return cuts.empty() ? batch : int64_t(cuts.size()) + 1; }
  Sequences cut(int64_t length) const {
    Sequences all;
    int64_t begin = 0;
    for (int64_t s = 0; s < sequences(); ++s) {
      if (cuts.empty()) {
        all.add({s, 0, length, initial ? s : -1, s});
      } else {
        const int64_t end = s + 1 < sequences() ? cuts[size_t(s)] : length;
        all.add({0, begin, end, initial ? s : -1, s});
        begin = end;
      }
    }
    return all;
  }
};

std::vector<Case> cases() {
  std::vector<Case> all = {
      {.name = "plain"},
      {.name = "no initial states", .initial = false},
      {.name = "a vector's width", .batch = 1, .channels = 16, .values = 32},
      {.name = "one token", .tokens = 1},
      {.name = "no token", .tokens = 0},
      {.name = "not causal", .keys = 21},
      {.name = "not causal, normalized, groups", .group = 2, .normalized = true, .keys = 300},
      {.name = "not causal, packed", .batch = 1, .tokens = 50, .keys = 50, .cuts = {1, 1, 20}},
  };
  for (const Gate gate : {Gate::kNone, Gate::kToken, Gate::kChannel}) {
    for (const bool normalized : {false, true}) {
      all.push_back({.name = "groups", .group = 3, .gate = gate, .normalized = normalized});
      all.push_back({.name = "packed",
                     .batch = 1,
                     .tokens = 50,
                     .gate = gate,
                     .normalized = normalized,
                     .cuts = {1, 1, 20}});
      all.push_back({.name = "two spans, few heads",
                     .batch = 1,
                     .tokens = 290,
                     .kv_heads = 1,
                     .channels = 3,
                     .values = 4,
                     .gate = gate,
                     .normalized = normalized});
      all.push_back({.name = "two spans, many heads",
                     .batch = 1,
                     .tokens = 290,
                     .kv_heads = 8,
                     .channels = 1,
                     .values = 2,
                     .gate = gate,
                     .normalized = normalized});
    }
  }
  return all;
}

struct Inputs {
  Strided q, k, v, gate, initial, initial_norm, d_out, d_last, d_last_norm;

  Inputs(const Case& s, Dtype dtype) {
    Random random(7);
    const Dtype sums = sum_dtype(dtype);
    // Tokens outside heads, as a layer's projections leave them; v's and d_out's are inside.
    q = Strided(dtype, {s.batch, s.heads(), s.tokens, s.channels}, {0, 2, 1, 3}, 3);
    k = Strided(dtype, {s.batch, s.kv_heads, s.key_tokens(), s.channels}, {0, 2, 1, 3});
    v = Strided(dtype, {s.batch, s.kv_heads, s.key_tokens(), s.values}, {}, 1);
    d_out = Strided(dtype, {s.batch, s.heads(), s.tokens, s.values}, {}, 2);
    d_last = Strided(sums, {s.sequences(), s.heads(), s.channels, s.values});
    if (s.normalized) d_last_norm = Strided(sums, {s.sequences(), s.heads(), s.channels});
    if (s.initial) initial = d_last;
    if (s.initial) initial_norm = d_last_norm;
    if (s.gate != Gate::kNone) {
      gate = Strided(sums, {s.batch, s.heads(), s.tokens, s.gate == Gate::kToken ? 1 : s.channels});
    }
    for (Strided* each : {&v, &initial, &d_out, &d_last, &d_last_norm}) each->fill(random);
    // Of one sign, far from zero: what a normaliser is made of.
    for (Strided* each : {&q, &k, &initial_norm}) each->fill(random, 0.05, 0.6);
    gate.fill(random, 0.1, -0.4);
  }
};

constexpr double kEps = 0.5, kScale = 0.5;

/// Outputs and gradients as the loop has them, in the order of compute().
std::vector<std::vector<double>> reference(const Case& s, const Inputs& in) {
  const Numbers q = in.q.leaves(), k = in.k.leaves(), v = in.v.leaves(), gate = in.gate.leaves(),
                initial = in.initial.leaves(), initial_norm = in.initial_norm.leaves();
  const int64_t size = s.channels * s.values, gates = s.gate == Gate::kToken ? 1 : s.channels;
  Numbers out(in.d_out.values().size()), last, last_norm;
  const Sequences queries = s.cut(s.tokens), keys = s.cut(s.key_tokens());
  for (size_t index = 0; index < queries.runs.size(); ++index) {
    const Run &run = queries.runs[index], &key_run = keys.runs[index];
    for (int64_t head = 0; head < s.heads(); ++head) {
      Numbers state(size_t(size), Number(0)), norm(size_t(s.channels), Number(0));
      const int64_t own = run.initial * s.heads() + head;
      if (s.initial) state.assign(initial.begin() + own * size, initial.begin() + (own + 1) * size);
      if (s.initial && s.normalized) {
        const auto from = initial_norm.begin() + own * s.channels;
        norm.assign(from, from + s.channels);
      }
      const auto write = [&](int64_t t) {
        const size_t token = size_t((run.batch * s.kv_heads + head / s.group) * s.key_tokens() + t);
        for (int64_t i = 0; i < s.channels; ++i) {
          const Number key = k[token * size_t(s.channels) + size_t(i)];
          Number decay(1);
          if (s.gate != Gate::kNone) {
            const int64_t at = (run.batch * s.heads() + head) * s.tokens + t;
            decay = exp(gate[size_t(at * gates + (gates > 1 ? i : 0))]);
          }
          for (int64_t c = 0; c < s.values; ++c) {
            Number& cell = state[size_t(i * s.values + c)];
            cell = decay * cell + key * v[token * size_t(s.values) + size_t(c)];
          }
          norm[size_t(i)] = decay * norm[size_t(i)] + key;
        }
      };
      const auto read = [&](int64_t t) {
        const size_t token = size_t((run.batch * s.heads() + head) * s.tokens + t);
        Number sum;
        for (int64_t i = 0; i < s.channels; ++i) {
          sum += q[token * size_t(s.channels) + size_t(i)] * norm[size_t(i)];
        }
        const Number by = s.normalized ? inverse(kScale * sum + kEps) : Number(1);
        for (int64_t c = 0; c < s.values; ++c) {
          Number y;
          for (int64_t i = 0; i < s.channels; ++i) {
            y += q[token * size_t(s.channels) + size_t(i)] * state[size_t(i * s.values + c)];
          }
          out[token * size_t(s.values) + size_t(c)] = kScale * y * by;
        }
      };
      if (!s.causal()) {
        for (int64_t t = key_run.begin; t < key_run.end; ++t) write(t);
      }
      for (int64_t t = run.begin; t < run.end; ++t) {
        if (s.causal()) write(t);
        read(t);
      }
      last.insert(last.end(), state.begin(), state.end());
      if (s.normalized) last_norm.insert(last_norm.end(), norm.begin(), norm.end());
    }
  }
  const Gradients g(weighted_sum(out, in.d_out.values()) + weighted_sum(last, in.d_last.values()) +
                    weighted_sum(last_norm, in.d_last_norm.values()));
  return {values_of(out), values_of(last), values_of(last_norm), g.by(q),           g.by(k),
          g.by(v),        g.by(gate),      g.by(initial),        g.by(initial_norm)};
}

Named compute(const KernelTable& kernels, const Case& s, Inputs in, int threads) {
  const auto like = [](const Strided& x) { return Strided(x.memory.dtype(), x); };
  const auto layout = [](Strided& x) {
    return SequenceTensor{x.data(), x.stride(0), x.stride(2), x.stride(1)};
  };
  const auto gates = [](Strided& x) {
    return GateTensor{x.data(), x.memory.dtype(), x.stride(0), x.stride(2), x.stride(1), x.stride(3)};
  };
  Named results = {{"out", like(in.d_out)},
                   {"last", like(in.d_last)},
                   {"last_norm", like(in.d_last_norm)},
                   {"dq", like(in.q)},
                   {"dk", like(in.k)},
                   {"dv", like(in.v)},
                   {"d_gate", like(in.gate)},
                   {"d_initial", like(in.initial)},
                   {"d_initial_norm", like(in.initial_norm)}};
  const Sequences cut = s.cut(s.tokens), key_cut = s.cut(s.key_tokens());
  const Dtype sums = sum_dtype(in.q.memory.dtype());
  const int64_t kept_states = s.causal() ? cut.boundaries : s.sequences();
  Array kept(sums, size_t(kept_states * s.heads() * s.channels * (s.values + s.normalized)), NAN);
  Array denominators(sums, size_t(s.batch * s.heads() * s.tokens), NAN);
  LinearAttentionParams p;
  p.dtype = in.q.memory.dtype();
  p.batch = s.batch, p.heads = s.heads(), p.kv_heads = s.kv_heads, p.tokens = s.tokens;
  p.key_channels = s.channels, p.value_channels = s.values;
  p.q = layout(in.q), p.k = layout(in.k), p.v = layout(in.v), p.out = layout(results[0].second);
  p.kind = s.gate;
  if (s.gate != Gate::kNone) p.gate = gates(in.gate);
  p.scale = kScale, p.eps = kEps, p.normalized = s.normalized;
  p.causal = s.causal(), p.runs = cut.table(), p.key_runs = key_cut.table();
  p.initial = in.initial.data(), p.initial_norm = in.initial_norm.data();
  p.last = results[1].second.data(), p.last_norm = results[2].second.data();
  p.denominators = denominators.data(), p.boundaries = kept.data(), p.threads = threads;
  kernels.linear_attention_forward(p);

  LinearAttentionGradients g;
  g.d_out = layout(in.d_out), g.dq = layout(results[3].second), g.dk = layout(results[4].second);
  g.dv = layout(results[5].second);
  if (s.gate != Gate::kNone) g.d_gate = gates(results[6].second);
  g.d_last = in.d_last.data(), g.d_last_norm = in.d_last_norm.data();
  g.d_initial = results[7].second.data(), g.d_initial_norm = results[8].second.data();
  kernels.linear_attention_backward(p, g);
  return results;
}

}  // namespace

TEST_CASE("linear attention and its gradients agree with a scalar loop", "[linear_attention]") {
  // A gate's gradient is a sum over all tokens behind it, whose terms cancel.
  const auto units = [](const Case& s, size_t result) {
    return 64 + (result == 6 ? double(s.tokens) : 0);
  };
  check_agreement<Inputs>(cases(), {Dtype::kFloat, Dtype::kDouble}, reference, compute, units);
  // A normaliser's gradient is made from the output as it was rounded; half precisions with one are
  // compared with torch's in Python.
  std::vector<Case> exact = cases();
  std::erase_if(exact, [](const Case& s) { return s.normalized; });
  check_agreement<Inputs>(exact, {Dtype::kBfloat16, Dtype::kHalf}, reference, compute, units);
}
