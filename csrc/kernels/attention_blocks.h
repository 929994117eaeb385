// Block-sparse attention: which blocks of scores a tile is made of, from AttentionBlocks' lists.
//
// Both directions work on runs of adjacent key blocks, so that a tile is as wide as it is without a
// list and blocks that nobody sees cost nothing:
//
//     forward     a row of the mask     [ b b b . . b . b b ]   three runs, cut into tiles
//     backward    the columns of one block of keys, row by row: three columns, at most two runs a row
//
// Keys at the ends of a run that no query sees, and queries after the last that sees a key, are cut
// off: a global token is one key of its column's block, and one query of its row's.
#pragma once

#include "kernels/attention_geometry.h"

namespace longspan::LONGSPAN_ISA {

/// Adjacent blocks, the first of which begins at key `begin`, and each one's pattern. Without
/// patterns: keys of no list.
struct BlockRun {
  int64_t begin = 0;
  const int32_t* patterns = nullptr;
};

LS_INLINE int64_t list_of(const AttentionBlocks& x, int64_t batch, int64_t head) {
  return batch * x.batch + head * x.head;
}

/// The words of a block of the run, for the 64 queries from q0 on.
LS_INLINE const uint64_t* words_of(const AttentionBlocks& x, const BlockRun& run, int64_t block,
                                   int64_t q0) {
  const int64_t part = q0 % x.query_block / kQueryBlock, parts = x.query_block / kQueryBlock;
  return x.bits + (run.patterns[block] * parts + part) * x.key_block;
}

/// Keys [k0, k1) without those at either end that none of 64 queries sees; begins an even number on.
LS_INLINE Interval seen_keys(const AttentionBlocks& x, const BlockRun& run, int64_t q0, int64_t k0,
                             int64_t k1) {
  const auto seen = [&](int64_t k) {
    const int64_t at = k - run.begin;
    return words_of(x, run, at / x.key_block, q0)[at % x.key_block] != 0;
  };
  int64_t begin = k0, end = k1;
  while (begin < end && !seen(begin)) ++begin;
  while (end > begin && !seen(end - 1)) --end;
  return {begin - (begin - k0) % 2, end};
}

/// Of 64 queries, how many there are up to the last that sees one of keys [k0, k1).
LS_INLINE int64_t queries_that_see(const AttentionBlocks& x, const BlockRun& run, int64_t q0, int64_t k0,
                                   int64_t k1) {
  uint64_t any = 0;
  for (int64_t k = k0; k < k1 && any >> 63 == 0;) {
    const int64_t block = (k - run.begin) / x.key_block, begin = run.begin + block * x.key_block;
    const uint64_t* words = words_of(x, run, block, q0) - begin;
    for (const int64_t end = min_of(begin + x.key_block, k1); k < end; ++k) any |= words[k];
  }
  return any == 0 ? 0 : kQueryBlock - __builtin_clzll(any);
}

/// visit(keys, run) for the keys that queries [q0, q0 + kQueryBlock) of a head may see, ascending.
template <class Visit>
LS_INLINE void for_each_run(const AttentionParams& p, int64_t batch, int64_t head, int64_t q0,
                            const Visit& visit) {
  const AttentionBlocks& x = p.blocks;
  const int64_t rows = ceil_div(p.tokens, x.query_block);
  const int64_t row = list_of(x, batch, head) * rows + q0 / x.query_block;
  const int64_t end = x.row_begins[row + 1];
  for (int64_t i = x.row_begins[row]; i < end;) {
    int64_t last = i;
    while (last + 1 < end && x.columns[last + 1] == x.columns[last] + 1) ++last;
    const BlockRun run{x.columns[i] * x.key_block, x.row_patterns + i};
    const Interval keys =
        seen_keys(x, run, q0, run.begin, min_of((x.columns[last] + 1) * x.key_block, p.keys));
    if (!keys.empty()) visit(keys, run);
    i = last + 1;
  }
}

/// The lists of the columns that keys [k0, k1) of a head touch.
class BlockColumns {
 public:
  LS_INLINE BlockColumns(const AttentionParams& p, int64_t batch, int64_t head, int64_t k0, int64_t k1)
      : p_(p), k0_(k0), k1_(k1), first_(k0 / p.blocks.key_block),
        count_(ceil_div(k1, p.blocks.key_block) - first_) {
    begins_ = p.blocks.column_begins + first_ +
              list_of(p.blocks, batch, head) * ceil_div(p.keys, p.blocks.key_block);
  }

  /// Blocks of scores in them.
  LS_INLINE int64_t size() const { return begins_[count_] - begins_[0]; }

  /// The least run of query blocks (of kQueryBlock) that holds all which see one of the keys.
  LS_INLINE Interval query_blocks() const {
    const int64_t per_row = p_.blocks.query_block / kQueryBlock;
    Interval hull{ceil_div(p_.tokens, kQueryBlock), 0};
    for (int64_t c = 0; c < count_; ++c) {
      if (begins_[c] == begins_[c + 1]) continue;
      hull.begin = min_of(hull.begin, p_.blocks.rows[begins_[c]] * per_row);
      hull.end = max_of(hull.end, (p_.blocks.rows[begins_[c + 1] - 1] + 1) * per_row);
    }
    hull.end = min_of(hull.end, ceil_div(p_.tokens, kQueryBlock));
    return hull;
  }

  /// visit(query block, queries, keys, run) for each query block, ascending, and each run of keys that
  /// its first `queries` see.
  template <class Visit>
  LS_INLINE void for_each(const Visit& visit) const {
    const AttentionBlocks& x = p_.blocks;
    const int64_t blocks = ceil_div(p_.tokens, kQueryBlock), per_row = x.query_block / kQueryBlock;
    int64_t at[kMostColumns];
    int32_t patterns[kMostColumns];
    for (int64_t c = 0; c < count_; ++c) at[c] = begins_[c];
    for (;;) {
      int64_t row = blocks;
      for (int64_t c = 0; c < count_; ++c) {
        if (at[c] < begins_[c + 1]) row = min_of<int64_t>(row, x.rows[at[c]]);
      }
      if (row == blocks) return;
      for (int64_t c = 0; c < count_; ++c) {
        const bool there = at[c] < begins_[c + 1] && x.rows[at[c]] == row;
        patterns[c] = there ? x.column_patterns[at[c]++] : kAbsent;
      }
      for (int64_t c = 0; c < count_; ++c) {
        if (patterns[c] == kAbsent) continue;
        int64_t last = c;
        while (last + 1 < count_ && patterns[last + 1] != kAbsent) ++last;
        const BlockRun run{(first_ + c) * x.key_block, patterns + c};
        const int64_t begin = max_of(k0_, run.begin),
                      end = min_of(k1_, (first_ + last + 1) * x.key_block);
        for (int64_t j = row * per_row; j < min_of((row + 1) * per_row, blocks); ++j) {
          const int64_t q0 = j * kQueryBlock;
          const Interval keys = seen_keys(x, run, q0, begin, end);
          if (keys.empty()) continue;
          visit(j, queries_that_see(x, run, q0, keys.begin, keys.end), keys, run);
        }
        c = last;
      }
    }
  }

 private:
  static constexpr int32_t kAbsent = -1;
  /// Of the greatest block of keys of the backward and the least of a list.
  static constexpr int64_t kMostColumns = 2 * kKeyBlock / kLeastKeyBlock + 2;

  const AttentionParams& p_;
  int64_t k0_, k1_, first_, count_;
  const int64_t* begins_;
};

/// Whether keys [k0, k1) of the run lie in blocks that are seen whole.
LS_INLINE bool sees_whole(const AttentionBlocks& x, const BlockRun& run, int64_t k0, int64_t k1) {
  if (!run.patterns) return true;
  int32_t any = 0;
  const int64_t last = (k1 - 1 - run.begin) / x.key_block;
  for (int64_t i = (k0 - run.begin) / x.key_block; i <= last; ++i) any |= run.patterns[i];
  return any == 0;
}

/// Scores of keys [k0, k1) by queries [q0, q1), rows kQueryBlock apart: -infinity where the run's
/// patterns say that a query does not see a key.
template <class T>
LS_INLINE void hide_unseen(const AttentionBlocks& x, const BlockRun& run, T* tile, int64_t q0,
                           int64_t q1, int64_t k0, int64_t k1) {
  constexpr int L = kLanes<T>;
  using I = IntOf<T>;
  Vec<I> bit;
  for (int i = 0; i < L; ++i) bit[i] = I(1) << i;
  for (int64_t k = k0; k < k1;) {
    const int64_t block = (k - run.begin) / x.key_block, begin = run.begin + block * x.key_block;
    const int64_t end = min_of(begin + x.key_block, k1);
    const uint64_t* words = words_of(x, run, block, q0) - begin;
    for (; run.patterns[block] != 0 && k < end; ++k) {
      const uint64_t word = words[k];
      if (word == ~uint64_t(0)) continue;
      T* row = tile + (k - k0) * kQueryBlock;
      for (int64_t i = 0; i < q1 - q0; i += L) {
        const auto seen = (broadcast<I>(I(word >> i)) & bit) != 0;
        store(row + i, select<T>(seen, load(row + i), broadcast(-kInfinity<T>)));
      }
    }
    k = end;
  }
}

}  // namespace longspan::LONGSPAN_ISA
