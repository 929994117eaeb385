"""FAVOR+'s features: what they estimate and how well, their stabiliser, their derivative."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    results,
)
from torch import Tensor
from torch.testing import assert_close

import longspan
from longspan.reference import favor as reference

KINDS = ("positive", "hyperbolic", "trigonometric")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(dim: int = 8, size: float = 0.8) -> tuple[Tensor, Tensor, float]:
    """Two vectors of norm about ``size``, and the kernel between them for scale 1."""
    x, y = size * torch.nn.functional.normalize(
        torch.randn(2, dim, generator=seeded(3), dtype=torch.float64), dim=-1
    )
    return x, y, math.exp(float(x @ y))


def estimates(x: Tensor, y: Tensor, projections: Tensor, kind: str) -> Tensor:
    """(n,): the estimate by each of the projections (n, m, D)."""
    rows = [z.expand(1, len(projections), 1, -1) for z in (x, y)]
    phi_x, phi_y = (
        longspan.favor_features(
            z, projections, is_query=True, kind=kind, scale=1.0, eps=0.0, stabilize=False
        )
        for z in rows
    )
    return (phi_x * phi_y).sum(-1).flatten()


def draws(count: int, features: int, dim: int = 8, **options: Any) -> Tensor:
    generator = seeded(7)
    return torch.stack(
        [
            longspan.favor_projection(features, dim, generator=generator, dtype=torch.float64, **options)
            for _ in range(count)
        ]
    )


# ---- the laws


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unbiased(kind: str, orthogonal: bool) -> None:
    x, y, wanted = pair()
    found = estimates(x, y, draws(3000, 16, orthogonal=orthogonal), kind)
    error = float(found.std()) / len(found) ** 0.5
    assert abs(float(found.mean()) - wanted) < 4 * error
    assert error < 0.02 * wanted  # else the line above says little


def expected_error(kind: str, x: Tensor, y: Tensor, kernel: float) -> float:
    """Mean square of one independent direction (Choromanski et al. 2020, lemma 2)."""
    plus, minus = float((x + y).square().sum()), float((x - y).square().sum())
    positive = math.exp(plus) * kernel**2 * (1 - math.exp(-plus))
    return {
        "positive": positive,
        "hyperbolic": positive * (1 - math.exp(-plus)) / 2,
        "trigonometric": math.exp(plus) / kernel**2 * (1 - math.exp(-minus)) ** 2 / 2,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_mean_square_errors_are_the_papers(kind: str) -> None:
    x, y, wanted = pair(size=0.6)
    directions = draws(1, 400_000, orthogonal=False)[0]
    found = estimates(x, y, directions[:, None], kind)
    error = float((found - wanted).square().mean())
    assert error == pytest.approx(expected_error(kind, x, y, wanted), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_orthogonal_directions_are_better(kind: str) -> None:
    x, y, wanted = pair()
    errors = [
        float((estimates(x, y, draws(3000, 8, orthogonal=o), kind) - wanted).square().mean())
        for o in (True, False)
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("orthogonal", [False, True])
def test_errors_fall_with_the_square_root_of_the_features(orthogonal: bool) -> None:
    x, y, wanted = pair()
    few, many = (
        float((estimates(x, y, draws(800, m, orthogonal=orthogonal), "positive") - wanted).std())
        for m in (16, 256)
    )
    assert few / many == pytest.approx(4, rel=0.15)


def test_attention_approaches_softmax() -> None:
    q, k, v = torch.tensor([0.4, 0.4, 1.0]).view(3, 1, 1, 1, 1) * torch.randn(3, 1, 2, 60, 16)
    for causal in (False, True):
        exact = longspan.attention(q, k, v, causal=causal)
        errors = []
        for features in (16, 256, 4096):
            estimated = torch.stack(
                [
                    longspan.performer_attention(
                        q,
                        k,
                        v,
                        longspan.favor_projection(features, 16, generator=seeded(i)),
                        causal=causal,
                    )
                    for i in range(8)
                ]
            )
            errors.append(float((estimated - exact).square().mean().sqrt() / exact.std()))
        assert errors[0] > 3 * errors[1] > 9 * errors[2]
        assert errors[2] < 0.03


# ---- the projection


@pytest.mark.parametrize(("features", "dim"), [(8, 8), (24, 8), (5, 8), (19, 8), (3, 1)])
def test_blocks_are_orthogonal(features: int, dim: int) -> None:
    projection = longspan.favor_projection(features, dim, dtype=torch.float64)
    assert projection.shape == (features, dim)
    for block in projection.split(dim):
        gram = block @ block.T
        assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-12)
    constant = longspan.favor_projection(features, dim, norms="constant", dtype=torch.float64)
    assert torch.allclose(constant.norm(dim=1), torch.full((features,), dim**0.5).double())


def test_rotations_are_haar() -> None:
    """Each direction is uniform on the sphere, and lengths are those of Gaussian vectors."""
    made = torch.cat([longspan.favor_projection(4, 4, generator=seeded(i)) for i in range(4000)])
    first = torch.nn.functional.normalize(made, dim=1)
    assert float(first.mean(0).abs().max()) < 0.02  # biased signs of a QR would show here
    assert torch.allclose(first.T @ first / len(first), torch.eye(4) / 4, atol=0.01)
    assert float(made.square().sum(1).mean()) == pytest.approx(4, rel=0.03)


def test_a_seed_gives_the_same_directions() -> None:
    one, two = (longspan.favor_projection(20, 8, generator=seeded(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, longspan.favor_projection(20, 8, generator=seeded(6)))
    wide = longspan.favor_projection(20, 8, generator=seeded(5), dtype=torch.float64)
    assert torch.equal(one, wide.float())


# ---- values and derivatives


def features_of(kind: Any, **options: Any) -> Callable[..., Any]:
    def call(x: Tensor, projection: Tensor) -> Any:
        return longspan.favor_features(x, projection, is_query=True, kind=kind, **options)

    return call


@pytest.mark.parametrize("kind", [*KINDS, torch.relu, torch.sin])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_features_are_the_references(kind: Any, eps: float) -> None:
    given = {
        "x": torch.randn(2, 3, 17, 8, dtype=torch.float64),
        "projection": torch.randn(20, 8, dtype=torch.float64),
    }

    def plain(x: Tensor, projection: Tensor) -> Tensor:
        return reference.favor_features(x, projection, kind=kind, eps=eps, scale=0.3)

    ours = features_of(kind, eps=eps, scale=0.3, stabilize=False)
    assert_agree(results(ours, given), results(plain, given))
    # Stabilised, the same after a factor for each token.
    shifted = features_of(kind, eps=0.0, scale=0.3)(**given)
    bare = features_of(kind, eps=0.0, scale=0.3, stabilize=False)(**given)
    if not callable(kind):
        top = shifted.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(shifted / top, bare / bare.abs().amax(-1, keepdim=True))
    if kind in ("positive", "hyperbolic"):
        count = 20 if kind == "positive" else 40
        torch.testing.assert_close(shifted.amax(-1), torch.full((2, 3, 17), count**-0.5).double())


@pytest.mark.parametrize("kind", [*KINDS, torch.tanh])
def test_gradcheck(kind: Any) -> None:
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    projection = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    call = features_of(kind, eps=1e-2, stabilize=False)
    assert torch.autograd.gradcheck(call, (x, projection))
    assert torch.autograd.gradgradcheck(call, (x, projection))


@pytest.mark.parametrize("kind", [*KINDS, torch.relu])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind: Any, dtype: torch.dtype) -> None:
    given = {"x": torch.randn(1, 2, 33, 16), "projection": torch.randn(24, 16)}

    def plain(x: Tensor, projection: Tensor) -> Tensor:
        return reference.favor_features(x, projection, kind=kind)

    ours = features_of(kind, eps=0.0, stabilize=False)
    assert_error_ratio(ours, plain, given, dtype)
    assert ours(given["x"].to(dtype), given["projection"]).dtype == dtype


def test_autocast_does_not_touch_exponents() -> None:
    x, projection = torch.randn(1, 2, 33, 16), torch.randn(24, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            features_of("positive")(x, projection), features_of("positive")(x, projection)
        )
        found = features_of("positive")(x, projection)
    assert torch.equal(found, features_of("positive")(x, projection))


def test_strides_and_threads_change_nothing() -> None:
    given = {"x": torch.randn(1, 3, 65, 16), "projection": torch.randn(24, 16)}
    call = features_of("positive")
    for variant in (given["x"].transpose(1, 2).contiguous().transpose(1, 2),):
        assert_agree(results(call, given), results(call, given | {"x": variant}))
    assert_threads_change_nothing(lambda: results(call, given))
    attention = {n: torch.randn(1, 2, 40, 8) for n in "qkv"}
    projection = torch.randn(16, 8)

    def attend(**kw: Tensor) -> Tensor:
        return longspan.performer_attention(**kw, projection=projection)

    assert_strides_change_nothing(attend, attention, ["v"])


# ---- the stabiliser


def test_causal_maxima_run() -> None:
    x, projection = 2 * torch.randn(2, 3, 30, 8).double(), torch.randn(16, 8).double()
    phi, gate, last = longspan.favor_features(x, projection, is_query=False, causal=True, eps=0.0)
    bare = longspan.favor_features(x, projection, is_query=False, stabilize=False, eps=0.0)
    top = (bare * 4).log().amax(-1).cummax(-1).values
    torch.testing.assert_close(phi, bare * (-top).exp()[..., None])
    torch.testing.assert_close(gate[..., 1:], top[..., :-1] - top[..., 1:])
    assert torch.equal(gate[..., 0], torch.zeros(2, 3))
    torch.testing.assert_close(last, top[..., -1])
    whole = longspan.favor_features(x, projection, is_query=False, eps=0.0)
    torch.testing.assert_close(whole, bare * (-top[..., -1]).exp()[..., None, None])


def test_streamed_maxima_are_the_whole_sequences() -> None:
    x, projection = 2 * torch.randn(2, 3, 30, 8), torch.randn(16, 8)
    options: dict[str, Any] = {"is_query": False, "causal": True}
    whole = longspan.favor_features(x, projection, **options)
    top, parts = None, []
    for part in x.split([1, 1, 13, 0, 15], dim=2):
        *made, top = longspan.favor_features(part, projection, initial_max=top, **options)
        parts.append(made)
    torch.testing.assert_close(torch.cat([p[0] for p in parts], 2), whole[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts], 2), whole[1])
    assert torch.equal(top, whole[2])


@pytest.mark.parametrize("begun", [False, True])
def test_packed_maxima_are_each_sequences_own(begun: bool) -> None:
    x, projection = 2 * torch.randn(1, 3, 70, 8), torch.randn(16, 8)
    bounds = torch.tensor([0, 33, 33, 34, 70])
    before = torch.randn(4, 3) if begun else None
    options: dict[str, Any] = {"is_query": False, "causal": True}
    found = longspan.favor_features(x, projection, cu_seqlens=bounds, initial_max=before, **options)
    for i, (begin, end) in enumerate(pairwise(bounds.tolist())):
        own = None if before is None else before[i : i + 1]
        want = longspan.favor_features(x[:, :, begin:end], projection, initial_max=own, **options)
        torch.testing.assert_close(found[0][:, :, begin:end], want[0])
        torch.testing.assert_close(found[1][:, :, begin:end], want[1])
        assert torch.equal(found[2][i : i + 1], want[2])


def test_wrong_arguments_are_named() -> None:
    x, projection = torch.randn(2, 3, 10, 8), torch.randn(16, 8)

    def fails(error: type[Exception], *parts: str, **change: Any) -> None:
        call = {"x": x, "projection": projection, "is_query": False} | change
        assert_raises(error, ["favor_features", *parts], lambda: longspan.favor_features(**call))

    fails(TypeError, "x", "int64", x=x.long())
    fails(ValueError, "x", "(batch, heads, tokens, channels)", x=x[0])
    fails(ValueError, "projection", "(any, 8)", "(16, 7)", projection=projection[:, :7])
    fails(ValueError, "projection", "(3, any, 8)", projection=projection.expand(2, -1, -1))
    fails(ValueError, "directions", "1 or more", projection=projection[:0])
    fails(ValueError, "kind", "positive", "'cosine'", kind="cosine")
    fails(ValueError, "eps", "0 or more", "-1", eps=-1.0)
    fails(ValueError, "causal", "False", causal=True, is_query=True)
    fails(ValueError, "causal", "False", causal=True, kind=torch.relu)
    fails(ValueError, "causal", "False", causal=True, stabilize=False)
    fails(ValueError, "initial_max", "None", initial_max=torch.zeros(2, 3))
    fails(ValueError, "initial_max", "(2, 3)", causal=True, initial_max=torch.zeros(3, 2))
    fails(ValueError, "cu_seqlens", "None", cu_seqlens=torch.tensor([0, 10]))
    fails(ValueError, "cu_seqlens", "batch of 1", causal=True, cu_seqlens=torch.tensor([0, 10]))
    for parts, options in (
        (["features", "1 or more"], {"features": 0}),
        (["channels", "1 or more"], {"channels": 0}),
        (["norms", "gaussian", "'unit'"], {"norms": "unit"}),
    ):
        call = {"features": 8, "channels": 4} | options
        assert_raises(ValueError, parts, lambda call=call: longspan.favor_projection(**call))


# ---- the kernels


@pytest.mark.parametrize(("features", "dim"), [(1, 1), (7, 5), (16, 16), (17, 8), (40, 64), (255, 40)])
@pytest.mark.parametrize("tokens", [1, 2, 47, 48, 49, 129])
def test_sizes_around_the_tiles(tokens: int, features: int, dim: int) -> None:
    given = {"x": torch.randn(1, 2, tokens, dim, dtype=torch.float64)}
    W = torch.randn(features, dim, dtype=torch.float64)

    def plain(x: Tensor) -> Tensor:
        phi = reference.favor_features(x, W)
        return phi / phi.detach().amax(-1, keepdim=True) / features**0.5

    def ours(x: Tensor) -> Tensor:
        return longspan.favor_features(x, W, is_query=True, eps=0.0)

    assert_agree(results(ours, given), results(plain, given))
    single = {"x": given["x"].float()}
    assert_agree(results(ours, single), results(plain, single))


def test_every_instruction_set(isa: str) -> None:
    given = {"x": torch.randn(2, 3, 65, 24), "projection": torch.randn(37, 24)}

    def plain(x: Tensor, projection: Tensor) -> Tensor:
        return reference.favor_features(x, projection)

    ours = features_of("positive", eps=0.0, stabilize=False)
    found = results(lambda x: ours(x, given["projection"]), {"x": given["x"]})
    want = results(lambda x: plain(x, given["projection"].double()), {"x": given["x"].double()})
    for name, value in want.items():
        assert_close(found[name], value.float(), rtol=2e-5, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        half = {n: x.to(dtype) for n, x in given.items()}
        assert_error_ratio(ours, plain, half, dtype)


def test_opcheck() -> None:
    ops = torch.ops.longspan
    x, y, offset = torch.randn(50, 8), torch.randn(50, 20), torch.randn(50)
    for own in (False, True):
        torch.library.opcheck(ops.favor_forward, (x, torch.randn(8, 32), 20, own, 1e-3))
    torch.library.opcheck(ops.favor_exp_rows, (y, offset, 1e-3))
    torch.library.opcheck(ops.favor_backward, (y, y.abs(), x, torch.randn(20, 16), 1e-3))
    with pytest.raises(RuntimeError, match="favor_features"):
        ops.favor_forward(x.requires_grad_(), torch.randn(8, 32), 20, True, 0.0)
    for call in (
        lambda: ops.favor_forward(x.detach(), torch.randn(8, 20), 20, True, 0.0),
        lambda: ops.favor_exp_rows(y, offset[:49], 0.0),
        lambda: ops.favor_backward(y, y[:, :19], x.detach(), torch.randn(20, 16), 0.0),
    ):
        with pytest.raises(RuntimeError, match="favor"):
            call()


def test_a_token_that_is_no_number_stays_alone() -> None:
    x, W = torch.randn(1, 2, 60, 8), torch.randn(16, 8)
    before = longspan.favor_features(x, W, is_query=True)
    x[0, 1, 33] = torch.nan
    after = longspan.favor_features(x, W, is_query=True)
    assert bool(after[0, 1, 33].isnan().all())
    rest = torch.ones(1, 2, 60, dtype=torch.bool)
    rest[0, 1, 33] = False
    assert torch.equal(after[rest], before[rest])


def test_huge_and_tiny_vectors_stay_finite() -> None:
    W = longspan.favor_projection(64, 8)
    for size in (1e-20, 1e3, 1e6):
        for query in (True, False):
            x = (size * torch.randn(1, 2, 40, 8)).requires_grad_()
            phi = longspan.favor_features(x, W, is_query=query)
            assert bool(phi.isfinite().all())
            if query:
                assert float(phi.detach().max()) == pytest.approx(64**-0.5, rel=1e-4)
            else:  # in float32 |x|^2 / 2 of huge keys swallows what tells their exponents apart
                assert float(phi.detach().max()) <= 64**-0.5 * (1 + 1e-4) + 1e-6
            assert bool(torch.autograd.grad(phi.sum(), x)[0].isfinite().all())
