"""``fla.ops.gated_delta_rule``."""

from torch import Tensor

from longspan.compat.fla.ops._delta import correct


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet's delta rule (`longspan.delta_rule`, which has the equations); differentiable.

    Args:
        q: (B, T, H, K), float32, float64, bfloat16 or float16.
        k: (B, T, H, K) in q's dtype.
        v: (B, T, HV, V) in q's dtype, HV a multiple of H.
        g: (B, T, HV), logarithms of decays.
        beta: (B, T, HV).
        scale: Of q; None is K ** -0.5.
        initial_state: (N, HV, K, V) for B rows or N packed sequences.
        output_final_state: Also return the state after the last tokens.
        use_qk_l2norm_in_kernel: Divide q and k by the root of their square sum and 1e-6.
        use_beta_sigmoid_in_kernel: beta's sigmoid is taken.
        allow_neg_eigval: Twice that.
        state_v_first: States are (N, HV, V, K).
        cu_seqlens: (N + 1,): where each packed sequence begins, and the end; B is 1.
        cu_seqlens_cpu: A copy of it, which saves a copy in fla.
        use_gate_in_kernel: The decay's logarithm is ``-exp(A_log) softplus(g + dt_bias)``.
        A_log: (HV,), with that.
        dt_bias: (HV,), with that; None is 0.
        head_first: False.

    Returns:
        o (B, T, HV, V), and the final state or None.

    Raises:
        TypeError, ValueError, RuntimeError: As `longspan.delta_rule`.

    Example::

        q, k, v = torch.randn(3, 1, 1000, 4, 64)
        g = torch.nn.functional.logsigmoid(torch.randn(1, 1000, 4))
        o, _ = chunk_gated_delta_rule(
            q, k, v, g, torch.rand(1, 1000, 4), use_qk_l2norm_in_kernel=True
        )
    """
    return correct(
        "chunk_gated_delta_rule", q, k, v, beta, g, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu,
        use_gate_in_kernel=use_gate_in_kernel, A_log=A_log, dt_bias=dt_bias, head_first=head_first,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_gated_delta_rule`, whose arguments these are.

    Args:
        g: None is no decay.
        gk, gv: None: there are no gates of channels here.
        beta: None is 1.
    """
    name = "fused_recurrent_gated_delta_rule"
    for label, gate in (("gk", gk), ("gv", gv)):
        if gate is not None:
            raise ValueError(f"{name}: {label}: expected None, for there are no gates of channels here")
    return correct(
        name, q, k, v, beta, g, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens, use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log, dt_bias=dt_bias, head_first=head_first,
    )  # fmt: skip
