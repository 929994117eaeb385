"""Mamba-2's scan, step by step."""

import math

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> (out, final states, states of the packed sequences), the recurrence in float32 or float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    (batch, length, heads, channels), (groups, states) = x.shape, B.shape[2:]
    v, step = x.to(dtype), dt.to(dtype)
    B, C = (w.to(dtype).repeat_interleave(heads // groups, dim=2) for w in (B, C))
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = softplus(step)
    step = step.clamp(*dt_limit)
    decay = torch.exp(step * A.to(dtype))

    zeros = v.new_zeros(batch, heads, channels, states)
    starts, ends = {0: 0}, {length: [0]}
    if cu_seqlens is not None:
        bounds = [int(i) for i in cu_seqlens]
        starts = {begin: i for i, begin in enumerate(bounds[:-1]) if bounds[i + 1] > begin}
        ends = {end: [i for i, e in enumerate(bounds[1:]) if e == end] for end in bounds[1:]}

    def initial(sequence: int) -> Tensor:
        if initial_states is None:
            return zeros
        rows = initial_states if cu_seqlens is None else initial_states[sequence : sequence + 1]
        return rows.to(dtype)

    state = zeros
    last: dict[int, Tensor] = {}
    outs = []
    for t in range(length + 1):
        for sequence in ends.get(t, []):  # an empty one keeps the state that it began with
            empty = cu_seqlens is not None and bounds[sequence] == t
            last[sequence] = initial(sequence) if empty or length == 0 else state
        if t == length:
            break
        if t in starts:
            state = initial(starts[t])
        elif seq_idx is not None:
            same = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(same[:, None, None, None], state, 0)
        update = (step[:, t, :, None] * v[:, t])[..., None] * B[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + update
        outs.append((state @ C[:, t, :, :, None]).squeeze(-1))
    y = torch.stack(outs, dim=1) if outs else v
    if D is not None:
        y = y + (D.to(dtype)[:, None] if D.dim() == 1 else D.to(dtype)) * v
    if z is not None:
        y = y * silu(z.to(dtype))
    if cu_seqlens is None:
        return y.to(x.dtype), last[0], None
    varlen = torch.cat([last[i] for i in range(len(bounds) - 1)])
    return y.to(x.dtype), last[len(bounds) - 2], varlen
