"""The delta rule against transformers' chunks in torch, and itself.

transformers' function takes (batch, tokens, heads, channels); both sides get the same tensors, ours a
view of them with heads and tokens exchanged.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _measure import Bench, Row
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

import longspan

Case = tuple[str, Callable[[Bench], Row]]

HEADS, CHANNELS = 8, 64
CHUNK = 32  # kDeltaChunk in csrc/kernels/delta_rule_chunk.h
TOLERANCE = 1e-4  # of the greatest value; float32 both


def cases() -> Iterator[Case]:
    for tokens in (4096, 16384):
        for backward in (False, True):
            work = f"{'forward + backward' if backward else 'forward'}, gated, T={tokens}"
            needed = (40.0 if backward else 8.0) if tokens == 16384 else None
            yield work, partial(_against_transformers, tokens, HEADS, CHANNELS, backward, needed)
    yield (
        "forward, gated, T=4096, H16 of 32, D128",
        partial(_against_transformers, 4096, 16, 128, False, None),
    )
    yield "forward, T=16384, against gated", partial(_ungated, False)
    yield "forward + backward, T=16384, against gated", partial(_ungated, True)
    yield "forward, T=16384, against linear attention", _linear
    yield "forward, T=16384, bfloat16, against float32", _half
    for backward in (False, True):
        work = "forward + backward" if backward else "forward"
        yield f"{work}, H1 T=65536, 2 threads", partial(_one_head, backward)
    yield "one step, B256", partial(_step, 64)
    yield "one step, B256, D128", partial(_step, 128)


def inputs(tokens: int, heads: int = HEADS, channels: int = CHANNELS, *, group: int = 1) -> list[Tensor]:
    """q, k, v, beta and gate, tokens outside heads, as such layers begin."""
    torch.manual_seed(0)
    q, k = (normalize(torch.randn(1, tokens, heads, channels), dim=-1) for _ in range(2))
    v = torch.randn(1, tokens, heads * group, channels)
    beta, gate = torch.randn(2, 1, tokens, heads * group)
    made = [q, k, v, beta.sigmoid(), logsigmoid(gate) / 16]
    return [x.requires_grad_() for x in made]


def _ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None = None) -> Tensor:
    q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
    gate = None if gate is None else gate.transpose(1, 2)
    return longspan.delta_rule(q, k, v, beta, gate=gate).transpose(1, 2)


def _transformers(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(q, k, v, g=gate, beta=beta)[0]


def _run(function: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> Any:
    if not backward:
        with torch.no_grad():
            return function(*tensors)
    out = function(*tensors)
    return out, *torch.autograd.grad(out, tensors, tensors[2].detach())


def _flops(tokens: int, value_heads: int, channels: int) -> float:
    """Of a forward: three products with the state; four triangles, half a chunk and half a strip."""
    inside = 4 * (CHUNK + 16) / 2
    return 2.0 * tokens * value_heads * channels * (3 * channels + inside)


def _against_transformers(
    tokens: int, heads: int, channels: int, backward: bool, at_least: float | None, bench: Bench
) -> Row:
    tensors = inputs(tokens, heads, channels, group=1 if heads == HEADS else 2)
    return bench.compare(
        partial(_run, _ours, tensors, backward),
        partial(_run, _transformers, tensors, backward),
        tolerance=TOLERANCE,
        at_least=at_least,
        peer_name="transformers' chunks",
        flops=0.0 if backward else _flops(tokens, tensors[2].shape[2], channels),
    )


def _ratio(bench: Bench, ours: Callable[[], Any], other: Callable[[], Any], **facts: Any) -> Row:
    """For what is measured against ourselves: nothing is there to check."""
    row = Row(**facts)
    row.ours_seconds, row.peer_seconds = bench.times(ours, other)
    row.value = row.peer_seconds / row.ours_seconds
    return row


def _ungated(backward: bool, bench: Bench) -> Row:
    tensors = inputs(16384)
    return _ratio(
        bench, partial(_run, _ours, tensors[:4], backward), partial(_run, _ours, tensors, backward),
        peer="ours with a gate",
    )  # fmt: skip


def _linear(bench: Bench) -> Row:
    def linear(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
        q, k, v, gate = (x.transpose(1, 2) for x in (q, k, v, gate))
        return longspan.linear_attention(q, k, v, gate=gate)

    tensors = inputs(16384)
    return _ratio(
        bench, partial(_run, _ours, tensors, False), partial(_run, linear, tensors, False),
        peer="our linear attention",
    )  # fmt: skip


def _half(bench: Bench) -> Row:
    tensors = inputs(16384)
    half = [x.bfloat16() if i < 3 else x for i, x in enumerate(tensors)]
    return _ratio(
        bench, partial(_run, _ours, half, False), partial(_run, _ours, tensors, False), peer="float32"
    )


def _one_head(backward: bool, bench: Bench) -> Row:
    tensors = inputs(65536, 1)

    def with_threads(count: int) -> None:
        torch.set_num_threads(count)
        _run(_ours, tensors, backward)
        torch.set_num_threads(bench.threads)

    return _ratio(
        bench, partial(with_threads, 2), partial(with_threads, 1), at_least=1.6, peer="ours, 1 thread"
    )


def _step(channels: int, bench: Bench) -> Row:
    q, k, v, beta, gate = (x[0] for x in inputs(256, channels=channels))
    start = torch.zeros(256, HEADS, channels, channels)

    def plain(state: Tensor) -> Tensor:
        state *= gate.exp()[..., None, None]
        error = beta[..., None] * (v - (k[..., None, :] @ state).squeeze(-2))
        state += k[..., None] * error[..., None, :]
        return (q[..., None, :] @ state).squeeze(-2) * channels**-0.5

    mine, theirs = start.clone(), start.clone()
    with torch.no_grad():
        ours = partial(longspan.delta_rule_step, q, k, v, beta, mine, gate=gate)
        row = bench.compare(
            ours, lambda: plain(theirs), tolerance=TOLERANCE, peer_name="torch", memory=False
        )
        if row.ours_seconds is not None:
            # The limit is measured on the same tensor, in turn: reading and writing it in place.
            seconds, scale = bench.times(ours, lambda: mine.mul_(1.0))
            row.limit, row.limit_at_least = "in-place read + write", 0.8
            row.limit_fraction = scale / seconds
    return row
