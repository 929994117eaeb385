"""The patterns of Longformer, BigBird and the Sparse Transformer, and plain windows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.patterns._entries import (
    Entries,
    Grid,
    causal_part,
    combine,
    rectangles,
    seeing_queries,
    seen_keys,
    toeplitz,
)
from longspan.patterns.block_mask import BlockMask, _check_counts, _grid

_MODES = {"strided": ("local", "strided"), "fixed": ("local", "summary")}


def sliding_window(T: int, *, window: tuple[int, int] = (-1, -1), block_size: int = 64) -> BlockMask:
    """Each token sees the keys around its own position, as ``longspan.attention(window=...)``.

    Args:
        T: Tokens.
        window: (left, right), how many keys before and after; -1 is no bound, (-1, 0) is causal.
        block_size: Tokens in a side of a block, a multiple of 64.

    Raises:
        ValueError: A value does not fit.

    Example::

        sliding_window(16384, window=(511, 0))
    """
    return dilated_window(T, window=window, dilation=1, block_size=block_size)


def dilated_window(T: int, *, window: tuple[int, int], dilation: int, block_size: int = 64) -> BlockMask:
    """A window with gaps: token i sees i + n * dilation, for -left <= n <= right.

    Args:
        T: Tokens.
        window: (left, right), how many keys before and after; -1 is no bound.
        dilation: Distance between the keys that are seen.
        block_size: Tokens in a side of a block, a multiple of 64.

    Raises:
        ValueError: A value does not fit.

    Example::

        dilated_window(4096, window=(64, 64), dilation=4)
    """
    grid = _grid("dilated_window", T, T, 1, block_size)
    if len(window) != 2 or min(window) < -1:
        raise ValueError(f"dilated_window: window: expected two numbers from -1 up, got {window}")
    _check_counts("dilated_window", dilation=dilation)
    return BlockMask(grid, _window(grid, (window[0], window[1]), dilation))


def longformer(
    T: int,
    *,
    window: int,
    global_tokens: Sequence[int] | Tensor = (),
    dilation: int = 1,
    causal: bool = False,
    global_queries: bool = True,
    block_size: int = 64,
) -> BlockMask:
    """Longformer: a window around each token, and global tokens that see and are seen by all.

    Beltagy, Peters and Cohan 2020, "Longformer: The Long-Document Transformer", section 3.1. One
    softmax goes over the union of both, so a global token within the window counts once.

    Args:
        T: Tokens.
        window: Total width, even: ``window / 2`` keys on either side besides the token itself.
        global_tokens: Positions of the global tokens.
        dilation: Distance between the keys of a window.
        causal: Leave out what looks ahead, the global tokens' too.
        global_queries: Let the global tokens see everything. False leaves them their window, for
            models that compute their rows otherwise, from projections of their own.
        block_size: Tokens in a side of a block, a multiple of 64.

    Raises:
        ValueError: A value does not fit.

    Example::

        longformer(4096, window=512, global_tokens=[0])
    """
    name = "longformer"
    grid = _grid(name, T, T, 1, block_size)
    if window < 0 or window % 2:
        raise ValueError(f"{name}: window: expected an even number of 0 or more, got {window}")
    _check_counts(name, dilation=dilation)
    where = torch.as_tensor(global_tokens, device="cpu")
    if where.dim() != 1 or where.is_floating_point() or where.dtype == torch.bool:
        if where.numel():
            raise ValueError(
                f"{name}: global_tokens: expected positions, integers in one dimension, "
                f"got {where.dtype} of {tuple(where.shape)}"
            )
        where = where.flatten()
    where = where.long()
    if len(where) and (int(where.min()) < 0 or int(where.max()) >= T):
        raise ValueError(
            f"{name}: global_tokens: expected positions from 0 to {T - 1}, "
            f"got {int(where.min())} to {int(where.max())}"
        )
    half = window // 2
    entries = _window(grid, (half, 0 if causal else half), dilation)
    if len(where):
        chosen = torch.zeros(T, dtype=torch.bool)
        chosen[where] = True
        everywhere = seen_keys(grid, chosen)
        if global_queries:
            everywhere = combine(everywhere, seeing_queries(grid, chosen), torch.bitwise_or)
        if causal:
            everywhere = causal_part(grid, everywhere)
        entries = combine(entries, everywhere, torch.bitwise_or)
    return BlockMask(grid, entries)


def bigbird(
    T: int,
    *,
    block_size: int = 64,
    num_random_blocks: int = 3,
    heads: int = 1,
    seed: int = 0,
    extra_tokens: int = 0,
    random_blocks: Tensor | None = None,
) -> BlockMask:
    """BigBird: blocks of tokens that see their neighbours, some random blocks, and global ones.

    Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences", section 2. A set: a block that
    is chosen twice counts once. The random blocks depend on the arguments alone, in training and
    afterwards, on any machine.

    Args:
        T: Tokens, the extra ones included; the last block may be short.
        block_size: Tokens in a block of the pattern, any number.
        num_random_blocks: Random blocks that each other block sees, besides its neighbours, itself
            and the global ones; fewer where there are not so many.
        heads: How many heads draw random blocks of their own.
        seed: Of the random blocks: give each layer another one.
        extra_tokens: 0 is the internal construction (ITC): the first and the last block are global,
            seeing and being seen by all. Above 0 is the extended one (ETC): so many first tokens are
            global and the blocks begin after them.
        random_blocks: (heads, blocks, n) integers, each block's random ones, in place of those that
            ``num_random_blocks`` and ``seed`` would draw: from a model that has its own.

    Raises:
        ValueError: A value does not fit.

    Example::

        bigbird(4096, heads=8, seed=layer)
    """
    name = "bigbird"
    _check_counts(name, block_size=block_size, heads=heads)
    for label, x in (("num_random_blocks", num_random_blocks), ("extra_tokens", extra_tokens)):
        if x < 0:
            raise ValueError(f"{name}: {label}: expected 0 or more, got {x}")
    if extra_tokens > T:
        raise ValueError(f"{name}: extra_tokens: expected up to T, {T}, got {extra_tokens}")
    blocks = -(-(T - extra_tokens) // block_size)
    internal = extra_tokens == 0
    rows = torch.arange(blocks)
    near = rows.view(-1, 1) + torch.tensor([-1, 0, 1])
    ends = torch.tensor([0, blocks - 1]) if internal else torch.empty(0, dtype=torch.int64)
    fixed = torch.cat([near, ends.expand(blocks, -1)], 1).masked_fill(
        torch.cat([(near < 0) | (near >= blocks), torch.zeros(blocks, len(ends)).bool()], 1), blocks
    )
    if random_blocks is None:
        seen = _with_random_blocks(fixed, blocks, num_random_blocks, heads, seed)
    else:
        _check_random_blocks(random_blocks, heads, blocks)
        seen = torch.cat([fixed.expand(heads, -1, -1), random_blocks.cpu().long()], 2)
    listed = (seen < blocks).nonzero()
    which, row = listed[:, 0], listed[:, 1]
    column = seen[seen < blocks]
    if internal:  # rows of the global blocks: replaced by all columns
        inner = (row > 0) & (row < blocks - 1)
        which, row, column = which[inner], row[inner], column[inner]
        first_and_last = torch.unique(ends.clamp(min=0)) if blocks else ends
        number = torch.arange(heads * len(first_and_last) * blocks)
        which = torch.cat([which, number // max(1, len(first_and_last) * blocks)])
        row = torch.cat([row, first_and_last.repeat_interleave(blocks).repeat(heads)])
        column = torch.cat([column, rows.repeat(heads * len(first_and_last))])
        return of_blocks(T, block_size, heads, which, row, column)
    chosen = torch.unique((which * blocks + row) * blocks + column)
    which, row, column = chosen // blocks**2, chosen // blocks % blocks, chosen % blocks
    q, k = (extra_tokens + x * block_size for x in (row, column))
    edges = [q, (q + block_size).clamp(max=T), k, (k + block_size).clamp(max=T)]
    # The extra tokens' rows, and their columns below.
    grid = _grid(name, T, T, heads, block_size if block_size % 64 == 0 else 64)
    lists = torch.arange(heads)
    which = torch.cat([which, lists, lists])
    extra = torch.tensor([[0, extra_tokens, 0, T], [extra_tokens, T, 0, extra_tokens]])
    edges = [torch.cat([e, x.repeat_interleave(heads)]) for e, x in zip(edges, extra.unbind(1))]
    return BlockMask(grid, rectangles(grid, which, *edges), heads=heads)


def of_blocks(
    T: int, block_size: int, heads: int, which: Tensor, row: Tensor, column: Tensor
) -> BlockMask:
    """Blocks seen whole, as lists of their heads, rows and columns; one that is named twice counts once.

    As `BlockMask.from_layout`, without rows x columns of memory.
    """
    blocks = -(-T // block_size)
    chosen = torch.unique((which * blocks + row) * blocks + column)
    if block_size % 64 == 0:
        grid = _grid("of_blocks", T, T, heads, block_size)
        entries = Entries(chosen, torch.zeros_like(chosen), _nothing_but_whole(grid))
        return BlockMask(grid, entries, heads=heads)
    grid = _grid("of_blocks", T, T, heads, 64)
    which, row, column = chosen // blocks**2, chosen // blocks % blocks, chosen % blocks
    q, k = row * block_size, column * block_size
    edges = [q, (q + block_size).clamp(max=T), k, (k + block_size).clamp(max=T)]
    return BlockMask(grid, rectangles(grid, which, *edges), heads=heads)


def rectangle(T: int, queries: tuple[int, int], keys: tuple[int, int]) -> BlockMask:
    """Queries from begin to end see keys from begin to end, and the others nothing."""
    grid = _grid("rectangle", T, T, 1, 64)
    edges = (torch.tensor([x]) for x in (*queries, *keys))
    return BlockMask(grid, rectangles(grid, torch.zeros(1, dtype=torch.int64), *edges))


def sparse_transformer(
    T: int,
    *,
    stride: int,
    mode: str = "strided",
    summary: int = 8,
    heads: Sequence[str] | None = None,
    block_size: int = 64,
) -> BlockMask:
    """The Sparse Transformer's two factors, merged or one a head; causal.

    Child et al. 2019, "Generating Long Sequences with Sparse Transformers", section 4. With l the
    stride, strided: "local" is the last l tokens and the token itself, "strided" the tokens i, i - l,
    i - 2 l, ... Fixed: "local" is the token's own chunk of l, "summary" the last ``summary`` tokens of
    every chunk. A row may see nothing: early ones of "summary" alone.

    Args:
        T: Tokens.
        stride: l, about the square root of T.
        mode: "strided" or "fixed".
        summary: Tokens at the end of each chunk, from 1 to ``stride``; of mode "fixed".
        heads: Which set each head has ("local", "strided", "summary"); None is one mask for all heads
            that merges both sets.
        block_size: Tokens in a side of a block, a multiple of 64.

    Raises:
        ValueError: A value does not fit.

    Example::

        sparse_transformer(4096, stride=64, heads=["local"] * 4 + ["strided"] * 4)
    """
    name = "sparse_transformer"
    if mode not in _MODES:
        raise ValueError(f'{name}: mode: expected "strided" or "fixed", got {mode!r}')
    _check_counts(name, stride=stride)
    if mode == "fixed" and not 1 <= summary <= stride:
        raise ValueError(f"{name}: summary: expected 1 to the stride, {stride}, got {summary}")
    grid = _grid(name, T, T, 1, block_size)
    wanted = _MODES[mode] if heads is None else tuple(heads)
    for i, kind in enumerate(wanted):
        if kind not in _MODES[mode]:
            raise ValueError(
                f"{name}: heads[{i}]: expected one of {', '.join(_MODES[mode])}, got {kind!r}"
            )
    if not wanted:
        raise ValueError(f"{name}: heads: expected at least one, or None")
    sets = {kind: _factor(grid, kind, mode, stride, summary) for kind in dict.fromkeys(wanted)}
    if heads is None:
        first, second = (sets[kind] for kind in wanted)
        return BlockMask(grid, combine(first, second, torch.bitwise_or))
    lists = Grid(len(wanted), T, T, block_size, block_size)
    size = grid.rows * grid.columns
    begins: dict[str, int] = {}
    bits: list[Tensor] = []
    for kind, entries in sets.items():
        begins[kind] = sum(len(table) for table in bits)
        bits.append(entries.bits)
    # Each set's pattern 0 is the whole block; the later ones' stay, unused, in the table.
    patterns = [
        torch.where(sets[kind].patterns == 0, 0, sets[kind].patterns + begins[kind]) for kind in wanted
    ]
    keys = [sets[kind].keys + head * size for head, kind in enumerate(wanted)]
    entries = Entries(torch.cat(keys), torch.cat(patterns), torch.cat(bits))
    return BlockMask(lists, entries, heads=len(wanted))


def _window(grid: Grid, window: tuple[int, int], dilation: int) -> Entries:
    """Token i sees i + n * dilation for -left <= n <= right; -1 is no bound."""
    left, right = (n * dilation if n >= 0 else max(grid.tokens, 1) for n in window)

    def seen(distance: Tensor) -> Tensor:
        near = (distance <= left) & (distance >= -right)
        return near & (distance % dilation == 0) if dilation > 1 else near

    def blocks(tokens: int) -> int:
        return min(grid.rows, math.ceil(tokens / grid.query_block) + 1)

    return toeplitz(grid, -blocks(right), blocks(left), seen)


def _factor(grid: Grid, kind: str, mode: str, stride: int, summary: int) -> Entries:
    if kind == "strided":
        return toeplitz(grid, 0, grid.rows, lambda far: (far >= 0) & (far % stride == 0))
    if kind == "summary":
        return causal_part(grid, seen_keys(grid, torch.arange(grid.keys) % stride >= stride - summary))
    if mode == "strided":
        return _window(grid, (stride, 0), 1)
    begin = torch.arange(0, grid.tokens, stride)
    end = (begin + stride).clamp(max=grid.tokens)
    return causal_part(grid, rectangles(grid, torch.zeros_like(begin), begin, end, begin, end))


def _nothing_but_whole(grid: Grid) -> Tensor:
    return torch.full((1, grid.query_block // 64, grid.key_block), -1)


def _check_random_blocks(random_blocks: Tensor, heads: int, blocks: int) -> None:
    name = "bigbird: random_blocks"
    if random_blocks.dtype.is_floating_point or random_blocks.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {random_blocks.dtype}")
    if random_blocks.dim() != 3 or random_blocks.shape[:2] != (heads, blocks):
        raise ValueError(f"{name}: expected ({heads}, {blocks}, n), got {tuple(random_blocks.shape)}")
    if random_blocks.numel() and not 0 <= int(random_blocks.min()) <= int(random_blocks.max()) < blocks:
        raise ValueError(
            f"{name}: expected blocks from 0 to {blocks - 1}, "
            f"got {int(random_blocks.min())} to {int(random_blocks.max())}"
        )


def _with_random_blocks(fixed: Tensor, blocks: int, count: int, heads: int, seed: int) -> Tensor:
    """Columns (heads, blocks, n): ``fixed`` ones (``blocks`` where there is none) and random others."""
    fixed = fixed.sort(1).values
    again = torch.zeros_like(fixed, dtype=torch.bool)
    again[:, 1:] = fixed[:, 1:] == fixed[:, :-1]
    taken = fixed.masked_fill(again, blocks).sort(1).values.repeat(heads, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        left = blocks - (taken < blocks).sum(2)
        drawn = torch.rand(heads, blocks, dtype=torch.float64, generator=generator) * left
        pick = drawn.long()  # the pick-th of those that are left
        for i in range(taken.shape[2]):
            pick += pick >= taken[:, :, i]
        pick = torch.where(left > 0, pick, blocks)
        taken = torch.cat([taken, pick.unsqueeze(2)], 2).sort(2).values
    return taken
