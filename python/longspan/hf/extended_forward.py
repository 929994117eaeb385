"""Forwards of a model that `extend_context` changed, and which cache each of them writes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from longspan.hf._pass import Extension, Pass
from longspan.hf._replace import as_keywords
from longspan.hf.caches import (
    CACHES,
    GrowingLayer,
    UnrotatedLayer,
    WindowLayer,
)


@torch.no_grad()
def rotary_forward(
    rotary: Any, x: Tensor, position_ids: Tensor, *, extension: Extension
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, T, R) as transformers' rotary embeddings give them, from exact angles."""
    angles = extension.angles
    if angles.growing and position_ids.numel():
        angles.grow(int(position_ids.max()) + 1)
    return angles.at(position_ids, x.dtype)


@torch.no_grad()
def unturned_forward(
    rotary: Any, x: Tensor, position_ids: Tensor, *, extension: Extension
) -> tuple[Tensor, Tensor]:
    """Cosine 1 and sine 0: attention turns queries and keys."""
    channels = 2 * len(extension.angles.now[0])
    ones = x.new_ones(1, position_ids.shape[1], channels)
    return ones, torch.zeros_like(ones)


def decoder_forward(
    decoder: Any,
    *args: Any,
    extension: Extension,
    names: tuple[str, ...],
    implementation: str,
    inner: Callable[..., Any] | None,
    **kwargs: Any,
) -> Any:
    """The model's own forward, with our cache and with positions that count no padding."""
    kwargs = as_keywords(names, args, kwargs)
    if extension.kind != "full" and decoder.config._attn_implementation != implementation:
        raise ValueError(
            f"attn_implementation: expected {implementation}, which extend_context set, got "
            f"{decoder.config._attn_implementation}; call its undo() first"
        )
    use_cache = kwargs.get("use_cache")
    wanted = decoder.config.use_cache if use_cache is None else use_cache
    cache = kwargs["cache"] = _own_cache(kwargs.get("cache"), wanted, extension, decoder.config)
    given = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if given is not None:  # else the model's own error
        past = 0 if cache is None else cache.get_seq_length()
        kwargs["position_ids"] = positions = _positions(kwargs, given, past)
        if extension.kind != "full":
            padding = _padding(kwargs, positions, cache, past) if extension.kind == "window" else None
            kwargs["rotary_pass"] = Pass(extension, cache, positions, past, padding)
    with extension.running():
        return type(decoder).forward(decoder, **kwargs) if inner is None else inner(**kwargs)


def _positions(kwargs: dict[str, Any], given: Tensor, past: int) -> Tensor:
    """(1 or B, T): what the caller says, or counted, from the first token that is no padding."""
    positions = kwargs.get("position_ids")
    if positions is not None:
        return positions if positions.dim() == 2 else positions[None]
    tokens, mask = given.shape[1], kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == past + tokens:
        counted = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        if not torch.compiler.is_compiling() and not bool(mask.all()):
            return counted
    return torch.arange(past, past + tokens, device=given.device)[None]


def _padding(kwargs: dict[str, Any], positions: Tensor, cache: Any, past: int) -> Tensor | None:
    """(B,), the number of first tokens that are padding, or None; takes the mask out of ``kwargs``."""
    mask = kwargs.pop("attention_mask", None)
    tokens = positions.shape[1]
    padding = None if cache is None else cache.layers[0].padding
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != past + tokens:
            raise ValueError(
                "attention_mask: expected, with a window cache, one of (batch, tokens so far), "
                f"({past + tokens}), got {tuple(mask.shape) if isinstance(mask, Tensor) else mask}"
            )
        count = mask.long().sum(1)
        first = past + tokens - count
        places = torch.arange(past + tokens, device=mask.device)
        if not bool((mask.bool() == (places >= first[:, None])).all()):
            raise ValueError("attention_mask: expected, with a window cache, padding on the left alone")
        if past and padding is None and bool(first.any()):
            raise ValueError(
                "attention_mask: expected the padding that the cache's first tokens had, none, got "
                f"{first.tolist()}"
            )
        padding = first if bool(first.any()) else None
    elif past == 0:
        padding = None
    places = torch.arange(past, past + tokens, device=positions.device)
    expected = places[None] if padding is None else places - padding[:, None]
    off = (positions != expected) & (expected >= 0)
    if bool(off.any()):
        raise ValueError(
            "position_ids: expected, with a window cache, positions that count on from 0 at each "
            "sequence's first token"
        )
    return padding


# ---- caches


def _new_layers(extension: Extension, config: Any) -> list[Any]:
    def layer() -> Any:
        if extension.kind == "window":
            assert extension.window is not None
            return WindowLayer(extension, extension.window, extension.sink_tokens)
        return (UnrotatedLayer if extension.kind == "unrotated" else GrowingLayer)(extension)

    return [layer() for _ in range(config.num_hidden_layers)]


def new_cache(extension: Extension, config: Any) -> Cache:
    """An empty cache for the model of this extension and configuration."""
    cache = CACHES[extension.kind](layers=_new_layers(extension, config))
    if extension.kind == "full":
        _grow_in_place(cache, DynamicCache(config=config).layers, extension)
    cache._longspan_extension = extension  # type: ignore[attr-defined]
    return cache


def _own_cache(cache: Any, wanted: bool | None, extension: Extension, config: Any) -> Any:
    """The cache for this forward: a new one, the one given if it is ours, or made ours if empty."""
    if cache is None:
        return new_cache(extension, config) if wanted else None
    if getattr(cache, "_longspan_extension", None) is extension:
        return cache
    if not isinstance(cache, Cache) or cache.get_seq_length() > 0:
        raise ValueError(
            "cache: expected one that this extended model filled, or an empty one, got "
            f"{type(cache).__name__} with keys in it that were rotated for something else"
        )
    if type(cache) is DynamicCache and not (cache.offloading and extension.kind != "full"):
        if extension.kind != "full":
            cache.layers = _new_layers(extension, config)
        elif cache.layers:
            _grow_in_place(cache, cache.layers, extension)
        else:
            cache.layers = _new_layers(extension, config)
        cache.layer_class_to_replicate = None
    elif extension.kind != "full":
        raise ValueError(
            f"cache: expected None, an empty DynamicCache or what new_cache() makes, with "
            f"cache={extension.kind!r}, got {type(cache).__name__}"
        )
    cache._longspan_extension = extension
    return cache


def _grow_in_place(cache: Cache, layers: list[Any], extension: Extension) -> None:
    """Layers of transformers' cache, the plain ones among them ours; sliding windows stay."""
    cache.layers = [GrowingLayer(extension) if type(x) is DynamicLayer else x for x in layers]
