"""``fla.ops.retention``."""

from torch import Tensor

from longspan.compat.fla.ops._layout import attend, check_packing, refuse_head_first
from longspan.nn.retention import retention_gate
from longspan.ops._checks import check_floating, check_shape


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """RetNet's retention: linear attention with a decay of ``1 - 2^(-5 - h)`` in head h.

    Args:
        q: (B, T, H, K), float32, float64, bfloat16 or float16.
        k: (B, T, H, K) in q's dtype.
        v: (B, T, H, V) in q's dtype.
        scale: Of q; None is K ** -0.5.
        initial_state: (N, H, K, V) for B rows or N packed sequences.
        output_final_state: Also return the state after the last tokens.
        cu_seqlens: (N + 1,): where each packed sequence begins, and the end; B is 1.
        head_first: False.

    Returns:
        o (B, T, H, V), and the final state or None.

    Raises:
        TypeError, ValueError, RuntimeError: As `longspan.linear_attention`.

    Example::

        q, k, v = torch.randn(3, 1, 1000, 4, 64)
        o, state = chunk_retention(q, k, v, output_final_state=True)
    """
    name = "chunk_retention"
    refuse_head_first(name, head_first)
    return _retention(name, q, k, v, scale, initial_state, output_final_state, False, False, cu_seqlens)


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_retention`, whose arguments these are.

    Args:
        reverse: From the last token to the first.
        state_v_first: States are (N, H, V, K).
    """
    name = "fused_recurrent_retention"
    refuse_head_first(name, head_first)
    return _retention(
        name, q, k, v, scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens
    )


def _retention(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    reverse: bool,
    state_v_first: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    check_floating(name, "q", q)
    check_shape(name, "q", q, (None,) * 4, "(batch, tokens, heads, channels)")
    check_packing(name, q, cu_seqlens)
    return attend(
        name, q, k, v, retention_gate(q.shape[2], q), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, reverse=reverse, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
