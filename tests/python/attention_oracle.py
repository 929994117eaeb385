"""Attention for the tests: inputs, the reference in double, and plain torch in any precision."""

from typing import Any

import torch
from torch import Tensor

import longspan
from longspan import reference

Options = dict[str, Any]


def heads(
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    keys: int,
    channels: int,
    value_channels: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """q, k and v of normal numbers, from torch's generator."""
    value_channels = channels if value_channels is None else value_channels
    return {
        "q": torch.randn(batch, heads, tokens, channels, dtype=torch.float64).to(dtype),
        "k": torch.randn(batch, kv_heads, keys, channels, dtype=torch.float64).to(dtype),
        "v": torch.randn(batch, kv_heads, keys, value_channels, dtype=torch.float64).to(dtype),
    }


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    causal: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`longspan.attention` with its log-sum-exp, by the dense reference in the tensors' own dtype."""
    left, right = options.pop("window", (-1, -1))
    scale = options.pop("scale", None)
    return reference.attention.attention(
        q, k, v, attn_mask,
        window=(left, 0 if causal else right),
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        **options,
    )  # fmt: skip


def actual(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    return longspan.attention(q, k, v, attn_mask, return_lse=True, **options)


def visible(tokens: int, keys: int, *, causal: bool = False, **options: Any) -> Tensor:
    """Bool (B or 1, tokens, keys): the part of the visibility rule that is not a mask."""
    left, right = options.get("window", (-1, -1))
    return reference.attention.visible_keys(
        tokens, keys, window=(left, 0 if causal else right),
        sink_tokens=options.get("sink_tokens", 0), key_ranges=options.get("key_ranges"),
    )  # fmt: skip


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    **rule: Any,
) -> Tensor:
    """What anybody would write in torch: every product and sum in the tensors' own precision."""
    tokens, keys = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    score = (q * q.shape[3] ** -0.5) @ k.transpose(-1, -2)
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if alibi_slopes is not None:
        distance = torch.arange(tokens)[:, None] + keys - tokens - torch.arange(keys)
        score = score - alibi_slopes.to(q.dtype)[:, None, None] * distance.abs()
    if attn_mask is not None:
        score = score + attn_mask.to(q.dtype)
    score = score.masked_fill(~visible(tokens, keys, **rule)[:, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(q.dtype)[:, None, None].expand(*score.shape[:3], 1)
        return torch.softmax(torch.cat([score, sink], -1), -1)[..., :-1] @ v
    return torch.softmax(score, -1) @ v
