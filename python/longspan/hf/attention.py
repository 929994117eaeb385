"""Exact attention as transformers' attention implementation "longspan"."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.utils.import_utils import is_tracing

from longspan.hf.masks import KeyRanges, Packed, decode_mask, longspan_mask
from longspan.hf.rope_methods import register_methods
from longspan.ops._autograd import wants_gradient
from longspan.ops._checks import autocast
from longspan.ops.attention import attention, attention_decode, attention_varlen

_NAME = "longspan"

# Arguments of some models' attention that pick or weigh keys in ways this implementation does not know.
_REFUSED = ("block_indices", "head_mask", "indices", "sinks")


def register() -> None:
    """Make ``attn_implementation="longspan"`` known to transformers; calling it again is harmless.

    From then on ``from_pretrained(..., attn_implementation="longspan")``,
    ``model.set_attn_implementation("longspan")`` and ``generate`` use `longspan_attention`, with masks
    from `longspan_mask`: exact attention, softcap, sliding windows, learned sinks, attention dropout,
    forward and backward, in memory linear in tokens.

    Configurations may then also have the ``rope_type`` "dynamic_linear" and "dynamic_yarn", which
    `extend_context` stores.

    Example::

        longspan.hf.register()
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="longspan")
    """
    AttentionInterface.register(_NAME, longspan_attention)
    AttentionMaskInterface.register(_NAME, longspan_mask)
    register_methods()


def longspan_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, by transformers' AttentionInterface: `longspan.attention` and its siblings.

    As for "sdpa", a mask says everything: which keys are seen, causality and window included; then
    ``is_causal`` and ``sliding_window`` are not looked at. A query that sees no key (left padding)
    gives 0, where "eager" gives the mean of all values. One query without gradient, dropout and bias
    runs as `longspan.attention_decode`.

    Args:
        module: The attention layer; its ``is_causal`` holds where the argument is None.
        query: (B, H, L, D).
        key: (B, H_kv, S, D), not repeated.
        value: (B, H_kv, S, D_v).
        attention_mask: From `longspan_mask`; or bool (True is seen) or floating (added), what
            broadcasts to (B, H, L, S). None: all keys, or with ``is_causal`` and L = S those up to
            the query's own, within ``sliding_window``.
        dropout: Probability of dropping a weight.
        scaling: Of the scores; None is D ** -0.5.
        sliding_window: Number of keys a causal query sees, its own included; without causality so
            many less one each side. For ``attention_mask=None`` only.
        softcap: c replaces a score x by c * tanh(x / c); None is off.
        is_causal: Whether a query sees no later keys. For ``attention_mask=None`` only.
        s_aux: (H,), learned sink logits.
        position_bias: Floating, added to the scores; what broadcasts to (B, H, L, S).
        **kwargs: ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (n + 1,): sequences packed in one row;
            a bool or floating mask goes before them. Others that transformers passes along and that
            say nothing about attention are let be.

    Returns:
        (out, None): out (B, L, H, D_v), contiguous; attention weights are never formed.

    Raises:
        TypeError: A keyword that would change the result and is not known here.
        ValueError: ``output_attentions=True``; a mask that fits neither description; causal
            attention without a mask where L and S differ, so that nothing says where the queries are.

    Example::

        out, _ = longspan_attention(layer, q, k, v, None, is_causal=True)
    """
    _refuse(kwargs)
    query, key, value = autocast(query, key, value)
    options: dict[str, Any] = {
        "scale": scaling,
        "softcap": 0.0 if softcap is None else softcap,
        "sinks": s_aux,
    }
    batch, _, tokens, _ = query.shape
    keys = key.shape[2]

    described: KeyRanges | Packed | None = None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        described = _without_mask(causal, sliding_window, tokens, keys)
    elif not attention_mask.is_floating_point() and attention_mask.dtype != torch.bool:
        described = decode_mask(attention_mask, batch, tokens, keys)

    if kwargs.get("cu_seq_lens_q") is not None and described is not None:
        described = _declared_packing(described, kwargs, batch, tokens, keys)
    if isinstance(described, Packed):
        if position_bias is not None:
            raise ValueError("longspan attention: position_bias: expected None with packed sequences")
        return _attend_packed(query, key, value, described, dropout_p=dropout, **options), None

    mask, ranges, window = attention_mask, None, (-1, -1)
    if described is not None:
        ranges, mask, window = described
    if position_bias is not None:
        mask = _biased(position_bias, mask)
    single = tokens == 1 and mask is None and window == (-1, -1) and not dropout
    if single and not wants_gradient((query, key, value, s_aux)):
        if ranges is None:
            starts, ends = None, torch.full((batch,), keys, device=query.device)
        else:
            starts, ends = ranges[:, 0], ranges[:, 1].clamp(0, keys)
        out = attention_decode(query, key, value, ends, cache_starts=starts, **options)
    else:
        out = attention(
            query, key, value, mask, window=window, key_ranges=ranges, dropout_p=dropout, **options
        )
    return out.transpose(1, 2).contiguous(), None


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(
            "longspan attention: output_attentions: expected False, since weights are never formed; "
            "use attn_implementation='eager' to look at them"
        )
    if isinstance(kwargs.get("cache"), PagedAttentionCache):
        raise ValueError("longspan attention: cache: expected no paged cache (continuous batching)")
    for name, value in kwargs.items():
        bias = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
        if value is not None and (name in _REFUSED or bias):
            raise TypeError(
                f"longspan attention: {name}: not known here, and it may change the result; "
                "use another attn_implementation for this model"
            )


def _without_mask(causal: bool, sliding_window: int | None, tokens: int, keys: int) -> KeyRanges:
    """What no mask means: as for "sdpa", with the window that flash attention would apply."""
    if sliding_window is not None and keys <= sliding_window:
        sliding_window = None
    if sliding_window is None and (not causal or tokens == 1):
        return KeyRanges(None, None, (-1, -1))
    if tokens != keys:
        raise ValueError(
            "longspan attention: attention_mask: expected a mask, since causal or windowed attention of "
            f"{tokens} queries to {keys} keys does not say where the queries stand; got None"
        )
    left = -1 if sliding_window is None else sliding_window - 1
    return KeyRanges(None, None, (left, 0 if causal else left))


def _declared_packing(
    described: KeyRanges | Packed, kwargs: dict[str, Any], batch: int, tokens: int, keys: int
) -> Packed:
    """Packed sequences as ``cu_seq_lens_q`` and ``cu_seq_lens_k`` say, with the mask's window."""
    cu_q = kwargs["cu_seq_lens_q"]
    cu_k = cu_q if kwargs.get("cu_seq_lens_k") is None else kwargs["cu_seq_lens_k"]
    if batch != 1:
        raise ValueError(f"longspan attention: cu_seq_lens_q: expected a batch of 1 row, got {batch}")
    if not is_tracing(cu_q):
        if isinstance(described, Packed):
            agree = torch.equal(described.cu_seqlens_q.to(cu_q), cu_q) and torch.equal(
                cu_q, cu_k.to(cu_q)
            )
        else:
            ranges = described.ranges
            agree = described.key_flags is None and (ranges is None or ranges.tolist() == [[0, keys, 0]])
        if not agree:
            raise ValueError(
                "longspan attention: cu_seq_lens_q: expected no padding, no cache and no position_ids "
                "that say otherwise"
            )
    return Packed(cu_q, cu_k, described.window)


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, packed: Packed, **options: Any) -> Tensor:
    """Attend in sequences packed in the batch's rows, laid end to end; returns (B, L, H, D_v)."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    cu_q, cu_k, window = packed
    out = attention_varlen(q, k, v, cu_q, cu_k, window=window, **options)
    return out.unflatten(0, (query.shape[0], query.shape[2])).contiguous()


def _biased(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """One additive mask of both."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, -torch.inf)
    return position_bias + mask
