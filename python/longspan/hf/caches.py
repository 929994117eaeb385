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
from longspan.ops._memory import empty_to_keep


class _Room:
    """Memory (B, H, capacity, D) whose first rows are some tensor's, with room for the next ones."""

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
            shape = (*new.shape[:2], max(64, end + end // 2), new.shape[3])
            self.memory = empty_to_keep(shape, new.dtype, new.device)
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
        keys, before = self.keys, self._rotated
        assert keys is not None
        new = keys.shape[2] - step.tokens
        if before is not None and before.shape[2] == new and self._frequencies is step.frequencies:
            turned = step.rotate(keys[:, :, new:], step.positions)
            self._rotated = self._rotated_room.append(before, turned)
        else:
            self._rotated = step.rotate(keys, self.positions)
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

    def reorder_cache(self, beam_idx: Any) -> None:
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


class _Tail:
    """The last ``most`` rows of a (B, H, n, D) that goes on, in memory of a few times as many."""

    def __init__(self, rows: Tensor, most: int) -> None:
        self.rows, self.most = rows, most
        self._memory: Tensor | None = None  # in which rows begin here
        self._begin = 0

    def append(self, new: Tensor) -> Tensor:
        """Rows and new ones after them (B, H, kept + T, D), of which the last are kept."""
        kept, tokens = self.rows.shape[2], new.shape[2]
        in_place = _writable_in_place(self.rows, new)
        if in_place and tokens <= self.most:
            begin = self._room(new, kept + tokens)
            assert self._memory is not None
            self._memory[:, :, begin + kept : begin + kept + tokens] = new
            all_rows = self._memory[:, :, begin : begin + kept + tokens]
            self._begin = begin + max(kept + tokens - self.most, 0)
        else:
            self._memory = None
            all_rows = torch.cat([self.rows, new], dim=2)
        self.rows = all_rows[:, :, max(kept + tokens - self.most, 0) :]
        if in_place and self._memory is None:
            self.rows = self.rows.clone()  # so that the long rest can go
        return all_rows

    def _room(self, new: Tensor, rows: int) -> int:
        """Where in the memory the kept rows lie, with room for ``rows`` from there on."""
        memory = self._memory
        if (
            memory is None
            or memory.shape[:2] != new.shape[:2]
            or (memory.is_inference() and not torch.is_inference_mode_enabled())
        ):
            shape = (*new.shape[:2], 4 * self.most + 64, new.shape[3])
            memory = self._memory = empty_to_keep(shape, new.dtype, new.device)
        elif self._begin + rows <= memory.shape[2]:
            return self._begin
        # At the end of the memory kept rows lie behind twice as many others: they do not overlap.
        memory[:, :, : self.rows.shape[2]] = self.rows
        return 0

    def select(self, rows: Tensor) -> None:
        """Take these rows of the batch."""
        self.rows, self._memory = self.rows[rows], None


class WindowLayer(CacheLayerMixin):
    """The first ``sink_tokens`` and the last ``window - 1`` tokens: all that the next token can see.

    Keys are rotated once and for all: those of the window at their place in the text, sinks at theirs,
    0 and on. Positions within the cache, as StreamingLLM has them (Xiao et al. 2023), are then a matter
    of the query: against the window it stands at its place in the text, as only distances count, and
    against the sinks at ``min(place, sink_tokens + window - 1)``, where the cache ends.
    """

    is_sliding = False  # its masks are not transformers'
    is_croppable = False

    def __init__(self, extension: Extension, window: int, sink_tokens: int) -> None:
        """Begin empty."""
        super().__init__()
        self.extension, self.window, self.sink_tokens = extension, window, sink_tokens
        self.cumulative_length = 0
        self.written = False  # since attention looked
        self.padding: Tensor | None = None  # (B,), None for none
        self._sinks: list[Tensor] = []  # keys and values (B, H, sink_tokens, D)
        self._tails: list[_Tail] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape, dtype and device of the first keys and values."""
        self.device = key_states.device
        both = (key_states, value_states)
        self._tails = [_Tail(x[:, :, :0], self.window - 1) for x in both]
        self._sinks = [x.new_zeros(*x.shape[:2], self.sink_tokens, x.shape[3]) for x in both]
        self.is_initialized = True

    @property
    def sinks(self) -> list[Tensor]:
        """Keys, rotated, and values of the first tokens (B, H, sink_tokens, D)."""
        return self._sinks

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
        if not torch.is_inference_mode_enabled():  # where autograd may want to save them
            self._sinks = [x.clone() if x.is_inference() else x for x in self._sinks]
        self._take_sinks(step, k, v)
        keys, values = (tail.append(x) for tail, x in zip(self._tails, (step.rotate(k, step.slots), v)))
        self.keys, self.values = (tail.rows for tail in self._tails)
        self.cumulative_length += step.tokens
        return keys, values

    def _take_sinks(self, step: Pass, k: Tensor, v: Tensor) -> None:
        """Where first tokens are among the new ones, keep them."""
        places = step.once("sinks", lambda: torch.arange(self.sink_tokens, device=k.device)[None])
        at = places - step.past if self.padding is None else places - step.past + self.padding[:, None]
        here = (at >= 0) & (at < k.shape[2])
        if not bool(here.any()):
            return
        index = at.clamp(0, k.shape[2] - 1).expand(k.shape[0], -1)[:, None, :, None]
        first = [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v)]
        first[0] = step.rotate(first[0], places)
        here = here[:, None, :, None]
        self._sinks = [torch.where(here, x, old) for x, old in zip(first, self._sinks)]

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
        self.keys = self.values = self.padding = None
        self._sinks, self._tails = [], []

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take rows of the batch in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        if self.is_initialized:
            indices = indices.to(self.device)
            for tail in self._tails:
                tail.select(indices)
            self.keys, self.values = (tail.rows for tail in self._tails)
            self._sinks = [x[indices] for x in self._sinks]
            self.padding = None if self.padding is None else self.padding[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.is_initialized:
            rows = torch.arange(len(self._sinks[0]), device=self.device).repeat_interleave(repeats)
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


CACHES: dict[str, type[Cache]] = {
    "full": GrowingCache,
    "unrotated": UnrotatedCache,
    "window": WindowCache,
}
