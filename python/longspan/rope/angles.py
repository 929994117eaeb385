"""Cosines and sines of a scaling method, at positions or in tables."""

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from longspan.rope.frequencies import GROWING, frequencies

# A table of more positions is not kept: angles are computed where they are needed.
MOST_KEPT = 1 << 16


def cos_sin(
    frequencies: tuple[Tensor, float], positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., T, R), halves repeated, at positions (..., T), from angles in float64.

    Args:
        frequencies: inv_freq (R / 2,) and the factor of both.
        positions: Integers.
        dtype: Of the result.
    """
    inv_freq, scale = frequencies
    where = positions.double()[..., None]
    return _of_angles(where * inv_freq.to(where), scale, dtype)


def _of_angles(angle: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = ((x * scale).to(dtype) for x in (angle.cos(), angle.sin()))
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


class Angles:
    """Cosines and sines of one setting, shared by all modules that have it."""

    def __init__(self, settings: dict[str, Any], unscaled_tokens: int) -> None:
        """Begin with the frequencies of the trained length."""
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
        """A copy is the shared one again."""
        return shared_angles, (self.settings, self.unscaled_tokens)

    def _frequencies(self, seq_len: int | None) -> tuple[Tensor, float]:
        return frequencies(**self.settings, seq_len=seq_len)

    def grow(self, seq_len: int) -> None:
        """Take the frequencies of this length; ``now`` is another object only where they are others."""
        if self.growing and seq_len != self.length:
            now, self.length = self._frequencies(seq_len), seq_len
            if now[1] != self.now[1] or not torch.equal(now[0], self.now[0]):
                self.now, self.table = now, None

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine (..., T, R) at positions (..., T), from angles in float64."""
        inv_freq, scale = self.now
        if not self.unscaled_tokens:
            return cos_sin(self.now, positions, dtype)
        where = positions.double()[..., None]
        angle = torch.where(
            where < self.unscaled_tokens, where * self.unscaled.to(where), where * inv_freq.to(where)
        )
        return _of_angles(angle, scale, dtype)

    def tables(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """At least ``length`` rows, kept for the next call."""
        table = self.table
        if (
            table is None
            or len(table[0]) < length
            or table[0].device != device
            or table[0].dtype != dtype
        ):
            rows = min(MOST_KEPT, 1 << max(6, (length - 1).bit_length()))
            with torch.inference_mode(False), torch.no_grad():
                table = self.table = self.at(torch.arange(rows, device=device), dtype)
        return table


_shared: WeakValueDictionary[str, Angles] = WeakValueDictionary()


def shared_angles(settings: dict[str, Any], unscaled_tokens: int = 0) -> Angles:
    """The one `Angles` of these settings; it goes with the last module that has it."""
    key = repr((sorted(settings.items()), unscaled_tokens))
    found = _shared.get(key)
    if found is None:
        found = _shared[key] = Angles(settings, unscaled_tokens)
    return found
