"""Causal convolution against torch's conv1d + silu, and the gated norm against plain torch."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from _measure import Bench, Row
from torch import Tensor
from torch.nn.functional import conv1d, silu

import longspan

Case = tuple[str, Callable[[Bench], Row]]
CHANNELS, WIDTH, LENGTH = 1536, 4, 4096


def cases() -> Iterator[Case]:
    for layout in ("channels first", "channels last"):
        yield f"conv1d + silu forward, {layout}", partial(_conv, layout, False, 2.0)
        yield f"conv1d + silu forward + backward, {layout}", partial(_conv, layout, True, 4.0)
    for layout in ("channels first", "channels last"):
        yield f"conv1d update, batch 1024, state {layout}", partial(_update, layout)
    yield "gated norm forward", partial(_norm, False)
    yield "gated norm forward + backward", partial(_norm, True)


def with_backward(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], d_out: Tensor
) -> Callable[[], Any]:
    """A call and its gradients by every leaf."""

    def work() -> list[Tensor]:
        out = function()
        return [out, *torch.autograd.grad(out, leaves, d_out)]

    return work


def _conv(layout: str, backward: bool, at_least: float, bench: Bench) -> Row:
    torch.manual_seed(0)
    x, d_out = torch.randn(2, 1, CHANNELS, LENGTH)
    if layout == "channels last":
        x, d_out = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in (x, d_out))
    leaves = [
        x.requires_grad_(),
        torch.randn(CHANNELS, WIDTH, requires_grad=True),
        torch.randn(CHANNELS, requires_grad=True),
    ]
    x, weight, bias = leaves

    def ours() -> Tensor:
        return longspan.causal_conv1d(x, weight, bias, activation="silu")

    def peer() -> Tensor:
        out = conv1d(x, weight[:, None], bias, padding=WIDTH - 1, groups=CHANNELS)
        return silu(out[..., :LENGTH])

    options: dict[str, Any] = {
        "tolerance": 1e-5,
        "at_least": at_least,
        "peer_name": "torch conv1d + silu",
    }
    if backward:
        return bench.compare(
            with_backward(ours, leaves, d_out), with_backward(peer, leaves, d_out), **options
        )
    with torch.no_grad():
        return bench.compare(ours, peer, **options)


def _update(layout: str, bench: Bench) -> Row:
    """A step of decoding, against the same in plain torch: roll the state, write, multiply and sum."""
    torch.manual_seed(0)
    batch = 1024
    x, weight, bias = torch.randn(batch, CHANNELS), torch.randn(CHANNELS, WIDTH), torch.randn(CHANNELS)
    state = torch.randn(batch, CHANNELS, WIDTH)
    if layout == "channels last":
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    mine, theirs = state.clone(), state.clone()  # clones lie as state does

    def ours() -> Tensor:
        return longspan.causal_conv1d_update(x, mine, weight, bias, activation="silu")

    def peer() -> Tensor:
        theirs.copy_(torch.roll(theirs, shifts=-1, dims=-1))
        theirs[:, :, -1] = x
        return silu((theirs * weight).sum(-1) + bias)

    row = bench.compare(ours, peer, tolerance=1e-5, at_least=4.0, peer_name="torch roll", memory=False)
    if row.ours_seconds is not None:
        # The limit is measured on the same tensor: reading and writing it in place.
        (scale,) = bench.times(lambda: mine.mul_(1.0))
        row.limit, row.limit_fraction = "in-place read + write", scale / row.ours_seconds
    return row


def _norm(backward: bool, bench: Bench) -> Row:
    torch.manual_seed(0)
    x, z, d_out = torch.randn(3, LENGTH, CHANNELS)
    leaves = [x.requires_grad_(), torch.ones(CHANNELS, requires_grad=True), z.requires_grad_()]
    weight = leaves[1]

    def ours() -> Tensor:
        return longspan.rms_norm_gated(x, weight, z=z)

    def peer() -> Tensor:
        v = x * silu(z)
        return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5) * weight

    options: dict[str, Any] = {"tolerance": 1e-4, "peer_name": "plain torch"}
    if backward:
        return bench.compare(
            with_backward(ours, leaves, d_out), with_backward(peer, leaves, d_out), **options
        )
    with torch.no_grad():
        return bench.compare(ours, peer, **options)
