"""Rotary position embedding against transformers' apply_rotary_pos_emb."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from _measure import Bench, Row
from torch import Tensor

import longspan

Case = tuple[str, Callable[[Bench], Row]]
HEADS, KV_HEADS, LENGTH, CHANNELS = 9, 3, 8192, 64
SHAPE = f"{HEADS}+{KV_HEADS} heads x {LENGTH} x {CHANNELS}"


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        yield f"{SHAPE}, {kind}, forward", partial(_compare, dtype, False, 3.0)
        yield f"{SHAPE}, {kind}, forward + backward", partial(_compare, dtype, True, 5.0)
    yield f"{SHAPE}, float32, in place", _in_place


def _problem(dtype: torch.dtype, grads: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """q and k as a model has them, a transpose of (B, T, H, D), and the tables in their dtype."""
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, LENGTH, heads, CHANNELS, dtype=dtype).transpose(1, 2).requires_grad_(grads)
        for heads in (HEADS, KV_HEADS)
    ]
    inv_freq, _ = longspan.rope.frequencies("default", head_dim=CHANNELS)
    angle = torch.arange(LENGTH)[:, None] * torch.cat([inv_freq, inv_freq])
    return inputs, angle.cos().to(dtype), angle.sin().to(dtype)


def _compare(dtype: torch.dtype, backward: bool, at_least: float, bench: Bench) -> Row:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    inputs, cos, sin = _problem(dtype, backward)
    gradients = [torch.randn_like(x) for x in inputs]

    def with_backward(function: Callable[[], Sequence[Tensor]]) -> Callable[[], Any]:
        def work() -> list[Tensor]:
            out = function()
            return [*out, *torch.autograd.grad(out, inputs, gradients)] if backward else [*out]

        return work

    row = bench.compare(
        with_backward(lambda: longspan.apply_rotary(*inputs, cos, sin)),
        with_backward(lambda: apply_rotary_pos_emb(*inputs, cos[None], sin[None])),
        tolerance=1e-6 if dtype == torch.float32 else 2e-2,
        at_least=at_least,
        peer_name="transformers",
    )
    return _against_copying(row, inputs, bench, 2 if backward else 1)


def _in_place(bench: Bench) -> Row:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    inputs, cos, sin = _problem(torch.float32, False)
    fresh = [x.clone() for x in inputs]

    def ours() -> list[Tensor]:
        return list(longspan.apply_rotary(*fresh, cos, sin, inplace=True))

    row = bench.compare(
        ours,
        lambda: list(apply_rotary_pos_emb(*inputs, cos[None], sin[None])),
        tolerance=1e-6,
        peer_name="transformers",
        memory=False,
    )
    return _against_copying(row, inputs, bench, 1)


def _against_copying(row: Row, inputs: Sequence[Tensor], bench: Bench, passes: int) -> Row:
    """What was read and written at least, against what copying moves; caches may lift it above 1."""
    if row.ours_seconds is not None:
        moved = 2 * passes * sum(x.nbytes for x in inputs)
        row.limit = "copy bandwidth"
        row.limit_fraction = moved / row.ours_seconds / 1e9 / bench.limits.copy_gbytes
        row.limit_at_least = 0.8
    return row
