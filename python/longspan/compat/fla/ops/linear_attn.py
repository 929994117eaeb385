"""``fla.ops.linear_attn``."""

from typing import Any

from torch import Tensor

from longspan.compat.fla.ops._layout import attend, check_packing, refuse_head_first


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Any]:
    """Linear attention (`longspan.linear_attention`, which has the equations); differentiable.

    Args:
        q: (B, T, H, K), float32, float64, bfloat16 or float16.
        k: (B, T, H, K) in q's dtype.
        v: (B, T, H, V) in q's dtype.
        scale: Of q; None is K ** -0.5.
        initial_state: (N, H, K, V) for B rows or N packed sequences; with ``normalize`` a pair of it and
            z (N, 1, H, K).
        output_final_state: Also return the state after the last tokens, of that form.
        normalize: Divide by the sum of the weights, and 1e-10.
        cu_seqlens: (N + 1,): where each packed sequence begins, and the end; B is 1.
        head_first: False.

    Returns:
        o (B, T, H, V), and the final state or None.

    Raises:
        TypeError, ValueError, RuntimeError: As `longspan.linear_attention`.

    Example::

        q, k, v = torch.rand(3, 1, 1000, 4, 64)
        o, _ = chunk_linear_attn(q, k, v)
    """
    name = "chunk_linear_attn"
    refuse_head_first(name, head_first)
    check_packing(name, q, cu_seqlens)
    return attend(
        name, q, k, v, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, normalize=normalize,
    )  # fmt: skip


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Any]:
    """As `chunk_linear_attn`, whose arguments these are.

    Args:
        reverse: From the last token to the first.
        normalize: False unless asked for.
    """
    name = "fused_recurrent_linear_attn"
    refuse_head_first(name, head_first)
    check_packing(name, q, cu_seqlens)
    return attend(
        name, q, k, v, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        reverse=reverse, cu_seqlens=cu_seqlens, normalize=normalize,
    )  # fmt: skip
