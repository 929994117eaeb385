"""`longspan.native_sparse_attention` computes what three dense attentions and gates compute."""

from typing import Any

import pytest
import torch
from attention_oracle import heads, visible
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_threads_change_nothing,
    results,
    to,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

import longspan
from longspan import _C
from longspan.reference import nsa as reference

SMALL = {
    "block_size": 16,
    "block_counts": 4,
    "window_size": 20,
    "compress_length": 8,
    "compress_stride": 4,
}


def inputs(
    b: int, h: int, kv: int, tokens: int, keys: int, *sizes: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    tensors = heads(b, h, kv, tokens, keys, *(sizes or (16, 12)), dtype=dtype)
    gates = torch.rand(3, b, h, tokens, dtype=torch.float64).to(dtype)
    return tensors | dict(zip(("g_cmp", "g_slc", "g_swa"), gates))


def ours(**options: Any):
    return lambda **x: longspan.native_sparse_attention(**x, **options)


def oracle(**options: Any):
    return lambda **x: reference.native_sparse_attention(**x, **options)


# Lists do not depend on rounding: float's and double's selection agree but for near ties.
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(2, 8, 2, 150, 150), (1, 4, 1, 63, 200), (1, 3, 3, 5, 5), (1, 4, 2, 3, 130), (1, 2, 1, 1, 1)],
    ids=str,
)
def test_against_the_reference(isa: str, shape: tuple[int, ...], causal: bool) -> None:
    tensors = inputs(*shape)
    options = SMALL | {"causal": causal}
    assert_agree(results(ours(**options), tensors), results(oracle(**options), tensors))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compress_length": 64, "compress_stride": 64, "block_counts": 3},
        {"scale": 0.4, "window_size": 1, "block_counts": 1},
        {"compress_length": 16, "compress_stride": 4, "block_size": 12},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], causal: bool) -> None:
    tensors = inputs(1, 16, 1, 700, 700)
    options = options | {"causal": causal}
    assert_agree(results(ours(**options), tensors), results(oracle(**options), tensors))


def test_compressed_keys_of_the_caller_have_gradients() -> None:
    tensors = inputs(1, 4, 2, 100, 100) | {
        "k_cmp": torch.randn(1, 2, 24, 16, dtype=torch.float64),
        "v_cmp": torch.randn(1, 2, 24, 12, dtype=torch.float64),
    }
    assert_agree(results(ours(**SMALL), tensors), results(oracle(**SMALL), tensors))


def chosen(tensors: dict[str, Tensor]) -> Tensor:
    """Lists that both precisions take."""
    blocks = -(-tensors["k"].shape[2] // 16)
    b, kv, tokens = tensors["k"].shape[0], tensors["k"].shape[1], tensors["q"].shape[2]
    return torch.rand(b, kv, tokens, blocks).argsort(-1)[..., :3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 1000])
def test_lengths(length: int, dtype: torch.dtype) -> None:
    tensors = inputs(1, 4, 1, length, length, dtype=dtype)
    options = SMALL | {"block_indices": chosen(tensors)}
    assert_agree(
        results(ours(**options), tensors), results(oracle(**options), to(torch.float64, tensors))
    )


def plain(indices: Tensor, **options: Any):
    """Every product and sum in the tensors' own precision."""

    def call(q: Tensor, k: Tensor, v: Tensor, g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor) -> Tensor:
        length, stride = options["compress_length"], options["compress_stride"]
        tokens, group = q.shape[2], q.shape[1] // k.shape[1]
        k_cmp, v_cmp = (reference.compress_keys(x, length, stride) for x in (k, v))
        at = torch.arange(tokens)[:, None]
        named = (indices[..., None] == torch.arange(-(-tokens // options["block_size"]))).any(-2)
        named = named.repeat_interleave(options["block_size"], -1)[..., :tokens]
        masks = (
            torch.arange(k_cmp.shape[2]) * stride + length - 1 <= at,
            named.repeat_interleave(group, 1) & (torch.arange(tokens) <= at),
            visible(tokens, tokens, causal=True, window=(options["window_size"] - 1, 0)),
        )
        total: Any = 0
        keys = ((k_cmp, v_cmp), (k, v), (k, v))
        for gate, (x, y), mask in zip((g_cmp, g_slc, g_swa), keys, masks):
            x, y = (z.repeat_interleave(group, 1) for z in (x, y))
            score = (q * q.shape[3] ** -0.5) @ x.transpose(-1, -2)
            empty = ~mask.any(-1, keepdim=True)
            score = score.masked_fill(~mask & ~empty, -torch.inf)
            weight = torch.where(empty, 0, score.softmax(-1))
            total = total + gate[..., None] * (weight @ y)
        return total

    return call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error(dtype: torch.dtype) -> None:
    tensors = inputs(1, 8, 2, 200, 200)
    own = (torch.arange(200) // 16)[:, None].expand(1, 2, 200, 1)
    indices = chosen(tensors)
    indices = torch.cat([own, torch.where(indices == own, -1, indices)], -1)
    assert_error_ratio(ours(**SMALL, block_indices=indices), plain(indices, **SMALL), tensors, dtype)


def test_enough_blocks_are_full_attention() -> None:
    tensors = heads(1, 8, 2, 200, 200, 16)
    gate = torch.ones(1, 8, 200, dtype=torch.float64)
    full = results(lambda **x: longspan.attention(**x, causal=True), tensors)
    many = {"g_slc": gate, "block_size": 16, "block_counts": 13}
    assert_agree(results(ours(**many), tensors), full)
    wide = {"g_swa": gate, "window_size": 200}
    assert_agree(results(ours(**wide), tensors), full)


def test_counts_for_each_query() -> None:
    tensors = inputs(1, 4, 2, 120, 120)
    counts = torch.randint(1, 5, (1, 2, 120))
    found = ours(**SMALL | {"block_counts": counts})(**tensors)
    for n in range(1, 5):
        want = ours(**SMALL | {"block_counts": n})(**tensors)
        rows = (counts == n).repeat_interleave(2, 1)
        torch.testing.assert_close(found[rows], want[rows])
    indices = chosen(tensors)
    found = ours(**SMALL | {"block_counts": counts.clamp(max=3), "block_indices": indices})(**tensors)
    kept = torch.where(torch.arange(3) < counts[..., None], indices, -1)
    torch.testing.assert_close(found, ours(**SMALL | {"block_indices": kept})(**tensors))


@pytest.mark.parametrize("shape", [(2, 8, 2), (1, 16, 1)], ids=str)
def test_a_step_is_the_last_row(shape: tuple[int, ...]) -> None:
    tensors = inputs(*shape, 150, 150)
    whole = ours(**SMALL)(**tensors)
    for tokens in (1, 3, 40):
        last = {n: x[:, :, -tokens:] if n[0] in "qg" else x for n, x in tensors.items()}
        torch.testing.assert_close(ours(**SMALL)(**last), whole[:, :, -tokens:])
    slots = {n: torch.cat([x, torch.full_like(x, torch.nan)], 2) for n, x in last.items() if n in "kv"}
    # Means of what is not there are never seen.
    found = ours(**SMALL, cache_seqlens=torch.full(shape[:1], 150))(**last | slots)
    torch.testing.assert_close(found, whole[:, :, -40:])


def test_sequences_of_a_cache_differ_in_length() -> None:
    tensors = inputs(3, 4, 2, 150, 150)
    ends = [150, 77, 3]
    step = {n: torch.cat([x[i : i + 1, :, e - 2 : e] for i, e in enumerate(ends)])
            for n, x in tensors.items() if n not in "kv"}  # fmt: skip
    found = ours(**SMALL, cache_seqlens=torch.tensor(ends))(**step, k=tensors["k"], v=tensors["v"])
    for i, end in enumerate(ends):
        row = {n: x[i : i + 1, :, :end] for n, x in tensors.items()}
        torch.testing.assert_close(found[i : i + 1], ours(**SMALL)(**row)[:, :, -2:])


def test_gradcheck() -> None:
    tensors = inputs(1, 2, 1, 11, 11, 3, 2)
    options = {
        "block_size": 4,
        "block_counts": 2,
        "window_size": 3,
        "compress_length": 4,
        "compress_stride": 2,
    }
    options["block_indices"] = torch.tensor([[0, 2]]).expand(1, 1, 11, 2)

    def call(*x: Tensor) -> Tensor:
        return longspan.native_sparse_attention(*x, **options)

    assert gradcheck(call, [x.requires_grad_() for x in tensors.values()])


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 2)),
    st.integers(1, 90),
    st.integers(0, 60),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6)),
    st.tuples(st.integers(1, 6), st.integers(1, 40), st.booleans()),
)
def test_any_shape(shape: Any, tokens: int, more: int, spans: Any, rest: Any) -> None:
    b, group, kv = shape
    stride, length, block = spans
    options = {
        "compress_stride": stride, "compress_length": length * stride, "block_size": block * stride,
        "block_counts": rest[0], "window_size": rest[1], "causal": rest[2],
    }  # fmt: skip
    tensors = inputs(b, group * kv, kv, tokens, tokens + more, 5, 4)
    assert_agree(results(ours(**options), tensors), results(oracle(**options), tensors))


def test_compression() -> None:
    x = torch.randn(2, 3, 77, 5, dtype=torch.float64, requires_grad=True)
    for tokens in (1, 7, 8, 9, 12, 13, 77):
        for length, stride in ((8, 4), (8, 8), (12, 4), (5, 1)):
            found = longspan.compress_keys(
                x[:, :, :tokens], compress_length=length, compress_stride=stride
            )
            torch.testing.assert_close(found, reference.compress_keys(x[:, :, :tokens], length, stride))
    assert longspan.compress_keys(x[:, :, :0]).shape == (2, 3, 0, 5)


def test_threads_change_nothing(isa: str) -> None:
    tensors = inputs(1, 8, 1, 300, 300, dtype=torch.float32)
    assert_threads_change_nothing(lambda: results(ours(**SMALL), tensors))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 2, 150, 150), (1, 4, 1, 63, 200), (1, 3, 3, 5, 5)], ids=str)
def test_compressed_attention(isa: str, shape: tuple[int, ...], causal: bool) -> None:
    """By itself and beside the selection: out and log-sum-exp, with gradients of both."""
    b, h, kv, tokens, keys = shape
    count = longspan.ops.selected.compressed_count(keys, 8, 4)
    tensors = heads(b, h, kv, tokens, count, 16, 12)
    last = torch.arange(count) * 4 + 7
    seen = (last <= torch.arange(keys - tokens, keys)[:, None]) | (not causal)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return longspan.attention(q, k, v, seen, return_lse=True)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return longspan.compressed_attention(
            q, k, v, keys=keys, compress_length=8, compress_stride=4, causal=causal
        )

    def beside(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.longspan.select_blocks(q, k, v, None, None, keys, 8, 4, 16, 3, causal, 0.25)[1:]

    want = results(dense, tensors)
    assert_agree(results(alone, tensors), want)
    assert_agree(results(beside, tensors), want)


def test_compiles_whole(fresh_compiler: None) -> None:
    tensors = inputs(1, 8, 2, 100, 100)
    compiled = torch.compile(ours(**SMALL), fullgraph=True, backend="aot_eager")
    assert_agree(results(compiled, tensors), results(ours(**SMALL), tensors))


def test_scratch_is_linear_in_the_length() -> None:
    def peak(tokens: int) -> int:
        tensors = inputs(1, 16, 16, tokens, tokens, 8, dtype=torch.float32)
        _C.scratch_reset_peak()
        before = _C.scratch_peak()
        results(ours(window_size=64, block_counts=4), tensors)
        return _C.scratch_peak() - before

    # The peak is that of whichever part takes most, so it is compared as a whole.
    b, c = (peak(n) for n in (4096, 8192))
    assert b > 0
    assert c <= 1.2 * 2 * b


X = inputs(1, 4, 2, 40, 40, dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "parts", "change"),
    [
        (ValueError, ["g_cmp", "one at least"], {"g_cmp": None, "g_slc": None, "g_swa": None}),
        (ValueError, ["g_slc", "(1, 4, 40)", "(1, 4, 39)"], {"g_slc": X["g_slc"][:, :, 1:]}),
        (ValueError, ["window_size", "0"], {"window_size": 0}),
        (ValueError, ["block_size", "16", "40"], {"block_size": 40}),
        (ValueError, ["k_cmp and v_cmp", "both"], {"k_cmp": X["k"][:, :, :2]}),
        (ValueError, ["k_cmp", "1 or 2", "3"], {"k_cmp": X["k"][:, :, :3], "v_cmp": X["v"][:, :, :3]}),
        (
            ValueError,
            ["k_swa", "(1, 2, 39, 16)"],
            {"k_swa": X["k"][:, :, 1:], "v_swa": X["v"][:, :, 1:]},
        ),
        (
            ValueError,
            ["at least as many keys", "40", "3"],
            {"k": X["k"][:, :, :3], "v": X["v"][:, :, :3]},
        ),
        (ValueError, ["cache_seqlens", "causal"], {"cache_seqlens": torch.tensor([3]), "causal": False}),
        (TypeError, ["k", "float64"], {"k": X["k"].double()}),
        (ValueError, ["count", "(1, 2, 40)"], {"block_counts": torch.ones(1, 2, 3, dtype=torch.long)}),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], change: dict[str, Any]) -> None:
    assert_raises(kind, parts, lambda: longspan.native_sparse_attention(**X | change))
