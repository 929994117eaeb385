// Attention, densely and in double: every score written out, and the gradients by the chain rule. What
// the kernels are compared with.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "kernels/attention.h"
#include "kernels/table.h"
#include "numbers.h"

namespace longspan::test {

/// (B, H, T, C) in memory, head by head or token by token, with a gap behind each token.
class Heads {
 public:
  Heads() = default;
  Heads(Dtype dtype, std::array<int64_t, 4> shape, bool tokens_outside, int64_t gap);
  AttentionTensor view();
  size_t index(int64_t b, int64_t h, int64_t t, int64_t c) const {
    return size_t(b * batch_ + h * head_ + t * token_ + c);
  }
  double at(int64_t b, int64_t h, int64_t t, int64_t c) const { return memory[index(b, h, t, c)]; }
  void fill(Random& random);
  void fill_row(int64_t t, double x);  ///< of every batch entry and head
  std::vector<double> values() const;  ///< in the order of the shape

  std::array<int64_t, 4> shape{};
  Array memory;

 private:
  int64_t batch_ = 0, head_ = 0, token_ = 0;
};

enum class MaskKind { kNone, kBoolean, kAdditive };

/// The shape and the options of a call; tensors are Inputs.
struct Problem {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 2, heads = 4, kv_heads = 2, tokens = 70, keys = 70, channels = 16, value_channels = 16;
  bool tokens_outside = false;
  int64_t gap = 0;
  int64_t left = -1, right = -1, sink_tokens = 0;
  double scale = 0.3, softcap = 0, dropout = 0;
  uint64_t seed = 0x123456789abcdef;
  std::vector<double> slopes, sinks;
  bool slopes_by_batch = false;
  std::vector<int64_t> cu_q, cu_k, ranges;
  MaskKind mask = MaskKind::kNone;
  std::array<bool, 4> mask_full{};  ///< which dimensions the mask has; it is broadcast over the others
  int64_t query_block = 0, key_block = 0;  ///< of block lists, where there are any...
  bool lists_by_batch = false, lists_by_head = false;  ///< ... which are shared otherwise

  /// Packed sequences are one row of memory.
  int64_t rows() const { return cu_q.empty() ? batch : 1; }
  Dtype lse_dtype() const { return dtype == Dtype::kDouble ? Dtype::kDouble : Dtype::kFloat; }
  std::array<int64_t, 4> mask_shape() const;
  int64_t lists() const { return (lists_by_batch ? batch : 1) * (lists_by_head ? heads : 1); }
};

/// AttentionBlocks with the memory behind them: of the blocks of scores a third are in no list, a third
/// are seen whole, and in the others each query sees two of three keys, if it sees any.
struct BlockLists {
  explicit BlockLists(const Problem& p, Random& random);
  AttentionBlocks view() const;
  bool sees(int64_t list, int64_t query, int64_t key) const {
    return seen[size_t((list * tokens + query) * keys + key)];
  }

 private:
  int64_t tokens, keys, query_block, key_block, batch_stride, head_stride;
  std::vector<unsigned char> seen;  ///< [list][query][key]
  std::vector<int64_t> row_begins, column_begins;
  std::vector<int32_t> columns, row_patterns, rows, column_patterns;
  std::vector<uint64_t> bits;
};

struct Inputs {
  Inputs(const Problem& p, uint32_t seed);
  Heads q, k, v, d_out;
  Array d_lse;
  Array mask;  ///< additive
  std::vector<unsigned char> visible;  ///< boolean
  std::optional<BlockLists> blocks;
};

struct Results {
  std::vector<double> out, lse, dq, dk, dv, d_mask, d_sinks;
};

Results reference(const Problem& p, const Inputs& in);

/// The kernels' forward and, unless told otherwise, all gradients. Outputs hold NaN before.
Results compute(const KernelTable& kernels, const Problem& p, Inputs& in, int threads = 2,
                bool backward = true);

}  // namespace longspan::test
