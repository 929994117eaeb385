"""Mamba's layers token by token in plain torch, from a state_dict alone: oracle of nn and compat."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu, softplus

State = tuple[Tensor, Tensor]  # last inputs of the convolution (B, C, W), state of the scan
Layer = Callable[..., tuple[Tensor, State]]


def mamba(p: Mapping[str, Tensor], u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """u (B, L, d_model) -> (out, state after it)."""
    (channels, states), width = p["A_log"].shape, p["conv1d.weight"].shape[-1]
    rank = p["dt_proj.weight"].shape[1]
    past, h = state or (u.new_zeros(len(u), channels, width), u.new_zeros(len(u), channels, states))
    A = -p["A_log"].exp()
    outs = []
    for token in u.unbind(1):
        x, z = linear(token, p["in_proj.weight"], p.get("in_proj.bias")).chunk(2, -1)
        past = torch.cat([past[..., 1:], x[..., None]], -1)
        x = silu((past * p["conv1d.weight"][:, 0]).sum(-1) + p.get("conv1d.bias", 0))
        dt, B, C = linear(x, p["x_proj.weight"]).split([rank, states, states], -1)
        step = softplus(linear(dt, p["dt_proj.weight"], p["dt_proj.bias"]))
        h = (step[..., None] * A).exp() * h + (step * x)[..., None] * B[:, None]
        y = ((h * C[:, None]).sum(-1) + p["D"] * x) * silu(z)
        outs.append(linear(y, p["out_proj.weight"], p.get("out_proj.bias")))
    return torch.stack(outs, 1), (past, h)


def mamba2(
    p: Mapping[str, Tensor],
    u: Tensor,
    state: State | None = None,
    *,
    headdim: int,
    d_state: int,
    ngroups: int = 1,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    norm_before_gate: bool = False,
    **_: Any,
) -> tuple[Tensor, State]:
    """u (B, L, d_model) -> (out, state after it)."""
    heads, (conv, _, width) = p["A_log"].shape[0], p["conv1d.weight"].shape
    inner, both = heads * headdim, ngroups * d_state
    beside = (p["in_proj.weight"].shape[0] - inner - conv - heads) // 2
    past, h = state or (
        u.new_zeros(len(u), conv, width),
        u.new_zeros(len(u), heads, headdim, d_state),
    )
    A, D = -p["A_log"].exp(), p["D"].reshape(heads, -1)

    def norm(y: Tensor) -> Tensor:
        groups = y.unflatten(-1, (ngroups, -1))
        groups = groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return groups.flatten(-2) * p["norm.weight"]

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, (ngroups, d_state)).repeat_interleave(heads // ngroups, 1)

    outs = []
    for token in u.unbind(1):
        projected = linear(token, p["in_proj.weight"], p.get("in_proj.bias"))
        gate, value, z, x, dt = projected.split([beside, beside, inner, conv, heads], -1)
        past = torch.cat([past[..., 1:], x[..., None]], -1)
        x = silu((past * p["conv1d.weight"][:, 0]).sum(-1) + p.get("conv1d.bias", 0))
        x, B, C = x.split([inner, both, both], -1)
        x, B, C = x.unflatten(-1, (heads, headdim)), by_head(B), by_head(C)
        step = softplus(dt + p["dt_bias"]).clamp(*dt_limit)[..., None]
        h = (step * A[:, None]).exp()[..., None] * h + (step * x)[..., None] * B[:, :, None]
        y = ((h * C[:, :, None]).sum(-1) + D * x).flatten(1)
        if "norm.weight" not in p:
            y = y * silu(z)
        else:
            y = norm(y) * silu(z) if norm_before_gate else norm(y * silu(z))
        y = torch.cat([silu(gate) * value, y], -1)
        outs.append(linear(y, p["out_proj.weight"], p.get("out_proj.bias")))
    return torch.stack(outs, 1), (past, h)


def packed(
    layer: Layer, p: Mapping[str, Tensor], u: Tensor, bounds: list[int], **options: Any
) -> Tensor:
    """``layer`` on each of the sequences that one row holds, apart."""
    parts = [u[:, begin:end] for begin, end in pairwise(bounds) if end > begin]
    return torch.cat([layer(p, part, **options)[0] for part in parts], 1)
