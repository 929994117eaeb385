"""What sparse self-attention shares: masks made once, a base of layers, Longformer's two softmaxes.

For `longspan.nn`'s layers and, through `longspan.hf`, for transformers'.
"""

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.ops._checks import (
    autocasts,
    check_bool,
    check_floating,
    check_positive,
    check_shape,
    check_tensor,
)
from longspan.ops.attention import attention
from longspan.ops.block_sparse import block_sparse_attention
from longspan.patterns import BlockMask, longformer

Flags = tuple[int, int, tuple[int, ...]]
"""A bool (rows, tokens) as something that can be compared: its shape, and eight tokens a number."""


def flags(mask: Tensor) -> Flags:
    """``mask`` (rows, tokens); one row where all are equal, however many there were."""
    rows = mask[:1] if bool((mask == mask[:1]).all()) else mask
    words = F.pad(rows.cpu().to(torch.uint8), (0, -rows.shape[1] % 8)).view(torch.int64)
    return rows.shape[0], rows.shape[1], tuple(words.flatten().tolist())


def tensor_of(flags: Flags) -> Tensor:
    """Back to bool (rows, tokens)."""
    rows, tokens, words = flags
    return torch.tensor(words).view(torch.uint8).view(rows, -1)[:, :tokens].bool()


def cached_mask(
    make: Callable[..., BlockMask], *options: Hashable, key_mask: Tensor | None = None
) -> BlockMask:
    """``make(*options)``, without the keys where ``key_mask`` (B, T) is False; layers share it.

    Masks are made at the first call and kept by their content: a model's layers, and all batches of
    one length without padding, make one.
    """
    padded = key_mask is not None and not bool(key_mask.all())
    return _made(make, options, flags(key_mask) if padded and key_mask is not None else None)


@lru_cache(128)
def _made(make: Callable[..., BlockMask], options: Any, padding: Flags | None) -> BlockMask:
    if padding is None:
        return make(*options)
    return _made(make, options, None).hide_keys(tensor_of(padding))


def longformer_by_row(
    tokens: int, window: int, dilation: int, causal: bool, is_global: Flags | None
) -> BlockMask:
    """`longspan.patterns.longformer` with global tokens of their own in each row of the batch.

    Global tokens' own rows have the window alone: they have projections of their own.
    """
    where = [torch.empty(0, dtype=torch.int64)]
    if is_global is not None:
        where = [row.nonzero().flatten() for row in tensor_of(is_global)]
    each = [
        longformer(
            tokens, window=window, global_tokens=row, dilation=dilation, causal=causal,
            global_queries=False,
        )
        for row in where
    ]  # fmt: skip
    return each[0] if len(each) == 1 else BlockMask.stack(each)


def longformer_mask(
    tokens: int,
    window: int,
    is_global: Tensor | None,
    key_mask: Tensor | None,
    dilation: int = 1,
    causal: bool = False,
) -> BlockMask:
    """`longformer_by_row` from the flags (B, T) of a call."""
    if is_global is not None and key_mask is not None:
        is_global = is_global & key_mask
    where = None if is_global is None or not bool(is_global.any()) else flags(is_global)
    options = (tokens, window, dilation, causal, where)
    return cached_mask(longformer_by_row, *options, key_mask=key_mask)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H * D) -> (B, H, T, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H * D)."""
    return x.transpose(1, 2).flatten(2)


def without_padding(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """x (B, T, C), 0 where ``key_mask`` (B, T) is False."""
    return x if key_mask is None else torch.where(key_mask[..., None], x, 0)


class SelfAttention(nn.Module):
    """What sparse layers share: heads, and padding."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        check_positive(name, "hidden_size", hidden_size)
        check_positive(name, "num_heads", num_heads)
        if head_dim is not None:
            check_positive(name, "head_dim", head_dim)
        elif hidden_size % num_heads:
            raise ValueError(
                f"{name}: hidden_size: expected a multiple of num_heads, {num_heads}, got {hidden_size}"
            )
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim

    def _check(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """x, with zeros for padding: whatever it holds reaches no product."""
        name = type(self).__name__
        check_tensor(name, "x", x)
        check_floating(name, "x", x)
        check_shape(name, "x", x, (None, None, self.hidden_size), "(batch, tokens, hidden_size)")
        if key_mask is None:
            return x
        self._check_bool("key_mask", key_mask, x)
        return without_padding(x, key_mask)

    def _check_bool(self, label: str, mask: Tensor, x: Tensor) -> None:
        check_bool(type(self).__name__, label, mask, x.shape[:2], "(batch, tokens)")

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, key_mask: Tensor | None
    ) -> Tensor:
        """Of projected rows (B, T, H * D), 0 for padding, which ``mask`` hides."""
        q, k, v = (split_heads(x, self.num_heads) for x in (q, k, v))
        return without_padding(merge_heads(block_sparse_attention(q, k, v, mask)), key_mask)


def longformer_attention(
    layer: Any,
    x: Tensor,
    heads: int,
    mask: BlockMask,
    *,
    is_global: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Longformer's self-attention by ``layer``'s six projections, longspan's own or transformers'.

    Args:
        layer: Has query, key, value, query_global, key_global and value_global.
        x: (B, T, C), 0 in padding.
        heads: H.
        mask: `longformer_mask`'s, of the same flags.
        is_global: (B, T) bool; padding is never global.
        key_mask: (B, T) bool, False for padding; None where there is none.
        causal: Whether global tokens see no later ones.
        dropout_p: Of the weights.

    Returns:
        (B, T, C), 0 in padding.
    """
    if is_global is not None and key_mask is not None:
        is_global = is_global & key_mask
    q, k, v = (split_heads(p(x), heads) for p in (layer.query, layer.key, layer.value))
    out = merge_heads(block_sparse_attention(q, k, v, mask, dropout_p=dropout_p))
    out = without_padding(out, key_mask)
    if is_global is None or not bool(is_global.any()):
        return out
    count = is_global.sum(1)
    most = int(count.max())
    # Positions of each row's global tokens; shorter lists are filled up with other tokens.
    index = is_global.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    batch = torch.arange(len(x), device=x.device)[:, None].expand_as(index)
    seen = None if key_mask is None else key_mask[:, None, None]
    if causal:
        before = index[:, None, :, None] >= torch.arange(x.shape[1], device=x.device)
        seen = before if seen is None else seen & before
    q = split_heads(layer.query_global(x[batch, index]), heads)
    found = _global_attention(layer, q, x, seen, dropout_p)
    chosen = torch.arange(most, device=x.device) < count[:, None]
    return out.index_put((batch[chosen], index[chosen]), found[chosen].to(out.dtype))


def _global_attention(layer: Any, q: Tensor, x: Tensor, seen: Tensor | None, dropout_p: float) -> Tensor:
    """Of q (B, H, n, D) to key_global(x) and value_global(x); (B, n, H * D).

    Few queries do without those projections of every token: with K = x W' + b, q K' is (q W) x' + q b',
    and P V is (P x) W' + P b, in 2 n H / C of the work. In halves the products would be rounded in
    other places, so there, and where the projections are more than a matrix, they are made.
    """
    heads, queries = q.shape[1], q.shape[2]
    key, value = layer.key_global, layer.value_global
    exact = x.dtype in (torch.float32, torch.float64) and not autocasts(x)
    if not exact or 2 * heads * queries > x.shape[2] or not (_plain(key) and _plain(value)):
        k, v = split_heads(key(x), heads), split_heads(value(x), heads)
        return merge_heads(attention(q, k, v, seen, dropout_p=dropout_p))
    q = q * q.shape[3] ** -0.5
    turned = q @ key.weight.unflatten(0, (heads, -1))  # (B, H, n, C)
    score = (turned.flatten(1, 2) @ x.transpose(1, 2)).unflatten(1, (heads, queries))
    if key.bias is not None:
        score = score + (q * key.bias.view(heads, 1, -1)).sum(-1, keepdim=True)
    if seen is not None:
        score = score.masked_fill(~seen, torch.finfo(score.dtype).min)
    weight = F.dropout(score.softmax(-1), dropout_p)  # (B, H, n, T)
    mixed = (weight.flatten(1, 2) @ x).unflatten(1, (heads, queries))
    out = mixed @ value.weight.unflatten(0, (heads, -1)).transpose(1, 2)
    if value.bias is not None:
        out = out + weight.sum(-1, keepdim=True) * value.bias.view(heads, 1, -1)
    return merge_heads(out)


def _plain(projection: nn.Module) -> bool:
    """Whether its weight and bias say all: not quantised, adapted, offloaded or hooked."""
    hooks = projection._forward_hooks or projection._forward_pre_hooks or projection._backward_hooks
    return type(projection) is nn.Linear and not hooks and "forward" not in vars(projection)
