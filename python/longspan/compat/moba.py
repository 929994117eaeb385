"""MoonshotAI's ``moba`` over longspan: `moba_attn_varlen`."""

from itertools import pairwise

import torch
from torch import Tensor

from longspan.ops._checks import check_integers, check_shape, check_tensor
from longspan.ops.moba import mixture_of_block_attention

__all__ = ["moba_attn_varlen"]


def moba_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    moba_chunk_size: int,
    moba_topk: int,
) -> Tensor:
    """Causal Mixture of Block Attention over packed sequences, as ``moba.moba_efficient`` has it.

    Sequences are attended one after the other. Unlike flash-linear-attention's ``parallel_moba``,
    ``moba_topk=1`` is a query's own chunk alone, as the definition has it. Grouped heads are allowed.

    Args:
        q: (total, H, D).
        k: (total, H_kv, D).
        v: (total, H_kv, D_v).
        cu_seqlens: (B + 1,) int32 or int64: where each sequence begins, and the end, ``total``.
        max_seqlen: Not needed here, but checked: no sequence is longer.
        moba_chunk_size: Tokens of a block.
        moba_topk: Blocks that a query sees, its own included.

    Returns:
        (total, H, D_v).

    Raises:
        TypeError, ValueError: Dtypes, shapes or values do not fit.

    Example::

        q, k, v = torch.randn(3, 1000, 8, 64)
        moba_attn_varlen(q, k, v, torch.tensor([0, 300, 1000]), 700, 128, 3)
    """
    name = "moba_attn_varlen"
    for label, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, label, x)
        check_shape(name, label, x, (q.shape[0], None, None), "(total, heads, channels)")
    check_integers(name, "cu_seqlens", cu_seqlens, (None,), "(batch + 1,)")
    offsets = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(offsets)]
    if offsets[:1] != [0] or offsets[-1] != q.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(
            f"{name}: cu_seqlens: expected to ascend from 0 to the {q.shape[0]} rows, got {offsets}"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"{name}: max_seqlen: expected {max(lengths)} or more, the longest of cu_seqlens, "
            f"got {max_seqlen}"
        )
    parts = [
        mixture_of_block_attention(
            *(x[begin:end].transpose(0, 1)[None] for x in (q, k, v)),
            block_size=moba_chunk_size,
            topk=moba_topk,
        )[0].transpose(0, 1)
        for begin, end in pairwise(offsets)
    ]
    return torch.cat(parts) if parts else q.new_empty(0, q.shape[1], v.shape[2])
