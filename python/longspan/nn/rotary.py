"""`RotaryEmbedding`: rotation by position with any of `longspan.rope`'s scaling methods."""

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from longspan.ops._checks import check_between, check_integers
from longspan.ops.rotary import apply_rotary
from longspan.rope.frequencies import GROWING, frequencies

# A table of more positions is not kept: angles are computed where they are needed.
_MOST_KEPT = 1 << 16


class _Angles:
    """Cosines and sines of one setting, shared by all modules that have it."""

    def __init__(self, settings: dict[str, Any], unscaled_tokens: int) -> None:
        self.settings, self.unscaled_tokens = settings, unscaled_tokens
        self.growing = settings["method"] in GROWING or bool(settings.get("dynamic"))
        self.now = self._frequencies(None)
        self.length: int | None = None  # that `now` is for
        plain = {"method": "default", "head_dim": settings["head_dim"]}
        if settings["method"] == "proportional":
            plain["method"] = "proportional"
        for name in ("base", "partial_rotary_factor"):
            if name in settings:
                plain[name] = settings[name]
        self.unscaled, _ = frequencies(**plain)
        self.table: tuple[Tensor, Tensor] | None = None

    def __reduce__(self) -> Any:
        return _angles, (self.settings, self.unscaled_tokens)

    def _frequencies(self, seq_len: int | None) -> tuple[Tensor, float]:
        return frequencies(**self.settings, seq_len=seq_len)

    def grow(self, seq_len: int) -> None:
        """Take the frequencies of this length; the table goes where they are others."""
        if self.growing and seq_len != self.length:
            before, self.now, self.length = self.now, self._frequencies(seq_len), seq_len
            if self.now[1] != before[1] or not torch.equal(self.now[0], before[0]):
                self.table = None

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine (..., T, R) at positions (..., T), from angles in float64."""
        inv_freq, scale = self.now
        where = positions.double()[..., None]
        angle = where * inv_freq.to(where)
        if self.unscaled_tokens:
            unscaled = where * self.unscaled.to(where)
            angle = torch.where(where < self.unscaled_tokens, unscaled, angle)
        cos, sin = ((x * scale).to(dtype) for x in (angle.cos(), angle.sin()))
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

    def tables(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """At least ``length`` rows, kept for the next call."""
        table = self.table
        if (
            table is None
            or len(table[0]) < length
            or table[0].device != device
            or table[0].dtype != dtype
        ):
            rows = min(_MOST_KEPT, 1 << max(6, (length - 1).bit_length()))
            with torch.inference_mode(False), torch.no_grad():
                table = self.table = self.at(torch.arange(rows, device=device), dtype)
        return table


_shared: WeakValueDictionary[str, _Angles] = WeakValueDictionary()


def _angles(settings: dict[str, Any], unscaled_tokens: int) -> _Angles:
    key = repr((sorted(settings.items()), unscaled_tokens))
    found = _shared.get(key)
    if found is None:
        found = _shared[key] = _Angles(settings, unscaled_tokens)
    return found


class RotaryEmbedding(nn.Module):
    """Rotary position embedding with a scaling method: the ``rotary`` of `longspan.nn.Attention`.

    `longspan.rope.frequencies` has the methods, `longspan.apply_rotary` the rotation. Angles are
    computed in float64 whatever the model's dtype, so positions neither collide in bfloat16 nor lose
    digits beyond 2^24. Tables of up to 65536 positions are kept, grown as they are needed and shared by
    modules of the same settings; they are not in the state_dict, and ``module.to(dtype)`` leaves them.

    The dynamic methods and longrope look at the length of each call alone: the greatest position and 1,
    or ``seq_len``. Keys that were cached with another length's frequencies keep them.

    Args:
        head_dim: D, even.
        method: One of `longspan.rope.METHODS`.
        interleaved: Pairs are channels (2 i, 2 i + 1), not (i, i + R / 2).
        unscaled_tokens: So many first positions keep the angles that no method scaled, as LongRoPE has
            it (Ding et al. 2024); the method's attention factor multiplies them too.
        **options: ``base``, ``max_position``, ``partial_rotary_factor`` and the method's own, as in
            `longspan.rope.frequencies`.

    Raises:
        TypeError: An option that the method does not know, or one that it needs is missing.
        ValueError: A value does not fit.

    Example::

        rotary = longspan.nn.RotaryEmbedding(
            64, "yarn", base=1e5, factor=4.0, original_max_position_embeddings=8192
        )
        attention = longspan.nn.Attention(576, 9, 3, rotary=rotary, causal=True)
        same = longspan.nn.RotaryEmbedding(**longspan.rope.from_config(model.config))
    """

    def __init__(
        self,
        head_dim: int,
        method: str = "default",
        *,
        interleaved: bool = False,
        unscaled_tokens: int = 0,
        **options: Any,
    ) -> None:
        """Check the settings."""
        super().__init__()
        if "seq_len" in options:
            raise TypeError("RotaryEmbedding: seq_len: expected it in a call, got it here")
        check_between("RotaryEmbedding", "unscaled_tokens", unscaled_tokens, 0, float("inf"))
        self.settings = {"method": method, "head_dim": head_dim, **options}
        self.interleaved, self.unscaled_tokens = interleaved, unscaled_tokens
        self._angles = _angles(self.settings, unscaled_tokens)

    def forward(
        self, q: Tensor, k: Tensor | None, positions: Tensor | None = None, *, seq_len: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rotate q (B, H, T, D) and k (B, H_kv, T, D), which may be None, by their positions.

        Args:
            q, k: As in `longspan.apply_rotary`.
            positions: (T,), (1, T) or (B, T), int32 or int64, from 0; None counts from 0.
            seq_len: The length that a dynamic method scales for; None is the greatest position and 1.
        """
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        angles, kept = self._angles, not torch.compiler.is_compiling()
        if positions is None:
            positions, last = torch.arange(q.shape[-2], device=q.device), q.shape[-2]
        else:
            shape = (None,) * positions.dim() if isinstance(positions, Tensor) else ()
            check_integers("RotaryEmbedding", "positions", positions, shape, "(batch, tokens)")
            read = kept or (angles.growing and seq_len is None)
            last = int(positions.max()) + 1 if read and positions.numel() else 0
        if angles.growing:
            angles.grow(last if seq_len is None else seq_len)
            kept = kept and (angles.table is not None or positions.numel() >= last)
        if kept and last <= _MOST_KEPT:
            cos, sin = angles.tables(last, q.device, dtype)
            return apply_rotary(q, k, cos, sin, interleaved=self.interleaved, positions=positions)
        cos, sin = angles.at(positions, dtype)
        return apply_rotary(q, k, cos, sin, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        """The settings."""
        given = [f"{name}={value!r}" for name, value in self.settings.items()]
        if self.interleaved:
            given.append("interleaved=True")
        if self.unscaled_tokens:
            given.append(f"unscaled_tokens={self.unscaled_tokens}")
        return ", ".join(given)
