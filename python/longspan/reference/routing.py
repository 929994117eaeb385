"""Routing attention, densely: which tokens are in which clusters, and a softmax in each."""

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(x: Tensor, centroids: Tensor) -> Tensor:
    """(B, H, C, T): centroids with vectors on the unit sphere."""
    y = x.double()
    y = y - y.mean(-1, keepdim=True)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-5) / x.shape[3] ** 0.5
    return centroids.double() @ y.transpose(2, 3)


def members(score: Tensor, window_size: int | None, key_mask: Tensor | None = None) -> Tensor:
    """Bool (B, H, C, T): the best ``window_size`` of each cluster, or each token in its best cluster."""
    if window_size is None:
        chosen = F.one_hot(score.argmax(2), score.shape[2]).bool().transpose(2, 3)
    else:
        if key_mask is not None:
            score = score.masked_fill(~key_mask[:, None, None], -torch.inf)
        best = score.topk(min(window_size, score.shape[3]), dim=-1).indices
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
    return chosen if key_mask is None else chosen & key_mask[:, None, None]


def routing_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    causal: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Of q, k, v (B, H, T, D) with members (B, H, C, T); in float32, or float64 for float64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    t, y = q.shape[2], q.to(dtype)
    shared = k is None
    key = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-6) if k is None else k.to(dtype)
    score = (y @ key.transpose(-1, -2) * scale)[:, :, None]
    seen = queries[..., :, None] & keys[..., None, :]  # (B, H, C, T, T)
    itself = torch.eye(t, dtype=torch.bool)
    if causal:
        seen = seen & torch.ones(t, t, dtype=torch.bool).tril()
    if shared:
        others = seen & ~itself
        seen = others | (seen & itself & ~others.any(-1, keepdim=True))
    weight = torch.where(seen, score, -torch.inf).softmax(-1)
    weight = torch.where(seen, weight, 0)
    counts = seen.any(-1).sum(2).clamp(min=1)  # (B, H, T)
    return ((weight.sum(2) @ v.to(dtype)) / counts[..., None]).to(q.dtype)
