// What the kernels of selected_attention.h share. A token's heads that share a list are the rows of a
// tile, keys and then channels its lanes, so that a list is one token's alone:
//
//     S [heads][keys]       = Q [heads][channels] K^T     K^T of a block, from memory turned once
//     O [heads][channels]  += P [heads][keys] V           V of a block as it lies
//
// A block's forms are made ahead for all blocks where they are visited more often than there are
// blocks, and else (decoding) at each visit.
#pragma once

#include "kernels/attention_geometry.h"
#include "kernels/parallel.h"
#include "kernels/selected_attention.h"

namespace longspan::LONGSPAN_ISA {

/// Blocks of a tensor of keys, turned ([channels][width], keys along lanes) or as rows
/// ([block][row_width], channels along lanes), in the accumulation's type.
template <class Dot>
class BlockForm {
  using T = typename Dot::Sum;

 public:
  BlockForm() = default;
  BlockForm(const AttentionTensor& x, Dtype dtype, int64_t kv_heads, int64_t keys, int64_t channels,
            int64_t block_size, bool turned)
      : x_(x), dtype_(dtype), kv_heads_(kv_heads), keys_(keys), channels_(channels), block_(block_size),
        blocks_(ceil_div(keys, block_size)), turned_(turned) {
    width_ = round_up(turned ? block_size : channels, kLanes<T>);
    in_place_ = !turned && is_native<Dot>(dtype) && channels == width_;
    size_ = in_place_ ? 0 : width_ * (turned ? channels : block_size);
  }

  int64_t size() const { return size_; }  ///< of one block
  int64_t width() const { return width_; }

  /// Makes all blocks, in all[batch * kv_heads * blocks * size()].
  void make_ahead(int64_t batch, int threads, T* all) {
    if (in_place_) return;
    parallel_for(batch * kv_heads_ * blocks_, threads, [&](int64_t i, int) {
      make(i / (kv_heads_ * blocks_), i / blocks_ % kv_heads_, i % blocks_, all + i * size_);
    });
    all_ = all;
  }

  /// scratch: size() elements. The lanes of keys that there are not hold anything.
  LS_INLINE Operand<Dot> block(int64_t b, int64_t kv_head, int64_t j, T* scratch) const {
    if (in_place_) {
      const TokenRows rows = rows_of(x_, dtype_, b, kv_head, j * block_);
      return {static_cast<const T*>(rows.data), rows.stride};
    }
    if (all_) return {all_ + ((b * kv_heads_ + kv_head) * blocks_ + j) * size_, width_};
    make(b, kv_head, j, scratch);
    return {scratch, width_};
  }

 private:
  void make(int64_t b, int64_t kv_head, int64_t j, T* out) const {
    const TokenRows rows = rows_of(x_, dtype_, b, kv_head, j * block_);
    const int64_t n = min_of(block_, keys_ - j * block_);
    if (turned_) {
      transposed<Dot>(rows, n, channels_, out, width_);
    } else {
      copy_rows<T>(rows, n, channels_, width_, nullptr, out);
    }
  }

  AttentionTensor x_;
  Dtype dtype_ = Dtype::kFloat;
  int64_t kv_heads_ = 0, keys_ = 0, channels_ = 0, block_ = 0, blocks_ = 0, width_ = 0, size_ = 0;
  bool turned_ = false, in_place_ = false;
  const T* all_ = nullptr;
};

/// Where lists and rows are.
struct SelectedGeometry {
  const SelectedParams& p;
  int64_t group, blocks, lists;

  explicit SelectedGeometry(const SelectedParams& params)
      : p(params), group(p.heads / max_of<int64_t>(1, p.list_heads)),
        blocks(ceil_div(p.keys, p.block_size)), lists(p.batch * p.list_heads * p.tokens) {}

  LS_INLINE int64_t entries() const { return p.begins[lists]; }
  LS_INLINE bool ahead() const { return entries() >= p.batch * p.kv_heads * blocks; }
  LS_INLINE int64_t kv_head(int64_t list_head) const {
    return list_head * group / (p.heads / p.kv_heads);
  }
  /// How many keys of block j query t sees, from the block's first.
  LS_INLINE int64_t seen(int64_t b, int64_t t, int64_t j) const {
    const int64_t end = p.lengths ? p.lengths[b] : p.keys;
    const int64_t last = p.causal ? min_of(end, t + end - p.tokens + 1) : end;
    return max_of<int64_t>(0, min_of(p.block_size, last - j * p.block_size));
  }
  /// Row r of a list's heads.
  LS_INLINE TokenRows row(const AttentionTensor& x, int64_t b, int64_t list_head, int64_t t) const {
    TokenRows rows = rows_of(x, p.dtype, b, list_head * group, t);
    rows.stride = x.head;
    return rows;
  }
  LS_INLINE int64_t lse_at(int64_t b, int64_t list_head, int64_t r, int64_t t) const {
    return (b * p.heads + list_head * group + r) * p.tokens + t;
  }
};

}  // namespace longspan::LONGSPAN_ISA
