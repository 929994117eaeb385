"""Forwards of transformers' Mamba-2 mixers, and of their gated norms, on longspan's kernels."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.utils.deprecation import deprecate_kwarg

from longspan.hf._recurrent import (
    convolve,
    padded_steps,
    recurrent_state,
    sequence_indices,
    without_padding,
)
from longspan.nn._mamba import NO_LIMIT, decay_rates, update_heads
from longspan.ops._autograd import wants_gradient
from longspan.ops.norm import rms_norm_gated
from longspan.ops.ssd import ssd


@force_accelerate_hooks("conv1d")
@deprecate_kwarg("cache_params", "5.40.0", new_name="cache")
def mamba2_forward(
    mixer: Any,
    hidden_states: Tensor,
    cache: Cache | None = None,
    attention_mask: Tensor | None = None,
    *,
    hf_compat: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Mamba2Mixer and its likes of Bamba, FalconH1, GraniteMoeHybrid, Nemotron-H and Zamba2.

    A single step keeps to ``time_step_limit`` as the whole sequence does; transformers forgets the
    limit there, which ``hf_compat`` repeats.
    """
    padded = padded_steps(attention_mask, hidden_states.shape[1])
    seq_idx = sequence_indices(kwargs, hidden_states, attention_mask, cache)
    x = without_padding(hidden_states, padded)
    if hasattr(mixer, "mup_vector"):  # FalconH1
        projected = mixer.in_proj(x * mixer.ssm_in_multiplier)
        projected = (projected * mixer.mup_vector).to(projected.dtype)
    else:
        projected = mixer.in_proj(x)
    normed = getattr(mixer, "mamba_rms_norm", True)
    y, gate = _mix(mixer, projected, padded, cache, seq_idx, hf_compat, gated=not normed)
    y = mixer.norm(y, gate) if normed else y
    return mixer.out_proj(y.to(hidden_states.dtype))


def gated_norm_forward(norm: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """Mamba-2's norm of what is gated already; the result is in ``hidden_states``' dtype."""
    return _gated_norm(norm, hidden_states, gate, norm.group_size, norm_before_gate=False)


def falcon_h1_gated_norm_forward(norm: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """FalconH1RMSNormGated, which gates before or after."""
    group_size = hidden_states.shape[-1] // norm.n_groups
    return _gated_norm(norm, hidden_states, gate, group_size, norm.norm_before_gate)


def _gated_norm(
    norm: Any, x: Tensor, gate: Tensor | None, group_size: int, norm_before_gate: bool
) -> Tensor:
    dtype = x.dtype if gate is None else torch.promote_types(x.dtype, gate.dtype)
    weight = norm.weight if norm.weight.dtype == torch.float32 else norm.weight.to(dtype)
    out = rms_norm_gated(
        x.to(dtype), weight, z=None if gate is None else gate.to(dtype), eps=norm.variance_epsilon,
        group_size=group_size, norm_before_gate=norm_before_gate,
    )  # fmt: skip
    return out.to(x.dtype)


def _mix(
    mixer: Any,
    projected: Tensor,
    padded: Tensor | None,
    cache: Cache | None,
    seq_idx: Tensor | None,
    hf_compat: bool,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """Convolution and scan of what in_proj made, -> (y (B, L, D), gate); y is gated where asked."""
    state = recurrent_state(mixer, cache)
    heads, groups = (mixer.num_heads, mixer.head_dim), (mixer.n_groups, mixer.ssm_state_size)
    size = mixer.n_groups * mixer.ssm_state_size
    gate, x, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
    x = without_padding(convolve(mixer, x, cache, seq_idx), padded)
    x, B, C = x.split([mixer.intermediate_size, size, size], dim=-1)
    x, B, C = x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)
    z = gate.unflatten(-1, heads) if gated else None
    A, D, bias = decay_rates(mixer.A_log), mixer.D, mixer.dt_bias
    limit = (float(mixer.time_step_limit[0]), float(mixer.time_step_limit[1]))
    single = x.shape[1] == 1
    if state is not None and single and hf_compat:
        limit = NO_LIMIT
    if state is not None and single and not wants_gradient((x, dt, A, D, bias, state)):
        y = update_heads(
            state, x.squeeze(1), dt.squeeze(1), A, B.squeeze(1), C.squeeze(1), D,
            None if z is None else z.squeeze(1), bias, limit,
        ).unsqueeze(1)  # fmt: skip
    else:
        y, final = ssd(
            x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True, dt_limit=limit,
            # A copy: the cache's own will be written, and autograd may keep this one.
            initial_states=None if state is None else state.clone(),
            return_final_states=True, seq_idx=seq_idx,
        )  # fmt: skip
        if cache is not None:
            cache.update_recurrent_state(final, mixer.layer_idx)
    return y.flatten(2), gate
