"""`longspan.linear_attention_step` against the recurrence, token by token."""

from typing import Any

import pytest
import torch
from checks import TOLERANCE, assert_raises, assert_threads_change_nothing, greatest_error, to
from linear_attention_oracle import GATES, actual, tensors
from torch import Tensor

import longspan


def steps(given: dict[str, Tensor], normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Every token by a step -> (out, S, z)."""
    state, norm = given["initial_state"].clone(), given["initial_norm"].clone()
    gate = given.get("gate")
    outs = [
        longspan.linear_attention_step(
            *(given[name][:, :, t] for name in "qkv"),
            (state, norm) if normalize else state,
            gate=gate if gate is None or gate.dim() == 1 else gate[:, :, t],
            normalize=normalize,
        )
        for t in range(given["q"].shape[2])
    ]
    return torch.stack(outs, dim=2), state, norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("normalize", [False, True])
def test_step_by_step_equals_the_whole(isa: str, dtype: torch.dtype, gate: str, normalize: bool) -> None:
    for shape in [(2, 9, 4, 2, 8, 5), (1, 9, 2, 1, 17, 130), (3, 4, 2, 2, 64, 64)]:
        given = to(dtype, tensors(*shape, gate=gate, positive=True))
        exact = to(torch.float64, given)
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        given |= {name: given[name].to(sums) for name in ("initial_state", "initial_norm")}
        out, state, norm = steps(given, normalize)
        assert out.dtype == dtype
        want = actual(**exact, normalize=normalize)
        scale = float(want[0].abs().max())
        rounding = TOLERANCE[dtype] if dtype in TOLERANCE else torch.finfo(dtype).eps
        assert greatest_error(out, want[0]) < scale * rounding
        assert greatest_error(state, want[1]) < float(want[1].abs().max()) * TOLERANCE[sums]
        if normalize:
            assert greatest_error(norm, want[2]) < float(want[2].abs().max()) * TOLERANCE[sums]


def one_token(batch: int = 3, **options: Any) -> dict[str, Any]:
    given = to(torch.float32, tensors(batch, 1, **options))
    made = {name: x[:, :, 0] for name, x in given.items() if name in ("q", "k", "v", "gate")}
    return made | {"state": given["initial_state"], "norm": given["initial_norm"]}


def call(**given: Any) -> Tensor:
    names = ("q", "k", "v", "state", "gate")
    return longspan.linear_attention_step(**{name: given[name] for name in names if name in given})


def test_states_anywhere_in_memory() -> None:
    given = one_token(gate="token")
    want_state = given["state"].clone()
    want = call(**given | {"state": want_state})
    wide = torch.full((3, 8, 4, 7), torch.nan)
    state = wide[:, ::2, :, 1:6].transpose(1, 2)[:, :, :, :]
    assert state.shape == (3, 4, 4, 5)
    given = {k: x[..., :4] if k in ("q", "k") else x for k, x in given.items()}
    first = given["state"][:, :, :4].contiguous()
    state.copy_(first)
    want = call(**given | {"state": first})
    assert torch.equal(call(**given | {"state": state}), want)
    assert torch.equal(state, first)
    assert wide[:, 1::2].isnan().all()


def test_threads_change_nothing() -> None:
    given = one_token(64, heads=8, kv_heads=8, channels=32, values=32, gate="channel")

    def both() -> dict[str, Tensor]:
        state = given["state"].clone()
        return {"out": call(**given | {"state": state}), "state": state}

    assert_threads_change_nothing(both)


def test_empty() -> None:
    assert call(**one_token(0)).shape == (0, 4, 5)


@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(normalize: bool) -> None:
    given = one_token(gate="channel")
    args = tuple(given[name] for name in ("q", "k", "v", "state"))
    norm = given["norm"] if normalize else None
    torch.library.opcheck(
        torch.ops.longspan.linear_attention_step, (*args, norm, given["gate"], 0.5, 1e-6)
    )


def test_compiles_whole(fresh_compiler: None) -> None:
    given = one_token(gate="token")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    states = [given["state"].clone() for _ in range(2)]
    outs = [f(**given | {"state": s}) for f, s in zip((compiled, call), states)]
    assert torch.equal(*outs)
    assert torch.equal(*states)


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
        ({"k": torch.zeros(3, 3, 8)}, ValueError, ["k", "divides q's, 4", "3"]),
        ({"v": torch.zeros(3, 4, 5)}, ValueError, ["v", "(3, 2, any)"]),
        ({"state": torch.zeros(2, 4, 8, 5)}, ValueError, ["state", "(3, 4, 8, 5)", "(2, 4, 8, 5)"]),
        ({"state": None}, TypeError, ["state", "None"]),
        ({"state": torch.zeros(3, 4, 8, 5).bfloat16()}, TypeError, ["state", "float32", "bfloat16"]),
        ({"state": torch.zeros(3, 4, 5, 8).mT}, ValueError, ["state", "last stride of 1", "8"]),
        ({"gate": torch.zeros(3, 4, 1)}, ValueError, ["gate", "(3, 4, 8)", "(3, 4, 1)"]),
        ({"gate": torch.zeros(4).double()}, TypeError, ["gate", "float64"]),
    ],
)
def test_wrong_arguments(change: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    given = one_token() | change
    assert_raises(kind, ["linear_attention_step", *parts], lambda: call(**given))
