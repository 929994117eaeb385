"""`longspan.attention` computes what the dense reference computes in double."""

import dataclasses
from typing import Any

import pytest
import torch
from attention_oracle import actual, expected, heads, plain
from checks import (
    DTYPES,
    TOLERANCE,
    assert_agree,
    assert_error_ratio,
    assert_same_bits,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    greatest_error,
    grid,
    lengths_with_head_sizes,
    results,
    to,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import longspan

SLOPES = torch.tensor([0.5, 0.1, 0.02, 0.0])

# Every argument that changes the result, alone and with others.
OPTIONS = {
    "all keys": {},
    "causal": {"causal": True},
    "window": {"window": (20, 3)},
    "causal window": {"causal": True, "window": (40, -1)},
    "window of one": {"window": (0, 0)},
    "sink tokens": {"causal": True, "window": (17, -1), "sink_tokens": 3},
    "right bound": {"window": (-1, 5)},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "zero scale": {"scale": 0.0},
    "softcap": {"softcap": 2.0, "causal": True},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi per sequence": {"alibi_slopes": torch.stack([SLOPES, SLOPES.flip(0)]), "causal": True},
    "key ranges": {"key_ranges": torch.tensor([[3, 90, 20], [0, 100, 36]]), "causal": True},
    "key ranges int32": {"key_ranges": torch.tensor([[5, 64, 0], [64, 65, -7]], dtype=torch.int32)},
    "ranges, window, sinks": {
        "key_ranges": torch.tensor([[7, 99, 30], [0, 100, 36]]),
        "window": (11, 4),
        "sink_tokens": 2,
    },
    "everything": {
        "causal": True,
        "window": (50, 2),
        "sink_tokens": 5,
        "scale": 0.2,
        "softcap": 3.0,
        "alibi_slopes": SLOPES,
        "key_ranges": torch.tensor([[3, 90, 20], [0, 100, 36]]),
    },
}

FLOATS = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("length", "size"), lengths_with_head_sizes())
def test_lengths_and_head_sizes(isa: str, length: int, size: int, dtype: torch.dtype) -> None:
    tensors = heads(1, 2, 1, length, length, size, dtype=dtype)

    def with_causal(function):
        return lambda q, k, v: function(q, k, v, causal=True)

    assert_agree(
        results(with_causal(actual), tensors), results(with_causal(expected), to(torch.float64, tensors))
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(isa: str, name: str, dtype: torch.dtype) -> None:
    options = OPTIONS[name]
    tensors = heads(2, 4, 2, 64, 100, 24, 16, dtype=dtype)
    tensors["sinks"] = torch.randn(4, dtype=torch.float64).to(dtype)
    found = results(lambda **x: actual(**x, **options), tensors)
    assert_agree(found, results(lambda **x: expected(**x, **options), to(torch.float64, tensors)))


@pytest.mark.parametrize("tokens", [1, 3, 8, 9])
@pytest.mark.parametrize("name", [*OPTIONS, "ranges that end with the queries"])
def test_few_queries_over_many_keys(isa: str, name: str, tokens: int) -> None:
    """Up to 8 run as decoding does where it knows the options; log-sum-exp and gradients fit that."""
    ends = torch.tensor([290, 257])
    at_the_end = torch.stack([torch.tensor([3, 0]), ends, ends - tokens], dim=1)
    options = OPTIONS.get(name, {"key_ranges": at_the_end, "window": (200, 0), "sink_tokens": 2})
    tensors = heads(2, 4, 2, tokens, 300, 24, 16)
    tensors["sinks"] = torch.randn(4, dtype=torch.float64)
    for dtype in FLOATS:
        found = results(lambda **x: actual(**x, **options), to(dtype, tensors))
        assert_agree(found, results(lambda **x: expected(**x, **options), tensors))


@pytest.mark.parametrize("name", ["all keys", "causal", "sink tokens", "softcap", "alibi"])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_of_few_queries(dtype: torch.dtype, tokens: int, name: str) -> None:
    options, tensors = OPTIONS[name], heads(8, 4, 2, tokens, 700, 64)
    assert_error_ratio(
        lambda **x: longspan.attention(**x, **options), lambda **x: plain(**x, **options), tensors, dtype
    )


@pytest.mark.parametrize("name", ["all keys", "causal", "sink tokens", "softcap", "alibi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "size"), lengths_with_head_sizes())
def test_half_precision_error(length: int, size: int, dtype: torch.dtype, name: str) -> None:
    options, tensors = OPTIONS[name], heads(1, 4, 2, length, length, size)
    assert_error_ratio(
        lambda **x: longspan.attention(**x, **options), lambda **x: plain(**x, **options), tensors, dtype
    )


@pytest.mark.parametrize("channels", [(64, 64), (40, 24), (15, 64), (64, 7), (33, 33)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_on_every_level(
    isa: str, dtype: torch.dtype, channels: tuple[int, int]
) -> None:
    tensors = heads(2, 4, 2, 129, 150, *channels)
    tensors["sinks"] = torch.randn(4, dtype=torch.float64)
    tensors["attn_mask"] = torch.randn(2, 1, 129, 150, dtype=torch.float64)
    options = {"causal": True, "window": (100, -1), "softcap": 5.0}
    assert_error_ratio(
        lambda **x: longspan.attention(**x, **options), lambda **x: plain(**x, **options), tensors, dtype
    )


MASKS = [
    (2, 4, 33, 70),
    (1, 4, 33, 70),
    (2, 1, 33, 70),
    (1, 1, 33, 70),
    (2, 1, 1, 70),
    (1, 4, 33, 1),
    (1, 1, 1, 70),
    (1, 1, 1, 1),
    (4, 33, 70),
    (33, 70),
    (33, 1),
    (70,),
    (1,),
    (),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_additive_masks_and_their_gradient(isa: str, shape: tuple[int, ...], causal: bool) -> None:
    tensors = heads(2, 4, 2, 33, 70, 8)
    tensors["attn_mask"] = torch.randn(shape, dtype=torch.float64)
    found = results(lambda **x: actual(**x, causal=causal), tensors)
    assert_agree(found, results(lambda **x: expected(**x, causal=causal), tensors))


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_boolean_masks(isa: str, shape: tuple[int, ...]) -> None:
    tensors = heads(2, 4, 2, 33, 70, 8)
    tensors["attn_mask"] = torch.rand(shape) < 0.6
    found = results(lambda **x: actual(**x, causal=True), tensors)
    assert_agree(found, results(lambda **x: expected(**x, causal=True), tensors))


@pytest.mark.parametrize("mask_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_dtypes(dtype: torch.dtype, mask_dtype: torch.dtype | None) -> None:
    if dtype == torch.float64 and mask_dtype == torch.float32:
        pytest.skip("float64 takes float64 masks only: test_attention_errors.py")
    tensors = heads(1, 2, 2, 20, 30, 16, dtype=dtype)
    mask = torch.randn(20, 30, dtype=torch.float64).to(mask_dtype or dtype).requires_grad_()
    out = longspan.attention(**tensors, attn_mask=mask)
    out.sum().backward()
    assert mask.grad is not None
    assert mask.grad.dtype == mask.dtype
    wanted = to(torch.float64, tensors)
    double = mask.detach().double().requires_grad_()
    want, _ = expected(**wanted, attn_mask=double)
    want.sum().backward()
    limit = TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps)
    assert greatest_error(out.detach(), want.detach()) <= 4 * limit
    assert greatest_error(mask.grad, double.grad) <= 8 * limit


@dataclasses.dataclass
class Call:
    """Sizes and options of one call; numbers follow from the seed, so that a failure prints short."""

    seed: int
    batch: int
    kv_heads: int
    group: int
    tokens: int
    keys: int
    channels: int
    value_channels: int
    options: dict[str, Any]
    sinks: bool
    slopes: str
    mask: str
    mask_broadcast: tuple[bool, bool, bool, bool]

    def arguments(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
        torch.manual_seed(self.seed)
        h = self.kv_heads * self.group
        tensors = heads(
            self.batch, h, self.kv_heads, self.tokens, self.keys, self.channels, self.value_channels
        )
        if self.sinks:
            tensors["sinks"] = torch.randn(h, dtype=torch.float64)
        if self.mask:
            full = (self.batch, h, self.tokens, self.keys)
            mask = torch.randn([1 if one else n for n, one in zip(full, self.mask_broadcast)])
            tensors["attn_mask"] = mask.double() if self.mask == "add" else mask > -0.5
        options = dict(self.options)
        if self.slopes:
            # Scores stay within some tens, where float32's own rounding is below the tolerance.
            options["alibi_slopes"] = 0.1 * torch.rand(
                *([self.batch] if self.slopes == "per sequence" else []), h
            )
        if options.get("key_ranges"):
            options["key_ranges"] = torch.tensor(options["key_ranges"])
        return to(dtype, tensors), options


@st.composite
def calls(draw: st.DrawFn) -> Call:
    batch, keys = draw(st.integers(1, 2)), draw(st.integers(1, 200))
    bound = st.one_of(st.just(-1), st.integers(0, 80))
    position = st.integers(0, keys)
    options = {
        "causal": draw(st.booleans()),
        "window": (draw(bound), draw(bound)),
        "sink_tokens": draw(st.sampled_from([0, 0, 1, 5, 70])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5])),
        "scale": draw(st.sampled_from([None, 0.5])),
    }
    if draw(st.booleans()):
        options["key_ranges"] = [
            (draw(position), draw(position), draw(st.integers(-20, keys))) for _ in range(batch)
        ]
    return Call(
        seed=draw(st.integers(0, 2**31)),
        batch=batch,
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 150)),
        keys=keys,
        channels=draw(st.integers(1, 70)),
        value_channels=draw(st.integers(1, 70)),
        options=options,
        sinks=draw(st.booleans()),
        slopes=draw(st.sampled_from(["", "per head", "per sequence"])),
        mask=draw(st.sampled_from(["", "bool", "add"])),
        mask_broadcast=draw(st.tuples(*[st.booleans()] * 4)),
    )


@given(calls(), st.sampled_from(FLOATS))
def test_any_call(call: Call, dtype: torch.dtype) -> None:
    tensors, options = call.arguments(dtype)
    scores = call.batch * call.kv_heads * call.group * call.tokens * call.keys
    terms = {"d attn_mask": scores // tensors["attn_mask"].numel()} if call.mask == "add" else None
    found = results(lambda **x: actual(**x, **options), tensors)
    assert_agree(found, results(lambda **x: expected(**x, **options), to(torch.float64, tensors)), terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype) -> None:
    """One head: the forward splits its keys, the backward its key blocks."""
    for shape in [(1, 1, 1, 70, 2100, 16), (1, 3, 1, 300, 300, 16)]:
        tensors = heads(*shape, dtype=dtype)
        tensors["sinks"] = torch.randn(shape[1])
        tensors["attn_mask"] = torch.randn(1, 1, *shape[3:5])
        tensors["attn_mask"] = tensors["attn_mask"].to(dtype)
        assert_threads_change_nothing(lambda t=tensors: results(lambda **x: actual(**x, causal=True), t))


def test_threads_change_nothing_with_windows(isa: str) -> None:
    tensors = heads(1, 2, 1, 1500, 1500, 8, dtype=torch.float32)
    options = {"window": (100, 0), "sink_tokens": 4, "dropout_p": 0.2}

    def call() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return results(lambda **x: actual(**x, **options), tensors)

    assert_threads_change_nothing(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 20])
def test_strides_change_nothing(dtype: torch.dtype, size: int) -> None:
    tensors = heads(2, 4, 2, 70, 70, size, dtype=dtype)
    tensors["attn_mask"] = torch.randn(2, 4, 70, 70).to(dtype)
    assert_strides_change_nothing(
        lambda **x: actual(**x, causal=True), tensors, ["q", "k", "v", "attn_mask"]
    )


def test_strided_cotangents() -> None:
    tensors = heads(1, 2, 2, 40, 40, 16)
    leaves = [x.requires_grad_() for x in tensors.values()]
    out, lse = actual(*leaves)
    d_out = torch.randn(1, 2, 16, 40, dtype=torch.float64).transpose(2, 3)
    d_lse = torch.randn(1, 2, 1, dtype=torch.float64).expand(1, 2, 40)
    strided = torch.autograd.grad((out, lse), leaves, (d_out, d_lse), retain_graph=True)
    dense = torch.autograd.grad((out, lse), leaves, (d_out.contiguous(), d_lse.contiguous()))
    assert_same_bits(dict(enumerate(strided)), dict(enumerate(dense)))


def test_expanded_inputs() -> None:
    """Stride 0 over the batch, the heads or the tokens; the gradient sums."""
    small = {
        "q": torch.randn(1, 1, 50, 16, dtype=torch.float64),
        "k": torch.randn(1, 1, 1, 16, dtype=torch.float64),
        "v": torch.randn(1, 2, 50, 1, dtype=torch.float64),
    }

    def expand(function, copy: bool):
        def call(q: Tensor, k: Tensor, v: Tensor):
            full = q.expand(2, 4, 50, 16), k.expand(2, 2, 50, 16), v.expand(2, 2, 50, 24)
            return function(*(x.contiguous() if copy else x for x in full), causal=True)

        return call

    for function in (expand(actual, True), expand(expected, False)):
        assert_agree(results(expand(actual, False), small), results(function, small))


def test_output_lies_in_memory_as_the_queries_do() -> None:
    """(B, T, H, D) callers pass a transpose and get what transposes to a contiguous tensor."""
    tensors = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for name, x in heads(2, 4, 2, 30, 30, 16).items()
    }
    out = longspan.attention(**tensors)
    assert out.transpose(1, 2).is_contiguous()
    gradients = torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))
    assert all(g.transpose(1, 2).is_contiguous() for g in gradients)
    assert longspan.attention(*(x.detach().contiguous() for x in tensors.values())).is_contiguous()


def test_log_sum_exp_dtype_and_return() -> None:
    for dtype in DTYPES:
        out, lse = longspan.attention(**heads(1, 2, 1, 5, 6, 8, dtype=dtype), return_lse=True)
        assert (out.dtype, out.shape) == (dtype, (1, 2, 5, 8))
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert lse.shape == (1, 2, 5)
        assert isinstance(longspan.attention(**heads(1, 2, 1, 5, 6, 8, dtype=dtype)), Tensor)


@pytest.mark.parametrize("unused", ["q", "k", "v", "sinks", "attn_mask"])
def test_gradients_of_a_subset(unused: str) -> None:
    tensors = heads(1, 2, 1, 20, 20, 8)
    tensors |= {"sinks": torch.randn(2).double(), "attn_mask": torch.randn(20, 20).double()}
    whole = results(actual, tensors)

    def partly(**x: Tensor):
        return actual(**(x | {unused: x[unused].detach()}))

    leaves = {name: x.clone().requires_grad_(name != unused) for name, x in tensors.items()}
    out, lse = partly(**leaves)
    torch.autograd.backward((out, lse), (grid(*out.shape, seed=0), grid(*lse.shape, seed=1)))
    for name, x in leaves.items():
        if name == unused:
            assert x.grad is None
        else:
            assert_same_bits({name: x.grad}, {name: whole[f"d {name}"]})
