"""What the layers of learned sparsity share: a cache with more tensors, and filling it."""

from typing import Any

import torch
from torch import Tensor

from longspan.nn.attention import Attention, KVCache, _check_room
from longspan.ops._checks import check_floating, check_integers, check_shape, check_tensor


class BranchCache(KVCache):
    """A `KVCache` with more tensors (B, H_kv, ..., D), of `make_cache` of the layer that knows them.

    Attributes:
        k: (B, H_kv, S, D), zeros at first. Rotated keys.
        v: (B, H_kv, S, D).
        lengths: (B,) int64, tokens of each sequence so far. What lies beyond is never read.
        more: The other tensors by name.
    """

    more: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return super().nbytes + sum(x.nbytes for x in self.more.values())

    def reorder(self, beam_idx: Tensor) -> None:
        """Let row b continue what row ``beam_idx[b]`` holds: (B,) integers, repeats allowed."""
        super().reorder(beam_idx)
        for x in self.more.values():
            x.copy_(x.index_select(0, beam_idx))

    def detach(self) -> "BranchCache":
        """Another cache over the same storage, outside any graph."""
        return self._as(super().detach(), {name: x.detach() for name, x in self.more.items()})

    def clone(self) -> "BranchCache":
        """A copy with storage of its own, to continue a prompt in several ways."""
        return self._as(super().clone(), {name: x.clone() for name, x in self.more.items()})

    @staticmethod
    def _as(base: KVCache, more: dict[str, Tensor]) -> "BranchCache":
        cache = object.__new__(BranchCache)
        cache.k, cache.v, cache.lengths, cache.more = base.k, base.v, base.lengths, more
        return cache


class SparseAttention(Attention):
    """`Attention`'s projections and cache around another rule of what is seen."""

    def _make_cache(
        self, more: dict[str, tuple[int, torch.dtype | None]], *args: Any, **kwargs: Any
    ) -> BranchCache:
        """With tensors of so many rows, of a dtype or the cache's."""
        base = super().make_cache(*args, **kwargs)
        b, heads, _, d = base.k.shape
        return BranchCache._as(
            base,
            {
                name: torch.zeros(b, heads, rows, d, dtype=dtype or base.k.dtype, device=base.k.device)
                for name, (rows, dtype) in more.items()
            },
        )

    def _prepare(
        self, x: Tensor, lengths: Tensor | None, positions: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x without padding, the positions, and which tokens are real; checks them."""
        name = type(self).__name__
        check_tensor(name, "x", x)
        check_floating(name, "x", x)
        check_shape(name, "x", x, (None, None, self.hidden_size), "(batch, tokens, hidden_size)")
        b, t, _ = x.shape
        real = None
        if lengths is not None:
            check_integers(name, "lengths", lengths, (b,), "(batch,)")
            if not self.causal:
                raise ValueError(f"{name}: lengths: expected None where not causal")
            real = torch.arange(t, device=x.device) < lengths[:, None]
            x = torch.where(real[..., None], x, 0)
        if cache is not None:
            self._check_cache(cache, b)
            if not isinstance(cache, BranchCache):
                raise TypeError(
                    f"{name}: cache: expected one of make_cache, got a {type(cache).__name__}"
                )
            _check_room(cache, cache.lengths + t)
        if positions is None:
            positions = torch.arange(t, device=x.device)[None]
            if cache is not None:
                positions = positions + cache.lengths[:, None]
        else:
            check_integers(name, "positions", positions, (None, t), "(batch or 1, tokens)")
            if positions.shape[0] not in (1, b):
                raise ValueError(f"{name}: positions: expected {b} rows or 1, got {positions.shape[0]}")
        return x, positions.long(), real

    def _finish(self, out: Tensor, real: Tensor | None) -> Tensor:
        y = self.o_proj(out.transpose(1, 2).flatten(2))
        return y if real is None else torch.where(real[..., None], y, 0)


def write(storage: Tensor, new: Tensor, before: Tensor) -> None:
    """Rows of ``new`` (B, H, T, D) into ``storage`` (B, H, S, D), from slot ``before[b]`` on."""
    for b, start in enumerate(before.tolist()):
        storage[b, :, start : start + new.shape[2]] = new[b]


def same_length(lengths: Tensor) -> int | None:
    """The length of all sequences, or None where they differ."""
    first = int(lengths[0]) if lengths.numel() else 0
    return first if bool((lengths == first).all()) else None
