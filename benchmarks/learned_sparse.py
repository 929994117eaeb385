"""Attention that learns where to look: LSH (Reformer) and routing, beside transformers and our own.

Transformers' LSH attention is measured without its projections: identities stand in. It counts a pair
as often as rounds bring it together, so beside it ours does, too; the rows against full attention count
it once. Both sides of a row hash, sort or route within the measured time.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _measure import Bench, Row, check_same
from torch import Tensor, nn

import longspan
from longspan.ops.lsh import lsh_num_buckets
from longspan.reference import lsh as lsh_reference
from longspan.reference import routing as routing_reference

Case = tuple[str, Callable[[Bench], Row]]
Attention = Callable[[Tensor, Tensor], Tensor]

HEADS, SIZE, CHUNK, ROUNDS = 8, 64, 64, 4
TOLERANCE = 1e-4  # of the greatest value


def cases() -> Iterator[Case]:
    yield from _lsh_cases()
    yield from _routing_cases()


def _lsh_cases() -> Iterator[Case]:
    for tokens in (4096, 16384):
        for backward in (False, True):
            what = f"{', forward + backward' if backward else ''}, T={tokens}"
            yield f"LSH, {ROUNDS} rounds{what}", partial(_lsh_beside_transformers, tokens, backward)
            for rounds in (1, ROUNDS):
                yield (
                    f"LSH, {rounds} round{'s'[: rounds - 1]}, causal{what}",
                    partial(_against_full, partial(_lsh, rounds), _check_lsh, tokens, backward),
                )
    yield "LSH, a step at 16384 tokens", _lsh_step


def _routing_cases() -> Iterator[Case]:
    for tokens in (4096, 16384):
        for backward in (False, True):
            what = f"{', forward + backward' if backward else ''}, T={tokens}"
            yield (
                f"routing, nearest, causal{what}",
                partial(_against_full, partial(_routing, None), _check_routing, tokens, backward),
            )
            yield (
                f"routing, clusters' best, causal{what}",
                partial(_against_full, partial(_routing, "best"), _check_routing, tokens, backward),
            )
    yield "routing, a step at 16384 tokens", _routing_step


# ---- shared


def _inputs(tokens: int, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """qk, v, and a gradient of the output: (1, H, T, D)."""
    generator = torch.Generator().manual_seed(0)
    qk, v, d_out = (torch.randn(1, HEADS, tokens, SIZE, generator=generator) for _ in range(3))
    return qk.requires_grad_(grad), v.requires_grad_(grad), d_out


def _run(attention: Attention, backward: bool, qk: Tensor, v: Tensor, d_out: Tensor) -> Any:
    if not backward:
        with torch.no_grad():
            return attention(qk, v)
    out = attention(qk, v)
    return out, *torch.autograd.grad(out, (qk, v), d_out)


def _full(qk: Tensor, v: Tensor) -> Tensor:
    return longspan.attention(qk, qk, v, causal=True)


def _against_full(
    make: Callable[[int], Attention],
    check: Callable[[Callable[[int], Attention]], None],
    tokens: int,
    backward: bool,
    bench: Bench,
) -> Row:
    """Ours, checked against its dense reference at 512 tokens, and full attention, which is another."""
    check(make)
    inputs = _inputs(tokens, backward)
    row = Row(peer="our full attention")
    row.ours_seconds, row.peer_seconds = bench.times(
        partial(_run, make(tokens), backward, *inputs), partial(_run, _full, backward, *inputs)
    )
    row.value = row.peer_seconds / row.ours_seconds
    return row


# ---- LSH


def _lsh(rounds: int, tokens: int, **options: Any) -> Attention:
    return partial(
        longspan.lsh_attention, num_hashes=rounds, chunk_length=CHUNK, causal=True, seed=0, **options
    )


def _check_lsh(make: Callable[[int], Attention]) -> None:
    qk, v, d_out = _inputs(512, grad=True)
    attend = make(512)
    buckets = attend(qk, v, return_buckets=True)[1]  # type: ignore[call-arg]
    count = lsh_reference.meetings(buckets, chunk_length=CHUNK, chunks_before=1, chunks_after=0)

    def dense(qk: Tensor, v: Tensor) -> Tensor:
        return lsh_reference.lsh_attention(qk, v, count, causal=True, scale=SIZE**-0.5)[0]

    check_same(_run(attend, True, qk, v, d_out), _run(dense, True, qk, v, d_out), TOLERANCE)


def _lsh_beside_transformers(tokens: int, backward: bool, bench: Bench) -> Row:
    """Not causal: a token that sees only itself has -1e5 there, which float32 rounds to 0.008."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    num_buckets = lsh_num_buckets(tokens, CHUNK)
    config = ReformerConfig(
        hidden_size=HEADS * SIZE, num_attention_heads=HEADS, attention_head_size=SIZE, num_hashes=ROUNDS,
        num_buckets=num_buckets if isinstance(num_buckets, int) else list(num_buckets),
        lsh_attn_chunk_length=CHUNK, hash_seed=0, is_decoder=False, attn_layers=["lsh"],
        lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = LSHSelfAttention(config, 0)
    layer.query_key = layer.value = nn.Identity()

    def theirs(x: Tensor) -> Tensor:
        return layer(x).hidden_states

    def ours(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        out = longspan.lsh_attention(
            heads, heads, num_hashes=ROUNDS, num_buckets=num_buckets, chunk_length=CHUNK, dedup=False,
            wrap=True, seed=0,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(2)

    x, d_out = torch.randn(2, 1, tokens, HEADS * SIZE, generator=torch.Generator().manual_seed(0))
    x.requires_grad_(backward)

    def run(layer: Callable[[Tensor], Tensor]) -> Any:
        if not backward:
            with torch.no_grad():
                return layer(x)
        out = layer(x)
        return out, torch.autograd.grad(out, x, d_out)[0]

    return bench.compare(
        partial(run, ours), partial(run, theirs), tolerance=TOLERANCE, peer_name="transformers"
    )


def _lsh_step(bench: Bench) -> Row:
    """One token to a cache, beside exact decoding; the step is checked against the whole's last row."""
    tokens = 16384
    qk, v, _ = _inputs(tokens)
    num_buckets = lsh_num_buckets(tokens, CHUNK)
    rotations = longspan.lsh_rotations(HEADS, SIZE, num_hashes=ROUNDS, num_buckets=num_buckets, seed=0)
    options = {"num_buckets": num_buckets, "chunk_length": CHUNK, "rotations": rotations}
    whole, buckets = longspan.lsh_attention(qk, v, causal=True, return_buckets=True, **options)
    length = torch.tensor([tokens])
    last = (qk[:, :, -1:].clone(), v[:, :, -1:].clone())
    step = partial(longspan.lsh_attention_step, *last, qk, v, buckets, length, **options)
    return _step_row(bench, step, whole, qk, v, length)


def _step_row(
    bench: Bench, step: Callable[[], Tensor], whole: Tensor, q: Tensor, v: Tensor, length: Tensor
) -> Row:
    check_same(step(), whole[:, :, -1:], TOLERANCE)
    row = Row(peer="our attention_decode")
    exact = partial(longspan.attention_decode, q[:, :, -1:], q, v, length)
    row.ours_seconds, row.peer_seconds = bench.times(step, exact)
    row.value = row.peer_seconds / row.ours_seconds
    return row


# ---- routing


def _centroids(tokens: int) -> Tensor:
    """One cluster for each 128 tokens, after k-means on the inputs."""
    torch.manual_seed(0)
    return longspan.routing_kmeans(_inputs(tokens)[0], tokens // 128, iterations=3)


def _routing(which: str | None, tokens: int) -> Attention:
    centroids = _centroids(tokens)
    window = None if which is None else 128

    def attend(qk: Tensor, v: Tensor) -> Tensor:
        return longspan.routing_attention(qk, None, v, centroids, window_size=window, causal=True)

    attend.window, attend.centroids = window, centroids  # type: ignore[attr-defined]
    return attend


def _check_routing(make: Callable[[int], Attention]) -> None:
    qk, v, d_out = _inputs(512, grad=True)
    attend: Any = make(512)
    score = routing_reference.scores(qk.detach(), attend.centroids)
    members = routing_reference.members(score, attend.window)

    def dense(qk: Tensor, v: Tensor) -> Tensor:
        return routing_reference.routing_attention(
            qk, None, v, members, members, causal=True, scale=SIZE**-0.5
        )

    check_same(_run(attend, True, qk, v, d_out), _run(dense, True, qk, v, d_out), TOLERANCE)


def _routing_step(bench: Bench) -> Row:
    tokens = 16384
    qk, v, _ = _inputs(tokens)
    centroids = _centroids(tokens)
    whole = longspan.routing_attention(qk, None, v, centroids, causal=True)
    clusters, length = longspan.routing_clusters(qk, centroids), torch.tensor([tokens])
    last = (qk[:, :, -1:].clone(), v[:, :, -1:].clone())
    step = partial(longspan.routing_attention_step, *last, centroids, qk, v, clusters, length)
    return _step_row(bench, step, whole, qk, v, length)
