"""Rotary position embedding of queries and keys in one pass: `apply_rotary`."""

from typing import Any

import torch
from torch import Tensor

from longspan.ops._autograd import (
    OperatorFunction,
    below_autograd,
    overload,
    register_autograd,
    register_not_differentiable,
)
from longspan.ops._checks import (
    check_device,
    check_floating,
    check_integers,
    check_like,
    check_shape,
    empty_heads,
    has_kernels,
)
from longspan.reference import rotary as reference

_apply = overload("apply_rotary")
_apply_in_place = overload("apply_rotary_")


def apply_rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding (Su et al. 2021) of queries and keys, in one pass over memory.

    Pair i (a, b) of a token's first R channels becomes ``(a cos_i - b sin_i, b cos_i + a sin_i)``; the
    channels from R on stay. Computed in float32 (float64 for float64) whatever q's dtype is. Gradients
    go to q and k, second ones too; cos and sin have none.

    Args:
        q: (B, H, T, D), packed (total, H, D): float32, float64, bfloat16 or float16, any strides.
        k: The same with H_kv heads, in q's dtype; None is queries alone.
        cos: (T, R), or (1 or B, T, R) for angles per sequence, R even and at most D, float64 with
            float64 and only then. The angles of the R / 2 pairs stand there twice, one half after
            the other, as transformers has them, also where ``interleaved``. With ``positions`` or
            ``cu_seqlens`` a table (max_position, R).
        sin: As cos.
        interleaved: Pairs are channels (2 i, 2 i + 1), as in GPT-J, not (i, i + R / 2), as in Llama.
        positions: (T,), (1, T) or (B, T), int32 or int64: each token's row of the tables.
        cu_seqlens: (sequences + 1,), int32 or int64, from 0 to total: sequences are packed, and each
            one's positions count from 0.
        inplace: Write into q and k, whose channels must have stride 1, and return them. Where a
            gradient is wanted this raises.

    Returns:
        q and k turned, in their shapes and dtypes, tokens outside heads in memory where they came so;
        None for no k.

    Raises:
        TypeError: A dtype is not supported or does not fit q's.
        ValueError: Shapes do not fit, or ``inplace`` on memory that overlaps itself.
        RuntimeError: A position is outside the tables, ``cu_seqlens`` do not go up from 0 to total, the
            halves of cos differ, or a gradient is wanted that there is not.

    Example::

        inv_freq, scale = longspan.rope.frequencies("linear", head_dim=64, factor=4.0)
        angle = torch.arange(8192)[:, None] * torch.cat([inv_freq, inv_freq])
        q, k = torch.randn(1, 9, 8192, 64), torch.randn(1, 3, 8192, 64)
        q, k = longspan.apply_rotary(q, k, angle.cos() * scale, angle.sin() * scale)
    """
    name = "apply_rotary"
    check_floating(name, "q", q)
    if cu_seqlens is not None:
        if positions is not None:
            raise ValueError(f"{name}: positions and cu_seqlens: expected one of them")
        check_shape(name, "q", q, (None, None, None), "(total, heads, channels) with cu_seqlens")
        check_integers(name, "cu_seqlens", cu_seqlens, (None,), "(sequences + 1,)")
    else:
        check_shape(name, "q", q, (None,) * 4, "(batch, heads, tokens, channels)")
    if k is not None:
        check_like(name, "k", k, "q", q)
        check_shape(name, "k", k, (q.shape[0], None, *q.shape[2:]), "q's shape but for its heads")
    _check_tables(q, cos, sin, positions, cu_seqlens)
    if inplace:
        for label, x in (("q", q), ("k", k)):
            if x is not None:
                _check_writable(label, x)
    if cu_seqlens is not None:
        by_heads = q.transpose(0, 1)[None]
        k_by_heads = None if k is None else k.transpose(0, 1)[None]
        turned, turned_k = _dispatch(
            by_heads, k_by_heads, cos, sin, None, cu_seqlens, interleaved, inplace
        )
        if inplace:
            return q, k
        return turned[0].transpose(0, 1), None if turned_k is None else turned_k[0].transpose(0, 1)
    if positions is not None and positions.dim() == 2 and positions.shape[0] == 1:
        positions = positions[0]
    return _dispatch(q, k, cos, sin, positions, None, interleaved, inplace)


def _check_tables(
    q: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    name = "apply_rotary"
    check_floating(name, "cos", cos)
    check_like(name, "sin", sin, "cos", cos)
    check_device(name, "cos", cos, "q", q)
    if (cos.dtype == torch.float64) != (q.dtype == torch.float64):
        raise TypeError(
            f"{name}: cos: expected float64 with float64 and only then, got {cos.dtype} with {q.dtype}"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise RuntimeError(f"{name}: cos and sin: expected no requires_grad, as they have no gradient")
    batch, tokens, channels = q.shape[0], q.shape[-2], q.shape[-1]
    if positions is not None or cu_seqlens is not None:
        check_shape(name, "cos", cos, (None, None), "a table (max_position, rotary channels)")
    elif cos.dim() == 3:
        rows = 1 if cos.shape[0] == 1 else batch
        check_shape(name, "cos", cos, (rows, tokens, None), "(1 or batch, tokens, rotary channels)")
    else:
        check_shape(name, "cos", cos, (tokens, None), "(tokens, rotary channels)")
    check_shape(name, "sin", sin, cos.shape, "cos's shape")
    if cos.shape[-1] > channels or cos.shape[-1] % 2:
        raise ValueError(
            f"{name}: cos: expected an even number of channels up to {channels}, got {cos.shape[-1]}"
        )
    if positions is not None:
        if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[0] != 1:
            check_integers(name, "positions", positions, (batch, tokens), "(batch, tokens)")
        else:
            shape = (1, tokens) if isinstance(positions, Tensor) and positions.dim() == 2 else (tokens,)
            check_integers(name, "positions", positions, shape, "(tokens,)")


def _check_writable(label: str, x: Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"apply_rotary: {label}: expected channels of stride 1 where inplace, got {x.stride(-1)}"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride())):
        raise ValueError(
            f"apply_rotary: {label}: expected memory of its own where inplace, got strides {x.stride()}"
        )


def _dispatch(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """(B, H, T, D) through the kernels, or the reference where the device has none."""
    if has_kernels("apply_rotary", q):
        if inplace:
            _apply_in_place(q, k, cos, sin, positions, cu_seqlens, interleaved)
            return q, k
        turned, turned_k = _apply(q, k, cos, sin, positions, cu_seqlens, interleaved, False)
        return turned, None if k is None else turned_k
    if cu_seqlens is not None:
        positions = reference.token_positions(cu_seqlens, q.shape[2])

    def rotate(x: Tensor) -> Tensor:
        out = reference.rotate(x, cos, sin, interleaved=interleaved, positions=positions)
        return x.copy_(out) if inplace else out

    return rotate(q), None if k is None else rotate(k)


# ---- fakes


@torch.library.register_fake("longspan::apply_rotary")
def _(q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(q, q.shape[3]), q.new_empty(0) if k is None else empty_heads(k, k.shape[3])


@torch.library.register_fake("longspan::apply_rotary_")
def _(q: Tensor, k: Tensor | None, *rest: Any) -> None:
    return None


# ---- autograd


class _ApplyRotary(OperatorFunction):
    """longspan::apply_rotary; its derivative turns by the opposite angle and has derivatives too."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = below_autograd(_apply, *args)
        _, k, *tables, ctx.interleaved, ctx.inverse = args
        ctx.save_for_backward(*tables)
        ctx.set_materialize_grads(False)
        if k is None:
            ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (*ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
        given = [g for g in gradients if g is not None]
        if not given:
            return (None,) * 8
        turned = iter(_apply(given[0], given[1] if len(given) == 2 else None, *rest))
        return *(None if g is None else next(turned) for g in gradients), *([None] * 6)


register_autograd("apply_rotary", _ApplyRotary)
register_not_differentiable(
    "apply_rotary_", "q and k have no gradient where they are turned in place; use inplace=False"
)
