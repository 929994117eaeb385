"""Forwards of a model that `linearize` changed: of its decoder, and of the attention layers replaced."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from longspan.hf._recurrent import end_to_end, sequence_indices
from longspan.hf._replace import Shared, as_keywords
from longspan.hf.linearized_attention import LinearizedLayer, LinearizedPass, linearized_attention
from longspan.ops.rotary import apply_rotary


class Linearization(Shared):
    """What the forwards and caches of one linearized model share.

    Args:
        layers: Which are replaced.
        window, sinks: Of the exact part; a window of 0 is none.
    """

    def __init__(self, layers: tuple[int, ...], window: int, sinks: int) -> None:
        """Keep them."""
        self.layers, self.window, self.sinks = layers, window, sinks


def decoder_forward(
    decoder: Any,
    *args: Any,
    linearization: Linearization,
    names: tuple[str, ...],
    inner: Callable[..., Any] | None,
    **kwargs: Any,
) -> Any:
    """The model's own forward, with a cache of ours, and what replaced layers know of its tokens."""
    kwargs = as_keywords(names, args, kwargs)
    if kwargs.get("output_attentions") or decoder.config.output_attentions:
        raise ValueError(
            "output_attentions: expected False, since linearized layers form no weights, got True"
        )
    use_cache = kwargs.get("use_cache")
    wanted = decoder.config.use_cache if use_cache is None else use_cache
    cache = kwargs["cache"] = own_cache(kwargs.get("cache"), wanted, linearization, decoder.config)
    given = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if given is not None:  # else the model's own error
        kwargs["linear_pass"] = _pass(kwargs, given, cache, linearization)
    return type(decoder).forward(decoder, **kwargs) if inner is None else inner(**kwargs)


def attention_forward(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Any = None,
    cache: Cache | None = None,
    linear_pass: LinearizedPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of Llama, Mistral, Phi-3, Qwen2 and Qwen3, linearized; its dropout is not applied."""
    if linear_pass is None:
        raise RuntimeError(
            "longspan: a linearized attention layer: expected a call by its decoder, which tells it of "
            "padding and cache; undo() what linearize did to use the layer alone"
        )
    q, k, v = projected(attention, hidden_states, position_embeddings)
    layer = None if cache is None else cache.layers[attention.layer_idx]
    assert layer is None or isinstance(layer, LinearizedLayer)
    out = linearized_attention(attention.linear_features, q, k, v, linear_pass, layer, attention.scaling)
    return attention.o_proj(out.transpose(1, 2).flatten(2)), None


def projected(
    attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, D), keys and values (B, H_kv, T, D) of the layer, rotated."""
    size = attention.head_dim
    if hasattr(attention, "qkv_proj"):
        heads, groups = attention.config.num_attention_heads, attention.config.num_key_value_heads
        x = attention.qkv_proj(hidden_states).unflatten(-1, (-1, size))
        q, k, v = x.split([heads, groups, groups], dim=2)
    else:
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (project(hidden_states).unflatten(-1, (-1, size)) for project in projections)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = apply_rotary(q, k, *position_embeddings)
    assert k is not None
    return q, k, v


# ---- what a forward's tokens are


def _pass(
    kwargs: dict[str, Any], given: Tensor, cache: Any, linearization: Linearization
) -> LinearizedPass:
    batch, tokens = given.shape[:2]
    layer = None if cache is None else cache.layers[linearization.layers[0]]
    past = 0 if layer is None else layer.get_seq_length()
    if layer is not None and past and layer.closed:
        raise ValueError(
            "cache: expected one whose tokens had padding on the left alone, got one that had it "
            "on the right, which its state cannot leave out again"
        )
    padding, ends = _padding(kwargs.get("attention_mask"), batch, past, tokens, layer)
    sequences = sequence_indices(kwargs, given, kwargs.get("attention_mask"), cache)
    offsets = None
    if sequences is not None:
        if cache is not None or padding is not None or ends is not None:
            raise ValueError(
                "cu_seq_lens_q: expected neither padding nor a cache with packed sequences; pass "
                "use_cache=False"
            )
        offsets = end_to_end(sequences)[0]
    return LinearizedPass(
        linearization.window, linearization.sinks, batch, tokens, past, given.device, padding, ends,
        offsets,
    )  # fmt: skip


def _padding(
    mask: Any, batch: int, past: int, tokens: int, layer: LinearizedLayer | None
) -> tuple[Tensor | None, Tensor | None]:
    """(B,) how many first tokens are padding, and (B,) where padding on the right begins, or None."""
    before = layer.padding if layer is not None and past else None
    if mask is None:
        return before, None
    total = past + tokens
    if not isinstance(mask, Tensor) or mask.shape != (batch, total):
        raise ValueError(
            "attention_mask: expected, with linearized layers, one of (batch, tokens so far), "
            f"({batch}, {total}), got {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask)}"
        )
    mask = mask != 0
    if bool(mask.all()) and before is None:
        return None, None
    count = mask.sum(1)
    first = torch.where(count > 0, mask.int().argmax(1), total)
    ends = first + count
    places = torch.arange(total, device=mask.device)
    whole = (places >= first[:, None]) & (places < ends[:, None])
    if not torch.equal(whole, mask):
        raise ValueError(
            "attention_mask: expected, with linearized layers, padding on the left or right of each "
            "sequence alone, got one with holes"
        )
    if past:
        known = torch.zeros_like(first) if before is None else before
        if not torch.equal(first.clamp(max=past), known.clamp(max=past)) or bool((ends < total).any()):
            raise ValueError(
                "attention_mask: expected the padding that the cache's first tokens had, "
                f"{known.tolist()} on the left, got {first.tolist()} on the left and "
                f"{(total - ends).tolist()} on the right"
            )
    return (first if bool(first.any()) else None), (ends if bool((ends < total).any()) else None)


# ---- caches


def new_cache(linearization: Linearization, config: Any) -> DynamicCache:
    """An empty cache for the model of this linearization and configuration."""
    return _take(DynamicCache(config=config), linearization, config)


def own_cache(cache: Any, wanted: bool | None, linearization: Linearization, config: Any) -> Any:
    """The cache for this forward: a new one, the one given if it is ours, or made ours if empty."""
    if cache is None:
        return new_cache(linearization, config) if wanted else None
    if getattr(cache, "_longspan_linearization", None) is linearization:
        return cache
    if type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length() > 0:
        filled = isinstance(cache, Cache) and cache.get_seq_length() > 0
        raise ValueError(
            "cache: expected None, an empty DynamicCache without offloading, or one that this "
            f"linearized model filled, got {'a filled' if filled else 'a'} {type(cache).__name__}"
        )
    return _take(cache, linearization, config)


def _take(cache: DynamicCache, linearization: Linearization, config: Any) -> DynamicCache:
    layers = cache.layers or DynamicCache(config=config).layers
    for i in linearization.layers:
        layers[i] = LinearizedLayer()
    cache.layers, cache.layer_class_to_replicate = layers, None
    cache._longspan_linearization = linearization  # type: ignore[attr-defined]
    return cache
