"""Linear attention against plain torch in chunks, fast-transformers where it is there, and itself.

fast-transformers (``pip install --no-deps --no-build-isolation --target FOLDER
pytorch-fast-transformers``, FOLDER on PYTHONPATH; no nvcc on PATH beside a CPU build of torch) compiles
for five minutes; without it its rows say so.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from _measure import Bench, Row
from torch import Tensor

import longspan

Case = tuple[str, Callable[[Bench], Row]]
Attend = Callable[..., Tensor]

HEADS, CHANNELS = 8, 64
CHUNK = 32  # kLinearChunk in csrc/kernels/linear_attention_chunk.h
TOLERANCE = 1e-4  # of the greatest value; float32 both


def cases() -> Iterator[Case]:
    for tokens in (4096, 16384):
        long = tokens == 16384
        for backward in (False, True):
            work = f"{'forward + backward' if backward else 'forward'}, T={tokens}"
            needed = (5.0 if backward else 6.0) if long else None
            yield work, partial(_against, _plain, "torch, chunks of 128", tokens, backward, needed)
            work += ", fast-transformers"
            if find_spec("fast_transformers"):
                needed = (3.5 if backward else 4.0) if long else None
                yield (
                    work,
                    partial(_against, _fast_transformers, "fast-transformers", tokens, backward, needed),
                )
            else:
                yield f"{work}: not installed", lambda bench: Row(peer="fast-transformers")
    for dtype in (torch.bfloat16, torch.float16):
        yield f"forward, T=16384, {str(dtype)[6:]}", partial(_half, dtype)
    for kind in ("head", "token", "channel"):
        for backward in (False, True):
            work = f"{'forward + backward' if backward else 'forward'}, T=16384, a gate a {kind}"
            yield work, partial(_gated, kind, backward)
    yield "forward, T=16384, normalized", _normalized
    yield "forward, T=16384, not causal", _full
    for backward in (False, True):
        work = "forward + backward" if backward else "forward"
        yield f"{work}, H1 T=65536, 2 threads", partial(_one_head, backward)
    yield "T=512 against our exact attention", partial(_crossover, 512, 1.0)
    yield "T=4096 against our exact attention", partial(_crossover, 4096, 8.0)
    yield "one step, B256", _step


def inputs(tokens: int, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q and k as a feature map gives them, and v."""
    torch.manual_seed(0)
    q, k = (torch.rand(1, heads, tokens, CHANNELS) for _ in range(2))
    return [x.to(dtype).requires_grad_() for x in (q, k, torch.randn(1, heads, tokens, CHANNELS))]


def gates(kind: str, tokens: int) -> Tensor:
    """As such layers begin: logarithms of sigmoids, over 16."""
    shape = {"head": (HEADS,), "token": (1, HEADS, tokens), "channel": (1, HEADS, tokens, CHANNELS)}[
        kind
    ]
    return (torch.nn.functional.logsigmoid(torch.randn(shape)) / 16).requires_grad_()


def _ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None, **options: Any) -> Tensor:
    return longspan.linear_attention(q, k, v, gate=gate, scale=1.0, **options)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The states before all chunks at once, then each chunk's own scores."""
    q, k, v = (x.unflatten(2, (-1, 128)) for x in (q, k, v))
    updates = k.transpose(-1, -2) @ v
    states = updates.cumsum(2) - updates
    return (q @ states + (q @ k.transpose(-1, -2)).tril() @ v).flatten(2, 3)


def _fast_transformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fast_transformers.causal_product import causal_dot_product

    return causal_dot_product(q, k, v)


def _run(function: Attend, tensors: list[Tensor], backward: bool, **options: Any) -> Any:
    if not backward:
        with torch.no_grad():
            return function(*tensors, **options)
    out = function(*tensors, **options)
    return out, *torch.autograd.grad(out, tensors, tensors[2].detach())


def _flops(tokens: int) -> float:
    """Of a forward: writing and reading the state, and half a chunk and half a strip of 16 inside."""
    return 2.0 * tokens * HEADS * CHANNELS * (2 * CHANNELS + 2 * (CHUNK + 16) / 2)


def _against(
    peer: Attend, name: str, tokens: int, backward: bool, at_least: float | None, bench: Bench
) -> Row:
    tensors = inputs(tokens)
    return bench.compare(
        partial(_run, _ours, tensors, backward),
        partial(_run, peer, tensors, backward),
        tolerance=TOLERANCE,
        at_least=at_least,
        peer_name=name,
        flops=0.0 if backward else _flops(tokens),
        limit_at_least=0.55 if tokens == 16384 and not backward else None,
    )


def _half(dtype: torch.dtype, bench: Bench) -> Row:
    tensors = inputs(16384, dtype=dtype)
    return bench.compare(
        partial(_run, _ours, tensors, False),
        partial(_run, _plain, tensors, False),
        tolerance=2e-2,
        peer_name="torch, chunks of 128",
        flops=_flops(16384),
        dtype=dtype,
    )


def _ratio(bench: Bench, ours: Callable[[], Any], other: Callable[[], Any], **facts: Any) -> Row:
    """For what is measured against ourselves: nothing is there to check."""
    row = Row(**facts)
    row.ours_seconds, row.peer_seconds = bench.times(ours, other)
    row.value = row.peer_seconds / row.ours_seconds
    return row


def _gated(kind: str, backward: bool, bench: Bench) -> Row:
    tensors = inputs(16384)
    with_gate = [*tensors, gates(kind, 16384)]
    return _ratio(
        bench, partial(_run, _ours, with_gate, backward), partial(_run, _ours, tensors, backward),
        peer="ours without gate", at_least=1 / 1.6,
    )  # fmt: skip


def _normalized(bench: Bench) -> Row:
    tensors = inputs(16384)
    return _ratio(
        bench, partial(_run, _ours, tensors, False, normalize=True),
        partial(_run, _ours, tensors, False), peer="ours without",
    )  # fmt: skip


def _full(bench: Bench) -> Row:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.transpose(-1, -2) @ v)

    tensors = inputs(16384)
    return bench.compare(
        partial(_run, _ours, tensors, False, causal=False),
        partial(_run, plain, tensors, False),
        tolerance=TOLERANCE,
        peer_name="torch",
        flops=4.0 * 16384 * HEADS * CHANNELS**2,
    )


def _one_head(backward: bool, bench: Bench) -> Row:
    tensors = inputs(65536, heads=1)

    def with_threads(count: int) -> None:
        torch.set_num_threads(count)
        _run(_ours, tensors, backward)
        torch.set_num_threads(bench.threads)

    return _ratio(
        bench, partial(with_threads, 2), partial(with_threads, 1), at_least=1.6, peer="ours, 1 thread"
    )


def _crossover(tokens: int, at_least: float, bench: Bench) -> Row:
    tensors = inputs(tokens)
    exact = partial(longspan.attention, causal=True)
    return _ratio(
        bench, partial(_run, _ours, tensors, False), partial(_run, exact, tensors, False),
        at_least=at_least, peer="our exact attention",
    )  # fmt: skip


def _step(bench: Bench) -> Row:
    q, k, v = torch.randn(3, 256, HEADS, CHANNELS)
    start = torch.zeros(256, HEADS, CHANNELS, CHANNELS)

    def plain(state: Tensor) -> Tensor:
        state += k[..., None] * v[..., None, :]
        return (q[..., None, :] @ state).squeeze(-2)

    mine, theirs = start.clone(), start.clone()
    row = bench.compare(
        lambda: longspan.linear_attention_step(q, k, v, mine, scale=1.0),
        lambda: plain(theirs),
        tolerance=TOLERANCE,
        peer_name="torch",
        memory=False,
    )
    if row.ours_seconds is not None:
        # The limit is measured on the same tensor, in turn: reading and writing it in place.
        ours, scale = bench.times(
            lambda: longspan.linear_attention_step(q, k, v, mine, scale=1.0), lambda: mine.mul_(1.0)
        )
        row.limit, row.limit_at_least = "in-place read + write", 0.8
        row.limit_fraction = scale / ours
    return row
