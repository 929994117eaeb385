"""`BlockMask`: which keys each query sees, by blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.patterns._entries import (
    WORD,
    Entries,
    Grid,
    canonical,
    combine,
    pack,
    rectangles,
    stacked,
    unpack,
    without_keys,
)

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Pairs of a query and a key that a mask_mod or a dense mask is read for at once.
_CHUNK = 2**22


class BlockMask:
    """Which keys each query sees, as lists of blocks: what `longspan.block_sparse_attention` visits.

    Blocks that nobody sees are in no list, blocks that are seen whole are a number in one, and the
    others name a pattern: a bit for each pair of a query and a key. Equal patterns are kept once, so
    that a sliding window, whose blocks repeat, takes memory linear in its length. Masks are made by
    the builders of :mod:`longspan.patterns`, by the constructors below, and from each other by ``&``
    and ``|``; they do not change afterwards.

    Attributes:
        shape: (T_q, T_k), in tokens. They need not be multiples of a block.
        block_size: (queries, keys) in a block; multiples of 64 and of 16.
        batch: 1 where all entries of a batch share the mask.
        heads: 1 where all query heads do.
        density: Share of the score matrix that lies in visited blocks: the cost, relative to full
            attention.
        row_begins, columns, row_patterns: For each (batch, head, query block), in that order, where its
            list begins (int64, one more at the end), its key blocks, ascending, and their patterns
            (int32; 0 is a block seen whole).
        column_begins, rows, column_patterns: The same the other way round, for the backward.
        bits: (patterns, queries / 64, keys) int64: bit i of a word is the i-th of 64 queries.

    Example::

        mask = longspan.patterns.sliding_window(16384, window=(511, 0))
        mask |= longspan.patterns.longformer(16384, window=0, global_tokens=[0], causal=True)
        out = longspan.block_sparse_attention(q, k, v, mask)
    """

    def __init__(self, grid: Grid, entries: Entries, *, batch: int = 1, heads: int = 1) -> None:
        """Make the lists; ``entries`` is canonical, in ``batch * heads`` lists."""
        self.shape = (grid.tokens, grid.keys)
        self.block_size = (grid.query_block, grid.key_block)
        self.batch, self.heads = batch, heads
        self.bits = entries.bits.contiguous()
        row = entries.keys // grid.columns
        self.row_begins = _begins(row, grid.lists * grid.rows)
        self.columns = (entries.keys % grid.columns).int()
        self.row_patterns = entries.patterns.int()
        column = row // grid.rows * grid.columns + self.columns
        order = torch.argsort(column, stable=True)
        self.column_begins = _begins(column, grid.lists * grid.columns)
        self.rows = (row % grid.rows)[order].int()
        self.column_patterns = self.row_patterns[order]
        self.density = _density(grid, row % grid.rows, self.columns)

    # ---- from other kinds of masks

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: MaskMod,
        T_q: int,
        T_k: int,
        *,
        batch: int = 1,
        heads: int = 1,
        block_size: int | tuple[int, int] = WORD,
    ) -> BlockMask:
        """From FlexAttention's kind of function: ``mask_mod(b, h, q_idx, kv_idx) -> bool``.

        It is asked for every pair, a few rows of blocks at a time: time is T_q x T_k, memory is not.

        Args:
            mask_mod: Of four int64 tensors without dimensions, as FlexAttention calls it (under vmap).
            T_q: Queries.
            T_k: Keys.
            batch: Entries of the batch, where ``b`` makes a difference; else 1.
            heads: Query heads, where ``h`` makes a difference; else 1.
            block_size: Of queries and keys, or of each: multiples of 64 and of 16.

        Raises:
            TypeError: ``mask_mod`` does not give a bool tensor.
            ValueError: A size does not fit.

        Example::

            BlockMask.from_mask_mod(lambda b, h, q, k: (q >= k) & (q - k < 100), 1000, 1000)
        """
        grid = _grid("BlockMask.from_mask_mod", T_q, T_k, batch * heads, block_size)
        _check_counts("BlockMask.from_mask_mod", batch=batch, heads=heads)
        mod = _checked_mod("BlockMask.from_mask_mod", mask_mod)

        def rows(which: int, queries: Tensor, keys: Tensor) -> Tensor:
            where = torch.tensor(which // heads), torch.tensor(which % heads)
            return mod(*where, queries, keys)

        return cls(grid, _from_rows(grid, rows), batch=batch, heads=heads)

    @classmethod
    def from_flex(cls, mask: Any) -> BlockMask:
        """From torch's own ``BlockMask`` (``torch.nn.attention.flex_attention``).

        Its lists say which blocks there are, and its mask_mod is asked within partial blocks alone.

        Args:
            mask: ``BLOCK_SIZE`` in multiples of 64 queries and 16 keys; 128 x 128 is its default.

        Raises:
            TypeError: Not such a mask.
            ValueError: Its block size does not fit.

        Example::

            BlockMask.from_flex(create_block_mask(causal, None, None, 1000, 1000, device="cpu"))
        """
        name = "BlockMask.from_flex"
        for attribute in ("kv_num_blocks", "kv_indices", "seq_lengths", "mask_mod", "BLOCK_SIZE"):
            if not hasattr(mask, attribute):
                raise TypeError(
                    f"{name}: mask: expected a torch.nn.attention.flex_attention.BlockMask, "
                    f"got {type(mask).__name__}"
                )
        batch, heads = mask.kv_num_blocks.shape[:2]
        tokens, keys = mask.seq_lengths
        grid = _grid(name, tokens, keys, batch * heads, tuple(mask.BLOCK_SIZE))

        def listed(count: Tensor | None, index: Tensor | None) -> Tensor:
            """Numbers of the blocks that a pair of flex's tensors names."""
            if count is None or index is None:
                return torch.empty(0, dtype=torch.int64)
            count, index = count.cpu().flatten(0, 2), index.cpu().flatten(0, 2).long()
            inside = torch.arange(index.shape[1]) < count.unsqueeze(1)
            return (torch.arange(len(index)).unsqueeze(1) * grid.columns + index)[inside]

        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        partial = listed(mask.kv_num_blocks, mask.kv_indices)
        mod = _checked_mod(name, mask.mask_mod)
        blocks = torch.vmap(mod)
        row, column = partial // grid.columns, partial % grid.columns
        queries = _positions(row % grid.rows, grid.query_block, grid.tokens)
        positions = _positions(column, grid.key_block, grid.keys)
        lists = row // grid.rows
        step = max(1, _CHUNK // (grid.query_block * grid.key_block))
        bits = [torch.full((1, grid.query_block // WORD, grid.key_block), -1)]
        for i in range(0, len(partial), step):
            part = slice(i, i + step)
            where = lists[part] // heads, lists[part] % heads
            bits.append(pack(blocks(*where, queries[part], positions[part])))
        numbers = torch.cat([full, partial])
        patterns = torch.cat([torch.zeros_like(full), 1 + torch.arange(len(partial))])
        order = torch.argsort(numbers)
        entries = Entries(numbers[order], patterns[order], torch.cat(bits))
        return cls(grid, canonical(entries), batch=batch, heads=heads)

    @classmethod
    def from_dense(cls, mask: Tensor, block_size: int | tuple[int, int] = WORD) -> BlockMask:
        """From a bool tensor that is True where a key is seen.

        Args:
            mask: (T_q, T_k), (heads or 1, T_q, T_k) or (batch or 1, heads or 1, T_q, T_k).
            block_size: As in `from_mask_mod`.

        Raises:
            TypeError: Not a bool tensor.
            ValueError: Another number of dimensions, or the block size does not fit.

        Example::

            BlockMask.from_dense(torch.ones(100, 100, dtype=torch.bool).tril())
        """
        name = "BlockMask.from_dense"
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{name}: mask: expected a bool tensor, got {got}")
        if not 2 <= mask.dim() <= 4:
            raise ValueError(f"{name}: mask: expected 2 to 4 dimensions, got {tuple(mask.shape)}")
        full = mask.cpu()[(None,) * (4 - mask.dim())]
        batch, heads, tokens, keys = full.shape
        grid = _grid(name, tokens, keys, batch * heads, block_size)
        lists = full.flatten(0, 1)
        entries = _from_rows(grid, lambda which, q, k: lists[which].index_select(0, q)[:, k])
        return cls(grid, entries, batch=batch, heads=heads)

    @classmethod
    def from_layout(cls, layout: Tensor, block: int, T_q: int, T_k: int) -> BlockMask:
        """From blocks that are seen whole or not at all, of any size, as block-sparse rows have them.

        Args:
            layout: Bool (rows, columns) or (heads, rows, columns): whether ``block`` queries see
                ``block`` keys.
            block: Tokens in a side of a block; any size.
            T_q: Queries; in ``rows`` blocks, of which the last may be short.
            T_k: Keys, likewise.

        Raises:
            TypeError: ``layout`` is not a bool tensor.
            ValueError: Sizes do not fit each other.

        Example::

            BlockMask.from_layout(torch.eye(8, dtype=torch.bool), 32, 256, 256)
        """
        name = "BlockMask.from_layout"
        if not isinstance(layout, Tensor) or layout.dtype != torch.bool:
            raise TypeError(f"{name}: layout: expected a bool tensor, got {type(layout).__name__}")
        _check_counts(name, block=block)
        wanted = (-(-T_q // block), -(-T_k // block))
        if layout.dim() not in (2, 3) or tuple(layout.shape[-2:]) != wanted:
            raise ValueError(
                f"{name}: layout: expected ({wanted[0]}, {wanted[1]}) blocks of {block} for {T_q} "
                f"queries and {T_k} keys, or that for each head, got {tuple(layout.shape)}"
            )
        lists = layout.cpu().view(-1, *wanted)
        grid = _grid(name, T_q, T_k, len(lists), block if block % WORD == 0 else WORD)
        which, row, column = lists.nonzero().unbind(1)
        q, k = row * block, column * block
        entries = rectangles(grid, which, q, (q + block).clamp(max=T_q), k, (k + block).clamp(max=T_k))
        return cls(grid, entries, heads=len(lists))

    @classmethod
    def stack(cls, masks: Sequence[BlockMask]) -> BlockMask:
        """One mask for each entry of a batch.

        Args:
            masks: Of one shape, block size and number of heads, each with a batch of 1.

        Raises:
            ValueError: No masks, or they do not fit each other.

        Example::

            BlockMask.stack([longformer(512, window=64, global_tokens=[i]) for i in range(4)])
        """
        if not masks:
            raise ValueError("BlockMask.stack: masks: expected at least one, got none")
        first = masks[0]
        for i, mask in enumerate(masks):
            facts = (mask.shape, mask.block_size, mask.heads, mask.batch)
            if facts != (first.shape, first.block_size, first.heads, 1):
                raise ValueError(
                    f"BlockMask.stack: masks[{i}]: expected shape {first.shape}, block_size "
                    f"{first.block_size}, heads {first.heads} and batch 1, got {mask}"
                )
        size = first.heads * first._grid().rows * first._grid().columns
        grid = Grid(len(masks) * first.heads, *first.shape, *first.block_size)
        entries = stacked([mask._entries() for mask in masks], size)
        return cls(grid, entries, batch=len(masks), heads=first.heads)

    # ---- combined, and back

    def hide_keys(self, visible: Tensor) -> BlockMask:
        """The mask without keys that are padding.

        Args:
            visible: (T_k,) bool for all, or (B, T_k) with a row for each entry of the batch.

        Returns:
            A mask with a batch of B, or as it was where all rows are equal.

        Raises:
            TypeError: ``visible`` is not a bool tensor.
            ValueError: Its shape does not fit.

        Example::

            sliding_window(100, window=(9, 9)).hide_keys(torch.arange(100) < lengths[:, None])
        """
        name = "BlockMask.hide_keys"
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            raise TypeError(f"{name}: visible: expected a bool tensor, got {visible}")
        if visible.dim() not in (1, 2) or visible.shape[-1] != self.shape[1] or not len(visible):
            raise ValueError(
                f"{name}: visible: expected ({self.shape[1]},) or (batch, {self.shape[1]}), "
                f"got {tuple(visible.shape)}"
            )
        rows = visible.cpu().reshape(-1, self.shape[1])
        if self.batch > 1 and len(rows) not in (1, self.batch):
            raise ValueError(f"{name}: visible: expected a batch of {self.batch}, got {len(rows)}")
        grid, entries = self._grid(), self._entries()
        if (rows == rows[0]).all():
            hidden = without_keys(grid, entries, rows[0])
            return BlockMask(grid, hidden, batch=self.batch, heads=self.heads)
        size = self.heads * grid.rows * grid.columns
        one = Grid(self.heads, *self.shape, *self.block_size)
        each = []
        for i, row in enumerate(rows):
            mine = entries
            if self.batch > 1:
                chosen = entries.keys // size == i
                mine = Entries(entries.keys[chosen] % size, entries.patterns[chosen], entries.bits)
            each.append(without_keys(one, mine, row))
        grid = Grid(len(rows) * self.heads, *self.shape, *self.block_size)
        return BlockMask(grid, stacked(each, size), batch=len(rows), heads=self.heads)

    def __and__(self, other: BlockMask) -> BlockMask:
        """What both see. Shapes and block sizes must be equal; batch and heads may be 1."""
        return self._combined(other, torch.bitwise_and, "&")

    def __or__(self, other: BlockMask) -> BlockMask:
        """What either sees."""
        return self._combined(other, torch.bitwise_or, "|")

    def to_dense(self) -> Tensor:
        """Bool (heads or 1, T_q, T_k): True where a key is seen. A batch above 1 comes before it."""
        grid, entries = self._grid(), self._entries()
        pieces = unpack(self.bits)
        size = grid.lists, grid.rows, grid.columns, grid.query_block, grid.key_block
        dense = torch.zeros(size, dtype=torch.bool)
        dense.flatten(0, 2)[entries.keys] = pieces[entries.patterns]
        dense = dense.transpose(2, 3).reshape(
            grid.lists, grid.rows * grid.query_block, grid.columns * grid.key_block
        )
        dense = dense[:, : grid.tokens, : grid.keys]
        return dense.unflatten(0, (self.batch, self.heads)) if self.batch > 1 else dense

    def plot(self, *, batch: int = 0, head: int = 0) -> Any:
        """Draw the mask, queries downwards, keys to the right, as papers do.

        Up to 2048 tokens every pair is drawn, above that the share of each block that is seen.

        Args:
            batch: Which entry of the batch.
            head: Which head.

        Returns:
            A matplotlib ``Figure``; save it by ``figure.savefig("mask.png")``.

        Raises:
            ImportError: matplotlib is not there.
            ValueError: There is no such entry or head.

        Example::

            longspan.patterns.longformer(1024, window=128, global_tokens=[0]).plot()
        """
        from longspan.patterns._plot import draw

        for name, index, count in (("batch", batch, self.batch), ("head", head, self.heads)):
            if not 0 <= index < count:
                raise ValueError(f"BlockMask.plot: {name}: expected 0 to {count - 1}, got {index}")
        return draw(self, batch * self.heads + head)

    def __repr__(self) -> str:
        """Sizes and density."""
        return (
            f"BlockMask(shape={self.shape}, block_size={self.block_size}, batch={self.batch}, "
            f"heads={self.heads}, density={self.density:.4g})"
        )

    def _grid(self) -> Grid:
        return Grid(self.batch * self.heads, *self.shape, *self.block_size)

    def _entries(self) -> Entries:
        grid = self._grid()
        rows = torch.repeat_interleave(torch.arange(grid.lists * grid.rows), self.row_begins.diff())
        return Entries(rows * grid.columns + self.columns, self.row_patterns.long(), self.bits)

    def _expanded(self, batch: int, heads: int) -> Entries:
        """The entries with lists of their own for each of batch and heads."""
        grid, entries = self._grid(), self._entries()
        if (batch, heads) == (self.batch, self.heads):
            return entries
        size = grid.rows * grid.columns
        source = torch.arange(grid.lists).view(self.batch, self.heads).expand(batch, heads).flatten()
        begins = torch.searchsorted(entries.keys, torch.arange(grid.lists + 1) * size)
        count = begins.diff()[source]
        target = torch.repeat_interleave(torch.arange(batch * heads), count)
        within = torch.arange(len(target)) - (torch.cumsum(count, 0) - count)[target]
        index = begins[source][target] + within
        keys = entries.keys[index] + (target - source[target]) * size
        return Entries(keys, entries.patterns[index], entries.bits)

    def _combined(
        self, other: BlockMask, op: Callable[[Tensor, Tensor], Tensor], symbol: str
    ) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        for what in ("shape", "block_size"):
            if getattr(self, what) != getattr(other, what):
                raise ValueError(
                    f"BlockMask {symbol}: expected masks of one {what}, "
                    f"got {getattr(self, what)} and {getattr(other, what)}"
                )
        for what in ("batch", "heads"):
            if getattr(self, what) != getattr(other, what) and 1 not in (
                getattr(self, what), getattr(other, what),
            ):  # fmt: skip
                raise ValueError(
                    f"BlockMask {symbol}: expected {what} to be equal or 1, "
                    f"got {getattr(self, what)} and {getattr(other, what)}"
                )
        batch, heads = max(self.batch, other.batch), max(self.heads, other.heads)
        grid = Grid(batch * heads, *self.shape, *self.block_size)
        entries = combine(self._expanded(batch, heads), other._expanded(batch, heads), op)
        return BlockMask(grid, entries, batch=batch, heads=heads)


def _begins(ascending_or_not: Tensor, count: int) -> Tensor:
    """Where each of ``count`` lists begins, from the list that each entry is in."""
    sizes = torch.bincount(ascending_or_not, minlength=count)
    return torch.cat([sizes.new_zeros(1), torch.cumsum(sizes, 0)])


def _density(grid: Grid, row: Tensor, column: Tensor) -> float:
    if grid.lists * grid.tokens * grid.keys == 0:
        return 0.0
    height = (grid.tokens - row * grid.query_block).clamp(max=grid.query_block)
    width = (grid.keys - column.long() * grid.key_block).clamp(max=grid.key_block)
    return float((height * width).sum()) / (grid.lists * grid.tokens * grid.keys)


def _check_counts(name: str, **counts: int) -> None:
    for what, n in counts.items():
        if n < 1:
            raise ValueError(f"{name}: {what}: expected 1 or more, got {n}")


def _grid(name: str, tokens: int, keys: int, lists: int, block_size: int | tuple[int, int]) -> Grid:
    if tokens < 0 or keys < 0:
        raise ValueError(f"{name}: expected lengths of 0 or more, got {tokens} and {keys}")
    sizes = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(sizes) != 2 or min(sizes) < 1 or sizes[0] % WORD or sizes[1] % 16:
        raise ValueError(
            f"{name}: block_size: expected a multiple of 64 for queries and of 16 for keys, "
            f"got {block_size}"
        )
    return Grid(lists, tokens, keys, sizes[0], sizes[1])


def _checked_mod(name: str, mask_mod: MaskMod) -> Callable[..., Tensor]:
    """``mask_mod`` over queries (n,) and keys (m,) -> bool (n, m), as FlexAttention evaluates it."""

    def checked(*index: Tensor) -> Tensor:
        seen = mask_mod(*index)
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool or seen.dim():
            got = (seen.dtype, tuple(seen.shape)) if isinstance(seen, Tensor) else type(seen).__name__
            raise TypeError(f"{name}: mask_mod: expected to get a bool without dimensions, got {got}")
        return seen

    over_keys = torch.vmap(checked, in_dims=(None, None, None, 0))
    return torch.vmap(over_keys, in_dims=(None, None, 0, None))


def _positions(block: Tensor, size: int, tokens: int) -> Tensor:
    """Tokens of each block; the last one again where there are no more, which nobody looks at."""
    return (block.unsqueeze(-1) * size + torch.arange(size)).clamp(max=tokens - 1)


def _from_rows(grid: Grid, seen: Callable[[int, Tensor, Tensor], Tensor]) -> Entries:
    """Blocks of ``seen(list, queries, keys)`` -> bool (queries, keys), some rows at a time."""
    numbers, patterns = [], []
    bits = [torch.full((1, grid.query_block // WORD, grid.key_block), -1)]
    count = 1
    columns = torch.arange(grid.columns)
    keys = _positions(columns, grid.key_block, grid.keys).flatten()
    step = max(1, _CHUNK // max(1, grid.query_block * len(keys)))
    for which in range(grid.lists if len(keys) else 0):
        for rows in torch.arange(grid.rows).split(step):
            queries = _positions(rows, grid.query_block, grid.tokens).flatten()
            part = seen(which, queries, keys).view(
                len(rows), grid.query_block, grid.columns, grid.key_block
            )
            blocks = part.transpose(1, 2).flatten(0, 1)
            full, some = (f(f(blocks, 2), 1) for f in (torch.all, torch.any))
            partial = some & ~full
            bits.append(pack(blocks[partial]))
            pattern = torch.where(full, 0, count - 1 + torch.cumsum(partial, 0))
            count += len(bits[-1])
            number = ((which * grid.rows + rows).view(-1, 1) * grid.columns + columns).flatten()
            numbers.append(number[some])
            patterns.append(pattern[some])
    none = torch.empty(0, dtype=torch.int64)
    return canonical(Entries(torch.cat([none, *numbers]), torch.cat([none, *patterns]), torch.cat(bits)))
