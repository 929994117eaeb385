"""RMS normalisation with a gate."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """In float32, or float64 for float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    v = x.to(dtype)
    if z is not None and not norm_before_gate:
        v = v * silu(z.to(dtype))
    groups = v.unflatten(-1, (-1, group_size or x.shape[-1]))
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    out = groups.flatten(-2) * weight.to(dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    if z is not None and norm_before_gate:
        out = out * silu(z.to(dtype))
    return out.to(x.dtype)
