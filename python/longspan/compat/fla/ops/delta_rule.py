"""``fla.ops.delta_rule``."""

from torch import Tensor

from longspan.compat.fla.ops._delta import correct


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """DeltaNet's delta rule (`longspan.delta_rule`, which has the equations); differentiable.

    Args:
        q: (B, T, H, K), float32 (which fla refuses), float64, bfloat16 or float16.
        k: (B, T, H, K) in q's dtype.
        v: (B, T, HV, V) in q's dtype, HV a multiple of H.
        beta: (B, T, HV).
        scale: Of q; None is K ** -0.5.
        initial_state: (N, HV, K, V) for B rows or N packed sequences.
        output_final_state: Also return the state after the last tokens.
        use_qk_l2norm_in_kernel: Divide q and k by the root of their square sum and 1e-6.
        cu_seqlens: (N + 1,): where each packed sequence begins, and the end; B is 1.
        cu_seqlens_cpu: A copy of it, which saves a copy in fla.
        head_first: False.

    Returns:
        o (B, T, HV, V), and the final state or None.

    Raises:
        TypeError, ValueError, RuntimeError: As `longspan.delta_rule`.

    Example::

        q, k, v = torch.randn(3, 1, 1000, 4, 64)
        o, _ = chunk_delta_rule(q, k, v, torch.rand(1, 1000, 4), use_qk_l2norm_in_kernel=True)
    """
    return correct(
        "chunk_delta_rule", q, k, v, beta, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu, head_first=head_first,
    )  # fmt: skip


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_delta_rule`, whose arguments these are.

    Args:
        beta: None is 1.
    """
    return correct(
        "fused_recurrent_delta_rule", q, k, v, beta, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens, head_first=head_first,
    )  # fmt: skip
