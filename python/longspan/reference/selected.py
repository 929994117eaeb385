"""Attention over the blocks that each query names, densely, and how Native Sparse Attention chooses."""

import torch
from torch import Tensor

from longspan.reference.attention import attention


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cache_seqlens: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """-> (out, lse): the blocks written out as a mask."""
    tokens, keys = q.shape[2], k.shape[2]
    blocks = -(-keys // block_size)
    named = (block_indices[..., None] == torch.arange(blocks, device=q.device)).any(-2)
    seen = named.repeat_interleave(block_size, -1)[..., :keys]
    seen = seen.repeat_interleave(q.shape[1] // seen.shape[1], 1)
    end = torch.full((q.shape[0],), keys) if cache_seqlens is None else cache_seqlens
    end = end.to(q.device)[:, None, None, None]
    at = torch.arange(tokens, device=q.device)[:, None] + end - tokens
    key = torch.arange(keys, device=q.device)
    seen = seen & (key < end) & ((key <= at) | (not causal))
    return attention(q, k, v, seen, scale=scale)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor | None,
    cache_seqlens: Tensor | None,
    counts: Tensor | None,
    keys: int,
    length: int,
    stride: int,
    block_size: int,
    count: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (B, H_kv, T, count), ascending, then -1; and attention to the compressed keys, (out, lse)."""
    b, h, tokens, _ = q.shape
    kv_heads, compressed = k_cmp.shape[1:3]
    blocks = -(-keys // block_size)
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    score = (q.to(sums) * scale) @ k_cmp.to(sums).repeat_interleave(h // kv_heads, 1).transpose(-1, -2)
    end = torch.full((b,), keys) if cache_seqlens is None else cache_seqlens
    end = end.to(q.device)[:, None, None, None]
    at = torch.arange(tokens, device=q.device)[:, None] + end - tokens  # (B, 1, T, 1)
    starts = torch.arange(compressed, device=q.device) * stride
    hidden = (starts + length - 1 > at) & causal
    score = score.masked_fill(hidden, -torch.inf)
    out = lse = score.new_empty(0)
    if v_cmp is not None:
        out, lse = attention(q, k_cmp, v_cmp, ~hidden, scale=scale)
    probability = torch.softmax(score, -1).nan_to_num(0)
    probability = probability.unflatten(1, (kv_heads, -1)).sum(2)
    low = torch.arange(blocks, device=q.device) * block_size
    begin = torch.maximum(starts[:, None], low)
    overlap = (torch.minimum(starts[:, None] + length, low + block_size) - begin).clamp(min=0)
    score = probability @ (overlap / stride).to(sums)
    block = torch.arange(blocks, device=q.device)
    last = torch.minimum(end - 1, at) if causal else end - 1
    own = torch.minimum(at, end - 1).div(block_size, rounding_mode="floor")
    for forced, rank in ((own, 5), (own - 1, 4), (torch.zeros_like(own), 3)):  # first of them first
        great = torch.finfo(sums).max ** (rank / 6)
        score = torch.where((block == forced) & (score < 1e3 * h), great, score)
    score = torch.where((block * block_size <= last) & (at >= 0), score, -torch.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    used = score.gather(-1, order) > -torch.inf
    if counts is not None:
        used &= torch.arange(order.shape[-1], device=q.device) < counts[..., None]
    order = torch.where(used, order, blocks)
    order = torch.nn.functional.pad(order, (0, count - order.shape[-1]), value=blocks).sort(-1).values
    return torch.where(order == blocks, -1, order), out, lse
