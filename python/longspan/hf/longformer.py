"""The forward of transformers' Longformer self-attention on longspan's kernels.

LED's encoder has the same layer. What each token sees is a block mask, made once a forward for all
layers of one window; the global tokens' rows are attention of their own.
"""

from typing import Any

import torch
from torch import Tensor

from longspan.nn._sparse import longformer_attention, longformer_mask, without_padding

_mask = torch.compiler.disable(longformer_mask)  # made of values: not for dynamo to look into


def longformer_forward(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    is_index_masked: Tensor | None = None,
    is_index_global_attn: Tensor | None = None,
    is_global_attn: bool | None = None,
    output_attentions: bool = False,
) -> tuple[Any, ...]:
    """LongformerSelfAttention and LEDEncoderSelfAttention.

    ``attention_mask`` (B, T) is below 0 for padding and above for global tokens; the two flags, where
    they are given, say the same. T need not be a multiple of the window. Weights are never formed, so
    with ``output_attentions`` the layer's own forward runs.
    """
    if output_attentions:
        return type(layer).forward(
            layer, hidden_states, attention_mask, is_index_masked, is_index_global_attn, is_global_attn,
            output_attentions,
        )  # fmt: skip
    if is_index_masked is None and attention_mask is not None:
        is_index_masked = attention_mask < 0
    if is_index_global_attn is None and attention_mask is not None:
        is_index_global_attn = attention_mask > 0
    key_mask = None
    if is_index_masked is not None and bool(is_index_masked.any()):
        key_mask = ~is_index_masked
    window = 2 * layer.one_sided_attn_window_size
    out = longformer_attention(
        layer,
        without_padding(hidden_states, key_mask),
        layer.num_heads,
        _mask(hidden_states.shape[1], window, is_index_global_attn, key_mask),
        is_global=is_index_global_attn,
        key_mask=key_mask,
        dropout_p=layer.dropout if layer.training else 0.0,
    )
    return (out,)
