"""From fla's layouts to `longspan.linear_attention`'s, and back."""

from typing import Any

import torch
from torch import Tensor

from longspan.ops._checks import check_floating, check_integers, check_shape, sum_dtype
from longspan.ops.linear_attention import linear_attention

LAYOUT = "(batch, tokens, heads, channels)"


def refuse_head_first(function: str, head_first: bool) -> None:
    """Raise ValueError where it is asked for."""
    if head_first:
        raise ValueError(f"{function}: head_first: expected False: q is {LAYOUT}; got True")


def check_packing(
    function: str, q: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None = None
) -> None:
    """Raise unless they cut q, and the copy on the processor is one."""
    if cu_seqlens is None:
        if cu_seqlens_cpu is not None:
            raise ValueError(f"{function}: cu_seqlens_cpu: expected None without cu_seqlens")
        return
    check_integers(function, "cu_seqlens", cu_seqlens, (None,), "(sequences + 1,)")
    if q.shape[0] != 1:
        raise ValueError(f"{function}: q: expected a batch of 1 beside cu_seqlens, got {q.shape[0]}")
    if cu_seqlens_cpu is not None and not torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu):
        raise ValueError(f"{function}: cu_seqlens_cpu: expected a copy of cu_seqlens")


def heads_first(function: str, label: str, x: Tensor) -> Tensor:
    """(B, T, H, ...) -> (B, H, T, ...), a view."""
    check_floating(function, label, x)
    if x.dim() != 4:
        check_shape(function, label, x, (None,) * 4, LAYOUT)
    return x.transpose(1, 2)


def gate_first(function: str, label: str, gate: Tensor, q: Tensor) -> Tensor:
    """A gate (B, T, H) or (B, T, H, K) beside q (B, T, H, K) -> heads first, in a dtype of kernels."""
    check_floating(function, label, gate)
    if gate.dim() == 3:
        check_shape(function, label, gate, q.shape[:3], "(batch, tokens, heads)")
    else:
        check_shape(function, label, gate, q.shape, "q's shape")
    return as_gate(gate, q).transpose(1, 2)


def as_gate(gate: Tensor, q: Tensor) -> Tensor:
    """In q's dtype as it is, else in that of q's sums."""
    return gate if gate.dtype == q.dtype else gate.to(sum_dtype(q))


def turned(x: Tensor | None, state_v_first: bool) -> Tensor | None:
    """A state (N, H, K, V), of or for (N, H, V, K)."""
    return x.transpose(-1, -2) if x is not None and state_v_first else x


def attend(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    scale: float | None,
    initial_state: Any,
    output_final_state: bool,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
) -> tuple[Tensor, Any]:
    """`linear_attention` in fla's layouts; ``gate`` is in longspan's.

    With ``normalize`` states are pairs of S and z (N, 1, H, K).
    """
    rows = [heads_first(function, label, x) for label, x in (("q", q), ("k", k), ("v", v))]
    sums: Any = None
    if normalize and initial_state is not None:
        if not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2:
            raise TypeError(
                f"{function}: initial_state: expected a pair, S and z, with normalize, got "
                f"{type(initial_state).__name__}"
            )
        S, z = initial_state
        check_floating(function, "initial_state[1]", z)
        shape = (S.shape[0], 1, q.shape[2], q.shape[3])
        check_shape(function, "initial_state[1]", z, shape, "(sequences, 1, heads, key channels)")
        sums = (turned(S, state_v_first), z.squeeze(1))
    elif initial_state is not None:
        check_floating(function, "initial_state", initial_state)
        sums = turned(initial_state, state_v_first)
    if reverse:
        rows = [x.flip(2) for x in rows]
        gate = gate if gate is None or gate.dim() == 1 else gate.flip(2)
        if cu_seqlens is not None:
            cu_seqlens = q.shape[1] - cu_seqlens.flip(0)
            sums = _reordered(sums)
    out, last = linear_attention(
        *rows, gate=gate, scale=scale, normalize=normalize, eps=1e-10, initial_state=sums,
        return_final_state=True, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if reverse:
        out = out.flip(2)
        last = _reordered(last) if cu_seqlens is not None else last
    out = out.transpose(1, 2)
    if not output_final_state:
        return out, None
    if normalize:
        return out, (turned(last[0], state_v_first), last[1][:, None])
    return out, turned(last, state_v_first)


def _reordered(sums: Any) -> Any:
    """The states of packed sequences from the last to the first."""
    if sums is None:
        return None
    return tuple(x.flip(0) for x in sums) if isinstance(sums, tuple) else sums.flip(0)
