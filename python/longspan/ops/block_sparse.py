"""Attention over the blocks that a mask names: `block_sparse_attention`."""

from typing import Any

import torch
from torch import Tensor

from longspan.ops._autograd import overload, register_attention
from longspan.ops._checks import (
    check_attention,
    check_attention_options,
    empty_heads,
    has_kernels,
    sum_dtype,
)
from longspan.patterns import BlockMask
from longspan.reference import block_sparse as reference

_forward = overload("block_sparse_attention_forward")


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Exact attention over the keys that a block mask lets each query see.

    As `longspan.attention` with ``block_mask.to_dense()`` for its mask, but blocks that nobody sees
    cost nothing, forward and backward, and nothing of size tokens x keys is made: the operator behind
    Longformer (Beltagy et al. 2020), BigBird (Zaheer et al. 2020) and the Sparse Transformer (Child et
    al. 2019). A query that sees no key gets 0 and no gradient. What a query cannot see never reaches
    its output or gradient, not even a NaN.

    Args:
        q: (B, H, T_q, D), float32, float64, bfloat16 or float16, any strides.
        k: (B, H_kv, T_k, D). H is a multiple of H_kv; query head h reads key head h // (H / H_kv).
        v: (B, H_kv, T_k, D_v).
        block_mask: Of shape (T_q, T_k), its batch B or 1 and its heads H or 1: see
            :mod:`longspan.patterns`.
        scale: Of the scores; None is D ** -0.5.
        softcap: c > 0 replaces a score x by c * tanh(x / c), after ``scale``; 0 is off.
        alibi_slopes: (H,) or (B, H); ``slope * |i + T_k - T_q - j|`` is subtracted. Not
            differentiable.
        dropout_p: Probability in [0, 1) of dropping a weight; drawn from torch's generator, and of
            weights that both see what `longspan.attention` drops after the same ``manual_seed``.
        return_lse: Also return the log-sum-exp of each query's scores.

    Returns:
        out (B, H, T_q, D_v) in q's dtype; with ``return_lse`` a pair (out, lse), lse (B, H, T_q) in
        float32 (float64 for float64), -inf for a query without keys, and differentiable.

    Raises:
        TypeError: A dtype is not supported or differs from q's, or ``block_mask`` is of another kind.
        ValueError: Shapes or values do not fit.

    Example::

        mask = longspan.patterns.longformer(16384, window=512, global_tokens=[0])
        q, k, v = torch.randn(3, 1, 8, 16384, 64, requires_grad=True)
        longspan.block_sparse_attention(q, k, v, mask).sum().backward()
    """
    name = "block_sparse_attention"
    q, k, v = check_attention(name, q, k, v)
    check_attention_options(name, q, q.shape[0], 0, None, alibi_slopes, softcap, dropout_p)
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"{name}: block_mask: expected a longspan.patterns.BlockMask (BlockMask.from_flex and "
            f"from_dense make one of others), got {type(block_mask).__name__}"
        )
    lengths = (q.shape[2], k.shape[2])
    if block_mask.shape != lengths:
        raise ValueError(
            f"{name}: block_mask: expected one for {lengths[0]} queries and {lengths[1]} keys, "
            f"got {block_mask.shape}"
        )
    for what, n, got in (
        ("batch", q.shape[0], block_mask.batch),
        ("heads", q.shape[1], block_mask.heads),
    ):
        if got not in (1, n):
            raise ValueError(
                f"{name}: block_mask: expected {what} of {n}, as q has them, or 1, got {got}"
            )
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    seed = torch.randint(2**62, (1,)) if dropout_p else None
    if has_kernels(name, q):
        m = block_mask
        out, lse = _forward(
            q, k, v, m.row_begins, m.columns, m.row_patterns, m.column_begins, m.rows,
            m.column_patterns, m.bits, alibi_slopes, seed, m.batch, m.heads, scale, softcap, dropout_p,
        )  # fmt: skip
    else:
        out, lse = reference.block_sparse_attention(
            q, k, v, block_mask.to_dense(), scale=scale, softcap=softcap, alibi_slopes=alibi_slopes,
            dropout_p=dropout_p, dropout_seed=seed,
        )  # fmt: skip
    return (out, lse) if return_lse else out


# ---- fakes


@torch.library.register_fake("longspan::block_sparse_attention_forward")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=sum_dtype(q))


@torch.library.register_fake("longspan::block_sparse_attention_backward")
def _(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q, q.shape[3]), empty_heads(k, k.shape[3]), empty_heads(v, v.shape[3])


# ---- autograd

register_attention("block_sparse_attention", tensors=12)
