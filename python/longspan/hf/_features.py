"""Feature maps of linearized attention, with parameters of each head's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longspan.nn.feature_maps import FEATURE_MAPS

_GREATEST_MAGNITUDE = 60.0  # exp of it, times many tokens, is still a float32


def _both_signs(y: Tensor) -> Tensor:
    return torch.cat([y, -y], dim=-1).softmax(-1)


# By name f, never negative; hedgehog has 2 D features, the others D.
NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "hedgehog": _both_signs,
    **{name: FEATURE_MAPS[name][0](0) for name in ("elu", "relu", "softmax")},
}


class HeadFeatures(nn.Module):
    """``f(x W + b)`` and the logarithm of a magnitude, ``x . m``, with W, b and m of each head.

    Hedgehog's map (Zhang et al. 2024) is f over both signs of a projection. Its softmax takes from a
    key how much weight it has beside others, and from a query how much weight the linear part has
    beside an exact one; the magnitude gives both back.

    Args:
        kind: f, a name in `NONLINEARITIES`.
        heads, head_dim: H, D.
        scale: W begins as the identity times this; b and m as 0.
        magnitude: Whether there is one.
        kw: device and dtype of the parameters.
    """

    def __init__(
        self, kind: str, heads: int, head_dim: int, scale: float, magnitude: bool, **kw: Any
    ) -> None:
        """Make the parameters."""
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.eye(head_dim, **kw).mul(scale).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, head_dim, **kw))
        self.magnitude = nn.Parameter(torch.zeros(heads, head_dim, 1, **kw)) if magnitude else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, H, T, D) -> features (B, H, T, F), log magnitude (B, H, T) or None, in x's dtype."""
        y = x @ self.weight.to(x.dtype) + self.bias.to(x.dtype)
        features = NONLINEARITIES[self.kind](y)
        if self.magnitude is None:
            return features, None
        log = (x @ self.magnitude.to(x.dtype)).squeeze(-1)
        return features, log.clamp(max=_GREATEST_MAGNITUDE)


class AttentionFeatures(nn.Module):
    """The feature maps of one attention layer: ``query`` of H heads, ``key`` of H_kv.

    Args:
        kind: A name in `NONLINEARITIES`.
        heads, kv_heads, head_dim: H, H_kv, D.
        scale: Of the layer's scores; projections begin as twice its root.
        hybrid: Whether there is an exact part beside the linear one, whose weight the queries'
            magnitude and ``offset`` (H, 1) then say. Without one these cancel, so there are none.
        kw: device and dtype of the parameters.
    """

    def __init__(
        self, kind: str, heads: int, kv_heads: int, head_dim: int, scale: float, hybrid: bool, **kw: Any
    ) -> None:
        """Make both."""
        super().__init__()
        begin = 2 * scale**0.5
        self.query = HeadFeatures(kind, heads, head_dim, begin, hybrid, **kw)
        self.key = HeadFeatures(kind, kv_heads, head_dim, begin, True, **kw)
        self.offset = nn.Parameter(torch.zeros(heads, 1, **kw)) if hybrid else None

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """q (B, H, T, D), k (B, H_kv, T, D) -> features of q, their log magnitude, features of k."""
        features, log = self.query(q)
        if log is not None and self.offset is not None:
            log = log + self.offset.to(log.dtype)
        of_keys, log_keys = self.key(k)
        return features, log, of_keys * log_keys.exp().unsqueeze(-1)
