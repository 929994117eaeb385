"""`longspan.routing_attention` is dense attention within the clusters that its centroids choose."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import (
    DTYPES,
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_same_bits,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    results,
    to,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import longspan
from longspan.reference import routing as reference

HALVES = (torch.bfloat16, torch.float16)


def inputs(
    shared: bool, batch: int = 2, h: int = 2, tokens: int = 90, size: int = 8, value_size: int = 5,
    dtype: torch.dtype = torch.float64, seed: int = 3,
) -> dict[str, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, h, tokens, 2 * size + value_size)
    all_three = torch.randn(shape, generator=generator, dtype=torch.float64)
    q, k, v = (x.contiguous() for x in all_three.to(dtype).split([size, size, value_size], dim=-1))
    return {"q": q, "v": v} if shared else {"q": q, "k": k, "v": v}


def some_centroids(h: int = 2, count: int = 6, size: int = 8, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(h, count, size, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=-1)


def actual(centroids: Tensor, **options: Any):
    return lambda q, v, k=None: longspan.routing_attention(q, k, v, centroids, **options)


def oracle(centroids: Tensor, told: dict[str, Tensor], **options: Any):
    """With the members of ``told``'s q and k, which `results` may hand over in another precision."""
    known = (options.get("window_size"), options.get("key_mask"))
    queries = reference.members(reference.scores(told["q"], centroids), *known)
    keys = queries
    if "k" in told:
        keys = reference.members(reference.scores(told["k"], centroids), *known)

    def call(q: Tensor, v: Tensor, k: Tensor | None = None) -> Tensor:
        scale = options.get("scale", q.shape[3] ** -0.5)
        causal = options.get("causal", False)
        return reference.routing_attention(q, k, v, queries, keys, causal=causal, scale=scale)

    return call


PADDING = torch.rand(2, 90, generator=torch.Generator().manual_seed(1)) < 0.6
OPTIONS: dict[str, tuple[bool, dict[str, Any]]] = {
    "clusters take 20": (False, {"window_size": 20}),
    "clusters take 20, causal": (False, {"window_size": 20, "causal": True}),
    "clusters take 20, shared": (True, {"window_size": 20}),
    "clusters take 20, shared, causal": (True, {"window_size": 20, "causal": True}),
    "clusters take 1": (True, {"window_size": 1}),
    "clusters take all": (True, {"window_size": 500, "scale": 0.8}),
    "clusters take padding": (False, {"window_size": 70, "key_mask": PADDING}),
    "clusters take padding, shared": (True, {"window_size": 70, "causal": True, "key_mask": PADDING}),
    "nearest": (False, {}),
    "nearest, shared": (True, {"scale": 0.8}),
    "nearest, shared, causal": (True, {"causal": True}),
    "nearest, padding": (False, {"key_mask": PADDING}),
    "nearest, shared, padding": (True, {"key_mask": PADDING}),
    "nearest, shared, causal, padding": (True, {"causal": True, "key_mask": PADDING}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, dtype: torch.dtype) -> None:
    shared, options = OPTIONS[name]
    centroids, tensors = some_centroids(), inputs(shared, dtype=dtype)
    wide = to(torch.float64, tensors)
    assert_agree(
        results(actual(centroids, **options), tensors),
        results(oracle(centroids, wide, **options), wide),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 200])
def test_one_cluster_is_dense_attention(tokens: int, causal: bool) -> None:
    tensors = inputs(False, tokens=tokens)
    wanted = results(lambda q, k, v: longspan.attention(q, k, v, causal=causal), tensors)
    one = some_centroids(count=1)
    assert_agree(results(actual(one, window_size=tokens, causal=causal), tensors), wanted)
    if not causal:
        assert_agree(results(actual(one), tensors), wanted)


def test_a_token_of_several_clusters_has_their_mean_and_of_none_zero() -> None:
    tensors, centroids = inputs(False, 1, 1, 40), some_centroids(1)
    options = {"window_size": 9}
    score = reference.scores(tensors["q"], centroids)
    where = reference.members(score, 9)
    multiplicity = where.sum(2)[0, 0]
    assert (multiplicity == 0).any()
    assert (multiplicity > 1).any()
    found = results(actual(centroids, **options), tensors)
    assert (found["out"][0, 0, multiplicity == 0] == 0).all()
    assert (found["d q"][0, 0, multiplicity == 0] == 0).all()
    assert (found["out"][0, 0, multiplicity > 0] != 0).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["clusters take 20", "nearest, shared", "nearest, shared, causal"])
def test_half_precision_error(name: str, dtype: torch.dtype) -> None:
    shared, options = OPTIONS[name]
    centroids, tensors = some_centroids(2, 6, 32), inputs(shared, size=32, value_size=16)
    told = to(torch.float64, to(dtype, tensors))
    known = (options.get("window_size"),)
    queries = reference.members(reference.scores(told["q"], centroids), *known)
    keys = queries if shared else reference.members(reference.scores(told["k"], centroids), *known)

    def plain(q: Tensor, v: Tensor, k: Tensor | None = None) -> Tensor:
        """The reference's arithmetic, in the given precision."""
        if k is None:
            wide = q if q.dtype == torch.float64 else q.float()
            k = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(q.dtype)
        seen = queries[..., :, None] & keys[..., None, :]
        itself = torch.eye(90, dtype=torch.bool)
        if options.get("causal"):
            seen = seen & torch.ones(90, 90, dtype=torch.bool).tril()
        if shared:
            others = seen & ~itself
            seen = others | (seen & itself & ~others.any(-1, keepdim=True))
        score = (q @ k.mT * options.get("scale", 32**-0.5))[:, :, None].masked_fill(~seen, -torch.inf)
        weight = torch.where(seen.any(-1, keepdim=True), score, 0).softmax(-1)
        out = torch.where(seen.any(-1, keepdim=True), weight @ v[:, :, None], 0)
        return out.sum(2) / seen.any(-1).sum(2).clamp(min=1)[..., None].to(q.dtype)

    assert_error_ratio(actual(centroids, **options), plain, tensors, dtype)


@st.composite
def cases(draw: st.DrawFn) -> tuple[bool, dict[str, Any], tuple[int, int, int, int], int]:
    shared, window = draw(st.booleans()), draw(st.one_of(st.none(), st.integers(1, 80)))
    options: dict[str, Any] = {"window_size": window}
    options["causal"] = (shared or window is not None) and draw(st.booleans())
    sizes = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 80)))
    seed = draw(st.integers(0, 2**31))
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        share = draw(st.sampled_from([0.0, 0.5, 0.9]))
        options["key_mask"] = torch.rand(sizes[0], sizes[2], generator=generator) < share
    return shared, options, (*sizes, draw(st.integers(1, 9))), seed


@given(cases())
def test_any_options(case: tuple[bool, dict[str, Any], tuple[int, int, int, int], int]) -> None:
    shared, options, (batch, h, tokens, count), seed = case
    tensors = inputs(shared, batch, h, tokens, 5, 3, seed=seed)
    centroids = some_centroids(h, count, 5, seed)
    assert_agree(
        results(actual(centroids, **options), tensors),
        results(oracle(centroids, tensors, **options), tensors),
    )


@pytest.mark.parametrize(
    "name", ["clusters take 20", "nearest", "nearest, shared", "nearest, shared, causal"]
)
def test_gradcheck(name: str) -> None:
    shared, options = OPTIONS[name]
    tensors = inputs(shared, 1, 2, 9, 3, 2)
    options = options | ({"window_size": 4} if "window_size" in options else {})
    names = list(tensors)
    call = actual(some_centroids(2, 3, 3), **options)
    assert gradcheck(
        lambda *x: call(**dict(zip(names, x))), [x.requires_grad_() for x in tensors.values()]
    )


def test_causal_routing_depends_on_nothing_later() -> None:
    """Whatever later tokens are, even which clusters they fill; the Jacobian is lower triangular."""
    tensors, centroids = inputs(True, 1, 1, 30, 4, 2), some_centroids(1, 3, 4)
    call = actual(centroids, causal=True)
    whole = call(**tensors)
    for n in range(1, 30):
        assert_agree(
            {"out": call(**{k: x[:, :, :n] for k, x in tensors.items()})}, {"out": whole[:, :, :n]}
        )
    for name in tensors:
        jacobian = torch.autograd.functional.jacobian(
            lambda x, name=name: call(**(tensors | {name: x})), tensors[name]
        )
        size = jacobian.abs().sum((0, 1, 3, 4, 5, 7))
        row, column = torch.arange(30)[:, None], torch.arange(30)
        assert (size[row < column] == 0).all()
        assert (size[row > column] > 0).sum() > 50
        if name == "v":  # itself only where it is the first of its cluster
            assert (size.diagonal() > 0).sum() == len(
                longspan.routing_clusters(tensors["q"], centroids).unique()
            )
    # Where clusters take their best tokens, later ones do push earlier ones out.
    taken = actual(centroids, causal=True, window_size=8)
    first = taken(**{k: x[:, :, :20] for k, x in tensors.items()})
    assert not torch.equal(first, taken(**tensors)[:, :, :20])


@pytest.mark.parametrize("name", ["clusters take padding", "nearest, shared, padding"])
def test_padding_is_neither_read_nor_written(name: str) -> None:
    shared, options = OPTIONS[name]
    call, tensors = actual(some_centroids(), **options), inputs(shared)
    clean = results(call, tensors)
    for x in tensors.values():
        x[(~PADDING)[:, None].expand(2, 2, 90)] = torch.nan
    assert_same_bits(results(call, tensors), clean)
    assert (clean["out"][(~PADDING)[:, None].expand(2, 2, 90)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["clusters take 20, causal", "nearest, shared", "nearest"])
def test_dtypes_strides_threads(name: str, dtype: torch.dtype) -> None:
    shared, options = OPTIONS[name]
    tensors = inputs(shared, dtype=dtype)
    call = actual(some_centroids(), **options)
    assert results(call, tensors)["out"].dtype == dtype
    if dtype in (torch.float32, torch.bfloat16):
        assert_strides_change_nothing(call, tensors, list(tensors))
        assert_threads_change_nothing(lambda: results(call, tensors))


@pytest.mark.parametrize("name", ["clusters take 20", "nearest, shared"])
def test_checkpoint_autocast_and_compile(fresh_compiler: None, name: str) -> None:
    shared, options = OPTIONS[name]
    tensors, call = inputs(shared, dtype=torch.float32), actual(some_centroids(), **options)
    names, wanted = list(tensors), results(call, tensors)

    def again(**x: Tensor) -> Tensor:
        return checkpoint(lambda *y: call(**dict(zip(names, y))), *x.values(), use_reentrant=False)

    assert_same_bits(results(again, tensors), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(**tensors)
    assert_same_bits({"out": out}, {"out": call(**to(torch.bfloat16, tensors))})
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_agree(results(compiled, tensors), wanted)


def test_dropout() -> None:
    tensors = inputs(True, 1, 2, 400)
    tensors["v"] = torch.ones_like(tensors["v"])
    for options in ({}, {"window_size": 100}):
        call = actual(some_centroids(), **options, dropout_p=0.25)
        out = call(**tensors)
        out = out[out != 0]
        assert out.std() > 0.02
        torch.testing.assert_close(out.mean(), torch.tensor(1.0).double(), rtol=0.03, atol=0)


def test_empty_tensors() -> None:
    for batch, tokens in ((0, 10), (2, 0)):
        for window in (None, 3):
            for shared in (True, False):
                found = results(
                    actual(some_centroids(), window_size=window), inputs(shared, batch, 2, tokens)
                )
                assert found["out"].shape == (batch, 2, tokens, 5)


# ---- a step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_a_row(dtype: torch.dtype) -> None:
    """From the first token on, in sequences of two lengths at once."""
    tensors, centroids = inputs(True, tokens=40, dtype=dtype), some_centroids()
    whole = longspan.routing_attention(tensors["q"], None, tensors["v"], centroids, causal=True)
    ahead = 5
    caches = [torch.full((2, 2, 44, n), torch.nan, dtype=dtype) for n in (8, 5)]
    clusters = torch.full((2, 2, 44), 3, dtype=torch.int32)
    for cache, x in zip(caches, tensors.values()):
        cache[1, :, :ahead] = x[1, :, :ahead]
    clusters[1, :, :ahead] = longspan.routing_clusters(tensors["q"], centroids)[1, :, :ahead]
    for t in range(40 - ahead):
        at = (t, t + ahead)
        new = [torch.stack([x[row, :, i : i + 1] for row, i in enumerate(at)]) for x in tensors.values()]
        out = longspan.routing_attention_step(*new, centroids, *caches, clusters, torch.tensor(at) + 1)
        wanted = torch.stack([whole[row, :, i : i + 1] for row, i in enumerate(at)])
        assert_agree({"out": out}, {"out": wanted.double()})


# ---- k-means


def test_moving_average_in_closed_form() -> None:
    """lambda mu + (1 - lambda) / 2 (sum of queries + sum of keys), then to the sphere."""
    tensors, centroids = inputs(False), some_centroids(count=30)
    sums = (
        longspan.routing_sums(tensors["q"], centroids) + longspan.routing_sums(tensors["k"], centroids)
    ) / 2
    found = longspan.routing_update(centroids, sums, decay=0.9)
    for head in range(2):
        total = torch.zeros(30, 8, dtype=torch.float64)
        empty = torch.ones(30, dtype=torch.bool)
        for x in (tensors["q"], tensors["k"]):
            for row in F.layer_norm(x[:, head], (8,)).reshape(-1, 8) / 8**0.5:
                nearest = int((centroids[head] @ row).argmax())
                total[nearest] += row / 2
                empty[nearest] = False
        wanted = 0.9 * centroids[head] + 0.1 * total
        wanted = wanted / wanted.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(found[head][~empty], wanted[~empty])
        if head == 0:
            longest = wanted
    assert longest.shape == (30, 8)
    lonely = torch.cat([centroids, -F.layer_norm(tensors["q"][:1, :, :1], (8,))[0]], dim=1)
    sums = torch.zeros_like(lonely)
    assert_same_bits({"c": longspan.routing_update(lonely, sums)}, {"c": lonely})


def test_padding_is_not_counted() -> None:
    x, centroids = inputs(True)["q"], some_centroids()
    bad = torch.where(PADDING[:, None, :, None], x, torch.nan)
    sums = longspan.routing_sums(bad, centroids, key_mask=PADDING)
    loss = longspan.routing_loss(bad, centroids, key_mask=PADDING)
    total, terms = torch.zeros_like(sums), []
    nearest = longspan.routing_clusters(x, centroids)
    for b in range(2):
        for h in range(2):
            for t in PADDING[b].nonzero().view(-1):
                point = F.layer_norm(x[b, h, t], (8,)) / 8**0.5
                total[h, nearest[b, h, t]] += point
                terms.append((point - centroids[h, nearest[b, h, t]]).square().mean())
    torch.testing.assert_close(sums, total)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    nobody = torch.zeros_like(PADDING)
    assert longspan.routing_loss(x, centroids, key_mask=nobody) == 0


def test_loss_has_a_gradient_for_points_alone() -> None:
    x, centroids = inputs(True, 1, 1, 5, 3)["q"], some_centroids(1, 2, 3)
    assert gradcheck(lambda y: longspan.routing_loss(y, centroids), [x.requires_grad_()])
    centroids.requires_grad_()
    (gradient,) = torch.autograd.grad(longspan.routing_loss(x, centroids), centroids, allow_unused=True)
    assert gradient is None


def test_kmeans_finds_what_is_there() -> None:
    """Three bundles of directions, each centroid at the middle of one; the loss falls on the way."""
    generator = torch.Generator().manual_seed(0)
    middles = F.layer_norm(torch.randn(2, 3, 16, generator=generator), (16,))
    x = middles[:, torch.arange(300) % 3] + 0.1 * torch.randn(2, 300, 16, generator=generator)
    x = x[None]
    start = longspan.routing_kmeans(x, 3, iterations=0)
    losses = [
        float(longspan.routing_loss(x, longspan.routing_kmeans(x, 3, iterations=n, start=start)))
        for n in range(4)
    ]
    assert losses == sorted(losses, reverse=True)
    good = longspan.routing_kmeans(x, 3, start=x[0, :, :3])
    torch.testing.assert_close(good, F.normalize(middles, dim=-1), atol=0.02, rtol=0)
    assert torch.equal(
        longspan.routing_kmeans(x, 3, iterations=0, start=good), F.normalize(good, dim=-1)
    )
    many = longspan.routing_kmeans(x[:, :, :2], 5)  # more than there are vectors
    torch.testing.assert_close(many.norm(dim=-1), torch.ones(2, 5))
    real = torch.arange(300)[None] % 3 == 0
    one = longspan.routing_kmeans(x, 2, key_mask=real)
    alike = torch.einsum("hcd,hd->hc", one, F.normalize(middles[:, 0], dim=-1))
    assert (alike > 0.9).all()


def test_sums_are_reduced_in_each_iteration() -> None:
    """Halves on two ranks, as a function that adds the other half's sums: the k-means of both."""
    x, start = inputs(True, 4, 1, 50)["q"], some_centroids(1)
    whole = longspan.routing_kmeans(x, 6, iterations=1, start=start)
    other = longspan.routing_sums(x[2:], F.normalize(start, dim=-1))
    half = longspan.routing_kmeans(
        x[:2], 6, iterations=1, start=start, all_reduce=lambda s: s.add_(other)
    )
    torch.testing.assert_close(half, whole)


# ---- errors


def attend(shared: bool = True, **change: Any):
    arguments = {"k": None, "centroids": some_centroids()} | inputs(shared)
    return lambda: longspan.routing_attention(**(arguments | change))


def step(**change: Any):
    arguments: dict[str, Any] = {
        "q": torch.ones(1, 2, 1, 8), "v": torch.ones(1, 2, 1, 5), "centroids": torch.ones(2, 3, 8),
        "q_cache": torch.ones(1, 2, 9, 8), "v_cache": torch.ones(1, 2, 9, 5),
        "cluster_cache": torch.ones(1, 2, 9, dtype=torch.int64), "cache_seqlens": torch.tensor([9]),
    }  # fmt: skip
    return lambda: longspan.routing_attention_step(**(arguments | change))


@pytest.mark.parametrize(
    ("kind", "parts", "call"),
    [
        (TypeError, ["q", "int64"], attend(q=torch.ones(2, 2, 90, 8, dtype=torch.int64))),
        (ValueError, ["q", "(90, 8)"], attend(q=torch.ones(90, 8).double())),
        (TypeError, ["k", "float32"], attend(k=torch.ones(2, 2, 90, 8))),
        (ValueError, ["k", "(2, 2, 91, 8)"], attend(k=torch.ones(2, 2, 91, 8).double())),
        (ValueError, ["v", "(2, 2, 91, 5)"], attend(v=torch.ones(2, 2, 91, 5).double())),
        (ValueError, ["centroids", "(3, 6, 8)"], attend(centroids=torch.ones(3, 6, 8))),
        (ValueError, ["centroids", "0"], attend(centroids=torch.ones(2, 0, 8))),
        (ValueError, ["window_size", "0"], attend(window_size=0)),
        (ValueError, ["causal", "k=None", "window_size"], attend(shared=False, causal=True)),
        (ValueError, ["dropout_p", "1.0"], attend(dropout_p=1.0)),
        (TypeError, ["key_mask", "bool"], attend(key_mask=torch.ones(2, 90))),
        (ValueError, ["key_mask", "(2, 9)"], attend(key_mask=torch.ones(2, 9).bool())),
        (ValueError, ["q", "token", "2"], step(q=torch.ones(1, 2, 2, 8), v=torch.ones(1, 2, 2, 5))),
        (ValueError, ["q_cache", "(1, 2, 9, 7)"], step(q_cache=torch.ones(1, 2, 9, 7))),
        (ValueError, ["v_cache", "(1, 2, 8, 5)"], step(v_cache=torch.ones(1, 2, 8, 5))),
        (TypeError, ["cluster_cache", "float32"], step(cluster_cache=torch.ones(1, 2, 9))),
        (ValueError, ["cache_seqlens", "9", "10"], step(cache_seqlens=torch.tensor([10]))),
        (RuntimeError, ["gradient"], step(q=torch.ones(1, 2, 1, 8, requires_grad=True))),
        (
            ValueError,
            ["decay", "1.0"],
            lambda: longspan.routing_update(some_centroids(), some_centroids(), decay=1.0),
        ),
        (
            ValueError,
            ["sums", "(2, 5, 8)"],
            lambda: longspan.routing_update(some_centroids(), some_centroids(count=5)),
        ),
        (ValueError, ["x", "none"], lambda: longspan.routing_kmeans(torch.ones(1, 1, 0, 4), 2)),
        (ValueError, ["num_clusters", "0"], lambda: longspan.routing_kmeans(torch.ones(1, 1, 3, 4), 0)),
        (
            ValueError,
            ["iterations", "-1"],
            lambda: longspan.routing_kmeans(torch.ones(1, 1, 3, 4), 2, iterations=-1),
        ),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], call) -> None:
    assert_raises(kind, parts, call)
