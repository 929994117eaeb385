"""Exact attention, densely: everything of size tokens x keys is written out."""

import math

import torch
from torch import Tensor


def visible_keys(
    tokens: int,
    keys: int,
    *,
    window: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    key_ranges: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which keys each query may see: bool (B or 1, tokens, keys). ``key_ranges`` as in `attention`."""
    if key_ranges is None:
        key_ranges = torch.tensor([[0, keys, keys - tokens]], device=device)
    first, end, offset = (key_ranges.long()[:, i, None, None].to(device) for i in range(3))
    key = torch.arange(keys, device=device)
    distance = key - torch.arange(tokens, device=device)[:, None] - offset
    seen = (key >= first) & (key < end)
    if window[1] >= 0:
        seen = seen & (distance <= window[1])
    if window[0] >= 0:
        seen = seen & ((distance >= -window[0]) | (key < first + sink_tokens))
    return seen.expand(-1, tokens, keys)


def dropout_factors(
    seed: Tensor, shape: tuple[int, int, int, int], p: float, first_batch: int = 0
) -> Tensor:
    """0 or 1 / (1 - p), (B, H, tokens, keys): Threefry-2x32 as in csrc/kernels/random.h.

    The first row of the batch draws what sequence ``first_batch`` draws.
    """
    b, h, tokens, keys = shape
    low = 0xFFFFFFFF

    def threefry(key: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        schedule = (*key, 0x1BD11BDA ^ key[0] ^ key[1])
        x, y = (x + schedule[0]) & low, (y + schedule[1]) & low
        for i in range(20):
            r = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
            x = (x + y) & low
            y = (((y << r) | (y >> (32 - r))) & low) ^ x
            if i % 4 == 3:
                s = i // 4 + 1
                x, y = (x + schedule[s % 3]) & low, (y + schedule[(s + 1) % 3] + s) & low
        return x, y

    seed = seed.reshape(())
    key = threefry(
        (seed & low, (seed >> 32) & low),
        torch.arange(first_batch, first_batch + b)[:, None, None, None].expand(b, h, 1, 1),
        torch.arange(h)[:, None, None].expand(b, h, 1, 1),
    )
    pairs = (keys + 1) // 2
    words = threefry(key, torch.arange(tokens)[:, None], torch.arange(pairs).expand(tokens, pairs))
    word = torch.stack(words, dim=-1).flatten(-2)[..., :keys]
    return (word >= int(p * 4294967296.0)).double() / (1 - p)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    window: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    dropout_batch: int = 0,
    key_ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (out, lse), with causal already in ``window``; in float32, or float64 for float64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (b, h, tokens, _), (_, kv_heads, keys, _) = q.shape, k.shape
    k, v = (x.to(dtype).repeat_interleave(h // kv_heads, dim=1) for x in (k, v))
    score = q.to(dtype) @ k.transpose(-1, -2) * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if alibi_slopes is not None:
        offset = keys - tokens if key_ranges is None else key_ranges[:, 2, None, None, None].to(q.device)
        distance = (torch.arange(tokens, device=q.device)[:, None] + offset) - torch.arange(
            keys, device=q.device
        )
        score = score - alibi_slopes.to(dtype).reshape(-1, h, 1, 1) * distance.abs()
    seen = visible_keys(
        tokens, keys, window=window, sink_tokens=sink_tokens, key_ranges=key_ranges, device=q.device
    )[:, None]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        score = score + attn_mask.to(dtype)
    score = torch.where(seen, score, -math.inf)
    if sinks is not None:
        sink = sinks.to(dtype).reshape(1, h, 1, 1).expand(b, h, tokens, 1)
        score = torch.cat([score, sink], dim=-1)
    floor = score.new_full((b, h, tokens, 1), -math.inf)  # there may be no key at all
    greatest = torch.cat([score.detach(), floor], dim=-1).amax(-1, keepdim=True)
    greatest = torch.where(greatest == -math.inf, 0, greatest)
    weight = torch.exp(score - greatest)
    total = weight.sum(-1, keepdim=True)
    empty = total == 0
    weight = weight / torch.where(empty, 1, total)
    lse = torch.where(empty, -math.inf, greatest + torch.log(torch.where(empty, 1, total)))
    weight = weight[..., :keys]
    if dropout_p:
        assert dropout_seed is not None
        factors = dropout_factors(dropout_seed.cpu(), (b, h, tokens, keys), dropout_p, dropout_batch)
        weight = weight * factors.to(weight)
    return (weight @ v).to(q.dtype), lse.squeeze(-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first channels of x (..., D) by cos and sin (..., R), halves repeated."""
    r = cos.shape[-1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y, rest = x[..., :r].to(dtype), x[..., r:]
    cos, sin = cos[..., : r // 2].to(dtype), sin[..., : r // 2].to(dtype)
    if interleaved:
        a, b = y[..., 0::2], y[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = y[..., : r // 2], y[..., r // 2 :]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


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
    alibi_slopes: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """-> (out, lse); writes the new keys and values into the caches."""
    outs, lses = [], []
    for b in range(q.shape[0]):
        length = int(cache_seqlens[b])
        start = 0 if cache_starts is None else int(cache_starts[b])
        query = q[b]

        def turn(x: Tensor, start: int = start, length: int = length) -> Tensor:
            if cos is None or sin is None:
                return x
            at = torch.arange(length - x.shape[1], length).clamp(min=start) - start
            return rotate(x, cos[at], sin[at], interleaved)

        caches = []
        for cache, new in ((k_cache, k_new), (v_cache, v_new)):
            if block_table is not None:
                page = cache.shape[1]
                slots = torch.arange(length, device=cache.device)
                where = (block_table[b].long()[slots // page], slots % page)
            else:
                row = b if cache_batch_idx is None else int(cache_batch_idx[b])
                where = (torch.full((length,), row), torch.arange(length))
                cache = cache.transpose(1, 2)
            if new is not None:
                rows = turn(new[b]) if cache is k_cache or new is k_new else new[b]
                n = new.shape[2]
                cache[where[0][length - n :], where[1][length - n :]] = rows.transpose(0, 1)
            caches.append(cache[where].transpose(0, 1)[None])
        ranges = torch.tensor([[start, length, length - q.shape[2]]])
        slopes = (
            alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        )
        out, lse = attention(
            turn(query)[None],
            *caches,
            key_ranges=ranges,
            alibi_slopes=slopes,
            **options,  # type: ignore[arg-type]
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)
