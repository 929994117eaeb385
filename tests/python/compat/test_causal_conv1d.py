"""longspan.compat.causal_conv1d: causal-conv1d's signatures and return values over our operators."""

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_agree, assert_raises, assert_same_bits, results
from torch import Tensor

from longspan.compat import causal_conv1d
from longspan.compat.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)

F64 = torch.float64
SIGNATURES = {
    causal_conv1d_fn: "x, weight, bias=None, seq_idx=None, initial_states=None, "
    "return_final_states=False, final_states_out=None, activation=None",
    causal_conv1d_update: "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
    "conv_state_indices=None",
    causal_conv1d_varlen_states: "x, cu_seqlens, state_len",
}


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    past = weight.shape[1] - 1
    if initial_states is None:
        initial_states = x.new_zeros(*x.shape[:2], past)
    x = torch.cat([initial_states, x], 2)
    out = F.conv1d(x, weight[:, None], bias, groups=len(weight))
    return F.silu(out) if activation else out, x[:, :, x.shape[2] - past :]


def tensors(length: int = 19, width: int = 4) -> dict[str, Tensor]:
    made = {
        "x": torch.randn(2, 6, length),
        "weight": torch.randn(6, width),
        "bias": torch.randn(6),
        "initial_states": torch.randn(2, 6, width - 1),
    }
    return {name: x.double() for name, x in made.items()}


@pytest.mark.parametrize(("function", "signature"), SIGNATURES.items(), ids=lambda x: str(x)[:30])
def test_signatures(function: Any, signature: str) -> None:
    found = [str(p.replace(annotation=p.empty)) for p in inspect.signature(function).parameters.values()]
    assert ", ".join(found) == signature


def test_modules() -> None:
    assert causal_conv1d.causal_conv1d_interface.causal_conv1d_fn is causal_conv1d_fn
    assert causal_conv1d.causal_conv1d_interface.causal_conv1d_update is causal_conv1d_update
    assert causal_conv1d.causal_conv1d_varlen.causal_conv1d_varlen_states is causal_conv1d_varlen_states


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("length", [1, 2, 19])
def test_outputs_states_and_gradients(activation: str | None, length: int) -> None:
    def ours(**kw: Tensor) -> Any:
        return causal_conv1d_fn(**kw, return_final_states=True, activation=activation)

    def theirs(**kw: Tensor) -> Any:
        return plain(**kw, activation=activation)

    given = tensors(length)
    assert_agree(results(ours, given), results(theirs, given))
    alone = causal_conv1d_fn(given["x"], given["weight"], activation=activation)
    torch.testing.assert_close(alone, plain(given["x"], given["weight"], activation=activation)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_another_dtype(dtype: torch.dtype) -> None:
    given = tensors()
    x, weight, bias = given["x"], given["weight"].to(dtype), given["bias"].to(dtype)
    expected, _ = plain(x, weight.double(), bias.double())
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias), expected)
    torch.testing.assert_close(
        causal_conv1d_fn(x.float(), weight, bias), expected.float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.usefixtures("fresh_compiler")
def test_sequences_and_padding_by_seq_idx() -> None:
    given = tensors(12)
    x, weight = given["x"], given["weight"]
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, -1, -1, -1]] * 2, dtype=torch.int32)
    call = torch.compile(causal_conv1d_fn, fullgraph=True, backend="aot_eager")
    for function in (causal_conv1d_fn, call):
        out = function(x, weight, seq_idx=seq_idx)
        for begin, end in pairwise([0, 3, 8, 9]):
            torch.testing.assert_close(out[..., begin:end], plain(x[..., begin:end], weight)[0])
        assert out[..., 9:].eq(0).all()
    x.requires_grad_()
    causal_conv1d_fn(x, weight, seq_idx=seq_idx).sum().backward()
    assert x.grad is not None
    assert x.grad[..., 9:].eq(0).all()


def test_final_states_out() -> None:
    given = tensors()
    place = torch.full((2, 3, 6), torch.nan, dtype=F64).transpose(1, 2)
    out, final = causal_conv1d_fn(**given, return_final_states=True, final_states_out=place)
    expected = plain(**given)
    assert final is place
    torch.testing.assert_close((out, place), expected)
    assert_raises(
        ValueError,
        ["final_states_out", "return_final_states"],
        lambda: causal_conv1d_fn(**given, final_states_out=place),
    )
    assert_raises(
        ValueError,
        ["final_states_out", "(2, 6, 3)", "(2, 6, 2)"],
        lambda: causal_conv1d_fn(
            **given, return_final_states=True, final_states_out=place[..., 1:].contiguous()
        ),
    )
    assert_raises(
        ValueError, ["activation", "'relu'"], lambda: causal_conv1d_fn(**given, activation="relu")
    )


@pytest.mark.parametrize("slots", [3, 4, 7])
def test_update(slots: int) -> None:
    """A step, several at once, a ring, and rows of a larger cache."""
    given = tensors()
    x, weight, bias = given["x"], given["weight"].float(), given["bias"].float()
    expected, _ = plain(x, weight.double(), bias.double(), activation="silu")
    shifted, ring = (torch.zeros(2, 6, slots, dtype=F64) for _ in range(2))
    rows = torch.zeros(5, 6, slots, dtype=F64)
    for begin, end in pairwise([0, 1, 2, 4, 7, 19]):
        part = x[..., begin:end]
        for state, options in (
            (shifted, {}),
            (ring, {"cache_seqlens": torch.full((2,), begin, dtype=torch.int32)}),
            (rows, {"conv_state_indices": torch.tensor([3, 1])}),
        ):
            found = causal_conv1d_update(part, state, weight, bias, "silu", **options)
            torch.testing.assert_close(found, expected[..., begin:end])
    assert torch.equal(shifted, x[..., -slots:])
    assert torch.equal(rows[[3, 1]], shifted)
    token = causal_conv1d_update(x[..., 0], torch.zeros_like(shifted), weight, bias, "silu")
    torch.testing.assert_close(token, expected[..., 0])
    skipped = causal_conv1d_update(
        x[..., 0], rows, weight, conv_state_indices=torch.tensor([-1, 0], dtype=torch.int32)
    )
    assert skipped[0].eq(0).all()
    assert not skipped[1].eq(0).all()


def test_varlen_states() -> None:
    x = torch.randn(12, 6, dtype=F64)
    bounds = [0, 1, 1, 5, 12]

    def plain_states(x: Tensor) -> Tensor:
        tails = [x[max(begin, end - 3) : end].t() for begin, end in pairwise(bounds)]
        return torch.stack([F.pad(tail, (3 - tail.shape[1], 0)) for tail in tails])

    for kind in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor(bounds, dtype=kind)

        def ours(x: Tensor, cu_seqlens: Tensor = cu_seqlens) -> Tensor:
            return causal_conv1d_varlen_states(x, cu_seqlens, 3)

        assert_same_bits(results(ours, {"x": x}), results(plain_states, {"x": x}))
    assert causal_conv1d_varlen_states(x[:0], torch.tensor([0, 0]), 2).eq(0).all()
    assert causal_conv1d_varlen_states(x.bfloat16(), cu_seqlens, 0).shape == (4, 6, 0)
    cu_seqlens = torch.tensor(bounds)
    for kind, parts, call in (
        (
            ValueError,
            ["x", "(total, channels)"],
            lambda: causal_conv1d_varlen_states(x[0], cu_seqlens, 3),
        ),
        (TypeError, ["cu_seqlens", "int32"], lambda: causal_conv1d_varlen_states(x, x[0], 3)),
        (ValueError, ["state_len", "-1"], lambda: causal_conv1d_varlen_states(x, cu_seqlens, -1)),
    ):
        assert_raises(kind, parts, call)
