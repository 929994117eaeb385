"""`MixtureOfBlockAttention`, a layer whose queries attend to the few blocks that they choose."""

from typing import Any

import torch
from torch import Tensor

from longspan.nn._branches import BranchCache, SparseAttention, same_length, write
from longspan.nn.attention import KVCache, Rotary
from longspan.ops._checks import check_positive
from longspan.ops.moba import mixture_of_block_attention, mixture_of_block_attention_step

_STEP_TOKENS = 4  # up to so many go through the step's kernel, which reads only what is chosen


class MixtureOfBlockAttention(SparseAttention):
    """Multi-head attention in which each query and head sees the blocks that its gate chose.

    The projections are `Attention`'s, and the gate has no parameters (Lu et al. 2025, MoBA), so a layer
    of full attention becomes one by its state_dict and back: the paper trains with MoBA and keeps, or
    goes back to, full attention in the last layers. `longspan.mixture_of_block_attention` has the
    equations.

    Args:
        hidden_size: Channels of x.
        num_heads: H.
        num_kv_heads: H_kv, a divisor of H; None is H.
        head_dim: D; None is hidden_size / H.
        moba_chunk_size: Tokens of a block.
        moba_topk: Blocks that a query sees, its own included.
        qkv_bias: Biases in q_proj, k_proj and v_proj.
        out_bias: A bias in o_proj.
        qk_norm: RMSNorm over D of q and of k before they are rotated, modules q_norm and k_norm.
        norm_eps: Its epsilon.
        rotary: As in `Attention`. The gate sees rotated queries and keys.
        causal: A token sees itself and what is before it. Needed for a cache.
        scale: Of the scores; None is D ** -0.5.
        device, dtype: Of the parameters.

    Raises:
        ValueError: Sizes do not fit together, or a value is out of range.

    Example::

        layer = longspan.nn.MixtureOfBlockAttention(512, 8, moba_chunk_size=256, moba_topk=4)
        layer(torch.randn(1, 4096, 512)).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        moba_chunk_size: int = 256,
        moba_topk: int = 4,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rotary: Rotary | None = None,
        causal: bool = True,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the projections."""
        super().__init__(
            hidden_size, num_heads, num_kv_heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias,
            qk_norm=qk_norm, norm_eps=norm_eps, rotary=rotary, causal=causal, scale=scale,
            device=device, dtype=dtype,
        )  # fmt: skip
        check_positive("MixtureOfBlockAttention", "moba_chunk_size", moba_chunk_size)
        check_positive("MixtureOfBlockAttention", "moba_topk", moba_topk)
        self.moba_chunk_size, self.moba_topk = moba_chunk_size, moba_topk

    def make_cache(self, batch_size: int, max_length: int, **options: Any) -> BranchCache:
        """An empty cache, as of `Attention.make_cache`, with the means of whole blocks beside it."""
        check_positive("MixtureOfBlockAttention.make_cache", "max_length", max_length)
        blocks = -(-max_length // self.moba_chunk_size)
        weight = self.k_proj.weight
        means = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return self._make_cache({"means": (blocks, means)}, batch_size, max_length, **options)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend within x, or from x to a cache that x extends.

        Args:
            x: (B, T, hidden_size).
            lengths: (B,) integers: tokens of each sequence, the rest of its row is padding, which is
                not seen and whose output is 0. Where causal.
            positions: (B or 1, T) integers for ``rotary``; None counts the tokens of each sequence from
                0, those in the cache included.
            cache: Of `make_cache`. x's tokens are appended to it, and see all of it. Needs room for all
                T. Without gradients.

        Returns:
            (B, T, hidden_size).

        Raises:
            TypeError, ValueError: Shapes, dtypes or the combination do not fit; the cache is too short.
            RuntimeError: A gradient is asked for through a cache.
        """
        x, positions, real = self._prepare(x, lengths, positions, cache)
        q, k, v = self._project(x, positions)
        options: dict[str, Any] = {
            "block_size": self.moba_chunk_size, "topk": self.moba_topk, "scale": self.scale
        }  # fmt: skip
        if cache is None:
            out = mixture_of_block_attention(q, k, v, causal=self.causal, **options)
            return self._finish(out, real)
        assert isinstance(cache, BranchCache)
        self._check_no_gradient(cache, k, q, k, v)
        before, t = cache.lengths.clone(), x.shape[1]
        write(cache.k, k, before)
        write(cache.v, v, before)
        cache.lengths += t if lengths is None else lengths
        self._update_means(cache, before)
        same = same_length(before)
        if same is None or t <= _STEP_TOKENS:
            means = cache.more["means"]
            out = mixture_of_block_attention_step(q, cache.k, cache.v, before + t, means, **options)
        else:
            keys, values = cache.k[:, :, : same + t], cache.v[:, :, : same + t]
            out = mixture_of_block_attention(q, keys, values, **options)
        return self._finish(out, real)

    def extra_repr(self) -> str:
        """The options that are not modules."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"moba_chunk_size={self.moba_chunk_size}, moba_topk={self.moba_topk}, "
            f"causal={self.causal}, scale={self.scale}"
        )

    def _update_means(self, cache: BranchCache, before: Tensor) -> None:
        """Of the blocks that became whole."""
        size, means = self.moba_chunk_size, cache.more["means"]
        for b, (first, last) in enumerate(zip(before.tolist(), cache.lengths.tolist())):
            first, last = first // size, last // size
            if first < last:
                keys = cache.k[b, :, first * size : last * size].unflatten(1, (-1, size))
                means[b, :, first:last] = keys.mean(2, dtype=means.dtype)
