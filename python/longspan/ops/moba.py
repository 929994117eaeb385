"""Mixture of Block Attention: `mixture_of_block_attention` and its step."""

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
    check_attention,
    check_integers,
    check_positive,
    check_shape,
    check_tensor,
    empty_heads,
    has_kernels,
    sum_dtype,
)
from longspan.ops.attention import attention, attention_varlen
from longspan.ops.selected import selected_attention
from longspan.reference import moba as reference

# longspan.merge_attention of one part of every row and others that lie sorted by block, in one pass.
_merge = overload("merge_parts")
_merge_backward = overload("merge_parts_backward")

_GATED_TOKENS = 1024  # at once: scores of tokens x blocks are never kept for all


def mixture_of_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 512,
    topk: int = 3,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Attention of each query and head over the few blocks of keys that a gate without parameters chose.

    Mixture of Block Attention (Lu et al. 2025): a query attends to its own block and to the
    ``topk - 1`` others with the greatest products of q and the mean of the block's keys, in one
    softmax. The gate is computed in float32 (float64 for float64), scale-free, per query head; of equal
    blocks the first is chosen, NaN is the least, and no gradient passes it. Where ``causal`` only
    blocks before the query's own are looked at and its own block is seen up to itself, so a last block
    that is not whole is nobody else's choice. ``topk=1`` is the own block alone, and ``topk`` of at
    least the number of blocks is full attention. Time is O(T (topk * block_size + T / block_size)) and
    memory O(T). Queries that chose the same block are attended together (`longspan.attention_varlen`),
    and the parts merged by their log-sum-exps.

    Args:
        q: (B, H, T_q, D), float32, float64, bfloat16 or float16. The last query is aligned with the
            last key.
        k: (B, H_kv, T_k, D). H is a multiple of H_kv; query head h reads key head h // (H / H_kv).
            At least T_q keys.
        v: (B, H_kv, T_k, D_v).
        block_size: Keys of a block, the paper's chunk.
        topk: Blocks that a query sees, its own included.
        causal: A query sees keys up to its own position. Else all blocks may be chosen, whole.
        scale: Of the scores; None is D ** -0.5.

    Returns:
        (B, H, T_q, D_v) in q's dtype.

    Raises:
        TypeError: A dtype is not supported or differs from q's.
        ValueError: Shapes or values do not fit.

    Example::

        q, k, v = torch.randn(3, 1, 8, 4096, 64, requires_grad=True)
        longspan.mixture_of_block_attention(q, k, v, block_size=256, topk=4).sum().backward()
    """
    name = "mixture_of_block_attention"
    q, k, v = check_attention(name, q, k, v)
    check_positive(name, "block_size", block_size)
    check_positive(name, "topk", topk)
    (_, _, tokens, d), keys = q.shape, k.shape[2]
    if tokens > keys:
        raise ValueError(f"{name}: k: expected at least as many keys as queries, {tokens}, got {keys}")
    scale = d**-0.5 if scale is None else float(scale)
    if not has_kernels(name, q):
        return reference.mixture_of_block_attention(q, k, v, block_size, topk, causal, scale)
    blocks = -(-keys // block_size)
    if topk >= blocks or q.numel() == 0:
        return attention(q, k, v, causal=causal, scale=scale)
    own = _own_blocks(q, k, v, block_size, causal, scale)
    if topk == 1:
        return own[0]
    chosen = gate(q, k, block_size=block_size, count=topk - 1, causal=causal)
    return _merge(*own, *_chosen_blocks(q, k, v, chosen, block_size, scale))


def mixture_of_block_attention_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_means: Tensor,
    *,
    block_size: int = 512,
    topk: int = 3,
    scale: float | None = None,
) -> Tensor:
    """The last rows of causal `mixture_of_block_attention`, over a cache; no gradient.

    Only the chosen blocks of the cache are read, and the means of the others.

    Args:
        q: (B, H, T, D), the last T tokens of each sequence; few.
        k_cache: (B, H_kv, S, D), the new keys included.
        v_cache: (B, H_kv, S, D_v).
        cache_seqlens: (B,) integers: keys to be seen, the new ones included.
        block_means: (B, H_kv, ceil(S / block_size), D) float32 (float64 for float64): of the keys of
            each whole block; others are not read.
        block_size, topk, scale: As in `mixture_of_block_attention`.

    Returns:
        (B, H, T, D_v) in q's dtype.

    Raises:
        TypeError, ValueError: Dtypes, shapes or values do not fit. RuntimeError: A gradient is asked
            for.

    Example::

        k, v = torch.randn(2, 1, 2, 1024, 64)
        means = k.unflatten(2, (-1, 128)).mean(3)
        q = torch.randn(1, 8, 1, 64)
        longspan.mixture_of_block_attention_step(
            q, k, v, torch.tensor([1000]), means, block_size=128, topk=3
        )
    """
    name = "mixture_of_block_attention_step"
    q, k_cache, v_cache = check_attention(name, q, k_cache, v_cache)
    check_positive(name, "block_size", block_size)
    check_positive(name, "topk", topk)
    check_integers(name, "cache_seqlens", cache_seqlens, q.shape[:1], "(batch,)")
    check_tensor(name, "block_means", block_means)
    if block_means.dtype != sum_dtype(q):
        raise TypeError(f"{name}: block_means: expected {sum_dtype(q)}, got {block_means.dtype}")
    blocks = -(-k_cache.shape[2] // block_size)
    wanted = (*k_cache.shape[:2], blocks, q.shape[3])
    check_shape(name, "block_means", block_means, wanted, "(batch, kv_heads, blocks, channels)")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        raise RuntimeError(f"{name}: a step has no gradient; use torch.no_grad()")
    tokens = q.shape[2]
    at = cache_seqlens.long()[:, None] + torch.arange(tokens, device=q.device) - tokens
    own = at.div(block_size, rounding_mode="floor")[:, None].expand(q.shape[:3])
    others = min(topk, blocks) - 1
    chosen = [_gate(q, block_means, at, block_size, others, True)] if others else []
    own = torch.where(own < 0, -1, own)
    return selected_attention(
        q, k_cache, v_cache, torch.cat([own[..., None], *chosen], -1), block_size=block_size,
        scale=scale, cache_seqlens=cache_seqlens,
    )  # fmt: skip


def _block_means(k: Tensor, block_size: int) -> Tensor:
    """(B, H_kv, blocks, D), summed in float32 (float64 for float64); the last of what there is."""
    keys, dtype = k.shape[2], sum_dtype(k)
    whole = keys // block_size
    means = [k[:, :, : whole * block_size].unflatten(2, (whole, block_size)).mean(3, dtype=dtype)]
    if keys % block_size:
        means.append(k[:, :, whole * block_size :].mean(2, keepdim=True, dtype=dtype))
    return torch.cat(means, 2)


@torch.no_grad()
def gate(q: Tensor, k: Tensor, *, block_size: int, count: int, causal: bool = True) -> Tensor:
    """(B, H, T_q, count) int64: the best blocks beside each query's own, best first, then -1."""
    tokens, keys = q.shape[2], k.shape[2]
    means = _block_means(k, block_size)
    return _gate(q, means, torch.arange(keys - tokens, keys), block_size, count, causal)


def _gate(q: Tensor, means: Tensor, at: Tensor, block_size: int, count: int, causal: bool) -> Tensor:
    """(B, H, T, count) int64: the best other blocks, best first; -1 where there are no more.

    ``at`` (T,) or (B, T) is where queries stand.
    """
    group, blocks = q.shape[1] // means.shape[1], means.shape[2]
    means = means.transpose(-1, -2)
    own = at.to(q.device).div(block_size, rounding_mode="floor")
    own = own.view(-1, 1, 1, own.shape[-1], 1) if own.dim() == 2 else own[:, None]
    block = torch.arange(blocks, device=q.device)
    grouped = q.unflatten(1, (-1, group))  # (B, H_kv, G, T, D)
    chosen = []
    for part, where in zip(grouped.split(_GATED_TOKENS, 3), own.split(_GATED_TOKENS, -2)):
        # Not @: means would be copied for every head of a group.
        score = torch.matmul(part.to(means.dtype).flatten(2, 3), means).unflatten(2, (group, -1))
        hidden = (block >= where) if causal else (block == where)
        score = torch.where(hidden | score.isnan(), -torch.inf, score)
        best = []
        for _ in range(count):
            value, index = score.max(-1, keepdim=True)
            best.append(torch.where(value == -torch.inf, -1, index))
            score.scatter_(-1, index, -torch.inf)
        chosen.append(torch.cat(best, -1))
    return torch.cat(chosen, 3).flatten(1, 2)


def _own_blocks(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention within each query's own block: out (B, H, T_q, D_v) and its log-sum-exp."""
    (b, _, tokens, _), keys = q.shape, k.shape[2]
    starts = torch.arange(0, keys, block_size)
    first = (starts - (keys - tokens)).clamp(min=0)  # of the queries
    cu_q = _offsets(first, tokens, b)
    cu_k = _offsets(starts, keys, b)
    rows, keys_, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out, lse = attention_varlen(
        rows, keys_, values, cu_q, cu_k, causal=causal, scale=scale, return_lse=True
    )
    return out.unflatten(0, (b, tokens)).transpose(1, 2), lse.unflatten(1, (b, tokens)).transpose(0, 1)


def _offsets(starts: Tensor, length: int, batch: int) -> Tensor:
    """cu_seqlens of ``batch`` rows of ``length`` that are each cut at ``starts``."""
    rows = torch.arange(batch)[:, None] * length
    return torch.cat([(rows + starts).flatten(), torch.tensor([batch * length])])


def _chosen_blocks(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to each chosen block by itself, sorted by block, so that a run of rows shares its keys.

    -> out (P, D_v), log-sum-exps (P,), and where the parts of each query are: (count, B * H * T_q).
    """
    (b, h, _, _), (_, kv_heads, keys, _) = q.shape, v.shape
    count, blocks, heads = chosen.shape[-1], -(-keys // block_size), b * kv_heads
    head = torch.arange(b * h, device=q.device).div(h // kv_heads, rounding_mode="floor")
    run = head.view(b, h, 1, 1) * blocks + chosen
    run = torch.where(chosen < 0, heads * blocks, run)  # the last, which has no keys
    run = run.movedim(-1, 0).flatten()
    order = run.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=q.device))
    place = place.view(count, -1)
    counts = torch.zeros(heads * blocks + 1, dtype=torch.int64, device=q.device)
    counts.scatter_add_(0, run, torch.ones_like(run))
    cu_q = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    cu_k = _offsets(torch.arange(0, keys, block_size), keys, heads)
    cu_k = torch.cat([cu_k, cu_k[-1:]])
    rows = _Sorted.apply(q.flatten(0, 2), order, place)
    out, lse = attention_varlen(
        rows[:, None], k.flatten(0, 2)[:, None], v.flatten(0, 2)[:, None], cu_q, cu_k, scale=scale,
        return_lse=True,
    )  # fmt: skip
    return out[:, 0], lse[0], place


class _Sorted(torch.autograd.Function):
    """x[order % len(x)], whose gradient is a sum of gathers: adding by index would go one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, order % place.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        dtype = sum_dtype(gradient)
        total = gradient.index_select(0, place[0]).to(dtype)
        for at in place[1:]:
            total += gradient.index_select(0, at)
        return total.to(gradient.dtype), None, None


@torch.library.register_fake("longspan::merge_parts")
def _(own: Tensor, *rest: Any) -> Tensor:
    return empty_heads(own, own.shape[3])


@torch.library.register_fake("longspan::merge_parts_backward")
def _(
    d_out: Tensor, own: Tensor, own_lse: Tensor, parts: Tensor, parts_lse: Tensor, place: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_heads(own, own.shape[3]),
        own_lse.new_empty(own.shape[:3]),
        parts.new_empty(parts.shape),
        parts_lse.new_empty(parts_lse.shape),
    )


class _MergeParts(OperatorFunction):
    """longspan::merge_parts with its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args)
        return below_autograd(_merge, *args)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_merge_backward(gradient, *ctx.saved_tensors), None


register_autograd("merge_parts", _MergeParts)
register_once_differentiable("merge_parts_backward")
