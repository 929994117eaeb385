"""`layer_norm_fn`, `rms_norm_fn` and `RMSNorm`: a norm that adds the residual first."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.nn._mamba import as_parameter
from longspan.ops._checks import check_floating, check_shape, sum_dtype
from longspan.ops.norm import rms_norm_gated


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """``norm(dropout(rowscale x) + dropout(x1) + residual)``, the sum in float32; differentiable.

    Args:
        x: (..., N), float32, float64, bfloat16 or float16.
        weight: (N,), any of these.
        bias: (N,) or None.
        residual: (..., N), any of these.
        x1: (..., N), a second branch; not together with ``rowscale``.
        weight1, bias1: Of a second norm of the same sum.
        eps: Added to the variance, or to the mean square.
        dropout_p: Probability of dropping a number of x, and of x1.
        rowscale: (...,), a factor for each row of x.
        prenorm: Also return the sum.
        residual_in_fp32: Without ``residual``: whether the sum is returned in float32.
        is_rms_norm: RMS normalisation (`longspan.rms_norm_gated`) rather than layer normalisation.

    Returns:
        out in x's dtype; a tuple (out, out of the second norm, sum) of those asked for. The sum is in
        residual's dtype, or float32 with ``residual_in_fp32``, or x's.

    Raises:
        TypeError, ValueError: Dtypes or shapes do not fit.

    Example::

        x, residual = torch.randn(2, 4, 100, 768)
        y, residual = layer_norm_fn(x, torch.ones(768), None, residual, prenorm=True, is_rms_norm=True)
    """
    name = "layer_norm_fn"
    check_floating(name, "x", x)
    for label, other in (("residual", residual), ("x1", x1)):
        if other is not None:
            check_floating(name, label, other)
            check_shape(name, label, other, x.shape, "x's shape")
    if rowscale is not None:
        if x1 is not None:
            raise ValueError(f"{name}: rowscale: expected None beside x1")
        check_floating(name, "rowscale", rowscale)
        check_shape(name, "rowscale", rowscale, x.shape[:-1], "x's rows")
    if bias1 is not None and weight1 is None:
        raise ValueError(f"{name}: bias1: expected weight1 beside it, got None")
    wide, total = sum_dtype(x), x
    if rowscale is not None:
        total = total.to(wide) * rowscale.unsqueeze(-1)
    if dropout_p:
        total = F.dropout(total, dropout_p)
    if x1 is not None:
        total = total.to(wide) + (F.dropout(x1, dropout_p) if dropout_p else x1)
    if residual is not None:
        total = total.to(wide) + residual

    def norm(w: Tensor, b: Tensor | None) -> Tensor:
        w, b = as_parameter(w, total), None if b is None else as_parameter(b, total)
        if is_rms_norm:
            return rms_norm_gated(total, w, b, eps=eps).to(x.dtype)
        return F.layer_norm(total.to(w.dtype), w.shape, w, b, eps).to(x.dtype)

    outs = [norm(weight, bias)] if weight1 is None else [norm(weight, bias), norm(weight1, bias1)]
    if prenorm:
        kind = torch.float32 if residual_in_fp32 else x.dtype
        outs.append(total.to(kind if residual is None else residual.dtype))
    return outs[0] if len(outs) == 1 else tuple(outs)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    """`layer_norm_fn` with ``is_rms_norm=True``.

    Args, Returns, Raises:
        As `layer_norm_fn`.

    Example::

        y = rms_norm_fn(torch.randn(4, 100, 768), torch.ones(768), None)
    """
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        residual_in_fp32, is_rms_norm=True,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """RMS normalisation that adds the residual first.

    Args:
        hidden_size: Channels.
        eps: Added to the mean square.
        dropout_p: Of x, in training mode.
        device, dtype: Of the parameter, ``weight`` (hidden_size,), from 1.

    Example::

        y, residual = RMSNorm(768)(*torch.randn(2, 4, 100, 768), prenorm=True)
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the weight."""
        super().__init__()
        self.eps, self.dropout_p = eps, dropout_p
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """`rms_norm_fn` with this weight."""
        return rms_norm_fn(
            x, self.weight, None, residual, eps=self.eps,
            dropout_p=self.dropout_p if self.training else 0.0, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip
