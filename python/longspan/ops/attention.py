"""Exact attention in tiles: `attention`, `attention_varlen`, `attention_decode`, `merge_attention`."""

from collections.abc import Sequence
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
    autocasts,
    check_attention,
    check_attention_options,
    check_device,
    check_floating,
    check_group,
    check_integers,
    check_like,
    check_shape,
    check_tensor,
    empty_heads,
    has_kernels,
    sum_dtype,
)
from longspan.reference import attention as reference

_forward = overload("attention_forward")
_backward = overload("attention_backward")
_mask_backward = overload("attention_mask_backward")
_decode = overload("attention_decode")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    key_ranges: Tensor | None = None,
) -> Any:
    """Exact softmax attention, in tiles: memory is linear in tokens and keys.

    ``out_i = sum_j softmax_j(score_ij) v_j`` with ``score = softcap(scale * q k^T) + ALiBi + mask``
    (Dao et al. 2022, FlashAttention, algorithm 1; Dao 2023, FlashAttention-2). A query that sees no
    key gets 0 and no gradient. What a query cannot see never reaches its output or gradient, not even
    a NaN.

    Args:
        q: (B, H, T_q, D), float32, float64, bfloat16 or float16, any strides.
        k: (B, H_kv, T_k, D). H is a multiple of H_kv; query head h reads key head h // (H / H_kv).
        v: (B, H_kv, T_k, D_v).
        attn_mask: Broadcastable to (B, H, T_q, T_k). Bool: True where a key is seen. Floating (q's
            dtype or float32): added to the scores; differentiable. Combines with ``causal``.
        causal: Query i sees keys up to its own position. The last query is aligned with the last
            key (bottom right), unlike torch's SDPA where T_q and T_k differ.
        window: (left, right), how many keys before and after its own position a query sees; -1 is
            no bound. ``(w - 1, 0)`` is w keys, its own included.
        sink_tokens: So many first keys are exempt from the window's left bound (StreamingLLM).
        sinks: (H,), a logit per head that takes its share of the softmax and gives no value
            (gpt-oss's ``s_aux``); differentiable. Included in the log-sum-exp.
        scale: Of the scores; None is D ** -0.5.
        softcap: c > 0 replaces a score x by c * tanh(x / c), after ``scale``; 0 is off.
        alibi_slopes: (H,) or (B, H); ``slope * |i - j|`` is subtracted. Not differentiable.
        dropout_p: Probability in [0, 1) of dropping a weight; drawn from torch's generator, so
            ``manual_seed`` and activation checkpointing replay it.
        return_lse: Also return the log-sum-exp of each query's scores.
        key_ranges: (B, 3) integers: first key to be seen, one past the last, and the key position of
            query 0 (the diagonal of ``causal`` and ``window``). For left padding and for caches
            longer than what was written. None is (0, T_k, T_k - T_q).

    Returns:
        out (B, H, T_q, D_v) in q's dtype; with ``return_lse`` a pair (out, lse), lse (B, H, T_q) in
        float32 (float64 for float64), -inf for a query without keys, and differentiable.

    Raises:
        TypeError: A dtype is not supported or differs from q's.
        ValueError: Shapes or values do not fit.

    Example::

        q = torch.randn(1, 8, 4096, 64, requires_grad=True)
        k, v = torch.randn(2, 1, 2, 4096, 64)
        longspan.attention(q, k, v, causal=True, window=(1023, -1), sink_tokens=4).sum().backward()
    """
    q, k, v = check_attention("attention", q, k, v)
    if attn_mask is not None:
        attn_mask = _check_mask("attention", attn_mask, q, k)
    if key_ranges is not None:
        check_integers("attention", "key_ranges", key_ranges, (q.shape[0], 3), "(batch, 3)")
    out, lse = _attend(
        "attention", q, k, v, attn_mask, sinks, alibi_slopes, None, None, key_ranges,
        causal, window, sink_tokens, scale, softcap, dropout_p,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """`attention` over sequences packed one after the other, each attending to itself alone.

    Args:
        q: (total_q, H, D).
        k: (total_k, H_kv, D).
        v: (total_k, H_kv, D_v).
        cu_seqlens_q: (B + 1,) int32 or int64: where each sequence begins, and the end. A sequence
            may be empty.
        cu_seqlens_k: (B + 1,), likewise for keys.
        causal, window, sink_tokens, sinks, scale, softcap, dropout_p, return_lse: As in `attention`,
            within each sequence.
        alibi_slopes: (H,) or (B, H).

    Returns:
        out (total_q, H, D_v); with ``return_lse`` also lse (H, total_q). Rows of no sequence are 0.

    Raises:
        TypeError, ValueError: As `attention`. RuntimeError: ``cu_seqlens`` decrease or leave the rows.

    Example::

        x = torch.randn(100, 8, 64)
        cu = torch.tensor([0, 30, 30, 100])
        longspan.attention_varlen(x, x, x, cu, cu, causal=True)
    """
    name = "attention_varlen"
    for label, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, label, x)
        check_shape(name, label, x, (None, None, None), "(total, heads, channels)")
    check_integers(name, "cu_seqlens_q", cu_seqlens_q, (None,), "(batch + 1,)")
    check_integers(name, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, "cu_seqlens_q's shape")
    if cu_seqlens_q.shape[0] < 2:
        raise ValueError(
            f"{name}: cu_seqlens_q: expected at least 2 entries, got {cu_seqlens_q.shape[0]}"
        )
    q, k, v = check_attention(name, *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)))
    out, lse = _attend(
        name, q, k, v, None, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, None,
        causal, window, sink_tokens, scale, softcap, dropout_p,
    )  # fmt: skip
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    block_table: Tensor | None = None,
    cache_starts: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of a few new queries over long caches of keys and values; no gradient.

    The cache is read once, in parallel over its length, so a step runs at the memory's bandwidth.
    With ``k_new`` and ``v_new`` the new rows are first written in place.

    Args:
        q: (B, H, T, D), the last T tokens of each sequence.
        k_cache: (B, H_kv, S, D), or pages (n, page, H_kv, D) with ``block_table``.
        v_cache: (B, H_kv, S, D_v), or pages likewise.
        cache_seqlens: (B,) integers: keys to be seen, the new ones included. Query t stands at
            ``cache_seqlens - T + t``.
        k_new: (B, H_kv, T_new, D), written to the slots ``cache_seqlens - T_new`` onwards.
        v_new: (B, H_kv, T_new, D_v).
        cos: (positions, R): rotates the first R channels of q and k_new by their position, counted
            from ``cache_starts``; the halves are repeated, as transformers has them.
        sin: (positions, R).
        interleaved: Rotate channels (2i, 2i + 1) together rather than (i, i + R / 2).
        block_table: (B, pages) integers: which page holds each run of ``page`` keys.
        cache_starts: (B,) integers: first key to be seen, for left-padded batches.
        cache_batch_idx: (B,) integers: the cache's row of each sequence; None is 0, 1, 2, ...
        causal, window, sink_tokens, sinks, scale, softcap, alibi_slopes, return_lse: As in
            `attention`.

    Returns:
        out (B, H, T, D_v); with ``return_lse`` also lse (B, H, T).

    Raises:
        TypeError, ValueError: As `attention`. RuntimeError: a cache is too short, a page is not
        there, or a gradient is asked for.

    Example::

        k_cache, v_cache = torch.zeros(2, 1, 2, 1024, 64)
        q, new = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 1, 64)
        longspan.attention_decode(q, k_cache, v_cache, torch.tensor([1]), k_new=new, v_new=new)
    """
    name = "attention_decode"
    for label, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, label, x)
        check_shape(name, label, x, (None,) * 4, "4 dimensions")
    check_floating(name, "q", q)
    check_like(name, "k_cache", k_cache, "q", q)
    check_like(name, "v_cache", v_cache, "q", q)
    b, h, _, d = q.shape
    heads_at = 1 if block_table is None else 2
    kv_heads = k_cache.shape[heads_at]
    check_shape(name, "k_cache", k_cache, (None, None, None, d), "q's channels last")
    check_shape(name, "v_cache", v_cache, (*k_cache.shape[:3], None), "k_cache's shape but for channels")
    for label, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(
                f"{name}: {label}: expected a last stride of 1, for it is written in place, "
                f"got {x.stride(3)}"
            )
    check_group(name, h, kv_heads)
    check_integers(name, "cache_seqlens", cache_seqlens, (b,), "(batch,)")
    for label, index in (("cache_starts", cache_starts), ("cache_batch_idx", cache_batch_idx)):
        if index is not None:
            check_integers(name, label, index, (b,), "(batch,)")
    if block_table is not None:
        check_integers(name, "block_table", block_table, (b, None), "(batch, pages)")
        if cache_batch_idx is not None:
            raise ValueError(f"{name}: cache_batch_idx: expected None beside block_table")
    elif cache_batch_idx is None and k_cache.shape[0] != b:
        raise ValueError(f"{name}: k_cache: expected q's batch, {b}, got {k_cache.shape[0]}")
    if (k_new is None) != (v_new is None):
        raise ValueError(f"{name}: k_new and v_new: expected both or neither")
    if k_new is not None and v_new is not None:
        check_like(name, "k_new", k_new, "q", q)
        check_like(name, "v_new", v_new, "q", q)
        check_shape(
            name, "k_new", k_new, (b, kv_heads, None, d), "(batch, kv_heads, new tokens, channels)"
        )
        check_shape(
            name, "v_new", v_new, (*k_new.shape[:3], v_cache.shape[3]), "k_new's shape but for channels"
        )
    if (cos is None) != (sin is None):
        raise ValueError(f"{name}: cos and sin: expected both or neither")
    if cos is not None and sin is not None:
        check_floating(name, "cos", cos)
        check_floating(name, "sin", sin)
        check_shape(name, "cos", cos, (None, None), "(positions, rotary channels)")
        check_shape(name, "sin", sin, cos.shape, "cos's shape")
        if cos.shape[1] > d or cos.shape[1] % 2:
            raise ValueError(
                f"{name}: cos: expected an even number of channels up to {d}, got {cos.shape[1]}"
            )
        if cos.dtype != sin.dtype or (cos.dtype == torch.float64) != (q.dtype == torch.float64):
            raise TypeError(
                f"{name}: cos and sin: expected one dtype, float64 with float64 and only then, "
                f"got {cos.dtype} and {sin.dtype} with {q.dtype}"
            )
    left, right = _check_window(name, causal, window)
    check_attention_options(name, q, b, sink_tokens, sinks, alibi_slopes, softcap, 0.0)
    scale = d**-0.5 if scale is None else float(scale)
    if not has_kernels(name, q):
        out, lse = reference.attention_decode(
            q, k_cache, v_cache, cache_seqlens, k_new=k_new, v_new=v_new, cos=cos, sin=sin,
            interleaved=interleaved, block_table=block_table, cache_starts=cache_starts,
            cache_batch_idx=cache_batch_idx, window=(left, right), sink_tokens=sink_tokens, sinks=sinks,
            scale=scale, softcap=softcap, alibi_slopes=alibi_slopes,
        )  # fmt: skip
    else:
        out, lse = _decode(
            q, k_cache, v_cache, cache_seqlens, k_new, v_new, cos, sin, block_table, cache_starts,
            cache_batch_idx, sinks, alibi_slopes, interleaved, left, right, sink_tokens, scale, softcap,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def merge_attention(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys into attention over their union, exactly.

    ``lse = log sum_h exp(lse_h)`` and ``out = sum_h exp(lse_h - lse) out_h`` (SPEC section 0), with
    the greatest log-sum-exp subtracted first. Differentiable. A log-sum-exp includes the learned
    sink, so give ``sinks`` to one part only.

    Args:
        outs: Parts, each (..., T, D), as a sequence or stacked along dimension 0.
        lses: Their log-sum-exps, each (..., T).

    Returns:
        (out, lse) of a part's shape; out in the parts' dtype. Where all parts are empty, 0 and -inf.

    Raises:
        ValueError: No parts, or shapes do not fit.

    Example::

        a, la = longspan.attention(q, k[:, :, :100], v[:, :, :100], return_lse=True)
        b, lb = longspan.attention(q, k[:, :, 100:], v[:, :, 100:], return_lse=True)
        out, lse = longspan.merge_attention([a, b], [la, lb])
    """
    name = "merge_attention"
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"{name}: expected as many outs as lses and at least one, got {len(outs)} and {len(lses)}"
        )
    for i, (part, part_lse) in enumerate(zip(outs, lses)):
        check_floating(name, f"outs[{i}]", part)
        check_shape(name, f"outs[{i}]", part, outs[0].shape, "the shape of outs[0]")
        check_floating(name, f"lses[{i}]", part_lse)
        check_shape(name, f"lses[{i}]", part_lse, part.shape[:-1], "its part's shape but for channels")
    lse = lses if isinstance(lses, Tensor) else torch.stack(tuple(lses))
    out = outs if isinstance(outs, Tensor) else torch.stack(tuple(outs))
    lse = lse.to(torch.float64 if out.dtype == torch.float64 else torch.float32)
    greatest = lse.detach().amax(0)
    greatest = torch.where(greatest == -torch.inf, 0, greatest)
    weight = torch.exp(lse - greatest)
    total = weight.sum(0)
    empty = total == 0
    total = torch.where(empty, 1, total)
    # An empty part's output is 0, but a NaN there must not survive a weight of zero.
    parts = torch.where(weight[..., None] == 0, 0, out.to(lse.dtype))
    merged = (parts * (weight / total)[..., None]).sum(0).to(out.dtype)
    return merged, torch.where(empty, -torch.inf, greatest + torch.log(total))


# ---- from the public arguments to the operator's


def _check_mask(name: str, mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    check_tensor(name, "attn_mask", mask)
    check_device(name, "attn_mask", mask, "q", q)
    if mask.dtype != torch.bool and mask.dtype != q.dtype:
        if mask.dtype == torch.float32 and q.dtype in (torch.bfloat16, torch.float16):
            pass
        elif autocasts(q) and mask.is_floating_point():
            mask = mask.float()
        else:
            raise TypeError(
                f"{name}: attn_mask: expected bool, float32 or q's dtype, {q.dtype}, got {mask.dtype}"
            )
    full = (*q.shape[:3], k.shape[2])
    if mask.dim() > 4 or any(n not in (1, m) for n, m in zip(mask.shape[::-1], full[::-1])):
        raise ValueError(
            f"{name}: attn_mask: expected what broadcasts to {full}, got {tuple(mask.shape)}"
        )
    return mask if mask.dim() == 4 else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)


def _check_window(name: str, causal: bool, window: tuple[int, int]) -> tuple[int, int]:
    if len(window) != 2 or window[0] < -1 or window[1] < -1:
        raise ValueError(f"{name}: window: expected (left, right), each -1 or more, got {window}")
    return int(window[0]), 0 if causal else int(window[1])


def _attend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_ranges: Tensor | None,
    causal: bool,
    window: tuple[int, int],
    sink_tokens: int,
    scale: float | None,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    left, right = _check_window(name, causal, window)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    check_attention_options(name, q, batch, sink_tokens, sinks, alibi_slopes, softcap, dropout_p)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    seed = torch.randint(2**62, (1,)) if dropout_p else None
    if has_kernels(name, q):
        return _forward(
            q, k, v, attn_mask, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, key_ranges, seed,
            left, right, sink_tokens, scale, softcap, dropout_p,
        )  # fmt: skip
    options: dict[str, Any] = {
        "window": (left, right), "sink_tokens": sink_tokens, "sinks": sinks, "scale": scale,
        "softcap": softcap, "dropout_p": dropout_p, "dropout_seed": seed,
    }  # fmt: skip
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return reference.attention(
            q, k, v, attn_mask, alibi_slopes=alibi_slopes, key_ranges=key_ranges, **options
        )
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=sum_dtype(q), device=q.device)
    for b in range(batch):
        rows = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        keys = slice(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        part, part_lse = reference.attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], alibi_slopes=slopes, dropout_batch=b, **options
        )
        out = torch.slice_scatter(out, part, 2, rows.start, rows.stop)
        lse = torch.slice_scatter(lse, part_lse.to(lse.dtype), 2, rows.start, rows.stop)
    return out, lse


# ---- fakes


@torch.library.register_fake("longspan::attention_forward")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=sum_dtype(q))


@torch.library.register_fake("longspan::attention_backward")
def _(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    attn_mask: Tensor | None, sinks: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_sinks = q.new_empty(q.shape[1] if sinks is not None else 0, dtype=torch.float64)
    return *(empty_heads(x, x.shape[3]) for x in (q, k, v)), d_sinks  # type: ignore[return-value]


@torch.library.register_fake("longspan::attention_mask_backward")
def _(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    attn_mask: Tensor, *rest: Any,
) -> Tensor:  # fmt: skip
    return q.new_empty(attn_mask.shape, dtype=sum_dtype(q))


@torch.library.register_fake("longspan::attention_decode")
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(q, v_cache.shape[3]), q.new_empty(q.shape[:3], dtype=sum_dtype(q))


# ---- autograd


class _Attention(OperatorFunction):
    """longspan::attention_forward with its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = below_autograd(_forward, *args)
        q, k, v, mask, sinks, slopes, cu_q, cu_k, ranges, seed, *scalars = args
        ctx.save_for_backward(q, k, v, *output, mask, sinks, slopes, cu_q, cu_k, ranges, seed)
        ctx.scalars = scalars
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, d_lse = gradients
        q, k, v, out, lse, mask, sinks, *rest = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        arguments = (d_out, d_lse, q, k, v, out, lse, mask, sinks, *rest, *ctx.scalars)
        dq = dk = dv = d_mask = d_sinks = None
        if any(ctx.needs_input_grad[i] for i in (0, 1, 2, 4)):
            dq, dk, dv, d_sinks = _backward(*arguments)
            d_sinks = d_sinks.to(sinks.dtype) if sinks is not None else None
        if ctx.needs_input_grad[3]:
            d_mask = _mask_backward(*arguments).to(mask.dtype)
        return dq, dk, dv, d_mask, d_sinks, *([None] * 11)


register_autograd("attention_forward", _Attention)
register_once_differentiable("attention_backward")
register_once_differentiable("attention_mask_backward")
register_not_differentiable("attention_decode", "decoding has no gradient; use attention, or no_grad")
