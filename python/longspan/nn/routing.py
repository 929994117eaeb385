"""`RoutingAttention`, the Routing Transformer's layer, and its cache."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.nn._coded import CodedCache, check_coded
from longspan.nn._sparse import SelfAttention, merge_heads, split_heads, without_padding
from longspan.ops._checks import check_between, check_positive, sum_dtype
from longspan.ops.routing import (
    routing_attention,
    routing_attention_step,
    routing_clusters,
    routing_kmeans,
    routing_loss,
    routing_sums,
    routing_update,
)


class RoutingCache(CodedCache):
    """What `RoutingAttention` keeps of the tokens so far; made by its ``make_cache``.

    Attributes:
        k: (B, H, S, D), queries before they are made keys.
        v: (B, H, S, D).
        codes: (B, H, 1, S) int32, clusters.
        lengths: (B,) int64, tokens of each sequence.
    """


class RoutingAttention(SelfAttention):
    """The Routing Transformer's self-attention: within clusters that k-means finds as training goes on.

    ``y = o_proj(routing_attention(q_proj(x), k_proj(x), v_proj(x)))``: see `longspan.routing_attention`
    (Roy, Saffar, Vaswani and Grangier 2020). Queries and keys are layer-normed without a weight, both
    where they are routed and where they attend.

    **Centroids** are buffers, in the state_dict: ``centroids`` (H, C, D), ``initted``, and ``pending``,
    the sums that the last training forward left. The first forward in training mode finds them by
    k-means on its batch; each later one first moves them by what the one before it left (so they stand
    still from a forward to its backward, and a recomputation under activation checkpointing, which
    changes nothing, finds the same clusters). Evaluation changes nothing. Where
    ``torch.distributed`` is initialised, sums are over all ranks.

    Args:
        hidden_size: Channels of x.
        num_heads: H.
        num_clusters: C; the square root of the length balances work.
        head_dim: D; None is hidden_size / H.
        window_size: Tokens that each cluster takes; None lets each token go to its nearest cluster,
            the one way that does not leak the future where ``causal``.
        causal: A token sees itself and what is before it.
        shared_qk: Keys are the queries, and a token attends to itself only where it is alone. Needed
            where ``causal`` and ``window_size`` is None.
        ema_decay: Of the centroids' moving average.
        commitment: Factor of the loss that `forward` returns.
        kmeans_iterations: For the first batch.
        dropout: Probability of dropping an attention weight in training mode.
        bias: Biases in the projections.
        device, dtype: Of the parameters; centroids are float32 (float64 for float64).

    Raises:
        ValueError: Sizes, values or options do not fit.

    Example::

        layer = longspan.nn.RoutingAttention(512, 8, num_clusters=64, causal=True)
        out, loss = layer(torch.randn(1, 4096, 512), return_loss=True)
        (out.sum() + loss).backward()
    """

    centroids: Tensor
    pending: Tensor
    initted: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_clusters: int,
        head_dim: int | None = None,
        window_size: int | None = None,
        causal: bool = False,
        shared_qk: bool = True,
        ema_decay: float = 0.999,
        commitment: float = 1e-4,
        kmeans_iterations: int = 10,
        dropout: float = 0.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the projections, and centroids at random."""
        super().__init__(hidden_size, num_heads, head_dim)
        name = "RoutingAttention"
        check_positive(name, "num_clusters", num_clusters)
        check_between(name, "ema_decay", ema_decay, 0.0, 1.0)
        check_between(name, "dropout", dropout, 0.0, 1.0)
        if window_size is not None:
            check_positive(name, "window_size", window_size)
        elif causal and not shared_qk:
            raise ValueError(f"{name}: shared_qk: expected True with causal and without window_size")
        if kmeans_iterations < 0:
            raise ValueError(f"{name}: kmeans_iterations: expected 0 or more, got {kmeans_iterations}")
        self.num_clusters, self.window_size, self.causal = num_clusters, window_size, causal
        self.shared_qk, self.ema_decay, self.commitment = shared_qk, ema_decay, commitment
        self.kmeans_iterations, self.dropout = kmeans_iterations, dropout
        kind: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        inner = num_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, inner, **kind)
        self.k_proj = None if shared_qk else nn.Linear(hidden_size, inner, **kind)
        self.v_proj = nn.Linear(hidden_size, inner, **kind)
        self.o_proj = nn.Linear(inner, hidden_size, **kind)
        weight = self.q_proj.weight
        shape = (num_heads, num_clusters, self.head_dim)
        at_random = torch.randn(shape, device=device, dtype=sum_dtype(weight))
        self.register_buffer("centroids", F.normalize(at_random, dim=-1))
        self.register_buffer("pending", torch.zeros_like(at_random))
        self.register_buffer("initted", torch.tensor(False, device=device))

    def make_cache(
        self, batch_size: int, max_length: int, *, dtype: torch.dtype | None = None
    ) -> RoutingCache:
        """An empty cache.

        Args:
            batch_size: B.
            max_length: Tokens that a sequence may reach, prompt included.
            dtype: Of what the projections give; None is the parameters'.
        """
        weight = self.q_proj.weight
        return RoutingCache(
            batch_size, self.num_heads, max_length, self.head_dim, 1,
            dtype=dtype or weight.dtype, device=weight.device,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cache: RoutingCache | None = None,
        return_loss: bool = False,
    ) -> Any:
        """Attend within x, or from x to a cache that x extends.

        Args:
            x: (B, T, hidden_size).
            key_mask: (B, T) bool, False for padding: it is in no cluster, and its output is 0.
            cache: Of `make_cache`, in evaluation mode, where ``causal`` and ``window_size`` is None.
            return_loss: Also return ``commitment`` times `longspan.routing_loss` of queries and keys.

        Returns:
            (B, T, hidden_size); with ``return_loss`` a pair with a scalar.

        Raises:
            TypeError, ValueError: A dtype or shape does not fit; the cache is too short.
            RuntimeError: A gradient is asked for through a cache.
        """
        x = self._check(x, key_mask)
        projected = (self.q_proj(x), None if self.k_proj is None else self.k_proj(x), self.v_proj(x))
        q, k, v = (None if y is None else split_heads(y, self.num_heads) for y in projected)
        assert q is not None
        assert v is not None
        q = F.layer_norm(q, (self.head_dim,)).to(v.dtype)
        k = None if k is None else F.layer_norm(k, (self.head_dim,)).to(v.dtype)
        routed = [q] if k is None else [q, k]
        if cache is not None:
            out = self._cached(q, v, cache, key_mask)
        else:
            if self.training and not _in_backward():
                self._learn([y.detach() for y in routed], key_mask)
            out = routing_attention(
                q, k, v, self.centroids, window_size=self.window_size, causal=self.causal,
                key_mask=key_mask, dropout_p=self.dropout if self.training else 0.0,
            )  # fmt: skip
        out = without_padding(self.o_proj(merge_heads(out)), key_mask)
        if not return_loss:
            return out
        losses = [routing_loss(y, self.centroids, key_mask=key_mask) for y in routed]
        return out, self.commitment * sum(losses) / len(losses)

    def extra_repr(self) -> str:
        """The options that are not modules."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, num_clusters={self.num_clusters}, "
            f"window_size={self.window_size}, causal={self.causal}, shared_qk={self.shared_qk}, "
            f"ema_decay={self.ema_decay}, commitment={self.commitment}, dropout={self.dropout}"
        )

    @torch.no_grad()
    def _learn(self, routed: list[Tensor], key_mask: Tensor | None) -> None:
        """Move the centroids by what the last forward left, and leave the sums of this one."""
        all_reduce = _all_reduce()
        if not bool(self.initted):
            both = torch.cat(routed, dim=2)
            mask = None if key_mask is None else key_mask.repeat(1, len(routed))
            start = self.centroids.clone()
            some = both.shape[:3].numel() > 0 and (mask is None or bool(mask.any()))
            if some:
                start = routing_kmeans(both, self.num_clusters, iterations=0, key_mask=mask)
            if all_reduce is not None:  # all ranks begin where the first one does
                torch.distributed.broadcast(start, 0)
            if some or all_reduce is not None:
                found = routing_kmeans(
                    both, self.num_clusters, iterations=self.kmeans_iterations, key_mask=mask,
                    all_reduce=all_reduce, start=start,
                )  # fmt: skip
                self.centroids.copy_(found)
                self.initted.fill_(True)
        else:
            self.centroids.copy_(routing_update(self.centroids, self.pending, decay=self.ema_decay))
        sums = [routing_sums(y, self.centroids, key_mask=key_mask) for y in routed]
        total = torch.stack(sums).mean(0)
        if all_reduce is not None:
            all_reduce(total)
        self.pending.copy_(total)

    def _cached(self, q: Tensor, v: Tensor, cache: RoutingCache, key_mask: Tensor | None) -> Tensor:
        name = "RoutingAttention"
        if not self.causal or self.window_size is not None:
            raise ValueError(
                f"{name}: cache: expected causal=True and window_size=None, else a step would change "
                "the past"
            )
        if self.training:
            raise ValueError(f"{name}: cache: expected eval(), for centroids must not move")
        check_coded(name, cache, RoutingCache, q, 1, key_mask)
        if not cache.lengths.any():
            cache.begin(q, v, routing_clusters(q, self.centroids)[:, :, None])
            return routing_attention(q, None, v, self.centroids, causal=True)
        outs = []
        for q_one, v_one in zip(q.split(1, dim=2), v.split(1, dim=2)):
            cache.lengths += 1
            outs.append(
                routing_attention_step(
                    q_one, v_one, self.centroids, cache.k, cache.v, cache.codes[:, :, 0], cache.lengths
                )
            )
        return torch.cat(outs, dim=2) if outs else torch.empty_like(v)


def _in_backward() -> bool:
    """Whether autograd is running, as where activation checkpointing computes a forward again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _all_reduce() -> Any:
    """What sums a tensor over ranks in place, or None where there are none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.all_reduce
    return None
