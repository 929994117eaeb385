"""``fla.ops.gla``."""

from torch import Tensor

from longspan.compat.fla.ops._layout import (
    LAYOUT,
    attend,
    check_packing,
    gate_first,
    refuse_head_first,
)
from longspan.ops._checks import check_floating, check_shape


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention: a decay for each token, head and key channel.

    Args:
        q: (B, T, H, K), float32, float64, bfloat16 or float16.
        k: (B, T, H, K) in q's dtype.
        v: (B, T, H, V) in q's dtype.
        g: (B, T, H, K), logarithms of decays.
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
        g = torch.nn.functional.logsigmoid(torch.randn(1, 1000, 4, 64))
        o, state = chunk_gla(q, k, v, g, output_final_state=True)
    """
    name = "chunk_gla"
    refuse_head_first(name, head_first)
    gate = _gate(name, "g", q, g)
    check_packing(name, q, cu_seqlens, cu_seqlens_cpu)
    return attend(
        name, q, k, v, gate, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, state_v_first=state_v_first, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_gla`, whose arguments these are.

    Args:
        gk: (B, T, H, K), chunk_gla's g; None is none.
        gv: None: there are no gates of values here.
        reverse: From the last token to the first.
    """
    name = "fused_recurrent_gla"
    refuse_head_first(name, head_first)
    if gv is not None:
        raise ValueError(f"{name}: gv: expected None, for there are no gates of values here")
    gate = None if gk is None else _gate(name, "gk", q, gk)
    check_packing(name, q, cu_seqlens)
    return attend(
        name, q, k, v, gate, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, reverse=reverse, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _gate(name: str, label: str, q: Tensor, gate: Tensor) -> Tensor:
    check_floating(name, "q", q)
    check_shape(name, "q", q, (None,) * 4, LAYOUT)
    check_floating(name, label, gate)
    check_shape(name, label, gate, q.shape, "q's shape")
    return gate_first(name, label, gate, q)
