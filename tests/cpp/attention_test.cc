// Attention's forward and backward kernels against the dense reference (attention_problem.h).
#include <utility>

#include "attention_problem.h"
#include "catch.h"
#include "kernels/scratch.h"
#include "levels.h"

using namespace longspan;
using namespace longspan::test;

namespace {

constexpr Dtype kDtypes[] = {Dtype::kFloat, Dtype::kDouble, Dtype::kBfloat16, Dtype::kHalf};

struct Case {
  const char* name;
  Problem problem;
};

template <class Change>
Case make(const char* name, const Change& change) {
  Case c{name, {}};
  change(c.problem);
  return c;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const char* name, const auto& change) { all.push_back(make(name, change)); };
  add("plain", [](Problem&) {});
  add("causal", [](Problem& p) { p.right = 0; });
  add("window", [](Problem& p) { p.left = 20, p.right = 5; });
  add("window and sink tokens",
      [](Problem& p) { p.left = 20, p.right = 0, p.sink_tokens = 3, p.tokens = p.keys = 200; });
  add("window of one key", [](Problem& p) { p.left = 0, p.right = 0; });
  add("fewer queries than keys", [](Problem& p) { p.keys = 133, p.right = 0; });
  add("queries that see nothing", [](Problem& p) { p.tokens = 133, p.right = 0; });
  add("one query", [](Problem& p) { p.tokens = 1, p.right = 0; });
  add("one key", [](Problem& p) { p.keys = 1; });
  add("no keys", [](Problem& p) { p.keys = 0; });
  add("no queries", [](Problem& p) { p.tokens = 0; });
  add("heads of 40 and 24", [](Problem& p) { p.channels = 40, p.value_channels = 24, p.right = 0; });
  add("heads of 7 and 5", [](Problem& p) { p.channels = 7, p.value_channels = 5; });
  add("heads of 8 and 9", [](Problem& p) { p.channels = 8, p.value_channels = 9; });
  add("heads of 128", [](Problem& p) { p.channels = p.value_channels = 128, p.scale = 0.1; });
  add("tokens outside heads", [](Problem& p) { p.tokens_outside = true, p.right = 0; });
  add("gaps between tokens", [](Problem& p) { p.gap = 3, p.right = 0; });
  add("negative scale", [](Problem& p) { p.scale = -0.3; });
  add("softcap", [](Problem& p) { p.softcap = 1.5, p.scale = 1, p.right = 0; });
  add("ALiBi", [](Problem& p) { p.slopes = {0.5, 0.25, 0.125, 0.0625}, p.right = 0; });
  add("ALiBi by batch, both sides", [](Problem& p) {
    p.slopes = {0.5, 0.25, 0.125, 0.0625, 0.3, 0.2, 0.1, 0}, p.slopes_by_batch = true, p.keys = 90;
  });
  add("sinks", [](Problem& p) { p.sinks = {0.5, -1, 3, 0}, p.right = 0; });
  add("sinks where nothing is seen",
      [](Problem& p) { p.sinks = {1, 2, 3, 4}, p.tokens = 90, p.right = 0; });
  add("boolean mask",
      [](Problem& p) { p.mask = MaskKind::kBoolean, p.mask_full = {true, true, true, true}; });
  add("boolean mask over keys", [](Problem& p) {
    p.mask = MaskKind::kBoolean, p.mask_full = {true, false, false, true}, p.right = 0;
  });
  add("additive mask",
      [](Problem& p) { p.mask = MaskKind::kAdditive, p.mask_full = {true, true, true, true}; });
  add("additive mask of all heads", [](Problem& p) {
    p.mask = MaskKind::kAdditive, p.mask_full = {true, false, true, true}, p.right = 0;
  });
  add("additive mask over keys", [](Problem& p) {
    p.mask = MaskKind::kAdditive, p.mask_full = {false, false, false, true}, p.keys = 100;
  });
  add("additive mask over queries, softcap", [](Problem& p) {
    p.mask = MaskKind::kAdditive, p.mask_full = {false, true, true, false}, p.softcap = 2, p.scale = 1;
  });
  add("dropout", [](Problem& p) { p.dropout = 0.3, p.right = 0; });
  add("ranges of keys", [](Problem& p) { p.ranges = {5, 61, 0, 0, 70, 3}, p.right = 0; });
  add("ranges, window and sink tokens", [](Problem& p) {
    p.tokens = 100, p.keys = 210, p.ranges = {7, 180, 80, 30, 210, 110}, p.left = 40, p.right = 0,
    p.sink_tokens = 4;
  });
  add("packed", [](Problem& p) {
    p.batch = 4, p.cu_q = {0, 70, 70, 71, 200}, p.cu_k = {0, 90, 95, 95, 230}, p.tokens = 200,
    p.keys = 230;
    p.right = 0;
  });
  add("packed, dropout and ALiBi", [](Problem& p) {
    p.batch = 3, p.cu_q = p.cu_k = {0, 33, 97, 150}, p.tokens = p.keys = 150, p.dropout = 0.2,
    p.left = 30;
    p.slopes = {0.5, 0.25, 0.125, 0.0625};
  });
  add("block lists",
      [](Problem& p) { p.query_block = 64, p.key_block = 16, p.tokens = 150, p.keys = 131; });
  add("block lists by head, tall blocks", [](Problem& p) {
    p.query_block = 128, p.key_block = 48, p.lists_by_head = true, p.tokens = 300, p.keys = 210;
  });
  add("block lists by batch and head, softcap and ALiBi", [](Problem& p) {
    p.query_block = p.key_block = 64, p.lists_by_batch = p.lists_by_head = true, p.tokens = 70;
    p.keys = 200, p.softcap = 3, p.slopes = {0.02, 0.01, 0.03, 0};
  });
  add("block lists, one head, keys in several shares", [](Problem& p) {
    p.query_block = 64, p.key_block = 128, p.batch = p.heads = p.kv_heads = 1, p.tokens = 130;
    p.keys = 1100;
  });
  add("keys in several shares", [](Problem& p) {
    p.batch = 1, p.heads = p.kv_heads = 1, p.tokens = 65, p.keys = 4200, p.right = 0, p.sinks = {2};
  });
  add("everything at once", [](Problem& p) {
    p.keys = 140, p.tokens_outside = true, p.left = 50, p.right = 10, p.sink_tokens = 2, p.softcap = 3;
    p.scale = 0.7, p.dropout = 0.1, p.slopes = {0.02, 0.01, 0.03, 0}, p.sinks = {1, 0, -1, 2};
    p.mask = MaskKind::kAdditive, p.mask_full = {true, true, true, true};
  });
  return all;
}

/// Units of rounding (of the dtype, at the size of the greatest number) that a result may be away.
/// Gradients in 16 bits carry the rounding of P and dS, each of which is rounded before its product.
double allowed(Dtype dtype, bool gradient) {
  const bool wide = dtype == Dtype::kFloat || dtype == Dtype::kDouble;
  return epsilon_of(dtype) * (wide ? 32 : gradient ? 6 : 3);
}

void check_case(const Case& c, Dtype dtype) {
  Problem p = c.problem;
  p.dtype = dtype;
  Inputs in(p, 1);
  const Results expected = reference(p, in);
  for (const Level& level : levels()) {
    INFO(level.name << ", " << name_of(dtype) << ", " << c.name);
    const Results got = compute(*level.kernels, p, in);
    const double forward = allowed(dtype, false), backward = allowed(dtype, true);
    CHECK(distance(got.out, expected.out) <= forward);
    CHECK(distance(got.lse, expected.lse) <= forward);
    CHECK(distance(got.dq, expected.dq) <= backward);
    CHECK(distance(got.dk, expected.dk) <= backward);
    CHECK(distance(got.dv, expected.dv) <= backward);
    CHECK(distance(got.d_mask, expected.d_mask) <= backward);
    CHECK(distance(got.d_sinks, expected.d_sinks) <= backward);
  }
}

void check_same(const Results& got, const Results& expected) {
  CHECK(got.out == expected.out);
  CHECK(got.lse == expected.lse);
  CHECK(got.dq == expected.dq);
  CHECK(got.dk == expected.dk);
  CHECK(got.dv == expected.dv);
  CHECK(got.d_mask == expected.d_mask);
  CHECK(got.d_sinks == expected.d_sinks);
}

/// Tokens [first, end) of (heads of all batch entries) x tokens x channels.
std::vector<double> tokens_of(const std::vector<double>& x, int64_t tokens, int64_t channels,
                              int64_t first, int64_t end) {
  std::vector<double> part;
  for (size_t row = 0; row < x.size(); row += size_t(tokens * channels)) {
    part.insert(part.end(), x.begin() + int64_t(row) + first * channels,
                x.begin() + int64_t(row) + end * channels);
  }
  return part;
}

}  // namespace

TEST_CASE("attention agrees with the dense reference", "[attention]") {
  for (const Case& c : cases()) {
    for (const Dtype dtype : kDtypes) check_case(c, dtype);
  }
}

TEST_CASE("any number of threads gives the same bits", "[attention]") {
  for (const Case& c : cases()) {
    for (const Dtype dtype : {Dtype::kFloat, Dtype::kBfloat16}) {
      Problem p = c.problem;
      p.dtype = dtype;
      Inputs in(p, 2);
      for (const Level& level : levels()) {
        const Results one = compute(*level.kernels, p, in, 1);
        for (const int threads : {2, 3, 7}) {
          INFO(level.name << ", " << name_of(dtype) << ", " << c.name << ", " << threads << " threads");
          check_same(compute(*level.kernels, p, in, threads), one);
        }
      }
    }
  }
}

TEST_CASE("what is not seen has no effect, not even as NaN", "[attention]") {
  for (const Dtype dtype : kDtypes) {
    for (const double bad : {double(NAN), double(INFINITY), -double(INFINITY)}) {
      for (const Level& level : levels()) {
        INFO(level.name << ", " << name_of(dtype) << ", " << bad);
        Problem p;
        p.dtype = dtype;
        p.ranges = {3, 50, 0, 3, 50, 0};  // keys 0 to 2 and 50 onwards are seen by nobody
        p.mask = MaskKind::kBoolean, p.mask_full = {false, false, false, true};
        Inputs in(p, 3);
        in.visible[20] = 0;  // nor is this one
        const Results clean = compute(*level.kernels, p, in);
        Inputs dirty = in;
        for (const int64_t key : {0, 2, 20, 50, 63, 64, 69}) {
          dirty.k.fill_row(key, bad);
          dirty.v.fill_row(key, bad);
        }
        const Results got = compute(*level.kernels, p, dirty);
        check_same(got, clean);
        for (const int64_t key : {2, 20, 50, 69}) {
          for (const double x : tokens_of(got.dk, 70, 16, key, key + 1)) CHECK(x == 0);
          for (const double x : tokens_of(got.dv, 70, 16, key, key + 1)) CHECK(x == 0);
        }
      }
    }
  }
}

TEST_CASE("a bad key or query harms only who sees it", "[attention]") {
  for (const Dtype dtype : kDtypes) {
    for (const double bad : {double(NAN), double(INFINITY)}) {
      for (const Level& level : levels()) {
        INFO(level.name << ", " << name_of(dtype) << ", " << bad);
        Problem p;
        p.dtype = dtype, p.right = 0;
        Inputs in(p, 4);
        const Results clean = compute(*level.kernels, p, in);
        Inputs late = in;
        late.k.fill_row(40, bad);
        late.v.fill_row(40, bad);
        const Results before = compute(*level.kernels, p, late);
        CHECK(tokens_of(before.out, 70, 16, 0, 40) == tokens_of(clean.out, 70, 16, 0, 40));
        CHECK(tokens_of(before.dq, 70, 16, 0, 40) == tokens_of(clean.dq, 70, 16, 0, 40));
        Inputs early = in;
        early.q.fill_row(10, bad);
        early.d_out.fill_row(10, bad);
        const Results after = compute(*level.kernels, p, early);
        CHECK(tokens_of(after.out, 70, 16, 11, 70) == tokens_of(clean.out, 70, 16, 11, 70));
        CHECK(tokens_of(after.dq, 70, 16, 11, 70) == tokens_of(clean.dq, 70, 16, 11, 70));
        CHECK(tokens_of(after.dk, 70, 16, 11, 70) == tokens_of(clean.dk, 70, 16, 11, 70));
        CHECK(tokens_of(after.dv, 70, 16, 11, 70) == tokens_of(clean.dv, 70, 16, 11, 70));
      }
    }
  }
}

TEST_CASE("great and small scores neither overflow nor vanish", "[attention]") {
  for (const double scale : {1e-6, 50.}) {
    Problem p;
    p.dtype = Dtype::kDouble, p.scale = scale, p.right = 0;
    Inputs in(p, 5);
    const Results expected = reference(p, in);
    for (const Level& level : levels()) {
      INFO(level.name << ", scale " << scale);
      const Results got = compute(*level.kernels, p, in);
      CHECK(distance(got.out, expected.out) <= 1e-12);
      CHECK(distance(got.dk, expected.dk) <= 1e-12);
    }
  }
}

TEST_CASE("working memory is linear in the sequence length", "[attention]") {
  for (const Level& level : levels()) {
    INFO(level.name);
    const auto peak = [&](int64_t length) {
      Problem p;
      p.batch = p.heads = p.kv_heads = 1, p.tokens = p.keys = length, p.right = 0;
      Inputs in(p, 6);
      scratch_reset_peak();
      compute(*level.kernels, p, in, 2);
      return double(scratch_peak());
    };
    // From 3072 keys on a head's keys are shared by 16 tasks, however many there are; equal steps of
    // length then take equal steps of memory, where a square would take 7 / 5 of the first for the
    // second.
    const double first = peak(6144) - peak(4096), second = peak(8192) - peak(6144);
    CHECK(first > 0);
    CHECK(second < 1.1 * first);
  }
}
