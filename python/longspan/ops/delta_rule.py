"""The delta rule, with or without decay: `delta_rule`, `delta_rule_step`."""

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
    check_like,
    check_parameter,
    check_sequences,
    check_shape,
    check_state,
    check_state_in_place,
    empty_heads,
    has_kernels,
    sum_dtype,
)
from longspan.reference import delta_rule as reference

_forward = overload("delta_rule_forward")
_backward = overload("delta_rule_backward")
_step = overload("delta_rule_step")

_SPAN = 256  # kSpan in csrc/kernels/runs.h
_STATE = "(sequences, value heads, key channels, value channels)"


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    gate: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """A linear memory that is corrected, not only added to: DeltaNet and Gated DeltaNet.

    ``S' = exp(gate_t) S_{t-1}``, ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T`` and
    ``out_t = scale S_t^T q_t``: what the state answers to k_t is moved towards v_t, by the whole
    difference where ``beta_t |k_t|^2`` is 1. In chunks of matrix products (Yang et al. 2024,
    Parallelizing linear transformers with the delta rule over sequence length, section 3; with gates
    Yang et al. 2025, Gated delta networks, section 3.3), exact but for rounding. Between a forward and
    its backward one state in 256 tokens is kept.

    Keys are used as they are given. The recurrence is stable where ``beta |k|^2`` is between 0 and 2:
    divide keys by their norm (a key of zeros writes nothing).

    Args:
        q: (B, H, T, K), float32, float64, bfloat16 or float16, any strides (copied where the last one is
            not 1, as are k and v).
        k: (B, H, T, K) in q's dtype.
        v: (B, HV, T, V) in q's dtype. HV is a multiple of H; value head h reads q's and k's head
            h // (HV / H).
        beta: (B, HV, T), in q's dtype or float32: how far a token moves the state; above 1 for negative
            eigenvalues.
        gate: (B, HV, T), likewise: logarithms of decays, at most 0 for states that stay bounded.
            ``-inf`` resets. None is no decay.
        scale: Of q; None is K**-0.5.
        initial_state: (B, HV, K, V), or (S, HV, K, V) for the S sequences of ``cu_seqlens``; None is
            zeros. Differentiable.
        return_final_state: Also return the state after the last token, of the same form;
            differentiable. Given as the ``initial_state`` of a further call, the two calls equal one.
        cu_seqlens: (S + 1,) int32 or int64: where each of S packed sequences begins, and the end. B is
            1; a sequence may be empty.

    Returns:
        out (B, HV, T, V) in q's dtype, or (out, state). The state is float32, or float64 for float64.

    Raises:
        TypeError: A dtype is not supported or does not fit q's.
        ValueError: Shapes do not fit.
        RuntimeError: ``cu_seqlens`` decrease, or do not go from 0 to T.

    Example::

        q, k, v = torch.randn(3, 1, 8, 4096, 64)
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        beta = torch.rand(1, 8, 4096)
        gate = torch.nn.functional.logsigmoid(torch.randn(1, 8, 4096)) / 16
        out, state = longspan.delta_rule(q, k, v, beta, gate=gate, return_final_state=True)
    """
    name = "delta_rule"
    for label, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, label, x)
    check_shape(name, "q", q, (None,) * 4, "(batch, heads, tokens, key channels)")
    q, k, v = autocast(q, k, v)
    batch, _, tokens, channels = q.shape
    _check_tokens(name, q, k, v, beta, gate, (batch, tokens))
    sequences = check_sequences(name, cu_seqlens, "q", batch)
    if initial_state is not None:
        shape = (sequences, v.shape[1], channels, v.shape[3])
        check_state(name, "initial_state", initial_state, "q", q, shape, _STATE)
    scale = channels**-0.5 if scale is None else float(scale)
    if has_kernels(name, q):
        out, state, _ = _forward(
            q, k, v, beta, gate, initial_state, cu_seqlens, scale, return_final_state, False
        )
    else:
        out, state = reference.delta_rule(
            q, k, v, beta, gate=gate, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
        )
    return (out, state) if return_final_state else out


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One token of `delta_rule` for each of many sequences, in place on their states; no gradient.

    Each state is read from memory and written to it once, so a step runs at the memory's bandwidth.

    Args:
        q: (B, H, K), float32, float64, bfloat16 or float16.
        k: (B, H, K) in q's dtype.
        v: (B, HV, V) in q's dtype; HV is a multiple of H.
        beta: (B, HV), in q's dtype or float32.
        state: (B, HV, K, V), float32, or float64 for float64, written in place; rows of V have a unit
            stride.
        gate: (B, HV), likewise to beta: logarithms of decays.
        scale: Of q; None is K**-0.5.

    Returns:
        (B, HV, V) in q's dtype.

    Raises:
        TypeError: A dtype is not supported or does not fit q's.
        ValueError: Shapes or strides do not fit.
        RuntimeError: A gradient would be wanted.

    Example::

        state = torch.zeros(2, 8, 64, 64)
        for q, k, v in torch.randn(10, 3, 2, 8, 64):
            k = torch.nn.functional.normalize(k, dim=-1)
            out = longspan.delta_rule_step(q, k, v, torch.rand(2, 8), state)
    """
    name = "delta_rule_step"
    for label, x in (("q", q), ("k", k), ("v", v), ("state", state)):
        check_floating(name, label, x)
    check_shape(name, "q", q, (None,) * 3, "(batch, heads, key channels)")
    batch, _, channels = q.shape
    _check_tokens(name, q, k, v, beta, gate, (batch,))
    check_state(name, "state", state, "q", q, (batch, v.shape[1], channels, v.shape[2]), _STATE)
    check_state_in_place(name, "state", state, q)
    scale = channels**-0.5 if scale is None else float(scale)
    if has_kernels(name, q):
        return _step(q, k, v, beta, state, gate, scale)
    return reference.delta_rule_step(q, k, v, beta, state, gate=gate, scale=scale)


def _check_tokens(
    name: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None, shape: tuple[int, ...]
) -> None:
    """k, v, beta and gate beside q; ``shape``: the batch, and the tokens where there are many."""
    batch, *tokens = shape
    check_like(name, "k", k, "q", q)
    check_shape(name, "k", k, q.shape, "q's shape")
    check_like(name, "v", v, "q", q)
    what = "(batch, value heads, tokens, value channels)" if tokens else "(batch, value heads, channels)"
    check_shape(name, "v", v, (batch, None, *tokens, None), what)
    heads, value_heads = q.shape[1], v.shape[1]
    if heads == 0 or value_heads % heads:
        raise ValueError(f"{name}: v: expected a multiple of q's {heads} heads, got {value_heads}")
    for label, x in (("beta", beta), ("gate", gate)):
        if x is not None or label == "beta":
            check_parameter(name, label, x, "q", q)
            assert x is not None
            check_shape(name, label, x, v.shape[:-1], "v's shape without channels")


# ---- fakes


@torch.library.register_fake("longspan::delta_rule_forward")
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, return_final_state: bool, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (batch, _, tokens, channels), (_, heads, _, values) = q.shape, v.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def states(wanted: bool, count: int) -> Tensor:
        shape = (count, heads, channels, values) if wanted else (0,)
        return q.new_empty(shape, dtype=sum_dtype(q))

    return (
        empty_heads(v, values),
        states(return_final_state, sequences),
        states(keep, batch * (tokens // _SPAN + 1)),
    )


@torch.library.register_fake("longspan::delta_rule_backward")
def _(
    d_out: Tensor, d_state: Tensor | None, boundaries: Tensor, q: Tensor, k: Tensor, v: Tensor,
    beta: Tensor, gate: Tensor | None, initial_state: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    def sums(x: Tensor | None) -> Tensor:
        return q.new_empty((0,) if x is None else x.shape, dtype=sum_dtype(q))

    return (
        *(empty_heads(x, x.shape[3]) for x in (q, k, v)),
        beta.new_empty(beta.shape),
        sums(None) if gate is None else gate.new_empty(gate.shape),
        sums(initial_state),
    )


@torch.library.register_fake("longspan::delta_rule_step")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty(v.shape)


# ---- autograd


class _DeltaRule(OperatorFunction):
    """longspan::delta_rule_forward with its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, scale, return_final_state, _ = args
        output = below_autograd(_forward, *tensors, scale, return_final_state, True)
        boundaries = output[2]
        ctx.scale = scale
        ctx.save_for_backward(boundaries, *tensors)
        ctx.mark_non_differentiable(boundaries)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, d_state, _ = gradients
        boundaries, *tensors = ctx.saved_tensors
        _, _, v, _, gate, state, _ = tensors
        if d_out is None:
            d_out = v.new_zeros(v.shape)
        *given, d_gate, d_initial = _backward(d_out, d_state, boundaries, *tensors, ctx.scale)
        return (
            *given,
            None if gate is None else d_gate,
            None if state is None else d_initial.to(state.dtype),
            *([None] * 4),
        )


register_autograd("delta_rule_forward", _DeltaRule)
register_once_differentiable("delta_rule_backward")
register_not_differentiable(
    "delta_rule_step", "one step in place has no gradient; use delta_rule, or no_grad"
)
