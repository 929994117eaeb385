"""FAVOR+, one feature after the other, and the attention that it stands for with all its weights."""

from collections.abc import Callable

import torch
from torch import Tensor


def favor_features(
    x: Tensor,
    projection: Tensor,
    *,
    kind: str | Callable[[Tensor], Tensor] = "positive",
    scale: float | None = None,
    eps: float = 0.0,
    shift: Tensor | float = 0.0,
) -> Tensor:
    """x (..., D), projection (m, D) -> (..., m or 2 m); ``shift`` is taken from the exponents."""
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    x = x * scale**0.5
    half = (x * x).sum(-1) / 2
    features = []
    for w in projection.to(x.dtype):
        along = (x * w).sum(-1)
        if kind == "positive":
            features.append([torch.exp(along - half - shift)])
        elif kind == "hyperbolic":
            features.append([torch.exp(sign * along - half - shift) for sign in (1, -1)])
        elif kind == "trigonometric":
            features.append([torch.exp(half - shift) * wave(along) for wave in (torch.sin, torch.cos)])
        else:
            assert callable(kind)
            features.append([kind(along)])
    columns = [feature for group in zip(*features) for feature in group]
    # Only hyperbolic features are two estimates for each direction; sin^2 + cos^2 is one.
    count = len(columns) if kind == "hyperbolic" else len(features)
    return (torch.stack(columns, dim=-1) + eps) / count**0.5


def performer_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Features q and k (B, H, T, m), v (B, H, T, V) -> (B, H, T, V), through all weights at once."""
    weights = q @ k.transpose(-1, -2)
    weights = weights.tril() if causal else weights
    return (weights / weights.sum(-1, keepdim=True)) @ v
