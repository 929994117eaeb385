"""`LSHAttention`, Reformer's layer, and its cache."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longspan.nn._coded import CodedCache, check_coded
from longspan.nn._sparse import SelfAttention, merge_heads, split_heads, without_padding
from longspan.ops._checks import check_between, check_positive
from longspan.ops.lsh import (
    Buckets,
    lsh_attention,
    lsh_attention_step,
    lsh_num_buckets,
    lsh_rotations,
)


class LSHCache(CodedCache):
    """What `LSHAttention` keeps of the tokens so far; made by its ``make_cache``.

    Attributes:
        k: (B, H, S, D), queries before they are made keys.
        v: (B, H, S, D).
        codes: (B, H, rounds, S) int32, buckets.
        lengths: (B,) int64, tokens of each sequence.
        rotations: What new tokens are hashed with.
        num_buckets: Likewise.
    """

    rotations: Tensor
    num_buckets: Buckets


class LSHAttention(SelfAttention):
    """Reformer's self-attention with shared queries and keys, in hashed chunks.

    ``y = o_proj(lsh_attention(query_key(x), value(x)))``: see `longspan.lsh_attention` (Kitaev, Kaiser
    and Levskaya 2020). query_key and value are named and shaped as in transformers' LSHSelfAttention;
    o_proj is its ReformerSelfOutput's ``dense``. Lengths need not be multiples of the chunk.

    Args:
        hidden_size: Channels of x.
        num_heads: H.
        head_dim: D; None is hidden_size / H.
        num_hashes: Rounds.
        num_buckets: An even number, or several whose product it is. None follows from the length (in a
            cache, from its greatest length): `longspan.ops.lsh.lsh_num_buckets`.
        chunk_length, chunks_before, chunks_after, causal, dedup, attend_across_buckets: As in
            `longspan.lsh_attention`. ``causal`` is needed for a cache.
        hash_seed: Of the rotations; None draws others in each forward, from torch's generator.
        dropout: Probability of dropping an attention weight in training mode.
        bias: Biases in the projections.
        device, dtype: Of the parameters.

    Raises:
        ValueError: Sizes or values do not fit.

    Example::

        layer = longspan.nn.LSHAttention(512, 8, num_hashes=4, causal=True)
        layer(torch.randn(1, 16384, 512)).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_hashes: int = 4,
        num_buckets: int | Sequence[int] | None = None,
        chunk_length: int = 64,
        chunks_before: int = 1,
        chunks_after: int = 0,
        causal: bool = False,
        dedup: bool = True,
        attend_across_buckets: bool = True,
        hash_seed: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the projections."""
        super().__init__(hidden_size, num_heads, head_dim)
        check_between("LSHAttention", "dropout", dropout, 0.0, 1.0)
        check_positive("LSHAttention", "num_hashes", num_hashes)
        self.num_hashes, self.hash_seed, self.causal = num_hashes, hash_seed, causal
        self.num_buckets: Buckets | None = (
            num_buckets if num_buckets is None or isinstance(num_buckets, int) else tuple(num_buckets)
        )
        self.dropout = dropout
        self._options: dict[str, Any] = {
            "chunk_length": chunk_length,
            "chunks_before": chunks_before,
            "chunks_after": chunks_after,
            "dedup": dedup,
            "attend_across_buckets": attend_across_buckets,
        }
        nothing = torch.zeros(1, 1, 0, 1)
        lsh_attention(nothing, nothing, num_buckets=num_buckets, **self._options)  # raises as it would
        kind: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.query_key = nn.Linear(hidden_size, num_heads * self.head_dim, **kind)
        self.value = nn.Linear(hidden_size, num_heads * self.head_dim, **kind)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, **kind)

    def make_cache(
        self, batch_size: int, max_length: int, *, dtype: torch.dtype | None = None
    ) -> LSHCache:
        """An empty cache, with rotations of its own.

        Args:
            batch_size: B.
            max_length: Tokens that a sequence may reach, prompt included.
            dtype: Of what the projections give; None is the parameters'.
        """
        weight = self.query_key.weight
        cache = LSHCache(
            batch_size, self.num_heads, max_length, self.head_dim, self.num_hashes,
            dtype=dtype or weight.dtype, device=weight.device,
        )  # fmt: skip
        cache.num_buckets = self.num_buckets or lsh_num_buckets(
            max_length, self._options["chunk_length"]
        )
        cache.rotations = self._rotations(cache.num_buckets)
        return cache

    def forward(
        self, x: Tensor, *, key_mask: Tensor | None = None, cache: LSHCache | None = None
    ) -> Tensor:
        """Attend within x, or from x to a cache that x extends.

        A prompt given to an empty cache is one forward; further tokens attend one after the other, each
        to what its hash finds among all tokens before it, as `longspan.lsh_attention_step` has it.

        Args:
            x: (B, T, hidden_size).
            key_mask: (B, T) bool, False for padding, which is not seen, and whose output is 0.
            cache: Of `make_cache`; without gradients and dropout only.

        Returns:
            (B, T, hidden_size).

        Raises:
            TypeError, ValueError: A dtype or shape does not fit; the cache is too short.
            RuntimeError: A gradient is asked for through a cache.
        """
        x = self._check(x, key_mask)
        qk, v = (
            split_heads(self.query_key(x), self.num_heads),
            split_heads(self.value(x), self.num_heads),
        )
        if cache is not None:
            out = self._cached(qk, v, cache, key_mask)
        else:
            dropout = self.dropout if self.training else 0.0
            out = lsh_attention(
                qk, v, num_hashes=self.num_hashes, num_buckets=self.num_buckets, causal=self.causal,
                key_mask=key_mask, seed=self.hash_seed, dropout_p=dropout, **self._options,
            )  # fmt: skip
        return without_padding(self.o_proj(merge_heads(out)), key_mask)

    def extra_repr(self) -> str:
        """The options that are not modules."""
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, num_hashes={self.num_hashes}, "
            f"num_buckets={self.num_buckets}, causal={self.causal}, {options}, "
            f"hash_seed={self.hash_seed}, dropout={self.dropout}"
        )

    def _rotations(self, num_buckets: Buckets) -> Tensor:
        return lsh_rotations(
            self.num_heads, self.head_dim, num_hashes=self.num_hashes, num_buckets=num_buckets,
            seed=self.hash_seed, device=self.query_key.weight.device,
        )  # fmt: skip

    def _cached(self, qk: Tensor, v: Tensor, cache: LSHCache, key_mask: Tensor | None) -> Tensor:
        name = "LSHAttention"
        if not self.causal:
            raise ValueError(f"{name}: cache: expected causal=True, else a step would change the past")
        if self.dropout and self.training:
            raise ValueError(f"{name}: cache: expected eval(), for there is no dropout over a cache")
        check_coded(name, cache, LSHCache, qk, self.num_hashes, key_mask)
        options = {"num_buckets": cache.num_buckets, "rotations": cache.rotations, **self._options}
        if not cache.lengths.any():
            out, buckets = lsh_attention(qk, v, causal=True, return_buckets=True, **options)
            cache.begin(qk, v, buckets)
            return out
        outs = []
        for q_one, v_one in zip(qk.split(1, dim=2), v.split(1, dim=2)):
            cache.lengths += 1
            outs.append(
                lsh_attention_step(q_one, v_one, cache.k, cache.v, cache.codes, cache.lengths, **options)
            )
        return torch.cat(outs, dim=2) if outs else torch.empty_like(v)
