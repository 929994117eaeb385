"""Native Sparse Attention and Mixture of Block Attention against our own full causal attention.

Each must be as many times faster as it visits fewer keys, times 0.6, and choosing blocks must take less
than a third of the time. Results are checked first against exact attention under dense masks, on a
sample of the queries.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _measure import Bench, Row, WrongAnswer, check_same
from torch import Tensor

import longspan
from longspan.ops import moba
from longspan.reference import moba as moba_reference
from longspan.reference import nsa as nsa_reference

Case = tuple[str, Callable[[Bench], Row]]

TOKENS, SIZE = 16384, 64
NSA_HEADS = 16  # on one key head: a group of the paper's 64 on 4
MOBA_HEADS = 8
BLOCK, COUNT, WINDOW, LENGTH, STRIDE = 64, 16, 512, 32, 16  # NSA's
CHUNK, TOPK = 512, 3  # MoBA's
FLOAT, BF16 = torch.float32, torch.bfloat16
NAMES = {FLOAT: "float", BF16: "bf16"}
TOLERANCE = {FLOAT: 1e-4, BF16: 2e-2}
SHARE, SELECTION = 0.6, 1 / 3


def cases() -> Iterator[Case]:
    for dtype in (FLOAT, BF16):
        for backward in (False, True):
            both = " + backward" if backward else ""
            work = f"forward{both}, T={TOKENS}, {NAMES[dtype]}"
            yield f"NSA {work}", partial(_nsa, dtype, backward)
            yield f"MoBA {work}", partial(_moba, dtype, backward)
    yield "NSA's selection, of the forward", _nsa_selection
    yield "MoBA's gate, of the forward", _moba_selection
    yield "an NSA step over 65536 keys", _nsa_step
    yield "a MoBA step over 65536 keys", _moba_step


def _inputs(heads: int, kv_heads: int, dtype: torch.dtype, tokens: int = TOKENS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, n, tokens, SIZE, generator=generator).to(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def _gates(dtype: torch.dtype, tokens: int = TOKENS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.rand(3, 1, NSA_HEADS, tokens, generator=generator).to(dtype))


def nsa_keys() -> float:
    """Keys that are visited, compressed, selected and near ones, over those of full attention."""
    at = torch.arange(TOKENS, dtype=torch.float64)
    compressed = ((at + 1 - LENGTH) / STRIDE).floor().add(1).clamp(min=0)
    whole = (at / BLOCK).floor()  # blocks before its own, of which COUNT - 1 are chosen
    selected = whole.clamp(max=COUNT - 1) * BLOCK + at % BLOCK + 1
    near = (at + 1).clamp(max=WINDOW)
    return float((compressed + selected + near).sum() / (at + 1).sum())


def moba_keys() -> float:
    at = torch.arange(TOKENS, dtype=torch.float64)
    seen = (at / CHUNK).floor().clamp(max=TOPK - 1) * CHUNK + at % CHUNK + 1
    return float(seen.sum() / (at + 1).sum())


def _step(function: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> Callable[[], Any]:
    *arguments, d_out = inputs

    def forward() -> Any:
        with torch.no_grad():
            return function(*arguments)

    def both() -> Any:
        leaves = [x.detach().requires_grad_() for x in arguments]
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, d_out)

    return both if backward else forward


def _full(inputs: list[Tensor], backward: bool) -> Callable[[], Any]:
    return _step(partial(longspan.attention, causal=True), [*inputs[:3], inputs[3]], backward)


def _ratio(ours: Callable[[], Any], full: Callable[[], Any], share: float, bench: Bench) -> Row:
    row = Row(peer=f"our full attention, {1 / share:.2f}x the keys", at_least=SHARE / share)
    row.ours_seconds, row.peer_seconds = bench.times(ours, full)
    row.value = row.peer_seconds / row.ours_seconds
    return row


def _check_nsa(inputs: list[Tensor], gates: list[Tensor], dtype: torch.dtype) -> None:
    """The last queries, with the blocks that were chosen, in double."""
    q, k, v, _ = inputs
    last = slice(TOKENS - 64, None)
    ours = longspan.native_sparse_attention(q, k, v, *gates)[:, :, last]
    k_cmp = longspan.compress_keys(k)
    chosen = longspan.select_blocks(q[:, :, last], k_cmp, keys=TOKENS)
    arguments = (q[:, :, last], k, v, *(g[:, :, last] for g in gates))
    wanted = nsa_reference.native_sparse_attention(
        *(x.double() for x in arguments), block_indices=chosen
    )
    check_same(ours, wanted, TOLERANCE[dtype])


def _nsa(dtype: torch.dtype, backward: bool, bench: Bench) -> Row:
    inputs, gates = _inputs(NSA_HEADS, 1, dtype), _gates(dtype)
    try:
        _check_nsa(inputs, gates, dtype)
    except WrongAnswer as error:
        return Row(error=str(error))
    ours = _step(longspan.native_sparse_attention, [*inputs[:3], *gates, inputs[3]], backward)
    return _ratio(ours, _full(inputs, backward), nsa_keys(), bench)


def _moba_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return longspan.mixture_of_block_attention(q, k, v, block_size=CHUNK, topk=TOPK)


def _moba(dtype: torch.dtype, backward: bool, bench: Bench) -> Row:
    inputs = _inputs(MOBA_HEADS, MOBA_HEADS, dtype)
    q, k, v, _ = inputs
    last = q[:, :, -64:]
    seen = moba_reference.chosen_blocks(last, k, CHUNK, TOPK, True).repeat_interleave(CHUNK, -1)
    wanted = longspan.attention(*(x.double() for x in (last, k, v)), attn_mask=seen, causal=True)
    try:
        check_same(_moba_attention(q, k, v)[:, :, -64:], wanted, TOLERANCE[dtype])
    except WrongAnswer as error:
        return Row(error=str(error))
    return _ratio(_step(_moba_attention, inputs, backward), _full(inputs, backward), moba_keys(), bench)


def _part(part: Callable[[], Any], whole: Callable[[], Any], bench: Bench) -> Row:
    row = Row(peer="the whole forward", at_least=1 / SELECTION)
    row.ours_seconds, row.peer_seconds = bench.times(part, whole)
    row.value = row.peer_seconds / row.ours_seconds
    return row


def _nsa_selection(bench: Bench) -> Row:
    inputs = _inputs(NSA_HEADS, 1, FLOAT)
    k_cmp = longspan.compress_keys(inputs[1])
    select = partial(longspan.select_blocks, inputs[0], k_cmp, keys=TOKENS)
    whole = _step(longspan.native_sparse_attention, [*inputs[:3], *_gates(FLOAT), inputs[3]], False)
    return _part(select, whole, bench)


def _moba_selection(bench: Bench) -> Row:
    inputs = _inputs(MOBA_HEADS, MOBA_HEADS, FLOAT)

    def gate() -> Tensor:
        return moba.gate(*inputs[:2], block_size=CHUNK, count=TOPK - 1)

    return _part(gate, _step(_moba_attention, inputs, False), bench)


def _decode(heads: int, kv_heads: int, ours: Callable[..., Tensor], bench: Bench) -> Row:
    """Of one token, against attention_decode over the whole cache."""
    keys = 65536
    _, k, v, _ = _inputs(heads, kv_heads, FLOAT, keys)
    q = torch.randn(1, heads, 1, SIZE, generator=torch.Generator().manual_seed(2))
    end = torch.tensor([keys])
    row = Row(peer="attention_decode")
    row.ours_seconds, row.peer_seconds = bench.times(
        partial(ours, q, k, v, end), partial(longspan.attention_decode, q, k, v, end)
    )
    row.value = row.peer_seconds / row.ours_seconds
    return row


def _nsa_step(bench: Bench) -> Row:
    gates = _gates(FLOAT, 1)
    made: list[Tensor] = []

    def step(q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> Tensor:
        if not made:
            made.extend(longspan.compress_keys(x) for x in (k, v))
        return longspan.native_sparse_attention(
            q, k, v, *gates, k_cmp=made[0], v_cmp=made[1], cache_seqlens=end
        )

    return _decode(NSA_HEADS, 1, step, bench)


def _moba_step(bench: Bench) -> Row:
    made: list[Tensor] = []

    def step(q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> Tensor:
        if not made:
            made.append(k.unflatten(2, (-1, CHUNK)).mean(3))
        return longspan.mixture_of_block_attention_step(
            q, k, v, end, made[0], block_size=CHUNK, topk=TOPK
        )

    return _decode(MOBA_HEADS, MOBA_HEADS, step, bench)
