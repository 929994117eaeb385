"""`causal_conv1d_fn` and `causal_conv1d_update`; the package's docstring lists what differs."""

from typing import Any

import torch
from torch import Tensor

from longspan.nn._mamba import as_parameter
from longspan.ops._checks import check_like, check_shape
from longspan.ops.conv import causal_conv1d
from longspan.ops.conv import causal_conv1d_update as _update


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """Causal depthwise convolution (`longspan.causal_conv1d`); differentiable.

    Args:
        x: (B, C, L), float32, float64, bfloat16 or float16, any strides.
        weight: (C, W), in any of these dtypes.
        bias: (C,), likewise.
        seq_idx: (B, L) integers, which sequence each token belongs to; taps from another count as 0.
            Tokens with a negative number are padding: their output is 0.
        initial_states: (B, C, W - 1) in x's dtype; differentiable.
        return_final_states: Also return the last W - 1 inputs; differentiable.
        final_states_out: (B, C, W - 1) in x's dtype: where to write them. Without gradients only.
        activation: None, "silu" or "swish".

    Returns:
        out (B, C, L); with ``return_final_states`` (out, final_states), the latter being
        ``final_states_out`` where that is given.

    Raises:
        TypeError, ValueError: As `longspan.causal_conv1d`; ``final_states_out`` without
            ``return_final_states``.

    Example::

        y = causal_conv1d_fn(torch.randn(2, 768, 100), torch.randn(768, 4), activation="silu")
    """
    name = "causal_conv1d_fn"
    if final_states_out is not None:
        if not return_final_states:
            raise ValueError(f"{name}: final_states_out: expected return_final_states=True beside it")
        check_like(name, "final_states_out", final_states_out, "x", x)
        past = (*x.shape[:2], weight.shape[1] - 1)
        check_shape(name, "final_states_out", final_states_out, past, "(batch, channels, width - 1)")
    out, final = causal_conv1d(
        x, as_parameter(weight, x), None if bias is None else as_parameter(bias, x),
        activation=activation, initial_state=initial_states, return_final_state=True, seq_idx=seq_idx,
    )  # fmt: skip
    if seq_idx is not None and (torch.compiler.is_compiling() or bool((seq_idx < 0).any())):
        out = out.masked_fill((seq_idx < 0).unsqueeze(1), 0)
    if not return_final_states:
        return out
    return out, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """A convolution of the next tokens, after those in ``conv_state``, which is updated in place.

    Args:
        x: (B, C) or (B, C, L).
        conv_state: (B, C, S), S >= W - 1, in x's dtype.
        weight: (C, W), float32, float64, bfloat16 or float16.
        bias: (C,), likewise.
        activation: None, "silu" or "swish".
        cache_seqlens: (B,) integers: the state is a ring, written from ``cache_seqlens % S`` on.
        conv_state_indices: (B,) integers: each sequence's row of ``conv_state``; negative is padding.

    Returns:
        As x.

    Raises:
        TypeError, ValueError, RuntimeError: As `longspan.causal_conv1d_update`.

    Example::

        state = torch.zeros(2, 768, 4)
        y = causal_conv1d_update(torch.randn(2, 768), state, torch.randn(768, 4), activation="silu")
    """
    return _update(
        x, conv_state, as_parameter(weight, x), None if bias is None else as_parameter(bias, x),
        activation=activation, cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices,
    )  # fmt: skip
