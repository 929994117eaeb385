"""Attention of models whose keys come unrotated: transformers' AttentionInterface functions.

The model's rotary embedding turns nothing (`extend_context` sees to that); queries and keys are turned
here, where the cache's keys are known. The `Pass` comes down from the model's forward as the keyword
``rotary_pass``.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from longspan.hf._pass import Pass
from longspan.hf.caches import UnrotatedLayer, WindowLayer
from longspan.ops._checks import autocast
from longspan.ops.attention import attention, merge_attention

WINDOWED = "longspan_streaming"


def unrotated_name(attention: str) -> str:
    """The implementation that rotates and then calls ``attention``; registered by this call."""
    name = f"{attention}_unrotated"
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    if attention not in functions.valid_keys() or attention not in masks.valid_keys():
        raise ValueError(
            "extend_context: attention: expected, with cache='unrotated', a registered implementation "
            f"that takes rotated queries and keys, such as longspan or sdpa, got {attention!r}"
        )
    inner = functions[attention]

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        rotary_pass: Pass,
        **kwargs: Any,
    ) -> Any:
        layer = _written_layer(module, rotary_pass)
        if layer is None:
            key = rotary_pass.rotate(key, rotary_pass.positions)
        else:
            assert isinstance(layer, UnrotatedLayer)
            key = layer.rotated_keys(rotary_pass)
        query = rotary_pass.rotate(query, rotary_pass.positions)
        return inner(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, masks[attention])
    return name


def _written_layer(module: Any, step: Pass) -> Any:
    """The cache's layer, if this layer of the model wrote to it (checkpointing takes caches away)."""
    if step.cache is None:
        return None
    layer = step.cache.layers[module.layer_idx]
    return layer if layer.written else None


def windowed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    rotary_pass: Pass,
    scaling: float | None = None,
    dropout: float = 0.0,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to the window's keys and to sinks, and merge both: the same in any split into forwards.

    A query stands at two places, its own for the window and one within the cache for sinks, so there
    are two softmaxes, merged by their log-sum-exp.

    Args:
        module: The attention layer.
        query, key, value: (B, H, T, D) and (B, H_kv, T, D), not rotated.
        attention_mask: None; the pass knows the padding.
        rotary_pass: Of this forward.
        scaling, dropout: As in `longspan_attention`.
        output_attentions: False, since weights are never formed.
        **kwargs: What else transformers passes along.

    Returns:
        (out, None): out (B, T, H, D_v), contiguous.
    """
    if output_attentions:
        raise ValueError("longspan attention: output_attentions: expected False, got True")
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"longspan attention: {name}: expected None with cache='window'")
    step, extension = rotary_pass, rotary_pass.extension
    query, key, value = autocast(query, key, value)
    layer = _written_layer(module, step)
    if layer is None:  # this forward is all there is
        layer = WindowLayer(extension, extension.window or 0, extension.sink_tokens)
    keys, values = layer.take(step, key, value)
    batch, past = query.shape[0], step.past
    kept = keys.shape[2] - step.tokens
    padding = layer.padding

    def ranges(first: Any, end: int, query_0: Any) -> Tensor:
        """(B, 3): first key, one past the last, the key position of query 0."""
        out = torch.zeros(batch, 3, dtype=torch.int64, device=query.device)
        out[:, 0], out[:, 1], out[:, 2] = first, end, query_0
        return out

    begin = past - kept  # the place of the first key that is left
    sinks = layer.sink_tokens

    def window_ranges() -> Tensor:
        first = sinks - begin if padding is None else padding + (sinks - begin)
        first = max(first, 0) if padding is None else first.clamp(min=0)
        return ranges(first, kept + step.tokens, kept)

    padded = None if padding is None else id(padding)
    out, lse = attention(
        step.rotate(query, step.slots), keys, values, causal=True, window=(layer.window - 1, 0),
        key_ranges=step.once(("window", batch, padded), window_ranges), scale=scaling,
        dropout_p=dropout, return_lse=True,
    )  # fmt: skip
    if sinks:
        unpadded = 0 if padding is None else padding
        at = step.once(
            ("places", padded),
            lambda: (step.slots - (0 if padding is None else padding[:, None])).clamp(
                0, sinks + layer.window - 1
            ),
        )
        sink_out, sink_lse = attention(
            step.rotate(query, at), *layer.sinks, causal=True,
            key_ranges=step.once(("sinks", batch, padded), lambda: ranges(0, sinks, past - unpadded)),
            scale=scaling, dropout_p=dropout, return_lse=True,
        )  # fmt: skip
        out, _ = merge_attention([out, sink_out], [lse, sink_lse])
    return out.transpose(1, 2).contiguous(), None


def register_extended() -> None:
    """Make the windowed implementation known to transformers."""
    AttentionInterface.register(WINDOWED, windowed_attention)
    # The pass knows which keys there are.
    AttentionMaskInterface.register(WINDOWED, lambda *args, **kwargs: None)
