"""Dropout: which weights fall follows from the seed alone, so whatever replays a seed replays it."""

import pytest
import torch
from attention_oracle import actual, expected, heads
from checks import DTYPES, assert_agree, assert_same_bits, grid, results, to
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import longspan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keys", [1, 63, 64, 129, 1500])
def test_drops_what_the_reference_drops(isa: str, keys: int, dtype: torch.dtype) -> None:
    tensors = heads(2, 4, 2, 70, keys, 16, dtype=dtype)
    options = {"causal": True, "window": (200, -1), "sink_tokens": 3, "dropout_p": 0.3}

    def ours(**x: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(42)
        return actual(**x, **options)

    torch.manual_seed(42)
    seed = torch.randint(2**62, (1,))  # what the operator draws
    want = results(lambda **x: expected(**x, dropout_seed=seed, **options), to(torch.float64, tensors))
    assert_agree(results(ours, tensors), want)


def test_half_precision_drops_the_same() -> None:
    tensors = heads(1, 2, 2, 70, 90, 16, dtype=torch.bfloat16)
    eye = torch.eye(90, dtype=torch.float64).expand(1, 2, 90, 90)
    kept = []
    for dtype in DTYPES:
        torch.manual_seed(1)
        q, k = (tensors[n].to(dtype) for n in "qk")
        kept.append(longspan.attention(q, k, eye.to(dtype), dropout_p=0.5) != 0)
    for other in kept[1:]:
        assert torch.equal(other, kept[0])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_statistics(p: float) -> None:
    """Uniform weights over an identity of values show each weight's fate."""
    keys = 512
    q = torch.zeros(2, 2, 256, 8)
    k = torch.zeros(2, 2, keys, 8)
    v = torch.eye(keys).expand(2, 2, keys, keys)
    out, lse = longspan.attention(q, k, v, dropout_p=p, return_lse=True)
    fate = out * keys * (1 - p)
    assert_close(fate, fate.round())
    kept = fate.round()
    n = kept.numel()
    assert abs(kept.mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    # Neither rows, columns, heads nor sequences share their fate.
    for dim in (0, 1):
        a, b = kept.unbind(dim)
        agree = (a == b).float().mean().item()
        assert abs(agree - (p * p + (1 - p) ** 2)) < 0.01
    for shifted in (kept.roll(1, 2), kept.roll(1, 3)):
        assert abs((kept == shifted).float().mean().item() - (p * p + (1 - p) ** 2)) < 0.01
    # Dropping is after the softmax: the log-sum-exp does not know of it.
    assert_close(lse, torch.full_like(lse, keys).log())


def test_manual_seed() -> None:
    tensors = heads(1, 2, 2, 40, 40, 8)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append([longspan.attention(**tensors, dropout_p=0.5) for _ in range(2)])
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])
    assert not torch.equal(outs[0][0], outs[0][1])
    assert not torch.equal(outs[0][0], outs[2][0])


def test_no_dropout_draws_nothing() -> None:
    tensors = heads(1, 2, 2, 4, 4, 8)
    before = torch.get_rng_state()
    longspan.attention(**tensors)
    assert torch.equal(torch.get_rng_state(), before)


def assert_replayed(out: Tensor, v: Tensor) -> None:
    """The output is linear in v, so <d_out, out> = <d_v, v>: only if the backward dropped the same."""
    cotangent = grid(*out.shape).to(out)
    (d_v,) = torch.autograd.grad(out, v, cotangent)
    assert_close((cotangent * out).sum(), (d_v * v).sum(), rtol=1e-10, atol=1e-10)


def test_backward_replays() -> None:
    tensors = {name: x.requires_grad_() for name, x in heads(1, 4, 2, 150, 150, 8).items()}
    assert_replayed(longspan.attention(**tensors, causal=True, dropout_p=0.4), tensors["v"])
    x = torch.randn(90, 2, 8, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 40, 90])
    out = longspan.attention_varlen(x.detach(), x.detach(), x, cu, cu, dropout_p=0.4)
    assert_replayed(out, x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays(reentrant: bool) -> None:
    tensors = heads(1, 2, 1, 70, 70, 8)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return longspan.attention(torch.sin(q), k, v, dropout_p=0.5)

    def seeded(function):
        def run(**x: Tensor) -> Tensor:
            torch.manual_seed(8)
            return function(*x.values())

        return run

    plain = results(seeded(call), tensors)
    found = results(seeded(lambda *x: checkpoint(call, *x, use_reentrant=reentrant)), tensors)
    assert_same_bits(found, plain)


def test_checkpointing_without_dropout() -> None:
    tensors = heads(1, 2, 1, 70, 70, 8)
    tensors["sinks"] = torch.randn(2).double()
    plain = results(lambda **x: longspan.attention(**x, causal=True), tensors)
    found = results(
        lambda **x: checkpoint(longspan.attention, use_reentrant=False, causal=True, **x), tensors
    )
    assert_same_bits(found, plain)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_replays(fresh_compiler: None, backend: str) -> None:
    tensors = {name: x.requires_grad_() for name, x in heads(1, 4, 2, 150, 150, 8).items()}
    call = torch.compile(
        lambda q, k, v: longspan.attention(q, k, v, causal=True, dropout_p=0.4),
        fullgraph=True,
        backend=backend,
    )
    first, second = call(**tensors), call(**tensors)
    assert not torch.equal(first, second)
    assert_replayed(first, tensors["v"])
    assert_replayed(second, tensors["v"])
