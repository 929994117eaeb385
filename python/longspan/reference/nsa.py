"""Native Sparse Attention, densely: three masks, three softmaxes, three gates."""

import torch
from torch import Tensor

from longspan.reference.attention import attention
from longspan.reference.selected import select_blocks, selected_attention


def compress_keys(x: Tensor, length: int, stride: int) -> Tensor:
    """-> means of spans of ``length`` tokens, ``stride`` apart, until all tokens are covered."""
    starts = [0]
    while starts[-1] + length < x.shape[-2]:
        starts.append(starts[-1] + stride)
    return torch.stack([x[..., i : i + length, :].mean(-2) for i in starts], -2)


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor,
    g_slc: Tensor,
    g_swa: Tensor,
    *,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: int = 16,
    block_size: int = 64,
    window_size: int = 512,
    compress_length: int = 32,
    compress_stride: int = 16,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """-> out (B, H, T_q, D_v)."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    keys = k.shape[2]
    k_cmp = compress_keys(k, compress_length, compress_stride) if k_cmp is None else k_cmp
    v_cmp = compress_keys(v, compress_length, compress_stride) if v_cmp is None else v_cmp
    indices, o_cmp, _ = select_blocks(
        q, k_cmp, v_cmp, None, None, keys, compress_length, compress_stride, block_size, block_counts,
        causal, scale,
    )  # fmt: skip
    block_indices = indices if block_indices is None else block_indices
    o_slc, _ = selected_attention(q, k, v, block_indices, None, block_size, causal, scale)
    right = 0 if causal else window_size - 1
    o_swa, _ = attention(q, k, v, window=(window_size - 1, right), scale=scale)
    gated = zip((g_cmp, g_slc, g_swa), (o_cmp, o_slc, o_swa))
    return sum(gate[..., None] * out for gate, out in gated)  # type: ignore[return-value]
