"""Derivatives of `longspan.attention` by finite differences, and what has none."""

import pytest
import torch
from attention_oracle import actual, heads
from checks import assert_raises
from torch import Tensor
from torch.autograd import gradcheck

import longspan

SLOPES = torch.tensor([0.3, 0.05])


def leaves(**tensors: Tensor) -> list[Tensor]:
    return [x.requires_grad_() for x in tensors.values()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "window": (2, -1), "sink_tokens": 1},
        {"softcap": 1.5},
        {"alibi_slopes": SLOPES, "scale": 0.7},
        {"key_ranges": torch.tensor([[1, 5, 1]]), "causal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1, 2, 1, 3, 5, 3), (1, 2, 2, 5, 3, 3, 2)], ids=str)
def test_outputs_and_log_sum_exp(shape: tuple[int, ...], options: dict[str, object]) -> None:
    tensors = heads(*shape)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = actual(q, k, v, **options)
        return out, torch.where(lse == -torch.inf, 0, lse)

    assert gradcheck(call, leaves(**tensors))


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 3, 5), (1, 1, 3, 5), (1, 2, 1, 5), (1, 1, 3, 1), (3, 5), (5,), (1, 2, 1, 1), ()],
    ids=str,
)
def test_additive_mask(shape: tuple[int, ...]) -> None:
    tensors = heads(1, 2, 1, 3, 5, 4)
    mask = torch.randn(shape, dtype=torch.float64)
    assert gradcheck(lambda *x: actual(*x, softcap=2.0, window=(3, 1)), leaves(**tensors, mask=mask))


def test_sinks(isa: str) -> None:
    tensors = heads(2, 2, 1, 3, 5, 4)
    sinks = torch.randn(2, dtype=torch.float64)
    assert gradcheck(lambda q, k, v, s: actual(q, k, v, sinks=s), leaves(**tensors, sinks=sinks))


def test_a_sink_of_minus_infinity_is_none() -> None:
    tensors = heads(1, 2, 1, 3, 5, 4)
    sinks = torch.full((2,), -torch.inf, dtype=torch.float64, requires_grad=True)
    out = longspan.attention(**tensors, sinks=sinks)
    assert torch.equal(out, longspan.attention(**tensors))
    out.sum().backward()
    assert (sinks.grad == 0).all()


def test_across_key_splits() -> None:
    """One head of many key blocks: the backward's partial sums."""
    tensors = heads(1, 1, 1, 3, 200, 2)
    mask = torch.randn(200, dtype=torch.float64)
    assert gradcheck(actual, leaves(**tensors, mask=mask), fast_mode=True)


def test_varlen() -> None:
    q, k, v = (torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 4, 4, 9])

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return longspan.attention_varlen(q, k, v, cu, cu, causal=True, return_lse=True)

    assert gradcheck(call, (q, k, v))


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_dropout(p: float) -> None:
    def call(*x: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        return actual(*x, dropout_p=p)

    tensors = heads(1, 2, 1, 4, 7, 3)
    mask = torch.randn(4, 7, dtype=torch.float64)
    assert gradcheck(call, leaves(**tensors, mask=mask))


def test_the_second_derivative_raises() -> None:
    q, k, v = leaves(**heads(1, 1, 1, 3, 3, 4))

    def twice() -> None:
        (d_q,) = torch.autograd.grad(longspan.attention(q, k, v).sum(), q, create_graph=True)
        d_q.sum().backward()

    assert_raises(RuntimeError, ["attention", "second derivative"], twice)
    mask = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    out = longspan.attention(q.detach(), k.detach(), v.detach(), mask)

    def mask_twice() -> None:
        (d_mask,) = torch.autograd.grad(out.square().sum(), mask, create_graph=True)
        d_mask.sum().backward()

    assert_raises(RuntimeError, ["attention", "second derivative"], mask_twice)


def test_what_has_no_gradient_raises() -> None:
    q, k, v = heads(1, 2, 2, 3, 3, 4).values()
    slopes = torch.rand(2, requires_grad=True)
    assert_raises(
        RuntimeError,
        ["attention", "alibi_slopes"],
        lambda: longspan.attention(q, k, v, alibi_slopes=slopes),
    )
    with torch.no_grad():
        longspan.attention(q, k, v, alibi_slopes=slopes)
    lengths = torch.tensor([3])
    for i in range(3):
        x = [q.clone(), k.clone(), v.clone()]
        x[i].requires_grad_()
        assert_raises(
            RuntimeError, ["attention_decode", "gradient"],
            lambda x=x: longspan.attention_decode(*x, lengths),
        )  # fmt: skip
        with torch.no_grad():
            longspan.attention_decode(*x, lengths)
