"""A short encoder made long: `to_longformer`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from longspan.hf.attention import longspan_attention
from longspan.hf.masks import KeyRanges, decode_mask, longspan_mask
from longspan.nn._sparse import Flags, cached_mask, flags, tensor_of
from longspan.ops.block_sparse import block_sparse_attention
from longspan.patterns import BlockMask, longformer
from longspan.patterns.builders import rectangle

IMPLEMENTATION = "longspan_longformer"
"""Name of `longformer_attention` among transformers' attention implementations."""

# Encoders with learned absolute positions whose attention goes through AttentionInterface.
_SUPPORTED = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")

_SETTINGS = "longspan_longformer"  # of the config, where save_pretrained keeps them


def to_longformer(
    model: PreTrainedModel,
    *,
    window: int | None = None,
    max_length: int | None = None,
    global_tokens: Sequence[int] | None = None,
) -> PreTrainedModel:
    """Turn a pretrained encoder of 512 tokens into one of thousands, with the weights it has.

    Beltagy, Peters and Cohan 2020, "Longformer", section 5: the table of positions is repeated until
    it is long enough, and attention is a sliding window with a global [CLS] token, in time and memory
    linear in the length. The [CLS] token's own row uses the projections that all have, as Longformer's
    separate ones would begin: no parameter is added.

    **Up to the model's original length nothing changes.** A text of so many tokens is seen whole,
    however long its neighbours in the batch are, and its outputs are the original's within rounding.
    Longer ones see the window. They work as they are (a sentence encoder's pooled embedding stays
    close to those of the text's parts) and better after some training on long texts; dropout, gradient
    checkpointing and every head (``ForSequenceClassification`` ...) go on as before.

    The model is changed in place, not copied: convert it before an optimizer takes its parameters.
    The tokenizer is yours: set ``tokenizer.model_max_length = max_length``, or it truncates as before.
    Padding may stand on either side. ``output_attentions=True`` is an error, since weights are never
    formed.

    **Saving and loading.** ``save_pretrained`` writes the long table and the settings into the config.
    ``from_pretrained`` then gives the long model with full attention, which anybody can load, and
    ``to_longformer(model)``, without options, the window again.

    Args:
        model: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT or ELECTRA, alone or in one of its
            ``For...`` classes; not a decoder.
        window: Total width, even: ``window / 2`` tokens on either side. None is what the config has
            from an earlier conversion, else 512.
        max_length: Tokens, special ones included. None: likewise, else 4096.
        global_tokens: Which tokens see and are seen by all, counted from each text's first token.
            None: likewise, else ``(0,)``, [CLS]. A call may name others:
            ``model(ids, attention_mask=mask, global_attention_mask=...)``, (B, T), 1 for global.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no transformers model.
        ValueError: Another kind of model, a decoder, or a value that does not fit.

    Example::

        model = AutoModel.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
        longspan.hf.to_longformer(model, window=512, max_length=16384)
    """
    embeddings = _embeddings(model)
    config = model.config
    before = getattr(config, _SETTINGS, None) or {}
    first = _first_position(embeddings)
    have = embeddings.position_embeddings.num_embeddings - first
    window = before.get("window", 512) if window is None else window
    if max_length is None:
        max_length = have if before else 4096
    if global_tokens is None:
        global_tokens = before.get("global_tokens", (0,))
    if window < 2 or window % 2:
        raise ValueError(f"to_longformer: window: expected an even number of 2 or more, got {window}")
    if max_length < have:
        raise ValueError(
            f"to_longformer: max_length: expected at least the {have} tokens that the model has "
            f"positions for, got {max_length}"
        )
    if any(not isinstance(i, int) or i < 0 for i in global_tokens):
        raise ValueError(
            f"to_longformer: global_tokens: expected integers of 0 or more, got {list(global_tokens)}"
        )
    _lengthen(embeddings, first, max_length)
    config.max_position_embeddings = first + max_length
    settings = {
        "window": window,
        "global_tokens": list(global_tokens),
        "full_up_to": before.get("full_up_to", have),
    }
    setattr(config, _SETTINGS, settings)
    AttentionInterface.register(IMPLEMENTATION, longformer_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, longspan_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def longformer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    global_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as `to_longformer` says, by transformers' AttentionInterface.

    Args:
        module: The attention layer; its config has the settings.
        query, key, value: (B, H, T, D).
        attention_mask: From `longspan_mask`; None is no padding.
        dropout: Probability of dropping a weight.
        scaling: Of the scores; None is D ** -0.5.
        global_attention_mask: (B, T), not 0 for global tokens, in place of the settings'.
        **kwargs: As for `longspan_attention`.

    Returns:
        (out, None): out (B, T, H, D), contiguous.

    Raises:
        ValueError: The config has no settings; a mask of another kind; ``output_attentions=True``.

    Example::

        model.set_attn_implementation("longspan_longformer")  # what to_longformer does
    """
    config: Any = module.config
    settings = getattr(config, _SETTINGS, None)
    if settings is None:
        raise ValueError(
            f"{IMPLEMENTATION}: expected a model that longspan.hf.to_longformer has made long"
        )
    batch, _, tokens, _ = query.shape
    full = settings["full_up_to"]
    if tokens <= full or kwargs.get("output_attentions"):
        return longspan_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=False, **kwargs,
        )  # fmt: skip
    key_mask = _key_mask(attention_mask, batch, tokens)
    if global_attention_mask is not None and global_attention_mask.shape != (batch, tokens):
        raise ValueError(
            f"{IMPLEMENTATION}: global_attention_mask: expected {(batch, tokens)}, "
            f"got {tuple(global_attention_mask.shape)}"
        )
    padded = key_mask is not None and not bool(key_mask.all())
    mask = cached_mask(
        _by_row, tokens, settings["window"], full, tuple(settings["global_tokens"]),
        flags(key_mask) if padded and key_mask is not None else None,
        None if global_attention_mask is None else flags(global_attention_mask != 0),
    )  # fmt: skip
    out = block_sparse_attention(query, key, value, mask, scale=scaling, dropout_p=dropout)
    return out.transpose(1, 2).contiguous(), None


def _key_mask(attention_mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """(B, T) bool, False for padding."""
    if attention_mask is None:
        return None
    described = None
    if attention_mask.dtype == torch.int64:
        described = decode_mask(attention_mask, batch, tokens, tokens)
    if not isinstance(described, KeyRanges) or described.window != (-1, -1):
        raise ValueError(
            f"{IMPLEMENTATION}: attention_mask: expected one for padding, (batch, {tokens}), "
            f"got {attention_mask.dtype} {tuple(attention_mask.shape)}"
        )
    if described.ranges is None:
        return None
    at = torch.arange(tokens, device=attention_mask.device)
    seen = (at >= described.ranges[:, :1]) & (at < described.ranges[:, 1:2])
    return seen if described.key_flags is None else seen & described.key_flags[:, 0, 0]


def _by_row(
    tokens: int,
    window: int,
    full: int,
    global_tokens: tuple[int, ...],
    padding: Flags | None,
    is_global: Flags | None,
) -> BlockMask:
    """A mask for each text of the batch, or one for all: its own length decides."""
    real = torch.ones(1, tokens, dtype=torch.bool) if padding is None else tensor_of(padding)
    chosen = None if is_global is None else tensor_of(is_global)
    count = max(len(real), 1 if chosen is None else len(chosen))
    each = []
    for i in range(count):
        seen = real[i % len(real)]
        where = seen.nonzero().flatten()
        if len(where) <= full:
            begin, end = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)
            mask = rectangle(tokens, (begin, end), (begin, end))
        else:
            if chosen is None:
                globals_ = where[[g for g in global_tokens if g < len(where)]]
            else:
                globals_ = (chosen[i % len(chosen)] & seen).nonzero().flatten()
            mask = longformer(tokens, window=window, global_tokens=globals_)
        each.append(mask if bool(seen.all()) else mask.hide_keys(seen))
    return each[0] if count == 1 else BlockMask.stack(each)


# ---- the model


def _embeddings(model: Any) -> Any:
    """The model's table of positions and what is around it; or an error that says what is supported."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"to_longformer: model: expected a transformers model, got {type(model).__name__}"
        )
    kind = getattr(model.config, "model_type", None)
    embeddings = getattr(model.base_model, "embeddings", None)
    if kind not in _SUPPORTED or not isinstance(
        getattr(embeddings, "position_embeddings", None), nn.Embedding
    ):
        raise ValueError(
            f"to_longformer: model: expected one of {', '.join(_SUPPORTED)}, "
            f"got {type(model).__name__} ({kind})"
        )
    if getattr(model.config, "is_decoder", False):
        raise ValueError("to_longformer: model: expected an encoder, got one with is_decoder=True")
    return embeddings


def _first_position(embeddings: Any) -> int:
    """Row of the first token: RoBERTa's family counts on from its padding's."""
    padding = embeddings.position_embeddings.padding_idx
    return 0 if padding is None else padding + 1


def _lengthen(embeddings: Any, first: int, length: int) -> None:
    """Repeat the table of positions, in place, and the buffers that number them."""
    table = embeddings.position_embeddings
    old = table.weight.detach()
    index = torch.arange(length, device=old.device) % (len(old) - first) + first
    if length > len(old) - first:
        weight = torch.cat([old[:first], old[index]])
        table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        table.num_embeddings = first + length
    positions = torch.arange(first + length, device=old.device)[None]
    for name, value in (("position_ids", positions), ("token_type_ids", torch.zeros_like(positions))):
        if isinstance(getattr(embeddings, name, None), Tensor):
            setattr(embeddings, name, value)
