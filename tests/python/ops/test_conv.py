"""`longspan.causal_conv1d` and its update compute what the reference computes in double."""

from typing import Any

import pytest
import torch
from checks import (
    DTYPES,
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_same_bits,
    assert_threads_change_nothing,
    greatest_error,
    results,
    to,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import longspan
from longspan.reference import conv as reference

FLOATS = (torch.float32, torch.float64)


def tensors(
    batch: int = 2,
    channels: int = 5,
    length: int = 37,
    width: int = 4,
    *,
    bias: bool = True,
    initial: bool = True,
) -> dict[str, Tensor]:
    shapes = {"x": (batch, channels, length), "weight": (channels, width)}
    if bias:
        shapes["bias"] = (channels,)
    if initial:
        shapes["initial_state"] = (batch, channels, width - 1)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def sequences(batch: int, length: int) -> Tensor:
    return torch.randint(0, 2, (batch, length)).mul(torch.rand(batch, length) < 0.2).cumsum(1)


def actual(x: Tensor, weight: Tensor, bias: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    return longspan.causal_conv1d(x, weight, bias, return_final_state=True, **options)


def channels_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def laid_out(function: Any, layout: Any, **options: Any) -> Any:
    return lambda x, weight, bias=None, **kw: function(layout(x), weight, bias, **kw, **options)


LAYOUTS = {"channels first": lambda x: x, "channels last": channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_widths_and_lengths(isa: str, layout: str, activation: str | None, dtype: torch.dtype) -> None:
    shapes = [(1, 1, 1, 1), (2, 5, 37, 1), (1, 3, 2, 7), (2, 20, 65, 2), (1, 130, 129, 3),
              (2, 17, 66, 4), (1, 2, 40, 64), (1, 4, 1000, 5)]  # fmt: skip
    for shape in shapes:
        for bias, initial in ((True, True), (False, False)):
            given = tensors(*shape, bias=bias, initial=initial)
            ours = laid_out(actual, LAYOUTS[layout], activation=activation)
            theirs = laid_out(reference.causal_conv1d, LAYOUTS[layout], activation=activation)
            assert_agree(
                results(ours, to(dtype, given)),
                results(theirs, given),
                {"d bias": 1000, "d weight": 1000},
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [3, 4])
def test_more_than_one_block_of_time(layout: str, width: int) -> None:
    given = tensors(2, 3, 4500, width)
    ours = laid_out(actual, LAYOUTS[layout], activation="silu")
    theirs = laid_out(reference.causal_conv1d, LAYOUTS[layout], activation="silu")
    assert_agree(results(ours, given), results(theirs, given), {"d bias": 9000, "d weight": 9000})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_sequences_do_not_mix(isa: str, layout: str, index_dtype: torch.dtype) -> None:
    given = tensors(2, 19, 300, 4) | {"seq_idx": sequences(2, 300).to(index_dtype)}
    for dtype in FLOATS:
        ours = laid_out(actual, LAYOUTS[layout], activation="silu")
        theirs = laid_out(reference.causal_conv1d, LAYOUTS[layout], activation="silu")
        assert_agree(
            results(ours, to(dtype, given)), results(theirs, given), {"d bias": 600, "d weight": 600}
        )


def test_packed_sequences_equal_their_own_calls() -> None:
    given = tensors(1, 6, 50, 4, initial=False)
    x, weight, bias = given["x"], given["weight"], given["bias"]
    index = torch.tensor([0] * 2 + [1] * 30 + [2] * 18)[None]
    whole, state = actual(x, weight, bias, seq_idx=index)
    x[:, :, :32] = torch.nan  # nothing of the others reaches the last one
    parts = [longspan.causal_conv1d(part, weight, bias) for part in x.split([2, 30, 18], dim=2)]
    assert torch.equal(whole[:, :, 32:], parts[2])
    assert torch.equal(actual(x, weight, bias, seq_idx=index)[0][:, :, 32:], parts[2])
    assert torch.equal(state, x[:, :, -3:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(isa: str, layout: str, dtype: torch.dtype) -> None:
    def plain(x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        padded = torch.cat([initial_state, x], dim=2)
        taps = padded.unfold(2, weight.shape[1], 1)
        out = (taps * weight[:, None]).sum(-1) + bias[:, None]
        return torch.nn.functional.silu(out), padded[:, :, x.shape[2] :]

    ours = laid_out(actual, LAYOUTS[layout], activation="silu")
    assert_error_ratio(ours, plain, tensors(2, 33, 200, 4), dtype)


def test_float32_parameters_beside_bfloat16() -> None:
    given = to(torch.bfloat16, tensors(1, 8, 50, 4, initial=False))
    mixed = given | {"weight": given["weight"].float(), "bias": given["bias"].float()}
    out = longspan.causal_conv1d(**mixed)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, longspan.causal_conv1d(**given))
    found = results(longspan.causal_conv1d, mixed)
    assert found["d weight"].dtype == torch.float32
    assert found["d x"].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_kept_and_nothing_is_copied(layout: str) -> None:
    wide = torch.randn(2, 70, 90).as_strided(
        (2, 30, 40), (70 * 90, 90, 1) if layout == "channels first" else (6300, 1, 90)
    )
    out = longspan.causal_conv1d(wide, torch.randn(30, 4))
    assert out.stride() == ((1200, 40, 1) if layout == "channels first" else (1200, 1, 30))
    neither = torch.randn(2, 30, 80)[:, :, ::2].transpose(0, 1).contiguous().transpose(0, 1)[:, :, ::2]
    given = {"x": neither, "weight": torch.randn(30, 4)}
    assert_agree(results(actual, given), results(reference.causal_conv1d, to(torch.float64, given)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [0, 1, 2])
def test_fewer_tokens_than_taps(layout: str, length: int) -> None:
    given = tensors(2, 3, length, 5)
    ours = laid_out(actual, LAYOUTS[layout])
    assert_agree(results(ours, given), results(reference.causal_conv1d, given))


@given(data=st.data())
def test_any_split_with_states_equals_one_call(data: st.DataObject) -> None:
    width, length = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 80))
    layout = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    silu = data.draw(st.sampled_from([None, "silu"]))
    given = tensors(1, 3, length, width)
    x, weight, bias, state = given.values()
    whole = actual(layout(x), weight, bias, initial_state=state, activation=silu)
    outs = []
    for begin, end in zip([0, *cuts], [*cuts, length]):
        out, state = actual(
            layout(x[:, :, begin:end]), weight, bias, initial_state=state, activation=silu
        )
        outs.append(out)
    assert greatest_error(torch.cat(outs, dim=2), whole[0]) < 1e-14
    assert torch.equal(state, whole[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "swish"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(layout: str, activation: str | None, packed: bool) -> None:
    names, leaves = zip(*((k, v.requires_grad_()) for k, v in tensors(2, 3, 9, 3).items()))
    options = {"seq_idx": torch.tensor([[0] * 4 + [1] * 5, [3] * 8 + [4]])} if packed else {}
    ours = laid_out(actual, LAYOUTS[layout], activation=activation, **options)
    assert torch.autograd.gradcheck(lambda *args: ours(**dict(zip(names, args))), leaves)


def test_only_the_final_state_has_a_gradient() -> None:
    given = tensors(1, 3, 9, 4)
    x = given["x"].requires_grad_()
    actual(x, given["weight"])[1].sum().backward()
    assert torch.equal(x.grad, torch.cat([torch.zeros(1, 3, 6), torch.ones(1, 3, 3)], dim=2).double())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_thread_counts_change_nothing(layout: str) -> None:
    given = to(torch.float32, tensors(2, 70, 2300, 4)) | {"seq_idx": sequences(2, 2300)}
    ours = laid_out(actual, LAYOUTS[layout], activation="silu")
    assert_threads_change_nothing(lambda: results(ours, given))
    del given["seq_idx"]
    assert_threads_change_nothing(lambda: results(ours, given))


def test_extreme_values() -> None:
    x = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, torch.inf])[None, None]
    out = longspan.causal_conv1d(x, torch.ones(1, 1), activation="silu")
    assert torch.equal(out[0, 0, 3:], x[0, 0, 3:])
    assert out[0, 0, :3].abs().max() < 1e-35


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [3, 4, 9])
def test_update(isa: str, ring: bool, dtype: torch.dtype, slots: int) -> None:
    """Step by step, of one and of several tokens, with rows in any order and padding."""
    batch, channels, width = 3, 37, 4
    state = torch.randn(5, channels, slots).to(dtype)
    for layout in (lambda x: x, channels_last):
        ours, theirs = layout(state.clone()), state.clone()
        written = torch.tensor([0, 5, 11]) if ring else None
        rows = torch.tensor([4, -1, 0], dtype=torch.int32)
        weight, bias = torch.randn(channels, width).to(dtype), torch.randn(channels).to(dtype)
        for length in (1, 1, 2, 12):
            x = torch.randn(batch, channels, length).to(dtype)
            options = {"activation": "silu", "cache_seqlens": written, "conv_state_indices": rows}
            got = longspan.causal_conv1d_update(layout(x), ours, weight, bias, **options)
            want = reference.causal_conv1d_update(x, theirs, weight, bias, **options)
            assert greatest_error(got, want) <= 4 * torch.finfo(dtype).eps * max(
                1.0, float(want.abs().max())
            )
            assert torch.equal(got[1], torch.zeros_like(got[1]))
            assert torch.equal(ours, theirs)
            written = None if written is None else written + length


def test_decoding_equals_the_whole() -> None:
    given = tensors(2, 5, 20, 4, initial=False)
    whole = longspan.causal_conv1d(**given, activation="silu")
    for ring in (False, True):
        state = torch.zeros(2, 5, 4, dtype=torch.float64)
        for t in range(20):
            seen = torch.full((2,), t) if ring else None
            out = longspan.causal_conv1d_update(
                given["x"][:, :, t],
                state,
                given["weight"],
                given["bias"],
                activation="silu",
                cache_seqlens=seen,
            )
            assert greatest_error(out, whole[:, :, t]) < 1e-14


def test_opcheck() -> None:
    given = to(torch.float32, tensors(2, 5, 37, 4))
    ops = torch.ops.longspan
    for layout in LAYOUTS.values():
        for wanted in (True, False):
            leaves = [v.detach().clone().requires_grad_(wanted) for v in given.values()]
            x, weight, bias, state = leaves
            torch.library.opcheck(
                ops.causal_conv1d_forward, (layout(x), weight, bias, state, None, True, True)
            )
            torch.library.opcheck(
                ops.causal_conv1d_forward, (layout(x), weight, None, None, None, False, False)
            )
        x = layout(given["x"])
        torch.library.opcheck(
            ops.causal_conv1d_backward, (x, None, x, given["weight"], given["bias"], None, None, True)
        )
        state = torch.randn(2, 5, 6)
        torch.library.opcheck(
            ops.causal_conv1d_update, (x, state, given["weight"], None, torch.tensor([1, 2]), None, True)
        )


def test_compile_and_export(fresh_compiler: None) -> None:
    given = to(torch.float32, tensors(2, 5, 37, 4))

    def call(**kw: Tensor) -> tuple[Tensor, Tensor]:
        out, state = actual(**kw, activation="silu")
        return out * 2, state

    compiled = torch.compile(call, fullgraph=True)
    assert_agree(results(compiled, given), results(call, given))

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return longspan.causal_conv1d(x, weight)

    x, weight = given["x"], given["weight"]
    program = torch.export.export(
        Module(), (x, weight), dynamic_shapes=({2: torch.export.Dim("length")}, {})
    )
    longer = torch.randn(2, 5, 61)
    assert torch.equal(program.module()(longer, weight), longspan.causal_conv1d(longer, weight))


def test_autocast_casts_the_input_alone() -> None:
    given = to(torch.float32, tensors(1, 8, 50, 4))
    with torch.autocast("cpu", torch.bfloat16):
        out, state = actual(**given)
    assert out.dtype == state.dtype == torch.bfloat16
    rounded = given | {name: given[name].bfloat16() for name in ("x", "initial_state")}
    assert_same_bits({"out": out}, {"out": actual(**rounded)[0]})


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.randn(2, 3, 10), torch.randn(3, 4)
    conv, update = longspan.causal_conv1d, longspan.causal_conv1d_update
    assert_raises(TypeError, ["x", "tensor", "list"], lambda: conv([1], weight))
    assert_raises(TypeError, ["x", "int64"], lambda: conv(x.long(), weight))
    assert_raises(ValueError, ["x", "(batch, channels, length)", "(3, 10)"], lambda: conv(x[0], weight))
    assert_raises(ValueError, ["weight", "(3, any)", "(3, 1, 4)"], lambda: conv(x, weight[:, None]))
    assert_raises(ValueError, ["weight", "at least 1"], lambda: conv(x, weight[:, :0]))
    assert_raises(TypeError, ["weight", "float32", "float64"], lambda: conv(x, weight.double()))
    assert_raises(ValueError, ["bias", "(3)", "(4,)"], lambda: conv(x, weight, torch.randn(4)))
    assert_raises(ValueError, ["activation", "relu"], lambda: conv(x, weight, activation="relu"))
    assert_raises(
        ValueError,
        ["initial_state", "(2, 3, 3)", "(2, 3, 4)"],
        lambda: conv(x, weight, initial_state=torch.zeros(2, 3, 4)),
    )
    assert_raises(
        TypeError,
        ["seq_idx", "int32 or int64", "float32"],
        lambda: conv(x, weight, seq_idx=torch.zeros(2, 10)),
    )
    state = torch.zeros(2, 3, 3)
    assert_raises(
        ValueError, ["conv_state", "at least 3", "2"], lambda: update(x, state[:, :, :2], weight)
    )
    assert_raises(
        RuntimeError, ["conv_state_indices[1]", "2"],
        lambda: update(x, state, weight, conv_state_indices=torch.tensor([0, 2])),
    )  # fmt: skip
    assert_raises(
        RuntimeError, ["cache_seqlens[0]", "-1"],
        lambda: update(x, state, weight, cache_seqlens=torch.tensor([-1, 2])),
    )  # fmt: skip
    assert_raises(RuntimeError, ["no gradient"], lambda: update(x, state, weight.requires_grad_()))
    out = conv(x, weight).sum()
    (once,) = torch.autograd.grad(out, weight, create_graph=True)
    assert_raises(RuntimeError, ["second derivative"], lambda: once.sum().backward())
