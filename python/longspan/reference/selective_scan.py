"""Mamba's selective scan, one step after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (out, last state). A, B, C complex together or not at all; B and C (D, N) or (B, G, N, L)."""
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    kind = A.dtype if A.is_complex() else real
    (batch, channels, steps), states = u.shape, A.shape[1]

    def at_each_step(x: Tensor) -> Tensor:  # -> (B, D, N, L)
        x = x.to(kind)
        if x.dim() == 2:
            return x[None, :, :, None].expand(batch, channels, states, steps)
        return x.repeat_interleave(channels // x.shape[1], dim=1)

    step = delta.to(real)
    if delta_bias is not None:
        step = step + delta_bias.to(real)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    b, c, x = at_each_step(B), at_each_step(C), u.to(real)
    h = torch.zeros(batch, channels, states, dtype=kind, device=u.device)
    h = h if initial_state is None else initial_state.to(kind)
    outs = []
    for t in range(steps):
        decay = torch.exp(step[:, :, t, None] * A.to(kind))
        h = decay * h + (step[:, :, t] * x[:, :, t])[..., None] * b[..., t]
        y = (h * c[..., t]).sum(-1)
        outs.append(2 * y.real if y.is_complex() else y)
    out = torch.stack(outs, dim=-1) if outs else torch.zeros_like(x)
    if D is not None:
        out = out + x * D.to(real)[:, None]
    if z is not None:
        out = out * F.silu(z.to(real))
    return out.to(u.dtype), h


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """-> out; writes ``state`` (slots, H, P, N); x, dt, z (B, H, P), A (H, P, N), B, C (B, G, N)."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = torch.arange(x.shape[0], device=x.device)
    slots = rows if state_batch_indices is None else state_batch_indices.long()
    rows = rows[slots >= 0]
    slots = slots[rows]
    step = dt[rows].to(real)
    if dt_bias is not None:
        step = step + dt_bias.to(real)
    if dt_softplus:
        step = F.softplus(step)
    heads, groups = x.shape[1], B.shape[1]
    b, c = (y[rows].to(real).repeat_interleave(heads // groups, dim=1)[:, :, None] for y in (B, C))
    value = x[rows].to(real)
    h = torch.exp(step[..., None] * A.to(real)) * state[slots].to(real) + (step * value)[..., None] * b
    state[slots] = h.to(state.dtype)
    y = (h * c).sum(-1)
    if D is not None:
        y = y + value * D.to(real)
    if z is not None:
        y = y * F.silu(z[rows].to(real))
    out = torch.zeros_like(x)
    out[rows] = y.to(x.dtype)
    return out
