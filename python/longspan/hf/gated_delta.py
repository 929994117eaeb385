"""Forwards of transformers' gated delta rule layers on longspan's kernels."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
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
from longspan.nn.delta_net import unit
from longspan.ops._autograd import wants_gradient
from longspan.ops._checks import sum_dtype
from longspan.ops.delta_rule import delta_rule, delta_rule_step
from longspan.ops.norm import rms_norm_gated


@force_accelerate_hooks("conv1d")
@deprecate_kwarg("cache_params", "5.40.0", new_name="cache")
def gated_delta_forward(
    mixer: Any,
    hidden_states: Tensor,
    cache: Cache | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Qwen3NextGatedDeltaNet, and those of Qwen3.5 and Qwen3.5-MoE."""
    padded = padded_steps(attention_mask, hidden_states.shape[1])
    seq_idx = sequence_indices(kwargs, hidden_states, attention_mask, cache)
    state = recurrent_state(mixer, cache)
    x = without_padding(hidden_states, padded)
    qkv, z, b, a = _project(mixer, x)
    qkv = convolve(mixer, qkv, cache, seq_idx)
    q, k, v = qkv.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    wide = sum_dtype(x)
    q, k = (unit(y.unflatten(-1, (-1, mixer.head_k_dim)).to(wide)) for y in (q, k))
    v = v.unflatten(-1, (-1, mixer.head_v_dim)).to(wide)
    beta = b.sigmoid().to(wide)
    gate = decay_rates(mixer.A_log).to(wide) * softplus(a.to(wide) + mixer.dt_bias)
    y = _remember(mixer, q, k, v, beta, gate, cache, state, seq_idx)
    y = mixer.norm(y.to(x.dtype).flatten(0, 2), z.reshape(-1, mixer.head_v_dim))
    return mixer.out_proj(y.view(*x.shape[:2], -1))


def head_norm_forward(norm: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """Their norms, which gate afterwards; the result is in ``hidden_states``' dtype."""
    dtype = torch.promote_types(hidden_states.dtype, gate.dtype)
    weight = norm.weight if norm.weight.dtype == torch.float32 else norm.weight.to(dtype)
    out = rms_norm_gated(
        hidden_states.to(dtype), weight, z=gate.to(dtype), eps=norm.variance_epsilon,
        norm_before_gate=True,
    )  # fmt: skip
    return out.to(hidden_states.dtype)


def _project(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> queries, keys and values side by side, the output's gate, b and a of each value head."""
    if hasattr(mixer, "in_proj_qkv"):
        return mixer.in_proj_qkv(x), mixer.in_proj_z(x), mixer.in_proj_b(x), mixer.in_proj_a(x)
    # Qwen3-Next's are interleaved by key head.
    q, k, v, z, b, a = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(x), mixer.in_proj_ba(x))
    return torch.cat([y.flatten(2) for y in (q, k, v)], dim=-1), z, b, a


def _remember(
    mixer: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor,
    cache: Cache | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """The delta rule after ``state``, over q, k, v (B, L, heads, channels), beta and gate (B, L, HV)."""
    batch, steps = q.shape[:2]
    gradient = wants_gradient((q, k, v, beta, gate, state))
    if state is not None and steps == 1 and not gradient and state.dtype == v.dtype:
        q, k, v, beta, gate = (x.squeeze(1) for x in (q, k, v, beta, gate))
        return delta_rule_step(q, k, v, beta, state, gate=gate).unsqueeze(1)
    # A copy: the cache's own will be written, and autograd may keep this one.
    state = None if state is None else state.to(v.dtype, copy=True)
    offsets, last = None, None
    if seq_idx is not None:
        offsets, first, last = end_to_end(seq_idx)
        q, k, v, beta, gate = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, beta, gate))
        if state is not None:
            zeros = state.new_zeros(offsets.shape[0] - 1, *state.shape[1:])
            state = zeros.index_copy(0, first, state)
    q, k, v, beta, gate = (x.transpose(1, 2) for x in (q, k, v, beta, gate))
    y, final = delta_rule(
        q, k, v, beta, gate=gate, initial_state=state, return_final_state=True, cu_seqlens=offsets
    )
    if cache is not None:
        cache.update_recurrent_state(final if last is None else final[last], mixer.layer_idx)
    return y.transpose(1, 2).reshape(batch, steps, *v.shape[1::2])
