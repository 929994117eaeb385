"""What an extended model is (`Extension`), and one forward of it (`Pass`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from longspan.hf._replace import Shared
from longspan.ops.rotary import apply_rotary
from longspan.rope.angles import Angles, cos_sin, shared_angles

CacheKind = Literal["full", "window", "unrotated"]


class Extension(Shared):
    """What forwards, attention and caches of one extended model share.

    Args:
        settings: Arguments of `longspan.rope.frequencies`.
        kind: Of the cache.
        window: Tokens that a token sees, itself included, besides sinks; None but for "window".
        sink_tokens: First tokens that all see.
    """

    def __init__(
        self, settings: dict[str, Any], kind: CacheKind, window: int | None, sink_tokens: int
    ) -> None:
        """Begin with the frequencies of the trained length."""
        self.settings, self.kind = settings, kind
        self.window, self.sink_tokens = window, sink_tokens
        self.angles: Angles = shared_angles(settings)
        self._running = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the model's own forward runs, its caches may be written."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def check_running(self) -> None:
        """Raise where someone else writes a cache."""
        if not self._running:
            raise RuntimeError(
                f"cache: expected use by the model that extend_context(cache={self.kind!r}) made it for,"
                " before its undo(): the keys in it were rotated, or left unrotated, for that model"
            )


class Pass:
    """One forward of an extended model with unrotated keys or a window.

    Args:
        extension: Of the model.
        cache: That is written, or None.
        positions: (1 or B, T), of the new tokens.
        past: Tokens in the cache before.
        padding: (B,), so many first tokens of each row are padding; None is none. For a window.
    """

    def __init__(
        self, extension: Extension, cache: Any, positions: Tensor, past: int, padding: Tensor | None
    ) -> None:
        """Take the frequencies of this length."""
        self.extension, self.cache = extension, cache
        self.positions, self.past, self.padding = positions, past, padding
        self.tokens = positions.shape[1]
        angles = extension.angles
        if extension.window is not None:  # places within the cache are what frequencies must serve
            angles.grow(extension.window + extension.sink_tokens)
        elif angles.growing and positions.numel():
            angles.grow(int(positions.max()) + 1)
        self.frequencies = angles.now
        self.slots = torch.arange(past, past + self.tokens, device=positions.device)[None]
        self._positions_after: tuple[Tensor | None, Tensor] | None = None
        self._made: dict[Any, Any] = {}

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x (B, H, T, D) at positions (1 or B, T) by this forward's frequencies."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # Layers share positions, the same tensor in each: angles are computed once.
        cos, sin = self.once(
            (id(positions), dtype), lambda: (*cos_sin(self.frequencies, positions, dtype), positions)
        )[:2]
        return apply_rotary(x, None, cos, sin)[0]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gave in the first layer that asked. A key made of an id must keep its object."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def positions_after(self, before: Tensor | None) -> Tensor:
        """Positions (1 or B, n + T) in a cache that had (1 or B, n); one object for each that comes."""
        if self._positions_after is None or self._positions_after[0] is not before:
            after = self.positions
            if before is not None:
                rows = max(len(before), len(after))
                after = torch.cat([before.expand(rows, -1), after.expand(rows, -1)], dim=1)
            self._positions_after = (before, after)
        return self._positions_after[1]
