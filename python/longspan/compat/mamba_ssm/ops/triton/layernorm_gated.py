"""`rmsnorm_fn` and `RMSNorm`, with a gate; the gate comes after the norm unless told otherwise."""

import torch
from torch import Tensor

from longspan.nn._mamba import as_parameter
from longspan.nn.norm import RMSNormGated
from longspan.ops.norm import rms_norm_gated


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMS normalisation with a gate (`longspan.rms_norm_gated`); differentiable.

    Args:
        x: (..., N).
        weight: (N,), any floating dtype.
        bias: (N,) or None.
        z: (..., N), the gate, in x's dtype.
        eps: Added to the mean square.
        group_size: Channels that are normalised together; None is N.
        norm_before_gate: norm(x) * silu(z), else norm(x * silu(z)).

    Returns:
        As x.

    Raises:
        TypeError, ValueError: As `longspan.rms_norm_gated`.

    Example::

        x, z = torch.randn(2, 4, 100, 768)
        y = rmsnorm_fn(x, torch.ones(768), None, z)
    """
    return rms_norm_gated(
        x, as_parameter(weight, x), None if bias is None else as_parameter(bias, x), z, eps=eps,
        group_size=group_size, norm_before_gate=norm_before_gate,
    )  # fmt: skip


class RMSNorm(RMSNormGated):
    """`longspan.nn.RMSNormGated` with mamba-ssm's default, ``norm_before_gate=True``.

    Args:
        hidden_size, eps, group_size, norm_before_gate, device, dtype: As there.

    Example::

        RMSNorm(768)(*torch.randn(2, 4, 100, 768))
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the weight."""
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype)
