"""Causal depthwise convolution: `causal_conv1d`, and `causal_conv1d_update` for decoding."""

from typing import Any

import torch
from torch import Tensor

from longspan.ops._autograd import (
    OperatorFunction,
    below_autograd,
    overload,
    register_autograd,
    register_not_differentiable,
    register_once_differentiable,
)
from longspan.ops._checks import (
    autocast,
    check_floating,
    check_integers,
    check_like,
    check_parameter,
    check_shape,
    check_tensor,
    has_kernels,
    sum_dtype,
)
from longspan.reference import conv as reference

_forward = overload("causal_conv1d_forward")
_backward = overload("causal_conv1d_backward")
_update = overload("causal_conv1d_update")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
) -> Any:
    """Causal depthwise convolution over time, with the activation fused.

    ``out[b,c,t] = act(bias[c] + sum_k weight[c,k] x[b,c,t-(W-1)+k])``, x before its first token from
    ``initial_state`` or 0 (Gu and Dao 2023, Mamba, figure 3). Memory is read and written once.

    Args:
        x: (B, C, L), float32, float64, bfloat16 or float16. Time or channels may have stride 1:
            (B, L, C) callers pass a transpose, which is not copied.
        weight: (C, W), any W >= 1, in x's dtype or float32.
        bias: (C,), likewise.
        activation: None, "silu" or its other name "swish".
        initial_state: (B, C, W - 1) in x's dtype, the inputs before x, oldest first; differentiable.
        return_final_state: Also return the last W - 1 inputs; differentiable. Given as the
            ``initial_state`` of a further call, the two calls equal one over the whole.
        seq_idx: (B, L) integers, which sequence each token belongs to; a sequence's tokens are next
            to each other. Taps from another sequence count as 0. The initial state belongs to the
            first token's sequence, the final state to the last one's.

    Returns:
        out (B, C, L) in x's dtype and order of dimensions in memory; with ``return_final_state`` a
        pair (out, state), state (B, C, W - 1).

    Raises:
        TypeError: A dtype is not supported or does not fit x's.
        ValueError: Shapes do not fit, or the activation is unknown.

    Example::

        x = torch.randn(2, 768, 1000, requires_grad=True)
        longspan.causal_conv1d(x, torch.randn(768, 4), activation="silu").sum().backward()
    """
    name = "causal_conv1d"
    check_tensor(name, "x", x)
    check_floating(name, "x", x)
    check_shape(name, "x", x, (None, None, None), "(batch, channels, length)")
    _check_weight(name, x, weight, bias)
    batch, channels, length = x.shape
    if initial_state is not None:
        check_like(name, "initial_state", initial_state, "x", x)
        past = (batch, channels, weight.shape[1] - 1)
        check_shape(name, "initial_state", initial_state, past, "(batch, channels, width - 1)")
    if seq_idx is not None:
        check_integers(name, "seq_idx", seq_idx, (batch, length), "(batch, length)")
    silu = _check_activation(name, activation)
    (x,) = autocast(x)
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
    if not has_kernels(name, x):
        out, state = reference.causal_conv1d(
            x, weight, bias, activation=activation, initial_state=initial_state, seq_idx=seq_idx
        )
    else:
        out, state = _forward(x, weight, bias, initial_state, seq_idx, silu, return_final_state)
    return (out, state) if return_final_state else out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d` of a few new inputs, after those that ``conv_state`` holds; no gradient.

    The new inputs are written into the state in place.

    Args:
        x: (B, C), one token, or (B, C, L).
        conv_state: (B, C, S) in x's dtype, S >= W - 1 (and at least 1), any strides: the last inputs.
        weight: (C, W), in x's dtype or float32.
        bias: (C,), likewise.
        activation: None, "silu" or "swish".
        cache_seqlens: (B,) integers, how many inputs came before these. With it the state is a ring:
            input t of a sequence lies in slot ``t % S``. Without, the last slot is the newest and
            all of them move up.
        conv_state_indices: (B,) integers: which row of ``conv_state`` (then of any number of rows)
            belongs to each sequence, each row at most once. A negative number is padding: its
            output is 0 and no state changes.

    Returns:
        out, of x's shape and dtype.

    Raises:
        TypeError, ValueError: As `causal_conv1d`. RuntimeError: an index is not a row of
        ``conv_state``, or a gradient is asked for.

    Example::

        state = torch.zeros(2, 768, 3)
        longspan.causal_conv1d_update(torch.randn(2, 768), state, torch.randn(768, 4))
    """
    name = "causal_conv1d_update"
    check_tensor(name, "x", x)
    check_floating(name, "x", x)
    if x.dim() == 2:
        return causal_conv1d_update(
            x.unsqueeze(2), conv_state, weight, bias, activation=activation,
            cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices,
        ).squeeze(2)  # fmt: skip
    check_shape(name, "x", x, (None, None, None), "(batch, channels) or (batch, channels, length)")
    _check_weight(name, x, weight, bias)
    check_like(name, "conv_state", conv_state, "x", x)
    batch, channels, _ = x.shape
    rows = batch if conv_state_indices is None else None
    check_shape(name, "conv_state", conv_state, (rows, channels, None), "(batch, channels, slots)")
    least = max(weight.shape[1] - 1, 1)
    if conv_state.shape[2] < least:
        raise ValueError(
            f"{name}: conv_state: expected at least {least} slots, got {conv_state.shape[2]}"
        )
    for label, index in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if index is not None:
            check_integers(name, label, index, (batch,), "(batch,)")
    silu = _check_activation(name, activation)
    if not has_kernels(name, x):
        return reference.causal_conv1d_update(
            x, conv_state, weight, bias, activation=activation, cache_seqlens=cache_seqlens,
            conv_state_indices=conv_state_indices,
        )  # fmt: skip
    return _update(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, silu)


def _check_weight(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_parameter(name, "weight", weight, "x", x)
    check_shape(name, "weight", weight, (x.shape[1], None), "(channels, width)")
    if weight.shape[1] < 1:
        raise ValueError(f"{name}: weight: expected a width of at least 1, got {tuple(weight.shape)}")
    if bias is not None:
        check_parameter(name, "bias", bias, "x", x)
        check_shape(name, "bias", bias, (x.shape[1],), "(channels,)")


def _check_activation(name: str, activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'{name}: activation: expected None, "silu" or "swish", got {activation!r}')
    return activation is not None


# ---- fakes


def _empty_as(x: Tensor) -> Tensor:
    """As csrc/torch/conv.cc: channels innermost where x has them so."""
    if x.stride(1) == 1 and x.stride(2) != 1 and x.shape[2] > 1:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return x.new_empty(x.shape)


@torch.library.register_fake("longspan::causal_conv1d_forward")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    seq_idx: Tensor | None, silu: bool, return_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    past = (x.shape[0], x.shape[1], weight.shape[1] - 1) if return_final_state else (0,)
    return _empty_as(x), x.new_empty(past)


@torch.library.register_fake("longspan::causal_conv1d_backward")
def _(
    d_out: Tensor, d_final_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        _empty_as(x),
        x.new_empty(weight.shape, dtype=sum_dtype(x)),
        x.new_empty(0 if bias is None else bias.shape[0], dtype=sum_dtype(x)),
        x.new_empty((0,) if initial_state is None else initial_state.shape),
    )


@torch.library.register_fake("longspan::causal_conv1d_update")
def _(x: Tensor, *rest: Any) -> Tensor:
    return _empty_as(x)


# ---- autograd


class _CausalConv1d(OperatorFunction):
    """longspan::causal_conv1d_forward with its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = below_autograd(_forward, *args)
        *tensors, ctx.silu, _ = args
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, d_final = gradients
        x, weight, bias, initial_state, seq_idx = ctx.saved_tensors
        d_out = torch.zeros_like(x) if d_out is None else d_out
        dx, d_weight, d_bias, d_initial = _backward(
            d_out, d_final, x, weight, bias, initial_state, seq_idx, ctx.silu
        )
        return (
            dx,
            d_weight.to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            None if initial_state is None else d_initial,
            *([None] * 3),
        )


register_autograd("causal_conv1d_forward", _CausalConv1d)
register_once_differentiable("causal_conv1d_backward")
register_not_differentiable(
    "causal_conv1d_update", "decoding has no gradient; use causal_conv1d, or no_grad"
)
