"""Each builder gives the mask that its paper's sets define."""

import pytest
import torch
from checks import assert_raises
from torch import Tensor

from longspan.patterns import (
    BlockMask,
    bigbird,
    dilated_window,
    longformer,
    sliding_window,
    sparse_transformer,
)

LENGTHS = (0, 1, 63, 64, 65, 200, 333)


def distance(tokens: int) -> Tensor:
    """Query minus key."""
    return torch.arange(tokens)[:, None] - torch.arange(tokens)


def assert_is(mask: BlockMask, dense: Tensor) -> None:
    dense = dense if dense.dim() == 3 else dense[None]
    assert mask.to_dense().shape == dense.shape
    assert torch.equal(mask.to_dense(), dense)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (0, 0), (5, 3), (100, 0), (64, 64), (0, -1)])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_sliding_window(tokens: int, window: tuple[int, int], block_size: int) -> None:
    far = distance(tokens)
    seen = torch.ones_like(far, dtype=torch.bool)
    if window[0] >= 0:
        seen &= far <= window[0]
    if window[1] >= 0:
        seen &= -far <= window[1]
    assert_is(sliding_window(tokens, window=window, block_size=block_size), seen)


@pytest.mark.parametrize("dilation", [1, 2, 7, 64, 100])
def test_dilated_window(dilation: int) -> None:
    far = distance(333)
    seen = (far % dilation == 0) & (far <= 3 * dilation) & (-far <= 2 * dilation)
    assert_is(dilated_window(333, window=(3, 2), dilation=dilation), seen)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("where", [[], [0], [0, 1, 63, 64, 130, 332], list(range(333)), [332]], ids=len)
def test_longformer(where: list[int], dilation: int, causal: bool) -> None:
    far = distance(333)
    seen = (far.abs() <= 20 * dilation) & (far % dilation == 0)
    seen[where] = True
    seen[:, where] = True
    if causal:
        seen &= far >= 0
    for positions in (where, torch.tensor(where, dtype=torch.int32)):
        mask = longformer(
            333, window=40, global_tokens=positions, dilation=dilation, causal=causal, block_size=64
        )
        assert_is(mask, seen)


def blocks_of(mask: Tensor, size: int, first: int = 0) -> Tensor:
    """Dense (heads, T, T) -> whether each block is seen, having checked that it is whole or empty."""
    index = torch.arange(first, mask.shape[-1], size)
    found = mask[:, index][:, :, index]
    whole = found.repeat_interleave(size, 1).repeat_interleave(size, 2)
    tokens = mask.shape[-1] - first
    assert torch.equal(whole[:, :tokens, :tokens], mask[:, first:, first:])
    return found


@pytest.mark.parametrize(
    ("tokens", "size"), [(1000, 64), (1024, 64), (640, 16), (1000, 100), (1280, 128)]
)
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("random", [0, 3])
def test_bigbird(tokens: int, size: int, extra: int, random: int) -> None:
    mask = bigbird(
        tokens, block_size=size, num_random_blocks=random, heads=3, seed=7, extra_tokens=extra
    )
    dense = mask.to_dense()
    assert dense.shape == (3, tokens, tokens)
    if extra:
        assert dense[:, :extra].all()
        assert dense[:, :, :extra].all()
    seen = blocks_of(dense, size, extra)
    n = seen.shape[-1]
    near = distance(n).abs() <= 1
    assert seen[:, near].all()
    if not extra:
        for end in (0, n - 1):
            assert seen[:, end].all()
            assert seen[:, :, end].all()
            near[end] = near[:, end] = True
    chosen = (seen & ~near).sum(-1)
    possible = (~near).sum(-1)
    assert torch.equal(chosen, possible.clamp(max=random).expand(3, -1))
    if random and n > 8:
        assert not torch.equal(seen[0], seen[1])


def test_bigbird_random_blocks_follow_the_seed_alone() -> None:
    first = bigbird(2048, heads=2, seed=3)
    torch.manual_seed(99)
    again, other = bigbird(2048, heads=2, seed=3), bigbird(2048, heads=2, seed=4)
    assert torch.equal(first.columns, again.columns)
    assert not torch.equal(first.to_dense(), other.to_dense())


@pytest.mark.parametrize("size", [64, 16])
def test_bigbird_with_random_blocks_of_a_model(size: int) -> None:
    chosen = torch.randint(9, (3, 9, 2))
    seen = blocks_of(bigbird(9 * size, block_size=size, heads=3, random_blocks=chosen).to_dense(), size)
    wanted = blocks_of(bigbird(9 * size, block_size=size, num_random_blocks=0).to_dense(), size)
    wanted = wanted.repeat(3, 1, 1).scatter(2, chosen, True)
    assert torch.equal(seen, wanted)


def test_bigbird_spreads_its_random_blocks() -> None:
    """Each block that may be chosen is, about as often as the others."""
    n, heads = 20, 500
    seen = blocks_of(bigbird(n * 64, num_random_blocks=3, heads=heads).to_dense(), 64)
    share = seen[:, 10].float().mean(0)
    allowed = torch.ones(n, dtype=torch.bool)
    allowed[[0, 9, 10, 11, n - 1]] = False
    assert torch.allclose(share[allowed], torch.tensor(3 / 15), atol=0.08)


@pytest.mark.parametrize("tokens", [1, 64, 130])
def test_bigbird_of_few_blocks_is_full(tokens: int) -> None:
    assert bigbird(tokens).to_dense().all()
    assert bigbird(tokens).density == 1


@pytest.mark.parametrize("stride", [1, 7, 64, 90, 128, 400])
@pytest.mark.parametrize("tokens", [65, 333])
def test_sparse_transformer(tokens: int, stride: int) -> None:
    far = distance(tokens)
    key = torch.arange(tokens).expand(tokens, -1)
    query, causal, summary = key.T, far >= 0, min(3, stride)
    strided = {"local": causal & (far <= stride), "strided": causal & (far % stride == 0)}
    fixed = {
        "local": causal & (key // stride == query // stride),
        "summary": causal & (key % stride >= stride - summary),
    }
    for mode, sets in (("strided", strided), ("fixed", fixed)):
        first, second = sets
        merged = sparse_transformer(tokens, stride=stride, mode=mode, summary=summary)
        assert_is(merged, sets[first] | sets[second])
        names = [second, first, second]
        each = sparse_transformer(tokens, stride=stride, mode=mode, summary=summary, heads=names)
        assert_is(each, torch.stack([sets[name] for name in names]))


def test_strided_sets_reach_everything_in_two_steps() -> None:
    local, strided = (
        sparse_transformer(200, stride=14, heads=[name]).to_dense()[0].double()
        for name in ("local", "strided")
    )
    assert torch.equal(strided @ local > 0, distance(200) >= 0)


@pytest.mark.parametrize("make", ["longformer", "bigbird"])
def test_memory_is_linear(make: str) -> None:
    def size(tokens: int) -> int:
        mask = (
            longformer(tokens, window=512, global_tokens=[0])
            if make == "longformer"
            else bigbird(tokens)
        )
        lists = (mask.columns, mask.row_patterns, mask.rows, mask.column_patterns, mask.row_begins)
        return sum(x.numel() * x.element_size() for x in (*lists, mask.column_begins, mask.bits))

    small, large = size(2**15), size(2**16)
    assert large <= 2.05 * small
    assert large < 2**21


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: sliding_window(100, window=(-2, 0)), ["window", "-1", "-2"]),
        (lambda: sliding_window(100, window=(1, 0), block_size=50), ["block_size", "64", "50"]),
        (lambda: sliding_window(-1), ["0 or more", "-1"]),
        (lambda: dilated_window(100, window=(1, 1), dilation=0), ["dilation", "0"]),
        (lambda: longformer(100, window=3), ["window", "even", "3"]),
        (lambda: longformer(100, window=4, global_tokens=[100]), ["global_tokens", "99", "100"]),
        (lambda: longformer(100, window=4, global_tokens=[0.5]), ["global_tokens", "float32"]),
        (lambda: bigbird(100, num_random_blocks=-1), ["num_random_blocks", "-1"]),
        (
            lambda: bigbird(640, random_blocks=torch.zeros(2, 10, 3).long()),
            ["random_blocks", "(1, 10, n)", "(2, 10, 3)"],
        ),
        (
            lambda: bigbird(64, random_blocks=torch.ones(1, 1, 3).long()),
            ["random_blocks", "0 to 0", "1"],
        ),
        (lambda: bigbird(64, random_blocks=torch.ones(1, 1, 3)), ["random_blocks", "float32"]),
        (lambda: bigbird(100, extra_tokens=101), ["extra_tokens", "100", "101"]),
        (lambda: sparse_transformer(100, stride=0), ["stride", "0"]),
        (lambda: sparse_transformer(100, stride=4, mode="full"), ["mode", "full"]),
        (lambda: sparse_transformer(100, stride=4, mode="fixed"), ["summary", "4", "8"]),
        (lambda: sparse_transformer(100, stride=4, heads=["summary"]), ["heads[0]", "summary"]),
        (lambda: sparse_transformer(100, stride=4, heads=[]), ["heads", "one"]),
    ],
)
def test_errors(call, parts: list[str]) -> None:
    assert_raises(ValueError, parts, call)
