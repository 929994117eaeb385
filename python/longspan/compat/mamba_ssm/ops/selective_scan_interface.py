"""`selective_scan_fn` and `mamba_inner_fn`, each with its reference in plain torch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.nn._again import computed_again
from longspan.nn._mamba import as_parameter
from longspan.ops._checks import check_floating, check_shape
from longspan.ops.conv import causal_conv1d
from longspan.ops.norm import rms_norm_gated
from longspan.ops.selective_scan import selective_scan
from longspan.reference import conv as conv_reference
from longspan.reference import norm as norm_reference
from longspan.reference import selective_scan as scan_reference


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """Mamba's selective scan (`longspan.selective_scan`, which has the equations); differentiable.

    Args:
        u: (B, D, L), float32, float64, bfloat16 or float16, any strides.
        delta: (B, D, L).
        A: (D, N), real or complex.
        B: (D, N), (B, N, L) or (B, G, N, L); with a complex A (.., 2 L), real and imaginary in turns.
        C: As B.
        D: (D,).
        z: (B, D, L), the gate.
        delta_bias: (D,).
        delta_softplus: Step sizes are softplus(delta + delta_bias).
        return_last_state: Also return the state after the last step; differentiable.

    With a float64 u the others are taken in float64.

    Returns:
        out (B, D, L) in u's dtype; with ``return_last_state`` (out, last_state), (B, D, N) in float32,
        float64 for float64, complex for a complex A.

    Raises:
        TypeError, ValueError: As `longspan.selective_scan`.

    Example::

        u, delta, A = torch.randn(1, 768, 100), torch.rand(1, 768, 100), -torch.rand(768, 16)
        B, C = torch.randn(2, 1, 16, 100)
        y, state = selective_scan_fn(u, delta, A, B, C, return_last_state=True)
    """
    check_floating("selective_scan_fn", "u", u)
    A, B, C, D, delta_bias = (_in_double(x, u) for x in (A, B, C, D, delta_bias))
    return selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_final_state=return_last_state
    )


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """`selective_scan_fn` in plain torch, step by step, to compare with.

    Args, Returns:
        As `selective_scan_fn`.

    Example::

        u, delta, A = torch.randn(1, 8, 10), torch.rand(1, 8, 10), -torch.rand(8, 4)
        y = selective_scan_ref(u, delta, A, *torch.randn(2, 1, 4, 10))
    """

    def by_group(x: Tensor) -> Tensor:
        x = x.unsqueeze(1) if x.dim() == 3 else x
        if A.is_complex() and x.dim() == 4 and not x.is_complex():
            x = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return x

    out, state = scan_reference.selective_scan(
        u, delta, A, by_group(B), by_group(C), D, z, delta_bias, delta_softplus
    )
    return (out, state) if return_last_state else out


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """All of a Mamba layer but its first projection; differentiable.

    ``x, z = xz``, ``x = silu(conv1d(x))``, ``dt, B, C = x_proj(x)``,
    ``out_proj(selective_scan(x, delta_proj(dt), A, B, C, D, z, delta_bias))``.

    Args:
        xz: (B, 2 D, L), any strides; that of a transposed (B, L, 2 D) costs no copy.
        conv1d_weight: (D, 1, W).
        conv1d_bias: (D,).
        x_proj_weight: (R + 2 N, D), twice the N for a complex A, less N where B or C is given.
        delta_proj_weight: (D, R).
        out_proj_weight: (channels, D).
        out_proj_bias: (channels,).
        A: (D, N), real or complex.
        B: None is from x_proj; else as `selective_scan_fn` takes it.
        C: Likewise.
        D: (D,).
        delta_bias: (D,).
        B_proj_bias: (N,), added to x_proj's B.
        C_proj_bias: (N,), likewise.
        delta_softplus: Step sizes are softplus(delta + delta_bias).
        checkpoint_lvl: 0 keeps the convolution's output and the step sizes for the backward; 1 computes
            them again there.
        b_rms_weight: (N,): RMS normalisation of B with this weight.
        c_rms_weight: (N,), of C.
        dt_rms_weight: (D,), of the step sizes, before ``delta_bias``.
        b_c_dt_rms_eps: Their epsilon.

    Returns:
        (B, L, channels).

    Raises:
        TypeError, ValueError: Dtypes, shapes or ``checkpoint_lvl`` do not fit.

    Example::

        layer = longspan.nn.Mamba(64)
        xz = layer.in_proj(torch.randn(1, 100, 64)).transpose(1, 2)
        y = mamba_inner_fn(
            xz, layer.conv1d.weight, layer.conv1d.bias, layer.x_proj.weight, layer.dt_proj.weight,
            layer.out_proj.weight, None, -torch.exp(layer.A_log), D=layer.D,
            delta_bias=layer.dt_proj.bias,
        )
    """
    name = "mamba_inner_fn"
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"{name}: checkpoint_lvl: expected 0 or 1, got {checkpoint_lvl}")
    _check_inner(name, xz, conv1d_weight, x_proj_weight, delta_proj_weight)

    def convolve(x: Tensor) -> Tensor:
        bias = None if conv1d_bias is None else as_parameter(conv1d_bias, x)
        return causal_conv1d(x, as_parameter(conv1d_weight.squeeze(1), x), bias, activation="silu")

    def normalise(x: Tensor, weight: Tensor | None) -> Tensor:
        """x (B, L, channels)."""
        if weight is None:
            return x
        return rms_norm_gated(x, as_parameter(weight, x), eps=b_c_dt_rms_eps)

    x, z = xz.chunk(2, dim=1)
    u = convolve(x)
    again = (u, lambda: convolve(x))
    with computed_again(again, enabled=checkpoint_lvl == 1):
        dt, B, C = _selection(
            u, x_proj_weight, delta_proj_weight.shape[1], A, B, C, B_proj_bias, C_proj_bias,
            b_rms_weight, c_rms_weight, normalise,
        )  # fmt: skip

    def step_sizes() -> Tensor:
        projected = F.linear(dt, delta_proj_weight.to(dt.dtype))
        return normalise(projected, dt_rms_weight).transpose(1, 2)

    delta = step_sizes()
    with computed_again(again, (delta, step_sizes), enabled=checkpoint_lvl == 1):
        y = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return _project(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """`mamba_inner_fn` in plain torch, step by step, to compare with.

    Args, Returns:
        As `mamba_inner_fn`.

    Example::

        layer = longspan.nn.Mamba(8)
        xz = layer.in_proj(torch.randn(1, 10, 8)).transpose(1, 2)
        weights = (layer.x_proj.weight, layer.dt_proj.weight, layer.out_proj.weight)
        y = mamba_inner_ref(xz, layer.conv1d.weight, None, *weights, None, -torch.exp(layer.A_log))
    """
    _check_inner("mamba_inner_ref", xz, conv1d_weight, x_proj_weight, delta_proj_weight)

    def normalise(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else norm_reference.rms_norm_gated(x, weight, eps=b_c_dt_rms_eps)

    x, z = xz.chunk(2, dim=1)
    u, _ = conv_reference.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    dt, B, C = _selection(
        u, x_proj_weight, delta_proj_weight.shape[1], A, B, C, B_proj_bias, C_proj_bias, b_rms_weight,
        c_rms_weight, normalise,
    )  # fmt: skip
    delta = normalise(F.linear(dt, delta_proj_weight), dt_rms_weight).transpose(1, 2)
    y = selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return _project(y, out_proj_weight, out_proj_bias)


def _in_double(x: Any, u: Tensor) -> Any:
    """``x`` in double where ``u`` is."""
    if x is None or u.dtype != torch.float64:
        return x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _check_inner(
    name: str, xz: Tensor, conv1d_weight: Tensor, x_proj_weight: Tensor, delta_proj_weight: Tensor
) -> None:
    check_floating(name, "xz", xz)
    check_shape(name, "conv1d_weight", conv1d_weight, (None, 1, None), "(channels, 1, width)")
    channels = conv1d_weight.shape[0]
    check_shape(name, "xz", xz, (None, 2 * channels, None), "(batch, 2 channels, length)")
    check_shape(name, "delta_proj_weight", delta_proj_weight, (channels, None), "(channels, rank)")
    check_shape(name, "x_proj_weight", x_proj_weight, (None, channels), "(rank + 2 states, channels)")


def _selection(
    u: Tensor,
    x_proj_weight: Tensor,
    rank: int,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    b_rms_weight: Tensor | None,
    c_rms_weight: Tensor | None,
    normalise: Callable[[Tensor, Tensor | None], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """u (B, D, L) -> dt (B, L, R), and B and C as the scan takes them."""
    projected = F.linear(u.transpose(1, 2), x_proj_weight)
    width = A.shape[1] * (2 if A.is_complex() else 1)

    def coefficient(x: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        """x (B, L, N), or (B, L, 2 N) in pairs -> (B, N, L), or (B, N, 2 L) in pairs."""
        x = normalise(x if bias is None else x + bias.to(x.dtype), weight)
        if not A.is_complex():
            return x.transpose(1, 2)
        return x.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2)

    if B is None:
        B = coefficient(projected[..., rank : rank + width], B_proj_bias, b_rms_weight)
    if C is None:
        C = coefficient(projected[..., projected.shape[-1] - width :], C_proj_bias, c_rms_weight)
    return projected[..., :rank], B, C


def _project(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (B, D, L) -> (B, L, channels)."""
    return F.linear(y.transpose(1, 2), weight, None if bias is None else bias.to(weight.dtype))
