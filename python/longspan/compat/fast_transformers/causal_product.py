"""``fast_transformers.causal_product``."""

from torch import Tensor

from longspan.ops.linear_attention import linear_attention


def causal_dot_product(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """``out_t = sum over s <= t of (Q_t . K_s) V_s``, neither scaled nor normalised; differentiable.

    Args:
        Q: (N, H, L, E), float32, float64, bfloat16 or float16.
        K: (N, H, L, E) in Q's dtype.
        V: (N, H, L, M) in Q's dtype.

    Returns:
        (N, H, L, M) in Q's dtype.

    Raises:
        TypeError, ValueError: As `longspan.linear_attention`.

    Example::

        Q, K, V = torch.rand(3, 1, 8, 1000, 64)
        out = causal_dot_product(Q, K, V)
    """
    return linear_attention(Q, K, V, scale=1.0)
