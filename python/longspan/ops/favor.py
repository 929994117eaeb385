"""FAVOR+, Performer's random features of the softmax kernel: `favor_features`, `performer_attention`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan.ops._autograd import wants_gradient
from longspan.ops._checks import (
    autocast,
    check_device,
    check_floating,
    check_integers,
    check_positive,
    check_shape,
    sum_dtype,
)
from longspan.ops.linear_attention import linear_attention, linear_attention_step

Kind = str | Callable[[Tensor], Tensor]
State = tuple[Tensor, Tensor, Tensor]

KINDS = ("positive", "hyperbolic", "trigonometric")
NORMS = ("gaussian", "constant")

# Without a gradient features live for a segment of tokens at a time, of about this size: it stays in
# the cache, and the allocator has it ready, where fresh memory costs more than the exponentials.
_SEGMENT_BYTES = 1 << 22
_SPAN = 256  # kSpan in csrc/kernels/runs.h: segments are multiples


def favor_projection(
    features: int,
    channels: int,
    *,
    orthogonal: bool = True,
    norms: str = "gaussian",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw the directions of `favor_features` (Choromanski et al. 2020, Performer, section 2.4).

    Orthogonal ones come in blocks of ``channels``, each a rotation drawn from Haar's measure (the Q of a
    Gaussian matrix, with the signs that make R's diagonal positive), the last one cut short. Their errors
    cancel, so features are better for the same number.

    Args:
        features: m.
        channels: D.
        orthogonal: Whether directions within a block are orthogonal, rather than independent.
        norms: ``"gaussian"``: lengths are those of independent Gaussian vectors, which keeps features
            unbiased. ``"constant"``: sqrt(D), their mean square, which is a little biased and varies less.
        generator: Of the processor; None is torch's default one.
        device: Of the result; None is torch's default. Numbers are drawn on the processor, so a seed
            gives the same ones everywhere.
        dtype: None is float32.

    Returns:
        (m, D).

    Raises:
        ValueError: A size is not positive, or ``norms`` is not known.

    Example::

        projection = longspan.favor_projection(256, 64, generator=torch.Generator().manual_seed(0))
    """
    name = "favor_projection"
    check_positive(name, "features", features)
    check_positive(name, "channels", channels)
    if norms not in NORMS:
        raise ValueError(f"{name}: norms: expected one of {', '.join(NORMS)}, got {norms!r}")

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    if orthogonal:
        blocks = gaussian(-(-features // channels), channels, channels)
        q, r = torch.linalg.qr(blocks)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
        # Haar's measure is that of the transpose too; rows of Q^T are the directions.
        directions = q.transpose(1, 2).flatten(0, 1)[:features]
    else:
        directions = torch.nn.functional.normalize(gaussian(features, channels), dim=-1)
    if norms == "gaussian":
        lengths = gaussian(features, channels).norm(dim=1, keepdim=True)
    else:
        lengths = torch.full((features, 1), channels**0.5, dtype=torch.float64)
    return (directions * lengths).to(device=device, dtype=dtype or torch.float32)


def favor_features(
    x: Tensor,
    projection: Tensor,
    *,
    is_query: bool,
    kind: Kind = "positive",
    scale: float | None = None,
    eps: float | None = None,
    stabilize: bool = True,
    causal: bool = False,
    initial_max: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Random features whose products are softmax's weights on average: FAVOR+.

    ``E[phi(q) . phi(k)] = exp(scale q . k)`` over projections, with y = x sqrt(scale) and directions w:

    - ``"positive"``: ``exp(w . y - |y|^2 / 2) / sqrt(m)``
    - ``"hyperbolic"``: ``exp(+-w . y - |y|^2 / 2) / sqrt(2 m)``, 2 m of them, of half the variance at most
    - ``"trigonometric"``: ``exp(|y|^2 / 2) [sin(w . y), cos(w . y)] / sqrt(m)``, 2 m of them, which may be
      negative: where weights are small their sum is unreliable
    - a function f: ``f(w . y) / sqrt(m)``, for the kernel that it defines (generalised attention)

    (Choromanski et al. 2020, Performer, lemmas 1 and 2, section 2.2.) Computed in float32, or float64
    for float64.

    **Stabiliser.** The greatest exponent is subtracted, a factor that cancels where linear attention
    normalises, so that nothing overflows: each query token's own; of keys that of the whole sequence,
    or with ``causal`` the greatest up to each token. What was summed before a new maximum must then
    decay by ``exp(old - new)``: that is the ``gate``, ready for `longspan.linear_attention`. No token
    sees a later one, and streaming gives what the whole sequence gives. Maxima count as constants in the
    derivative, which is exact for ``eps=0``.

    Args:
        x: (B, H, T, D), float32, float64, bfloat16 or float16.
        projection: (m, D), of `favor_projection`, or (H, m, D), one for each head.
        is_query: Whether x are queries rather than keys.
        kind: Of the above.
        scale: Of q . k; None is D ** -0.5.
        eps: Added to each feature, times 1 / sqrt(m), so that no sum of them is 0; None is 1e-6, 1e-3
            for a function, 0 for ``"trigonometric"``.
        stabilize: Whether to subtract maxima; never for a function.
        causal: Of keys, which maxima.
        initial_max: (B, H), or (S, H) for the S sequences of ``cu_seqlens``: the maximum before the
            first token, with ``causal``; None is none.
        cu_seqlens: (S + 1,) int32 or int64, with ``causal``: sequences packed into x, whose B is 1.

    Returns:
        (B, H, T, m or 2 m) in x's dtype; with ``causal`` (features, gate (B, H, T), maximum after the
        last token (B or S, H)), both in float32 or float64.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Shapes or values do not fit.

    Example::

        q, k, v = torch.randn(3, 1, 8, 4096, 64)
        projection = longspan.favor_projection(256, 64)
        phi_q = longspan.favor_features(q, projection, is_query=True)
        phi_k = longspan.favor_features(k, projection, is_query=False)
        out = longspan.linear_attention(phi_q, phi_k, v, causal=False, scale=1.0, normalize=True)
    """
    name = "favor_features"
    check_floating(name, "x", x)
    check_shape(name, "x", x, (None,) * 4, "(batch, heads, tokens, channels)")
    eps = _check_options(name, x, projection, kind, eps)
    if causal and (is_query or callable(kind) or not stabilize):
        raise ValueError(
            f"{name}: causal: expected False for queries, without a stabiliser and for a function as "
            "kind, got True"
        )
    for label, given in (("initial_max", initial_max), ("cu_seqlens", cu_seqlens)):
        if given is not None and not causal:
            raise ValueError(f"{name}: {label}: expected None without causal")
    sequences = x.shape[0]
    if cu_seqlens is not None:
        check_integers(name, "cu_seqlens", cu_seqlens, (None,), "(sequences + 1,)")
        if x.shape[0] != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                f"{name}: cu_seqlens: expected 2 or more beside a batch of 1, got {len(cu_seqlens)} beside "
                f"{x.shape[0]}"
            )
        sequences = len(cu_seqlens) - 1
    if initial_max is not None:
        check_floating(name, "initial_max", initial_max)
        check_device(name, "initial_max", initial_max, "x", x)
        wanted = (sequences, x.shape[1])
        check_shape(name, "initial_max", initial_max, wanted, "(batch or sequences, heads)")
        initial_max = initial_max.detach().to(sum_dtype(x))
    how = "none" if not stabilize else "token" if is_query else "running" if causal else "sequence"
    packed = None if cu_seqlens is None else _sequence_of_each(cu_seqlens, x.shape[2])
    with torch.autocast(x.device.type, enabled=False):
        features, shift = _features(x, projection, kind, scale, eps, how, initial_max, packed)
    if not causal:
        return features
    gate = _gate(shift, initial_max, packed)
    return features, gate, _last(shift, initial_max, cu_seqlens)


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
    eps = _check_options(name, q, projection, kind, eps, heads=False)
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
    eps = _check_options(name, q, projection, kind, eps, heads=False)
    check_shape(name, "k", k, (q.shape[0], None, q.shape[2]), "q's shape but for heads")
    if state is None:
        raise TypeError(f"{name}: state: expected three tensors, got None")
    rows = [x[:, :, None] for x in (q, k, v)]
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


# ---- features


class _Exponentials(torch.autograd.Function):
    """``exp(x . w - |x|^2 / 2 - shift) / sqrt(m) + eps`` with what was subtracted, in one buffer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        projection: Tensor,
        eps: float,
        how: str,
        initial_max: Tensor | None,
        packed: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """-> features (B, H, T, m) in ``dtype``, shift (B, H, T or 1) in x's."""
        half = _half_norm(x)
        y = x @ projection.transpose(-1, -2)
        shift = _shift(y.amax(-1) - half, how, initial_max, packed)
        y.sub_((half + shift + 0.5 * math.log(projection.shape[-2]))[..., None]).exp_()
        if eps:
            y.add_(eps)
        return y.to(dtype), shift

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, projection, ctx.eps, *_ = inputs
        features, shift = output
        ctx.save_for_backward(x, projection, features)
        ctx.mark_non_differentiable(shift)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, projection, features = ctx.saved_tensors
        dy = gradients[0].to(x.dtype)
        dy = dy * features - ctx.eps * dy if ctx.eps else dy * features
        dx = d_projection = None
        if ctx.needs_input_grad[0]:
            dx = torch.addcmul(dy @ projection, x, dy.sum(-1, keepdim=True), value=-1)
        if ctx.needs_input_grad[1]:
            d_projection = (dy.transpose(-1, -2) @ x).sum_to_size(projection.shape)
        return dx, d_projection, None, None, None, None, None


def _features(
    x: Tensor,
    projection: Tensor,
    kind: Kind,
    scale: float | None,
    eps: float,
    how: str,
    initial_max: Tensor | None,
    packed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """-> features, and the shift of their exponents (B, H, T or 1)."""
    dtype = x.dtype
    x = x.to(sum_dtype(x)) * math.sqrt(x.shape[-1] ** -0.5 if scale is None else scale)
    projection = projection.to(x.dtype)
    if kind == "hyperbolic":
        projection = torch.cat([projection, -projection], dim=-2)
    if kind in ("positive", "hyperbolic"):
        size = eps * projection.shape[-2] ** -0.5
        return _Exponentials.apply(x, projection, size, how, initial_max, packed, dtype)
    along = x @ projection.transpose(-1, -2)
    ratio = projection.shape[-2] ** -0.5
    if kind == "trigonometric":
        half = _half_norm(x)
        shift = _shift(half.detach(), how, initial_max, packed)
        waves = torch.cat([along.sin(), along.cos()], dim=-1) * (half - shift).exp()[..., None]
        return ((waves + eps) * ratio).to(dtype), shift
    assert callable(kind)
    return ((kind(along) + eps) * ratio).to(dtype), x.new_zeros(())


def _half_norm(x: Tensor) -> Tensor:
    return 0.5 * torch.linalg.vecdot(x, x)


def _shift(
    top: Tensor, how: str, initial_max: Tensor | None, packed: Tensor | None
) -> Tensor:  # of (B, H, T)
    """What to subtract, from each token's greatest exponent: (B, H, T), or (B, H, 1) for all."""
    tokens = top.shape[2]
    if how == "none" or tokens == 0:
        return torch.zeros_like(top)
    if how == "token":
        return top
    if how == "sequence":
        top = top.amax(2, keepdim=True)
        return top if initial_max is None else torch.maximum(top, initial_max[..., None])
    if packed is None:
        if initial_max is not None:
            top = torch.cat([initial_max[..., None], top], dim=2)
        return top.cummax(2).values[:, :, -tokens:]
    if initial_max is not None:
        before = initial_max[packed].transpose(0, 1)[None]
        top = torch.where(_begins(packed), torch.maximum(top, before), top)
    # Each step doubles how far back a token has looked, without leaving its sequence.
    back = 1
    while back < tokens:
        same = packed[back:] == packed[:-back]
        seen = torch.where(same, torch.maximum(top[:, :, back:], top[:, :, :-back]), top[:, :, back:])
        top = torch.cat([top[:, :, :back], seen], dim=2)
        back *= 2
    return top


def _sequence_of_each(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,): which packed sequence each token is of."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long(), index, right=True)
    return sequence.clamp(max=len(cu_seqlens) - 2)  # wrong ends are linear_attention's to refuse


def _begins(packed: Tensor) -> Tensor:
    """(T,) bool: the first token of each sequence."""
    return torch.cat([torch.ones_like(packed[:1], dtype=torch.bool), packed[1:] != packed[:-1]])


def _gate(shift: Tensor, initial_max: Tensor | None, packed: Tensor | None) -> Tensor:
    """log(exp(old - new)) where the running maximum (B, H, T) grows; 0 where nothing was before."""
    before = torch.cat([shift[:, :, :1], shift[:, :, :-1]], dim=2)
    if packed is not None:
        own = shift if initial_max is None else initial_max[packed].transpose(0, 1)[None]
        before = torch.where(_begins(packed), own, before)
    elif initial_max is not None and shift.shape[2]:
        before = torch.cat([initial_max[..., None], before[:, :, 1:]], dim=2)
    return torch.where(before == -torch.inf, 0, before - shift)


def _last(shift: Tensor, initial_max: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The running maximum after the last token, -inf where there was none: (B or S, H)."""
    heads = shift.shape[1]
    sequences = shift.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    before = shift.new_full((sequences, heads), -torch.inf) if initial_max is None else initial_max
    if shift.shape[2] == 0:
        return before
    if cu_seqlens is None:
        return shift[:, :, -1]
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    at_end = shift[0, :, (end - 1).clamp(0, shift.shape[2] - 1)].transpose(0, 1)
    return torch.where((end > begin)[:, None], at_end, before)


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
    """Features of keys that are all seen at once, and the maximum (B, H_kv) that they are relative to."""
    how = "none" if callable(options["kind"]) else "sequence"
    with torch.autocast(k.device.type, enabled=False):
        phi, shift = _features(k, projection, **options, how=how, initial_max=initial_max, packed=None)
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
    a_token = q.shape[0] * q.shape[1] * _count(projection, kind) * sum_dtype(q).itemsize
    return max(_SPAN, _SEGMENT_BYTES // max(1, a_token) // _SPAN * _SPAN)


def _count(projection: Tensor, kind: Kind) -> int:
    """Features of so many directions."""
    return projection.shape[-2] * (1 if kind == "positive" or callable(kind) else 2)


def _causal_segments(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, state: State | None, options: dict[str, Any]
) -> tuple[Tensor, State]:
    size = _segment(q, projection, options["kind"])
    if q.shape[2] <= size or k.shape[2] != q.shape[2]:  # which is refused
        return _causal(q, k, v, projection, state, None, options)
    outs = []
    for parts in zip(*(x.split(size, dim=2) for x in (q, k, v))):
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


def _check_options(
    name: str, x: Tensor, projection: Tensor, kind: Kind, eps: float | None, heads: bool = True
) -> float:
    """-> eps."""
    check_floating(name, "projection", projection)
    check_device(name, "projection", projection, "x" if heads else "q", x)
    wanted = (
        (None, x.shape[-1]) if projection.dim() != 3 or not heads else (x.shape[1], None, x.shape[-1])
    )
    what = "(directions, channels)" + (" or (heads, directions, channels)" if heads else "")
    check_shape(name, "projection", projection, wanted, what)
    check_positive(name, "projection's directions", projection.shape[-2])
    if not callable(kind) and kind not in KINDS:
        raise ValueError(f"{name}: kind: expected a function or one of {', '.join(KINDS)}, got {kind!r}")
    if eps is None:
        return 1e-3 if callable(kind) else 0.0 if kind == "trigonometric" else 1e-6
    if not eps >= 0:
        raise ValueError(f"{name}: eps: expected 0 or more, got {eps}")
    return eps


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
            (sequences, q.shape[1], _count(projection, kind), v.shape[-1]),
            (sequences, q.shape[1], _count(projection, kind)),
            (sequences, k.shape[1]),
        )
    ):
        check_floating(name, f"{label}[{i}]", state[i])
        check_shape(name, f"{label}[{i}]", state[i], shape, "a state as performer_attention returns it")
    if state[2].dtype != sum_dtype(q):
        raise TypeError(
            f"{name}: {label}[2]: expected {sum_dtype(q)} beside {q.dtype}, got {state[2].dtype}"
        )
