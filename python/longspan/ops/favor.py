"""FAVOR+, Performer's random features of the softmax kernel: `favor_projection`, `favor_features`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan.ops._autograd import overload, register_not_differentiable
from longspan.ops._checks import (
    check_device,
    check_floating,
    check_positive,
    check_sequences,
    check_shape,
    sum_dtype,
)

_forward = overload("favor_forward")
_exp_rows = overload("favor_exp_rows")
_backward = overload("favor_backward")

_PADDING = 16  # kFavorPadding in csrc/kernels/favor.h

Kind = str | Callable[[Tensor], Tensor]

KINDS = ("positive", "hyperbolic", "trigonometric")
NORMS = ("gaussian", "constant")


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
    Gaussian matrix, with the signs that make R's diagonal positive), the last one cut short. Their
    errors cancel, so features are better for the same number.

    Args:
        features: m.
        channels: D.
        orthogonal: Whether directions within a block are orthogonal, rather than independent.
        norms: ``"gaussian"``: lengths are those of independent Gaussian vectors, which keeps features
            unbiased. ``"constant"``: sqrt(D), their root mean square: a little biased, less varied.
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
    - ``"hyperbolic"``: ``exp(+-w . y - |y|^2 / 2) / sqrt(2 m)``, 2 m of them, of half the variance
    - ``"trigonometric"``: ``exp(|y|^2 / 2) [sin(w . y), cos(w . y)] / sqrt(m)``, 2 m of them, which may
      be negative: where weights are small their sum is unreliable
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
    eps = check_options(name, x, projection, kind, eps)
    if causal and (is_query or callable(kind) or not stabilize):
        raise ValueError(
            f"{name}: causal: expected False for queries, without a stabiliser and for a function as "
            "kind, got True"
        )
    for label, given in (("initial_max", initial_max), ("cu_seqlens", cu_seqlens)):
        if given is not None and not causal:
            raise ValueError(f"{name}: {label}: expected None without causal")
    sequences = check_sequences(name, cu_seqlens, "x", x.shape[0])
    if initial_max is not None:
        check_floating(name, "initial_max", initial_max)
        check_device(name, "initial_max", initial_max, "x", x)
        wanted = (sequences, x.shape[1])
        check_shape(name, "initial_max", initial_max, wanted, "(batch or sequences, heads)")
        initial_max = initial_max.detach().to(sum_dtype(x))
    how = "none" if not stabilize else "token" if is_query else "running" if causal else "sequence"
    packed = None if cu_seqlens is None else _sequence_of_each(cu_seqlens, x.shape[2])
    with torch.autocast(x.device.type, enabled=False):
        features, shift = compute_features(x, projection, kind, scale, eps, how, initial_max, packed)
    if not causal:
        return features
    gate = _gate(shift, initial_max, packed)
    return features, gate, _last(shift, initial_max, cu_seqlens)


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
        features, own, kernels = projection.shape[-2], how == "token", _has_kernels(x, projection)
        if kernels:
            directions = _padded(projection, features, 0).t().contiguous()
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            y, most = (
                y.view(*x.shape[:3], *y.shape[1:])
                for y in _forward(rows, directions, features, own, eps)
            )
        else:
            y = x @ projection.transpose(-1, -2)
            most = y.amax(-1)
        half = _half_norm(x)
        shift = _shift(most - half, how, initial_max, packed)
        if kernels and own:  # which is done
            return y.to(dtype), shift
        # The shift is no less than most - half, but where half is huge rounding may make it so.
        offset = half if how == "none" else torch.maximum(half + shift, most)
        if kernels:
            _exp_rows(y.view(-1, features), offset.flatten(), eps)
        else:
            y.sub_(offset[..., None]).exp_().mul_(features**-0.5).add_(eps)
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
        if _has_kernels(x, projection) and not ctx.needs_input_grad[1] and not torch.is_grad_enabled():
            wide = _padded(projection, 0, x.shape[-1])
            rows = (y.reshape(-1, y.shape[-1]) for y in (gradients[0], features, x))
            dx = _backward(*rows, wide, ctx.eps).view(x.shape)
            return dx, None, None, None, None, None, None
        dy = gradients[0].to(x.dtype)
        dy = dy * features - ctx.eps * dy if ctx.eps else dy * features
        dx = d_projection = None
        if ctx.needs_input_grad[0]:
            dx = torch.addcmul(dy @ projection, x, dy.sum(-1, keepdim=True), value=-1)
        if ctx.needs_input_grad[1]:
            d_projection = (dy.transpose(-1, -2) @ x).sum_to_size(projection.shape)
        return dx, d_projection, None, None, None, None, None


def _has_kernels(x: Tensor, projection: Tensor) -> bool:
    """For one projection, where nothing else traces or transforms what is computed."""
    return (
        x.device.type == "cpu"
        and projection.dim() == 2
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _padded(projection: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros after its rows, or columns, up to what kernels read."""
    return torch.nn.functional.pad(
        projection, (0, -columns % _PADDING, 0, -rows % _PADDING)
    ).contiguous()


def compute_features(
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


def count(projection: Tensor, kind: Kind) -> int:
    """Features of so many directions."""
    return projection.shape[-2] * (1 if kind == "positive" or callable(kind) else 2)


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


# ---- arguments


def check_options(
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


# ---- fakes


@torch.library.register_fake("longspan::favor_forward")
def _(
    x: Tensor, directions_t: Tensor, features: int, own_maximum: bool, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], features), x.new_empty(x.shape[0])


@torch.library.register_fake("longspan::favor_exp_rows")
def _(y: Tensor, offset: Tensor, eps: float) -> None:
    return None


@torch.library.register_fake("longspan::favor_backward")
def _(d_y: Tensor, y: Tensor, x: Tensor, directions: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


for _name in ("favor_forward", "favor_exp_rows", "favor_backward"):
    register_not_differentiable(_name, "it is a part of favor_features, which has the gradient")
