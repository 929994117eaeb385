"""Devices without kernels: the reference path of each function, tried here on the processor."""

import sys
import types
import warnings
from typing import Any

import pytest
import torch
from attention_oracle import actual, heads
from checks import assert_agree, results
from torch import Tensor

import longspan
from longspan.ops import _checks


def take_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # The module is named in full: `longspan.ops.attention` is the function.
    module = sys.modules["longspan.ops.attention"]
    monkeypatch.setattr(module, "has_kernels", lambda *_: False)


OPTIONS: dict[str, Any] = {
    "causal": True,
    "window": (20, -1),
    "sink_tokens": 2,
    "softcap": 3.0,
    "alibi_slopes": torch.rand(2, 4, generator=torch.Generator().manual_seed(0)),
    "dropout_p": 0.2,
}


def seeded(function: Any) -> Any:
    def call(**x: Tensor) -> Any:
        torch.manual_seed(4)
        return function(**x)

    return call


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = heads(2, 4, 2, 30, 50, 16)
    tensors |= {"sinks": torch.randn(4).double(), "attn_mask": torch.randn(30, 50).double()}
    call = seeded(lambda **x: actual(**x, **OPTIONS, key_ranges=torch.tensor([[0, 50, 20], [3, 44, 9]])))
    want = results(call, tensors)
    take_kernels(monkeypatch)
    assert_agree(results(call, tensors), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_varlen(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    options = OPTIONS | {"dropout_p": 0.0}
    cu_q, cu_k = torch.tensor([0, 10, 30]), torch.tensor([0, 25, 50])
    tensors = {n: x[0].transpose(0, 1) for n, x in heads(1, 4, 2, 33, 50, 16, dtype=dtype).items()}

    def call(**x: Tensor) -> Any:
        return longspan.attention_varlen(
            **x, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options
        )

    want = results(call, tensors)
    take_kernels(monkeypatch)
    found = results(call, tensors)
    assert_agree(found, want)
    assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in want.items()}


def test_varlen_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    cu = torch.tensor([0, 10, 30])
    tensors = {n: x[0].transpose(0, 1) for n, x in heads(1, 2, 2, 30, 30, 8).items()}
    call = seeded(
        lambda **x: longspan.attention_varlen(**x, cu_seqlens_q=cu, cu_seqlens_k=cu, dropout_p=0.3)
    )
    want = results(call, tensors)
    take_kernels(monkeypatch)
    assert_agree(results(call, tensors), want)


def test_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(**_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        q, new = torch.randn(2, 4, 2, 8).double(), torch.randn(2, 2, 2, 8).double()
        k_cache, v_cache = torch.randn(2, 2, 2, 40, 8).double()
        out, lse = longspan.attention_decode(
            q, k_cache, v_cache, torch.tensor([40, 21]), k_new=new, v_new=new, window=(20, -1),
            sink_tokens=3, cache_starts=torch.tensor([0, 4]), return_lse=True,
        )  # fmt: skip
        return out, lse, k_cache, v_cache

    want = results(call, {}, gradients=False)
    take_kernels(monkeypatch)
    assert_agree(results(call, {}, gradients=False), want)


def test_warns_once_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "_warned", set())
    somewhere: Any = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    with pytest.warns(UserWarning, match="attention: longspan has no kernels for cuda"):
        assert not _checks.has_kernels("attention", somewhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _checks.has_kernels("attention", somewhere)
        assert _checks.has_kernels("attention", torch.zeros(1))
