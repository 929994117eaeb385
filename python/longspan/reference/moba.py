"""Mixture of Block Attention, densely: the gate's choice written out as a mask."""

import torch
from torch import Tensor

from longspan.reference.attention import attention


def chosen_blocks(q: Tensor, k: Tensor, block_size: int, topk: int, causal: bool) -> Tensor:
    """-> bool (B, H, T_q, blocks): the own block and the best others."""
    (_, h, tokens, _), keys = q.shape, k.shape[2]
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    means = torch.stack([x.mean(2, dtype=sums) for x in k.split(block_size, 2)], 2)
    score = q.to(sums) @ means.repeat_interleave(h // k.shape[1], 1).transpose(-1, -2)
    own = (torch.arange(keys - tokens, keys, device=q.device) // block_size)[:, None]
    block = torch.arange(score.shape[-1], device=q.device)
    score = torch.where((block > own) & causal, -torch.inf, score)
    score = torch.where(block == own, torch.inf, score)
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True) & (score > -torch.inf)


def mixture_of_block_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, topk: int, causal: bool, scale: float
) -> Tensor:
    """-> out (B, H, T_q, D_v), with H a multiple of k's heads."""
    keys = k.shape[2]
    chosen = chosen_blocks(q.detach(), k.detach(), block_size, topk, causal)
    seen = chosen.repeat_interleave(block_size, -1)[..., :keys]
    right = 0 if causal else -1
    return attention(q, k, v, seen, window=(-1, right), scale=scale)[0]
