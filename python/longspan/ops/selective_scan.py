"""Mamba's selective scan, whole and one step at a time: `selective_scan`, `selective_state_update`."""

from itertools import pairwise
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
    wants_gradient,
)
from longspan.ops._checks import (
    check_floating,
    check_integers,
    check_offsets,
    check_shape,
    check_tensor,
    has_kernels,
)
from longspan.reference import selective_scan as reference

_forward = overload("selective_scan_forward")
_backward = overload("selective_scan_backward")
_update = overload("selective_state_update")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Mamba's selective state space model, with memory of size channels x steps alone.

    With ``step_t = softplus(delta_t + delta_bias)`` (or without softplus)::

        h_t = exp(step_t A) h_{t-1} + step_t B_t u_t
        out_t = (C_t . h_t + D u_t) silu(z_t)

    (Gu and Dao 2023, Mamba, algorithm 2; equation 2a with the zero-order hold for A and Euler's for
    B). States are kept at the boundaries of chunks only and calculated again in the backward.
    Calculates in float32, in float64 for float64. Autocast casts nothing here, as in mamba-ssm: dtypes
    mix freely, and rounding a step size or A to half precision would only lose accuracy.

    Args:
        u: (B, D, L), float32, float64, bfloat16 or float16. Steps or channels innermost in memory
            are both read as they lie, so ``x.transpose(1, 2)`` of (B, L, D) costs no copy.
        delta: (B, D, L), step sizes before ``delta_bias`` and softplus.
        A: (D, N), or complex (D, N): then the output is twice the real part, as in S4D.
        B: (D, N), the same at all steps; or (B, N, L), or (B, G, N, L) where channel d reads group
            d // (D / G). With a complex A: complex, or real with pairs of real and imaginary parts
            along the last dimension, (B, N, 2 L) or (B, G, N, 2 L), as mamba-ssm has it.
        C: As B, constant or not on its own account; G is B's.
        D: (D,), weight of u in the output.
        z: (B, D, L), the gate.
        delta_bias: (D,).
        delta_softplus: Steps are softplus(delta + delta_bias); above 20 the identity, as in torch.
        initial_state: (B, D, N), of A's kind; None is zero. Differentiable.
        return_final_state: Also return the state after the last step; differentiable.
        cu_seqlens: (S + 1,) int32 or int64: u is S sequences one after the other along L (and B is
            1), each with a state of its own, ``initial_state`` and the final one (S, D, N). Sequences
            may be empty; steps of no sequence are 0 in the output.

    Dtypes other than u's may differ from it, but float64 comes together or not at all.

    Returns:
        out (B, D, L) in u's dtype and order in memory; with ``return_final_state`` a pair (out, state),
        state (B, D, N) in float32, float64 for float64, complex for complex A.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Shapes or values do not fit.

    Example::

        u, z = torch.randn(2, 1, 1536, 2048)
        delta = torch.rand(1, 1536, 2048)
        A = -torch.arange(1.0, 17).repeat(1536, 1)
        B, C = torch.randn(2, 1, 16, 2048)
        y = longspan.selective_scan(u, delta, A, B, C, torch.ones(1536), z, delta_softplus=True)
    """
    name = "selective_scan"
    _check_values(name, "u", u, (None, None, None), "(batch, channels, steps)", None)
    batch, channels, _ = u.shape
    _check_values(name, "delta", delta, u.shape, "u's shape", u)
    check_tensor(name, "A", A)
    check_shape(name, "A", A, (channels, None), "(channels, states)")
    A = _parts(name, "A", A, u)
    B = _coefficient(name, "B", B, u, A)
    C = _coefficient(name, "C", C, u, A)
    varying = 5 if A.dim() == 3 else 4
    if B.dim() == varying and C.dim() == varying and B.shape[1] != C.shape[1]:
        raise ValueError(f"{name}: C: expected B's groups, {B.shape[1]}, got {C.shape[1]}")
    if D is not None:
        _check_values(name, "D", D, (channels,), "(channels,)", u)
    if z is not None:
        _check_values(name, "z", z, u.shape, "u's shape", u)
    if delta_bias is not None:
        _check_values(name, "delta_bias", delta_bias, (channels,), "(channels,)", u)
    sequences = batch
    if cu_seqlens is not None:
        check_offsets(name, cu_seqlens)
        if batch != 1:
            raise ValueError(f"{name}: cu_seqlens: expected a batch of 1 with it, got u's {batch}")
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_tensor(name, "initial_state", initial_state)
        shape = (sequences, channels, A.shape[1])
        check_shape(name, "initial_state", initial_state, shape, "(sequences, channels, states)")
        if initial_state.is_complex() != (A.dim() == 3):
            raise TypeError(
                f"{name}: initial_state: expected complex with a complex A and only then, "
                f"got {initial_state.dtype}"
            )
        initial_state = _parts(name, "initial_state", initial_state, u)
    if has_kernels(name, u):
        differentiable = (u, delta, A, B, C, D, z, delta_bias, initial_state)
        out, state, _ = _forward(
            u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, bool(delta_softplus),
            wants_gradient(differentiable),
        )  # fmt: skip
        state = torch.view_as_complex(state) if A.dim() == 3 else state
    else:
        out, state = _on_other_devices(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens
        )
    return (out, state) if return_final_state else out


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the scan for each of many sequences, in place on their states; no gradient.

    ``state = exp(step A) state + step B x``, then ``(C . state + D x) silu(z)`` with
    ``step = softplus(dt + dt_bias)``, as `selective_scan` does at every step. Each state is read and
    written once, so a step runs at the memory's bandwidth.

    Args:
        state: (S, D, N), written in place; or by heads, (S, H, P, N), the form of Mamba-2. float32,
            float64, bfloat16 or float16. S is x's batch unless ``state_batch_indices`` is given.
        x: (B, D) or (B, H, P).
        dt: As x; in Mamba-2 often expanded along P, which costs nothing.
        A: (D, N) or (H, P, N); one that is expanded along N is read once a channel.
        B: (B, N); by heads (B, G, N), head h reading group h // (H / G).
        C: As B.
        D: (D,) or (H, P).
        z: As x, the gate.
        dt_bias: (D,) or (H, P).
        dt_softplus: Steps are softplus(dt + dt_bias).
        state_batch_indices: (B,) int32 or int64, which row of ``state`` is a sequence's; no row twice.
            A negative one is padding: no state is touched, and the output is 0.

    Dtypes may differ from each other, but float64 comes together or not at all.

    Returns:
        (B, D) or (B, H, P) in x's dtype.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Shapes do not fit.
        RuntimeError: A gradient would be wanted.

    Example::

        state = torch.zeros(8, 1536, 16)
        x, dt = torch.randn(8, 1536), torch.rand(8, 1536)
        B, C = torch.randn(2, 8, 16)
        y = longspan.selective_state_update(state, x, dt, -torch.ones(1536, 16), B, C)
    """
    name = "selective_state_update"
    check_tensor(name, "x", x)
    check_tensor(name, "state", state)
    if state.dim() not in (3, 4):
        check_shape(name, "state", state, (None,) * 3, "(batch, channels, states), or with heads")
    by_heads = state.dim() == 4
    row = "(batch, heads, channels)" if by_heads else "(batch, channels)"
    _check_values(name, "x", x, (None, *state.shape[1:-1]), row, None)
    batch, wide, states = x.shape[0], tuple(x.shape[1:]), state.shape[-1]
    _check_values(name, "state", state, (None, *wide, states), "x's shape and states", x)
    _check_values(name, "dt", dt, x.shape, "x's shape", x)
    _check_values(name, "A", A, (*wide, states), "state's shape but for the batch", x)
    groups = (None,) if by_heads else ()
    what = "(batch, groups, states)" if by_heads else "(batch, states)"
    _check_values(name, "B", B, (batch, *groups, states), what, x)
    _check_values(name, "C", C, B.shape, "B's shape", x)
    if by_heads and (B.shape[1] == 0 or wide[0] % B.shape[1]):
        raise ValueError(
            f"{name}: B: expected groups that divide the heads, {wide[0]}, got {B.shape[1]}"
        )
    for label, value in (("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            _check_values(name, label, value, wide, "x's shape but for the batch", x)
    if z is not None:
        _check_values(name, "z", z, x.shape, "x's shape", x)
    if state_batch_indices is not None:
        check_integers(name, "state_batch_indices", state_batch_indices, (batch,), "(batch,)")
    elif state.shape[0] != batch:
        raise ValueError(f"{name}: state: expected x's batch, {batch}, got {state.shape[0]}")
    if not by_heads:  # one head
        state, x, dt, B, C = (y.unsqueeze(1) for y in (state, x, dt, B, C))
        A = A.unsqueeze(0)
        z = z if z is None else z.unsqueeze(1)
        D = D if D is None else D.unsqueeze(0)
        dt_bias = dt_bias if dt_bias is None else dt_bias.unsqueeze(0)
    if has_kernels(name, x):
        out = _update(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, bool(dt_softplus))
    else:
        out = reference.selective_state_update(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
        )
    return out if by_heads else out.squeeze(1)


# ---- from the public arguments to the operator's


def _check_values(name: str, label: str, x: Tensor, shape: Any, what: str, like: Tensor | None) -> None:
    """A floating tensor of this shape, on ``like``'s device, and float64 where ``like`` is."""
    check_tensor(name, label, x)
    check_floating(name, label, x)
    check_shape(name, label, x, tuple(shape), what)
    if like is not None:
        _check_beside(name, label, x, like)


def _check_beside(name: str, label: str, x: Tensor, like: Tensor) -> None:
    if (x.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(
            f"{name}: {label}: expected float64 together with the others or not at all, "
            f"got {x.dtype} beside {like.dtype}"
        )
    if x.device != like.device:
        raise ValueError(f"{name}: {label}: expected device {like.device}, got {x.device}")


def _parts(name: str, label: str, x: Tensor, u: Tensor) -> Tensor:
    """Complex numbers as their two parts, real ones as they are."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    check_floating(name, label, x)
    _check_beside(name, label, x, u)
    return x


def _coefficient(name: str, label: str, x: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """B or C as the operator has it: (D, N), or (B, G, N, L), in parts where A is."""
    check_tensor(name, label, x)
    (batch, channels, steps), states, is_complex = u.shape, A.shape[1], A.dim() == 3
    if x.is_complex() and not is_complex:
        raise TypeError(f"{name}: {label}: expected real numbers with a real A, got {x.dtype}")
    if x.dim() == 2:
        check_shape(name, label, x, (channels, states), "(channels, states)")
        if is_complex and not x.is_complex():
            raise TypeError(f"{name}: {label}: expected complex numbers with a complex A, got {x.dtype}")
        return _parts(name, label, x, u)
    pairs = is_complex and not x.is_complex()
    length = 2 * steps if pairs else steps
    if x.dim() == 4:
        shape: tuple[int | None, ...] = (batch, None, states, length)
        what = "(batch, groups, states, 2 steps)" if pairs else "(batch, groups, states, steps)"
    else:
        shape = (batch, states, length)
        what = "(channels, states), (batch, states, steps) or (batch, groups, states, steps)"
    check_shape(name, label, x, shape, what)
    x = x if x.dim() == 4 else x.unsqueeze(1)
    if x.shape[1] == 0 or channels % x.shape[1]:
        raise ValueError(
            f"{name}: {label}: expected groups that divide the channels, {channels}, got {x.shape[1]}"
        )
    return _parts(name, label, x.unflatten(-1, (steps, 2)) if pairs else x, u)


def _on_other_devices(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if A.dim() == 3:
        A, B, C = (torch.view_as_complex(x.to(A.dtype).contiguous()) for x in (A, B, C))
        if initial_state is not None:
            initial_state = torch.view_as_complex(initial_state.contiguous())
    if cu_seqlens is None:
        return reference.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state=initial_state
        )
    bounds = cu_seqlens.tolist()
    outs, states = [torch.zeros_like(u[:, :, : bounds[0]])], []
    for s, (begin, end) in enumerate(pairwise(bounds)):
        steps = slice(begin, end)
        out, state = reference.selective_scan(
            u[..., steps], delta[..., steps], A, B[..., steps] if B.dim() == 4 else B,
            C[..., steps] if C.dim() == 4 else C, D, z if z is None else z[..., steps],
            delta_bias, delta_softplus,
            initial_state=None if initial_state is None else initial_state[s : s + 1],
        )  # fmt: skip
        outs.append(out)
        states.append(state)
    outs.append(torch.zeros_like(u[:, :, bounds[-1] :]))
    return torch.cat(outs, dim=-1), torch.cat(states)


# ---- fakes


def _chunk(states: int) -> int:
    """Steps between the states that are kept, as csrc/kernels/selective_scan.h's scan_chunk."""
    return min(256, max(32, (2 * states + 31) // 32 * 32))


def _empty_scan(like: Tensor) -> Tensor:
    """As csrc/torch/selective_scan.cc: channels inside time in memory where ``like`` has them so."""
    b, d, length = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(b, length, d).transpose(1, 2)
    return like.new_empty(b, d, length)


def _state_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


@torch.library.register_fake("longspan::selective_scan_forward")
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    delta_softplus: bool, keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, channels, steps = u.shape
    states, chunk = A.shape[1], _chunk(A.shape[1])
    per_row = (steps + chunk - 1) // chunk
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = batch * per_row if cu_seqlens is None else per_row + sequences
    parts = A.shape[2:]
    last = u.new_empty(sequences, channels, states, *parts, dtype=_state_dtype(u))
    rows = states * 2 if parts else states
    kept = u.new_empty(chunks if keep_states else 0, rows, channels, dtype=_state_dtype(u))
    return _empty_scan(u), last, kept


@torch.library.register_fake("longspan::selective_scan_backward")
def _(
    d_out: Tensor, d_last_state: Tensor | None, chunk_states: Tensor, u: Tensor, delta: Tensor,
    A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, delta_softplus: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    def dense(x: Tensor | None) -> Tensor:
        return u.new_empty(0) if x is None else x.new_empty(x.shape)

    dz = u.new_empty(0) if z is None else _empty_scan(z)
    return (
        _empty_scan(u), _empty_scan(delta), dense(A), dense(B), dense(C), dense(D), dz,
        dense(delta_bias), dense(initial_state),
    )  # fmt: skip


@torch.library.register_fake("longspan::selective_state_update")
def _(state: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


# ---- autograd


class _SelectiveScan(OperatorFunction):
    """longspan::selective_scan_forward with its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, softplus, _ = args
        out, last, kept = below_autograd(_forward, *inputs, softplus, True)
        ctx.save_for_backward(kept, *inputs)
        ctx.softplus = softplus
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(kept)
        return out, last, kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, d_last, _ = gradients
        kept, *inputs = ctx.saved_tensors
        d_out = torch.zeros_like(inputs[0]) if d_out is None else d_out
        found = _backward(d_out, d_last, kept, *inputs, ctx.softplus)
        wanted = zip(ctx.needs_input_grad, found)
        return *(x if want else None for want, x in wanted), None, None, None


register_autograd("selective_scan_forward", _SelectiveScan)
register_once_differentiable("selective_scan_backward")
register_not_differentiable(
    "selective_state_update", "one step in place has no gradient; use selective_scan, or no_grad"
)
