"""Linear attention, with or without decay: `linear_attention`, `linear_attention_step`."""

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
    check_group,
    check_like,
    check_parameter,
    check_sequences,
    check_shape,
    check_state,
    check_state_in_place,
    check_tensor,
    empty_heads,
    has_kernels,
    sum_dtype,
)
from longspan.reference import linear_attention as reference

_forward = overload("linear_attention_forward")
_backward = overload("linear_attention_backward")
_step = overload("linear_attention_step")

_SPAN = 256  # kSpan in csrc/kernels/runs.h
_STATE = "(sequences, heads, key channels, value channels)"


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    gate: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Attention without a softmax, whose time is linear in the tokens: a state of size K x V goes along.

    ``S_t = exp(gate_t) S_{t-1} + k_t v_t^T`` and ``out_t = scale q_t S_t``, in chunks of matrix products
    (Katharopoulos et al. 2020, Transformers are RNNs; Yang et al. 2023, Gated linear attention, section
    4). Feature maps are the caller's: q and k are what they give. With a gate a head this is retention
    (Sun et al. 2023), a token Mamba-2 or simple GLA, a token and key channel GLA. Between a forward and
    its backward one state in 256 tokens is kept.

    Args:
        q: (B, H, T, K), float32, float64, bfloat16 or float16, any strides (copied where the last one is
            not 1, as are k and v).
        k: (B, H_kv, T, K) in q's dtype. H is a multiple of H_kv; head h reads h // (H / H_kv).
        v: (B, H_kv, T, V) in q's dtype.
        causal: Whether a token sees only those before it and itself. Otherwise it sees all, there is no
            gate, and k and v may have another number of tokens than q.
        gate: Logarithms of decays, at most 0 for states that stay bounded, in q's dtype or float32:
            (H,), (B, H, T), or (B, H, T, K) for one of each row of the state. ``-inf`` resets.
        scale: Of q; None is K**-0.5.
        normalize: Divide by ``scale q_t . z_t + eps`` with ``z_t = exp(gate_t) z_{t-1} + k_t``, the sum
            of the weights, for features that are not negative. Where that is 0 the output is 0.
        eps: See ``normalize``.
        initial_state: (B, H, K, V), or (S, H, K, V) for the S sequences of ``cu_seqlens``; with
            ``normalize`` a pair of it and z, (B or S, H, K). None is zeros. Differentiable.
        return_final_state: Also return the state after the last token, of the same form;
            differentiable. Given as the ``initial_state`` of a further call, the two calls equal one.
        cu_seqlens: (S + 1,) int32 or int64: where each of S packed sequences begins, and the end. B is
            1; a sequence may be empty.

    Returns:
        out (B, H, T, V) in q's dtype, or (out, state). States are float32, or float64 for float64.

    Raises:
        TypeError: A dtype is not supported or does not fit q's.
        ValueError: Shapes or values do not fit.
        RuntimeError: ``cu_seqlens`` decrease, or do not go from 0 to T.

    Example::

        q, k, v = torch.randn(3, 1, 8, 4096, 64)
        gate = torch.nn.functional.logsigmoid(torch.randn(1, 8, 4096, 64)) / 16
        out, state = longspan.linear_attention(q, k, v, gate=gate, return_final_state=True)
    """
    name = "linear_attention"
    for label, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, label, x)
    check_shape(name, "q", q, (None,) * 4, "(batch, heads, tokens, key channels)")
    q, k, v = autocast(q, k, v)
    batch, heads, tokens, channels = q.shape
    if not causal and cu_seqlens is None and k.dim() == 4:  # attention to something else
        tokens = k.shape[2]
    check_like(name, "k", k, "q", q)
    sizes: tuple[int | None, ...] = (batch, None, tokens, channels)
    check_shape(name, "k", k, sizes, "(batch, key-value heads, tokens, key channels)")
    check_group(name, heads, k.shape[1])
    check_like(name, "v", v, "q", q)
    sizes = (batch, k.shape[1], tokens, None)
    check_shape(name, "v", v, sizes, "k's shape but for the channels")
    if gate is not None and not causal:
        raise ValueError(f"{name}: gate: expected none without causal, got a tensor")
    gate = _check_gate(name, gate, q, (batch, heads, tokens))
    _check_eps(name, eps)
    sequences = check_sequences(name, cu_seqlens, "q", batch)
    state, norm = _check_state(
        name, "initial_state", initial_state, normalize, q, (sequences, heads, channels, v.shape[3])
    )
    scale = channels**-0.5 if scale is None else float(scale)
    if has_kernels(name, q):
        out, state, norm, _, _ = _forward(
            q, k, v, gate, state, norm, cu_seqlens, causal, scale, normalize, eps, return_final_state,
            False,
        )  # fmt: skip
    else:
        out, state, norm = reference.linear_attention(
            q, k, v, causal=causal, gate=gate, scale=scale, normalize=normalize, eps=eps,
            initial_state=state, initial_norm=norm, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    if not return_final_state:
        return out
    return out, ((state, norm) if normalize else state)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | tuple[Tensor, Tensor],
    *,
    gate: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """One token of `linear_attention` for each of many sequences, in place on their states; no gradient.

    Each state is read and written once, so a step runs at the memory's bandwidth.

    Args:
        q: (B, H, K), float32, float64, bfloat16 or float16.
        k: (B, H_kv, K) in q's dtype; H is a multiple of H_kv.
        v: (B, H_kv, V) in q's dtype.
        state: (B, H, K, V), float32, or float64 for float64, written in place; rows of V have a unit
            stride. With ``normalize`` a pair of it and z, (B, H, K).
        gate: Logarithms of decays in q's dtype or float32: (H,), (B, H) or (B, H, K).
        scale: Of q; None is K**-0.5.
        normalize: As in `linear_attention`.
        eps: Likewise.

    Returns:
        (B, H, V) in q's dtype.

    Raises:
        TypeError: A dtype is not supported or does not fit q's.
        ValueError: Shapes or values do not fit.
        RuntimeError: A gradient would be wanted.

    Example::

        state = torch.zeros(2, 8, 64, 64)
        for q, k, v in torch.randn(10, 3, 2, 8, 64):
            out = longspan.linear_attention_step(q, k, v, state)
    """
    name = "linear_attention_step"
    check_tensor(name, "q", q)
    check_floating(name, "q", q)
    check_shape(name, "q", q, (None,) * 3, "(batch, heads, key channels)")
    batch, heads, channels = q.shape
    check_like(name, "k", k, "q", q)
    check_shape(name, "k", k, (batch, None, channels), "(batch, key-value heads, key channels)")
    check_group(name, heads, k.shape[1])
    check_like(name, "v", v, "q", q)
    check_shape(name, "v", v, (batch, k.shape[1], None), "k's shape but for the channels")
    gate = _check_gate(name, gate, q, (batch, heads))
    _check_eps(name, eps)
    shape = (batch, heads, channels, v.shape[2])
    S, z = _check_state(name, "state", state, normalize, q, shape)
    if S is None:
        raise TypeError(f"{name}: state: expected a tensor, got None")
    for label, x in (("state", S), ("state[1]", z)):
        if x is not None:
            check_state_in_place(name, label, x, q)
    scale = channels**-0.5 if scale is None else float(scale)
    if has_kernels(name, q):
        return _step(q, k, v, S, z, gate, scale, eps)
    return reference.linear_attention_step(q, k, v, S, z, gate=gate, scale=scale, eps=eps)


# ---- from the public arguments to the operators'


def _check_gate(name: str, gate: Tensor | None, q: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """-> of ``shape``, maybe with key channels after it."""
    if gate is None:
        return None
    check_parameter(name, "gate", gate, "q", q)
    heads, channels = q.shape[1], q.shape[-1]
    if gate.dim() == 1:
        check_shape(name, "gate", gate, (heads,), "(heads,)")
        return gate.view(1, heads, *[1] * (len(shape) - 2)).expand(shape)
    shape = shape if gate.dim() == len(shape) else (*shape, channels)
    what = "(batch, heads, tokens)" if q.dim() == 4 else "(batch, heads)"
    check_shape(name, "gate", gate, shape, f"(heads,), {what} or that with key channels")
    return gate


def _check_state(
    name: str,
    label: str,
    state: Tensor | tuple[Tensor, Tensor] | None,
    normalize: bool,
    q: Tensor,
    shape: tuple[int, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """-> S, z."""
    if state is None:
        return None, None
    if not normalize:
        check_state(name, label, state, "q", q, shape, _STATE)
        assert isinstance(state, Tensor)
        return state, None
    if isinstance(state, Tensor) or len(state) != 2:
        raise TypeError(f"{name}: {label}: expected a pair of tensors with normalize, got {type(state)}")
    S, z = state
    check_state(name, f"{label}[0]", S, "q", q, shape, _STATE)
    check_state(name, f"{label}[1]", z, "q", q, shape[:-1], "(sequences, heads, key channels)")
    return S, z


def _check_eps(name: str, eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"{name}: eps: expected 0 or more, got {eps}")


# ---- fakes


@torch.library.register_fake("longspan::linear_attention_forward")
def _(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, initial_state: Tensor | None,
    initial_norm: Tensor | None, cu_seqlens: Tensor | None, causal: bool, scale: float,
    normalize: bool, eps: float, return_final_state: bool, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (batch, heads, tokens, channels), values = q.shape, v.shape[3]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    boundaries = batch * (tokens // _SPAN + 1) if causal else sequences

    def sums(wanted: bool, *shape: int) -> Tensor:
        return q.new_empty(shape if wanted else (0,), dtype=sum_dtype(q))

    return (
        empty_heads(q, values),
        sums(return_final_state, sequences, heads, channels, values),
        sums(return_final_state and normalize, sequences, heads, channels),
        sums(keep and normalize, batch, heads, tokens),
        sums(keep, boundaries, heads, channels * (values + normalize)),
    )


@torch.library.register_fake("longspan::linear_attention_backward")
def _(
    d_out: Tensor, d_state: Tensor | None, d_norm: Tensor | None, out: Tensor | None,
    denominators: Tensor, boundaries: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None,
    initial_state: Tensor | None, initial_norm: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty((0,) if x is None else x.shape, dtype=sum_dtype(q))

    if gate is None:
        d_gate = like(None)
    else:
        d_gate = empty_heads(gate, gate.shape[3]) if gate.dim() == 4 else gate.new_empty(gate.shape)
    return (
        *(empty_heads(x, x.shape[3]) for x in (q, k, v)),
        d_gate,
        like(initial_state),
        like(initial_norm),
    )


@torch.library.register_fake("longspan::linear_attention_step")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[2])


# ---- autograd


class _LinearAttention(OperatorFunction):
    """longspan::linear_attention_forward with its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, causal, scale, normalize, eps, return_final_state, _ = args
        output = below_autograd(
            _forward, *tensors, causal, scale, normalize, eps, return_final_state, True
        )
        out, _, _, denominators, boundaries = output
        ctx.options = causal, scale, normalize, eps
        ctx.save_for_backward(out if normalize else None, denominators, boundaries, *tensors)
        ctx.mark_non_differentiable(denominators, boundaries)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, d_state, d_norm, _, _ = gradients
        out, denominators, boundaries, *tensors = ctx.saved_tensors
        q, _, v, gate, state, norm, _ = tensors
        if d_out is None:
            d_out = q.new_zeros(*q.shape[:3], v.shape[3])
        dq, dk, dv, d_gate, d_initial, d_norm = _backward(
            d_out, d_state, d_norm, out, denominators, boundaries, *tensors, *ctx.options
        )
        return (
            dq,
            dk,
            dv,
            None if gate is None else d_gate,
            None if state is None else d_initial.to(state.dtype),
            None if norm is None else d_norm.to(norm.dtype),
            *([None] * 7),
        )


register_autograd("linear_attention_forward", _LinearAttention)
register_once_differentiable("linear_attention_backward")
register_not_differentiable(
    "linear_attention_step", "one step in place has no gradient; use linear_attention, or no_grad"
)
