"""xPos, and ALiBi's slopes."""

import math

import torch
from torch import Tensor

from longspan.ops._checks import check_positive
from longspan.rope.frequencies import frequencies


def xpos(
    positions: Tensor,
    *,
    head_dim: int,
    base: float = 10000.0,
    scale_base: float = 512.0,
    gamma: float = 0.4,
    center: int = 0,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Tables of xPos (Sun et al. 2023): rotation with a decay that depends on the distance alone.

    Pair i of a query at m is turned and multiplied by ``zeta_i^((m - center) / scale_base)``, of a key
    divided by it, where ``zeta_i = (2 i + gamma d) / ((1 + gamma) d)``: their product decays with m - n,
    so it grows where a key comes after the query. Use it with causal attention.

    Args:
        positions: (..., T), integers.
        head_dim: d, even.
        base: Of the wavelengths.
        scale_base: Distance over which a pair decays by zeta_i. Infinite is plain rotation.
        gamma: 0 or more; the greater, the slower the decay.
        center: Where the multiplier is 1. Cached keys need one constant.

    Returns:
        ``((cos, sin), (cos, sin))`` for queries and for keys, each (..., T, d) float32, halves repeated
        as `longspan.apply_rotary` takes them.

    Raises:
        TypeError: ``positions`` are not integers.
        ValueError: A value does not fit, or positions are so far from ``center`` that the multiplier
            leaves float32.

    Example::

        for_q, for_k = longspan.rope.xpos(torch.arange(4096), head_dim=64, center=2048)
        q, _ = longspan.apply_rotary(q, None, *for_q)
        k, _ = longspan.apply_rotary(k, None, *for_k)
    """
    if not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64):
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"xpos: positions: expected an int32 or int64 tensor, got {got}")
    if not scale_base > 0:
        raise ValueError(f"xpos: scale_base: expected a number above 0, got {scale_base}")
    if not gamma >= 0:
        raise ValueError(f"xpos: gamma: expected 0 or more, got {gamma}")
    inv_freq, _ = frequencies("default", head_dim=head_dim, base=base)
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    zeta = (pairs + gamma * head_dim) / ((1 + gamma) * head_dim)
    at = positions.double()[..., None]
    exponent = (at - center) / scale_base * zeta.log()
    angle = at * inv_freq.to(at)
    # An infinite scale_base times the log of a zeta of 0 is no number: nothing decays.
    growth = torch.zeros_like(angle) if math.isinf(scale_base) else exponent
    if growth.numel() and not float(growth.abs().max()) < 85:
        raise ValueError(
            "xpos: positions: expected them near enough to center that the multiplier is a float32, got "
            f"{int(positions.min())} to {int(positions.max())} around {center} with scale_base "
            f"{scale_base:g} and gamma {gamma:g}"
        )

    def table(x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=-1).float()

    cos, sin, grown = angle.cos(), angle.sin(), growth.exp()
    return (table(cos * grown), table(sin * grown)), (table(cos / grown), table(sin / grown))


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes (Press et al. 2022), for `longspan.attention`'s ``alibi_slopes``.

    Head h of n = 2^a has ``2^(-8 (h + 1) / n)``; other numbers take those of the power of two below,
    then every other one of the power above.

    Args:
        heads: H, 1 or more.

    Returns:
        (H,) float32.

    Raises:
        ValueError: ``heads`` is below 1.

    Example::

        longspan.rope.alibi_slopes(8)  # 1/2, 1/4 ... 1/256
    """
    check_positive("alibi_slopes", "heads", heads)
    power = 1 << (heads.bit_length() - 1)
    exponents = [8 * (h + 1) / power for h in range(power)]
    exponents += [8 * (h + 1) / (2 * power) for h in range(0, 2 * (heads - power), 2)]
    return torch.tensor([2.0**-x for x in exponents])
