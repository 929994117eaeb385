"""Mamba-2's scan against transformers' torch path for it, the function that its Mamba2 layer calls."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from _measure import Bench, Row
from torch import Tensor

import longspan

Case = tuple[str, Callable[[Bench], Row]]
HEADS, CHANNELS, STATES = 24, 64, 128


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        name = "float" if dtype == torch.float32 else "bf16"
        needed = 15.0 if dtype == torch.float32 else None
        yield f"forward, {name} H24 P64 N128 L=4096", partial(_scan, dtype, 4096, False, needed)
        yield (
            f"forward + backward, {name} H24 P64 N128 L=4096",
            partial(_scan, dtype, 4096, True, needed),
        )
    yield "one head, L=16384, 2 threads against 1", _one_head


def inputs(dtype: torch.dtype, length: int, heads: int = HEADS) -> list[Tensor]:
    """x, dt, A, B, C, D, dt_bias as Mamba-2 initialises them."""
    torch.manual_seed(0)
    step = torch.exp(torch.rand(heads) * 4.6 - 6.9)  # 0.001 to 0.1
    made = [
        torch.randn(1, length, heads, CHANNELS).to(dtype),
        torch.randn(1, length, heads).to(dtype),
        -(1 + 15 * torch.rand(heads)),
        torch.randn(1, length, 1, STATES).to(dtype),
        torch.randn(1, length, 1, STATES).to(dtype),
        torch.ones(heads),
        step + torch.log(-torch.expm1(-step)),
    ]
    return [x.requires_grad_() for x in made]


def _ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    return longspan.ssd(x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True)


def _peer(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=256, D=D, dt_bias=bias, dt_softplus=True).to(
        x.dtype
    )


def _gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor], d_out: Tensor) -> list[Tensor]:
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, d_out)]


def _scan(dtype: torch.dtype, length: int, backward: bool, at_least: float | None, bench: Bench) -> Row:
    leaves = inputs(dtype, length)
    # Multiply-adds of the forward: the state twice, and half of a chunk of 64 with half a strip of 16.
    flops = 2.0 * length * HEADS * (2 * STATES * CHANNELS + 40 * CHANNELS)
    options: dict[str, Any] = {
        "tolerance": 1e-3 if dtype == torch.float32 else 3e-2,
        "at_least": at_least,
        "peer_name": "transformers",
    }
    if backward:
        d_out = torch.randn_like(leaves[0])
        return bench.compare(
            partial(_gradients, _ours, leaves, d_out),
            partial(_gradients, _peer, leaves, d_out),
            **options,
        )
    with torch.no_grad():
        return bench.compare(partial(_ours, *leaves), partial(_peer, *leaves), flops=flops, **options)


def _one_head(bench: Bench) -> Row:
    leaves = inputs(torch.float32, 16384, heads=1)

    def with_threads(count: int) -> Tensor:
        torch.set_num_threads(count)
        with torch.no_grad():
            return _ours(*leaves)

    try:
        one, two = bench.times(partial(with_threads, 1), partial(with_threads, 2))
    finally:
        torch.set_num_threads(bench.threads)
    return Row(value=one / two, peer="longspan, 1 thread", ours_seconds=two, peer_seconds=one)
