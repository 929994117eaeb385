"""`causal_conv1d_varlen_states`: the state after each of many packed sequences."""

from torch import Tensor

from longspan.nn._mamba import last_inputs
from longspan.ops._checks import check_floating, check_integers, check_shape


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """Collect the last ``state_len`` tokens of each packed sequence; differentiable.

    Args:
        x: (total, C), any floating dtype and strides.
        cu_seqlens: (S + 1,) int32 or int64: where each sequence begins, and the end.
        state_len: How many tokens of each.

    Returns:
        (S, C, state_len) in x's dtype, the newest last; zeros where a sequence is shorter.

    Raises:
        TypeError, ValueError: Dtypes or shapes do not fit.

    Example::

        causal_conv1d_varlen_states(torch.randn(10, 768), torch.tensor([0, 3, 10]), 4)  # (2, 768, 4)
    """
    name = "causal_conv1d_varlen_states"
    check_floating(name, "x", x)
    check_shape(name, "x", x, (None, None), "(total, channels)")
    check_integers(name, "cu_seqlens", cu_seqlens, (None,), "(sequences + 1,)")
    if state_len < 0:
        raise ValueError(f"{name}: state_len: expected 0 or more, got {state_len}")
    return last_inputs(x.t().unsqueeze(0), state_len, cu_seqlens)
