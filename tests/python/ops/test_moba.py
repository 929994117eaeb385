"""`longspan.mixture_of_block_attention` computes what dense attention under the gate's mask computes."""

from typing import Any

import pytest
import torch
from attention_oracle import heads, plain
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    results,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

import longspan
from longspan import _C
from longspan.reference import moba as reference


def ours(block: int, topk: int, causal: bool = True, **options: Any):
    return lambda **x: longspan.mixture_of_block_attention(
        **x, block_size=block, topk=topk, causal=causal, **options
    )


def oracle(block: int, topk: int, causal: bool = True, scale: float | None = None):
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        number = q.shape[-1] ** -0.5 if scale is None else scale
        return reference.mixture_of_block_attention(q, k, v, block, topk, causal, number)

    return call


SHAPES = [
    (2, 4, 2, 150, 150),
    (1, 6, 1, 100, 260),
    (2, 3, 3, 65, 65),
    (1, 2, 2, 1, 130),
    (1, 2, 1, 1, 1),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(isa: str, shape: tuple[int, ...], causal: bool) -> None:
    tensors = heads(*shape, 16, 12)
    for block, topk in ((16, 3), (32, 1), (23, 2), (64, 4)):
        case = (block, topk, causal)
        assert_agree(results(ours(*case), tensors), results(oracle(*case), tensors))
    assert_agree(
        results(ours(16, 3, causal, scale=-0.3), tensors), results(oracle(16, 3, causal, -0.3), tensors)
    )


def choice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys whose block means are far apart: every precision chooses the same."""
    k, q = tensors["k"], tensors["q"]
    block = torch.arange(k.shape[2]) // 16
    k[..., 0] = (block * 7 % 5).to(k) * 0.5
    q[..., 0] = 8
    return {"q": q, "k": k, "v": tensors["v"]}


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 1000])
def test_lengths_in_float(length: int) -> None:
    tensors = choice(heads(1, 4, 2, length, length, 64, dtype=torch.float32))
    want = results(oracle(16, 3), {n: x.double() for n, x in tensors.items()})
    seen = reference.chosen_blocks(tensors["q"], tensors["k"], 16, 3, True)
    exact = reference.chosen_blocks(tensors["q"].double(), tensors["k"].double(), 16, 3, True)
    assert torch.equal(seen, exact)
    assert_agree(results(ours(16, 3), tensors), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error(dtype: torch.dtype) -> None:
    tensors = choice(heads(1, 4, 2, 200, 200, 32))
    chosen = reference.chosen_blocks(tensors["q"].to(dtype), tensors["k"].to(dtype), 16, 3, True)
    mask = torch.where(chosen.repeat_interleave(16, -1)[..., :200], 0.0, -torch.inf)
    assert_error_ratio(ours(16, 3), lambda q, k, v: plain(q, k, v, mask, causal=True), tensors, dtype)


def test_closed_forms() -> None:
    tensors = heads(2, 4, 2, 100, 100, 16)
    full = results(lambda **x: longspan.attention(**x, causal=True), tensors)
    assert_agree(results(ours(16, 7), tensors), full)
    assert_agree(results(ours(16, 99), tensors), full)
    own = torch.arange(100)[:, None] // 16 == torch.arange(100) // 16
    diagonal = results(lambda **x: longspan.attention(**x, attn_mask=own, causal=True), tensors)
    assert_agree(results(ours(16, 1), tensors), diagonal)


def test_equal_blocks_take_the_first_and_nan_the_last() -> None:
    tensors = heads(1, 1, 1, 80, 80, 8)
    tensors["k"][:] = 1
    found = ours(16, 2)(**tensors)
    block = torch.arange(80) // 16
    seen = (block[:, None] == block) | (block == 0)
    want = longspan.attention(**tensors, attn_mask=seen, causal=True)
    torch.testing.assert_close(found, want)
    tensors["k"][:, :, 20] = torch.nan  # its block is chosen by nobody
    assert ours(16, 2)(**tensors)[:, :, 32:].isfinite().all()


def test_a_step_is_the_last_row() -> None:
    tensors = heads(3, 4, 2, 150, 160, 16)
    k, v = tensors["k"], tensors["v"]
    means = k.unflatten(2, (10, 16)).mean(3)
    ends = torch.tensor([160, 77, 9])
    for tokens in (1, 3):
        step = torch.cat([torch.randn(1, 4, tokens, 16, dtype=torch.float64) for _ in ends])
        found = longspan.mixture_of_block_attention_step(step, k, v, ends, means, block_size=16, topk=3)
        for i, end in enumerate(ends):
            row = {"q": step[i : i + 1], "k": k[i : i + 1, :, :end], "v": v[i : i + 1, :, :end]}
            torch.testing.assert_close(found[i : i + 1], ours(16, 3)(**row))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_merging(requires_grad: bool) -> None:
    own, own_lse = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5)
    parts, parts_lse = torch.randn(20, 8), torch.randn(20)
    tensors = [x.requires_grad_(requires_grad) for x in (own, own_lse, parts, parts_lse)]
    place = torch.randperm(20).view(2, 10)
    opcheck(torch.ops.longspan.merge_parts.default, (*tensors, place))
    found = torch.ops.longspan.merge_parts(*tensors, place)
    outs = [own, *(parts[at].view_as(own) for at in place)]
    lses = [own_lse, *(parts_lse[at].view_as(own_lse) for at in place)]
    torch.testing.assert_close(found, longspan.merge_attention(outs, lses)[0])
    if not requires_grad:
        arguments = (torch.randn_like(own), *tensors, place)
        opcheck(torch.ops.longspan.merge_parts_backward.default, arguments)
        for wrong in (torch.zeros_like(place), place + 1):
            assert_raises(
                RuntimeError,
                ["permutation"],
                lambda wrong=wrong: torch.ops.longspan.merge_parts(*tensors, wrong),
            )


def test_gradcheck() -> None:
    tensors = heads(1, 2, 1, 9, 9, 3, 2)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return longspan.mixture_of_block_attention(q, k, v, block_size=2, topk=3)

    assert gradcheck(call, [x.requires_grad_() for x in tensors.values()])


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2)),
    st.integers(1, 90),
    st.integers(0, 60),
    st.tuples(st.integers(1, 40), st.integers(1, 6), st.booleans()),
)
def test_any_shape(shape: Any, tokens: int, more: int, case: Any) -> None:
    b, group, kv = shape
    tensors = heads(b, group * kv, kv, tokens, tokens + more, 6, 4)
    assert_agree(results(ours(*case), tensors), results(oracle(*case), tensors))


def test_threads_and_strides_change_nothing(isa: str) -> None:
    tensors = choice(heads(1, 4, 2, 300, 300, 16, dtype=torch.float32))
    assert_threads_change_nothing(lambda: results(ours(16, 4), tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_nothing(dtype: torch.dtype) -> None:
    tensors = choice(heads(2, 4, 2, 130, 130, 20, dtype=dtype))
    assert_strides_change_nothing(ours(16, 3), tensors, ["q", "k", "v"])


def test_compiles_whole(fresh_compiler: None) -> None:
    tensors = heads(1, 4, 2, 100, 100, 16)
    compiled = torch.compile(ours(16, 3), fullgraph=True, backend="aot_eager")
    assert_agree(results(compiled, tensors), results(ours(16, 3), tensors))


def test_scratch_is_linear_in_the_length() -> None:
    def peak(tokens: int) -> int:
        tensors = heads(1, 4, 2, tokens, tokens, 8, dtype=torch.float32)
        _C.scratch_reset_peak()
        before = _C.scratch_peak()
        results(ours(128, 3), tensors)
        return _C.scratch_peak() - before

    a, b, c = (peak(n) for n in (2048, 5120, 8192))
    assert c > 0
    assert c - b <= 1.1 * (b - a)


def test_empty_tensors() -> None:
    for b, tokens, keys in ((0, 5, 5), (0, 50, 50), (1, 0, 50), (1, 0, 0)):
        found = results(ours(16, 2), heads(b, 2, 1, tokens, keys, 8))
        assert found["out"].shape == (b, 2, tokens, 8)
        assert (found["d k"] == 0).all()


X = {"q": torch.randn(1, 4, 10, 8), "k": torch.randn(1, 2, 10, 8), "v": torch.randn(1, 2, 10, 8)}


@pytest.mark.parametrize(
    ("kind", "parts", "change"),
    [
        (ValueError, ["block_size", "0"], {"block_size": 0}),
        (ValueError, ["topk", "0"], {"topk": 0}),
        (ValueError, ["as many keys", "10", "9"], {"k": X["k"][:, :, :9], "v": X["v"][:, :, :9]}),
        (
            ValueError,
            ["k", "divides", "3"],
            {"k": torch.ones(1, 3, 10, 8), "v": torch.ones(1, 3, 10, 8)},
        ),
        (TypeError, ["v", "float64"], {"v": X["v"].double()}),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], change: dict[str, Any]) -> None:
    assert_raises(kind, parts, lambda: longspan.mixture_of_block_attention(**X | change))


@pytest.mark.parametrize(
    ("kind", "parts", "change"),
    [
        (ValueError, ["block_means", "(1, 2, 2, 8)"], {"block_means": torch.ones(1, 2, 3, 8)}),
        (TypeError, ["block_means", "float32"], {"block_means": torch.ones(1, 2, 2, 8).double()}),
        (ValueError, ["cache_seqlens", "batch"], {"cache_seqlens": torch.tensor([1, 2])}),
        (RuntimeError, ["no_grad"], {"q": X["q"][:, :, :1].clone().requires_grad_()}),
    ],
)
def test_errors_of_a_step(kind: type[Exception], parts: list[str], change: dict[str, Any]) -> None:
    arguments = {
        "q": X["q"][:, :, :1], "k_cache": X["k"], "v_cache": X["v"],
        "cache_seqlens": torch.tensor([10]), "block_means": torch.ones(1, 2, 2, 8), "block_size": 8,
    }  # fmt: skip
    assert_raises(kind, parts, lambda: longspan.mixture_of_block_attention_step(**arguments | change))
