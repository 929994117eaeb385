"""Mamba-2's scan in chunks of time (state space duality): `ssd`."""

import math
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
    autocast,
    check_floating,
    check_integers,
    check_like,
    check_parameter,
    check_sequences,
    check_shape,
    check_tensor,
    has_kernels,
    sum_dtype,
)
from longspan.reference import ssd as reference

_forward = overload("ssd_forward")
_backward = overload("ssd_backward")

_SPAN = 256  # kSsdSpan in csrc/kernels/ssd.h
CHUNKS = (16, 32, 64, 128, 256)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_varlen_states: bool = False,
) -> Any:
    """Mamba-2's selective state space, in chunks: matrix products instead of a step-by-step loop.

    ``H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T``, ``y_t = H_t C_t + D x_t``, ``out = y silu(z)``, with
    ``dt = clamp(softplus(dt + dt_bias), *dt_limit)`` (Dao and Gu 2024, Transformers are SSMs,
    section 6). The state begins at 0 or ``initial_states``. Between a forward and its backward one
    state in 256 tokens is kept.

    Args:
        x: (B, L, H, P), float32, float64, bfloat16 or float16, any strides (copied where the last one is
            not 1, as are z, B and C).
        dt: (B, L, H), in x's dtype or float32: time steps, before bias, softplus and limit.
        A: (H,), in x's dtype or float32, below 0 for states that decay.
        B: (B, L, G, N) in x's dtype. H is a multiple of G; head h reads group h // (H / G).
        C: (B, L, G, N), likewise.
        chunk_size: Tokens that are worked on as one matrix: 16, 32, 64, 128 or 256. It changes speed,
            and results by rounding only.
        D: (H,) or (H, P), in x's dtype or float32: the skip connection.
        z: (B, L, H, P) in x's dtype: the gate.
        dt_bias: (H,), in x's dtype or float32.
        dt_softplus: Whether softplus is applied to dt.
        dt_limit: Least and greatest dt.
        initial_states: (B, H, P, N), or (S, H, P, N) for the S sequences of ``cu_seqlens``;
            differentiable. Of a batch row that ``seq_idx`` cuts, its first sequence begins with it.
        return_final_states: Also return the state after the last token of each batch row;
            differentiable. Given as the ``initial_states`` of a further call, the two calls equal one.
        seq_idx: (B, L) integers: the state is reset where the number changes from a token to the next.
        cu_seqlens: (S + 1,) int32 or int64: where each of S packed sequences begins, and the end; the
            state is reset there. B is 1; a sequence may be empty.
        return_varlen_states: Also return the state after each sequence of ``cu_seqlens``;
            differentiable.

    Returns:
        out (B, L, H, P) in x's dtype; with the states asked for a tuple (out, final states, varlen
        states). States are (B or S, H, P, N) in float32, or float64 for float64.

    Raises:
        TypeError: A dtype is not supported or does not fit x's.
        ValueError: Shapes or values do not fit.
        RuntimeError: ``cu_seqlens`` decrease, or do not go from 0 to L.

    Example::

        x, dt = torch.randn(1, 4096, 24, 64), torch.rand(1, 4096, 24)
        B, C = torch.randn(2, 1, 4096, 1, 128)
        y, state = longspan.ssd(x, dt, -torch.rand(24), B, C, return_final_states=True)
    """
    name = "ssd"
    check_tensor(name, "x", x)
    check_floating(name, "x", x)
    check_shape(name, "x", x, (None,) * 4, "(batch, length, heads, channels)")
    batch, length, heads, _ = x.shape
    check_parameter(name, "dt", dt, "x", x)
    check_shape(name, "dt", dt, (batch, length, heads), "(batch, length, heads)")
    check_parameter(name, "A", A, "x", x)
    check_shape(name, "A", A, (heads,), "(heads,)")
    check_like(name, "B", B, "x", x)
    check_shape(name, "B", B, (batch, length, None, None), "(batch, length, groups, states)")
    check_like(name, "C", C, "x", x)
    check_shape(name, "C", C, B.shape, "B's shape")
    if B.shape[2] == 0 or heads % B.shape[2]:
        raise ValueError(
            f"{name}: B: expected a number of groups that divides {heads}, got {B.shape[2]}"
        )
    sequences = _check_sequences(name, x, seq_idx, cu_seqlens, return_varlen_states)
    _check_options(name, x, D, z, dt_bias, chunk_size, dt_limit)
    if initial_states is not None:
        check_tensor(name, "initial_states", initial_states)
        check_floating(name, "initial_states", initial_states)
        shape = (sequences, heads, x.shape[3], B.shape[3])
        check_shape(
            name, "initial_states", initial_states, shape, "(sequences, heads, channels, states)"
        )
    if z is None:
        x, B, C = autocast(x, B, C)
    else:
        x, B, C, z = autocast(x, B, C, z)
    low, high = float(dt_limit[0]), float(dt_limit[1])
    if not has_kernels(name, x):
        out, final, varlen = reference.ssd(
            x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=(low, high),
            initial_states=initial_states, seq_idx=seq_idx, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    else:
        if D is not None and D.dim() == 1:
            D = D[:, None].expand(heads, x.shape[3])
        out, final, varlen, _ = _forward(
            x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, chunk_size, dt_softplus,
            low, high, return_final_states, return_varlen_states, False,
        )  # fmt: skip
    asked = (final,) * return_final_states + (varlen,) * return_varlen_states
    return (out, *asked) if asked else out


def _check_sequences(
    name: str, x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, return_varlen_states: bool
) -> int:
    """-> how many initial states there may be."""
    if seq_idx is not None:
        check_integers(name, "seq_idx", seq_idx, x.shape[:2], "(batch, length)")
    if cu_seqlens is None and return_varlen_states:
        raise ValueError(f"{name}: return_varlen_states: expected cu_seqlens beside it, got None")
    return check_sequences(name, cu_seqlens, "x", x.shape[0])


def _check_options(
    name: str,
    x: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    chunk_size: int,
    dt_limit: tuple[float, float],
) -> None:
    heads, channels = x.shape[2:]
    if D is not None:
        check_parameter(name, "D", D, "x", x)
        shape = (heads,) if D.dim() == 1 else (heads, channels)
        check_shape(name, "D", D, shape, "(heads,) or (heads, channels)")
    if z is not None:
        check_like(name, "z", z, "x", x)
        check_shape(name, "z", z, x.shape, "x's shape")
    if dt_bias is not None:
        check_parameter(name, "dt_bias", dt_bias, "x", x)
        check_shape(name, "dt_bias", dt_bias, (heads,), "(heads,)")
    if chunk_size not in CHUNKS:
        raise ValueError(f"{name}: chunk_size: expected one of {CHUNKS}, got {chunk_size}")
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"{name}: dt_limit: expected (least, greatest), got {dt_limit}")


# ---- fakes


@torch.library.register_fake("longspan::ssd_forward")
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_states: Tensor | None, seq_idx: Tensor | None,
    cu_seqlens: Tensor | None, chunk_size: int, dt_softplus: bool, dt_min: float, dt_max: float,
    return_final_states: bool, return_varlen_states: bool, keep_boundaries: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, heads, channels = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def states(wanted: bool, *shape: int) -> Tensor:
        return x.new_empty(shape if wanted else (0,), dtype=sum_dtype(x))

    return (
        x.new_empty(x.shape),
        states(return_final_states, batch, heads, channels, B.shape[3]),
        states(return_varlen_states, sequences, heads, channels, B.shape[3]),
        states(keep_boundaries, batch * (length // _SPAN + 1), heads, B.shape[3], channels),
    )


@torch.library.register_fake("longspan::ssd_backward")
def _(
    d_out: Tensor, d_final_states: Tensor | None, d_varlen_states: Tensor | None, boundaries: Tensor,
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_states: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    heads, sums = x.shape[2], sum_dtype(x)
    return (
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        x.new_empty(heads, dtype=sums),
        x.new_empty(B.shape),
        x.new_empty(B.shape),
        x.new_empty((0,) if D is None else D.shape, dtype=sums),
        x.new_empty((0,) if z is None else x.shape),
        x.new_empty(heads, dtype=sums),
        x.new_empty((0,) if initial_states is None else initial_states.shape, dtype=sums),
    )


# ---- autograd


class _Ssd(OperatorFunction):
    """longspan::ssd_forward with its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        # the backward needs the boundaries
        output = below_autograd(_forward, *args[:-1], True)
        tensors, ctx.options = args[:11], args[11:15]
        ctx.save_for_backward(output[3], *tensors)
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, d_final, d_varlen, _ = gradients
        boundaries, *tensors = ctx.saved_tensors
        x, _, A, _, _, D, z, dt_bias, initial_states, _, _ = tensors
        d_out = torch.zeros_like(x) if d_out is None else d_out
        dx, ddt, dA, dB, dC, dD, dz, d_bias, d_initial = _backward(
            d_out, d_final, d_varlen, boundaries, *tensors, *ctx.options
        )
        return (
            dx,
            ddt,
            dA.to(A.dtype),
            dB,
            dC,
            None if D is None else dD.to(D.dtype),
            None if z is None else dz,
            None if dt_bias is None else d_bias.to(dt_bias.dtype),
            None if initial_states is None else d_initial.to(initial_states.dtype),
            *([None] * 9),
        )


register_autograd("ssd_forward", _Ssd)
register_once_differentiable("ssd_backward")
