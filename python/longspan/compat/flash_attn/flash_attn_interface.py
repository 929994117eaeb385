"""flash-attn 2's attention functions; the package's docstring lists what differs from flash-attn."""

from typing import Any

import torch
from torch import Tensor

from longspan.ops._checks import check_floating, check_integers, check_like, check_shape, check_tensor
from longspan.ops.attention import attention, attention_decode, attention_varlen
from longspan.reference.attention import rotate


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Exact attention (FlashAttention-2, Dao 2023) in flash-attn's layout; differentiable.

    Args:
        q: (B, T_q, H, D), float32, float64, bfloat16 or float16, any strides; nothing is copied.
        k: (B, T_k, H_kv, D); H is a multiple of H_kv, query head h reads h // (H / H_kv).
        v: (B, T_k, H_kv, D_v).
        dropout_p: Probability in [0, 1) of dropping a weight; pass 0 in evaluation.
        softmax_scale: Of the scores; None is D ** -0.5.
        causal: Aligned to the bottom right: query i sees keys up to i + T_k - T_q.
        window_size: (left, right) keys around i + T_k - T_q, inclusive; -1 is no bound.
        softcap: c > 0 replaces a score x by c * tanh(x / c); 0 is off.
        alibi_slopes: (H,) or (B, H); ``slope * |i + T_k - T_q - j|`` is subtracted after softcap.
        deterministic: Both values give the same bits, for any number of threads.
        return_attn_probs: Return a triple.

    Returns:
        out (B, T_q, H, D_v), contiguous for a contiguous q; 0 where a query sees no key. With
        ``return_attn_probs`` (out, softmax_lse (B, H, T_q) in float32 or for float64 in float64,
        S_dmask of shape (0,)).

    Raises:
        TypeError, ValueError: As `longspan.attention`.

    Example::

        q, k, v = torch.randn(2, 128, 8, 64), torch.randn(2, 128, 2, 64), torch.randn(2, 128, 2, 64)
        out = flash_attn_func(q, k, v, causal=True, window_size=(63, 0))  # (2, 128, 8, 64)
    """
    _check_rows("flash_attn_func", q, k, v, "(batch, tokens, heads, channels)")
    out, lse = attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal, window=window_size,
        scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p,
        return_lse=True,
    )  # fmt: skip
    return _result(out.transpose(1, 2), lse, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with k and v in one tensor.

    Args:
        q: (B, T_q, H, D).
        kv: (B, T_k, 2, H_kv, D).
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: As in `flash_attn_func`.

    Returns, Raises:
        As `flash_attn_func`.

    Example::

        out = flash_attn_kvpacked_func(torch.randn(2, 16, 8, 64), torch.randn(2, 16, 2, 4, 64))
    """
    k, v = _unpack("flash_attn_kvpacked_func", "kv", kv, 2, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with q, k and v in one tensor.

    Args:
        qkv: (B, T, 3, H, D).
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: As in `flash_attn_func`.

    Returns, Raises:
        As `flash_attn_func`.

    Example::

        out = flash_attn_qkvpacked_func(torch.randn(2, 16, 3, 8, 64), causal=True)  # (2, 16, 8, 64)
    """
    q, k, v = _unpack("flash_attn_qkvpacked_func", "qkv", qkv, 3, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`flash_attn_func` over sequences packed one after the other; differentiable.

    Args:
        q: (total_q, H, D).
        k: (total_k, H_kv, D), or pages (n, page, H_kv, D) with ``block_table``.
        v: (total_k, H_kv, D_v), or pages likewise.
        cu_seqlens_q: (B + 1,) int32 or int64: where each sequence begins, and the end. A sequence may
            be empty.
        cu_seqlens_k: (B + 1,), likewise for keys; with pages it gives the lengths alone.
        max_seqlen_q: The greatest length of queries; only sizes a launch in flash-attn, not used here.
        max_seqlen_k: The greatest length of keys; likewise.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: As in `flash_attn_func`, within each sequence.
        block_table: (B, pages) int32 or int64: which page holds each run of ``page`` keys of a sequence.
            The keys and values in use are gathered into a copy of size (total_k, H_kv, D).

    Returns:
        out (total_q, H, D_v); with ``return_attn_probs`` (out, softmax_lse (H, total_q), S_dmask (0,)).

    Raises:
        TypeError, ValueError: As `longspan.attention_varlen`; also where ``block_table`` has too few
        pages for a length, or names a page that is not there.

    Example::

        x, cu = torch.randn(100, 8, 64), torch.tensor([0, 30, 100], dtype=torch.int32)
        out = flash_attn_varlen_func(x, x, x, cu, cu, 70, 70, causal=True)
    """
    name = "flash_attn_varlen_func"
    if block_table is not None:
        check_tensor(name, "q", q)
        for label, pages in (("k", k), ("v", v)):
            check_like(name, label, pages, "q", q)
            check_shape(
                name, label, pages, (None,) * 4, "(n, page, kv_heads, channels) beside block_table"
            )
        check_shape(name, "v", v, (*k.shape[:3], None), "k's shape but for channels")
        rows = _rows_of_pages(name, cu_seqlens_k, block_table, k.shape[0], k.shape[1])
        k, v = (x.flatten(0, 1).index_select(0, rows) for x in (k, v))
        cu_seqlens_k = cu_seqlens_k - cu_seqlens_k[0]
    _check_rows(name, q, k, v, "(total, heads, channels)")
    out, lse = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, window=window_size, scale=softmax_scale,
        softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p, return_lse=True,
    )  # fmt: skip
    return _result(out, lse, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with k and v in one tensor.

    Args:
        q: (total_q, H, D).
        kv: (total_k, 2, H_kv, D).
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
            window_size, softcap, alibi_slopes, deterministic, return_attn_probs: As in
            `flash_attn_varlen_func`.

    Returns, Raises:
        As `flash_attn_varlen_func`.

    Example::

        cu = torch.tensor([0, 30, 100], dtype=torch.int32)
        out = flash_attn_varlen_kvpacked_func(
            torch.randn(100, 8, 64), torch.randn(100, 2, 4, 64), cu, cu, 70, 70
        )
    """
    k, v = _unpack("flash_attn_varlen_kvpacked_func", "kv", kv, 2, 1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with q, k and v in one tensor.

    Args:
        qkv: (total, 3, H, D).
        cu_seqlens: (B + 1,) int32 or int64.
        max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: As in `flash_attn_varlen_func`.

    Returns, Raises:
        As `flash_attn_varlen_func`.

    Example::

        cu = torch.tensor([0, 30, 100], dtype=torch.int32)
        out = flash_attn_varlen_qkvpacked_func(torch.randn(100, 3, 8, 64), cu, 70, causal=True)
    """
    q, k, v = _unpack("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 3, 1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of new queries over a cache that is first extended in place; no gradient.

    Args:
        q: (B, T_q, H, D).
        k_cache: (B_cache, S, H_kv, D), or pages (n, page, H_kv, D) with ``block_table``. Read where it
            lies; its last stride is 1.
        v_cache: (B_cache, S, H_kv, D_v), or pages likewise.
        k: (B, T_new, H_kv, D), written in place to the slots ``cache_seqlens`` onwards.
        v: (B, T_new, H_kv, D_v).
        rotary_cos: (seqlen_ro, R / 2), any floating dtype: rotates the first R channels of k by the slot
            it is written to, and of q: token t by ``cache_seqlens + t`` if ``causal`` or a window is
            set, else every token by ``cache_seqlens``. Needs k.
        rotary_sin: (seqlen_ro, R / 2).
        cache_seqlens: int or (B,) int32 or int64: slots in use before this call, left padding included.
            None is all of them, and then k must be None.
        cache_batch_idx: (B,) int32 or int64: the cache's row of each sequence; None is 0, 1, 2, ... Not
            beside ``block_table``. Rows may repeat as long as k is None.
        cache_leftpad: (B,) int32 or int64: the first slot to be seen; None is 0.
        block_table: (B, pages) int32 or int64: which page holds each run of ``page`` slots.
        softmax_scale, causal, window_size, softcap, alibi_slopes: As in `flash_attn_func`, where T_k
            ends with the last slot in use, k's included.
        rotary_interleaved: Rotate channels (2i, 2i + 1) together (GPT-J); False is (i, i + R / 2), as
            Llama in transformers has them. The default is flash-attn's.
        num_splits: How flash-attn cuts the keys. The result here does not depend on it.
        return_softmax_lse: Also return the log-sum-exp.

    Returns:
        out (B, T_q, H, D_v); with ``return_softmax_lse`` (out, softmax_lse (B, H, T_q)).

    Raises:
        TypeError, ValueError: A dtype, shape or combination does not fit. RuntimeError: the cache is
        too short, a page is not there, or a gradient is asked for. Nothing has been written then.

    Example::

        k_cache, v_cache = torch.zeros(2, 2, 1024, 4, 64)
        q, new = torch.randn(2, 1, 8, 64), torch.randn(2, 1, 4, 64)
        with torch.no_grad():
            out = flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=0, causal=True)
    """
    name = "flash_attn_with_kvcache"
    check_tensor(name, "q", q)
    check_floating(name, "q", q)
    check_shape(name, "q", q, (None,) * 4, "(batch, tokens, heads, channels)")
    batch, channels = q.shape[0], q.shape[3]
    for label, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_like(name, label, x, "q", q)
    paged = block_table is not None
    layout = "(pages, slots, kv_heads, channels)" if paged else "(batch, slots, kv_heads, channels)"
    check_shape(name, "k_cache", k_cache, (None, None, None, channels), f"{layout}, q's channels")
    check_shape(name, "v_cache", v_cache, (*k_cache.shape[:3], None), "k_cache's shape but for channels")
    if block_table is not None:
        check_integers(name, "block_table", block_table, (batch, None), "(batch, pages)")
    if (k is None) != (v is None):
        raise ValueError(f"{name}: k and v: expected both or neither")
    if k is not None and v is not None:
        if cache_seqlens is None:
            raise ValueError(f"{name}: cache_seqlens: expected an int or (batch,) beside k, got None")
        check_like(name, "k", k, "q", q)
        check_shape(
            name,
            "k",
            k,
            (batch, None, k_cache.shape[2], channels),
            "(batch, new tokens, kv_heads, channels)",
        )
        check_like(name, "v", v, "q", q)
        check_shape(name, "v", v, (*k.shape[:3], v_cache.shape[3]), "k's shape but for channels")
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    check_integers(name, "cache_seqlens", cache_seqlens, (batch,), "an int or (batch,)")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{name}: rotary_cos and rotary_sin: expected both or neither")
    if rotary_cos is not None and rotary_sin is not None:
        if k is None:
            raise ValueError(f"{name}: rotary_cos: expected k and v beside it, got None")
        _check_rotary(name, rotary_cos, rotary_sin, channels)
        per_token = causal or tuple(window_size) != (-1, -1)
        angles = (rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved)
        q = _rotate(name, q, *angles, per_token)
        k = _rotate(name, k, *angles, True)
    out, lse = attention_decode(
        q.transpose(1, 2),
        k_cache if paged else k_cache.transpose(1, 2),
        v_cache if paged else v_cache.transpose(1, 2),
        cache_seqlens if k is None else cache_seqlens + k.shape[1],
        k_new=None if k is None else k.transpose(1, 2),
        v_new=None if v is None else v.transpose(1, 2),
        block_table=block_table,
        cache_starts=cache_leftpad,
        cache_batch_idx=cache_batch_idx,
        causal=causal,
        window=window_size,
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    return (out.transpose(1, 2), lse) if return_softmax_lse else out.transpose(1, 2)


def _result(out: Tensor, lse: Tensor, return_attn_probs: bool) -> Any:
    return (out, lse, out.new_empty(0)) if return_attn_probs else out


def _unpack(name: str, label: str, x: Tensor, count: int, dim: int) -> tuple[Tensor, ...]:
    check_tensor(name, label, x)
    layout = ("batch", "tokens") if dim == 2 else ("total",)
    what = ", ".join((*layout, str(count), "heads", "channels"))
    check_shape(name, label, x, (*[None] * dim, count, None, None), f"({what})")
    return x.unbind(dim)


def _check_rows(name: str, q: Tensor, k: Tensor, v: Tensor, what: str) -> None:
    """In the caller's layout, so that an error shows the shapes that the caller passed."""
    for label, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, label, x)
    check_floating(name, "q", q)
    free = (None,) * (what.count(",") - 1)
    check_shape(name, "q", q, (*free, None, None), what)
    batch = q.shape[:1] if len(free) == 2 else ()
    check_like(name, "k", k, "q", q)
    check_shape(name, "k", k, (*batch, None, None, q.shape[-1]), f"{what} as q has them")
    check_like(name, "v", v, "q", q)
    check_shape(name, "v", v, (*k.shape[:-1], None), "k's shape but for channels")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{name}: k: expected a number of heads that divides q's, {q.shape[-2]}, got {k.shape[-2]}"
        )


def _rows_of_pages(name: str, cu_seqlens: Tensor, block_table: Tensor, count: int, page: int) -> Tensor:
    """Where each key of the packed sequences lies in the flattened pages, (total_k,)."""
    check_integers(name, "cu_seqlens_k", cu_seqlens, (None,), "(batch + 1,)")
    lengths = cu_seqlens.diff().long()
    check_integers(name, "block_table", block_table, (len(lengths), None), "(batch, pages)")
    if len(lengths) and int(lengths.min()) < 0:
        raise ValueError(f"{name}: cu_seqlens_k: expected no decrease, got {cu_seqlens.tolist()}")
    if len(lengths) and (longest := int(lengths.max())) > block_table.shape[1] * page:
        raise ValueError(
            f"{name}: block_table: expected pages for {longest} keys, "
            f"got {block_table.shape[1]} of {page}"
        )
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    position = (
        torch.arange(len(sequence), device=lengths.device) - (cu_seqlens - cu_seqlens[0])[sequence]
    )
    pages = block_table.long()[sequence, position // page]
    if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < count:
        raise ValueError(
            f"{name}: block_table: expected pages from 0 to {count - 1}, got {int(pages.min())} to "
            f"{int(pages.max())}"
        )
    return pages * page + position % page


def _check_rotary(name: str, cos: Tensor, sin: Tensor, channels: int) -> None:
    for label, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_tensor(name, label, x)
        check_floating(name, label, x)
    check_shape(name, "rotary_cos", cos, (None, None), "(positions, rotary channels / 2)")
    check_shape(name, "rotary_sin", sin, cos.shape, "rotary_cos's shape")
    if 2 * cos.shape[1] > channels:
        raise ValueError(
            f"{name}: rotary_cos: expected at most half of q's {channels} channels, got {cos.shape[1]}"
        )


def _rotate(
    name: str, x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, interleaved: bool, per_token: bool
) -> Tensor:
    """x (B, T, H, D) rotated by position ``start`` (B,), or ``start + t``.

    Not by the kernel: it counts positions from the first visible slot, flash-attn from slot 0.
    """
    tokens = x.shape[1]
    at = start.long()[:, None] + (torch.arange(tokens, device=x.device) if per_token else 0)
    if at.numel() and int(at.max()) >= len(cos):
        raise ValueError(
            f"{name}: rotary_cos: expected at least {int(at.max()) + 1} positions, got {len(cos)}"
        )
    # halves repeated, (B, T or 1, 1, R)
    return rotate(
        x, cos[at].repeat(1, 1, 2).unsqueeze(2), sin[at].repeat(1, 1, 2).unsqueeze(2), interleaved
    )
