"""Forwards of transformers' Longformer self-attention on longspan's kernels, and of its encoder.

LED's encoder has the same layer. What each token sees is a block mask, made once a forward for all
layers of one window; the global tokens' rows are attention of their own.
"""

import functools
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


def encoder_forward(
    encoder: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    padding_len: int = 0,
    output_attentions: bool = False,
    **kwargs: Any,
) -> Any:
    """LongformerEncoder, without what the model has padded to fill a window.

    ``padding_len`` last tokens are padding in all rows, which the encoder would cut off in the end.
    """
    layers = [layer.attention.self for layer in encoder.layer]
    if padding_len and not output_attentions and all(map(_replaced, layers)):
        hidden_states = hidden_states[:, :-padding_len]
        attention_mask = None if attention_mask is None else attention_mask[:, :-padding_len]
        padding_len = 0
    return type(encoder).forward(
        encoder, hidden_states, attention_mask, padding_len, output_attentions, **kwargs
    )


def _replaced(layer: Any) -> bool:
    """Whether the layer's forward is the one above: its class's wants whole windows."""
    slots = (vars(layer).get(name) for name in ("forward", "_old_forward"))
    return any(isinstance(x, functools.partial) and x.func is longformer_forward for x in slots)
