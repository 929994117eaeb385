"""`longspan.performer_attention`: against all weights at once, in its three forms, under torch."""

import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_same_bits,
    assert_threads_change_nothing,
    results,
    to,
)
from hypothesis import given as examples
from hypothesis import strategies as st
from torch import Tensor

import longspan
from longspan.reference import favor as reference

KINDS: tuple[Any, ...] = ("positive", "hyperbolic", "trigonometric", torch.relu)


def tensors(
    tokens: int = 70, heads: int = 4, kv_heads: int = 2, *, batch: int = 2, size: float = 0.5
) -> dict[str, Tensor]:
    """Small q and k: trigonometric features of large ones have sums near 0."""
    shape = (batch, kv_heads, tokens)
    return {
        "q": size * torch.randn(batch, heads, tokens, 8, dtype=torch.float64),
        "k": size * torch.randn(*shape, 8, dtype=torch.float64),
        "v": torch.randn(*shape, 5, dtype=torch.float64),
    }


def directions(features: int = 24) -> Tensor:
    return longspan.favor_projection(features, 8, generator=torch.Generator().manual_seed(1))


def ours(kind: Any, projection: Tensor, **options: Any) -> Any:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return longspan.performer_attention(q, k, v, projection, kind=kind, **options)

    return call


def plain(kind: Any, projection: Tensor, causal: bool, eps: float = 0.0) -> Any:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        phi_q, phi_k = (
            reference.favor_features(x, projection.to(x.dtype), kind=kind, eps=eps) for x in (q, k)
        )
        phi_k, v = (x.repeat_interleave(groups, dim=1) for x in (phi_k, v))
        return reference.performer_attention(phi_q, phi_k, v, causal=causal)

    return call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_all_weights_at_once(kind: Any, causal: bool) -> None:
    given, W = tensors(), directions()
    eps = 1e-3 if callable(kind) else 0.0
    want = results(plain(kind, W, causal, eps), given)
    assert_agree(results(ours(kind, W, causal=causal, eps=eps), given), want)
    without = results(ours(kind, W, causal=causal, eps=eps), given, gradients=False)
    assert_agree(without, {"out": want["out"]})


def performer_pytorch(x: Tensor, W: Tensor, is_query: bool, eps: float) -> Tensor:
    """performer-pytorch's softmax_kernel (and Google's): the maximum is of W x alone."""
    size = x.shape[-1] ** -0.25
    along = size * x @ W.T
    half = (x**2).sum(-1, keepdim=True) / 2 * size**2
    top = along.amax(-1, keepdim=True) if is_query else along.amax((-1, -2), keepdim=True)
    return W.shape[0] ** -0.5 * (torch.exp(along - half - top) + eps)


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_performer_pytorch(causal: bool) -> None:
    given, W = tensors(kv_heads=4, size=1.0), directions().double()

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        phi_q, phi_k = (performer_pytorch(x, W, x is q, 0.0) for x in (q, k))
        if causal:  # with the sums of fast-transformers' and its own non-CUDA recurrence
            sums = (phi_k[..., None] * v[..., None, :]).cumsum(2)
            weights = phi_k.cumsum(2)
        else:
            sums = (phi_k.transpose(-1, -2) @ v)[:, :, None]
            weights = phi_k.sum(2, keepdim=True)
        out = torch.einsum("bhtm,bhtmv->bhtv", phi_q, sums.expand(*phi_q.shape, v.shape[-1]))
        return out / (phi_q * weights).sum(-1, keepdim=True)

    want, found = results(peer, given), results(ours("positive", W, causal=causal, eps=0.0), given)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_segments_equal_the_whole(kind: Any, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given, W = tensors(700), directions()
    call = ours(kind, W, causal=causal, eps=1e-2, return_final_state=True)
    out, state = call(**given)
    module = sys.modules["longspan.ops.performer"]
    monkeypatch.setattr(module, "_SEGMENT_BYTES", 1)
    parts, last = call(**given)
    found = {"out": parts} | dict(zip("Szm", last))
    assert_agree(found, {"out": out} | dict(zip("Szm", state)))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_pieces_equal_the_whole(kind: Any) -> None:
    """Also with keys whose exponents grow without end, and with what eps adds."""
    given, W = tensors(40), directions()
    if not callable(kind) and kind != "trigonometric":
        given["k"] = given["k"] * torch.linspace(0, 20, 40)[:, None]
        given["q"] = 10 * given["q"]
    options = {"eps": 1e-4}
    whole, end = ours(kind, W, return_final_state=True, **options)(**given)
    assert bool(whole.isfinite().all())
    state, outs = None, []
    for begin, finish in ((0, 1), (1, 14), (14, 14), (14, 40)):
        part = {n: x[:, :, begin:finish] for n, x in given.items()}
        call = ours(kind, W, initial_state=state, return_final_state=True, **options)
        out, state = call(**part)
        outs.append(out)
    assert_agree({"out": torch.cat(outs, 2)}, {"out": whole})
    steps = (
        torch.zeros_like(end[0]),
        torch.zeros_like(end[1]),
        torch.full_like(end[2], -torch.inf),
    )
    for t in range(40):
        row = [x[:, :, t] for x in given.values()]
        out = longspan.performer_attention_step(*row, W, steps, kind=kind, **options)
        torch.testing.assert_close(out, whole[:, :, t], rtol=1e-9, atol=1e-12)
    for a, b in zip(steps, end):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_no_token_sees_a_later_one() -> None:
    """Not by the stabiliser either: bit for bit."""
    given, W = to(torch.float32, tensors(50)), directions()
    changed = {n: x.clone() for n, x in given.items()}
    changed["k"][:, :, 30:] *= 50
    changed["v"][:, :, 30:] = torch.nan
    for name in ("q", "k", "v"):
        given[name].requires_grad_(), changed[name].requires_grad_()
    before, after = (ours("positive", W)(**x)[:, :, :30] for x in (given, changed))
    assert torch.equal(before, after)


def test_packed_sequences_are_their_own() -> None:
    given, W = tensors(70, batch=1, size=1.5), directions()
    bounds = torch.tensor([0, 33, 33, 34, 70])
    state = (
        torch.randn(4, 4, 24, 5, dtype=torch.float64),
        torch.rand(4, 4, 24, dtype=torch.float64),
        torch.randn(4, 2, dtype=torch.float64),
    )
    call = ours("positive", W, cu_seqlens=bounds, initial_state=state, return_final_state=True)
    out, end = call(**given)
    for i, (begin, finish) in enumerate(pairwise(bounds.tolist())):
        own = tuple(x[i : i + 1] for x in state)
        part = {n: x[:, :, begin:finish] for n, x in given.items()}
        want, last = ours("positive", W, initial_state=own, return_final_state=True)(**part)
        torch.testing.assert_close(out[:, :, begin:finish], want)
        for a, b in zip(end, last):
            torch.testing.assert_close(a[i : i + 1], b)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool) -> None:
    given, W = tensors(6, 2, 1, batch=1), directions(5)
    state = tuple(
        torch.rand(1, 2, 5, *more, dtype=torch.float64, requires_grad=True) for more in ((5,), ())
    )
    leaves = tuple(x.requires_grad_() for x in given.values())

    def call(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        out, (S, z, _) = longspan.performer_attention(
            q, k, v, W, causal=causal, eps=0.0, return_final_state=True,
            initial_state=(S, z, torch.full((1, 1), 9.0, dtype=torch.float64)),  # above all of k
        )  # fmt: skip
        return out, S, z

    assert torch.autograd.gradcheck(call, (*leaves, *state))


def test_half_precision() -> None:
    given, W = tensors(), directions()
    assert_error_ratio(ours("positive", W, eps=0.0), plain("positive", W, True), given, torch.bfloat16)


def test_threads_change_nothing() -> None:
    given, W = to(torch.float32, tensors(300)), directions()
    assert_threads_change_nothing(lambda: results(ours("positive", W), given))
    assert_threads_change_nothing(lambda: results(ours("positive", W), given, gradients=False))


def test_compile(fresh_compiler: None) -> None:
    given, W = to(torch.float32, tensors()), directions()
    for causal in (True, False):
        function = ours("positive", W, causal=causal)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_agree(results(compiled, given), results(function, given))


def test_checkpointing_changes_nothing() -> None:
    given, W = to(torch.float32, tensors()), directions()

    def again(**kw: Tensor) -> Any:
        call = ours("positive", W)
        return torch.utils.checkpoint.checkpoint(lambda: call(**kw), use_reentrant=False)

    assert_same_bits(results(again, given), results(ours("positive", W), given))


def test_vmap_equals_a_batch() -> None:
    given, W = to(torch.float32, tensors()), directions()
    rows = [x.unsqueeze(1) for x in given.values()]
    found = torch.func.vmap(ours("positive", W))(*rows)
    torch.testing.assert_close(found.squeeze(1), ours("positive", W)(**given))


def test_values_of_one_give_one() -> None:
    given, W = tensors(size=1.0), directions()
    given["v"] = torch.ones_like(given["v"])
    for causal in (False, True):
        for kind in ("positive", "hyperbolic", torch.relu):
            out = ours(kind, W, causal=causal)(**given)
            torch.testing.assert_close(out, torch.ones_like(out))


def test_without_a_gradient_memory_does_not_grow_with_the_features() -> None:
    """Of 65536 tokens all features are 268 MB; a segment of them is 17, and so is what is made of it."""
    from longspan.cli._memory import PeakMemory

    q, k, v = torch.randn(3, 1, 2, 65536, 8)
    W = longspan.favor_projection(256, 8)
    for causal in (False, True):
        ours("positive", W, causal=causal)(q[:, :, :600], k[:, :, :600], v[:, :, :600])
        with PeakMemory() as memory:
            ours("positive", W, causal=causal)(q, k, v)
        assert memory.bytes < 100e6


@examples(
    st.integers(1, 40), st.integers(0, 40), st.booleans(), st.sampled_from(("positive", "hyperbolic")),
    st.floats(0.01, 30),
)  # fmt: skip
def test_any_split_equals_the_whole(
    tokens: int, split: int, causal: bool, kind: str, size: float
) -> None:
    """Causal: states are handed on. Otherwise: the first part's state, and all that the second adds."""
    given, W = tensors(tokens, 2, 1, batch=1, size=size), directions(11)
    split = min(split, tokens)
    first, second = (
        {n: x[:, :, part] for n, x in given.items()} for part in (slice(split), slice(split, None))
    )
    options: dict[str, Any] = {"causal": causal, "return_final_state": True, "eps": 0.0}
    whole, end = ours(kind, W, **options)(**given)
    out, state = ours(kind, W, **options)(**first)
    rest, last = ours(kind, W, **options, initial_state=state)(**second)
    if causal:
        assert_agree({"out": torch.cat([out, rest], 2)}, {"out": whole})
    elif split < tokens:
        assert_agree({"out": rest}, {"out": whole[:, :, split:]})
    for a, b in zip(last, end):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_wrong_arguments_are_named() -> None:
    given, W = to(torch.float32, tensors(10)), directions()
    S, z, top = torch.zeros(2, 4, 24, 5), torch.zeros(2, 4, 24), torch.zeros(2, 2)

    def fails(error: type[Exception], *parts: str, **change: Any) -> None:
        call = given | {"projection": W} | change
        assert_raises(
            error, ["performer_attention", *parts], lambda: longspan.performer_attention(**call)
        )

    fails(TypeError, "q", "int64", q=given["q"].long())
    fails(ValueError, "k", "q's shape", k=given["k"][:1])
    fails(ValueError, "projection", "(directions, channels)", projection=W[:, :7])
    fails(ValueError, "projection", "(directions, channels)", projection=W.expand(4, -1, -1))
    fails(ValueError, "kind", "'cosine'", kind="cosine")
    fails(ValueError, "eps", "0 or more", eps=-1.0)
    fails(ValueError, "cu_seqlens", "causal", causal=False, cu_seqlens=torch.tensor([0, 10]))
    fails(TypeError, "initial_state", "three", initial_state=(S, z))
    fails(ValueError, "initial_state[0]", "(2, 4, 24, 5)", initial_state=(S[:1], z, top))
    fails(ValueError, "initial_state[2]", "(2, 2)", initial_state=(S, z, top[:, :1]))
    fails(TypeError, "initial_state[2]", "float32", initial_state=(S, z, top.double()))
    row = [x[:, :, 0] for x in given.values()]
    for kind, parts, arguments in (
        (TypeError, ["state", "three", "None"], (*row, W, None)),
        (ValueError, ["state[1]", "(2, 4, 24)"], (*row, W, (S, z[:1], top))),
        (ValueError, ["q", "(batch, heads, channels)"], (row[0][0], *row[1:], W, (S, z, top))),
        (RuntimeError, ["no gradient"], (row[0].requires_grad_(), *row[1:], W, (S, z, top))),
    ):
        assert_raises(
            kind,
            ["performer_attention_step", *parts],
            lambda arguments=arguments: longspan.performer_attention_step(*arguments),
        )
