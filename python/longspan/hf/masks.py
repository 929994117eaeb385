"""What a transformers model hands to our attention in place of a mask of tokens x keys.

transformers describes a mask by a function of (batch, head, query, key) positions and a 2-D padding
mask, and lets each attention implementation build from them what its kernel wants. `longspan_mask`
builds an integer tensor of O(keys) that our attention reads back; it has 4 dimensions, since a model
passes on a 4-D mask untouched (``generate`` builds masks ahead of the model) where it takes a 2-D one
for padding. Two forms, told apart by dtype:

``int64 (B, left + 2, right + 2, 3 or 3 + keys)``
    Its last dimension is a sequence's ``key_ranges`` (first key, one past the last, key position of
    query 0), then, only if its padding has holes, a flag per key. ``(left, right)`` is the window.

``int32 (1, left + 2, right + 2, n + 1)``
    Packed sequences: ``cu_seqlens`` over the batch's rows laid end to end.

The window is in the shape (dimensions of stride 0, which take no memory) because it must be a Python
number where a compiled graph calls the kernel, and a graph may read a tensor's shape but not its
values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing


class KeyRanges(NamedTuple):
    """A mask read back from its int64 form, or the lack of one."""

    ranges: Tensor | None  # (B, 3)
    key_flags: Tensor | None  # (B, 1, 1, keys) bool
    window: tuple[int, int]


class Packed(NamedTuple):
    """A mask read back from its int32 form, or what ``cu_seq_lens_q`` and ``cu_seq_lens_k`` say."""

    cu_seqlens_q: Tensor  # (n + 1,)
    cu_seqlens_k: Tensor  # (n + 1,)
    window: tuple[int, int]


def longspan_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """Describe a mask to `longspan_attention`: transformers' AttentionMaskInterface for "longspan".

    Causal, bidirectional and sliding-window masks, with any 2-D padding mask, and packed sequences
    cost O(keys) memory (this module's docstring has the format). What remains gets a bool mask of
    (B, 1, q_length, kv_length), as "sdpa" gets it:

    - every other pattern: chunks (Llama 4), blocks that see both ways (images in Gemma 3), the
      caller's ``or_mask_function`` or ``and_mask_function``;
    - where the model asks for a mask to work on itself (``allow_is_causal_skip=False`` or
      ``allow_is_bidirectional_skip=False`` on a plain pattern);
    - packed sequences inside torch.compile and torch.export, where their number cannot be read.
      transformers takes every input there for packed that comes without ``attention_mask`` and
      without cache: pass an ``attention_mask`` of ones.

    Args:
        batch_size: B.
        q_length: Number of queries.
        kv_length: Number of keys, unwritten ones of a static cache included.
        q_offset: Position of query 0, an int or (from a static cache) a tensor of one.
        kv_offset: Position of key 0.
        mask_function: The pattern.
        attention_mask: (B, positions) bool, True where a token is no padding; positions beyond its
            end are not seen. None is no padding.
        local_size: The window or chunk of the pattern, where it has one.
        allow_is_causal_skip: False where the pattern deviates from a plain causal one or the model
            wants a materialised mask.
        allow_is_bidirectional_skip: Likewise, bidirectional.
        use_vmap: The pattern holds functions of the caller.
        device: Of the mask.
        **kwargs: What transformers passes to other implementations (``dtype``, ``config``).

    Returns:
        int64 or int32 (see above), or bool (B, 1, q_length, kv_length).

    Example::

        longspan_mask(2, 4096, 4096).numel()  # 12, where sdpa_mask has 2 * 4096 * 4096
    """
    traced = is_tracing(attention_mask)
    if traced:
        config = kwargs.get("config")
        segments = None
        window = _declared_window(
            mask_function, local_size, config, allow_is_causal_skip, allow_is_bidirectional_skip
        )
    else:
        window, segments = _pattern(mask_function)
    if window is None or _must_materialise(
        window, segments, q_length, allow_is_causal_skip, allow_is_bidirectional_skip, use_vmap
    ):
        dense = masking_utils.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            local_size=local_size, allow_is_causal_skip=False, allow_is_bidirectional_skip=False,
            use_vmap=use_vmap, device=device,
        )  # fmt: skip
        assert dense is not None, "sdpa_mask makes a mask where no skip is allowed"
        return dense
    if segments is not None:
        return _encode(_boundaries(segments)[None], window)
    ranges, flags = _padding_ranges(attention_mask, batch_size, kv_length, kv_offset, device, traced)
    position = torch.zeros(batch_size, dtype=torch.int64, device=device) + (q_offset - kv_offset)
    first, end = ranges
    if q_length == 1:
        # The one query's window is a range of keys too; so told, it needs no causality or window
        # later, and is what attention_decode takes.
        left, right = window
        first = first if left < 0 else torch.maximum(first, position - left)
        end = end if right < 0 else torch.minimum(end, position + right + 1)
        window = (-1, -1)
    described = torch.stack((first, end, position), dim=1)
    if flags is not None:
        described = torch.cat((described, flags.to(torch.int64)), dim=1)
    return _encode(described, window)


def decode_mask(mask: Tensor, batch: int, tokens: int, keys: int) -> KeyRanges | Packed:
    """Read an integer mask back; raise ValueError where it is none of `longspan_mask`'s."""
    window = (mask.shape[1] - 2, mask.shape[2] - 2)
    if min(window) >= -1 and mask.dtype == torch.int64 and mask.shape[0] == batch:
        described = mask[:, 0, 0]
        if described.shape[1] == 3:
            return KeyRanges(described, None, window)
        if described.shape[1] == 3 + keys:
            return KeyRanges(described[:, :3], described[:, None, None, 3:].to(torch.bool), window)
    elif min(window) >= -1 and mask.dtype == torch.int32 and mask.shape[0] == 1 and tokens == keys:
        return Packed(mask[0, 0, 0], mask[0, 0, 0], window)
    raise ValueError(
        "longspan attention: attention_mask: expected bool, floating, or what longspan_mask made for "
        f"{batch} sequences of {tokens} queries and {keys} keys, got {mask.dtype} {tuple(mask.shape)}"
    )


def _encode(rows: Tensor, window: tuple[int, int]) -> Tensor:
    return rows[:, None, None].expand(-1, window[0] + 2, window[1] + 2, -1)


def _padding_ranges(
    attention_mask: Tensor | None,
    batch: int,
    kv_length: int,
    kv_offset: int,
    device: torch.device | str,
    traced: bool,
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """First key and one past the last, each (B,); flags (B, kv_length) where these do not say it all."""
    first = torch.zeros(batch, dtype=torch.int64, device=device)
    end = torch.full_like(first, kv_length)
    if attention_mask is None:
        return (first, end), None
    seen = attention_mask[:, kv_offset : kv_offset + kv_length].expand(batch, -1)
    known = seen.shape[1]
    if not traced:
        if known == kv_length and bool(seen.all()):
            return (first, end), None
        # argmax is the place of the first True.
        count = seen.sum(1)
        first = torch.where(count > 0, seen.int().argmax(1), 0) if known else first
        end = torch.where(count > 0, known - seen.int().flip(1).argmax(1), 0) if known else first
        if bool((end - first == count).all()):
            return (first, end), None
    return (first, end), torch.nn.functional.pad(seen, (0, kv_length - known))


def _boundaries(segments: Tensor) -> Tensor:
    """cu_seqlens of rows laid end to end, from the index of each token's sequence in its row."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    begin = starts.flatten().nonzero().flatten()
    return torch.cat((begin, begin.new_tensor([segments.numel()]))).to(torch.int32)


# ---- which pattern a mask function is
#
# transformers composes closures. Each is recognised by its code object, so that one which is not
# known, today or in a later release, is never mistaken for one that is.

_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_TWO_SIDED = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_PACKED = masking_utils.packed_sequence_mask_function(torch.zeros(0)).__code__
_REMAPPED = masking_utils.remap_positions_for_packed_sequence(
    masking_utils.causal_mask_function, torch.zeros(0)
).__code__

_Pattern = tuple[tuple[int, int] | None, Tensor | None]
_UNKNOWN: _Pattern = (None, None)


def _pattern(mask_function: Callable[..., Any]) -> _Pattern:
    """(left, right) of the pattern, None if it is no window; and the packed sequences' indices."""
    if mask_function is masking_utils.causal_mask_function:
        return (-1, 0), None
    if mask_function is masking_utils.bidirectional_mask_function:
        return (-1, -1), None
    code = getattr(mask_function, "__code__", None)
    captured = _captured(mask_function)
    if code in (_WINDOW, _TWO_SIDED):
        size = captured["sliding_window"]
        if not isinstance(size, int) or size < 1:
            return _UNKNOWN
        return ((size - 1, -1) if code is _WINDOW else (size, size)), None
    if code is not _AND:
        return _UNKNOWN
    parts = captured["mask_functions"]
    segments = [_captured(part)["packed_sequence_mask"] for part in parts if part.__code__ is _PACKED]
    parts = [part for part in parts if part.__code__ is not _PACKED]
    if len(segments) == 1:
        # Within a sequence the remapped positions go up by one, as indices do, and distances are the
        # same; the packed mask, made of the same positions, keeps sequences apart.
        parts = [_captured(p)["mask_function"] if p.__code__ is _REMAPPED else p for p in parts]
    found = [_pattern(part) for part in parts]
    windows = [window for window, nested in found if window is not None and nested is None]
    if len(segments) > 1 or len(windows) < len(found):
        return _UNKNOWN
    left, right = (min((w[side] for w in windows if w[side] >= 0), default=-1) for side in (0, 1))
    return (left, right), segments[0] if segments else None


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    """A closure's variables by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells)}


def _declared_window(
    mask_function: Callable[..., Any],
    local_size: int | None,
    config: Any,
    causal_skip: bool,
    bidirectional_skip: bool,
) -> tuple[int, int] | None:
    """The window where closures cannot be opened (dynamo): from what the caller declares.

    A skip is allowed for plain patterns only, and ``local_size`` is then the window, or the chunk of
    chunked attention, for which the config has another name.
    """
    if mask_function is masking_utils.causal_mask_function:
        return (-1, 0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return (-1, -1)
    sliding = getattr(config, "sliding_window", None)
    chunked = getattr(config, "attention_chunk_size", None)
    if local_size is None or local_size < 1 or local_size != sliding or chunked is not None:
        return None
    if causal_skip:
        return (local_size - 1, 0)
    return (local_size, local_size) if bidirectional_skip else None


def _must_materialise(
    window: tuple[int, int],
    segments: Tensor | None,
    q_length: int,
    causal_skip: bool,
    bidirectional_skip: bool,
    use_vmap: bool,
) -> bool:
    """Whether the model asked for a mask to work on: no skip, though the pattern is a plain one."""
    if segments is not None or use_vmap:
        return False
    if window[1] != 0:
        return not bidirectional_skip
    # transformers also forbids the skip in each step of a static cache; there a range serves.
    return not causal_skip and q_length > 1
