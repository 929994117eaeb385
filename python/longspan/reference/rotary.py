"""Rotary position embedding."""

import torch
from torch import Tensor


def token_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Each packed token's position in its sequence, (tokens,)."""
    at = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)
    return at - cu_seqlens[sequence]


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, positions: Tensor | None = None
) -> Tensor:
    """x (B, H, T, D) by the angles of ``cos`` and ``sin``, in float32, or float64 for float64.

    These are (T, R) or (1 or B, T, R), or tables (max_position, R) with positions (T,) or (B, T).
    """
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = cos.shape[-1] // 2
    cos, sin = (y[..., :half].to(dtype) for y in (cos, sin))
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        out = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([out.to(x.dtype), rest], dim=-1)
