"""torch's ``flex_attention`` on the CPU, with a backward, and the score_mods that it takes."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest
from torch.nn.attention.flex_attention import BlockMask as FlexMask

from longspan.ops._checks import check_tensor
from longspan.ops.attention import attention
from longspan.ops.block_sparse import block_sparse_attention
from longspan.patterns import BlockMask

# A torch BlockMask's mask_mod is asked once, not at every layer and step.
_converted: "weakref.WeakKeyDictionary[FlexMask, BlockMask]" = weakref.WeakKeyDictionary()


class Softcap:
    """The score_mod ``cap * tanh(score / cap)``, for `flex_attention` here and for torch's.

    Args:
        cap: Above 0.

    Raises:
        ValueError: ``cap`` is not above 0.

    Example::

        flex_attention(q, k, v, score_mod=Softcap(30.0))
    """

    def __init__(self, cap: float) -> None:
        """Keep the cap."""
        if not cap > 0:
            raise ValueError(f"Softcap: cap: expected a number above 0, got {cap}")
        self.cap = float(cap)

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """One score's, as torch calls it."""
        return self.cap * torch.tanh(score / self.cap)


class Alibi:
    """The score_mod ``score - slopes[h] * |q_idx - kv_idx|``, for `flex_attention` here and for torch's.

    Args:
        slopes: (H,), floating.

    Example::

        flex_attention(q, k, v, score_mod=Alibi(torch.tensor([0.5, 0.25])))
    """

    def __init__(self, slopes: Tensor) -> None:
        """Keep the slopes."""
        check_tensor("Alibi", "slopes", slopes)
        self.slopes = slopes

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """One score's, as torch calls it."""
        return score - self.slopes[h] * (q_idx - kv_idx).abs()


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Softcap | Alibi | None = None,
    block_mask: FlexMask | BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """``torch.nn.attention.flex_attention.flex_attention`` on the CPU: not compiled, and differentiable.

    Args:
        query: (B, H, T_q, D), float32, float64, bfloat16 or float16.
        key: (B, H, T_k, D); with ``enable_gqa`` (B, H_kv, T_k, D), H a multiple of H_kv.
        value: (B, H, T_k, D_v), likewise.
        score_mod: None, `Softcap` or `Alibi` (T_q = T_k). Other functions cannot be run in a compiled
            kernel.
        block_mask: torch's BlockMask, whose mask_mod may be any, or one of :mod:`longspan.patterns`.
            torch's is turned into ours at the first call and remembered while it lives.
        scale: Of the scores; None is D ** -0.5.
        enable_gqa: Let key and value have fewer heads.
        return_lse: Also return the log-sum-exp (B, H, T_q).
        kernel_options: None; torch's options choose among torch's kernels.
        return_aux: ``AuxRequest(lse=True)`` returns (out, AuxOutput).

    Returns:
        out (B, H, T_q, D_v), 0 where a query sees no key; a pair with ``return_lse`` or ``return_aux``.

    Raises:
        TypeError: ``score_mod`` or ``block_mask`` is of another kind.
        ValueError: Shapes, block size or values do not fit.

    Example::

        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 4096, 4096, device="cpu")
        longspan.compat.flex_attention(q, k, v, block_mask=mask).sum().backward()
    """
    name = "flex_attention"
    for label, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, label, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: {label}: expected 4 dimensions, got {tuple(x.shape)}")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"{name}: key: expected query's heads, {query.shape[1]}, got {key.shape[1]}; "
            "fewer need enable_gqa=True"
        )
    if kernel_options is not None:
        raise ValueError(f"{name}: kernel_options: expected None, got {kernel_options}")
    if return_aux is not None and return_aux.max_scores:
        raise ValueError(f"{name}: return_aux: expected no max_scores, got {return_aux}")
    if return_aux is not None and return_lse:
        raise ValueError(f"{name}: return_lse: expected False beside return_aux")
    options: dict[str, Any] = {"scale": scale, "return_lse": True}
    if isinstance(score_mod, Softcap):
        options["softcap"] = score_mod.cap
    elif isinstance(score_mod, Alibi):
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                f"{name}: score_mod: expected as many keys as queries for Alibi, "
                f"got {key.shape[2]} and {query.shape[2]}"
            )
        options["alibi_slopes"] = score_mod.slopes
    elif score_mod is not None:
        raise TypeError(
            f"{name}: score_mod: expected None, longspan.compat.Softcap or longspan.compat.Alibi, "
            f"got {score_mod}; a bool rule of positions belongs into block_mask"
        )
    if isinstance(block_mask, FlexMask):
        converted = _converted.get(block_mask)
        if converted is None:
            converted = _converted[block_mask] = BlockMask.from_flex(block_mask)
        block_mask = converted
    if block_mask is None:
        out, lse = attention(query, key, value, **options)
    else:
        out, lse = block_sparse_attention(query, key, value, block_mask, **options)
    if return_aux is not None:
        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out
