"""Causal depthwise convolution, tap by tap."""

import torch
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (out, final state), accumulated in float32, or float64 for float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    (batch, channels, length), width = x.shape, weight.shape[1]
    past = width - 1
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, past)
    padded = torch.cat([initial_state, x], dim=2)
    out = x.new_zeros(batch, channels, length, dtype=dtype)
    if bias is not None:
        out = out + bias.to(dtype)[:, None]
    kept = padded[:, :, length:]
    if seq_idx is not None and length:
        sequences = torch.cat([seq_idx[:, :1].expand(-1, past), seq_idx], dim=1)
        kept = torch.where((sequences[:, length:] == seq_idx[:, -1:])[:, None], kept, 0)
    for k in range(width):
        tap = padded[:, :, k : k + length].to(dtype)
        if seq_idx is not None and length:
            tap = torch.where((sequences[:, k : k + length] == seq_idx)[:, None], tap, 0)
        out = out + weight[:, k, None].to(dtype) * tap
    if activation is not None:
        out = torch.nn.functional.silu(out)
    return out.to(x.dtype), kept


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """x (B, C, L) -> out; writes ``conv_state``."""
    (batch, _, length), past, slots = x.shape, weight.shape[1] - 1, conv_state.shape[2]
    out = torch.zeros_like(x)
    for b in range(batch):
        row = b if conv_state_indices is None else int(conv_state_indices[b])
        if row < 0:
            continue
        written = 0 if cache_seqlens is None else int(cache_seqlens[b])
        # Slots in order of age: the oldest first.
        order = (torch.arange(slots, device=x.device) + written) % slots
        history = conv_state[row][:, order]
        state = history[:, slots - past :]
        out[b] = causal_conv1d(
            x[b : b + 1], weight, bias, activation=activation, initial_state=state[None]
        )[0][0]
        newest = torch.cat([history, x[b]], dim=1)[:, length:]
        conv_state[row][:, (order + length) % slots if cache_seqlens is not None else order] = newest
    return out
