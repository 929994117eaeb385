"""Caches of a model that `longspan.hf.extend_context` changed.

Each has a layer, which is what transformers' `Cache` is a list of:

- `GrowingLayer` appends in place, in memory with room for more: a step writes its own token alone.
- `UnrotatedLayer` holds keys as they were before rotation, and a rotated copy for as long as the
  frequencies stay.
- `WindowLayer` holds the first tokens and the last ones, in memory that does not grow.

They belong to the `Extension` of a model, and refuse to be written outside its forward: keys of other
frequencies, or unrotated ones among rotated ones, would give a wrong result without a word.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from longspan.hf._pass import Extension, Pass


class _Room:
    """Memory (B, H, capacity, D) whose first rows are some tensor's, for the next ones to be appended."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def append(self, rows: Tensor | None, new: Tensor) -> Tensor:
        """``rows`` (B, H, n, D) and ``new`` after them; in place where ``rows`` are this memory's."""
        if rows is None or rows.numel() == 0:
            rows = new[:, :, :0]
        if not _writable_in_place(rows, new):
            return torch.cat([rows, new], dim=2)
        begin, end = rows.shape[2], rows.shape[2] + new.shape[2]
        if not self._holds(rows, end):
            self.memory = new.new_empty(*new.shape[:2], max(64, end + end // 2), new.shape[3])
            self.memory[:, :, :begin] = rows
        assert self.memory is not None
        self.memory[:, :, begin:end] = new
        return self.memory[:, :, :end]

    def _holds(self, rows: Tensor, end: int) -> bool:
        memory = self.memory
        return (
            memory is not None
            and rows.shape[2] > 0
            and end <= memory.shape[2]
            and rows.data_ptr() == memory.data_ptr()
            and rows.stride() == memory.stride()
            and rows.shape[:2] == memory.shape[:2]
            and (not memory.is_inference() or torch.is_inference_mode_enabled())
        )


def _writable_in_place(rows: Tensor, new: Tensor) -> bool:
    """Not where a gradient wants the rows as they were, or a graph is made that cannot see memory."""
    wanted = torch.is_grad_enabled() and (rows.requires_grad or new.requires_grad)
    return not wanted and not torch.compiler.is_compiling()


class GrowingLayer(DynamicLayer):
    """transformers' DynamicLayer, but that a step copies nothing but its own keys and values."""

    def __init__(self, extension: Extension) -> None:
        """Begin empty."""
        super().__init__()
        self.extension = extension
        self._key_room, self._value_room = _Room(), _Room()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D) and return all."""
        self.extension.check_running()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._key_room.append(self.keys, key_states)
        self.values = self._value_room.append(self.values, value_states)
        return self.keys, self.values


class UnrotatedLayer(GrowingLayer):
    """Keys before rotation, their positions, and a copy that is rotated by the frequencies of now."""

    def __init__(self, extension: Extension) -> None:
        """Begin empty."""
        super().__init__(extension)
        self.positions: Tensor | None = None  # (1 or B, n)
        self.written = False  # since attention looked
        self._rotated: Tensor | None = None
        self._rotated_room = _Room()
        self._frequencies: object = None  # that _rotated is for

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D), not rotated, and return all, not rotated."""
        self.written = True
        return super().update(key_states, value_states)

    def rotated_keys(self, step: Pass) -> Tensor:
        """All keys, rotated with the frequencies of this forward. Once after each update."""
        self.written = False
        self.positions = step.positions_after(self.positions)
        before, new = self._rotated, self.keys.shape[2] - step.tokens
        if before is not None and before.shape[2] == new and self._frequencies is step.frequencies:
            turned = step.rotate(self.keys[:, :, new:], step.positions)
            self._rotated = self._rotated_room.append(before, turned)
        else:
            self._rotated = step.rotate(self.keys, self.positions)
        self._frequencies = step.frequencies
        return self._rotated

    def _changed(self) -> None:
        self._rotated = None  # made again when it is wanted

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.positions = None
        self._changed()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: ``crop(-n)``."""
        super().crop(tokens_to_remove)
        if self.positions is not None and self.is_initialized:
            self.positions = self.positions[:, : self.get_seq_length()]
        self._changed()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows of the batch in this order."""
        super().reorder_cache(beam_idx)
        self._take_positions(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        self._take_positions(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = self.positions.repeat_interleave(repeats, dim=0)
        self._changed()

    def _take_positions(self, rows: Tensor) -> None:
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = self.positions[rows.to(self.positions.device)]
        self._changed()


class WindowLayer(CacheLayerMixin):
    """The first ``sink_tokens`` and the last ``window - 1`` tokens: all that the next token can see.

    Keys are rotated once and for all: those of the window at their place in the text, sinks at theirs,
    0 and on. Positions within the cache, as StreamingLLM has them (Xiao et al. 2023), are then a matter
    of the query: against the window it stands at its place in the text, as only distances count, and
    against the sinks at ``min(place, sink_tokens + window - 1)``, where the cache ends.
    """

    is_sliding = False  # to transformers' masks it is a cache like others; they are not looked at
    is_croppable = False

    def __init__(self, extension: Extension, window: int, sink_tokens: int) -> None:
        """Begin empty."""
        super().__init__()
        self.extension, self.window, self.sink_tokens = extension, window, sink_tokens
        self.cumulative_length = 0
        self.written = False  # since attention looked
        self.padding: Tensor | None = None  # (B,), None for none
        self.sink_keys: Tensor | None = None  # (B, H, sink_tokens, D)
        self.sink_values: Tensor | None = None
        self._memory: tuple[Tensor, Tensor] | None = None
        self._begin = 0  # of the keys in the memory

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape, dtype and device of the first keys and values."""
        batch, heads, _, _ = key_states.shape
        self.device = key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.sink_keys = key_states.new_zeros(batch, heads, self.sink_tokens, key_states.shape[3])
        self.sink_values = value_states.new_zeros(batch, heads, self.sink_tokens, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new ones: `take`, which attention calls, knows where they stand."""
        self.extension.check_running()
        self.written = True
        return key_states, value_states

    def take(self, step: Pass, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate and keep new keys and values (B, H, T, D); return the window's, the new ones last."""
        self.written = False
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        if step.padding is not None:
            self.padding = step.padding
        past, tokens = self.cumulative_length, k.shape[2]
        self._take_sinks(step, k, v, past)
        k = step.rotate(k, step.slots)
        keys, values = self._append(k, v)
        kept = min(keys.shape[2], self.window - 1)
        if self._memory is None and _writable_in_place(keys, k):  # of one long pass, not to be kept
            self.keys, self.values = (x[:, :, x.shape[2] - kept :].clone() for x in (keys, values))
        else:
            self.keys, self.values = (x[:, :, x.shape[2] - kept :] for x in (keys, values))
        self.cumulative_length = past + tokens
        return keys, values

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The kept rows and new ones after them: (B, H, kept + T, D).

        Within memory of a few windows the rows move on; at its end they go back to its begin.
        """
        kept, tokens = self.keys.shape[2], k.shape[2]
        if tokens > self.window or not _writable_in_place(self.keys, k):
            self._memory = None
            return torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        if self._memory is None or not self._is_ours(self._memory[0]):
            self._memory = tuple(  # type: ignore[assignment]
                x.new_empty(*x.shape[:2], 4 * self.window + 64, x.shape[3]) for x in (k, v)
            )
            self._begin = self._memory[0].shape[2]
        begin, capacity = self._begin, self._memory[0].shape[2]
        # Kept rows are the last ones of what was appended before.
        if begin + kept + tokens > capacity:
            begin = 0
            for memory, rows in zip(self._memory, (self.keys, self.values)):
                memory[:, :, :kept] = rows  # which lie at least two windows further on
        for memory, rows in zip(self._memory, (k, v)):
            memory[:, :, begin + kept : begin + kept + tokens] = rows
        end = begin + kept + tokens
        keys, values = (memory[:, :, begin:end] for memory in self._memory)
        self._begin = end - min(kept + tokens, self.window - 1)
        return keys, values

    def _is_ours(self, memory: Tensor) -> bool:
        return (
            self.keys.shape[:2] == memory.shape[:2]
            and self.keys.data_ptr() == memory[:, :, self._begin :].data_ptr()
            and (not memory.is_inference() or torch.is_inference_mode_enabled())
        )

    def _take_sinks(self, step: Pass, k: Tensor, v: Tensor, past: int) -> None:
        """Where first tokens are among the new ones, keep them: (B, H, sink_tokens, D)."""
        first = 0 if self.padding is None else self.padding[:, None]
        at = first + torch.arange(self.sink_tokens, device=k.device) - past
        at = at.expand(k.shape[0], -1)
        here = (at >= 0) & (at < k.shape[2])
        if not bool(here.any()):
            return
        assert self.sink_keys is not None and self.sink_values is not None
        index, here = at.clamp(0, k.shape[2] - 1)[:, None, :, None], here[:, None, :, None]

        def gathered(x: Tensor) -> Tensor:
            return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))

        places = step.once("sinks", lambda: torch.arange(self.sink_tokens, device=k.device)[None])
        turned = step.rotate(gathered(k), places)
        self.sink_keys = torch.where(here, turned, self.sink_keys)
        self.sink_values = torch.where(here, gathered(v), self.sink_values)

    def get_seq_length(self) -> int:
        """Tokens so far, most of them forgotten."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """-1: it goes on for ever."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of the window and where they begin."""
        kept = min(self.cumulative_length, self.window - 1)
        return kept + query_length, self.cumulative_length - kept

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing can come back that was forgotten, so only ``crop(0)``."""
        if tokens_to_remove != 0:
            raise RuntimeError(
                f"WindowLayer: tokens_to_remove: expected 0, since the tokens that a window has left "
                f"behind are gone, got {tokens_to_remove}"
            )

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized, self.written, self.cumulative_length = False, False, 0
        self.keys = self.values = self.sink_keys = self.sink_values = None
        self.padding = self._memory = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows of the batch in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        if self.is_initialized:
            assert self.sink_keys is not None and self.sink_values is not None
            indices = indices.to(self.device)
            self.keys, self.values = self.keys[indices], self.values[indices]
            self.sink_keys, self.sink_values = self.sink_keys[indices], self.sink_values[indices]
            self.padding = None if self.padding is None else self.padding[indices]
            self._memory = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.is_initialized:
            rows = torch.arange(self.keys.shape[0], device=self.device).repeat_interleave(repeats)
            self.batch_select_indices(rows)


class GrowingCache(Cache):
    """transformers' DynamicCache in memory with room for more: extend_context's ``cache="full"``.

    Made by ``Extended.new_cache()``.
    """


class UnrotatedCache(Cache):
    """Keys before rotation, for frequencies that change: extend_context's ``cache="unrotated"``.

    Made by ``Extended.new_cache()``.
    """


class WindowCache(Cache):
    """First and last tokens in constant memory (StreamingLLM): extend_context's ``cache="window"``.

    Made by ``Extended.new_cache()``.
    """
