"""`mamba_chunk_scan_combined` and `mamba_split_conv1d_scan_combined`, Mamba-2's scan and its layer."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn
from longspan.compat.mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from longspan.nn._again import computed_again
from longspan.nn._mamba import as_parameter, check_packed
from longspan.ops._checks import check_floating, check_shape, check_tensor, sum_dtype
from longspan.ops.ssd import ssd


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """Mamba-2's scan (`longspan.ssd`, which has the equations); differentiable.

    Args:
        x: (B, L, H, P), float32, float64, bfloat16 or float16.
        dt: (B, L, H), any of these.
        A: (H,).
        B: (B, L, G, N) in x's dtype; head h reads group h // (H / G).
        C: (B, L, G, N), likewise.
        chunk_size: Tokens that are worked on together, 1 or more; the next lower of 16, 32 and 64 is
            taken (16 below that). It changes results by rounding only.
        D: (H,) or (H, P).
        z: (B, L, H, P), the gate, in x's dtype.
        dt_bias: (H,).
        initial_states: (B, H, P, N), the state before each row's first token; differentiable.
        seq_idx: (B, L) integers: the state is reset where the number changes.
        cu_seqlens: (S + 1,) integers: where the sequences of the one row lie whose states
            ``return_varlen_states`` gives. As in mamba-ssm it does not keep outputs apart: give
            ``seq_idx`` for that.
        dt_softplus: Whether softplus is applied to dt + dt_bias.
        dt_limit: Least and greatest dt.
        return_final_states: Also return the state after each row's last token; differentiable.
        return_varlen_states: Also return the state after each sequence of ``cu_seqlens``, a sequence
            beginning with 0 (the first one with ``initial_states``); differentiable.
        state_dtype: Of the varlen states. States are carried in float32, float64 for float64, whatever
            it is; a wider one is refused. None is that.

    Returns:
        out (B, L, H, P); with the states asked for (out, final), (out, varlen) or
        (out, final, varlen). States are (B or S, H, P, N) in float32, float64 for float64.

    Raises:
        TypeError, ValueError: As `longspan.ssd`.

    Example::

        x, dt = torch.randn(1, 100, 8, 64), torch.rand(1, 100, 8)
        B, C = torch.randn(2, 1, 100, 1, 128)
        y, state = mamba_chunk_scan_combined(
            x, dt, -torch.rand(8), B, C, chunk_size=256, return_final_states=True
        )
    """
    name = "mamba_chunk_scan_combined"
    check_floating(name, "x", x)
    chunk_size = _chunk(name, chunk_size)
    if state_dtype is not None and (
        not state_dtype.is_floating_point or state_dtype.itemsize > sum_dtype(x).itemsize
    ):
        raise ValueError(
            f"{name}: state_dtype: expected a floating dtype up to {sum_dtype(x)}, got {state_dtype}"
        )
    if return_varlen_states and cu_seqlens is None:
        raise ValueError(f"{name}: return_varlen_states: expected cu_seqlens beside it, got None")
    for label, tensor in (("dt", dt), ("A", A)):
        check_tensor(name, label, tensor)
    options: dict[str, Any] = {
        "chunk_size": chunk_size,
        "D": None if D is None else as_parameter(D, x),
        "z": z,
        "dt_bias": None if dt_bias is None else as_parameter(dt_bias, x),
        "dt_softplus": dt_softplus,
        "dt_limit": dt_limit,
        "seq_idx": seq_idx,
    }
    inputs = (x, as_parameter(dt, x), as_parameter(A, x), B, C)
    if cu_seqlens is None or not return_varlen_states:
        return ssd(
            *inputs, initial_states=initial_states, return_final_states=return_final_states, **options
        )
    check_packed(name, x, cu_seqlens)
    of_sequences = _before_first(initial_states, cu_seqlens)
    if seq_idx is not None:  # the outputs are apart, so one scan gives both
        out, *states = ssd(
            *inputs, initial_states=of_sequences, cu_seqlens=cu_seqlens, return_varlen_states=True,
            return_final_states=return_final_states, **options,
        )  # fmt: skip
    else:
        out, *states = ssd(*inputs, initial_states=initial_states, return_final_states=True, **options)
        varlen = ssd(
            *inputs, initial_states=of_sequences, cu_seqlens=cu_seqlens, return_varlen_states=True,
            **options,
        )[1]  # fmt: skip
        states = [*states, varlen] if return_final_states else [varlen]
    if state_dtype is not None:
        states[-1] = states[-1].to(state_dtype)
    return (out, *states)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """All of a Mamba-2 layer but its first projection; differentiable.

    ``z, xBC, dt = zxbcdt``, ``x, B, C = act(conv1d(xBC))``,
    ``y = ssd(x, softplus(dt + dt_bias), A, B, C, D)``, normalised with the gate z (or gated alone),
    and projected.

    Args:
        zxbcdt: (B, L, 2 M + 2 H P + 2 G N + H): a gated linear unit of M channels beside the scan
            (gate, then value; mostly M is 0), then z, x, B, C and dt.
        conv1d_weight: (H P + 2 G N, W).
        conv1d_bias: (H P + 2 G N,).
        dt_bias: (H,).
        A: (H,).
        D: (H,) beside ``headdim``, or (H, P).
        chunk_size: As in `mamba_chunk_scan_combined`.
        initial_states: (B, H, P, N).
        seq_idx: (B, L) integers: convolution and state begin anew where the number changes.
        dt_limit: Least and greatest dt.
        return_final_states: Also return the state after the last token.
        activation: Of the convolution: None, "silu" or "swish".
        rmsnorm_weight: (H P,); None gates y by silu(z) without a norm.
        rmsnorm_eps: Its epsilon. H P / G channels are normalised together.
        outproj_weight: (channels, M + H P); None is no projection.
        outproj_bias: (channels,).
        headdim: P.
        ngroups: G.
        norm_before_gate: norm(y) * silu(z), else norm(y * silu(z)).
        state_dtype: As in `mamba_chunk_scan_combined`; no states of packed sequences are given here.

    Returns:
        out (B, L, channels), or (B, L, M + H P) without a projection; with ``return_final_states``
        (out, final_states (B, H, P, N)).

    Raises:
        TypeError, ValueError: Dtypes or shapes do not fit.

    Example::

        layer = longspan.nn.Mamba2(256)
        y = mamba_split_conv1d_scan_combined(
            layer.in_proj(torch.randn(1, 100, 256)), layer.conv1d.weight.squeeze(1),
            layer.conv1d.bias, layer.dt_bias, -torch.exp(layer.A_log), layer.D, 256,
            rmsnorm_weight=layer.norm.weight, headdim=layer.headdim, norm_before_gate=False,
        )
    """
    name = "mamba_split_conv1d_scan_combined"
    check_floating(name, "zxbcdt", zxbcdt)
    check_shape(name, "conv1d_weight", conv1d_weight, (None, None), "(channels, width)")
    check_tensor(name, "D", D)
    if D.dim() == 1:
        if headdim is None:
            raise ValueError(f"{name}: headdim: expected a number beside a D of (heads,), got None")
        heads = D.shape[0]
    else:
        check_shape(name, "D", D, (None, headdim), "(heads, headdim)")
        heads, headdim = D.shape
    scanned, channels = heads * headdim, conv1d_weight.shape[0]
    if ngroups < 1 or heads % ngroups:
        raise ValueError(f"{name}: ngroups: expected a divisor of {heads} heads, got {ngroups}")
    states, rest = divmod(channels - scanned, 2 * ngroups)
    if states < 1 or rest:
        raise ValueError(
            f"{name}: conv1d_weight: expected {scanned} + a multiple of {2 * ngroups} channels, "
            f"got {channels}"
        )
    beside, odd = divmod(zxbcdt.shape[-1] - scanned - channels - heads, 2)
    if zxbcdt.dim() != 3 or beside < 0 or odd:
        raise ValueError(
            f"{name}: zxbcdt: expected (batch, length, {scanned + channels + heads} or an even number "
            f"more), got {tuple(zxbcdt.shape)}"
        )
    gate, value, z, xBC, dt = zxbcdt.split([beside, beside, scanned, channels, heads], dim=-1)

    def convolve() -> Tensor:
        return causal_conv1d_fn(
            xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx=seq_idx, activation=activation
        )

    conv = convolve()
    x, B, C = conv.transpose(1, 2).split([scanned, *[ngroups * states] * 2], dim=-1)
    with computed_again((conv, convolve)):
        y, final = mamba_chunk_scan_combined(
            x.unflatten(-1, (heads, headdim)), dt, A, B.unflatten(-1, (ngroups, states)),
            C.unflatten(-1, (ngroups, states)), chunk_size, D,
            z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None, dt_bias,
            initial_states, seq_idx, dt_softplus=True, dt_limit=dt_limit, return_final_states=True,
            state_dtype=state_dtype,
        )  # fmt: skip
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, scanned // ngroups, norm_before_gate)
    if beside:
        y = torch.cat([F.silu(gate) * value, y], dim=-1)
    if outproj_weight is not None:
        bias = None if outproj_bias is None else outproj_bias.to(outproj_weight.dtype)
        y = F.linear(y, outproj_weight, bias)
    return (y, final) if return_final_states else y


def _chunk(name: str, chunk_size: int) -> int:
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size: expected 1 or more, got {chunk_size}")
    return max(size for size in (16, 32, 64) if size <= max(chunk_size, 16))


def _before_first(initial_states: Tensor | None, cu_seqlens: Tensor) -> Tensor | None:
    """(1, H, P, N) -> (S, H, P, N): of the sequence that holds the first token, zeros for others."""
    if initial_states is None:
        return None
    of_first = torch.searchsorted(cu_seqlens[1:], cu_seqlens[:1], right=True)
    rows = initial_states.new_zeros(cu_seqlens.shape[0] - 1, *initial_states.shape[1:])
    return rows.index_copy(0, of_first.clamp(max=rows.shape[0] - 1), initial_states)
