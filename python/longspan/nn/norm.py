"""`RMSNormGated`, the normalisation inside Mamba-2's layer."""

import torch
from torch import Tensor, nn

from longspan.nn._mamba import as_parameter
from longspan.ops._checks import check_positive
from longspan.ops.norm import rms_norm_gated


class RMSNormGated(nn.Module):
    """RMS normalisation over groups of channels, with a gate before or after it.

    `longspan.rms_norm_gated` has the equation.

    Args:
        hidden_size: Channels.
        eps: Added to the mean square.
        group_size: Channels that are normalised together, a divisor of hidden_size; None is all.
        norm_before_gate: Whether the gate multiplies what was normalised, rather than what will be.
        device, dtype: Of the parameter, ``weight`` (hidden_size,), from 1.
        elementwise_affine: Whether there is one.

    Raises:
        ValueError: Sizes do not fit together.

    Example::

        longspan.nn.RMSNormGated(1536, group_size=512)(*torch.randn(2, 1, 1000, 1536))
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        elementwise_affine: bool = True,
    ) -> None:
        """Make the weight."""
        super().__init__()
        check_positive("RMSNormGated", "hidden_size", hidden_size)
        if group_size is not None and (group_size < 1 or hidden_size % group_size):
            raise ValueError(
                f"RMSNormGated: group_size: expected a divisor of {hidden_size}, got {group_size}"
            )
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        weight = torch.ones(hidden_size, device=device, dtype=dtype)
        self.weight: Tensor
        if elementwise_affine:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight, persistent=False)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise x (..., hidden_size), gated by z of its shape and dtype, or by nothing."""
        return rms_norm_gated(
            x, as_parameter(self.weight, x), z=z, eps=self.eps, group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}"
        )
