"""`longspan.selected_attention` and `select_blocks` compute what their dense references compute."""

from typing import Any

import pytest
import torch
from attention_oracle import heads, plain
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_same_bits,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    lengths_with_head_sizes,
    results,
    to,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

import longspan
from longspan import _C, reference

FLOATS = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


def lists(batch: int, heads: int, tokens: int, blocks: int, n: int, share: float = 0.8) -> Tensor:
    """n different blocks for each query, in any order, some of them -1."""
    generator = torch.Generator().manual_seed(5)
    order = torch.rand(batch, heads, tokens, blocks, generator=generator).argsort(-1)[..., :n]
    return torch.where(torch.rand(order.shape, generator=generator) < share, order, -1)


def actual(indices: Tensor, **options: Any):
    return lambda q, k, v: longspan.selected_attention(q, k, v, indices, return_lse=True, **options)


def oracle(indices: Tensor, block_size: int = 64, causal: bool = True, scale: float | None = None,
           cache_seqlens: Tensor | None = None):  # fmt: skip
    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        number = q.shape[-1] ** -0.5 if scale is None else scale
        return reference.selected.selected_attention(
            q, k, v, indices, cache_seqlens, block_size, causal, number
        )

    return call


# batch, heads, kv_heads, list heads, tokens, keys, block size, n
CASES = {
    "groups of 4": (2, 8, 2, 2, 150, 150, 32, 3),
    "one group of 16": (1, 16, 1, 1, 100, 100, 16, 4),
    "a group of 80": (1, 80, 1, 1, 20, 50, 16, 2),
    "a list a head": (2, 4, 2, 4, 150, 150, 64, 2),
    "no groups": (1, 3, 3, 3, 70, 70, 8, 5),
    "odd block": (1, 6, 2, 2, 90, 121, 23, 3),
    "more keys": (2, 4, 1, 1, 9, 300, 64, 4),
    "more queries": (1, 4, 1, 1, 130, 60, 16, 3),
    "a step": (3, 8, 2, 2, 1, 500, 64, 3),
    "more blocks than a softmax takes": (1, 4, 1, 1, 60, 400, 16, 21),
}


def problem(name: str, dtype: torch.dtype = torch.float64, size: int = 24, value_size: int = 16):
    b, h, kv, listed, tokens, keys, block, n = CASES[name]
    indices = lists(b, listed, tokens, -(-keys // block), n)
    return heads(b, h, kv, tokens, keys, size, value_size, dtype=dtype), indices, block


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_cases(isa: str, name: str, dtype: torch.dtype, causal: bool) -> None:
    tensors, indices, block = problem(name, dtype)
    options = {"block_size": block, "causal": causal}
    assert_agree(
        results(actual(indices, **options), tensors),
        results(oracle(indices, **options), to(torch.float64, tensors)),
    )


@pytest.mark.parametrize("name", ["groups of 4", "a list a head", "more keys"])
def test_cache_lengths_and_scale(name: str) -> None:
    tensors, indices, block = problem(name)
    end = torch.tensor([9, 150]) if name != "more keys" else torch.tensor([70, 299])
    options = {"block_size": block, "cache_seqlens": end, "scale": -0.3}
    found = results(actual(indices, **options), tensors)
    assert_agree(found, results(oracle(indices, **options), tensors))
    tensors["k"][0, :, end[0] :] = torch.nan  # what is not there has no effect
    tensors["v"][0, :, end[0] :] = torch.nan
    assert_same_bits(results(actual(indices, **options), tensors), found)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["groups of 4", "a list a head", "odd block"])
def test_half_precision_error(isa: str, name: str, dtype: torch.dtype) -> None:
    tensors, indices, block = problem(name)
    tokens, keys = tensors["q"].shape[2], tensors["k"].shape[2]
    own = (torch.arange(keys - tokens, keys) // block)[:, None]  # so that none is empty
    indices = torch.cat(
        [torch.where(indices == own, -1, indices), own.expand(*indices.shape[:3], 1)], -1
    )
    seen = (indices[..., None] == torch.arange(-(-keys // block))).any(-2)
    seen = seen.repeat_interleave(block, -1)[..., :keys]
    seen = seen.repeat_interleave(tensors["q"].shape[1] // seen.shape[1], 1)
    mask = torch.where(seen, 0.0, -torch.inf)
    assert_error_ratio(
        lambda q, k, v: longspan.selected_attention(q, k, v, indices, block_size=block),
        lambda q, k, v: plain(q, k, v, mask, causal=True),
        tensors,
        dtype,
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("length", "size"), lengths_with_head_sizes())
def test_lengths_and_head_sizes(length: int, size: int, dtype: torch.dtype) -> None:
    tensors = heads(1, 4, 1, length, length, size, dtype=dtype)
    indices = lists(1, 1, length, -(-length // 32), 3)
    found = results(actual(indices, block_size=32), tensors)
    assert_agree(found, results(oracle(indices, 32), to(torch.float64, tensors)))


def test_all_blocks_are_full_attention() -> None:
    tensors = heads(2, 8, 2, 200, 200, 16)
    indices = torch.arange(7).flip(0).expand(2, 2, 200, 7)
    assert_agree(
        results(actual(indices, block_size=32), tensors),
        results(lambda **x: longspan.attention(**x, causal=True, return_lse=True), tensors),
    )


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_what_is_not_seen_has_no_effect(where: str, bad: float) -> None:
    """A key of a query's own block that is after it, and a query before it."""
    tensors = heads(1, 4, 1, 100, 100, 16)
    own = (torch.arange(100) // 32)[None, None, :, None]
    clean = results(actual(own, block_size=32), tensors)
    tensors[where][:, :, 50] = bad
    found = results(actual(own, block_size=32), tensors)
    at = torch.arange(100)
    if where == "q":
        rows = {
            "out": at != 50,
            "d q": at != 50,
            "d k": (at > 50) | (at < 32),
            "d v": (at > 50) | (at < 32),
        }
    else:
        rows = {
            "out": (at < 50) | (at >= 64),
            "d q": (at < 50) | (at >= 64),
            "d k": (at < 32) | (at >= 64),
        }
    for name, unaffected in rows.items():
        assert torch.equal(found[name][:, :, unaffected], clean[name][:, :, unaffected]), name


def test_rows_without_keys_are_zero() -> None:
    tensors, indices, _ = problem("groups of 4")
    indices = indices.clone()
    indices[:, :, 17] = -1
    indices[:, :, 18] = torch.tensor([4, -1, -1])  # after it
    found = results(actual(indices, block_size=32), tensors)
    assert (found["out"][:, :, 17:19] == 0).all()
    assert (found["d q"][:, :, 17:19] == 0).all()
    assert (found["out 1"][:, :, 17:19] == -torch.inf).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, ...]:
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    tokens, keys = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    block, n = draw(st.integers(1, 70)), draw(st.integers(1, 9))
    listed = draw(st.sampled_from([kv, kv * group]))
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    indices = lists(1, listed, tokens, -(-keys // block), n, share)
    return indices, (1, kv * group, kv, tokens, keys), block, draw(st.booleans())


@given(problems(), st.sampled_from(FLOATS))
def test_any_lists(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    indices, shape, block, causal = case
    tensors = heads(*shape, 8, 5, dtype=dtype)
    options = {"block_size": block, "causal": causal}
    assert_agree(
        results(actual(indices, **options), tensors),
        results(oracle(indices, **options), to(torch.float64, tensors)),
    )


def test_threads_change_nothing(isa: str) -> None:
    tensors = heads(1, 4, 1, 700, 700, 16, dtype=torch.float32)
    indices = torch.cat([torch.zeros(1, 1, 700, 1, dtype=torch.long), lists(1, 1, 700, 22, 3) + 1], -1)
    indices = torch.where((indices == 0) & (torch.arange(4) > 0), -1, indices)  # 0: several segments
    indices = torch.where(indices == 22, -1, indices)
    assert_threads_change_nothing(lambda: results(actual(indices, block_size=32), tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_nothing(dtype: torch.dtype) -> None:
    tensors, indices, block = problem("groups of 4", dtype)
    assert_strides_change_nothing(actual(indices, block_size=block), tensors, ["q", "k", "v"])


def test_gradcheck() -> None:
    indices = torch.tensor([[0, 1], [2, -1], [1, 0], [2, 0]])[None, None]
    inputs = [x.requires_grad_() for x in heads(1, 2, 1, 4, 6, 3, 2).values()]

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = actual(indices, block_size=2)(q, k, v)
        return out, torch.where(lse == -torch.inf, 0, lse)

    assert gradcheck(call, inputs)


def test_no_second_derivative() -> None:
    q, k, v = (x.requires_grad_() for x in heads(1, 2, 1, 6, 6, 4).values())
    out = longspan.selected_attention(q, k, v, torch.zeros(1, 1, 6, 1, dtype=torch.long))
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    assert_raises(RuntimeError, ["second derivative"], lambda: gradient.sum().backward())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    tensors, indices, block = problem("groups of 4", torch.float32)
    inputs = [x.requires_grad_(requires_grad) for x in tensors.values()]
    rest = (indices, torch.tensor([100, 150]), block, True, 0.2)
    opcheck(torch.ops.longspan.selected_attention_forward.default, (*inputs, *rest))
    if not requires_grad:
        out, lse = torch.ops.longspan.selected_attention_forward(*inputs, *rest)
        saved = (torch.randn_like(out), torch.randn_like(lse), *inputs, out, lse)
        opcheck(torch.ops.longspan.selected_attention_backward.default, (*saved, *rest))
        k_cmp = torch.randn(2, 2, 8, 24)
        counts = torch.randint(1, 4, (2, 2, 150))
        arguments = (None, counts, 150, 32, 16, 32, 3, True, 0.2)
        opcheck(torch.ops.longspan.select_blocks.default, (inputs[0], k_cmp, None, *arguments))
    v_cmp, k_cmp = torch.randn(2, 2, 2, 8, 24).requires_grad_(requires_grad)
    arguments = (None, None, 150, 32, 16, 32, 3, True, 0.2)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not requires_grad:  # else it sums integers and gradients
        utilities += ("test_aot_dispatch_dynamic",)
    arguments = (inputs[0], k_cmp, v_cmp, *arguments)
    opcheck(torch.ops.longspan.select_blocks.default, arguments, test_utils=utilities)


def test_compiles_whole(fresh_compiler: None) -> None:
    tensors, indices, block = problem("groups of 4")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return longspan.selected_attention(q * 2, k, v, indices, block_size=block).sin()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_agree(results(compiled, tensors), results(call, tensors))


def test_other_devices_take_the_reference() -> None:
    tensors, indices, _ = problem("groups of 4")
    q, k, v = (x.to("meta") for x in tensors.values())
    assert longspan.selected_attention(q, k, v, indices.to("meta")).shape == (2, 8, 150, 16)
    assert longspan.select_blocks(q, k[:, :, :9], keys=150).shape == (2, 2, 150, 16)


def test_empty_tensors() -> None:
    for b, tokens, keys, n in ((0, 5, 5, 1), (1, 0, 5, 1), (1, 5, 5, 0), (1, 5, 0, 2)):
        tensors = heads(b, 2, 1, tokens, keys, 8)
        indices = torch.full((b, 1, tokens, n), -1)
        found = results(actual(indices), tensors)
        assert (found["out"] == 0).all()
        assert found["out"].shape == (b, 2, tokens, 8)
        assert (found["d k"] == 0).all()


def test_scratch_is_linear_in_the_length() -> None:
    def peak(tokens: int) -> int:
        q, k, v = (
            x.requires_grad_() for x in heads(1, 4, 1, tokens, tokens, 8, dtype=torch.float32).values()
        )
        _C.scratch_reset_peak()
        before = _C.scratch_peak()
        k_cmp = longspan.compress_keys(k)
        indices = longspan.select_blocks(q, k_cmp, keys=tokens, count=4)
        longspan.selected_attention(q, k, v, indices).sum().backward()
        return _C.scratch_peak() - before

    a, b, c = (peak(n) for n in (2048, 5120, 8192))
    assert c > 0
    assert c - b <= 1.1 * (b - a)


# ---- selection


def selected(q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Ours and the reference's."""
    keys = options.pop("keys")
    defaults = {"cache_seqlens": None, "count": 16, "causal": True}
    options = defaults | options
    found = longspan.select_blocks(q, k, keys=keys, **options)
    count, counts = options["count"], None
    if isinstance(count, Tensor):
        count, counts = int(count.max()), count
    wanted = reference.selected.select_blocks(
        q, k, None, options["cache_seqlens"], counts, keys, options.get("compress_length", 32),
        options.get("compress_stride", 16), options.get("block_size", 64), count, options["causal"],
        q.shape[-1] ** -0.5,
    )[0]  # fmt: skip
    return found, wanted


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "spans", [(32, 16, 64), (64, 64, 64), (8, 8, 16), (16, 4, 8), (24, 8, 8), (64, 16, 32)], ids=str
)
@pytest.mark.parametrize(
    "shape", [(2, 8, 2, 200, 200), (1, 16, 1, 300, 300), (1, 5, 5, 7, 150)], ids=str
)
def test_selection(isa: str, shape: tuple[int, ...], spans: tuple[int, ...], causal: bool) -> None:
    b, h, kv, tokens, keys = shape
    length, stride, block = spans
    q = torch.randn(b, h, tokens, 16, dtype=torch.float64)
    k = torch.randn(b, kv, keys, 16, dtype=torch.float64) * 2
    k = longspan.compress_keys(k, compress_length=length, compress_stride=stride)
    options = {"compress_length": length, "compress_stride": stride, "block_size": block}
    for count in (1, 2, 3, 5, 40):
        found, wanted = selected(q, k, keys=keys, count=count, causal=causal, **options)
        assert torch.equal(found, wanted)
    counts = torch.randint(0, 6, (b, kv, tokens))
    found, wanted = selected(q, k, keys=keys, count=counts, causal=causal, **options)
    assert torch.equal(found, wanted)


def test_selection_over_a_cache() -> None:
    q, k = torch.randn(2, 4, 3, 8, dtype=torch.float64), torch.randn(2, 2, 400, 8, dtype=torch.float64)
    k = longspan.compress_keys(k)
    found, wanted = selected(q, k, keys=400, count=4, cache_seqlens=torch.tensor([250, 2]))
    assert torch.equal(found, wanted)
    assert (found[1, :, 0] == -1).all()  # before the first key


def test_equal_scores_take_the_first_and_nan_the_last() -> None:
    q, k = torch.zeros(1, 2, 640, 8), torch.zeros(1, 1, 39, 8)
    found = longspan.select_blocks(q, k, keys=640, count=5)
    assert found[0, 0, -1].tolist() == [0, 1, 2, 8, 9]
    q[..., -1, :] = torch.nan
    found = longspan.select_blocks(q, k, keys=640, count=5)
    assert found[0, 0, -1].tolist() == [0, 1, 2, 8, 9]
    assert found[0, 0, -2].tolist() == [0, 1, 2, 8, 9]


def test_weights_of_the_paper() -> None:
    """One compressed key takes all: its two neighbouring blocks get it, or one does twice."""
    q, k = torch.zeros(1, 1, 1024, 8), torch.zeros(1, 1, 63, 8)
    q[..., 0], k[:, :, 19, 0] = 100, 100  # keys 304 to 335: blocks 4 and 5
    found = longspan.select_blocks(q, k, keys=1024, count=5)
    assert found[0, 0, -1].tolist() == [0, 4, 5, 14, 15]


def test_threads_change_no_selection(isa: str) -> None:
    q, k = torch.randn(1, 8, 300, 16), torch.randn(1, 2, 18, 16)
    assert_threads_change_nothing(lambda: {"i": longspan.select_blocks(q, k, keys=300, count=4)})


Q, KV = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8)
ONE = torch.zeros(1, 2, 10, 1, dtype=torch.long)


@pytest.mark.parametrize(
    ("kind", "parts", "call"),
    [
        (TypeError, ["block_indices", "int"], lambda: longspan.selected_attention(Q, KV, KV, Q)),
        (
            ValueError,
            ["block_indices", "2", "4", "3"],
            lambda: longspan.selected_attention(Q, KV, KV, ONE[:, :1].expand(1, 3, 10, 1)),
        ),
        (RuntimeError, ["block below 1", "7"], lambda: longspan.selected_attention(Q, KV, KV, ONE + 7)),
        (RuntimeError, ["-1", "-2"], lambda: longspan.selected_attention(Q, KV, KV, ONE - 2)),
        (
            RuntimeError,
            ["twice", "0"],
            lambda: longspan.selected_attention(Q, KV, KV, ONE.expand(1, 2, 10, 2)),
        ),
        (
            RuntimeError,
            ["cache_seqlens", "10", "11"],
            lambda: longspan.selected_attention(Q, KV, KV, ONE, cache_seqlens=torch.tensor([11])),
        ),
        (
            ValueError,
            ["block_size", "0"],
            lambda: longspan.selected_attention(Q, KV, KV, ONE, block_size=0),
        ),
        (
            ValueError,
            ["compress_length", "multiple", "16", "24"],
            lambda: longspan.select_blocks(Q, KV[:, :, :1], keys=10, compress_length=24),
        ),
        (ValueError, ["k_cmp", "0 or 1", "10"], lambda: longspan.select_blocks(Q, KV, keys=10)),
        (ValueError, ["count", "0"], lambda: longspan.select_blocks(Q, KV, keys=160, count=0)),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], call) -> None:
    assert_raises(kind, parts, call)
