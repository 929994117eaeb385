"""`longspan.ssd` computes what the recurrence computes in double, with every option."""

import math
from typing import Any

import pytest
import torch
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    greatest_error,
    grid,
    results,
    to,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import longspan
from longspan.reference import ssd as reference

FLOATS = (torch.float32, torch.float64)
OPTIONAL = ("D", "z", "dt_bias", "initial_states")


def tensors(
    batch: int = 2,
    length: int = 70,
    heads: int = 4,
    groups: int = 2,
    channels: int = 8,
    states: int = 16,
    *,
    only: tuple[str, ...] = OPTIONAL,
    sequences: int | None = None,
) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    made = {
        "x": normal(batch, length, heads, channels),
        "dt": normal(batch, length, heads),
        "A": -2 * torch.rand(heads, dtype=torch.float64),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states) / states**0.5,
    }
    optional = {
        "D": normal(heads),
        "z": normal(batch, length, heads, channels),
        "dt_bias": normal(heads) - 1,
        "initial_states": normal(batch if sequences is None else sequences, heads, channels, states),
    }
    return made | {name: optional[name] for name in OPTIONAL if name in only}


def actual(**kw: Any) -> tuple[Tensor, ...]:
    kw = {"dt_softplus": True, "return_final_states": True} | kw
    return longspan.ssd(**kw)


def expected(return_varlen_states: bool = False, **kw: Any) -> tuple[Tensor, ...]:
    kw = {"dt_softplus": True} | kw
    out, final, varlen = reference.ssd(**kw)
    return (out, final, varlen) if return_varlen_states else (out, final)


def terms(given: dict[str, Tensor]) -> dict[str, int]:
    """Gradients that are sums over many tokens, and of how many terms of size 1."""
    batch, length, _, channels = given["x"].shape
    every = batch * length * channels
    return {
        "out": 16,
        "out 1": 16,
        "d A": 16 * every,
        "d B": channels * length,
        "d C": channels * length,
        "d D": every,
        "d dt": 4 * channels,
        "d dt_bias": 16 * every,
        "d x": length,
    }


def compare(given: dict[str, Tensor], dtype: torch.dtype = torch.float64, **options: Any) -> None:
    given = to(dtype, given)
    ours = results(lambda **kw: actual(**kw, **options), given)
    options.pop("chunk_size", None)
    theirs = results(lambda **kw: expected(**kw, **options), to(torch.float64, given))
    assert_agree(ours, theirs, terms(given))


@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes(isa: str, dtype: torch.dtype) -> None:
    for shape in [(1, 1, 1, 1, 1, 1), (2, 2, 2, 1, 3, 5), (1, 15, 3, 3, 8, 16), (1, 63, 2, 1, 40, 20),
                  (2, 65, 4, 2, 16, 17), (1, 129, 2, 1, 64, 128), (1, 300, 2, 1, 17, 33)]:  # fmt: skip
        compare(tensors(*shape), dtype)
        compare(tensors(*shape, only=()), dtype)


@pytest.mark.parametrize("name", OPTIONAL)
def test_every_option_alone(name: str) -> None:
    compare(tensors(only=(name,)))


@pytest.mark.parametrize(
    "options",
    [{"dt_softplus": False}, {"dt_limit": (0.3, 0.9)}, {"dt_softplus": False, "dt_limit": (-0.5, 0.5)}],
    ids=str,
)
def test_steps(options: dict[str, Any]) -> None:
    compare(tensors(), **options)


def test_skip_of_every_channel() -> None:
    given = tensors()
    given["D"] = torch.randn(4, 8, dtype=torch.float64)
    compare(given)


@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128, 256])
def test_chunks_and_spans(heads: int, chunk_size: int) -> None:
    """Few heads are split over time, many are not; neither shows, nor does the chunk."""
    compare(tensors(1, 530, heads, 1, 5, 7), chunk_size=chunk_size)


def index_of(batch: int, length: int) -> Tensor:
    return (torch.rand(batch, length) < 0.1).cumsum(1).int()


@pytest.mark.parametrize(("length", "heads"), [(40, 2), (600, 2), (300, 16)])
def test_seq_idx(length: int, heads: int) -> None:
    given = tensors(2, length, heads, 1, 3, 5) | {"seq_idx": index_of(2, length)}
    compare(given)
    given["seq_idx"] = torch.arange(length).expand(2, length)  # a reset at every token
    compare(given)


@pytest.mark.parametrize("bounds", [[0, 70], [0, 0, 30, 30, 31, 70, 70], [0, 300, 560]], ids=str)
@pytest.mark.parametrize("heads", [2, 16])
def test_packed_sequences(bounds: list[int], heads: int) -> None:
    given = tensors(1, bounds[-1], heads, 1, 3, 5, sequences=len(bounds) - 1)
    packed = given | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    compare(packed, return_varlen_states=True)
    del packed["initial_states"]
    if bounds[-1] > bounds[-2]:  # else the final state is a constant
        compare(packed, return_varlen_states=True)
        compare(packed | {"seq_idx": index_of(1, bounds[-1])}, return_varlen_states=True)


def test_no_tokens() -> None:
    given = tensors(1, 0, 2, 1, 3, 5, sequences=2)
    found = results(
        lambda **kw: actual(**kw, return_varlen_states=True),
        given | {"cu_seqlens": torch.tensor([0, 0, 0])},
    )
    assert found["out"].shape == (1, 0, 2, 3)
    assert torch.equal(found["out 1"], given["initial_states"][1:])
    assert torch.equal(found["out 2"], given["initial_states"])
    want = grid(2, 2, 3, 5, seed=2)
    want[1] += grid(1, 2, 3, 5, seed=1)[0]
    assert torch.equal(found["d initial_states"], want)
    for name in ("A", "D", "dt_bias"):
        assert torch.equal(found[f"d {name}"], torch.zeros(2).double()), name
    assert torch.equal(actual(**tensors(2, 0, only=()))[1], torch.zeros(2, 4, 8, 16).double())


def test_a_packed_sequence_equals_its_own_call_and_sees_no_other() -> None:
    given = tensors(1, 500, 16, 2, 8, 16, only=("D", "z", "dt_bias"))
    cu = torch.tensor([0, 100, 450, 500])
    whole = results(lambda **kw: longspan.ssd(**kw, cu_seqlens=cu), given)
    for begin, end in ((0, 100), (100, 450), (450, 500)):
        part = {k: v[:, begin:end] if v.dim() > 1 else v for k, v in given.items()}
        alone = longspan.ssd(**part)
        assert torch.equal(whole["out"][:, begin:end], alone)
        poisoned = {k: v.clone() for k, v in given.items()}
        for name in ("x", "B", "C", "z", "dt"):
            poisoned[name][:, :begin] = torch.nan
            poisoned[name][:, end:] = torch.nan
        for options in (
            {"cu_seqlens": cu},
            {"seq_idx": torch.bucketize(torch.arange(500), cu[1:], right=True)[None]},
        ):
            assert torch.equal(longspan.ssd(**poisoned, **options)[:, begin:end], alone)


def test_outputs_do_not_see_the_future() -> None:
    given = tensors(1, 150, 2, 1, 8, 16)
    before = longspan.ssd(**given)
    for name in ("x", "B", "C", "z", "dt"):
        given[name][:, 101:] = torch.nan
    assert torch.equal(longspan.ssd(**given)[:, :101], before[:, :101])


@given(data=st.data())
def test_any_split_with_states_equals_one_call(data: st.DataObject) -> None:
    length = data.draw(st.integers(0, 400))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=3)))
    given = tensors(1, length, data.draw(st.sampled_from([1, 2, 16])), 1, 4, 6)
    chunk = data.draw(st.sampled_from([16, 64, 256]))
    whole = actual(**given)
    state, outs = given["initial_states"], []
    for begin, end in zip([0, *cuts], [*cuts, length]):
        part = {k: v[:, begin:end] if k in ("x", "dt", "B", "C", "z") else v for k, v in given.items()}
        out, state = actual(**part | {"initial_states": state}, chunk_size=chunk)
        outs.append(out)
    assert greatest_error(torch.cat(outs, dim=1), whole[0]) < 1e-12
    assert greatest_error(state, whole[1]) < 1e-12


def test_step_by_step_equals_the_whole() -> None:
    given = tensors(2, 40)
    whole, last = actual(**given)
    state = given.pop("initial_states")
    for t in range(40):
        part = {k: v[:, t : t + 1] if v.dim() > 2 else v for k, v in given.items()}
        out, state = actual(**part, initial_states=state)
        assert greatest_error(out, whole[:, t : t + 1]) < 1e-13
    assert greatest_error(state, last) < 1e-13


def test_without_decay_it_is_linear_attention() -> None:
    given = tensors(1, 200, 2, 2, 8, 16, only=()) | {"A": torch.zeros(2).double()}
    given["dt"] = given["dt"].abs()
    value = given["x"] * given["dt"][..., None]
    weights = torch.einsum("blhn,bshn->bhls", given["C"], given["B"]).tril()
    want = torch.einsum("bhls,bshp->blhp", weights, value)
    assert greatest_error(longspan.ssd(**given), want) < 1e-12


@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_steps_and_rates(dtype: torch.dtype) -> None:
    given = tensors(1, 130, 4, 1, 8, 16)
    given["A"] = torch.tensor([0.0, -1e-6, -1e3, -1e30]).double()
    given["dt"][:, ::7] = 1e4
    given["dt"][:, 3::7] = -1e4
    found = results(actual, to(dtype, given))
    want = results(expected, to(torch.float64, to(dtype, given)))
    for name in ("out", "out 1"):
        scale = float(want[name].abs().max())
        assert greatest_error(found[name], want[name]) < scale * (
            1e-5 if dtype == torch.float32 else 1e-12
        ), name
    assert all(x.isfinite().all() for name, x in found.items() if name != "d A")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(isa: str, dtype: torch.dtype) -> None:
    def plain(**kw: Tensor) -> Tensor:
        x, dt, A, B, C, D, z, bias = (kw[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"))
        step = torch.nn.functional.softplus(dt + bias)
        a = torch.cumsum(step * A, dim=1)
        decay = torch.exp(
            (a[:, :, None] - a[:, None]).masked_fill(
                ~torch.ones(50, 50).tril().bool()[..., None], -math.inf
            )
        )
        weights = torch.einsum("blhn,bshn->blsh", C, B) * decay * step[:, None]
        return (torch.einsum("blsh,bshp->blhp", weights, x) + D[:, None] * x) * torch.nn.functional.silu(
            z
        )

    def ours(**kw: Tensor) -> Tensor:
        return longspan.ssd(**kw, dt_softplus=True)

    assert_error_ratio(ours, plain, tensors(1, 50, 2, 2, 16, 16, only=("D", "z", "dt_bias")), dtype)


@pytest.mark.parametrize("option", ["plain", "seq_idx", "cu_seqlens", "no softplus"])
@pytest.mark.parametrize("only", [(), OPTIONAL])
def test_gradcheck(option: str, only: tuple[str, ...]) -> None:
    options: dict[str, Any] = {
        "plain": {},
        "seq_idx": {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2]])},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 4, 4, 9]), "return_varlen_states": True},
        "no softplus": {"dt_softplus": False, "dt_limit": (-3.0, 0.7)},
    }[option]
    given = tensors(1, 9, 2, 1, 2, 3, only=only, sequences=3 if option == "cu_seqlens" else None)
    names, leaves = zip(*((k, v.requires_grad_()) for k, v in given.items()))
    assert torch.autograd.gradcheck(lambda *args: actual(**dict(zip(names, args)), **options), leaves)


def test_only_the_final_states_have_a_gradient() -> None:
    given = tensors(1, 300, 2, 1, 3, 4)
    names = ("x", "dt", "A", "B", "dt_bias", "initial_states")
    leaves = {k: v.requires_grad_() for k, v in given.items()}

    def gradients(function: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(**leaves)[1].square().sum(), [leaves[k] for k in names])

    for name, got, want in zip(names, gradients(actual), gradients(expected)):
        assert greatest_error(got, want) < 1e-12 * max(1.0, float(want.abs().max())), name


@pytest.mark.parametrize("heads", [2, 16])
def test_thread_counts_change_nothing(heads: int) -> None:
    given = to(torch.float32, tensors(1, 900, heads, 2, 16, 16))
    assert_threads_change_nothing(lambda: results(actual, given))
    packed = given | {"seq_idx": index_of(1, 900)}
    assert_threads_change_nothing(lambda: results(actual, packed))


def test_strides_change_nothing() -> None:
    given = to(torch.float32, tensors(2, 70, 4, 2, 16, 16))
    assert_strides_change_nothing(actual, given, ["x", "B", "C", "z"])
    moved = given | {"dt": given["dt"].transpose(1, 2).contiguous().transpose(1, 2)}
    for name, want in results(actual, given).items():
        assert torch.equal(results(lambda **kw: actual(**kw), moved)[name], want), name
