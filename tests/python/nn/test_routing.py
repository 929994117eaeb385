"""`longspan.nn.RoutingAttention`: when its centroids move, a cache, padding, training."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_raises
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import longspan
from longspan.nn import KVCache, RoutingAttention

WIDTH, HEADS, CLUSTERS = 32, 4, 5


def a_layer(**options: Any) -> RoutingAttention:
    return RoutingAttention(WIDTH, HEADS, **({"num_clusters": CLUSTERS} | options))


def some_x(batch: int = 2, tokens: int = 50, **kw: Any) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, **({"dtype": torch.float64} | kw))


def projected(layer: RoutingAttention, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    def heads(projection: nn.Module) -> Tensor:
        return projection(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    q = F.layer_norm(heads(layer.q_proj), (layer.head_dim,))
    k = None if layer.k_proj is None else F.layer_norm(heads(layer.k_proj), (layer.head_dim,))
    return q, k, heads(layer.v_proj)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": 12, "shared_qk": False}, {"window_size": 9, "head_dim": 12}],
    ids=str,
)
def test_it_is_the_operator_between_projections(options: dict[str, Any]) -> None:
    layer = a_layer(**options).double().eval()
    x = some_x()
    q, k, v = projected(layer, x)
    rest = {n: options[n] for n in ("causal", "window_size") if n in options}
    wanted = longspan.routing_attention(q, k, v, layer.centroids, **rest)
    out, loss = layer(x, return_loss=True)
    torch.testing.assert_close(out, layer.o_proj(wanted.transpose(1, 2).flatten(2)))
    losses = [longspan.routing_loss(y, layer.centroids) for y in (q, k) if y is not None]
    torch.testing.assert_close(loss, 1e-4 * torch.stack(losses).mean())


@pytest.mark.parametrize("shared", [True, False])
def test_when_centroids_move(shared: bool) -> None:
    """k-means on the first batch; then each forward moves them by what the one before it left."""
    layer = a_layer(window_size=12, shared_qk=shared, ema_decay=0.9).double()
    at_random = layer.centroids.clone()
    layer.eval()(some_x())
    assert torch.equal(layer.centroids, at_random)
    assert not layer.initted
    layer.train()

    def sums(x: Tensor) -> Tensor:
        with torch.no_grad():
            q, k, _ = projected(layer, x)
            each = [longspan.routing_sums(y, layer.centroids) for y in (q, k) if y is not None]
        return torch.stack(each).mean(0)

    first, second = some_x(), some_x()
    layer(first)
    assert layer.initted
    assert not torch.equal(layer.centroids, at_random)
    begun = layer.centroids.clone()
    left = sums(first)
    torch.testing.assert_close(layer.pending, left)
    layer(second)
    wanted = longspan.routing_update(begun, left, decay=0.9)
    torch.testing.assert_close(layer.centroids, wanted)
    assert not torch.equal(wanted, begun)
    torch.testing.assert_close(layer.pending, sums(second))
    with torch.no_grad():  # a forward in training mode counts, whether it has gradients or not
        layer(second)
    assert not torch.equal(layer.centroids, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_nothing(reentrant: bool) -> None:
    """Under activation checkpointing: same centroids, moved once, and the same gradients."""
    plain = a_layer(causal=True, ema_decay=0.5).double()
    checkpointed = copy.deepcopy(plain)
    for _ in range(3):
        x = some_x().requires_grad_()
        state = torch.get_rng_state()
        plain(x).square().sum().backward()
        wanted, x.grad = x.grad, None
        torch.set_rng_state(state)  # the first k-means draws where it begins
        checkpoint(checkpointed, x, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(x.grad, wanted)
        for name, buffer in plain.named_buffers():
            assert torch.equal(buffer, checkpointed.get_buffer(name)), name
    for p, q in zip(plain.parameters(), checkpointed.parameters()):
        torch.testing.assert_close(q.grad, p.grad)


def test_state_dict_goes_on_where_it_was() -> None:
    layer = a_layer(causal=True, ema_decay=0.5).double()
    layer(some_x())
    assert {"centroids", "initted", "pending"} < layer.state_dict().keys()
    other = a_layer(causal=True, ema_decay=0.5).double()
    other.load_state_dict(layer.state_dict())
    x = some_x()
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer.centroids, other.centroids)


def test_padding_is_neither_read_nor_written_nor_learnt() -> None:
    real = torch.arange(50) < torch.tensor([[50], [23]])
    x = some_x()
    bad = torch.where(real[..., None], x, torch.nan).requires_grad_()
    found = []
    for y in (bad, x):
        torch.manual_seed(0)
        layer = a_layer(window_size=30, shared_qk=False).double()
        layer(y, key_mask=real)
        out, loss = layer(y, key_mask=real, return_loss=True)
        found.append((out, loss, layer.centroids.clone(), layer.pending.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    out, loss = found[0][:2]
    assert (out[1, 23:] == 0).all()
    (out.square().sum() + loss).backward()
    assert bad.grad.isfinite().all()
    assert (bad.grad[1, 23:] == 0).all()
    nobody = a_layer().double()
    nobody(x, key_mask=torch.zeros_like(real))
    assert not nobody.initted


@pytest.mark.parametrize("prompt", [0, 1, 17])
def test_a_cache_goes_on_where_the_prompt_ends(prompt: int) -> None:
    """Rows of the whole sequence, for causal routing depends on nothing later."""
    layer = a_layer(causal=True).double()
    layer(some_x())
    layer.eval()
    x = some_x(2, 30)
    whole = layer(x)
    cache = layer.make_cache(2, 30)
    with torch.no_grad():
        parts = [layer(x[:, :prompt], cache=cache)] if prompt else []
        parts += [layer(x[:, prompt : prompt + 5], cache=cache)]
        parts += [layer(x[:, t : t + 1], cache=cache) for t in range(prompt + 5, 30)]
    if prompt:
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    else:  # a first part of five is a prompt, too
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    other = cache.clone()
    other.reorder(torch.tensor([1, 1]))
    assert torch.equal(other.codes[0], cache.codes[1])


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    layer = a_layer(causal=True, ema_decay=0.5).double()
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        layer(torch.randn(2, 40, WIDTH, generator=generator, dtype=torch.float64))
    torch.save((layer.centroids, layer.pending), os.path.join(folder, str(rank)))
    torch.distributed.destroy_process_group()


def test_ranks_learn_from_all_of_them(tmp_path: Path) -> None:
    """Two ranks, each with its part of the batch: the centroids of both, and of one with all of it."""
    torch.multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    (a, a_left), (b, b_left) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert torch.equal(a, b)
    assert torch.equal(a_left, b_left)
    torch.manual_seed(0)
    alone = a_layer(causal=True, ema_decay=0.5).double()
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]

    def batches() -> list[Tensor]:
        return [torch.randn(2, 40, WIDTH, generator=g, dtype=torch.float64) for g in generators]

    parts = [batches() for _ in range(3)]
    begin = torch.get_rng_state()
    q = projected(alone, parts[0][0])[0]
    start = longspan.routing_kmeans(q.detach(), CLUSTERS, iterations=0)  # drawn on the first rank
    torch.set_rng_state(begin)
    whole = projected(alone, torch.cat(parts[0]))[0].detach()
    centroids = longspan.routing_kmeans(whole, CLUSTERS, start=start)
    for now in parts[:-1]:  # what the last forward left is still to come
        sums = longspan.routing_sums(projected(alone, torch.cat(now))[0].detach(), centroids)
        centroids = longspan.routing_update(centroids, sums, decay=0.5)
    torch.testing.assert_close(a, centroids)


def test_it_trains() -> None:
    """Few steps from noise to a rule: each token's target is the mean of the tokens before it."""
    torch.manual_seed(0)
    layer = a_layer(causal=True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    x = some_x(4, 60, dtype=torch.float32)
    target = x.cumsum(1) / torch.arange(1, 61)[:, None]
    losses = []
    for _ in range(80):
        out, commitment = layer(x, return_loss=True)
        loss = (out - target).square().mean() + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert len(longspan.routing_clusters(projected(layer, x)[0], layer.centroids).unique()) == CLUSTERS


def test_dtypes_autocast_copies_and_repr() -> None:
    layer = a_layer(dropout=0.5).eval()
    x = some_x(dtype=torch.float32)
    assert copy.deepcopy(layer)(x).equal(layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer.train()(x).dtype == torch.bfloat16
    assert not torch.equal(layer(x), layer(x))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert f"num_clusters={CLUSTERS}" in repr(layer)
    assert layer.float()(x[:0]).shape == (0, 50, WIDTH)


def with_cache(**options: Any):
    def call() -> None:
        layer = a_layer(**({"causal": True} | options.get("layer", {})))
        layer.train(options.get("training", False))
        cache = options["cache"] if "cache" in options else layer.make_cache(1, options.get("slots", 10))
        with torch.set_grad_enabled(options.get("grad", False)):
            layer(torch.ones(1, 3, WIDTH), cache=cache, key_mask=options.get("mask"))

    return call


@pytest.mark.parametrize(
    ("kind", "parts", "call"),
    [
        (ValueError, ["hidden_size", "5", "32"], lambda: RoutingAttention(WIDTH, 5, num_clusters=3)),
        (ValueError, ["num_clusters", "0"], lambda: a_layer(num_clusters=0)),
        (ValueError, ["window_size", "0"], lambda: a_layer(window_size=0)),
        (ValueError, ["shared_qk", "causal"], lambda: a_layer(causal=True, shared_qk=False)),
        (ValueError, ["ema_decay", "1.0"], lambda: a_layer(ema_decay=1.0)),
        (ValueError, ["dropout", "-0.5"], lambda: a_layer(dropout=-0.5)),
        (ValueError, ["kmeans_iterations", "-1"], lambda: a_layer(kmeans_iterations=-1)),
        (ValueError, ["x", "hidden_size", "(2, 3)"], lambda: a_layer()(torch.ones(2, 3))),
        (TypeError, ["key_mask", "bool"], with_cache(cache=None, mask=torch.ones(1, 3))),
        (ValueError, ["cache", "causal"], with_cache(layer={"causal": False})),
        (ValueError, ["cache", "window_size"], with_cache(layer={"window_size": 3})),
        (ValueError, ["cache", "eval()"], with_cache(training=True)),
        (ValueError, ["key_mask", "cache"], with_cache(mask=torch.ones(1, 3, dtype=torch.bool))),
        (ValueError, ["cache", "3 slots", "2"], with_cache(slots=2)),
        (TypeError, ["cache", "RoutingCache", "KVCache"], with_cache(cache=KVCache(1, 4, 10, 8))),
        (RuntimeError, ["cache", "gradient"], with_cache(grad=True)),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], call) -> None:
    assert_raises(kind, parts, call)
