"""Between padded batches and packed rows: `unpad_input`, `pad_input` and what they are made of."""

import torch
from torch import Tensor

from longspan.ops._checks import check_integers, check_shape, check_tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` (n,) of ``input`` (rows, ...) -> (n, ...); differentiable.

    Example::

        index_first_axis(torch.randn(6, 8), torch.tensor([0, 2]))  # (2, 8)
    """
    check_tensor("index_first_axis", "input", input)
    check_integers("index_first_axis", "indices", indices, (None,), "(rows kept,)")
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, ...) with ``values`` (n, ...) at rows ``indices`` (n,); differentiable.

    Example::

        index_put_first_axis(torch.randn(2, 8), torch.tensor([0, 2]), 6)  # (6, 8)
    """
    check_tensor("index_put_first_axis", "values", values)
    check_integers(
        "index_put_first_axis", "indices", indices, values.shape[:1], "a row for each of values"
    )
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the rows of a padded batch that are tokens; differentiable.

    Args:
        hidden_states: (B, T, ...), any dtype.
        attention_mask: (B, T) bool or integers, 1 where there is a token. Padding may stand anywhere.
        unused_mask: (B, T), 1 where room is kept for a token that is not used (yet): it is packed too,
            but not counted in the last result. None is none.

    Returns:
        (hidden_states (total, ...), indices (total,) int64 into the flattened B x T, cu_seqlens
        (B + 1,) int32, the greatest length as int, used lengths (B,) int32): flash-attn's five.

    Raises:
        TypeError: Not tensors, or a mask is not bool or integers.
        ValueError: A mask is not (B, T).

    Example::

        x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        rows, indices, cu_seqlens, max_seqlen, used = unpad_input(x, mask)  # rows (8, 8)
    """
    name = "unpad_input"
    check_tensor(name, "hidden_states", hidden_states)
    for label, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is None and label == "unused_mask":
            continue
        check_tensor(name, label, mask)
        assert mask is not None
        if mask.is_floating_point():
            raise TypeError(f"{name}: {label}: expected bool or integers, got {mask.dtype}")
        check_shape(name, label, mask, hidden_states.shape[:2], "(batch, tokens) of hidden_states")
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if len(lengths) else 0
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, longest, attention_mask.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: rows (total, ...) back to (batch, seqlen, ...), zeros elsewhere.

    Args:
        hidden_states: (total, ...).
        indices: (total,) integers into the flattened batch x seqlen, as `unpad_input` returned them.
        batch: B.
        seqlen: T.

    Returns:
        (batch, seqlen, ...), differentiable.

    Raises:
        TypeError, ValueError: ``indices`` are not one integer for each row.

    Example::

        x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        rows, indices, *_ = unpad_input(x, mask)
        pad_input(rows, indices, 2, 5)  # x with zeros for padding
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
