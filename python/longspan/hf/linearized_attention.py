"""Attention that is exact on the first and last tokens and linear on those between, and its cache."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from longspan.hf._features import AttentionFeatures
from longspan.ops._autograd import wants_gradient
from longspan.ops._checks import sum_dtype
from longspan.ops.attention import attention, attention_decode, attention_varlen
from longspan.ops.linear_attention import linear_attention


class LinearizedPass:
    """Where the tokens of one forward stand; layers share it, and what follows from it.

    A token's *place* counts from its sequence's first one that is no padding. Kept exactly are the
    first ``sinks`` places and the last ``window`` up to a query's own; the linear part has what is
    between. Once a token is ``window`` places behind, it leaves the exact part and enters the state.

    The cache keeps keys and values in ``sinks + window`` slots: place p in slot p while there is room,
    and then in that of the token that leaves, ``sinks + (p - sinks) % window``.

    Args:
        window, sinks: See above; a window of 0 is no exact part.
        batch, tokens: B and T, of this forward.
        past: Tokens in the cache before.
        device: Of the tokens.
        padding: (B,), so many first tokens of each row, the cache's included, are padding; None is none.
        ends: (B,), where padding on the right begins, without a past; None is none.
        offsets: cu_seqlens of sequences packed in the rows, laid end to end; then there is no cache.
    """

    def __init__(
        self,
        window: int,
        sinks: int,
        batch: int,
        tokens: int,
        past: int = 0,
        device: torch.device | None = None,
        padding: Tensor | None = None,
        ends: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        """Compute nothing yet."""
        self.window, self.sinks, self.batch, self.tokens, self.past = window, sinks, batch, tokens, past
        self.device, self.padding, self.ends, self.offsets = device, padding, ends, offsets

    @cached_property
    def before(self) -> Tensor:
        """(1 or B,): tokens of each sequence in the cache, padding not counted; may be negative."""
        past = torch.full((1,), self.past, device=self.device)
        return past if self.padding is None else past - self.padding

    @cached_property
    def places(self) -> Tensor:
        """(1 or B, T), or (1, B T) for packed sequences: negative for padding."""
        if self.offsets is None:
            return self.before[:, None] + torch.arange(self.tokens, device=self.device)
        at = torch.arange(self.batch * self.tokens, device=self.device)
        sequence = torch.bucketize(at, self.offsets[1:], right=True)
        return (at - self.offsets[sequence])[None]

    @cached_property
    def enters(self) -> Tensor | None:
        """(1 or B, T) bool: whether with each token one enters the state; None is with every one."""
        if self.window == 0 and self.padding is None:
            return None
        return self.places >= self.window + self.sinks

    @cached_property
    def ranges(self) -> Tensor | None:
        """``key_ranges`` of the exact part, over the tokens in `order` and then the new ones."""
        if self.past == 0 and self.padding is None and self.ends is None:
            return None
        kept = self.window + self.sinks if self.past else 0
        out = torch.zeros(self.batch, 3, dtype=torch.int64, device=self.device)
        if self.past:
            out[:, 0] = (kept - self.before).clamp(min=0)
        elif self.padding is not None:
            out[:, 0] = self.padding
        out[:, 1] = kept + self.tokens if self.ends is None else self.ends
        out[:, 2] = kept
        return out

    @cached_property
    def order(self) -> Tensor:
        """(1 or B, sinks + window): the slots in order of their places, the last token's last."""
        kept = self.window + self.sinks
        i = torch.arange(kept, device=self.device)
        last = self.before[:, None] - kept + i
        place = torch.where(i < self.sinks, torch.minimum(last, i), last).clamp(min=0)
        return self._slot(place)

    @cached_property
    def sources(self) -> Tensor:
        """(1 or B, sinks + window): which of the tokens in `order` and the new ones each slot gets."""
        kept = self.window + self.sinks
        i = torch.arange(kept, device=self.device)
        after = self.before[:, None] + self.tokens
        # The last place before `after` whose slot this is.
        late = after - 1 - (after - 1 - i) % self.window
        place = torch.where((i < self.sinks) | (after <= kept), i, late)
        total = self.tokens + (kept if self.past else 0)
        first = (kept - self.before if self.past else -self.before).clamp(min=0)[:, None]
        at = torch.where(place < self.sinks, first + place, total - after + place)
        return at.clamp(0, total - 1)

    @cached_property
    def slot(self) -> Tensor:
        """(B,): of the one token of a step."""
        return self._slot(self.before.clamp(min=0)).expand(self.batch)

    @cached_property
    def seen(self) -> Tensor:
        """(B,): slots that are filled after a step."""
        return (self.before + 1).clamp(0, self.window + self.sinks).expand(self.batch)

    def delayed(self, x: Tensor) -> Tensor:
        """x (B, H, T, D), without a past, a window behind: zeros come first."""
        return F.pad(x, (0, 0, self.window, 0))[:, :, : x.shape[2]]

    def _slot(self, place: Tensor) -> Tensor:
        turning = self.sinks + (place - self.sinks) % self.window
        return torch.where(place < self.sinks, place, turning)


class LinearizedLayer(CacheLayerMixin):
    """What a linearized layer keeps of the tokens it has read, of one size however many.

    Attributes:
        state: (B, H_kv, F, D + 1) in float32, or float64 for float64: the sum over tokens of a key's
            features times its value and a 1.
        keys, values: (B, H_kv, sinks + window, D), those of the exact part; None without one.
        padding: (B,), each row's first tokens that were padding, or None.
    """

    is_sliding = False  # the masks of other layers are made for all tokens
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        """Begin empty."""
        super().__init__()
        self.cumulative_length = 0
        self.state: Tensor | None = None
        self.padding: Tensor | None = None
        self.closed = False  # padding on the right was read

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        kept = (self.state, self.keys, self.values)
        return sum(x.untyped_storage().nbytes() for x in kept if x is not None)

    def writable(self) -> bool:
        """Whether a step may write to it: no graph needs it, and inference tensors are at home."""
        kept = (self.state, self.keys, self.values)
        inside = torch.is_inference_mode_enabled()
        return not any(
            x.requires_grad or (x.is_inference() and not inside) for x in kept if x is not None
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `remember` fills all."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Raise: only the linearized attention writes it."""
        raise RuntimeError(
            "cache: expected use by the model that linearize made it for, before its undo(): the "
            "keys and values of a linearized layer are gone"
        )

    def remember(
        self, step: LinearizedPass, state: Tensor, keys: Tensor | None, values: Tensor | None
    ) -> None:
        """Take what holds after this forward."""
        self.state, self.keys, self.values = state, keys, values
        self.cumulative_length += step.tokens
        self.padding, self.closed = step.padding, step.ends is not None
        self.device, self.is_initialized = state.device, True

    def get_seq_length(self) -> int:
        """Tokens so far, most of them summed up."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """-1: it goes on for ever."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if all keys were here: masks are for the other layers."""
        return self.cumulative_length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing can come back out of a sum, so only ``crop(0)``."""
        if tokens_to_remove != 0:
            raise RuntimeError(
                "LinearizedLayer: tokens_to_remove: expected 0, since a token cannot be taken out of "
                f"the state again, got {tokens_to_remove}"
            )

    def reset(self) -> None:
        """Forget all tokens."""
        self.state = self.keys = self.values = self.padding = None
        self.cumulative_length, self.closed, self.is_initialized = 0, False, False

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take rows of the batch in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        for name in ("state", "keys", "values", "padding"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.state is not None:
            rows = torch.arange(len(self.state), device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def linearized_attention(
    features: AttentionFeatures,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: LinearizedPass,
    layer: LinearizedLayer | None,
    scale: float,
) -> Tensor:
    """Attend exactly to sinks and window and linearly to what is between, under one normaliser.

    A query's weights are ``exp(scale q . k)`` for the exact tokens and ``exp(log) phi(q) . phi(k)`` for
    the others, with `AttentionFeatures`' phi and log (after Zhang et al. 2024, LoLCATs, whose maps have
    no log). Without a window all weights are ``phi(q) . phi(k)``.

    Args:
        features: Of this layer.
        q: (B, H, T, D), rotated.
        k, v: (B, H_kv, T, D).
        step: Of this forward.
        layer: Of the cache, which is written; None for none.
        scale: Of exact scores.

    Returns:
        (B, H, T, D) in q's dtype.
    """
    past = layer if step.past else None
    gradient = wants_gradient((q, k, v, *features.parameters()))
    if past is not None and q.shape[2] == 1 and past.writable() and not gradient:
        return _one_token(features, q, k, v, step, past, scale)
    if step.offsets is not None:
        q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))  # rows laid end to end
    keys, values = k, v
    if past is not None and past.keys is not None and past.values is not None:
        keys = torch.cat([_rows(past.keys, step.order), k], dim=2)
        values = torch.cat([_rows(past.values, step.order), v], dim=2)
        behind = slice(step.sinks, step.sinks + q.shape[2])  # by a window
        k, v = keys[:, :, behind], values[:, :, behind]
    elif step.window:
        k, v = step.delayed(k), step.delayed(v)
    out, lse, state = linear_part(features, q, k, v, step, None if past is None else past.state)
    if step.window:
        out = _merged(*exact_part(q, keys, values, step, scale), out, lse)
    if layer is not None:
        kept = [_rows(x, step.sources) for x in (keys, values)] if step.window else [None, None]
        layer.remember(step, state, *kept)
    if step.offsets is not None:
        out = out[0].unflatten(1, (step.batch, step.tokens)).transpose(0, 1)
    return out.to(q.dtype)


def linear_part(
    features: AttentionFeatures,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: LinearizedPass,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means (B, H, T, D) by the linear weights, the logarithm of these (B, H, T), the state after.

    Args:
        features: Of the layer.
        q: (B, H, T, D).
        k, v: (B, H_kv, T, D), of the tokens that enter the state with each query, if `step` says so.
        step: Of this forward.
        state: (B, H_kv, F, D + 1), before.
    """
    groups = q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        phi_q, log, phi_k, v = _prepared(features, q, k, v, step.enters)
        sums, last = linear_attention(
            phi_q, phi_k, v, scale=1.0, return_final_state=True, cu_seqlens=step.offsets,
            initial_state=None if state is None else state.repeat_interleave(groups, dim=1),
        )  # fmt: skip
        # A state of each query head came; a group's are the same.
        last = last if groups == 1 else last[:, ::groups].clone()
        return *_normalised(sums, log), last


def exact_part(
    q: Tensor, keys: Tensor, values: Tensor, step: LinearizedPass, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention to sinks and window: (B, H, T, D) and the logarithm of the weights (B, H, T).

    ``keys`` and ``values`` are of the tokens of ``step.order``, if there is a past, and the new ones.
    """
    window = (step.window - 1, 0)
    if step.offsets is None:
        return attention(
            q, keys, values, causal=True, window=window, sink_tokens=step.sinks, scale=scale,
            key_ranges=step.ranges, return_lse=True,
        )  # fmt: skip
    q, keys, values = (x[0].transpose(0, 1) for x in (q, keys, values))
    out, lse = attention_varlen(
        q, keys, values, step.offsets, step.offsets, causal=True, window=window,
        sink_tokens=step.sinks, scale=scale, return_lse=True,
    )  # fmt: skip
    return out.transpose(0, 1)[None], lse[None]


def _one_token(
    features: AttentionFeatures,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: LinearizedPass,
    layer: LinearizedLayer,
    scale: float,
) -> Tensor:
    """The same for a token of each sequence, in place on the cache's layer."""
    S, keys, values = layer.state, layer.keys, layer.values
    assert S is not None
    exact: tuple[Tensor, Tensor] | None = None
    if keys is not None and values is not None:
        at = (torch.arange(len(q), device=q.device), slice(None), step.slot)
        leaving = keys[at], values[at]
        keys[at], values[at] = k[:, :, 0], v[:, :, 0]
        exact = attention_decode(q, keys, values, step.seen, scale=scale, return_lse=True)
        k, v = (x.unsqueeze(2) for x in leaving)
    with torch.autocast(q.device.type, enabled=False):
        phi_q, log, phi_k, v = _prepared(features, q, k, v, step.enters)
        # A state serves the queries of a group: linear_attention_step has one for each query head.
        S.addcmul_(phi_k.transpose(2, 3), v)
        grouped = phi_q.squeeze(2).unflatten(1, (S.shape[1], -1))
        out, lse = _normalised((grouped @ S).flatten(1, 2).unsqueeze(2), log)
    if exact is not None:
        out = _merged(*exact, out, lse)
    layer.remember(step, S, keys, values)
    return out.to(q.dtype)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, n, D) at ``index`` (1 or B, m) -> (B, H, m, D)."""
    if len(index) == 1:
        return x.index_select(2, index[0])
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _prepared(
    features: AttentionFeatures, q: Tensor, k: Tensor, v: Tensor, enters: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """phi(q) and its logarithm, phi(k), and v with a 1 behind it, whose sum is the normaliser."""
    wide = sum_dtype(q)
    q, k, v = (x.to(wide) for x in (q, k, v))
    if enters is not None:
        hidden = ~enters[:, None, :, None]
        k, v = (x.masked_fill(hidden, 0) for x in (k, v))
    phi_q, log, phi_k = features(q, k)
    if enters is not None:
        phi_k = phi_k.masked_fill(hidden, 0)
    return phi_q, log, phi_k, F.pad(v, (0, 1), value=1.0)


def _normalised(sums: Tensor, log: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums (B, H, T, D + 1) of values and weights -> means (B, H, T, D), logarithm of the weights."""
    weights = sums[..., -1]
    empty = weights <= 0
    weights = weights.masked_fill(empty, 1)
    lse = weights.log() if log is None else weights.log() + log
    return sums[..., :-1] / weights.unsqueeze(-1), lse.masked_fill(empty, -torch.inf)


def _merged(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Tensor:
    """Both parts' means by their weights; a where neither has any."""
    share = (lse_b - lse_a).masked_fill(lse_a == -torch.inf, -torch.inf).sigmoid()
    return torch.lerp(a.to(b.dtype), b, share.unsqueeze(-1))
