"""LSH attention, densely: how often each pair of tokens meets, and one softmax."""

import torch
from torch import Tensor


def meetings(
    buckets: Tensor,
    *,
    chunk_length: int,
    chunks_before: int,
    chunks_after: int,
    attend_across_buckets: bool = True,
    wrap: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """In how many rounds each token's chunks have each token: (B, H, T, T) int64; with itself, too.

    ``buckets`` is (B, H, R, T), ``key_mask`` (B, T) bool: padding is sorted last.
    """
    t = buckets.shape[3]
    if key_mask is not None:
        buckets = buckets.masked_fill(~key_mask[:, None, None], int(buckets.max()) + 1)
    order = torch.argsort(buckets, dim=-1, stable=True)
    place = torch.argsort(order, dim=-1)
    chunk = (place // chunk_length).unbind(2)  # of each round, (B, H, T)
    rounds, chunks = len(chunk), -(-t // chunk_length)
    count = torch.zeros(*buckets.shape[:2], t, t, dtype=torch.int64)
    for r in range(rounds):
        for offset in range(-chunks_before, chunks_after + 1):
            looked_at = chunk[r] + offset
            for other in range(rounds):
                if wrap:  # chunks of all rounds are a ring
                    met = (looked_at + r * chunks) % (rounds * chunks)
                    met = met[..., :, None] == (chunk[other] + other * chunks)[..., None, :]
                elif other == r:
                    met = looked_at[..., :, None] == chunk[r][..., None, :]
                else:
                    continue
                if not attend_across_buckets:
                    met = met & (buckets[:, :, r, :, None] == buckets[:, :, r, None, :])
                count += met
    if key_mask is not None:
        count = count * key_mask[:, None, None]
    return count


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    count: Tensor,
    *,
    causal: bool = False,
    dedup: bool = True,
    scale: float = 1.0,
    norm_eps: float = 1e-6,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (out, lse), with ``count`` of `meetings`; in float32, or float64 for float64."""
    dtype = torch.float64 if qk.dtype == torch.float64 else torch.float32
    q, t = qk.to(dtype), qk.shape[2]
    k = q / torch.sqrt(q.square().mean(-1, keepdim=True) + norm_eps)
    score = q @ k.transpose(-1, -2) * scale
    itself = torch.eye(t, dtype=torch.bool)
    seen = (count > 0) & ~itself
    if causal:
        seen = seen & torch.ones(t, t, dtype=torch.bool).tril()
    if not dedup:
        score = score + torch.log(count.clamp(min=1).to(dtype))
    alone = ~seen.any(-1, keepdim=True)
    lse = torch.where(seen, score, -torch.inf).logsumexp(-1)
    score = torch.where(seen | (alone & itself), score, -torch.inf)
    out = (score.softmax(-1) @ v.to(dtype)).to(qk.dtype)
    if key_mask is not None:
        out = torch.where(key_mask[:, None, :, None], out, 0)
        lse = torch.where(key_mask[:, None], lse, -torch.inf)
    return out, lse
