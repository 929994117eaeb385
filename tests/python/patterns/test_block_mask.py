"""`BlockMask`: made of other masks, combined, turned back."""

from typing import Any

import pytest
import torch
from checks import assert_raises
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from longspan.patterns import BlockMask, bigbird, sliding_window
from longspan.patterns._entries import distinct, pack, unpack

SIZES = [64, (128, 64), (64, 16), (64, 208)]
DOCUMENT = torch.tensor([0] * 50 + [1] * 200 + [2] * 83)
ALLOWED = torch.rand(2, 3, 333, generator=torch.Generator().manual_seed(2)) < 0.5

MODS = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q - k < 40) & (k - q < 20),
    "documents": lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k],
    "by batch and head": lambda b, h, q, k: ALLOWED[b, h, k] & (q >= k),
    "constant": lambda b, h, q, k: torch.ones((), dtype=torch.bool),
    "nothing": lambda b, h, q, k: q < 0,
    "of one pair": lambda b, h, q, k: torch.stack([q, k]).max() % 3 == 0,
}


def assert_lists_fit(mask: BlockMask) -> None:
    """The transposed lists say what the lists say, ascending, with no empty or needless pattern."""
    n, (bq, bk) = mask.batch * mask.heads, mask.block_size
    rows, columns = -(-mask.shape[0] // bq), -(-mask.shape[1] // bk)
    by_row, by_column = (torch.full((n, rows, columns), -1, dtype=torch.int32) for _ in range(2))
    for i in range(n):
        for r in range(rows):
            at = slice(*mask.row_begins[i * rows + r :][:2].tolist())
            assert (mask.columns[at].diff() > 0).all()
            by_row[i, r, mask.columns[at].long()] = mask.row_patterns[at]
        for c in range(columns):
            at = slice(*mask.column_begins[i * columns + c :][:2].tolist())
            assert (mask.rows[at].diff() > 0).all()
            by_column[i, mask.rows[at].long(), c] = mask.column_patterns[at]
    assert torch.equal(by_row, by_column)
    assert (mask.bits[0] == -1).all()
    assert not (mask.bits[1:] == -1).flatten(1).all(1).any()
    assert not (mask.bits == 0).flatten(1).all(1).any()
    assert len(torch.unique(mask.bits, dim=0)) == len(mask.bits)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MODS)
def test_from_mask_mod_and_from_dense(name: str, size: Any) -> None:
    wanted = create_mask(MODS[name], 2, 3, 333, 300, device="cpu")
    mask = BlockMask.from_mask_mod(MODS[name], 333, 300, batch=2, heads=3, block_size=size)
    dense = BlockMask.from_dense(wanted, size)
    for made in (mask, dense):
        assert torch.equal(made.to_dense(), wanted)
        assert_lists_fit(made)
        assert made.shape == (333, 300)
        assert made.block_size == (size if isinstance(size, tuple) else (size, size))


def test_from_mask_mod_never_makes_the_whole_mask() -> None:
    """Pairs are asked for some rows at a time."""
    asked = 0

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        nonlocal asked
        asked += 1  # once a chunk: vmap calls it for all its pairs together
        return (q >= k) & (q - k < 5)

    mask = BlockMask.from_mask_mod(causal, 8192, 8192)
    assert asked >= 16
    assert len(mask.columns) == 2 * 128 - 1
    assert len(mask.bits) == 3


@pytest.mark.parametrize("flex_size", [128, (64, 128), (256, 32)], ids=str)
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", MODS)
def test_from_flex(name: str, separate: bool, flex_size: Any) -> None:
    flex = create_block_mask(
        MODS[name], 2, 3, 333, 300, device="cpu", BLOCK_SIZE=flex_size, separate_full_blocks=separate
    )
    mask = BlockMask.from_flex(flex)
    assert torch.equal(mask.to_dense(), create_mask(MODS[name], 2, 3, 333, 300, device="cpu"))
    assert_lists_fit(mask)


def test_from_flex_lists_without_a_mask_mod() -> None:
    count = torch.tensor([[[2, 1]]], dtype=torch.int32)
    index = torch.tensor([[[[2, 0, 1], [1, 0, 2]]]], dtype=torch.int32)
    flex = FlexMask.from_kv_blocks(count, index, seq_lengths=(256, 384))
    blocks = torch.tensor([[True, False, True], [False, True, False]])
    wanted = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(BlockMask.from_flex(flex).to_dense()[0], wanted)


@pytest.mark.parametrize("block", [1, 16, 64, 100, 128])
def test_from_layout(block: int) -> None:
    tokens, keys = 4 * block + 1, 2 * block
    layout = torch.rand(3, 5, 2) < 0.5
    wanted = layout.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :tokens, :keys]
    assert torch.equal(BlockMask.from_layout(layout, block, tokens, keys).to_dense(), wanted)
    assert torch.equal(BlockMask.from_layout(layout[0], block, tokens, keys).to_dense(), wanted[:1])


SHAPES = [(1, 1), (1, 3), (2, 1), (2, 3)]


@given(st.sampled_from(SHAPES), st.sampled_from(SHAPES), st.integers(0, 2**31), st.sampled_from(SIZES))
def test_and_or(a: tuple[int, int], b: tuple[int, int], seed: int, size: Any) -> None:
    generator = torch.Generator().manual_seed(seed)

    def some(batch: int, heads: int) -> Tensor:
        coarse = torch.rand(batch, heads, 9, 7, generator=generator)
        fine = torch.rand(batch, heads, 144, 112, generator=generator)
        return fine < coarse.repeat_interleave(16, 2).repeat_interleave(16, 3) * 3 - 1

    left, right = some(*a), some(*b)
    x, y = BlockMask.from_dense(left, size), BlockMask.from_dense(right, size)
    for found, wanted in ((x & y, left & right), (x | y, left | right)):
        dense = found.to_dense()
        assert torch.equal(dense if dense.dim() == 4 else dense[None], wanted)
        assert_lists_fit(found)


def test_stack_and_hide_keys() -> None:
    masks = [BlockMask.from_dense(torch.rand(2, 130, 150) < 0.3) for _ in range(3)]
    stacked = BlockMask.stack(masks)
    wanted = torch.stack([mask.to_dense() for mask in masks])
    assert torch.equal(stacked.to_dense(), wanted)
    assert_lists_fit(stacked)
    visible = torch.arange(150) < torch.tensor([[150], [70], [0]])
    hidden = stacked.hide_keys(visible)
    assert torch.equal(hidden.to_dense(), wanted & visible[:, None, None])
    assert_lists_fit(hidden)
    assert torch.equal(masks[0].hide_keys(visible[1]).to_dense(), wanted[0] & visible[1])
    window = sliding_window(150, window=(70, 3))
    each = window.hide_keys(visible)
    assert torch.equal(each.to_dense(), window.to_dense() & visible[:, None, None])
    assert window.hide_keys(visible[:1].expand(3, -1)).batch == 1
    assert stacked.hide_keys(visible[1]).batch == 3


def test_density_counts_visited_blocks() -> None:
    assert sliding_window(640).density == 1
    assert sliding_window(640, window=(0, 0)).density == pytest.approx(0.1)
    assert sliding_window(100, window=(0, 0)).density == pytest.approx((64**2 + 36**2) / 100**2)
    assert BlockMask.from_dense(torch.zeros(100, 100, dtype=torch.bool)).density == 0
    assert BlockMask.from_dense(torch.zeros(0, 5, dtype=torch.bool)).density == 0
    assert "density=0.1" in repr(sliding_window(640, window=(0, 0)))


def test_bits_of_one_checksum_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = torch.tensor([[[1, 2]], [[2, 1]], [[1, 2]]])
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.zeros(a[2], dtype=torch.int64))
    unique, index = distinct(bits)
    assert torch.equal(unique[index], bits)
    assert len(unique) == 2


@pytest.mark.parametrize("shape", [(1, 64, 16), (3, 128, 48), (0, 64, 64)])
def test_pack_and_unpack(shape: tuple[int, int, int]) -> None:
    seen = torch.rand(shape) < 0.5
    words = pack(seen)
    assert words.shape == (shape[0], shape[1] // 64, shape[2])
    assert torch.equal(unpack(words), seen)


@pytest.mark.parametrize("tokens", [100, 4096])
def test_plot(tokens: int) -> None:
    pytest.importorskip("matplotlib")
    mask = bigbird(tokens, heads=2)
    image = mask.plot(head=1).axes[0].images[0].get_array()
    dense = mask.to_dense()[1].float()
    if tokens > 2048:
        dense = dense.view(64, 64, 64, 64).mean((1, 3))
    assert torch.equal(torch.as_tensor(image.data), dense)
    assert_raises(ValueError, ["head", "0 to 1", "2"], lambda: mask.plot(head=2))
    assert_raises(ValueError, ["batch", "-1"], lambda: mask.plot(batch=-1))


def mod(result: Any):
    return lambda: BlockMask.from_mask_mod(lambda b, h, q, k: result, 10, 10)


@pytest.mark.parametrize(
    ("kind", "parts", "call"),
    [
        (TypeError, ["mask_mod", "bool", "float32"], mod(torch.ones(()))),
        (TypeError, ["mask_mod", "bool", "(2,)"], mod(torch.ones(2, dtype=torch.bool))),
        (TypeError, ["mask_mod", "bool", "int"], mod(1)),
        (ValueError, ["heads", "0"], lambda: BlockMask.from_mask_mod(MODS["causal"], 9, 9, heads=0)),
        (
            ValueError,
            ["block_size", "64", "16", "(64, 8)"],
            lambda: BlockMask.from_mask_mod(MODS["causal"], 9, 9, block_size=(64, 8)),
        ),
        (TypeError, ["mask", "bool", "float32"], lambda: BlockMask.from_dense(torch.ones(3, 3))),
        (ValueError, ["mask", "(3,)"], lambda: BlockMask.from_dense(torch.ones(3, dtype=torch.bool))),
        (
            TypeError,
            ["mask", "flex_attention.BlockMask", "Tensor"],
            lambda: BlockMask.from_flex(DOCUMENT),
        ),
        (
            ValueError,
            ["BlockMask.from_flex", "block_size", "(32, 32)"],
            lambda: BlockMask.from_flex(
                create_block_mask(MODS["causal"], 1, 1, 96, 96, device="cpu", BLOCK_SIZE=32)
            ),
        ),
        (
            ValueError,
            ["layout", "(2, 2)", "(3, 2)"],
            lambda: BlockMask.from_layout(torch.ones(3, 2, dtype=torch.bool), 8, 16, 16),
        ),
        (ValueError, ["shape", "9", "8"], lambda: sliding_window(9) & sliding_window(8)),
        (
            ValueError,
            ["block_size", "64", "128"],
            lambda: sliding_window(9) | sliding_window(9, block_size=128),
        ),
        (ValueError, ["heads", "2", "3"], lambda: bigbird(99, heads=2) | bigbird(99, heads=3)),
        (ValueError, ["masks", "none"], lambda: BlockMask.stack([])),
        (
            ValueError,
            ["masks[1]", "(9, 9)", "(8, 8)"],
            lambda: BlockMask.stack([sliding_window(9), sliding_window(8)]),
        ),
        (TypeError, ["visible", "bool"], lambda: sliding_window(9).hide_keys(torch.ones(9))),
        (
            ValueError,
            ["visible", "(9,)", "(8,)"],
            lambda: sliding_window(9).hide_keys(torch.ones(8, dtype=torch.bool)),
        ),
        (TypeError, ["unsupported operand"], lambda: sliding_window(9) & 3),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], call) -> None:
    assert_raises(kind, parts, call)
