"""``fla.ops.simple_gla``."""

from torch import Tensor

from longspan.compat.fla.ops._layout import (
    LAYOUT,
    as_gate,
    attend,
    check_packing,
    gate_first,
    refuse_head_first,
)
from longspan.ops._checks import check_floating, check_shape


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a decay for each token and head.

    Args:
        q: (B, T, H, K), float32, float64, bfloat16 or float16.
        k: (B, T, H, K) in q's dtype.
        v: (B, T, H, V) in q's dtype.
        g: (B, T, H), logarithms of decays; None is none.
        g_gamma: (H,), likewise, for all tokens. Together with g they add up.
        scale: Of q; None is K ** -0.5.
        initial_state: (N, H, K, V) for B rows or N packed sequences.
        output_final_state: Also return the state after the last tokens.
        state_v_first: States are (N, H, V, K).
        cu_seqlens: (N + 1,): where each packed sequence begins, and the end; B is 1.
        cu_seqlens_cpu: A copy of it, which saves a copy in fla.
        head_first: False.

    Returns:
        o (B, T, H, V), and the final state or None.

    Raises:
        TypeError, ValueError, RuntimeError: As `longspan.linear_attention`.

    Example::

        q, k, v = torch.randn(3, 1, 1000, 4, 64)
        g = torch.nn.functional.logsigmoid(torch.randn(1, 1000, 4))
        o, _ = chunk_simple_gla(q, k, v, g)
    """
    name = "chunk_simple_gla"
    refuse_head_first(name, head_first)
    gate = _gate(name, q, g, g_gamma)
    check_packing(name, q, cu_seqlens, cu_seqlens_cpu)
    return attend(
        name, q, k, v, gate, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, state_v_first=state_v_first, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_simple_gla`, whose arguments these are.

    Args:
        reverse: From the last token to the first.
    """
    name = "fused_recurrent_simple_gla"
    refuse_head_first(name, head_first)
    gate = _gate(name, q, g, g_gamma)
    check_packing(name, q, cu_seqlens)
    return attend(
        name, q, k, v, gate, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, reverse=reverse, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _gate(name: str, q: Tensor, g: Tensor | None, g_gamma: Tensor | None) -> Tensor | None:
    check_floating(name, "q", q)
    check_shape(name, "q", q, (None,) * 4, LAYOUT)
    if g is not None:
        check_shape(name, "g", g, q.shape[:3], "(batch, tokens, heads)")
        g = gate_first(name, "g", g, q)
    if g_gamma is None:
        return g
    check_floating(name, "g_gamma", g_gamma)
    check_shape(name, "g_gamma", g_gamma, (q.shape[2],), "(heads,)")
    g_gamma = as_gate(g_gamma, q)
    return g_gamma if g is None else g + g_gamma[:, None]
