"""`attention_varlen` is `attention` of each sequence by itself."""

from typing import Any

import pytest
import torch
from attention_oracle import plain
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_same_bits,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    results,
    to,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import longspan


def packed(total_q: int, total_k: int, h: int, kv_heads: int, size: int) -> dict[str, Tensor]:
    return {
        "q": torch.randn(total_q, h, size, dtype=torch.float64),
        "k": torch.randn(total_k, kv_heads, size, dtype=torch.float64),
        "v": torch.randn(total_k, kv_heads, size + 3, dtype=torch.float64),
    }


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Rows of no sequence are 0, their log-sum-exp -infinity."""
    slopes = options.pop("alibi_slopes", None)
    outs, lses = (
        [q.new_zeros(cu_q[0], q.shape[1], v.shape[2])],
        [q.new_full((q.shape[1], cu_q[0]), -torch.inf)],
    )
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        part, lse = longspan.attention(
            *(x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])),
            alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
            return_lse=True, **options,
        )  # fmt: skip
        outs.append(part[0].transpose(0, 1))
        lses.append(lse[0])
    rest = q.shape[0] - int(cu_q[-1])
    outs.append(q.new_zeros(rest, *outs[0].shape[1:]))
    lses.append(q.new_full((q.shape[1], rest), -torch.inf))
    return torch.cat(outs), torch.cat(lses, 1)


PACKS = {
    "one": ([0, 70], [0, 70]),
    "several": ([0, 1, 3, 70, 135], [0, 1, 3, 70, 135]),
    "empty members": ([0, 0, 20, 20, 100, 100], [0, 0, 20, 20, 100, 100]),
    "empty of keys": ([0, 10, 20, 30], [0, 10, 10, 40]),
    "empty of queries": ([0, 10, 10, 30], [0, 10, 80, 90]),
    "rows of nobody": ([5, 30, 60], [3, 40, 90]),
    "nothing": ([0, 0], [0, 0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", PACKS)
def test_is_a_loop_over_sequences(isa: str, name: str, integer: torch.dtype, dtype: torch.dtype) -> None:
    cu_q, cu_k = (torch.tensor(x, dtype=integer) for x in PACKS[name])
    spare = 7 if name == "rows of nobody" else 0
    tensors = to(dtype, packed(int(cu_q[-1]) + spare, int(cu_k[-1]) + spare, 4, 2, 16))
    tensors["sinks"] = torch.randn(4).to(dtype)
    options = {"causal": True, "window": (30, -1), "sink_tokens": 2}
    found = results(
        lambda **x: longspan.attention_varlen(
            **x, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options
        ),
        tensors,
    )
    assert_agree(found, results(lambda **x: one_by_one(**x, cu_q=cu_q, cu_k=cu_k, **options), tensors))


@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=4),
    st.booleans(),
    st.integers(-1, 40),
    st.sampled_from([0.0, 1.5]),
    st.sampled_from([0, 3]),
    st.booleans(),
)
def test_any_pack(
    sizes: list[tuple[int, int]],
    causal: bool,
    left: int,
    softcap: float,
    sink_tokens: int,
    per_sequence: bool,
) -> None:
    cu_q, cu_k = torch.zeros(2, len(sizes) + 1, dtype=torch.int64)
    cu_q[1:], cu_k[1:] = torch.tensor(sizes).cumsum(0).unbind(1)
    tensors = packed(int(cu_q[-1]), int(cu_k[-1]), 2, 1, 8)
    options = {
        "causal": causal, "window": (left, -1), "softcap": softcap, "sink_tokens": sink_tokens,
        "alibi_slopes": torch.rand(*([len(sizes)] if per_sequence else []), 2),
    }  # fmt: skip
    found = results(
        lambda **x: longspan.attention_varlen(
            **x, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options
        ),
        tensors,
    )
    assert_agree(found, results(lambda **x: one_by_one(**x, cu_q=cu_q, cu_k=cu_k, **options), tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error(dtype: torch.dtype) -> None:
    cu = torch.tensor([0, 17, 80])

    def by_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            plain(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), causal=True)[0].transpose(0, 1)
            for a, b in ((0, 17), (17, 80))
        ]
        return torch.cat(parts)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return longspan.attention_varlen(q, k, v, cu, cu, causal=True)

    assert_error_ratio(ours, by_plain, packed(80, 80, 4, 2, 40), dtype)


def test_threads_and_strides_change_nothing() -> None:
    cu = torch.tensor([0, 17, 80, 200])
    tensors = to(torch.float32, packed(200, 200, 1, 1, 16))

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return longspan.attention_varlen(q, k, v, cu, cu, causal=True, return_lse=True)

    assert_threads_change_nothing(lambda: results(call, tensors))
    assert_strides_change_nothing(call, tensors, ["q", "k", "v"])


def test_strided_offsets() -> None:
    tensors = packed(90, 90, 2, 1, 8)
    cu = torch.tensor([0, 30, 90])
    strided = torch.stack([cu, cu + 5], 1)[:, 0]
    expected = results(
        lambda **x: longspan.attention_varlen(**x, cu_seqlens_q=cu, cu_seqlens_k=cu), tensors
    )
    found = results(
        lambda **x: longspan.attention_varlen(**x, cu_seqlens_q=strided, cu_seqlens_k=strided), tensors
    )
    assert_same_bits(found, expected)
