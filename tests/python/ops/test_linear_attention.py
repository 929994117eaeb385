"""`longspan.linear_attention` computes what the recurrence computes in double, with every option."""

import math
from typing import Any

import pytest
import torch
from checks import (
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
from hypothesis import given
from hypothesis import strategies as st
from linear_attention_oracle import GATES, actual, compare, expected, tensors
from torch import Tensor

import longspan

FLOATS = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gate", GATES)
def test_shapes(isa: str, gate: str, dtype: torch.dtype) -> None:
    for shape in [(1, 1, 1, 1, 1, 1), (2, 2, 2, 1, 3, 5), (1, 15, 3, 3, 8, 16), (1, 63, 2, 1, 40, 20),
                  (2, 65, 4, 2, 16, 17), (1, 129, 2, 1, 64, 128), (1, 300, 2, 1, 17, 33)]:  # fmt: skip
        compare(tensors(*shape, gate=gate), dtype)
    compare(tensors(2, 70, gate=gate, states=False), dtype)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("gate", GATES)
def test_lengths(gate: str, tokens: int) -> None:
    compare(tensors(1, tokens, 1, 1, 4, 3, gate=gate))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gate", GATES)
def test_normalized(isa: str, gate: str, dtype: torch.dtype) -> None:
    for shape in [(1, 1, 1, 1, 1, 1), (2, 17, 4, 2, 16, 5), (1, 300, 2, 1, 17, 33)]:
        compare(tensors(*shape, gate=gate, positive=True), dtype, normalize=True)
    given = tensors(2, 70, gate=gate, states=False, positive=True)
    compare(given, dtype, normalize=True, eps=0.5, scale=0.3)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_not_causal(isa: str, dtype: torch.dtype, normalize: bool) -> None:
    for shape, keys in [
        ((1, 1, 1, 1, 1, 1), 3),
        ((2, 70, 4, 2, 8, 5), 33),
        ((1, 300, 2, 1, 17, 33), 600),
    ]:
        for states in (False, True):
            compare(
                tensors(*shape, keys=keys, states=states, positive=normalize), dtype,
                causal=False, normalize=normalize,
            )  # fmt: skip


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("heads", [1, 16])
def test_spans(heads: int, gate: str) -> None:
    """Few heads are split over time, many are not; neither shows."""
    compare(tensors(1, 530, heads, 1, 5, 7, gate=gate))
    compare(tensors(1, 530, heads, 1, 5, 7, gate=gate, positive=True), normalize=True)


@pytest.mark.parametrize("bounds", [[0, 70], [0, 0, 30, 30, 31, 70, 70], [0, 300, 560]], ids=str)
@pytest.mark.parametrize("gate", [*GATES, "not causal"])
@pytest.mark.parametrize("heads", [2, 16])
def test_packed_sequences(bounds: list[int], heads: int, gate: str) -> None:
    causal, sequences = gate != "not causal", len(bounds) - 1
    kind = gate if causal else "none"
    packed = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    given = tensors(1, bounds[-1], heads, 2, 3, 5, gate=kind, sequences=sequences, positive=True)
    for normalize in (False, True):
        compare(given | packed, normalize=normalize, causal=causal)
    compare(tensors(1, bounds[-1], heads, 2, 3, 5, gate=kind, states=False) | packed, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_no_tokens(causal: bool) -> None:
    given = tensors(1, 0, sequences=2, positive=True)
    found = results(
        lambda **kw: actual(**kw, normalize=True, causal=causal),
        given | {"cu_seqlens": torch.tensor([0, 0, 0])},
    )
    assert found["out"].shape == (1, 4, 0, 5)
    assert torch.equal(found["out 1"], given["initial_state"])
    assert torch.equal(found["out 2"], given["initial_norm"])
    assert torch.equal(found["d initial_state"], grid(2, 4, 8, 5, seed=1))
    assert torch.equal(found["d initial_norm"], grid(2, 4, 8, seed=2))
    assert not actual(**tensors(2, 0, states=False), causal=causal)[1].any()
    assert actual(**tensors(0, 5, states=False), causal=causal)[0].shape == (0, 4, 5, 5)


@pytest.mark.parametrize("gate", ["none", "token", "channel"])
@pytest.mark.parametrize("heads", [2, 16])
def test_a_packed_sequence_equals_its_own_call_and_sees_no_other(heads: int, gate: str) -> None:
    given = tensors(1, 500, heads, 2, 8, 16, gate=gate, states=False)
    cu = torch.tensor([0, 100, 450, 500])
    whole = longspan.linear_attention(**given, cu_seqlens=cu)
    for begin, end in ((0, 100), (100, 450), (450, 500)):
        alone = longspan.linear_attention(**{k: x[:, :, begin:end] for k, x in given.items()})
        assert greatest_error(whole[:, :, begin:end], alone) < 1e-13
        poisoned = {k: x.clone() for k, x in given.items()}
        for x in poisoned.values():
            x[:, :, :begin] = torch.nan
            x[:, :, end:] = torch.nan
        out = longspan.linear_attention(**poisoned, cu_seqlens=cu)
        assert torch.equal(out[:, :, begin:end], whole[:, :, begin:end])


@pytest.mark.parametrize("gate", ["none", "token", "channel"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_do_not_see_the_future(isa: str, gate: str, value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = to(dtype, tensors(1, 150, 2, 1, 8, 16, gate=gate, states=False, positive=True))
        before = longspan.linear_attention(**given, normalize=True)
        for x in given.values():
            x[:, :, 101:] = value
        after = longspan.linear_attention(**given, normalize=True)
        assert torch.equal(after[:, :, :101], before[:, :, :101])


@given(data=st.data())
def test_any_split_with_states_equals_one_call(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, 400))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=3)))
    gate = data.draw(st.sampled_from(GATES))
    normalize = data.draw(st.booleans())
    shape = (1, tokens, data.draw(st.sampled_from([1, 2, 16])), 1)
    shape += (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    given = tensors(*shape, gate=gate, positive=True)
    whole = actual(**given, normalize=normalize)
    state, norm, outs = given["initial_state"], given["initial_norm"], []
    for begin, end in zip([0, *cuts], [*cuts, tokens]):
        part = {k: x[:, :, begin:end] if x.dim() > 2 else x for k, x in given.items()}
        out, state, *rest = actual(
            **part | {"initial_state": state, "initial_norm": norm}, normalize=normalize
        )
        norm = rest[0] if rest else norm
        outs.append(out)
    assert greatest_error(torch.cat(outs, dim=2), whole[0]) < 1e-11
    assert greatest_error(state, whole[1]) < 1e-11


def test_three_forms_agree() -> None:
    """The recurrence, chunks, and the matrix of scores; a gate a head is retention's decay matrix."""
    given = tensors(1, 200, 2, 2, 8, 16, gate="head", states=False)
    t = torch.arange(200)
    for gate in (None, given["gate"]):
        decay = torch.zeros(2).double() if gate is None else gate
        matrix = torch.exp(decay[:, None, None] * (t[:, None] - t)).tril()
        scores = given["q"] @ given["k"].transpose(-1, -2) * 8**-0.5 * matrix
        found = longspan.linear_attention(**given | {"gate": gate})
        assert greatest_error(found, scores @ given["v"]) < 1e-12
        assert greatest_error(found, expected(**given | {"gate": gate})[0]) < 1e-12


def test_gates_of_one_kind_in_the_form_of_another() -> None:
    given = tensors(1, 300, 2, 2, 8, 16, gate="head")
    del given["initial_norm"]
    head = given["gate"]
    want = results(actual, given)
    for shape in ((1, 2, 300), (1, 2, 300, 8)):
        gate = head.view(1, 2, *[1] * (len(shape) - 2)).expand(shape)
        found = results(actual, given | {"gate": gate})
        found["d gate"] = found["d gate"].sum([i for i in range(len(shape)) if i != 1])
        for name, x in want.items():
            assert greatest_error(found[name], x) < 1e-11, name


def test_normalized_outputs_are_means_of_the_values() -> None:
    given = tensors(1, 200, 2, 2, 8, 4, gate="token", states=False, positive=True)
    out = longspan.linear_attention(**given, normalize=True, eps=0.0)
    highest, lowest = given["v"].cummax(2).values, given["v"].cummin(2).values
    assert (out <= highest + 1e-12).all()
    assert (out >= lowest - 1e-12).all()
    ones = longspan.linear_attention(
        **given | {"v": torch.ones_like(given["v"])}, normalize=True, eps=0.0
    )
    assert greatest_error(ones, torch.ones_like(ones)) < 1e-14


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_of_no_weight_gets_nothing(causal: bool) -> None:
    given = tensors(1, 40, 2, 2, 8, 4, states=False, positive=True)
    given["q"][:, :, 7] = 0
    found = results(
        lambda **kw: longspan.linear_attention(**kw, causal=causal, normalize=True, eps=0.0), given
    )
    assert not found["out"][:, :, 7].any()
    assert all(x.isfinite().all() for x in found.values())
    assert not found["d q"][:, :, 7].any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gate", ["token", "channel"])
@pytest.mark.parametrize("normalize", [False, True])
def test_strong_decays_and_resets(isa: str, dtype: torch.dtype, gate: str, normalize: bool) -> None:
    """Sums of gates far below what an exponential can hold, and resets, alone and in a row."""
    given = tensors(1, 130, 2, 1, 8, 16, gate=gate, positive=True)
    g = given["gate"]
    g[:, :, ::5] *= 100
    g[:, :, 3::40] = -1e30
    g[:, :, 7::40] = -math.inf
    g[:, 1, 20:60] = -math.inf
    g[:, :, 64:80] *= 1e-9
    if gate == "channel":
        g[..., ::3] = -1e-3
    compare(given, dtype, normalize=normalize)


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_a_reset_begins_a_sequence(gate: str) -> None:
    given = tensors(1, 300, 2, 2, 8, 16, gate=gate, states=False)
    given["gate"][:, :, 137] = -math.inf
    whole = results(longspan.linear_attention, given)
    cut = results(
        lambda **kw: longspan.linear_attention(**kw, cu_seqlens=torch.tensor([0, 137, 300])), given
    )
    for name in ("out", "d q", "d k", "d v"):
        assert greatest_error(whole[name], cut[name]) < 1e-11, name
    assert not whole["d gate"][:, :, 137].any()


def test_states_may_grow() -> None:
    given = tensors(1, 100, 2, 2, 8, 4, gate="token")
    given["gate"] = -0.2 * given["gate"]
    compare(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["none", "token", "channel"])
@pytest.mark.parametrize("normalize", [False, True])
def test_half_precisions(isa: str, dtype: torch.dtype, gate: str, normalize: bool) -> None:
    def plain(**kw: Tensor) -> Tensor:
        q, k, v = kw["q"], kw["k"], kw["v"]
        if gate == "channel":
            a = torch.cumsum(kw["gate"], dim=2)
            decay = (a[:, :, :, None] - a[:, :, None]).exp()
            scores = torch.einsum("bhtk,bhsk,bhtsk->bhts", q, k, decay)
        else:
            a = torch.cumsum(kw["gate"], dim=2) if gate == "token" else torch.zeros_like(q[..., 0])
            scores = q @ k.transpose(-1, -2) * (a[..., None] - a[..., None, :]).exp()
        scores = (scores * 0.25).tril()
        out = scores @ v
        return out / (scores.sum(-1, keepdim=True) + 0.5) if normalize else out

    def ours(**kw: Tensor) -> Tensor:
        return longspan.linear_attention(**kw, normalize=normalize, eps=0.5)

    given = tensors(1, 50, 2, 2, 16, 16, gate=gate, states=False, positive=normalize)
    if gate != "none":
        given["gate"] = given["gate"] / 8
    assert_error_ratio(ours, plain, given, dtype)


@pytest.mark.parametrize("gate", [*GATES, "not causal"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(gate: str, normalize: bool, packed: bool) -> None:
    causal = gate != "not causal"
    given = tensors(
        1, 19, 2, 1, 2, 3, gate=gate if causal else "none", positive=normalize,
        sequences=3 if packed else None,
    )  # fmt: skip
    if not normalize:
        del given["initial_norm"]
    options: dict[str, Any] = {"normalize": normalize, "causal": causal}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 4, 4, 19])
    names, leaves = zip(*((k, x.requires_grad_()) for k, x in given.items()))
    assert torch.autograd.gradcheck(lambda *args: actual(**dict(zip(names, args)), **options), leaves)


@pytest.mark.parametrize("normalize", [False, True])
def test_only_the_final_state_has_a_gradient(normalize: bool) -> None:
    given = tensors(1, 300, 2, 1, 3, 4, gate="channel", positive=True)
    names = [
        "k",
        "gate",
        "initial_state",
        *(["v"] if not normalize else []),
        *(["initial_norm"] * normalize),
    ]
    leaves = {k: x.requires_grad_() for k, x in given.items()}
    which = 2 if normalize else 1

    def gradients(function: Any) -> tuple[Tensor, ...]:
        loss = function(**leaves, normalize=normalize)[which].square().sum()
        return torch.autograd.grad(loss, [leaves[k] for k in names], materialize_grads=True)

    for name, got, want in zip(names, gradients(actual), gradients(expected)):
        assert greatest_error(got, want) < 1e-12 * max(1.0, float(want.abs().max())), name


@pytest.mark.parametrize("gate", ["none", "token", "channel", "not causal"])
@pytest.mark.parametrize("heads", [2, 16])
def test_thread_counts_change_nothing(heads: int, gate: str) -> None:
    causal = gate != "not causal"
    given = tensors(1, 900, heads, 2, 16, 16, gate=gate if causal else "none", positive=True)
    given = to(torch.float32, given)
    assert_threads_change_nothing(
        lambda: results(lambda **kw: actual(**kw, normalize=True, causal=causal), given)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["none", "channel"])
def test_strides_change_nothing(gate: str, dtype: torch.dtype) -> None:
    given = to(dtype, tensors(2, 70, 4, 2, 16, 16, gate=gate))
    del given["initial_norm"]
    names = ["q", "k", "v", *(["gate"] if gate == "channel" else [])]
    assert_strides_change_nothing(actual, given, names)


def test_strides_of_gates_change_nothing() -> None:
    given = to(torch.float32, tensors(2, 70, gate="token"))
    del given["initial_norm"]
    moved = given | {"gate": given["gate"].transpose(1, 2).contiguous().transpose(1, 2)}
    for name, want in results(actual, given).items():
        assert torch.equal(results(lambda **kw: actual(**kw), moved)[name], want), name


def test_more_elements_than_32_bits_count() -> None:
    far = far_apart(2, 40, 8)
    near = far.contiguous()
    assert torch.equal(
        longspan.linear_attention(far, far, far), longspan.linear_attention(near, near, near)
    )
