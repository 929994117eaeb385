"""`longspan.block_sparse_attention` computes what dense attention under the same mask computes."""

from typing import Any

import pytest
import torch
from attention_oracle import expected, heads, plain
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_same_bits,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    far_apart,
    lengths_with_head_sizes,
    results,
    to,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import longspan
from longspan import _C, patterns
from longspan.patterns import BlockMask

FLOATS = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


def some(*shape: int, share: float = 0.5, seed: int = 5) -> Tensor:
    """Random bools."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def blocks(heads: int, rows: int, columns: int, share: float) -> BlockMask:
    """Whole blocks of 64 at random."""
    return BlockMask.from_layout(some(heads, rows, columns, share=share), 64, rows * 64, columns * 64)


# For 4 heads and a batch of 2.
MASKS = {
    "window": patterns.sliding_window(333, window=(70, 0)),
    "window of 128-blocks": patterns.sliding_window(333, window=(70, 5), block_size=128),
    "dilated": patterns.dilated_window(333, window=(9, 9), dilation=7),
    "longformer": patterns.longformer(333, window=64, global_tokens=[0, 200]),
    "longformer, causal": patterns.longformer(333, window=64, global_tokens=[0, 99], causal=True),
    "bigbird": patterns.bigbird(660, heads=4, num_random_blocks=2),
    "bigbird, small blocks": patterns.bigbird(333, block_size=24, heads=4),
    "bigbird, extended": patterns.bigbird(333, block_size=40, heads=4, extra_tokens=11),
    "strided": patterns.sparse_transformer(333, stride=18),
    "fixed, by head": patterns.sparse_transformer(
        333, stride=90, mode="fixed", heads=["local", "summary", "summary", "local"]
    ),
    "everything": patterns.sliding_window(200),
    "nothing": BlockMask.from_dense(torch.zeros(100, 70, dtype=torch.bool)),
    "random": BlockMask.from_dense(some(150, 210)),
    "random, blocks 128 x 16": BlockMask.from_dense(some(150, 210, share=0.02), (128, 16)),
    "random, blocks 64 x 240": BlockMask.from_dense(some(150, 500, share=0.02), (64, 240)),
    "random, by head": BlockMask.from_dense(some(4, 150, 210, share=0.01)),
    "random, by batch": BlockMask.from_dense(some(2, 1, 150, 210, share=0.01)),
    "random, by both": BlockMask.from_dense(some(2, 4, 210, 150, share=0.01)),
    "whole blocks": blocks(4, 5, 9, 0.3),
}


def dense_of(mask: BlockMask) -> Tensor:
    dense = mask.to_dense()
    return dense if dense.dim() == 4 else dense[None]


def actual(mask: BlockMask, **options: Any):
    return lambda q, k, v: longspan.block_sparse_attention(q, k, v, mask, return_lse=True, **options)


def oracle(mask: BlockMask, **options: Any):
    return lambda q, k, v: expected(q, k, v, dense_of(mask), **options)


def inputs(mask: BlockMask, size: int = 24, value_size: int = 16, **kw: Any) -> dict[str, Tensor]:
    return heads(2, 4, 2, *mask.shape, size, value_size, **kw)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", MASKS)
def test_masks(isa: str, name: str, dtype: torch.dtype) -> None:
    tensors = inputs(MASKS[name], dtype=dtype)
    assert_agree(
        results(actual(MASKS[name]), tensors), results(oracle(MASKS[name]), to(torch.float64, tensors))
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MASKS)
def test_half_precision_error(name: str, dtype: torch.dtype) -> None:
    mask = MASKS[name]
    if not dense_of(mask).any(-1).all():
        mask = mask | BlockMask.from_dense(
            torch.ones(mask.shape, dtype=torch.bool).tril(), mask.block_size
        )
    assert_error_ratio(
        lambda q, k, v: longspan.block_sparse_attention(q, k, v, mask),
        lambda q, k, v: plain(q, k, v, torch.where(dense_of(mask), 0.0, -torch.inf)),
        inputs(mask),
        dtype,
    )


@pytest.mark.parametrize("channels", [(64, 64), (15, 64), (64, 7)])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_error_on_every_level(
    isa: str, dtype: torch.dtype, channels: tuple[int, int]
) -> None:
    mask = MASKS["longformer"]
    assert_error_ratio(
        lambda q, k, v: longspan.block_sparse_attention(q, k, v, mask, softcap=5.0),
        lambda q, k, v: plain(q, k, v, torch.where(dense_of(mask), 0.0, -torch.inf), softcap=5.0),
        inputs(mask, *channels),
        dtype,
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("length", "size"), lengths_with_head_sizes())
def test_lengths_and_head_sizes(length: int, size: int, dtype: torch.dtype) -> None:
    mask = patterns.longformer(length, window=100, global_tokens=[length // 2])
    tensors = heads(1, 2, 1, length, length, size, dtype=dtype)
    assert_agree(results(actual(mask), tensors), results(oracle(mask), to(torch.float64, tensors)))


OPTIONS = {
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0])},
    "all, alibi per sequence": {
        "alibi_slopes": torch.tensor([[0.5, 0.1, 0.02, 0.0], [0.0, 0.01, 0.3, 0.2]]),
        "softcap": 3.0,
        "scale": 0.2,
    },
}


@pytest.mark.parametrize("mask", ["longformer", "random, by both"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(isa: str, name: str, mask: str) -> None:
    tensors = inputs(MASKS[mask], dtype=torch.float32)
    assert_agree(
        results(actual(MASKS[mask], **OPTIONS[name]), tensors),
        results(oracle(MASKS[mask], **OPTIONS[name]), to(torch.float64, tensors)),
    )


def test_a_window_is_attention_with_a_window() -> None:
    mask = patterns.sliding_window(500, window=(100, 20))
    tensors = heads(1, 4, 2, 500, 500, 16)
    assert_agree(
        results(actual(mask), tensors),
        results(lambda **x: longspan.attention(**x, window=(100, 20), return_lse=True), tensors),
    )


def test_rows_without_keys_are_zero() -> None:
    """Output 0, log-sum-exp -infinity, and no gradient: exactly."""
    dense = some(200, 300)
    dense[3] = dense[64:130] = False
    dense[:, 7] = dense[:, 128:192] = False
    mask = BlockMask.from_dense(dense)
    found = results(actual(mask), heads(1, 2, 1, *mask.shape, 16))
    queries, keys = dense.any(1), dense.any(0)
    assert (found["out"][:, :, ~queries] == 0).all()
    assert (found["out 1"][:, :, ~queries] == -torch.inf).all()
    assert (found["d q"][:, :, ~queries] == 0).all()
    assert (found["d k"][:, :, ~keys] == 0).all()
    assert (found["d v"][:, :, ~keys] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_seen_has_no_effect(where: str, bad: float) -> None:
    """One query and one key that do not see each other, but others of their blocks do."""
    dense = some(150, 210, share=0.7)
    at = 70
    if where == "q":
        dense[at, ::2] = False
    else:
        dense[::2, at] = False
    mask = BlockMask.from_dense(dense)
    tensors = heads(1, 2, 1, *mask.shape, 16)
    clean = results(actual(mask), tensors)
    tensors[where][:, :, at] = bad
    found = results(actual(mask), tensors)
    if where == "q":
        queries, keys = torch.arange(150) != at, ~dense[at]
        unaffected = {"out": queries, "d q": queries, "d k": keys, "d v": keys}
    else:  # queries that see the key bring it into the gradients of all keys that they see
        unaffected = {"out": ~dense[:, at], "d q": ~dense[:, at]}
    for name, rows in unaffected.items():
        assert rows.sum() > 20
        assert torch.equal(found[name][:, :, rows], clean[name][:, :, rows]), name


@st.composite
def dense_masks(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int]]:
    """Noise, stripes and rectangles in any place, of heads and a batch or shared."""
    batch, h = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 4]))
    tokens, keys = draw(st.integers(1, 200)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([0.0, 0.001, 0.3, 0.999, 1.0]))
    dense = torch.rand(batch, h, tokens, keys, generator=generator) < share
    for _ in range(draw(st.integers(0, 4))):
        q, k = draw(st.integers(0, tokens - 1)), draw(st.integers(0, keys - 1))
        part = dense[:, draw(st.integers(0, h - 1)), q : q + draw(st.integers(1, 100))]
        part[..., k : k + draw(st.integers(1, 200))] = draw(st.booleans())
    size = draw(st.sampled_from([(64, 64), (64, 16), (128, 48), (192, 128)]))
    return dense, size


@given(dense_masks(), st.sampled_from(FLOATS))
def test_any_mask(case: tuple[Tensor, tuple[int, int]], dtype: torch.dtype) -> None:
    mask = BlockMask.from_dense(case[0], case[1])
    assert torch.equal(dense_of(mask), case[0])
    tensors = inputs(mask, 8, 5, dtype=dtype)
    assert_agree(results(actual(mask), tensors), results(oracle(mask), to(torch.float64, tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bigbird", "random, by both", "longformer"])
def test_threads_change_nothing(isa: str, name: str, dtype: torch.dtype) -> None:
    tensors = inputs(MASKS[name], dtype=dtype)
    assert_threads_change_nothing(lambda: results(actual(MASKS[name]), tensors))


def test_threads_change_nothing_where_keys_are_split() -> None:
    mask = patterns.longformer(70, window=20) & patterns.sliding_window(70)
    wide = BlockMask.from_dense(some(70, 2600))
    for m in (mask, wide):
        tensors = heads(1, 1, 1, *m.shape, 16, dtype=torch.float32)
        assert_agree(results(actual(m), tensors), results(oracle(m), to(torch.float64, tensors)))
        assert_threads_change_nothing(lambda m=m, t=tensors: results(actual(m), t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_nothing(dtype: torch.dtype) -> None:
    mask = patterns.longformer(130, window=20, global_tokens=[5])
    tensors = heads(2, 4, 2, 130, 130, 20, dtype=dtype)
    assert_strides_change_nothing(actual(mask), tensors, ["q", "k", "v"])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["longformer", "random, by both", "random, blocks 64 x 240"])
def test_dropout_drops_what_the_reference_drops(isa: str, name: str, dtype: torch.dtype) -> None:
    mask, tensors = MASKS[name], inputs(MASKS[name], dtype=dtype)

    def ours(**x: Tensor):
        torch.manual_seed(42)
        return actual(mask, dropout_p=0.3)(**x)

    torch.manual_seed(42)
    seed = torch.randint(2**62, (1,))  # what the operator draws
    want = oracle(mask, dropout_p=0.3, dropout_seed=seed)
    assert_agree(results(ours, tensors), results(want, to(torch.float64, tensors)))


def test_dropout_is_attention_s() -> None:
    """The same weights fall, so a window by blocks is the window of `longspan.attention` still."""
    tensors = heads(2, 4, 2, 300, 300, 24)
    found = []
    for call in (
        actual(patterns.sliding_window(300, window=(70, 20)), dropout_p=0.4),
        lambda q, k, v: longspan.attention(q, k, v, window=(70, 20), dropout_p=0.4, return_lse=True),
    ):
        torch.manual_seed(3)
        found.append(results(call, tensors))
    assert_agree(*found)


def test_gradcheck() -> None:
    mask = BlockMask.from_dense(some(1, 2, 3, 5))

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = actual(mask, softcap=1.5)(q, k, v)
        return out, torch.where(lse == -torch.inf, 0, lse)

    assert gradcheck(call, [x.requires_grad_() for x in heads(1, 2, 1, 3, 5, 3, 2).values()])


def test_no_second_derivative() -> None:
    q, k, v = (x.requires_grad_() for x in heads(1, 2, 1, 70, 70, 8).values())
    out = longspan.block_sparse_attention(q, k, v, patterns.sliding_window(70, window=(9, 0)))
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    assert_raises(RuntimeError, ["second derivative"], lambda: gradient.sum().backward())


def operator_arguments(mask: BlockMask, requires_grad: bool) -> tuple[Any, ...]:
    tensors = [x.float().requires_grad_(requires_grad) for x in inputs(mask).values()]
    return (
        *tensors, mask.row_begins, mask.columns, mask.row_patterns, mask.column_begins, mask.rows,
        mask.column_patterns, mask.bits, torch.rand(4), torch.tensor([7]), mask.batch, mask.heads,
        0.25, 2.0, 0.3,
    )  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    arguments = operator_arguments(MASKS["random, by both"], requires_grad)
    opcheck(torch.ops.longspan.block_sparse_attention_forward.default, arguments)
    if not requires_grad:
        out, lse = torch.ops.longspan.block_sparse_attention_forward(*arguments)
        opcheck(
            torch.ops.longspan.block_sparse_attention_backward.default,
            (torch.randn_like(out), torch.randn_like(lse), *arguments[:3], out, lse, *arguments[3:]),
        )


def test_compiles_whole(fresh_compiler: None) -> None:
    mask = MASKS["longformer"]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return longspan.block_sparse_attention(q * 2, k, v, mask).sin()

    tensors = inputs(mask)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_agree(results(compiled, tensors), results(call, tensors))


def test_exports() -> None:
    mask = MASKS["bigbird"]

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return longspan.block_sparse_attention(q, k, v, mask)

    arguments = tuple(inputs(mask).values())
    found = torch.export.export(Module(), arguments).module()(*arguments)
    assert_same_bits({"out": found}, {"out": Module()(*arguments)})


def test_checkpoint_and_autocast_and_vmap() -> None:
    mask = MASKS["longformer"]
    tensors = {n: x.float() for n, x in inputs(mask).items()}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return longspan.block_sparse_attention(q, k, v, mask)

    again = results(lambda **x: checkpoint(call, *x.values(), use_reentrant=False), tensors)
    assert_same_bits(again, results(call, tensors))
    with torch.autocast("cpu", torch.bfloat16):
        out = call(**tensors)
    assert_same_bits({"out": out}, {"out": call(**to(torch.bfloat16, tensors))})
    stacked = [torch.stack([x, -x]) for x in tensors.values()]
    found = torch.func.vmap(call)(*stacked)
    loop = torch.stack([call(*row) for row in zip(*stacked)])
    assert_agree({"out": found}, {"out": loop})


def test_other_devices_take_the_reference() -> None:
    out = longspan.block_sparse_attention(
        *(x.to("meta") for x in inputs(MASKS["window"]).values()), MASKS["window"]
    )
    assert (out.shape, out.device.type) == ((2, 4, 333, 16), "meta")
    tensors, mask = inputs(MASKS["random, by both"]), MASKS["random, by both"]
    found = longspan.reference.block_sparse.block_sparse_attention(
        **tensors, mask=mask.to_dense(), scale=24**-0.5, softcap=2.0
    )
    want = actual(mask, softcap=2.0)(**tensors)
    assert_agree(dict(enumerate(found)), dict(enumerate(want)))


def test_scratch_is_linear_in_the_length() -> None:
    def peak(tokens: int) -> int:
        mask = patterns.longformer(tokens, window=128, global_tokens=[0])
        leaves = [x.requires_grad_() for x in heads(1, 2, 1, tokens, tokens, 8).values()]
        _C.scratch_reset_peak()
        before = _C.scratch_peak()
        longspan.block_sparse_attention(*leaves, mask).sum().backward()
        return _C.scratch_peak() - before

    a, b, c = (peak(n) for n in (2048, 5120, 8192))
    assert c > 0
    assert c - b <= 1.1 * (b - a)


def test_more_elements_than_32_bits_count() -> None:
    far = far_apart(2, 150, 16)
    near = far.contiguous()
    mask = patterns.longformer(150, window=32, global_tokens=[7])
    outputs = []
    for x in (far, near):
        x = x.detach().requires_grad_()
        out = longspan.block_sparse_attention(x, x, x, mask)
        outputs.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert_same_bits(*({"out": out, "grad": grad} for out, grad in outputs))


def test_empty_tensors() -> None:
    for batch, tokens, keys in ((0, 70, 70), (2, 0, 70), (2, 70, 0), (1, 0, 0)):
        mask = BlockMask.from_dense(torch.ones(tokens, keys, dtype=torch.bool))
        found = results(actual(mask), heads(batch, 4, 2, tokens, keys, 8))
        assert (found["out"] == 0).all()
        assert (found["out 1"] == -torch.inf).all()


def attend(mask: Any = None, **change: Any):
    tensors = heads(2, 4, 2, 100, 100, 8)
    return lambda: longspan.block_sparse_attention(
        **tensors, block_mask=patterns.sliding_window(100) if mask is None else mask, **change
    )


@pytest.mark.parametrize(
    ("kind", "parts", "call"),
    [
        (TypeError, ["block_mask", "BlockMask", "Tensor"], attend(torch.ones(100, 100))),
        (ValueError, ["block_mask", "100", "(99, 99)"], attend(patterns.sliding_window(99))),
        (
            ValueError,
            ["block_mask", "heads of 4", "3"],
            attend(BlockMask.from_dense(some(3, 100, 100))),
        ),
        (
            ValueError,
            ["block_mask", "batch of 2", "5"],
            attend(BlockMask.from_dense(some(5, 1, 100, 100))),
        ),
        (ValueError, ["softcap", "-1"], attend(softcap=-1.0)),
        (ValueError, ["dropout_p", "1.5"], attend(dropout_p=1.5)),
        (ValueError, ["alibi_slopes", "(3,)"], attend(alibi_slopes=torch.rand(3))),
        (TypeError, ["alibi_slopes", "int"], attend(alibi_slopes=torch.ones(4, dtype=torch.int64))),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], call) -> None:
    assert_raises(kind, parts, call)


@pytest.mark.parametrize("which", range(3, 10))
def test_a_direct_call_with_bad_lists_raises(which: int) -> None:
    """Lists of another mask, or that leave the blocks, never reach the kernels."""
    arguments = list(operator_arguments(MASKS["random, by both"], False))
    x = arguments[which]
    arguments[which] = x[:-1] if which < 9 else x[:1]
    call = torch.ops.longspan.block_sparse_attention_forward
    assert_raises(RuntimeError, ["block_sparse_attention"], lambda: call(*arguments))
    if which < 9:
        arguments[which] = x + 1000
        assert_raises(RuntimeError, ["block_sparse_attention"], lambda: call(*arguments))
