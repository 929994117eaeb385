"""selective_state_update against one step of the reference, in both forms."""

from typing import Any

import pytest
import torch
from checks import assert_raises
from torch import Tensor

import longspan
from longspan.reference import selective_scan as reference

Inputs = dict[str, Any]


def by_heads(
    batch: int = 3, heads: int = 4, width: int = 20, states: int = 16, groups: int = 2
) -> Inputs:
    wide = (heads, width)
    return {
        "state": torch.randn(batch, *wide, states, dtype=torch.float64),
        "x": torch.randn(batch, *wide, dtype=torch.float64),
        "dt": torch.randn(batch, *wide, dtype=torch.float64) - 1,
        "A": -torch.rand(*wide, states, dtype=torch.float64),
        "B": torch.randn(batch, groups, states, dtype=torch.float64),
        "C": torch.randn(batch, groups, states, dtype=torch.float64),
        "D": torch.randn(*wide, dtype=torch.float64),
        "z": torch.randn(batch, *wide, dtype=torch.float64),
        "dt_bias": torch.randn(*wide, dtype=torch.float64),
    }


def without_heads(tensors: Inputs) -> Inputs:
    return {n: x[0] if n in ("A", "D", "dt_bias") else x[:, 0] for n, x in tensors.items()}


def assert_is_reference(tensors: Inputs, **options: Any) -> None:
    mine = {n: x.clone() if n == "state" else x for n, x in tensors.items()}
    double = {n: x.double() if torch.is_floating_point(x) else x for n, x in tensors.items()}
    double["state"] = double["state"].clone()
    if tensors["x"].dim() == 2:
        parameters = ("A", "D", "dt_bias")
        wide = {n: x.unsqueeze(0 if n in parameters else 1) for n, x in double.items()}
        expected = reference.selective_state_update(**wide, **options)[:, 0]
        double["state"] = wide["state"][:, 0]
    else:
        expected = reference.selective_state_update(**double, **options)
    out = longspan.selective_state_update(**mine, **options)
    assert out.dtype == tensors["x"].dtype
    torch.testing.assert_close(out, expected.to(out.dtype))
    torch.testing.assert_close(mine["state"], double["state"].to(mine["state"].dtype))


@pytest.mark.parametrize("states", [1, 3, 8, 15, 16, 17, 64, 130])
@pytest.mark.parametrize("softplus", [False, True])
def test_by_heads(isa: str, states: int, softplus: bool) -> None:
    assert_is_reference(by_heads(states=states), dt_softplus=softplus)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 300])
def test_mamba_1(width: int) -> None:
    assert_is_reference(without_heads(by_heads(heads=1, width=width, groups=1)), dt_softplus=True)


@pytest.mark.parametrize("name", ["D", "z", "dt_bias"])
def test_without(name: str) -> None:
    tensors = by_heads()
    del tensors[name]
    assert_is_reference(tensors, dt_softplus=True)


def test_expanded_as_in_mamba_2(isa: str) -> None:
    tensors = by_heads(states=17)
    tensors["A"] = tensors["A"][:, :1, :1].expand(4, 20, 17)
    tensors["dt"] = tensors["dt"][:, :, :1].expand(3, 4, 20)
    tensors["D"] = tensors["D"][:, :1].expand(4, 20)
    assert_is_reference(tensors, dt_softplus=True)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, state: torch.dtype) -> None:
    tensors = {n: x.to(dtype) for n, x in by_heads().items()}
    tensors["state"] = tensors["state"].to(state)
    tensors["A"] = tensors["A"].float()
    assert_is_reference(tensors)


def test_states_in_any_order_of_memory() -> None:
    tensors = by_heads()
    tensors["state"] = tensors["state"].transpose(-1, -2).contiguous().transpose(-1, -2)
    expected = longspan.selective_state_update(**tensors | {"state": tensors["state"].contiguous()})
    torch.testing.assert_close(longspan.selective_state_update(**tensors), expected)


def test_rows_by_index() -> None:
    tensors = by_heads()
    tensors["state"] = torch.randn(7, 4, 20, 16, dtype=torch.float64)
    before = tensors["state"].clone()
    index = torch.tensor([5, -1, 2], dtype=torch.int32)
    assert_is_reference(tensors, state_batch_indices=index)
    out = longspan.selective_state_update(**tensors, state_batch_indices=index)
    assert not out[1].any()
    untouched = [0, 1, 3, 4, 6]
    assert torch.equal(tensors["state"][untouched], before[untouched])


def test_threads() -> None:
    tensors = by_heads(batch=64, width=64)
    found = []
    before = torch.get_num_threads()
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        state = tensors["state"].clone()
        found.append((longspan.selective_state_update(**tensors | {"state": state}), state))
    torch.set_num_threads(before)
    for out, state in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(state, found[0][1])


def test_empty() -> None:
    assert longspan.selective_state_update(**by_heads(batch=0)).shape == (0, 4, 20)


def test_opcheck() -> None:
    tensors = {n: x.float() for n, x in by_heads().items()}
    args = (*tensors.values(), None, True)
    torch.library.opcheck(torch.ops.longspan.selective_state_update.default, args)


def test_compiles_whole(fresh_compiler: None) -> None:
    tensors = by_heads()
    compiled = torch.compile(longspan.selective_state_update, fullgraph=True, backend="aot_eager")
    states = [tensors["state"].clone() for _ in range(2)]
    outs = [
        f(**tensors | {"state": s}) for f, s in zip((compiled, longspan.selective_state_update), states)
    ]
    assert torch.equal(*outs)
    assert torch.equal(*states)


def test_gradient_is_refused() -> None:
    tensors = by_heads()
    tensors["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        longspan.selective_state_update(**tensors)
    with torch.no_grad():
        longspan.selective_state_update(**tensors)


@pytest.mark.parametrize(
    ("change", "kind", "parts"),
    [
        ({"state": torch.zeros(3, 4)}, ValueError, ["state", "(3, 4)"]),
        ({"state": torch.zeros(2, 4, 20, 16).double()}, ValueError, ["state", "3", "2"]),
        ({"x": torch.zeros(3, 4, 21).double()}, ValueError, ["x", "20", "21"]),
        ({"x": torch.zeros(3, 4, 20)}, TypeError, ["state", "float64"]),
        ({"A": torch.zeros(4, 20).double()}, ValueError, ["A", "(4, 20)"]),
        ({"B": torch.zeros(3, 3, 16).double()}, ValueError, ["C", "3", "2"]),
        ({"D": torch.zeros(20).double()}, ValueError, ["D", "(20,)"]),
        (
            {"state_batch_indices": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            ["state_batch_indices"],
        ),
    ],
)
def test_wrong_arguments(change: Inputs, kind: type[Exception], parts: list[str]) -> None:
    call: dict[str, Tensor] = by_heads() | change
    assert_raises(
        kind, ["selective_state_update", *parts], lambda: longspan.selective_state_update(**call)
    )


def test_index_beyond_the_states() -> None:
    with pytest.raises(RuntimeError, match="state_batch_indices"):
        longspan.selective_state_update(**by_heads(), state_batch_indices=torch.tensor([0, 1, 3]))
