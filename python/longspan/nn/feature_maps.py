"""Feature maps of `LinearAttention`, with flash-linear-attention's names and parameters."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Elu(nn.Module):
    """``elu(x) + 1`` (Katharopoulos et al. 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), positive."""
        # Not elu(x) + 1, which is 0 where exp(x) is below a rounding of 1.
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


class Hedgehog(nn.Module):
    """``softmax([2 W x + 2 b, -2 W x - 2 b])``, W from the identity (Zhang et al. 2024)."""

    def __init__(self, head_dim: int, **kind: Any) -> None:
        """Make the map."""
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim, **kind)
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 2 D), positive."""
        y = 2 * self.layer(x)
        return torch.cat([y, -y], dim=-1).softmax(-1)


class T2R(nn.Module):
    """``relu(W x)`` (Kasai et al. 2021)."""

    def __init__(self, head_dim: int, **kind: Any) -> None:
        """Make the map."""
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim, bias=False, **kind)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), not negative."""
        return F.relu(self.layer(x))


class DPFP(nn.Module):
    """Products of ``[relu(x), relu(-x)]`` with itself, turned by 1 to ``nu`` (Schlag et al. 2021)."""

    def __init__(self, nu: int = 4) -> None:
        """``nu``: how many turns."""
        super().__init__()
        self.nu = nu

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 2 D nu), not negative."""
        y = torch.cat([F.relu(x), F.relu(-x)], dim=-1)
        return torch.cat([y * y.roll(i, -1) for i in range(1, self.nu + 1)], dim=-1)


class ElementwiseProduct(nn.Module):
    """``(W1 x + b1) * (W2 x + b2)``, of either sign."""

    def __init__(self, head_dim: int, **kind: Any) -> None:
        """Make the maps."""
        super().__init__()
        self.layer1 = nn.Linear(head_dim, head_dim, **kind)
        self.layer2 = nn.Linear(head_dim, head_dim, **kind)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.layer1(x) * self.layer2(x)


class Softmax(nn.Module):
    """``softmax(x)`` over the channels (Shen et al. 2021, Efficient attention)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), positive."""
        return x.softmax(-1)


# name -> how to make it, and how many features D channels have.
FEATURE_MAPS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "elu": (lambda head_dim, **kind: Elu(), 1),
    "relu": (lambda head_dim, **kind: nn.ReLU(), 1),
    "identity": (lambda head_dim, **kind: nn.Identity(), 1),
    "softmax": (lambda head_dim, **kind: Softmax(), 1),
    "elementwise_product": (ElementwiseProduct, 1),
    "hedgehog": (Hedgehog, 2),
    "t2r": (T2R, 1),
    "dpfp": (lambda head_dim, **kind: DPFP(), 8),
}
