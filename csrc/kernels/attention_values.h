// V of all heads, turned once for all the blocks of queries that read it.
//
//     V  [keys][channels]        in memory
//     V^T [group][channels][16]  in pairs of tokens, a group of 32 keys after the other
//
// V^T P^T contracts over keys, and tile registers take V^T a row a channel, its pairs of keys adjacent
// (tile_amx.h): turned for each block of 64 queries anew, that took as long as the products. Levels
// without such registers read V^T with any strides, and turn nothing.
#pragma once

#include "kernels/attention_geometry.h"
#include "kernels/parallel.h"

namespace longspan::LONGSPAN_ISA {

template <class Dot>
class TurnedValues {
 public:
  using E = typename Dot::Element;
#if defined(LONGSPAN_AMX)
  static constexpr bool kUsed = Dot::kDepth == 2;
#else
  static constexpr bool kUsed = false;
#endif
  static constexpr int64_t kTokens = 32;  ///< of a group

  /// Turns nothing where few queries would read it, or tiles begin where blocks of a mask do.
  explicit TurnedValues(const AttentionParams& p) : p_(p) {
    used_ = kUsed && p.blocks.row_begins == nullptr &&
            p.tokens * (p.heads / p.kv_heads) >= kLeastReaders * kQueryBlock;
    if (!used_) return;
    groups_ = p.cu_k ? p.cu_k[p.batch] / kTokens + p.batch : p.batch * ceil_div(p.keys, kTokens);
  }

  explicit operator bool() const { return used_; }
  int64_t bytes() const { return groups_ * p_.kv_heads * group() * int64_t(sizeof(E)); }
  /// Between groups, in elements.
  int64_t group() const { return p_.value_channels * kTokens / 2; }
  /// Tiles begin at a multiple of so many keys.
  int64_t alignment() const { return used_ ? kTokens : 2; }

  /// Turns what queries see, into `memory`.
  void turn(char* memory, int threads) {
    if constexpr (kUsed) {
      if (!used_) return;
      turned_ = reinterpret_cast<E*>(memory);
      parallel_for(p_.batch * p_.kv_heads * kShares, threads, [&](int64_t task, int) {
        const int64_t head = task / kShares % p_.kv_heads, batch = task / kShares / p_.kv_heads;
        const Sequence s(p_, batch);
        Interval seen[2];
        s.key_ranges(0, s.tokens, seen);
        const int64_t begin = seen[0].begin / kTokens;
        const int64_t end = ceil_div(max_of(seen[0].end, seen[1].end), kTokens);
        const TokenRows v = rows_of(p_.v, p_.dtype, p_.cu_k ? 0 : batch, head, s.k_begin);
        for (int64_t g = begin + task % kShares; g < end; g += kShares) {
          const int64_t key = g * kTokens;
          pairs_by_channel(v.from(key), min_of(s.keys - key, kTokens), p_.value_channels,
                           at(batch, head, key));
        }
      });
    }
  }

  /// From key (a multiple of kTokens) of a sequence on.
  E* at(int64_t batch, int64_t kv_head, int64_t key) const {
    const int64_t before =
        p_.cu_k ? p_.cu_k[batch] / kTokens + batch : batch * ceil_div(p_.keys, kTokens);
    return turned_ + (kv_head * groups_ + before + key / kTokens) * group();
  }

 private:
  static constexpr int64_t kLeastReaders = 4, kShares = 16;

  const AttentionParams& p_;
  bool used_;
  int64_t groups_ = 0;
  E* turned_ = nullptr;
};

}  // namespace longspan::LONGSPAN_ISA
