"""The delta rule, token by token."""

from itertools import pairwise

import torch
from torch import Tensor


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    gate: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (out, last state), the recurrence in float32 or float64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (batch, _, tokens, channels), (_, heads, _, values) = q.shape, v.shape
    scale = channels**-0.5 if scale is None else scale
    queries, keys = (x.to(dtype).repeat_interleave(heads // q.shape[1], dim=1) for x in (q, k))
    targets, rates = v.to(dtype), beta.to(dtype)[..., None]
    bounds = [int(i) for i in cu_seqlens] if cu_seqlens is not None else [0, tokens]
    sequences = batch if cu_seqlens is None else len(bounds) - 1
    S = q.new_zeros(sequences, heads, channels, values, dtype=dtype)
    S = S if initial_state is None else initial_state.to(dtype)

    def read(x: Tensor, state: Tensor) -> Tensor:  # (..., K), (..., K, V)
        return (x[..., None, :] @ state).squeeze(-2)

    outs, states = [targets.new_zeros(batch, heads, 0, values)], []
    for i, (begin, end) in enumerate(pairwise(bounds)):
        state = S if cu_seqlens is None else S[i : i + 1]
        for t in range(begin, end):
            if gate is not None:
                state = gate[:, :, t, None, None].to(dtype).exp() * state
            error = targets[:, :, t] - read(keys[:, :, t], state)
            written = rates[:, :, t] * error
            state = state + keys[:, :, t, :, None] * written[..., None, :]
            outs.append(scale * read(queries[:, :, t], state)[:, :, None])
        states.append(state)
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(states)


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One token of (B, H, K), (B, HV, V) and (B, HV); writes the state."""
    out, last = delta_rule(
        *(x[:, :, None] for x in (q, k, v, beta)),
        gate=None if gate is None else gate[:, :, None], scale=scale, initial_state=state,
    )  # fmt: skip
    state.copy_(last)
    return out[:, :, 0]
