"""What transformers' mixers with a convolution and a recurrent state have in common.

A mixer here is a module of transformers with ``conv1d``, ``activation`` and ``layer_idx``; its cache is
transformers' own (``conv_states`` of (B, C, W), the convolution's last W inputs, and
``recurrent_states``), so that beams, resets and offloading work on it as ever.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.import_utils import is_tracing

from longspan.ops._autograd import wants_gradient
from longspan.ops.conv import causal_conv1d, causal_conv1d_update


def padded_steps(attention_mask: Tensor | None, steps: int) -> Tensor | None:
    """(B, steps, 1) bool, True where a step is padding, or None where no step is.

    Args:
        attention_mask: (B, steps) or more, the last ones then being these; 0 is padding. What has not
            two dimensions says nothing about padding.
        steps: Number of steps.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    padded = attention_mask[:, -steps:] == 0
    if not is_tracing(padded) and not padded.any():
        return None
    return padded[:, :, None]


def without_padding(x: Tensor, padded: Tensor | None) -> Tensor:
    """(B, L, C) with 0 at padded steps."""
    return x if padded is None else x.masked_fill(padded, 0)


def sequence_indices(
    options: dict[str, Any], x: Tensor, attention_mask: Tensor | None, cache: Cache | None
) -> Tensor | None:
    """(B, L) integers, which of several packed sequences each step is of; None where nothing is packed.

    Read, in this order, from what transformers' models pass along to a mixer: ``seq_idx`` (B, L),
    ``cu_seq_lens_q`` (S + 1,), or, by the rule of its attention masks, ``position_ids`` that do not
    count on, where there is neither padding nor a cache.
    """
    seq_idx, offsets = options.get("seq_idx"), options.get("cu_seq_lens_q")
    if seq_idx is not None:
        return seq_idx
    batch, steps = x.shape[:2]
    if offsets is not None:
        if batch != 1:
            raise ValueError(f"longspan: cu_seq_lens_q: expected a batch of 1 row, got {batch}")
        return torch.bucketize(torch.arange(steps, device=x.device), offsets[1:], right=True)[None]
    positions = options.get("position_ids")
    if positions is None or positions.dim() != 2 or attention_mask is not None or cache is not None:
        return None
    found = find_packed_sequence_indices(positions)
    return None if found is None else found.expand(batch, -1)


def end_to_end(seq_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, L) laid end to end: cu_seqlens, and the numbers of each row's first and last sequence."""
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    numbers = begins.flatten().cumsum(0).view_as(begins) - 1
    offsets = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=begins.numel())
    return offsets, numbers[:, 0], numbers[:, -1]


def recurrent_state(mixer: Any, cache: Cache | None) -> Tensor | None:
    """The state after the steps that the cache has seen; None without any."""
    return None if cache is None else cache.get_recurrent_state(mixer.layer_idx)


def convolve(mixer: Any, x: Tensor, cache: Cache | None, seq_idx: Tensor | None) -> Tensor:
    """The mixer's convolution and activation of (B, L, C), after the inputs that the cache holds.

    The cache gets the new inputs: in place where there is one step and no gradient, as decoding has it.
    """
    weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    fused = "silu" if mixer.activation in ("silu", "swish") else None
    x = x.transpose(1, 2)
    state = None if cache is None else cache.get_conv_state(mixer.layer_idx)
    recording = cache is not None and cache.is_recording_past(mixer.layer_idx)
    step = x.shape[2] == 1 and not recording and not wants_gradient((x, weight, bias, state))
    if step and state is not None and state.dtype == x.dtype:
        out = causal_conv1d_update(x, state, weight, bias, activation=fused)
    else:
        past = None if state is None else _last(state, weight.shape[1] - 1).to(x.dtype, copy=True)
        out = causal_conv1d(x, weight, bias, activation=fused, initial_state=past, seq_idx=seq_idx)
        if cache is not None:
            _remember(mixer, x, cache, seq_idx, recording)
    return (out if fused else mixer.act(out)).transpose(1, 2)


def _last(state: Tensor, width: int) -> Tensor:
    """The last inputs, with zeros before them where a cache that records its past has fewer."""
    known = state.shape[2]
    return state[..., known - width :] if known >= width else F.pad(state, (width - known, 0))


def _remember(mixer: Any, x: Tensor, cache: Cache, seq_idx: Tensor | None, recording: bool) -> None:
    """Hand the convolution's inputs (B, C, L) to the cache: no more than it will keep.

    Given all, it would copy them behind its state to keep the last few.
    """
    width = mixer.conv1d.weight.shape[2]
    if not recording:
        x = x[..., -width:]
    if seq_idx is not None:
        x = x.masked_fill((seq_idx[:, -x.shape[2] :] != seq_idx[:, -1:])[:, None], 0)
    cache.update_conv_state(x, mixer.layer_idx, conv_kernel_size=width)
