"""`attention_decode` is the last rows of `attention` over what its cache holds."""

from typing import Any

import pytest
import torch
from checks import (
    DTYPES,
    TOLERANCE,
    assert_agree,
    assert_same_bits,
    assert_threads_change_nothing,
    greatest_error,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import longspan
from longspan import reference

FLOATS = [torch.float32, torch.float64]


def rotary(positions: int, channels: int) -> tuple[Tensor, Tensor]:
    frequency = 100.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def decode(dtype: torch.dtype, call: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The operator's and the double reference's results on the same numbers, caches included."""

    def run(function: Any, as_dtype: torch.dtype, **more: Any) -> dict[str, Tensor]:
        arguments = {
            name: x.to(dtype).to(as_dtype).clone()
            if isinstance(x, Tensor) and x.is_floating_point()
            else x
            for name, x in call.items()
        }
        out, lse = function(**arguments, **more)
        return {"out": out, "lse": lse, "k": arguments["k_cache"], "v": arguments["v_cache"]}

    def dense(
        causal: bool = True, window: tuple[int, int] = (-1, -1), scale: float | None = None, **x: Any
    ):
        return reference.attention.attention_decode(
            **x, window=(window[0], 0 if causal else window[1]),
            scale=x["q"].shape[3] ** -0.5 if scale is None else scale,
        )  # fmt: skip

    return run(longspan.attention_decode, dtype, return_lse=True), run(dense, torch.float64)


def caches(
    b: int, h: int, kv_heads: int, tokens: int, slots: int, size: int, value_size: int
) -> dict[str, Any]:
    return {
        "q": torch.randn(b, h, tokens, size, dtype=torch.float64),
        "k_cache": torch.randn(b, kv_heads, slots, size, dtype=torch.float64),
        "v_cache": torch.randn(b, kv_heads, slots, value_size, dtype=torch.float64),
    }


SLOPES = torch.tensor([0.5, 0.1, 0.02, 0.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"window": (50, -1)},
    "sink tokens": {"window": (50, -1), "sink_tokens": 4},
    "right bound": {"causal": False, "window": (30, 1)},
    "sinks": {"sinks": torch.randn(4, generator=torch.Generator().manual_seed(1))},
    "scale, softcap": {"scale": 0.4, "softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi per sequence": {"alibi_slopes": torch.stack([SLOPES, SLOPES.flip(0), SLOPES * 2])},
    "starts": {"cache_starts": torch.tensor([0, 17, 300])},
    "starts, window": {"cache_starts": torch.tensor([0, 17, 290]), "window": (20, -1), "sink_tokens": 2},
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(isa: str, name: str, tokens: int, dtype: torch.dtype) -> None:
    call = caches(3, 4, 2, tokens, 700, 24, 16) | {"cache_seqlens": torch.tensor([700, 65, 301])}
    found, want = decode(dtype, call | OPTIONS[name])
    assert_agree(found, want)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [0, 8, 24])
@pytest.mark.parametrize("new", [1, 2, 4])
def test_appends_and_rotates(isa: str, new: int, rotated: int, interleaved: bool) -> None:
    call = caches(3, 4, 2, new, 100, 24, 16)
    call |= {
        "cache_seqlens": torch.tensor([100, new, 64], dtype=torch.int32),
        "k_new": torch.randn(3, 2, new, 24, dtype=torch.float64),
        "v_new": torch.randn(3, 2, new, 16, dtype=torch.float64),
        "cache_starts": torch.tensor([3, 0, 60]),
        "interleaved": interleaved,
    }
    if rotated:
        call["cos"], call["sin"] = rotary(100, rotated)
    for dtype in FLOATS:
        found, want = decode(dtype, call)
        assert_agree(found, want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("page", [1, 16, 48, 256])
def test_pages(isa: str, page: int, dtype: torch.dtype) -> None:
    pages = -(-300 // page)
    call = {
        "q": torch.randn(2, 4, 2, 16, dtype=torch.float64),
        "k_cache": torch.randn(2 * pages + 3, page, 2, 16, dtype=torch.float64),
        "v_cache": torch.randn(2 * pages + 3, page, 2, 24, dtype=torch.float64),
        "cache_seqlens": torch.tensor([300, 130]),
        "block_table": torch.randperm(2 * pages + 3)[: 2 * pages].view(2, pages).int(),
        "k_new": torch.randn(2, 2, 2, 16, dtype=torch.float64),
        "v_new": torch.randn(2, 2, 2, 24, dtype=torch.float64),
        "window": (100, -1),
        "sink_tokens": 20,
    }
    found, want = decode(dtype, call)
    assert_agree(found, want)


def test_rows_of_the_cache(isa: str) -> None:
    call = caches(5, 4, 2, 1, 90, 16, 16) | {"cache_seqlens": torch.tensor([90, 40])}
    call["q"] = call["q"][:2]
    call |= {"cache_batch_idx": torch.tensor([4, 1]), "k_new": torch.randn(2, 2, 1, 16).double()}
    call["v_new"] = torch.randn(2, 2, 1, 16).double()
    found, want = decode(torch.float64, call)
    assert_agree(found, want)


@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.integers(4, 600),
    st.integers(1, 70), st.integers(1, 70), st.integers(-1, 100), st.integers(0, 70), st.data(),
)  # fmt: skip
def test_any_call(
    b: int, kv_heads: int, group: int, tokens: int, slots: int, size: int, value_size: int, left: int,
    sink_tokens: int, data: st.DataObject,
) -> None:  # fmt: skip
    call = caches(b, kv_heads * group, kv_heads, tokens, slots, size, value_size)
    lengths = [data.draw(st.integers(tokens, slots)) for _ in range(b)]
    starts = [data.draw(st.integers(0, n)) for n in lengths]
    call |= {"cache_seqlens": torch.tensor(lengths), "cache_starts": torch.tensor(starts)}
    found, want = decode(torch.float64, call | {"window": (left, -1), "sink_tokens": sink_tokens})
    assert_agree(found, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "value_size"), [(64, 64), (80, 80), (40, 24), (15, 15), (256, 128)])
def test_every_dtype_against_prefill(isa: str, size: int, value_size: int, dtype: torch.dtype) -> None:
    """Token by token with the cache, the rows are those of attention over the whole."""
    whole = {
        "q": torch.randn(1, 4, 70, size).to(dtype),
        "k": torch.randn(1, 2, 70, size).to(dtype),
        "v": torch.randn(1, 2, 70, value_size).to(dtype),
    }
    want = longspan.attention(**{n: x.double() for n, x in whole.items()}, causal=True)
    k_cache, v_cache = (torch.full_like(whole[n], torch.nan) for n in "kv")
    rows = []
    for t in range(70):
        at = slice(t, t + 1)
        rows.append(
            longspan.attention_decode(
                whole["q"][:, :, at], k_cache, v_cache, torch.tensor([t + 1]),
                k_new=whole["k"][:, :, at], v_new=whole["v"][:, :, at],
            )
        )  # fmt: skip
    assert_same_bits({"k": k_cache, "v": v_cache}, {"k": whole["k"], "v": whole["v"]})
    found = torch.cat(rows, 2)
    half = dtype in (torch.bfloat16, torch.float16)
    limit = torch.finfo(dtype).eps * 2 if half else TOLERANCE[dtype]
    assert greatest_error(found, want) <= limit * want.abs().max()


def test_slots_beyond_the_length_and_before_the_start_never_matter(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = caches(2, 4, 2, 2, 300, 16, 16) | {
            "cache_seqlens": torch.tensor([130, 300]),
            "cache_starts": torch.tensor([5, 71]),
        }
        clean, _ = decode(dtype, call)
        for name in ("k_cache", "v_cache"):
            for bad in (torch.nan, torch.inf):
                call[name][0, :, 130:] = bad
                call[name][0, :, :5] = bad
                call[name][1, :, :71] = bad
                found, _ = decode(dtype, call)
                outputs = ("out", "lse")
                assert_same_bits({n: found[n] for n in outputs}, {n: clean[n] for n in outputs})


def test_causal_and_window_keep_bad_keys_from_earlier_queries(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = caches(1, 4, 2, 3, 100, 16, 16) | {
            "cache_seqlens": torch.tensor([100]),
            "window": (60, -1),
        }
        clean, _ = decode(dtype, call)
        for name in ("k_cache", "v_cache"):
            dirty = call | {name: call[name].clone()}
            dirty[name][:, :, 98] = torch.nan  # query 0 stands at 97 and does not see it
            dirty[name][:, :, 20] = torch.inf  # before all windows
            found, _ = decode(dtype, dirty)
            assert_same_bits({"out": found["out"][:, :, :1]}, {"out": clean["out"][:, :, :1]})
            assert found["out"][:, :, 1:].isnan().all(), "a visible NaN vanished"


def test_no_visible_key() -> None:
    call = caches(2, 4, 2, 1, 40, 16, 16) | {
        "cache_seqlens": torch.tensor([0, 20]),
        "cache_starts": torch.tensor([0, 20]),
    }
    found, _ = decode(torch.float32, call)
    assert (found["out"] == 0).all()
    assert (found["lse"] == -torch.inf).all()


def test_empty_batch() -> None:
    call = caches(0, 4, 2, 1, 40, 16, 16) | {"cache_seqlens": torch.zeros(0, dtype=torch.int64)}
    out, lse = longspan.attention_decode(**call, return_lse=True)
    assert out.shape == (0, 4, 1, 16)
    assert lse.shape == (0, 4, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype) -> None:
    call = caches(1, 3, 1, 2, 3000, 16, 16) | {"cache_seqlens": torch.tensor([2999])}
    call |= {"k_new": torch.randn(1, 1, 2, 16), "v_new": torch.randn(1, 1, 2, 16)}
    assert_threads_change_nothing(lambda: decode(dtype, call)[0])


def test_strides_change_nothing() -> None:
    """Caches (B, S, H, D), and queries in any place."""
    call = caches(2, 4, 2, 2, 90, 16, 16) | {"cache_seqlens": torch.tensor([90, 40])}
    want = longspan.attention_decode(**call)
    moved = {
        n: x.transpose(1, 2).contiguous().transpose(1, 2) if n in ("k_cache", "v_cache", "q") else x
        for n, x in call.items()
    }
    assert_same_bits({"out": longspan.attention_decode(**moved)}, {"out": want})
    moved["q"] = call["q"].transpose(2, 3).contiguous().transpose(2, 3)
    assert_same_bits({"out": longspan.attention_decode(**moved)}, {"out": want})


def test_writes_nothing_but_the_new_slots() -> None:
    call = caches(1, 2, 1, 1, 50, 8, 8) | {"cache_seqlens": torch.tensor([21])}
    call |= {"k_new": torch.ones(1, 1, 1, 8).double(), "v_new": torch.ones(1, 1, 1, 8).double()}
    before = {n: call[n].clone() for n in ("k_cache", "v_cache")}
    longspan.attention_decode(**call)
    for n, x in before.items():
        x[:, :, 20] = 1
        assert torch.equal(call[n], x)
