"""`CodedCache`: keys and values of layers that choose what to read by a code of each token."""

import torch
from torch import Tensor

from longspan.nn.attention import KVCache
from longspan.ops._checks import check_positive


class CodedCache(KVCache):
    """A `KVCache` whose k are raw shared queries, with ``codes`` (B, H, R, S) int32 beside them."""

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        codes: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate; ``codes`` is R."""
        super().__init__(batch_size, num_heads, max_length, head_dim, dtype=dtype, device=device)
        check_positive(type(self).__name__, "codes", codes)
        self.codes = torch.zeros(
            batch_size, num_heads, codes, max_length, dtype=torch.int32, device=device
        )

    @property
    def nbytes(self) -> int:
        """Bytes of queries, values and codes."""
        return super().nbytes + self.codes.nbytes

    def reorder(self, beam_idx: Tensor) -> None:
        """Let row b continue what row ``beam_idx[b]`` holds: (B,) integers, repeats allowed."""
        used = int(self.lengths.max())
        super().reorder(beam_idx)
        self.codes[..., :used] = self.codes[..., :used].index_select(0, beam_idx)

    def detach(self) -> "CodedCache":
        """Another cache over the same storage, outside any graph."""
        return self._another(super().detach(), self.codes)

    def clone(self) -> "CodedCache":
        """A copy with storage of its own, to continue a prompt in several ways."""
        return self._another(super().clone(), self.codes.clone())

    def _another(self, other: KVCache, codes: Tensor) -> "CodedCache":
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.k, made.v, made.lengths, made.codes = other.k, other.v, other.lengths, codes
        return made

    def begin(self, q: Tensor, v: Tensor, codes: Tensor) -> None:
        """Write a prompt (B, H, T, ...) with codes (B, H, R, T) into the empty cache."""
        t = q.shape[2]
        self.k[:, :, :t], self.v[:, :, :t], self.codes[..., :t] = q, v, codes.int()
        self.lengths += t


def check_coded(
    name: str, cache: object, kind: type[CodedCache], q: Tensor, codes: int, key_mask: Tensor | None
) -> None:
    """Raise unless q (B, H, T, D) may be appended to the cache."""
    if not isinstance(cache, kind):
        got = type(cache).__name__
        raise TypeError(f"{name}: cache: expected a {kind.__name__} of make_cache, got {got}")
    if key_mask is not None:
        raise ValueError(f"{name}: key_mask: expected None beside a cache")
    b, h, t, d = q.shape
    slots = cache.k.shape[2]
    wanted = ((b, h, slots, d), (b, h, codes, slots))
    if (cache.k.shape, cache.codes.shape) != wanted:
        raise ValueError(
            f"{name}: cache: expected queries and codes of {wanted[0]} and {wanted[1]}, "
            f"got {tuple(cache.k.shape)} and {tuple(cache.codes.shape)}"
        )
    if cache.k.dtype != q.dtype:
        raise TypeError(f"{name}: cache: expected the queries' dtype, {q.dtype}, got {cache.k.dtype}")
    if torch.is_grad_enabled() and q.requires_grad:
        raise RuntimeError(f"{name}: cache: no gradient passes a cache; use torch.no_grad()")
    longest = int(cache.lengths.max()) + t
    if longest > slots:
        raise ValueError(f"{name}: cache: expected {longest} slots or more, got {slots}")
