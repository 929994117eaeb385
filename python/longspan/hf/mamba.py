"""Forwards of transformers' Mamba-1 mixers on longspan's kernels.

in_proj's (B, L, C) layout is kept from end to end: kernels read channels and gate where they lie, side
by side, and the transposed copies of the layers' own path are gone. So is its loop over time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.utils.deprecation import deprecate_kwarg

from longspan.hf._recurrent import (
    convolve,
    end_to_end,
    padded_steps,
    recurrent_state,
    sequence_indices,
    without_padding,
)
from longspan.nn._mamba import decay_rates
from longspan.ops._autograd import wants_gradient
from longspan.ops.selective_scan import selective_scan, selective_state_update


@force_accelerate_hooks("conv1d")
@deprecate_kwarg("cache_params", "5.40.0", new_name="cache")
def mamba_forward(
    mixer: Any,
    hidden_states: Tensor,
    cache: Cache | None = None,
    attention_mask: Tensor | None = None,
    *,
    hf_compat: bool = False,
    **kwargs: Any,
) -> Tensor:
    """MambaMixer, FalconMambaMixer, JambaMambaMixer and ZambaMambaMixer.

    Several steps after a cache go on from its state; transformers begins with zero there, which
    ``hf_compat`` repeats.
    """
    state = recurrent_state(mixer, cache)
    padded = padded_steps(attention_mask, hidden_states.shape[1])
    seq_idx = sequence_indices(kwargs, hidden_states, attention_mask, cache)
    projected = mixer.in_proj(without_padding(hidden_states, padded))
    heads = mixer.A_log.dim() == 3  # Zamba: channel 0, its gate, channel 1, ...
    x, gate = projected.unflatten(-1, (-1, 2)).unbind(-1) if heads else projected.chunk(2, dim=-1)
    x = without_padding(convolve(mixer, x, cache, seq_idx), padded)
    delta, bias, B, C = _parameters_of_heads(mixer, x) if heads else _parameters(mixer, x)
    y = _scan(mixer, x, delta, bias, B, C, gate, cache, state, seq_idx, hf_compat)
    return mixer.out_proj(y.to(hidden_states.dtype))


def _parameters(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Step sizes (B, L, D) without their bias (D,); B and C (B, L, 1, N)."""
    states = mixer.ssm_state_size
    rank, B, C = mixer.x_proj(x).split([mixer.time_step_rank, states, states], dim=-1)
    if hasattr(mixer, "dt_layernorm"):  # Falcon and Jamba
        rank, B, C = mixer.dt_layernorm(rank), mixer.b_layernorm(B), mixer.c_layernorm(C)
    delta, bias = _time_steps(mixer.dt_proj, rank)
    return delta, bias, B.unsqueeze(2), C.unsqueeze(2)


def _parameters_of_heads(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Likewise, where each of Zamba's heads has projections, B and C of its own: (B, L, heads, N)."""
    heads = x.unflatten(-1, (mixer.n_mamba_heads, -1)).unbind(2)
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    parts = [F.linear(head, w).split(sizes, dim=-1) for head, w in zip(heads, mixer.x_proj_weight)]
    ranks, Bs, Cs = zip(*parts)
    delta = torch.cat([F.linear(rank, w) for rank, w in zip(ranks, mixer.dt_proj_weight)], dim=-1)
    return delta, mixer.dt_proj_bias.flatten(), torch.stack(Bs, dim=2), torch.stack(Cs, dim=2)


def _time_steps(projection: nn.Module, rank: Tensor) -> tuple[Tensor, Tensor | None]:
    """Step sizes and the bias that is not in them yet: the scan adds it in float32."""
    if type(projection) is nn.Linear and not hasattr(projection, "_hf_hook"):
        return F.linear(rank, projection.weight), projection.bias
    return projection(rank), None  # quantised, with an adapter, or offloaded


def _scan(
    mixer: Any,
    x: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    gate: Tensor,
    cache: Cache | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    hf_compat: bool,
) -> Tensor:
    """From x, delta and gate (B, L, D), B and C (B, L, heads, N), after ``state``, to (B, L, D).

    The cache's state is (B, D, N), or (B, heads, D / heads, N) where A_log has heads.
    """
    batch, steps, channels = x.shape
    A, D = decay_rates(mixer.A_log).flatten(0, -2), mixer.D.flatten()
    if state is not None and steps == 1 and not wants_gradient((x, delta, B, A, D, bias, state)):
        heads = (B.shape[2], -1)
        by_heads = [y.squeeze(1).unflatten(-1, heads) for y in (x, delta, gate)]
        return selective_state_update(
            state if state.dim() == 4 else state.unsqueeze(1), by_heads[0], by_heads[1],
            A.unflatten(0, heads), B.squeeze(1), C.squeeze(1), D.unflatten(0, heads), by_heads[2],
            None if bias is None else bias.unflatten(0, heads), True,
        ).flatten(1).unsqueeze(1)  # fmt: skip
    if state is not None:
        # A copy: the cache's own will be written, and autograd may keep this one.
        state = None if hf_compat and steps > 1 else state.reshape(batch, channels, -1).clone()
    offsets, first, last = None, None, None
    if seq_idx is not None:
        offsets, first, last = end_to_end(seq_idx)
        x, delta, gate, B, C = (y.flatten(0, 1).unsqueeze(0) for y in (x, delta, gate, B, C))
        if state is not None:
            resets = state.new_zeros(offsets.shape[0] - 1, *state.shape[1:])
            state = resets.index_copy(0, first, state)
    y, final = selective_scan(
        x.transpose(1, 2), delta.transpose(1, 2), A, B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), D,
        gate.transpose(1, 2), bias, True, initial_state=state, return_final_state=True,
        cu_seqlens=offsets,
    )  # fmt: skip
    if cache is not None:
        final = final if last is None else final[last]
        cache.update_recurrent_state(final.view(batch, *mixer.A_log.shape), mixer.layer_idx)
    return y.transpose(1, 2).reshape(batch, steps, channels)
