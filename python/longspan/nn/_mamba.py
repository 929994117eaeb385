"""What `Mamba` and `Mamba2` share: step sizes at the start, caches, packed sequences."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.ops._checks import (
    autocasts,
    check_floating,
    check_offsets,
    check_shape,
    sum_dtype,
)
from longspan.ops.conv import causal_conv1d, causal_conv1d_update
from longspan.ops.selective_scan import selective_state_update

States = tuple[Tensor, Tensor]
NO_LIMIT = (0.0, math.inf)


class MambaBase(nn.Module):
    """The convolution and the cache of a Mamba layer.

    Subclasses set the attributes below.
    """

    conv1d: nn.Conv1d
    d_model: int
    d_conv: int
    layer_idx: int | None
    state_shape: tuple[int, ...]  # of the scan's state of one sequence

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> States:
        """Zeros for `step`, or for ``inference_params.key_value_memory_dict[layer_idx]``.

        Args:
            batch_size: B.
            max_seqlen: As mamba-ssm has it. The size of a state does not depend on it.
            dtype: Of both states. None keeps the convolution's inputs in what the layer computes in
                (autocast's dtype where autocast is on, else the weights') and the scan's state in
                float32 (float64 for float64), which it needs over many steps.

        Returns:
            conv_state (B, channels, d_conv), the last inputs; ssm_state.
        """
        weight = self.conv1d.weight
        conv_dtype = ssm_dtype = dtype
        if dtype is None:
            conv_dtype, ssm_dtype = weight.dtype, sum_dtype(weight)
            if autocasts(weight) and weight.dtype != torch.float64:
                conv_dtype = torch.get_autocast_dtype(weight.device.type)
        # Channels innermost, as the activations lie.
        conv_state = weight.new_zeros(batch_size, self.d_conv, weight.shape[0], dtype=conv_dtype)
        ssm_state = weight.new_zeros(batch_size, *self.state_shape, dtype=ssm_dtype)
        return conv_state.transpose(1, 2), ssm_state

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> States:
        """This layer's states in ``inference_params.key_value_memory_dict``, made where missing."""
        name = type(self).__name__
        if self.layer_idx is None:
            raise ValueError(f"{name}: layer_idx: expected a number, which names the layer's cache")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in cache[self.layer_idx]:
                state.zero_()
        conv_state, ssm_state = cache[self.layer_idx]
        self._check_states(batch_size, conv_state, ssm_state)
        return conv_state, ssm_state

    def _check_states(self, batch: int, conv_state: Tensor, ssm_state: Tensor) -> None:
        name = type(self).__name__
        for label, state, shape in (
            ("conv_state", conv_state, (batch, self.conv1d.out_channels, self.d_conv)),
            ("ssm_state", ssm_state, (batch, *self.state_shape)),
        ):
            check_floating(name, label, state)
            check_shape(name, label, state, shape, "the shape of allocate_inference_cache")

    def _check_step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> None:
        """Before a step reads x (B, 1, d_model) and writes to the states."""
        name = f"{type(self).__name__}.step"
        check_floating(name, "hidden_states", x)
        check_shape(name, "hidden_states", x, (None, 1, self.d_model), "(batch, 1, d_model)")
        self._check_states(x.shape[0], conv_state, ssm_state)
        if torch.is_grad_enabled() and any(y.requires_grad for y in (x, *self.parameters())):
            raise RuntimeError(f"{name}: no gradient passes it; use torch.no_grad()")

    def _store(
        self, states: States, x: Tensor, ssm_state: Tensor, cu_seqlens: Tensor | None, goes_on: bool
    ) -> None:
        """Write the states after x (B, C, L), the convolution's input, which ``goes_on`` or begins."""
        x = x.detach()
        if goes_on:
            x = torch.cat([states[0].to(x.dtype), x[:, :, -self.d_conv :]], dim=2)
        states[0].copy_(last_inputs(x, self.d_conv, cu_seqlens))
        states[1].copy_(ssm_state.detach())

    def _conv_parameters(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        return as_parameter(weight, x), None if bias is None else as_parameter(bias, x)

    def _conv(self, x: Tensor, seq_idx: Tensor | None, conv_state: Tensor | None) -> Tensor:
        """silu(conv1d(x)), x (B, C, L), after the inputs that ``conv_state`` (B, C, W) ends with."""
        past = None if conv_state is None else conv_state[:, :, 1:].to(x.dtype)
        return causal_conv1d(
            x, *self._conv_parameters(x), activation="silu", initial_state=past, seq_idx=seq_idx
        )

    def _conv_step(self, x: Tensor, conv_state: Tensor) -> Tensor:
        """silu(conv1d(x)), x (B, C), which is appended to ``conv_state``."""
        at = x.to(conv_state.dtype)
        out = causal_conv1d_update(at, conv_state, *self._conv_parameters(at), activation="silu")
        return out.to(x.dtype)


def as_parameter(p: Tensor, x: Tensor) -> Tensor:
    """``p`` in a dtype that operators take beside ``x``: as it is, or in the dtype of x's sums."""
    return p if p.dtype == x.dtype else p.to(sum_dtype(x))


def decay_rates(A_log: Tensor) -> Tensor:
    """A of a state space model, from what its layers keep: in float32, in float64 for float64."""
    return -torch.exp(A_log.to(sum_dtype(A_log)))


def update_heads(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
) -> Tensor:
    """One step of Mamba-2's heads, in place on ``state`` (B, H, P, N).

    x, z and the result are (B, H, P), dt (B, H), B and C (B, G, N), A and dt_bias (H,), D (H,) or
    (H, P).
    """
    channels, states = state.shape[2:]
    bias: Tensor | None = dt_bias[:, None].expand(-1, channels)
    softplus = dt_limit == NO_LIMIT
    if not softplus:
        dt = F.softplus(dt.to(sum_dtype(dt)) + dt_bias).clamp(*dt_limit)
        bias = None
    return selective_state_update(
        state, x, dt[..., None].expand(-1, -1, channels), A[:, None, None].expand(-1, channels, states),
        B, C, D if D.dim() == 2 else D[:, None].expand(-1, channels), z, bias, softplus,
    )  # fmt: skip


def step_bias(
    function: str,
    size: int,
    dt_min: float,
    dt_max: float,
    dt_init_floor: float,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """(size,): biases whose softplus is log-uniform from ``dt_min`` to ``dt_max``."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(
            f"{function}: dt_min, dt_max: expected 0 < dt_min <= dt_max, got {dt_min}, {dt_max}"
        )
    low, high = math.log(dt_min), math.log(dt_max)
    step = torch.exp(torch.rand(size, device=device, dtype=dtype) * (high - low) + low)
    step = step.clamp(min=dt_init_floor)
    return step + torch.log(-torch.expm1(-step))


def last_inputs(x: Tensor, count: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The last ``count`` steps of x (B, C, L), or of each sequence of a packed x (1, C, L).

    -> (B or S, C, count); zeros before a sequence's first step.
    """
    if cu_seqlens is None:
        return F.pad(x, (count - x.shape[2], 0))
    begin, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    at = end - count + torch.arange(count, device=x.device)  # (S, count)
    if x.shape[2] == 0:
        return x.new_zeros(at.shape[0], x.shape[1], count)
    kept = x[0][:, at.clamp(min=0)].transpose(0, 1)
    return torch.where((at >= begin)[:, None], kept, 0)


def sequence_of_each(cu_seqlens: Tensor, length: int) -> Tensor:
    """(1, L) int32: which packed sequence each step belongs to."""
    step = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), step, right=True, out_int32=True)[None]


def check_packed(function: str, x: Tensor, cu_seqlens: Tensor) -> None:
    """Raise unless x is a batch of 1 that ``cu_seqlens`` may cut."""
    check_offsets(function, cu_seqlens)
    if x.shape[0] != 1:
        raise ValueError(f"{function}: cu_seqlens: expected a batch of 1 beside it, got {x.shape[0]}")
