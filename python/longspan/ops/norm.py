"""RMS normalisation with a gate, as Mamba-2's layer has it: `rms_norm_gated`."""

from typing import Any

import torch
from torch import Tensor

from longspan.ops._autograd import (
    OperatorFunction,
    below_autograd,
    overload,
    register_autograd,
    register_once_differentiable,
)
from longspan.ops._checks import (
    check_floating,
    check_like,
    check_parameter,
    check_shape,
    check_tensor,
    has_kernels,
    sum_dtype,
)
from longspan.reference import norm as reference

_forward = overload("rms_norm_gated_forward")
_backward = overload("rms_norm_gated_backward")


def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """RMS normalisation with a gate, in one pass over memory.

    ``rms(x * silu(z)) * weight + bias``, or with ``norm_before_gate``
    ``(rms(x) * weight + bias) * silu(z)``, where ``rms(v) = v / sqrt(mean(v^2) + eps)`` over each
    group of channels (Dao and Gu 2024, Mamba-2, section 7; Zhang and Sennrich 2019, RMSNorm).

    Args:
        x: (..., N), float32, float64, bfloat16 or float16, any strides (copied where the last one is
            not 1).
        weight: (N,), in x's dtype or float32.
        bias: (N,), likewise.
        z: (..., N), the gate, in x's dtype; None is no gate.
        eps: Added to the mean square.
        group_size: Channels that are normalised together; divides N. None is N.
        norm_before_gate: Whether the gate multiplies what was normalised, rather than what will be.

    Returns:
        (..., N) in x's dtype, contiguous.

    Raises:
        TypeError: A dtype is not supported or does not fit x's.
        ValueError: Shapes do not fit.

    Example::

        x, z = torch.randn(2, 2, 1000, 1536)
        longspan.rms_norm_gated(x, torch.ones(1536), z=z, group_size=512)
    """
    name = "rms_norm_gated"
    check_tensor(name, "x", x)
    check_floating(name, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{name}: x: expected at least one dimension, got ()")
    channels = x.shape[-1]
    check_parameter(name, "weight", weight, "x", x)
    check_shape(name, "weight", weight, (channels,), "(channels,)")
    if bias is not None:
        check_parameter(name, "bias", bias, "x", x)
        check_shape(name, "bias", bias, (channels,), "(channels,)")
    if z is not None:
        check_like(name, "z", z, "x", x)
        check_shape(name, "z", z, x.shape, "x's shape")
    group_size = channels if group_size is None else group_size
    if group_size < 1 or channels % group_size:
        raise ValueError(f"{name}: group_size: expected a divisor of {channels}, got {group_size}")
    if not has_kernels(name, x):
        return reference.rms_norm_gated(
            x, weight, bias, z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate
        )
    rows = x.numel() // channels
    gate = None if z is None else z.reshape(rows, channels)
    out, _ = _forward(
        x.reshape(rows, channels), weight, bias, gate, float(eps), group_size, norm_before_gate
    )
    return out.view(x.shape)


# ---- fakes


@torch.library.register_fake("longspan::rms_norm_gated_forward")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, eps: float, group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rstd = x.new_empty(x.shape[0], x.shape[1] // group_size, dtype=sum_dtype(x))
    return x.new_empty(x.shape), rstd


@torch.library.register_fake("longspan::rms_norm_gated_backward")
def _(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(weight.shape, dtype=sum_dtype(x)),
        x.new_empty(0 if bias is None else bias.shape[0], dtype=sum_dtype(x)),
        x.new_empty((0,) if z is None else x.shape),
    )


# ---- autograd


class _RmsNormGated(OperatorFunction):
    """longspan::rms_norm_gated_forward with its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = below_autograd(_forward, *args)
        x, weight, bias, z, *ctx.options = args
        ctx.save_for_backward(x, weight, bias, z, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out = gradients[0]
        x, weight, bias, z, rstd = ctx.saved_tensors
        if d_out is None:
            return (None,) * 7
        dx, d_weight, d_bias, dz = _backward(d_out, x, weight, bias, z, rstd, *ctx.options)
        return (
            dx,
            d_weight.to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            None if z is None else dz,
            *([None] * 3),
        )


register_autograd("rms_norm_gated_forward", _RmsNormGated)
register_once_differentiable("rms_norm_gated_backward")
