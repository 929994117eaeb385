"""Attention by random features: `performer_attention`, `performer_attention_step`."""

from typing import Any

import torch
from torch import Tensor

from longspan.ops._autograd import wants_gradient
from longspan.ops._checks import autocast, check_floating, check_shape, sum_dtype
from longspan.ops.favor import Kind, check_options, compute_features, count, favor_features
from longspan.ops.linear_attention import linear_attention, linear_attention_step

State = tuple[Tensor, Tensor, Tensor]

# Without a gradient features live for a segment of tokens at a time, of about this size: the allocator
# has it ready (from 32 MB on glibc never has), where fresh memory costs more than the exponentials. In
# smaller ones states are read and written too often, and threads wait for each other: a quarter of it
# took up to a third longer, and many times as long on a machine that had other work.
_SEGMENT_BYTES = 1 << 24
_SPAN = 256  # kSpan in csrc/kernels/runs.h: segments are multiples


def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    causal: bool = True,
    kind: Kind = "positive",
    scale: float | None = None,
    eps: float | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Attention by random features: an estimate of softmax attention in time linear in the tokens.

    `favor_features` of q and k, then `longspan.linear_attention` with ``normalize``. With a gradient
    features are kept, 2 T m numbers a head; without one they exist for some hundred tokens at a time.

    Args:
        q: (B, H, T, D), float32, float64, bfloat16 or float16.
        k: (B, H_kv, T, D) in q's dtype; H is a multiple of H_kv. Without ``causal`` k and v may have
            another number of tokens than q.
        v: (B, H_kv, T, V) in q's dtype.
        projection: (m, D), of `favor_projection`.
        causal: Whether a token sees only those before it and itself.
        kind: As in `favor_features`.
        scale: Of q . k; None is D ** -0.5.
        eps: Of the features, as there.
        initial_state: S (B, H, m, V), z (B, H, m), and the keys' maximum (B, H_kv), as this returns them
            (2 m where there are as many features); None is none. S and z are differentiable.
        return_final_state: Also return the state after the last token.
        cu_seqlens: (S + 1,) int32 or int64: where each of S packed sequences begins, and the end. B is
            1; with ``causal`` only.

    Returns:
        out (B, H, T, V) in q's dtype, or (out, state). States are float32, or float64 for float64.

    Raises:
        TypeError: A dtype is not supported or does not fit q's.
        ValueError: Shapes or values do not fit.

    Example::

        q, k, v = torch.randn(3, 1, 8, 4096, 64)
        out = longspan.performer_attention(q, k, v, longspan.favor_projection(256, 64))
    """
    name = "performer_attention"
    for label, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, label, x)
        check_shape(name, label, x, (None,) * 4, "(batch, heads, tokens, channels)")
    if cu_seqlens is not None and not causal:
        raise ValueError(f"{name}: cu_seqlens: expected None without causal")
    q, k, v = autocast(q, k, v)
    eps = check_options(name, q, projection, kind, eps, heads=False)
    check_shape(name, "k", k, (q.shape[0], None, None, q.shape[3]), "q's shape but for heads and tokens")
    _check_state(name, "initial_state", initial_state, q, k, v, projection, kind, cu_seqlens)
    tensors = (q, k, v, projection, *(initial_state or ()))
    options: dict[str, Any] = {"kind": kind, "scale": scale, "eps": eps}
    if cu_seqlens is None and not wants_gradient(tensors) and not torch.compiler.is_compiling():
        walk = _causal_segments if causal else _full_segments
        out, state = walk(q, k, v, projection, initial_state, options)
    elif causal:
        out, state = _causal(q, k, v, projection, initial_state, cu_seqlens, options)
    else:
        out, state = _full(q, k, v, projection, initial_state, options)
    return (out, state) if return_final_state else out


def performer_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    state: State,
    *,
    kind: Kind = "positive",
    scale: float | None = None,
    eps: float | None = None,
) -> Tensor:
    """One token of `performer_attention` for each of many sequences, in place on their states.

    Where a key's exponents exceed all before, S and z shrink by ``exp(old - new)``.

    Args:
        q: (B, H, D).
        k: (B, H_kv, D) in q's dtype.
        v: (B, H_kv, V) in q's dtype.
        projection: (m, D).
        state: S (B, H, m, V), z (B, H, m) and the maximum (B, H_kv), float32, or float64 for float64,
            all written in place. At the start zeros, zeros and -inf.
        kind: As in `performer_attention`.
        scale: Likewise.
        eps: Likewise.

    Returns:
        (B, H, V) in q's dtype.

    Raises:
        TypeError: A dtype is not supported or does not fit q's.
        ValueError: Shapes or values do not fit.
        RuntimeError: A gradient would be wanted.

    Example::

        projection = longspan.favor_projection(256, 64)
        state = (torch.zeros(1, 8, 256, 64), torch.zeros(1, 8, 256), torch.full((1, 8), -torch.inf))
        for q, k, v in torch.randn(10, 3, 1, 8, 64):
            out = longspan.performer_attention_step(q, k, v, projection, state)
    """
    name = "performer_attention_step"
    for label, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, label, x)
        check_shape(name, label, x, (None,) * 3, "(batch, heads, channels)")
    eps = check_options(name, q, projection, kind, eps, heads=False)
    check_shape(name, "k", k, (q.shape[0], None, q.shape[2]), "q's shape but for heads")
    if state is None:
        raise TypeError(f"{name}: state: expected three tensors, got None")
    rows = (q[:, :, None], k[:, :, None], v[:, :, None])
    _check_state(name, "state", state, *rows, projection, kind, None)
    S, z, top = state
    if wants_gradient((q, k, v, projection, S, z)):
        raise RuntimeError(
            f"{name}: one step in place has no gradient; use performer_attention, or no_grad"
        )
    options: dict[str, Any] = {"kind": kind, "scale": scale, "eps": eps}
    phi_q = favor_features(rows[0], projection, is_query=True, **options)
    phi_k, gate, last = _keys(rows[1], projection, q.shape[1], top, None, options)
    gate = None if gate is None else gate.squeeze(2)
    out = linear_attention_step(
        phi_q.squeeze(2), phi_k.squeeze(2), v, (S, z), gate=gate, scale=1.0, normalize=True, eps=0.0
    )
    top.copy_(last)
    return out


# ---- attention


def _keys(
    k: Tensor,
    projection: Tensor,
    heads: int,
    initial_max: Tensor | None,
    cu_seqlens: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Causal features of keys, the gate of each of q's heads, and the last maximum."""
    if callable(options["kind"]):
        sequences = k.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        none = k.new_full((sequences, k.shape[1]), -torch.inf, dtype=sum_dtype(k))
        return favor_features(k, projection, is_query=False, **options), None, none
    phi, gate, last = favor_features(
        k, projection, is_query=False, causal=True, initial_max=initial_max, cu_seqlens=cu_seqlens,
        **options,
    )  # fmt: skip
    return phi, gate.repeat_interleave(heads // k.shape[1], dim=1), last


def _split(state: State | None) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    return (None, None) if state is None else (state[:2], state[2])


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    state: State | None,
    cu_seqlens: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, State]:
    sums, top = _split(state)
    phi_q = favor_features(q, projection, is_query=True, **options)
    phi_k, gate, last = _keys(k, projection, q.shape[1], top, cu_seqlens, options)
    out, (S, z) = linear_attention(
        phi_q, phi_k, v, gate=gate, scale=1.0, normalize=True, eps=0.0, initial_state=sums,
        return_final_state=True, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return out, (S, z, last)


def _full(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, state: State | None, options: dict[str, Any]
) -> tuple[Tensor, State]:
    sums, top = _split(state)
    phi_q = favor_features(q, projection, is_query=True, **options)
    phi_k, last = _whole_keys(k, projection, top, options)
    out, (S, z) = linear_attention(
        phi_q, phi_k, v, causal=False, scale=1.0, normalize=True, eps=0.0, return_final_state=True,
        initial_state=_shrunk(sums, top, last),
    )  # fmt: skip
    return out, (S, z, last)


def _whole_keys(
    k: Tensor, projection: Tensor, initial_max: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Features of keys that are all seen at once, and their maximum (B, H_kv)."""
    how = "none" if callable(options["kind"]) else "sequence"
    with torch.autocast(k.device.type, enabled=False):
        phi, shift = compute_features(
            k, projection, **options, how=how, initial_max=initial_max, packed=None
        )
    if how == "none" or k.shape[2] == 0:
        last = k.new_full(k.shape[:2], -torch.inf, dtype=sum_dtype(k))
        return phi, last if initial_max is None else initial_max
    return phi, shift.squeeze(2)


def _shrunk(
    sums: tuple[Tensor, Tensor] | None, old: Tensor | None, new: Tensor
) -> tuple[Tensor, Tensor] | None:
    """S and z relative to another maximum."""
    if sums is None or old is None:
        return None
    S, z = sums
    factor = torch.where(old == new, 1, (old - new).exp())  # both may be -inf
    factor = factor.repeat_interleave(S.shape[1] // old.shape[1], dim=1)
    return S * factor[..., None, None], z * factor[..., None]


def _segment(q: Tensor, projection: Tensor, kind: Kind) -> int:
    """Tokens whose features take about _SEGMENT_BYTES."""
    a_token = q.shape[0] * q.shape[1] * count(projection, kind) * sum_dtype(q).itemsize
    return max(_SPAN, _SEGMENT_BYTES // max(1, a_token) // _SPAN * _SPAN)


def _causal_segments(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, state: State | None, options: dict[str, Any]
) -> tuple[Tensor, State]:
    size = _segment(q, projection, options["kind"])
    if q.shape[2] <= size or k.shape[2] != q.shape[2]:  # which is refused
        return _causal(q, k, v, projection, state, None, options)
    outs = []
    for parts in zip(q.split(size, 2), k.split(size, 2), v.split(size, 2)):
        out, state = _causal(*parts, projection, state, None, options)
        outs.append(out)
    assert state is not None
    return torch.cat(outs, dim=2), state


def _full_segments(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, state: State | None, options: dict[str, Any]
) -> tuple[Tensor, State]:
    size = _segment(q, projection, options["kind"])
    if max(q.shape[2], k.shape[2]) <= size:
        return _full(q, k, v, projection, state, options)
    # What eps adds to all features alike waits for the last maximum, which shrinks everything else.
    bare = {**options, "eps": 0.0}
    nobody = q[:, :, :0]
    for keys, values in zip(k.split(size, dim=2), v.split(size, dim=2)):
        _, state = _full(nobody, keys, values, projection, state, bare)
    assert state is not None
    S, z, last = state
    estimates = projection.shape[-2] * (2 if options["kind"] == "hyperbolic" else 1)
    ratio = options["eps"] * estimates**-0.5
    if ratio:
        everything = v.sum(2, dtype=S.dtype).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        S, z = S + ratio * everything[:, :, None], z + ratio * k.shape[2]
    outs = [
        _full(queries, k[:, :, :0], v[:, :, :0], projection, (S, z, last), options)[0]
        for queries in q.split(size, dim=2)
    ]
    return torch.cat(outs, dim=2), (S, z, last)


# ---- arguments


def _check_state(
    name: str,
    label: str,
    state: State | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kind: Kind,
    cu_seqlens: Tensor | None,
) -> None:
    """S and z are `linear_attention`'s to check; here that there are three, and the third."""
    if state is None:
        return
    if isinstance(state, Tensor) or len(state) != 3:
        raise TypeError(
            f"{name}: {label}: expected three tensors, S, z and the maximum, got {type(state).__name__}"
        )
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    for i, shape in enumerate(
        (
            (sequences, q.shape[1], count(projection, kind), v.shape[-1]),
            (sequences, q.shape[1], count(projection, kind)),
            (sequences, k.shape[1]),
        )
    ):
        check_floating(name, f"{label}[{i}]", state[i])
        check_shape(name, f"{label}[{i}]", state[i], shape, "a state as performer_attention returns it")
    if state[2].dtype != sum_dtype(q):
        raise TypeError(
            f"{name}: {label}[2]: expected {sum_dtype(q)} beside {q.dtype}, got {state[2].dtype}"
        )
