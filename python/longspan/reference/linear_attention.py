"""Linear attention, step by step."""

from itertools import pairwise

import torch
from torch import Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    gate: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    initial_norm: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (out, last S, last z), the recurrence in float32 or float64. gate: (H,) and so on, or None."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (batch, heads, tokens, channels), values = q.shape, v.shape[3]
    scale = channels**-0.5 if scale is None else scale
    queries, (keys, vals) = (
        q.to(dtype),
        (x.to(dtype).repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v)),
    )
    bounds = [int(i) for i in cu_seqlens] if cu_seqlens is not None else [0, tokens]
    sequences = batch if cu_seqlens is None else len(bounds) - 1
    S = q.new_zeros(sequences, heads, channels, values, dtype=dtype)
    z = q.new_zeros(sequences, heads, channels, dtype=dtype)
    S = S if initial_state is None else initial_state.to(dtype)
    z = z if initial_norm is None else initial_norm.to(dtype)
    decays = None
    if gate is not None:
        gate = gate[:, None] if gate.dim() == 1 else gate
        gate = gate[..., None] if gate.dim() < 4 else gate
        decays = gate.to(dtype).exp().expand(batch, heads, tokens, channels)

    def read(query: Tensor, S: Tensor, z: Tensor) -> Tensor:  # (..., K), (..., K, V), (..., K)
        out = scale * (query[..., None, :] @ S).squeeze(-2)
        if not normalize:
            return out
        denominator = (scale * (query * z).sum(-1) + eps)[..., None]
        return torch.where(denominator == 0, 0, out / torch.where(denominator == 0, 1, denominator))

    outs, states, norms = [queries.new_zeros(batch, heads, 0, values)], [], []
    for i, (begin, end) in enumerate(pairwise(bounds)):
        own = slice(None) if cu_seqlens is None else slice(i, i + 1)
        state, norm = S[own], z[own]
        if not causal:
            seen = slice(None) if cu_seqlens is None else slice(begin, end)
            state = state + keys[:, :, seen].transpose(-1, -2) @ vals[:, :, seen]
            norm = norm + keys[:, :, seen].sum(2)
            outs.append(read(queries[:, :, begin:end], state[:, :, None], norm[:, :, None]))
        for t in range(begin, end if causal else begin):
            if decays is not None:
                state = decays[:, :, t, :, None] * state
                norm = decays[:, :, t] * norm
            state = state + keys[:, :, t, :, None] * vals[:, :, t, None]
            norm = norm + keys[:, :, t]
            outs.append(read(queries[:, :, t], state, norm)[:, :, None])
        states.append(state)
        norms.append(norm)
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(states), torch.cat(norms)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    norm: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One token of (B, H, K or V); writes the state, and the norm where there is one."""
    gate = gate if gate is None or gate.dim() == 1 else gate[:, :, None]
    out, S, z = linear_attention(
        *(x[:, :, None] for x in (q, k, v)),
        gate=gate, scale=scale, normalize=norm is not None, eps=eps,
        initial_state=state, initial_norm=norm,
    )  # fmt: skip
    state.copy_(S)
    if norm is not None:
        norm.copy_(z)
    return out[:, :, 0]
