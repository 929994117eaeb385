"""Blocks of a mask as parallel arrays, before they become a `BlockMask`'s lists.

An entry is a block of the score matrix with at least one pair that is seen. ``keys`` number the blocks
in the order (list, row, column); ``patterns`` index ``bits``, whose row 0 is the block seen whole. Words
hold 64 queries, bit i the i-th of them, one word a key: bits (patterns, query_block / 64, key_block).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 64


@dataclass
class Grid:
    """The blocks that there could be: ``lists`` times ``rows`` times ``columns``."""

    lists: int
    tokens: int
    keys: int
    query_block: int
    key_block: int

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.tokens // self.query_block)

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.keys // self.key_block)


@dataclass
class Entries:
    """Blocks in ascending order, each once."""

    keys: Tensor  # (entries,) int64
    patterns: Tensor  # (entries,) int64
    bits: Tensor  # (patterns, query_block / 64, key_block) int64


def whole(query_block: int, key_block: int, pattern: int = -1) -> Tensor:
    """The bits of one block, all seen (or, for 0, none)."""
    return torch.full((1, query_block // WORD, key_block), pattern, dtype=torch.int64)


def pack(seen: Tensor) -> Tensor:
    """Bool (n, query_block, key_block) -> words (n, query_block / 64, key_block)."""
    n, queries, keys = seen.shape
    # Bytes first: eight queries at a time take an eighth of the memory that words would.
    parts = seen.view(n, queries // WORD, 8, 8, keys).to(torch.uint8)
    weight = (1 << torch.arange(8)).to(torch.uint8).view(8, 1)
    packed = (parts * weight).sum(3, dtype=torch.uint8)  # (n, words, byte, key)
    words = packed[:, :, 0].to(torch.int64)
    for byte in range(1, 8):
        words = words | (packed[:, :, byte].to(torch.int64) << (8 * byte))
    return words


def unpack(bits: Tensor) -> Tensor:
    """Words (n, query_block / 64, key_block) -> bool (n, query_block, key_block)."""
    n, words, keys = bits.shape
    seen = (bits.unsqueeze(2) >> torch.arange(WORD).view(WORD, 1)) & 1
    return seen.bool().view(n, words * WORD, keys)


def distinct(bits: Tensor) -> tuple[Tensor, Tensor]:
    """-> bits without repetition, and which of them each was."""
    flat = bits.flatten(1)
    mix = torch.randint(-(2**62), 2**62, flat.shape[1:], generator=torch.Generator().manual_seed(1))
    _, index = torch.unique((flat * (mix | 1)).sum(1), return_inverse=True)
    first = torch.empty(int(index.max()) + 1 if len(index) else 0, dtype=torch.int64)
    first[index] = torch.arange(len(index))
    if not torch.equal(flat[first[index]], flat):  # two blocks of one sum
        unique, index = torch.unique(flat, dim=0, return_inverse=True)
        return unique.view(-1, *bits.shape[1:]), index
    return bits[first], index


def canonical(entries: Entries) -> Entries:
    """Without empty blocks and repeated patterns, and with the whole block as pattern 0."""
    shape = entries.bits.shape
    bits, index = distinct(entries.bits)
    flat = bits.flatten(1)
    full, empty = (flat == -1).all(1), (flat == 0).all(1)
    partial = ~full & ~empty
    place = torch.where(full, 0, torch.cumsum(partial, 0))
    pattern = index[entries.patterns]
    kept = ~empty[pattern]
    table = torch.cat([whole(shape[1] * WORD, shape[2]), bits[partial]])
    return Entries(entries.keys[kept], place[pattern[kept]], table)


def combine(a: Entries, b: Entries, op: Callable[[Tensor, Tensor], Tensor]) -> Entries:
    """Block by block ``op`` of two masks of one grid; a block that is missing is empty."""
    keys = torch.unique(torch.cat([a.keys, b.keys]))

    def index(x: Entries) -> Tensor:
        if len(x.keys) == 0:
            return torch.full_like(keys, len(x.bits))
        at = torch.searchsorted(x.keys, keys).clamp(max=len(x.keys) - 1)
        return torch.where(x.keys[at] == keys, x.patterns[at], len(x.bits))

    none = torch.zeros_like(a.bits[:1])
    pairs, patterns = torch.unique(index(a) * (len(b.bits) + 1) + index(b), return_inverse=True)
    left, right = torch.cat([a.bits, none]), torch.cat([b.bits, none])
    bits = op(left[pairs // (len(b.bits) + 1)], right[pairs % (len(b.bits) + 1)])
    return canonical(Entries(keys, patterns, bits))


def toeplitz(grid: Grid, first: int, last: int, seen: Callable[[Tensor], Tensor]) -> Entries:
    """A square rule of ``query - key`` alone, on the block diagonals ``row - column`` first to last.

    The blocks of a diagonal are equal, so each is worked out once.
    """
    size = grid.query_block
    diagonals = torch.arange(last, first - 1, -1)
    within = torch.arange(size).view(size, 1) - torch.arange(size)
    bits = torch.cat([pack(seen(part.view(-1, 1, 1) * size + within)) for part in diagonals.split(256)])
    column = torch.arange(grid.rows).view(-1, 1) - diagonals
    inside = (column >= 0) & (column < grid.columns) & (bits != 0).flatten(1).any(1)
    keys = (torch.arange(grid.rows).view(-1, 1) * grid.columns + column)[inside]
    patterns = torch.arange(len(diagonals)).expand(grid.rows, -1)[inside]
    return canonical(Entries(keys, patterns, bits))


def seen_keys(grid: Grid, seen: Tensor) -> Entries:
    """Keys (bool, as many as there are) that every query sees."""
    padded = torch.zeros(grid.columns * grid.key_block, dtype=torch.bool)
    padded[: grid.keys] = seen
    words = torch.where(padded.view(grid.columns, 1, grid.key_block), -1, 0)
    columns = words.flatten(1).any(1).nonzero().view(-1)
    rows = torch.arange(grid.rows).view(-1, 1)
    return canonical(
        Entries(
            (rows * grid.columns + columns).flatten(),
            torch.arange(len(columns)).repeat(grid.rows),
            words[columns].expand(-1, grid.query_block // WORD, -1).contiguous(),
        )
    )


def without_keys(grid: Grid, entries: Entries, visible: Tensor) -> Entries:
    """A mask without the keys that are not ``visible`` (bool, as many as there are)."""
    padded = torch.zeros(grid.columns * grid.key_block, dtype=torch.bool)
    padded[: grid.keys] = visible
    padded[grid.keys :] = padded[grid.keys - 1 : grid.keys]  # nobody looks; spares a pattern
    words = torch.where(padded.view(grid.columns, 1, grid.key_block), -1, 0)
    whole, none = ((words == x).flatten(1).all(1) for x in (-1, 0))
    kept = ~none[entries.keys % grid.columns]
    keys, patterns = entries.keys[kept], entries.patterns[kept]
    column = keys % grid.columns
    cut = ~whole[column]
    # Few patterns meet few columns that are cut.
    pairs, which = torch.unique(patterns[cut] * grid.columns + column[cut], return_inverse=True)
    cut_bits = entries.bits[pairs // grid.columns] & words[pairs % grid.columns]
    patterns[cut] = len(entries.bits) + which
    return canonical(Entries(keys, patterns, torch.cat([entries.bits, cut_bits])))


def stacked(each: list[Entries], size: int) -> Entries:
    """Masks of ``size`` blocks each, one list after the other."""
    count = 0
    keys, patterns = [], []
    for i, entries in enumerate(each):
        keys.append(entries.keys + i * size)
        patterns.append(entries.patterns + count)
        count += len(entries.bits)
    bits = torch.cat([entries.bits for entries in each])
    return canonical(Entries(torch.cat(keys), torch.cat(patterns), bits))


def seeing_queries(grid: Grid, seen: Tensor) -> Entries:
    """Queries (bool, as many as there are) that see every key."""
    padded = torch.zeros(grid.rows * grid.query_block, dtype=torch.bool)
    padded[: grid.tokens] = seen
    words = pack(padded.view(grid.rows, grid.query_block, 1))
    rows = words.flatten(1).any(1).nonzero().view(-1)
    columns = torch.arange(grid.columns)
    return canonical(
        Entries(
            (rows.view(-1, 1) * grid.columns + columns).flatten(),
            torch.arange(len(rows)).repeat_interleave(grid.columns),
            words[rows].expand(-1, -1, grid.key_block).contiguous(),
        )
    )


def causal_part(grid: Grid, entries: Entries) -> Entries:
    """What of a mask with square blocks does not look ahead; query i stands at key i."""
    row, column = entries.keys // grid.columns % grid.rows, entries.keys % grid.columns
    within = torch.arange(grid.query_block).view(-1, 1) >= torch.arange(grid.key_block)
    patterns = torch.where(row == column, entries.patterns + len(entries.bits), entries.patterns)
    kept = row >= column
    bits = torch.cat([entries.bits, entries.bits & pack(within[None])])
    return canonical(Entries(entries.keys[kept], patterns[kept], bits))


def rectangles(
    grid: Grid, lists: Tensor, q_begin: Tensor, q_end: Tensor, k_begin: Tensor, k_end: Tensor
) -> Entries:
    """The union of disjoint rectangles of the score matrix, each of one list."""
    row, column = q_begin // grid.query_block, k_begin // grid.key_block
    rows = (q_end - 1) // grid.query_block - row + 1
    columns = (k_end - 1) // grid.key_block - column + 1
    count = torch.where((q_end > q_begin) & (k_end > k_begin), rows * columns, 0)
    which = torch.repeat_interleave(torch.arange(len(count)), count)
    within = torch.arange(len(which)) - (torch.cumsum(count, 0) - count)[which]
    row = row[which] + within // columns[which]
    column = column[which] + within % columns[which]
    edges = [
        (edge[which] - place * size).clamp(0, size)
        for edge, place, size in (
            (q_begin, row, grid.query_block), (q_end, row, grid.query_block),
            (k_begin, column, grid.key_block), (k_end, column, grid.key_block),
        )
    ]  # fmt: skip
    # Few shapes of a piece occur, and few pieces share a block: bits are made for each shape, then
    # added up, which for disjoint pieces is their union.
    shapes, shape = torch.unique(torch.stack(edges, 1), dim=0, return_inverse=True)
    queries = torch.arange(grid.query_block).view(1, -1, 1)
    keys = torch.arange(grid.key_block).view(1, 1, -1)
    low_q, high_q, low_k, high_k = (shapes[:, i].view(-1, 1, 1) for i in range(4))
    bits = pack((queries >= low_q) & (queries < high_q) & (keys >= low_k) & (keys < high_k))
    at, place = torch.unique(
        (lists[which] * grid.rows + row) * grid.columns + column, return_inverse=True
    )
    alone = torch.bincount(place, minlength=len(at))[place] == 1
    patterns = torch.empty(len(at), dtype=torch.int64)
    patterns[place[alone]] = shape[alone]
    shared, group = torch.unique(place[~alone], return_inverse=True)
    union = torch.zeros(len(shared), *bits.shape[1:], dtype=torch.int64)
    union.index_add_(0, group, bits[shape[~alone]])
    patterns[shared] = len(bits) + torch.arange(len(shared))
    return canonical(Entries(at, patterns, torch.cat([bits, union])))
