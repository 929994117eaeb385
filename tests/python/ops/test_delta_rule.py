"""`longspan.delta_rule` computes what the recurrence computes in double, with every option."""

import math
from typing import Any

import pytest
import torch
from checks import (
    HEAD_SIZES,
    LENGTHS,
    assert_error_ratio,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    far_apart,
    greatest_error,
    grid,
    results,
    to,
)
from delta_rule_oracle import actual, compare, expected, tensors
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import longspan

FLOATS = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gate", [False, True])
def test_shapes(isa: str, gate: bool, dtype: torch.dtype) -> None:
    for shape in [(1, 1, 1, 1, 1, 1), (2, 2, 1, 3, 3, 5), (1, 15, 3, 3, 8, 16), (1, 63, 1, 2, 40, 20),
                  (2, 65, 2, 4, 16, 17), (1, 129, 1, 2, 64, 128), (1, 300, 2, 2, 17, 33)]:  # fmt: skip
        compare(tensors(*shape, gate=gate), dtype)
    compare(tensors(2, 70, gate=gate, states=False), dtype)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("gate", [False, True])
def test_lengths(gate: bool, tokens: int) -> None:
    compare(tensors(1, tokens, 1, 1, 4, 3, gate=gate))


@pytest.mark.parametrize("channels", HEAD_SIZES)
def test_head_sizes(channels: int) -> None:
    compare(tensors(1, 40, 1, 2, channels, channels), torch.float32)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("gate", [False, True])
def test_spans(heads: int, group: int, gate: bool) -> None:
    """Few heads are split over value channels, many are not; neither shows."""
    compare(tensors(1, 530, heads, heads * group, 5, 70, gate=gate))


@pytest.mark.parametrize("bounds", [[0, 70], [0, 0, 30, 30, 31, 70, 70], [0, 300, 560]], ids=str)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("heads", [1, 8])
def test_packed_sequences(bounds: list[int], heads: int, gate: bool) -> None:
    packed = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    shape = (1, bounds[-1], heads, 2 * heads, 3, 5)
    compare(tensors(*shape, gate=gate, sequences=len(bounds) - 1) | packed)
    compare(tensors(*shape, gate=gate, states=False) | packed)


def test_no_tokens() -> None:
    given = tensors(1, 0, sequences=2)
    found = results(actual, given | {"cu_seqlens": torch.tensor([0, 0, 0])})
    assert found["out"].shape == (1, 4, 0, 5)
    assert torch.equal(found["out 1"], given["initial_state"])
    assert torch.equal(found["d initial_state"], grid(2, 4, 8, 5, seed=1))
    assert not actual(**tensors(2, 0, states=False))[1].any()
    assert actual(**tensors(0, 5, states=False))[0].shape == (0, 4, 5, 5)
    assert actual(**tensors(2, 5, values=0))[0].shape == (2, 4, 5, 0)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("heads", [1, 8])
def test_a_packed_sequence_equals_its_own_call_and_sees_no_other(heads: int, gate: bool) -> None:
    given = tensors(1, 500, heads, heads, 8, 16, gate=gate, states=False)
    cu = torch.tensor([0, 100, 450, 500])
    whole = longspan.delta_rule(**given, cu_seqlens=cu)
    for begin, end in ((0, 100), (100, 450), (450, 500)):
        alone = longspan.delta_rule(**{k: x[:, :, begin:end] for k, x in given.items()})
        assert greatest_error(whole[:, :, begin:end], alone) < 1e-13
        poisoned = {k: x.clone() for k, x in given.items()}
        for x in poisoned.values():
            x[:, :, :begin] = torch.nan
            x[:, :, end:] = torch.nan
        out = longspan.delta_rule(**poisoned, cu_seqlens=cu)
        assert torch.equal(out[:, :, begin:end], whole[:, :, begin:end])


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v", "beta", "gate", "all"])
def test_outputs_do_not_see_the_future(isa: str, which: str, value: float, heads: int) -> None:
    given = to(torch.float32, tensors(1, 300, heads, heads, 8, 16, states=False))
    before = longspan.delta_rule(**given)
    for name, x in given.items():
        if which in (name, "all"):
            x[:, :, 101:] = value
    after = longspan.delta_rule(**given)
    assert torch.equal(after[:, :, :101], before[:, :, :101])
    assert not torch.equal(after[:, :, 101:], before[:, :, 101:])


@given(data=st.data())
def test_any_split_with_states_equals_one_call(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, 400))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=3)))
    heads, group = data.draw(st.sampled_from([(1, 1), (1, 2), (8, 1)]))
    shape = (1, tokens, heads, heads * group)
    shape += (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40)))
    given = tensors(*shape, gate=data.draw(st.booleans()))
    whole = actual(**given)
    state, outs = given.pop("initial_state"), []
    for begin, end in zip([0, *cuts], [*cuts, tokens]):
        part = {k: x[:, :, begin:end] for k, x in given.items()}
        out, state = actual(**part, initial_state=state)
        outs.append(out)
    assert greatest_error(torch.cat(outs, dim=2), whole[0]) < 1e-11
    assert greatest_error(state, whole[1]) < 1e-11


def test_three_forms_agree() -> None:
    """The recurrence, chunks, and one triangle of equations over all tokens."""
    given = tensors(1, 200, 2, 2, 8, 16, states=False)
    q, k, v, beta, gate = given.values()
    a = gate.cumsum(-1)
    decay = (a[..., None] - a[..., None, :]).exp().tril()
    lower = (k @ k.transpose(-1, -2) * decay).tril(-1) * beta[..., None]
    written = torch.linalg.solve_triangular(
        lower + torch.eye(200).double(), beta[..., None] * v, upper=False, unitriangular=True
    )
    found = longspan.delta_rule(**given)
    want = (q @ k.transpose(-1, -2) * decay) @ written * 8**-0.5
    assert greatest_error(found, want) < 1e-12
    assert greatest_error(found, expected(**given)[0]) < 1e-12


def test_a_gate_of_zeros_is_no_gate() -> None:
    given = tensors(1, 300, 2, 2, 8, 16, gate=False)
    want = results(actual, given)
    found = results(actual, given | {"gate": torch.zeros(1, 2, 300).double()})
    for name, x in want.items():
        assert greatest_error(found[name], x) < 1e-12, name


def test_without_beta_the_state_only_decays() -> None:
    given = tensors(1, 100, 2, 2, 8, 5)
    given["beta"].zero_()
    out, state = actual(**given)
    left = given["gate"].cumsum(-1).exp()
    want = left[..., None] * (given["q"] @ given["initial_state"]) * 8**-0.5
    assert greatest_error(out, want) < 1e-13
    assert greatest_error(state, left[..., -1, None, None] * given["initial_state"]) < 1e-13


def test_orthonormal_keys_recall_their_values_and_the_last_one_counts() -> None:
    keys = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0][None, None]
    v = torch.randn(1, 1, 128, 16, dtype=torch.float64)
    beta = torch.ones(1, 1, 128).double()
    twice = torch.cat([keys, keys.flip(2)], dim=2)
    _, state = longspan.delta_rule(twice, twice, v, beta, return_final_state=True)
    assert greatest_error(keys.flip(2) @ state, v[:, :, 64:]) < 1e-12


def test_a_key_of_zeros_writes_nothing() -> None:
    given = tensors(1, 100, 2, 4, 8, 5, gate=False)
    given["k"][:, :, 40:60] = 0
    found = results(actual, given)
    compare(given)
    assert not found["d v"][:, :, 40:60].any()
    assert not found["d beta"][:, :, 40:60].any()
    kept = [t for t in range(100) if not 40 <= t < 60]
    without = {k: x[:, :, kept] if k != "initial_state" else x for k, x in given.items()}
    assert greatest_error(actual(**without)[1], found["out 1"]) < 1e-13


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_key_over_and_over(isa: str, dtype: torch.dtype) -> None:
    """The triangle is as far from the identity as it gets."""
    for beta in (1.0, 2.0):
        given = tensors(1, 100, 1, 2, 8, 5, gate=False)
        given["k"] = given["k"][:, :, :1].expand_as(given["k"]).contiguous()
        given["beta"].fill_(beta)
        compare(given, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strong_decays_and_resets(isa: str, dtype: torch.dtype) -> None:
    """Sums of gates far below what an exponential can hold, and resets, alone and in a row."""
    given = tensors(1, 300, 1, 2, 8, 16)
    g = given["gate"]
    g[:, :, ::5] *= 100
    g[:, :, 3::40] = -1e30
    g[:, :, 7::40] = -math.inf
    g[:, 1, 20:60] = -math.inf
    g[:, :, 64:80] *= 1e-9
    compare(given, dtype)


def test_a_reset_begins_a_sequence() -> None:
    given = tensors(1, 300, 2, 2, 8, 16, states=False)
    given["gate"][:, :, 137] = -math.inf
    whole = results(longspan.delta_rule, given)
    cut = results(lambda **kw: longspan.delta_rule(**kw, cu_seqlens=torch.tensor([0, 137, 300])), given)
    for name in ("out", "d q", "d k", "d v", "d beta"):
        assert greatest_error(whole[name], cut[name]) < 1e-11, name
    assert not whole["d gate"][:, :, 137].any()


def test_states_may_grow() -> None:
    given = tensors(1, 100, 2, 2, 8, 4)
    given["gate"] = -0.2 * given["gate"]
    compare(given)


def test_long_memories_stay_finite_and_right() -> None:
    """Many tokens with hardly any decay, negative eigenvalues and all: the state does not drift."""
    given = to(torch.float32, tensors(1, 4000, 1, 1, 16, 16, states=False))
    given["gate"] = given["gate"] * 1e-6
    out, state = actual(**given)
    want, last = expected(**to(torch.float64, given))
    assert greatest_error(out, want) < 2e-5 * float(want.abs().max())
    assert greatest_error(state, last) < 2e-5 * float(last.abs().max())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gate", [False, True])
def test_half_precisions(isa: str, dtype: torch.dtype, gate: bool) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **kw: Tensor) -> Tensor:
        state = torch.zeros_like(q[:, :, 0, :, None] * v[:, :, 0, None])
        outs = []
        for t in range(q.shape[2]):
            if gate:
                state = kw["gate"][:, :, t, None, None].exp() * state
            error = v[:, :, t] - (k[:, :, t, None] @ state).squeeze(-2)
            state = state + k[:, :, t, :, None] * (beta[:, :, t, None] * error)[:, :, None]
            outs.append(0.25 * (q[:, :, t, None] @ state).squeeze(-2))
        return torch.stack(outs, dim=2)

    given = tensors(1, 50, 2, 2, 16, 16, gate=gate, states=False)
    assert_error_ratio(longspan.delta_rule, plain, given, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precisions_round_results_alone(dtype: torch.dtype) -> None:
    given = to(dtype, tensors(1, 200, 2, 4, 16, 16, states=False))
    found = results(longspan.delta_rule, given)
    want = results(longspan.delta_rule, to(torch.float64, given))
    for name, x in want.items():
        assert found[name].dtype == dtype
        rounding = torch.finfo(dtype).eps / 2 * float(x.abs().max())
        assert greatest_error(found[name], x) < 1.01 * rounding, name


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(gate: bool, packed: bool) -> None:
    given = tensors(1, 37, 1, 2, 2, 3, gate=gate, sequences=3 if packed else None)
    cu = {"cu_seqlens": torch.tensor([0, 4, 4, 37])} if packed else {}
    names, leaves = zip(*((k, x.requires_grad_()) for k, x in given.items()))
    assert torch.autograd.gradcheck(lambda *args: actual(**dict(zip(names, args)), **cu), leaves)


@pytest.mark.parametrize("heads", [1, 8])
def test_only_the_final_state_has_a_gradient(heads: int) -> None:
    given = tensors(1, 300, heads, heads, 3, 4)
    leaves = {k: x.requires_grad_() for k, x in given.items()}
    names = [name for name in leaves if name != "q"]

    def gradients(function: Any) -> tuple[Tensor, ...]:
        loss = function(**leaves)[1].square().sum()
        return torch.autograd.grad(loss, [leaves[k] for k in names])

    for name, got, want in zip(names, gradients(actual), gradients(expected)):
        assert greatest_error(got, want) < 1e-12 * max(1.0, float(want.abs().max())), name


@pytest.mark.parametrize("heads", [1, 8])
def test_thread_counts_change_nothing(heads: int) -> None:
    given = to(torch.float32, tensors(1, 900, heads, 2 * heads, 16, 80))
    assert_threads_change_nothing(lambda: results(actual, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_nothing(dtype: torch.dtype) -> None:
    assert_strides_change_nothing(actual, to(dtype, tensors(2, 70, 2, 4, 16, 16)), ["q", "k", "v"])


def test_strides_of_gates_change_nothing() -> None:
    given = to(torch.float32, tensors(2, 70))
    moved = dict(given)
    for name in ("beta", "gate"):
        moved[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    found = results(actual, moved)
    for name, want in results(actual, given).items():
        assert torch.equal(found[name], want), name
    beta, gate = given["beta"][:, :1], given["gate"][:, :1]
    wide = given | {"beta": beta.expand(2, 4, 70), "gate": gate.expand(2, 4, 70)}
    dense = given | {"beta": beta.repeat(1, 4, 1), "gate": gate.repeat(1, 4, 1)}
    assert torch.equal(actual(**wide)[0], actual(**dense)[0])


def test_more_elements_than_32_bits_count() -> None:
    far = far_apart(2, 40, 8)
    far.copy_(normalize(far, dim=-1))
    near, beta = far.contiguous(), torch.rand(1, 2, 40)
    assert torch.equal(
        longspan.delta_rule(far, far, far, beta), longspan.delta_rule(near, near, near, beta)
    )
