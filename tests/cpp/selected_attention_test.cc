// selected_attention against dense attention under the mask that its lists are, in exactly as much
// memory as it may touch; and select_blocks' attention to compressed keys likewise.
#include "kernels/selected_attention.h"

#include "attention_problem.h"
#include "catch.h"
#include "levels.h"

using namespace longspan;
using namespace longspan::test;

namespace {

struct Case {
  const char* name;
  Problem p;
  int64_t block_size, list_heads;
};

template <class Change>
Case make(const char* name, int64_t block_size, int64_t list_heads, const Change& change) {
  Case c{name, {}, block_size, list_heads};
  c.p.right = 0;
  c.p.mask = MaskKind::kBoolean, c.p.mask_full = {true, true, true, true};
  change(c.p);
  return c;
}

std::vector<Case> cases() {
  return {
      make("groups", 16, 2, [](Problem&) {}),
      make("a list a head", 32, 4, [](Problem& p) { p.tokens_outside = true, p.gap = 3; }),
      make("many heads on one", 8, 1, [](Problem& p) { p.heads = 40, p.kv_heads = 1, p.batch = 1; }),
      make("a group of more rows than a tile", 16, 1,
           [](Problem& p) { p.heads = 70, p.kv_heads = 1, p.batch = 1, p.tokens = 9; }),
      make("odd sizes", 23, 2, [](Problem& p) { p.channels = 7, p.value_channels = 21, p.keys = 131; }),
      make("not causal", 16, 2, [](Problem& p) { p.right = -1, p.tokens = 5; }),
      make("a step", 64, 2, [](Problem& p) { p.tokens = 1, p.keys = 500; }),
      make("one block in several segments", 16, 1,
           [](Problem& p) { p.heads = 2, p.kv_heads = 1, p.batch = 1, p.tokens = p.keys = 600; }),
  };
}

/// Half of the blocks for each query, block 0 always; and the same as `visible`.
struct Lists {
  std::vector<int64_t> begins{0};
  std::vector<int32_t> blocks;

  Lists(const Case& c, Inputs& in) {
    const Problem& p = c.p;
    const int64_t all = (p.keys + c.block_size - 1) / c.block_size, group = p.heads / c.list_heads;
    Random random(3);
    std::fill(in.visible.begin(), in.visible.end(), 0);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t list = 0; list < c.list_heads; ++list) {
        for (int64_t t = 0; t < p.tokens; ++t) {
          for (int64_t j = 0; j < all; ++j) {
            if (j > 0 && random.below(2)) continue;
            blocks.push_back(int32_t(j));
            for (int64_t h = list * group; h < (list + 1) * group; ++h) {
              for (int64_t k = j * c.block_size; k < std::min((j + 1) * c.block_size, p.keys); ++k) {
                in.visible[size_t(((b * p.heads + h) * p.tokens + t) * p.keys + k)] = 1;
              }
            }
          }
          begins.push_back(int64_t(blocks.size()));
        }
      }
    }
  }
};

Results run(const KernelTable& kernels, const Case& c, const Lists& lists, Inputs& in, int threads) {
  const Problem& p = c.p;
  const auto heads = [&](int64_t h, int64_t t, int64_t channels) {
    Heads x(p.dtype, {p.batch, h, t, channels}, p.tokens_outside, p.gap);
    return x;
  };
  Heads out = heads(p.heads, p.tokens, p.value_channels), dq = heads(p.heads, p.tokens, p.channels),
        dk = heads(p.kv_heads, p.keys, p.channels), dv = heads(p.kv_heads, p.keys, p.value_channels);
  Array lse(p.lse_dtype(), size_t(p.batch * p.heads * p.tokens), NAN);
  SelectedParams s;
  s.dtype = p.dtype, s.batch = p.batch, s.heads = p.heads, s.kv_heads = p.kv_heads;
  s.list_heads = c.list_heads, s.tokens = p.tokens, s.keys = p.keys, s.channels = p.channels;
  s.value_channels = p.value_channels, s.block_size = c.block_size;
  s.q = in.q.view(), s.k = in.k.view(), s.v = in.v.view(), s.out = out.view(), s.lse = lse.data();
  s.begins = lists.begins.data(), s.blocks = lists.blocks.data();
  s.causal = p.right == 0, s.scale = p.scale, s.threads = threads;
  kernels.selected_attention_forward(s);
  SelectedGradients g;
  g.d_out = in.d_out.view(), g.d_lse = in.d_lse.data();
  g.dq = dq.view(), g.dk = dk.view(), g.dv = dv.view();
  kernels.selected_attention_backward(s, g);
  Results r;
  r.out = out.values(), r.dq = dq.values(), r.dk = dk.values(), r.dv = dv.values();
  for (size_t i = 0; i < lse.size(); ++i) r.lse.push_back(lse[i]);
  return r;
}

}  // namespace

TEST_CASE("selected attention agrees with the dense reference", "[selected]") {
  for (Case c : cases()) {
    for (const Dtype dtype : {Dtype::kFloat, Dtype::kDouble, Dtype::kBfloat16, Dtype::kHalf}) {
      c.p.dtype = dtype;
      Inputs in(c.p, 1);
      const Lists lists(c, in);
      const Results expected = reference(c.p, in);
      const bool wide = dtype == Dtype::kFloat || dtype == Dtype::kDouble;
      const double unit = epsilon_of(dtype) * (wide ? 64 : 2);
      for (const Level& level : levels()) {
        INFO(level.name << ", " << name_of(dtype) << ", " << c.name);
        const Results one = run(*level.kernels, c, lists, in, 1);
        CHECK(distance(one.out, expected.out) <= unit);
        CHECK(distance(one.lse, expected.lse) <= unit);
        CHECK(distance(one.dq, expected.dq) <= unit);
        CHECK(distance(one.dk, expected.dk) <= unit);
        CHECK(distance(one.dv, expected.dv) <= unit);
        const Results three = run(*level.kernels, c, lists, in, 3);
        CHECK(three.out == one.out);
        CHECK(three.lse == one.lse);
        CHECK(three.dq == one.dq);
        CHECK(three.dk == one.dk);
        CHECK(three.dv == one.dv);
      }
    }
  }
}

TEST_CASE("a choice of blocks attends to the compressed keys too", "[selected]") {
  constexpr int64_t kKeys = 280, kLength = 8, kStride = 4, kBlock = 16, kCount = 3;
  for (const Dtype dtype : {Dtype::kFloat, Dtype::kDouble}) {
    Problem p;
    p.dtype = dtype, p.tokens = 150, p.keys = (kKeys - kLength) / kStride + 1;
    p.mask = MaskKind::kBoolean, p.mask_full = {false, false, true, true};
    Inputs in(p, 1);
    for (int64_t t = 0; t < p.tokens; ++t) {
      for (int64_t c = 0; c < p.keys; ++c) {
        in.visible[size_t(t * p.keys + c)] = c * kStride + kLength - 1 <= t + kKeys - p.tokens;
      }
    }
    const Results expected = reference(p, in);
    for (const Level& level : levels()) {
      INFO(level.name << ", " << name_of(dtype));
      Heads out(dtype, {p.batch, p.heads, p.tokens, p.value_channels}, true, 1);
      Array lse(p.lse_dtype(), size_t(p.batch * p.heads * p.tokens), NAN);
      std::vector<int64_t> indices(size_t(p.batch * p.kv_heads * p.tokens * kCount), -7);
      SelectBlocksParams s;
      s.dtype = dtype, s.batch = p.batch, s.heads = p.heads, s.kv_heads = p.kv_heads;
      s.tokens = p.tokens, s.keys = kKeys, s.compressed = p.keys;
      s.channels = p.channels, s.value_channels = p.value_channels;
      s.q = in.q.view(), s.k = in.k.view(), s.v = in.v.view(), s.out = out.view(), s.lse = lse.data();
      s.length = kLength, s.stride = kStride, s.block_size = kBlock, s.count = kCount;
      s.scale = p.scale, s.indices = indices.data(), s.threads = 2;
      level.kernels->select_blocks(s);
      std::vector<double> sums;
      for (size_t i = 0; i < lse.size(); ++i) sums.push_back(lse[i]);
      CHECK(distance(out.values(), expected.out) <= epsilon_of(dtype) * 32);
      CHECK(distance(sums, expected.lse) <= epsilon_of(dtype) * 32);
      for (size_t i = 0; i < indices.size(); i += kCount) {
        const int64_t t = int64_t(i) / kCount % p.tokens, own = (t + kKeys - p.tokens) / kBlock;
        CHECK(indices[i] == 0);
        CHECK(indices[i + 1] == own - 1);
        CHECK(indices[i + 2] == own);
      }
    }
  }
}
