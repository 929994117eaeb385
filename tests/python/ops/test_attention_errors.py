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


def attend(**arguments: Any) -> Any:
    return longspan.attention(**{"q": q(), "k": q(2, 2, 6, 8), "v": q(2, 2, 6, 8)} | arguments)


def varlen(**arguments: Any) -> Any:
    cu = torch.tensor([0, 3, 10])
    good = {"q": q(10, 4, 8), "k": q(10, 2, 8), "v": q(10, 2, 8), "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    return longspan.attention_varlen(**good | arguments)


def decode(**arguments: Any) -> Any:
    good = {
        "q": q(2, 4, 1, 8),
        "k_cache": q(2, 2, 20, 8),
        "v_cache": q(2, 2, 20, 8),
        "cache_seqlens": torch.tensor([20, 7]),
    }
    return longspan.attention_decode(**good | arguments)


def merge(**arguments: Any) -> Any:
    return longspan.merge_attention(**{"outs": [q(), q()], "lses": [q(2, 4, 5)] * 2} | arguments)


def wrong(kind: Any, *parts: str, **arguments: Any) -> tuple[dict[str, Any], Any, tuple[str, ...]]:
    """Arguments in place of good ones, the exception that they raise, and what its message has."""
    return arguments, kind, parts


HALF, DOUBLE, INT = torch.bfloat16, torch.float64, torch.int32
NEW = {"k_new": q(2, 2, 1, 8), "v_new": q(2, 2, 1, 8)}
TABLE = torch.zeros(2, 3, dtype=torch.int64)
PAGES = {"k_cache": q(4, 16, 2, 8), "v_cache": q(4, 16, 2, 8), "block_table": TABLE}

ATTENTION = [
    wrong(TypeError, "q", "tensor", "list", q=[1.0]),
    wrong(TypeError, "k", "tensor", "NoneType", k=None),
    wrong(TypeError, "q", "float32", "int32", q=q(dtype=INT)),
    wrong(TypeError, "q", "complex64", q=q(dtype=torch.complex64)),
    wrong(TypeError, "k", "float32", "float64", k=q(2, 2, 6, 8, dtype=DOUBLE)),
    wrong(TypeError, "v", "float32", "bfloat16", v=q(2, 2, 6, 8, dtype=HALF)),
    wrong(ValueError, "k", "cpu", "meta", k=q(2, 2, 6, 8).to("meta")),
    wrong(ValueError, "q", "batch, heads, tokens, channels", "(4, 5, 8)", q=q(4, 5, 8)),
    wrong(ValueError, "k", "8", "(2, 2, 6, 9)", k=q(2, 2, 6, 9)),
    wrong(ValueError, "k", "(1, 2, 6, 8)", k=q(1, 2, 6, 8)),
    wrong(ValueError, "v", "(2, 2, 7, 8)", v=q(2, 2, 7, 8)),
    wrong(ValueError, "k", "divides", "4", "3", k=q(2, 3, 6, 8), v=q(2, 3, 6, 8)),
    wrong(ValueError, "k", "0", k=q(2, 0, 6, 8), v=q(2, 0, 6, 8)),
    wrong(ValueError, "attn_mask", "(2, 4, 5, 6)", "(5, 7)", attn_mask=torch.zeros(5, 7)),
    wrong(ValueError, "attn_mask", "(1, 1, 1, 5, 6)", attn_mask=torch.zeros(1, 1, 1, 5, 6)),
    wrong(TypeError, "attn_mask", "bool", "int32", attn_mask=torch.zeros(5, 6, dtype=INT)),
    wrong(TypeError, "attn_mask", "float64", attn_mask=torch.zeros(5, 6, dtype=DOUBLE)),
    wrong(TypeError, "attn_mask", "tensor", "bool", attn_mask=True),
    wrong(ValueError, "attn_mask", "cpu", "meta", attn_mask=torch.zeros(5, 6, device="meta")),
    wrong(ValueError, "window", "-1", "(-2, 0)", window=(-2, 0)),
    wrong(ValueError, "window", "(1, 2, 3)", window=(1, 2, 3)),
    wrong(ValueError, "sink_tokens", "0", "-1", sink_tokens=-1),
    wrong(ValueError, "softcap", "-0.5", softcap=-0.5),
    wrong(ValueError, "dropout_p", "1.0", dropout_p=1.0),
    wrong(ValueError, "dropout_p", "-0.1", dropout_p=-0.1),
    wrong(ValueError, "sinks", "4", "(3,)", sinks=torch.zeros(3)),
    wrong(TypeError, "sinks", "int32", sinks=torch.zeros(4, dtype=INT)),
    wrong(TypeError, "sinks", "tensor", "float", sinks=1.0),
    wrong(ValueError, "sinks", "cpu", "meta", sinks=torch.zeros(4, device="meta")),
    wrong(ValueError, "alibi_slopes", "4", "(3,)", alibi_slopes=torch.zeros(3)),
    wrong(ValueError, "alibi_slopes", "(3, 4)", alibi_slopes=torch.zeros(3, 4)),
    wrong(TypeError, "alibi_slopes", "int32", alibi_slopes=torch.zeros(4, dtype=INT)),
    wrong(ValueError, "key_ranges", "(2, 2)", key_ranges=torch.zeros(2, 2, dtype=INT)),
    wrong(TypeError, "key_ranges", "int32", "float32", key_ranges=torch.zeros(2, 3)),
]  # fmt: skip

VARLEN = [
    wrong(ValueError, "q", "total", "(1, 10, 4, 8)", q=q(1, 10, 4, 8)),
    wrong(TypeError, "q", "int32", q=q(10, 4, 8, dtype=INT)),
    wrong(ValueError, "k", "divides", k=q(10, 3, 8), v=q(10, 3, 8)),
    wrong(TypeError, "cu_seqlens_q", "int32", cu_seqlens_q=torch.tensor([0.0, 10.0])),
    wrong(ValueError, "cu_seqlens", cu_seqlens_q=torch.tensor([0])),
    wrong(ValueError, "cu_seqlens_k", "(2,)", cu_seqlens_k=torch.tensor([0, 10])),
    wrong(TypeError, "cu_seqlens_q", "tensor", "list", cu_seqlens_q=[0, 3, 10]),
    wrong(RuntimeError, "cu_seqlens_q", "decrease", cu_seqlens_q=torch.tensor([0, 4, 3])),
    wrong(RuntimeError, "cu_seqlens_k", "10", "11", cu_seqlens_k=torch.tensor([0, 3, 11])),
    wrong(RuntimeError, "cu_seqlens_k", "-1", cu_seqlens_k=torch.tensor([-1, 3, 9])),
    wrong(ValueError, "alibi_slopes", "(2, 4)", alibi_slopes=torch.zeros(3, 4)),
    wrong(ValueError, "window", "(0, -5)", window=(0, -5)),
]  # fmt: skip

DECODE = [
    wrong(ValueError, "q", "4 dimensions", "(2, 4, 8)", q=q(2, 4, 8)),
    wrong(TypeError, "k_cache", "bfloat16", k_cache=q(2, 2, 20, 8, dtype=HALF)),
    wrong(ValueError, "k_cache", "(2, 2, 20, 9)", k_cache=q(2, 2, 20, 9)),
    wrong(ValueError, "v_cache", "(2, 2, 21, 8)", v_cache=q(2, 2, 21, 8)),
    wrong(ValueError, "k_cache", "3", k_cache=q(3, 2, 20, 8), v_cache=q(3, 2, 20, 8)),
    wrong(ValueError, "k", "divides", k_cache=q(2, 3, 20, 8), v_cache=q(2, 3, 20, 8)),
    wrong(ValueError, "cache_seqlens", "(1,)", cache_seqlens=torch.tensor([1])),
    wrong(TypeError, "cache_seqlens", "float32", cache_seqlens=torch.ones(2)),
    wrong(RuntimeError, "cache_seqlens", "20", "21", cache_seqlens=torch.tensor([1, 21])),
    wrong(RuntimeError, "cache_seqlens", "-1", cache_seqlens=torch.tensor([-1, 2])),
    wrong(RuntimeError, "cache_seqlens", "1", cache_seqlens=torch.tensor([0, 2]), **NEW),
    wrong(ValueError, "k_new", "v_new", "both", k_new=NEW["k_new"]),
    wrong(ValueError, "k_new", "(2, 2, 1, 9)", k_new=q(2, 2, 1, 9), v_new=q(2, 2, 1, 8)),
    wrong(ValueError, "v_new", "(2, 2, 2, 8)", k_new=q(2, 2, 1, 8), v_new=q(2, 2, 2, 8)),
    wrong(ValueError, "cos", "sin", "both", cos=q(30, 8)),
    wrong(ValueError, "sin", "(30, 6)", cos=q(30, 8), sin=q(30, 6)),
    wrong(ValueError, "cos", "even", "7", cos=q(30, 7), sin=q(30, 7)),
    wrong(ValueError, "cos", "8", "10", cos=q(30, 10), sin=q(30, 10)),
    wrong(TypeError, "cos", cos=q(30, 8, dtype=DOUBLE), sin=q(30, 8, dtype=DOUBLE)),
    wrong(TypeError, "cos", "int32", cos=q(30, 8, dtype=INT), sin=q(30, 8, dtype=INT)),
    wrong(TypeError, "cos", "tensor", "list", cos=[1.0], sin=[1.0]),
    wrong(RuntimeError, "cos", "19", "20", cos=q(19, 8), sin=q(19, 8)),
    wrong(ValueError, "cache_starts", "(1,)", cache_starts=torch.tensor([1])),
    wrong(RuntimeError, "cache_batch_idx", "2", cache_batch_idx=torch.tensor([0, 2])),
    wrong(ValueError, "block_table", "(1, 3)", **PAGES | {"block_table": TABLE[:1]}),
    wrong(RuntimeError, "block_table", "4", **PAGES | {"block_table": TABLE + 4}),
    wrong(RuntimeError, "block_table", "-1", **PAGES | {"block_table": TABLE - 1}),
    wrong(ValueError, "cache_batch_idx", **PAGES, cache_batch_idx=torch.tensor([0, 1])),
    wrong((RuntimeError, ValueError), "k_cache", "stride", k_cache=q(2, 2, 8, 20).mT),
    wrong(ValueError, "sinks", "(3,)", sinks=torch.zeros(3)),
    wrong(ValueError, "window", "(-3, 0)", window=(-3, 0)),
]  # fmt: skip

MERGE = [
    wrong(ValueError, "outs", "0", outs=[], lses=[]),
    wrong(ValueError, "2", "0", lses=[]),
    wrong(ValueError, "outs[1]", "(1, 1, 1, 1)", outs=[q(), q(1, 1, 1, 1)]),
    wrong(ValueError, "lses[1]", "(2, 4, 6)", lses=[q(2, 4, 5), q(2, 4, 6)]),
    wrong(TypeError, "outs[0]", "int32", outs=[q(dtype=INT)] * 2),
    wrong(TypeError, "lses[0]", "float", lses=[1.0, 1.0]),
]

CASES = [
    pytest.param(function, name, *case, id=f"{name}-{i}-{case[2][0]}")
    for function, name, table in [
        (attend, "attention", ATTENTION),
        (varlen, "attention_varlen", VARLEN),
        (decode, "attention_decode", DECODE),
        (merge, "merge_attention", MERGE),
    ]
    for i, case in enumerate(table)
]


@pytest.mark.parametrize(("function", "name", "arguments", "kind", "parts"), CASES)
def test_wrong_arguments(
    function: Callable[..., Any], name: str, arguments: dict[str, Any], kind: Any, parts: tuple[str, ...]
) -> None:
    assert_raises(kind, (name, *parts), lambda: function(**arguments))


def test_the_good_arguments_beside_them_are_good() -> None:
    for function in (attend, varlen, decode, merge):
        function()
    decode(**NEW)
    decode(**PAGES)


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
