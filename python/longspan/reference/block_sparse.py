"""Block-sparse attention, densely: the mask written out, in plain attention."""

from torch import Tensor

from longspan.reference.attention import attention


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (out, lse), with bool ``mask`` (heads or 1, T_q, T_k) or with a batch before it."""
    return attention(
        q, k, v, mask.to(q.device), scale=scale, softcap=softcap, alibi_slopes=alibi_slopes,
        dropout_p=dropout_p, dropout_seed=dropout_seed,
    )  # fmt: skip
