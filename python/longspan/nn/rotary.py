"""`RotaryEmbedding`: rotation by position with any of `longspan.rope`'s scaling methods."""

from typing import Any

import torch
from torch import Tensor, nn

from longspan.ops._checks import check_between, check_integers
from longspan.ops.rotary import apply_rotary
from longspan.rope.angles import MOST_KEPT, shared_angles


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
        self._angles = shared_angles(self.settings, unscaled_tokens)

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
        if kept and last <= MOST_KEPT:
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
