"""From fla's layouts to `longspan.delta_rule`'s, and back."""

import torch.nn.functional as F
from torch import Tensor

from longspan.compat.fla.ops._layout import (
    LAYOUT,
    as_gate,
    check_packing,
    heads_first,
    refuse_head_first,
    turned,
)
from longspan.nn._mamba import decay_rates
from longspan.nn.delta_net import unit
from longspan.ops._checks import check_floating, check_shape, sum_dtype
from longspan.ops.delta_rule import delta_rule


def correct(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None = None,
    *,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`delta_rule`, with what fla's kernels can do to their arguments before it."""
    refuse_head_first(function, head_first)
    q, k, v = (heads_first(function, label, x) for label, x in (("q", q), ("k", k), ("v", v)))
    check_packing(function, q, cu_seqlens, cu_seqlens_cpu)
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError(f"{function}: allow_neg_eigval: expected use_beta_sigmoid_in_kernel with it")
    if initial_state is not None:
        check_floating(function, "initial_state", initial_state)
    if use_qk_l2norm_in_kernel:
        q, k = unit(q), unit(k)
    shape = (v.shape[0], v.shape[2], v.shape[1])  # (batch, tokens, value heads)
    if beta is None:
        beta = v.new_ones(shape)
    _check_numbers(function, "beta", beta, shape)
    if use_beta_sigmoid_in_kernel:
        beta = beta.to(sum_dtype(beta)).sigmoid() * (2 if allow_neg_eigval else 1)
    if use_gate_in_kernel:
        g = _gate(function, g, A_log, dt_bias, shape)
    elif A_log is not None or dt_bias is not None:
        raise ValueError(f"{function}: A_log, dt_bias: expected None without use_gate_in_kernel")
    if g is not None:
        _check_numbers(function, "g", g, shape)
        g = as_gate(g, q).transpose(1, 2)
    out, last = delta_rule(
        q, k, v, as_gate(beta, q).transpose(1, 2), gate=g, scale=scale,
        initial_state=turned(initial_state, state_v_first), return_final_state=True,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return out.transpose(1, 2), turned(last, state_v_first) if output_final_state else None


def _gate(
    function: str,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    shape: tuple[int, ...],
) -> Tensor:
    """``-exp(A_log) softplus(g + dt_bias)``."""
    if g is None or A_log is None:
        raise ValueError(f"{function}: g, A_log: expected tensors with use_gate_in_kernel, got None")
    _check_numbers(function, "g", g, shape)
    g = g.to(sum_dtype(g))
    for label, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None:
            check_floating(function, label, x)
            check_shape(function, label, x, shape[-1:], "(value heads,)")
    if dt_bias is not None:
        g = g + dt_bias.to(g.dtype)
    return decay_rates(A_log).to(g.dtype) * F.softplus(g)


def _check_numbers(function: str, label: str, x: Tensor, shape: tuple[int, ...]) -> None:
    check_floating(function, label, x)
    check_shape(function, label, x, shape, f"(batch, tokens, value heads), as v {LAYOUT} has them")
