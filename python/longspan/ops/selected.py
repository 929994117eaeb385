"""Attention over the blocks of keys that each query names, and choosing them: `selected_attention`."""

from typing import Any

import torch
from torch import Tensor

from longspan.ops._autograd import overload, register_attention
from longspan.ops._checks import (
    check_attention,
    check_floating,
    check_group,
    check_integers,
    check_like,
    check_positive,
    check_shape,
    empty_heads,
    has_kernels,
    sum_dtype,
)
from longspan.reference import selected as reference

_forward = overload("selected_attention_forward")
select_and_attend = overload("select_blocks")


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int = 64,
    causal: bool = True,
    scale: float | None = None,
    cache_seqlens: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Exact attention of each query over the blocks of keys that it names.

    The selected branch of Native Sparse Attention (Yuan et al. 2025, section 3.3.2), and what decodes
    Mixture of Block Attention. Block j is keys ``[j * block_size, (j + 1) * block_size)``; where
    ``causal`` a query sees those of them up to its own position. A query that sees no key gets 0 and no
    gradient. What a query cannot see never reaches its output or gradient, not even a NaN.

    A tile is the heads that share a list by the keys of a block, so it is fast where a list serves
    several heads: with 64 channels and AVX-512, 16 heads ran at 83 % of the arithmetic rate of
    `longspan.attention`, 4 at 63 %, one at 28 %. 16-bit tensors are computed in float32.

    Args:
        q: (B, H, T_q, D), float32, float64, bfloat16 or float16, any strides.
        k: (B, H_kv, T_k, D). H is a multiple of H_kv; query head h reads key head h // (H / H_kv).
        v: (B, H_kv, T_k, D_v).
        block_indices: (B, H_kv, T_q, n) int32 or int64, one list for the heads of a group, or
            (B, H, T_q, n), one a head. In any order, none twice; -1 is unused.
        block_size: Keys of a block.
        causal: Query i sees keys up to its own position, the last query being aligned with the last
            key.
        scale: Of the scores; None is D ** -0.5.
        cache_seqlens: (B,) integers: keys that there are, where k and v are caches of T_k slots; query
            t stands at ``cache_seqlens - T_q + t``. None is T_k.
        return_lse: Also return the log-sum-exp of each query's scores.

    Returns:
        out (B, H, T_q, D_v) in q's dtype; with ``return_lse`` a pair (out, lse), lse (B, H, T_q) in
        float32 (float64 for float64), -inf for a query without keys, and differentiable.

    Raises:
        TypeError: A dtype is not supported or differs from q's.
        ValueError: Shapes or values do not fit. RuntimeError: a block is not there, or named twice.

    Example::

        q, k, v = torch.randn(1, 16, 256, 64), *torch.randn(2, 1, 1, 256, 64)
        blocks = torch.tensor([0, 3]).expand(1, 1, 256, 2)
        longspan.selected_attention(q, k, v, blocks)
    """
    name = "selected_attention"
    q, k, v = check_attention(name, q, k, v)
    check_positive(name, "block_size", block_size)
    check_integers(
        name,
        "block_indices",
        block_indices,
        (q.shape[0], None, q.shape[2], None),
        "(batch, heads, tokens, n)",
    )
    if block_indices.shape[1] not in (q.shape[1], k.shape[1]):
        raise ValueError(
            f"{name}: block_indices: expected {k.shape[1]} heads, as k has, or {q.shape[1]}, as q has, "
            f"got {block_indices.shape[1]}"
        )
    if cache_seqlens is not None:
        check_integers(name, "cache_seqlens", cache_seqlens, q.shape[:1], "(batch,)")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, block_indices, cache_seqlens, block_size, causal, scale)
    call = _forward if has_kernels(name, q) else reference.selected_attention
    out, lse = call(*arguments)
    return (out, lse) if return_lse else out


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    *,
    keys: int,
    count: int | Tensor = 16,
    block_size: int = 64,
    compress_length: int = 32,
    compress_stride: int = 16,
    causal: bool = True,
    scale: float | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """Choose the blocks of keys that each query and group of heads attends to, from compressed keys.

    Native Sparse Attention's selection (Yuan et al. 2025, equations 8 to 10): the softmax of q over the
    compressed keys, summed over those that overlap a block, each weighted by the strides that it shares
    with it, and over the heads of a group. Always chosen, in this order: the query's own block, the one
    before it, and block 0; then the best. Of equals the first; NaN is the least. Not differentiable.
    The scores are never kept: memory is linear in tokens and keys.

    Args:
        q: (B, H, T_q, D), float32, float64, bfloat16 or float16.
        k_cmp: (B, H_kv, T_c, D): key c stands for keys ``[c * compress_stride, c * compress_stride +
            compress_length)`` and is seen from the last of them on.
        keys: T_k, that k_cmp was made of.
        count: Blocks for each query, at most; or (B, H_kv, T_q) integers, of each.
        block_size: Keys of a block, a multiple of ``compress_stride``.
        compress_length: A multiple of ``compress_stride``.
        compress_stride: See k_cmp.
        causal: Blocks up to a query's own alone; else all blocks and compressed keys are looked at.
        scale: Of the scores; None is D ** -0.5.
        cache_seqlens: (B,) integers: keys that there are so far, out of ``keys`` slots.

    Returns:
        (B, H_kv, T_q, count) int64, ascending; -1 at the end where there are fewer blocks. With a
        tensor for ``count``, its greatest.

    Raises:
        TypeError, ValueError: Dtypes, shapes or values do not fit.

    Example::

        q, k = torch.randn(1, 16, 256, 64), torch.randn(1, 1, 256, 64)
        k_cmp = longspan.compress_keys(k)
        longspan.select_blocks(q, k_cmp, keys=256, count=3)[0, 0, -1]  # own, before, and one more
    """
    name = "select_blocks"
    check_floating(name, "q", q)
    check_shape(name, "q", q, (None,) * 4, "(batch, heads, tokens, channels)")
    check_like(name, "k_cmp", k_cmp, "q", q)
    wanted = (q.shape[0], None, None, q.shape[3])
    check_shape(name, "k_cmp", k_cmp, wanted, "(batch, kv_heads, compressed keys, channels)")
    check_group(name, q.shape[1], k_cmp.shape[1])
    count, counts = most_blocks(name, count, q, k_cmp)
    check_strides(name, compress_length, compress_stride, block_size)
    check_compressed(name, "k_cmp", k_cmp.shape[2], keys, compress_length, compress_stride)
    if cache_seqlens is not None:
        check_integers(name, "cache_seqlens", cache_seqlens, q.shape[:1], "(batch,)")
        if not causal:
            raise ValueError(f"{name}: cache_seqlens: expected None where not causal")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    arguments = (
        q.detach(), k_cmp.detach(), None, cache_seqlens, counts, keys, compress_length,
        compress_stride, block_size, count, causal, scale,
    )  # fmt: skip
    return (select_and_attend if has_kernels(name, q) else reference.select_blocks)(*arguments)[0]


def most_blocks(function: str, count: int | Tensor, q: Tensor, k: Tensor) -> tuple[int, Tensor | None]:
    """The greatest count of blocks, and those of each query where there are; checks them."""
    if isinstance(count, int):
        check_positive(function, "count", count)
        return count, None
    check_integers(
        function, "count", count, (q.shape[0], k.shape[1], q.shape[2]), "(batch, kv_heads, tokens)"
    )
    return (max(1, int(count.max())) if count.numel() else 1), count


def compressed_count(keys: int, length: int, stride: int) -> int:
    """How many compressed keys cover all keys: the last may stand for fewer than ``length``."""
    return 0 if keys == 0 else 1 + max(0, -((length - keys) // stride))


def check_strides(function: str, length: int, stride: int, block_size: int) -> None:
    """Raise ValueError unless ``stride`` divides ``length`` and ``block_size``, all 1 or more."""
    check_positive(function, "compress_stride", stride)
    for label, size in (("compress_length", length), ("block_size", block_size)):
        check_positive(function, label, size)
        if size % stride:
            raise ValueError(
                f"{function}: {label}: expected a multiple of compress_stride, {stride}, got {size}"
            )


def check_compressed(function: str, name: str, got: int, keys: int, length: int, stride: int) -> None:
    """Raise ValueError unless there is a compressed key for all whole spans of keys."""
    most = compressed_count(keys, length, stride)
    whole = max(0, (keys - length) // stride + 1)
    if not whole <= got <= most:
        raise ValueError(
            f"{function}: {name}: expected {whole} or {most} compressed keys for {keys} keys, got {got}"
        )


# ---- fakes


@torch.library.register_fake("longspan::selected_attention_forward")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=sum_dtype(q))


@torch.library.register_fake("longspan::selected_attention_backward")
def _(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q, q.shape[3]), empty_heads(k, k.shape[3]), empty_heads(v, v.shape[3])


@torch.library.register_fake("longspan::select_blocks")
def _(
    q: Tensor, k: Tensor, v: Tensor | None, lengths: Tensor | None, counts: Tensor | None, keys: int,
    length: int, stride: int, block_size: int, count: int, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    indices = q.new_empty(q.shape[0], k.shape[1], q.shape[2], count, dtype=torch.int64)
    if v is None:
        return indices, q.new_empty(0), q.new_empty(0, dtype=sum_dtype(q))
    return indices, empty_heads(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=sum_dtype(q))


# ---- autograd

register_attention("selected_attention", tensors=5)
