"""A wrong argument is named, with what was expected and what came, before anything is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import assert_raises
from torch import Tensor

import longspan


def q(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (2, 4, 5, 8), dtype=dtype)


def attend(**wrong: Any) -> Callable[[], Any]:
    good = {"q": q(), "k": q(2, 2, 6, 8), "v": q(2, 2, 6, 8)}
    return lambda: longspan.attention(**(good | wrong))


def varlen(**wrong: Any) -> Callable[[], Any]:
    cu = torch.tensor([0, 3, 10])
    good = {"q": q(10, 4, 8), "k": q(10, 2, 8), "v": q(10, 2, 8), "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    return lambda: longspan.attention_varlen(**(good | wrong))


def decode(**wrong: Any) -> Callable[[], Any]:
    good = {
        "q": q(2, 4, 1, 8),
        "k_cache": q(2, 2, 20, 8),
        "v_cache": q(2, 2, 20, 8),
        "cache_seqlens": torch.tensor([20, 7]),
    }
    return lambda: longspan.attention_decode(**(good | wrong))


HALF, DOUBLE, INT = torch.bfloat16, torch.float64, torch.int32
NEW = {"k_new": q(2, 2, 1, 8), "v_new": q(2, 2, 1, 8)}
TABLE = torch.zeros(2, 3, dtype=torch.int64)
PAGES = {"k_cache": q(4, 16, 2, 8), "v_cache": q(4, 16, 2, 8), "block_table": TABLE}

# call, exception, what the message must have
BAD: list[tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = [
    (attend(q=[1.0]), TypeError, ("attention", "q", "tensor", "list")),
    (attend(k=None), TypeError, ("attention", "k", "tensor", "NoneType")),
    (attend(q=q(dtype=INT)), TypeError, ("attention", "q", "float32", "int32")),
    (attend(q=q(dtype=torch.complex64)), TypeError, ("attention", "q", "complex64")),
    (attend(k=q(2, 2, 6, 8, dtype=DOUBLE)), TypeError, ("attention", "k", "float32", "float64")),
    (attend(v=q(2, 2, 6, 8, dtype=HALF)), TypeError, ("attention", "v", "float32", "bfloat16")),
    (attend(k=q(2, 2, 6, 8).to("meta")), ValueError, ("attention", "k", "cpu", "meta")),
    (attend(q=q(4, 5, 8)), ValueError, ("attention", "q", "batch, heads, tokens, channels", "(4, 5, 8)")),
    (attend(k=q(2, 2, 6, 9)), ValueError, ("attention", "k", "8", "(2, 2, 6, 9)")),
    (attend(k=q(1, 2, 6, 8)), ValueError, ("attention", "k", "(1, 2, 6, 8)")),
    (attend(v=q(2, 2, 7, 8)), ValueError, ("attention", "v", "(2, 2, 7, 8)")),
    (attend(k=q(2, 3, 6, 8), v=q(2, 3, 6, 8)), ValueError, ("attention", "k", "divides", "4", "3")),
    (attend(k=q(2, 0, 6, 8), v=q(2, 0, 6, 8)), ValueError, ("attention", "k", "0")),
    (attend(attn_mask=torch.zeros(5, 7)), ValueError, ("attention", "attn_mask", "(2, 4, 5, 6)", "(5, 7)")),
    (attend(attn_mask=torch.zeros(1, 1, 1, 5, 6)), ValueError, ("attention", "attn_mask", "(1, 1, 1, 5, 6)")),
    (attend(attn_mask=torch.zeros(5, 6, dtype=INT)), TypeError, ("attention", "attn_mask", "bool", "int32")),
    (attend(attn_mask=torch.zeros(5, 6, dtype=DOUBLE)), TypeError, ("attention", "attn_mask", "float64")),
    (attend(attn_mask=True), TypeError, ("attention", "attn_mask", "tensor", "bool")),
    (attend(attn_mask=torch.zeros(5, 6, device="meta")), ValueError, ("attention", "attn_mask", "cpu", "meta")),
    (attend(window=(-2, 0)), ValueError, ("attention", "window", "-1", "(-2, 0)")),
    (attend(window=(1, 2, 3)), ValueError, ("attention", "window", "(1, 2, 3)")),
    (attend(sink_tokens=-1), ValueError, ("attention", "sink_tokens", "0", "-1")),
    (attend(softcap=-0.5), ValueError, ("attention", "softcap", "-0.5")),
    (attend(dropout_p=1.0), ValueError, ("attention", "dropout_p", "1.0")),
    (attend(dropout_p=-0.1), ValueError, ("attention", "dropout_p", "-0.1")),
    (attend(sinks=torch.zeros(3)), ValueError, ("attention", "sinks", "4", "(3,)")),
    (attend(sinks=torch.zeros(4, dtype=INT)), TypeError, ("attention", "sinks", "int32")),
    (attend(sinks=1.0), TypeError, ("attention", "sinks", "tensor", "float")),
    (attend(sinks=torch.zeros(4, device="meta")), ValueError, ("attention", "sinks", "cpu", "meta")),
    (attend(alibi_slopes=torch.zeros(3)), ValueError, ("attention", "alibi_slopes", "4", "(3,)")),
    (attend(alibi_slopes=torch.zeros(3, 4)), ValueError, ("attention", "alibi_slopes", "(3, 4)")),
    (attend(alibi_slopes=torch.zeros(4, dtype=INT)), TypeError, ("attention", "alibi_slopes", "int32")),
    (attend(key_ranges=torch.zeros(2, 2, dtype=INT)), ValueError, ("attention", "key_ranges", "(2, 2)")),
    (attend(key_ranges=torch.zeros(2, 3)), TypeError, ("attention", "key_ranges", "int32", "float32")),
    (varlen(q=q(1, 10, 4, 8)), ValueError, ("attention_varlen", "q", "total", "(1, 10, 4, 8)")),
    (varlen(q=q(10, 4, 8, dtype=INT)), TypeError, ("attention_varlen", "q", "int32")),
    (varlen(k=q(10, 3, 8), v=q(10, 3, 8)), ValueError, ("attention_varlen", "k", "divides")),
    (varlen(cu_seqlens_q=torch.tensor([0.0, 10.0])), TypeError, ("attention_varlen", "cu_seqlens_q", "int32")),
    (varlen(cu_seqlens_q=torch.tensor([0])), ValueError, ("attention_varlen", "cu_seqlens")),
    (varlen(cu_seqlens_k=torch.tensor([0, 10])), ValueError, ("attention_varlen", "cu_seqlens_k", "(2,)")),
    (varlen(cu_seqlens_q=[0, 3, 10]), TypeError, ("attention_varlen", "cu_seqlens_q", "tensor", "list")),
    (varlen(cu_seqlens_q=torch.tensor([0, 4, 3])), RuntimeError, ("attention_varlen", "cu_seqlens_q", "decrease")),
    (varlen(cu_seqlens_k=torch.tensor([0, 3, 11])), RuntimeError, ("attention_varlen", "cu_seqlens_k", "10", "11")),
    (varlen(cu_seqlens_k=torch.tensor([-1, 3, 9])), RuntimeError, ("attention_varlen", "cu_seqlens_k", "-1")),
    (varlen(alibi_slopes=torch.zeros(3, 4)), ValueError, ("attention_varlen", "alibi_slopes", "(2, 4)")),
    (varlen(window=(0, -5)), ValueError, ("attention_varlen", "window", "(0, -5)")),
    (decode(q=q(2, 4, 8)), ValueError, ("attention_decode", "q", "4 dimensions", "(2, 4, 8)")),
    (decode(k_cache=q(2, 2, 20, 8, dtype=HALF)), TypeError, ("attention_decode", "k_cache", "bfloat16")),
    (decode(k_cache=q(2, 2, 20, 9)), ValueError, ("attention_decode", "k_cache", "(2, 2, 20, 9)")),
    (decode(v_cache=q(2, 2, 21, 8)), ValueError, ("attention_decode", "v_cache", "(2, 2, 21, 8)")),
    (decode(k_cache=q(3, 2, 20, 8), v_cache=q(3, 2, 20, 8)), ValueError, ("attention_decode", "k_cache", "3")),
    (decode(k_cache=q(2, 3, 20, 8), v_cache=q(2, 3, 20, 8)), ValueError, ("attention_decode", "k", "divides")),
    (decode(cache_seqlens=torch.tensor([1])), ValueError, ("attention_decode", "cache_seqlens", "(1,)")),
    (decode(cache_seqlens=torch.ones(2)), TypeError, ("attention_decode", "cache_seqlens", "float32")),
    (decode(cache_seqlens=torch.tensor([1, 21])), RuntimeError, ("attention_decode", "cache_seqlens", "20", "21")),
    (decode(cache_seqlens=torch.tensor([-1, 2])), RuntimeError, ("attention_decode", "cache_seqlens", "-1")),
    (decode(cache_seqlens=torch.tensor([0, 2]), **NEW), RuntimeError, ("attention_decode", "cache_seqlens", "1")),
    (decode(k_new=NEW["k_new"]), ValueError, ("attention_decode", "k_new", "v_new", "both")),
    (decode(k_new=q(2, 2, 1, 9), v_new=q(2, 2, 1, 8)), ValueError, ("attention_decode", "k_new", "(2, 2, 1, 9)")),
    (decode(k_new=q(2, 2, 1, 8), v_new=q(2, 2, 2, 8)), ValueError, ("attention_decode", "v_new", "(2, 2, 2, 8)")),
    (decode(cos=q(30, 8)), ValueError, ("attention_decode", "cos", "sin", "both")),
    (decode(cos=q(30, 8), sin=q(30, 6)), ValueError, ("attention_decode", "sin", "(30, 6)")),
    (decode(cos=q(30, 7), sin=q(30, 7)), ValueError, ("attention_decode", "cos", "even", "7")),
    (decode(cos=q(30, 10), sin=q(30, 10)), ValueError, ("attention_decode", "cos", "8", "10")),
    (decode(cos=q(30, 8, dtype=DOUBLE), sin=q(30, 8, dtype=DOUBLE)), TypeError, ("attention_decode", "cos")),
    (decode(cos=q(30, 8, dtype=INT), sin=q(30, 8, dtype=INT)), TypeError, ("attention_decode", "cos", "int32")),
    (decode(cos=[1.0], sin=[1.0]), TypeError, ("attention_decode", "cos", "tensor", "list")),
    (decode(cos=q(19, 8), sin=q(19, 8)), RuntimeError, ("attention_decode", "cos", "19", "20")),
    (decode(cache_starts=torch.tensor([1])), ValueError, ("attention_decode", "cache_starts", "(1,)")),
    (decode(cache_batch_idx=torch.tensor([0, 2])), RuntimeError, ("attention_decode", "cache_batch_idx", "2")),
    (decode(**PAGES | {"block_table": TABLE[:1]}), ValueError, ("attention_decode", "block_table", "(1, 3)")),
    (decode(**PAGES | {"block_table": TABLE + 4}), RuntimeError, ("attention_decode", "block_table", "4")),
    (decode(**PAGES | {"block_table": TABLE - 1}), RuntimeError, ("attention_decode", "block_table", "-1")),
    (decode(**PAGES, cache_batch_idx=torch.tensor([0, 1])), ValueError, ("attention_decode", "cache_batch_idx")),
    (decode(k_cache=q(2, 2, 8, 20).mT), (RuntimeError, ValueError), ("attention_decode", "k_cache", "stride")),
    (decode(sinks=torch.zeros(3)), ValueError, ("attention_decode", "sinks", "(3,)")),
    (decode(window=(-3, 0)), ValueError, ("attention_decode", "window", "(-3, 0)")),
    (lambda: longspan.merge_attention([], []), ValueError, ("merge_attention", "outs", "0")),
    (lambda: longspan.merge_attention([q()], []), ValueError, ("merge_attention", "1", "0")),
    (
        lambda: longspan.merge_attention([q(), q(1, 1, 1, 1)], [q(2, 4, 5)] * 2),
        ValueError,
        ("merge_attention", "outs[1]", "(1, 1, 1, 1)"),
    ),
    (
        lambda: longspan.merge_attention([q(), q()], [q(2, 4, 5), q(2, 4, 6)]),
        ValueError,
        ("merge_attention", "lses[1]", "(2, 4, 6)"),
    ),
    (
        lambda: longspan.merge_attention([q(dtype=INT)], [q(2, 4, 5)]),
        TypeError,
        ("merge_attention", "outs[0]", "int32"),
    ),
    (lambda: longspan.merge_attention([q()], [1.0]), TypeError, ("merge_attention", "lses[0]", "float")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "parts"), BAD, ids=[f"{i}-{'-'.join(parts)}" for i, (_, _, parts) in enumerate(BAD)]
)
def test_wrong_arguments(call: Callable[[], Any], kind: type[Exception], parts: tuple[str, ...]) -> None:
    assert_raises(kind, parts, call)


def test_the_good_arguments_beside_them_are_good() -> None:
    for call in (attend(), varlen(), decode(), decode(**NEW), decode(**PAGES)):
        call()


def test_a_failed_call_writes_nothing() -> None:
    cache = torch.zeros(2, 1, 8, 4)
    with pytest.raises(RuntimeError, match="cache_seqlens"):
        longspan.attention_decode(
            torch.zeros(2, 1, 1, 4), cache, cache.clone(), torch.tensor([3, 9]),
            k_new=torch.ones(2, 1, 1, 4), v_new=torch.ones(2, 1, 1, 4),
        )  # fmt: skip
    assert (cache == 0).all()


def test_direct_calls_of_the_operator_are_checked() -> None:
    """torch.ops.longspan without the Python checks reads no memory that is not there."""
    forward = torch.ops.longspan.attention_forward
    rest = (-1, -1, 0, 1.0, 0.0, 0.0)
    none = [None] * 7
    for bad in [
        (q(), q(2, 3, 6, 8), q(2, 3, 6, 8)),
        (q(), q(2, 2, 6, 9), q(2, 2, 6, 8)),
        (q(), q(2, 2, 6, 8), q(2, 2, 7, 8)),
        (q(), q(1, 2, 6, 8), q(2, 2, 6, 8)),
        (q(), q(2, 2, 6, 8, dtype=DOUBLE), q(2, 2, 6, 8)),
        (q(4, 5, 8), q(2, 2, 6, 8), q(2, 2, 6, 8)),
        (q(dtype=INT), q(2, 2, 6, 8, dtype=INT), q(2, 2, 6, 8, dtype=INT)),
    ]:
        with pytest.raises(RuntimeError, match="attention"):
            forward(*bad, *none, *rest)
    good = (q(), q(2, 2, 6, 8), q(2, 2, 6, 8))
    wrong_options: list[tuple[int, Tensor]] = [
        (0, q(2, 4, 5, 7)),
        (0, q(5, 6)),
        (1, q(3)),
        (2, q(3)),
        (5, torch.zeros(1, 3, dtype=torch.int64)),
    ]
    for position, value in wrong_options:
        options = list(none)
        options[position] = value
        with pytest.raises(RuntimeError, match="attention"):
            forward(*good, *options, *rest)
