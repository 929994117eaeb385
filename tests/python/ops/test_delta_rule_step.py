"""`longspan.delta_rule_step` against the whole, token by token."""

import sys
from typing import Any

import pytest
import torch
from checks import DTYPES, TOLERANCE, assert_raises, assert_threads_change_nothing, greatest_error, to
from delta_rule_oracle import actual, tensors
from torch import Tensor

import longspan


def at(t: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[:, :, t] for name, x in given.items() if name != "initial_state"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [False, True])
def test_step_by_step_equals_the_whole(isa: str, dtype: torch.dtype, gate: bool) -> None:
    for shape in [(2, 9, 2, 4, 8, 5), (1, 9, 1, 2, 17, 130), (3, 4, 2, 2, 64, 64), (1, 3, 1, 3, 1, 1)]:
        given = to(dtype, tensors(*shape, gate=gate))
        exact = to(torch.float64, given)
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        state = given["initial_state"].to(sums, copy=True)
        outs = [longspan.delta_rule_step(**at(t, given), state=state) for t in range(shape[1])]
        out = torch.stack(outs, dim=2)
        assert out.dtype == dtype
        want, last = actual(**exact)
        rounding = TOLERANCE[dtype] if dtype in TOLERANCE else torch.finfo(dtype).eps
        assert greatest_error(out, want) < float(want.abs().max()) * rounding
        assert greatest_error(state, last) < float(last.abs().max()) * TOLERANCE[sums]


def one_token(batch: int = 3, **options: Any) -> dict[str, Any]:
    given = to(torch.float32, tensors(batch, 1, **options))
    return at(0, given) | {"state": given["initial_state"]}


def call(**given: Any) -> Tensor:
    return longspan.delta_rule_step(**given)


def test_beta_and_gate_may_be_float_beside_half_precision() -> None:
    given = one_token()
    half = {k: x.bfloat16() if k in "qkv" else x for k, x in given.items()}
    wide = {k: x.float() if k in "qkv" else x.clone() for k, x in half.items()}
    assert torch.equal(call(**half), call(**wide).bfloat16())
    assert torch.equal(half["state"], wide["state"])


def test_states_anywhere_in_memory() -> None:
    given = one_token()
    dense = given["state"].clone()
    want = call(**given | {"state": dense})
    wide = torch.full((3, 8, 8, 7), torch.nan)
    state = wide.transpose(1, 2)[:, ::2, :, 1:6]
    assert state.shape == (3, 4, 8, 5)
    state.copy_(given["state"])
    assert torch.equal(call(**given | {"state": state}), want)
    assert torch.equal(state, dense)
    assert wide.transpose(1, 2)[:, 1::2].isnan().all()
    assert wide[..., 0].isnan().all()
    assert wide[..., 6].isnan().all()


def test_a_reset_forgets() -> None:
    given = one_token()
    given["gate"][:, 1] = -torch.inf
    call(**given)
    written = given["k"].repeat_interleave(2, 1)[..., None] * given["v"][..., None, :]
    want = given["beta"][..., None, None] * written
    assert greatest_error(given["state"][:, 1], want[:, 1]) < 1e-6


def test_threads_change_nothing() -> None:
    given = one_token(64, heads=4, value_heads=8, channels=32, values=32)

    def both() -> dict[str, Tensor]:
        state = given["state"].clone()
        return {"out": call(**given | {"state": state}), "state": state}

    assert_threads_change_nothing(both)


def test_empty() -> None:
    assert call(**one_token(0)).shape == (0, 4, 5)


@pytest.mark.parametrize("gate", [False, True])
def test_opcheck(gate: bool) -> None:
    given = one_token(gate=gate)
    args = tuple(given[name] for name in ("q", "k", "v", "beta", "state"))
    torch.library.opcheck(torch.ops.longspan.delta_rule_step, (*args, given.get("gate"), 0.5))


def test_compiles_whole(fresh_compiler: None) -> None:
    given = one_token()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    states = [given["state"].clone() for _ in range(2)]
    outs = [f(**given | {"state": s}) for f, s in zip((compiled, call), states)]
    assert torch.equal(*outs)
    assert torch.equal(*states)


def test_devices_without_kernels_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    given = one_token()
    state = given["state"].clone()
    want = call(**given | {"state": state})
    # The module is named in full: `longspan.ops.delta_rule` is the function.
    monkeypatch.setattr(sys.modules["longspan.ops.delta_rule"], "has_kernels", lambda *_: False)
    assert greatest_error(call(**given), want) < 1e-5
    assert greatest_error(given["state"], state) < 1e-5


def test_gradient_is_refused() -> None:
    given = one_token()
    given["q"].requires_grad_()
    assert_raises(RuntimeError, ["no gradient"], lambda: call(**given))
    with torch.no_grad():
        call(**given)


@pytest.mark.parametrize(
    ("change", "kind", "parts"),
    [
        ({"q": torch.zeros(3, 4)}, ValueError, ["q", "(batch, heads, key channels)"]),
        ({"q": None}, TypeError, ["q", "NoneType"]),
        ({"k": torch.zeros(3, 2, 7)}, ValueError, ["k", "q's shape", "(3, 2, 7)"]),
        ({"v": torch.zeros(3, 3, 5)}, ValueError, ["v", "multiple of q's 2 heads", "3"]),
        ({"v": torch.zeros(2, 4, 5)}, ValueError, ["v", "(3, any, any)", "(2, 4, 5)"]),
        ({"beta": torch.zeros(3, 2)}, ValueError, ["beta", "(3, 4)", "(3, 2)"]),
        ({"beta": None}, TypeError, ["beta", "NoneType"]),
        ({"gate": torch.zeros(3, 4, 1)}, ValueError, ["gate", "(3, 4)", "(3, 4, 1)"]),
        ({"gate": torch.zeros(3, 4).double()}, TypeError, ["gate", "float64"]),
        ({"state": torch.zeros(2, 4, 8, 5)}, ValueError, ["state", "(3, 4, 8, 5)", "(2, 4, 8, 5)"]),
        ({"state": None}, TypeError, ["state", "NoneType"]),
        ({"state": torch.zeros(3, 4, 8, 5).bfloat16()}, TypeError, ["state", "float32", "bfloat16"]),
        ({"state": torch.zeros(3, 4, 5, 8).mT}, ValueError, ["state", "last stride of 1", "8"]),
    ],
)
def test_wrong_arguments(change: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    given = one_token() | change
    assert_raises(kind, ["delta_rule_step", *parts], lambda: call(**given))
