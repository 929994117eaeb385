"""selective_scan against the step-by-step reference in double, and against itself."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_same_bits,
    assert_threads_change_nothing,
    results,
    to,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import longspan
from longspan import _C
from longspan.reference import selective_scan as reference

OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def inputs(
    batch: int = 2,
    channels: int = 20,
    states: int = 16,
    steps: int = 70,
    *,
    groups: int = 1,
    constant: str = "",
    without: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Steps of about softplus(-1) and A of about -1; ``constant`` names B and C that do not vary."""
    made = {
        "u": torch.randn(batch, channels, steps),
        "delta": torch.randn(batch, channels, steps) - 1,
        "A": -torch.rand(channels, states) - 0.1,
        **{
            name: torch.randn(channels, states)
            if name in constant
            else torch.randn(batch, groups, states, steps)
            for name in "BC"
        },
        "D": torch.randn(channels),
        "z": torch.randn(batch, channels, steps),
        "delta_bias": torch.randn(channels),
        "initial_state": torch.randn(batch, channels, states),
    }
    return {name: x.to(dtype) for name, x in made.items() if name not in without}


def ours(**tensors: Any) -> Any:
    return longspan.selective_scan(**tensors, delta_softplus=True, return_final_state=True)


def plain(**tensors: Any) -> Any:
    return reference.selective_scan(**tensors, delta_softplus=True)


def assert_is_reference(tensors: dict[str, Tensor]) -> None:
    expected = results(plain, to(torch.float64, tensors))
    terms = {f"d {n}": tensors["u"].shape[0] * tensors["u"].shape[2] for n in tensors}
    assert_agree(results(ours, tensors), expected, terms)


@pytest.mark.parametrize("steps", [1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 129, 1000])
def test_lengths(steps: int) -> None:
    assert_is_reference(inputs(1, 5, 4, steps))


@pytest.mark.parametrize("states", [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 21, 64, 130])
def test_numbers_of_states(states: int) -> None:
    assert_is_reference(inputs(1, 3, states, 40))


@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 33, 300])
def test_numbers_of_channels(channels: int) -> None:
    assert_is_reference(inputs(2, channels, 4, 35))


@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_instruction_set(isa: str, constant: str, dtype: torch.dtype) -> None:
    assert_is_reference(inputs(1, 18, 21, 50, constant=constant, dtype=dtype))


@pytest.mark.parametrize("groups", [2, 5, 20])
def test_groups(groups: int) -> None:
    assert_is_reference(inputs(groups=groups))


@pytest.mark.parametrize("name", OPTIONAL)
def test_without(name: str) -> None:
    assert_is_reference(inputs(without=(name,)))


def test_without_any_option() -> None:
    tensors = inputs(without=OPTIONAL)
    tensors["delta"] = F.softplus(tensors["delta"])
    expected = results(reference.selective_scan, tensors)
    found = results(lambda **kw: longspan.selective_scan(**kw, return_final_state=True), tensors)
    assert_agree(found, expected)


@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 20, 20, 80))),
    constant=st.sampled_from(["", "B", "C", "BC"]),
    without=st.sets(st.sampled_from(OPTIONAL)),
)
def test_any_shape(shape: tuple[int, int, int, int], constant: str, without: set[str]) -> None:
    assert_is_reference(inputs(*shape, constant=constant, without=tuple(without)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    # The output and all gradients; the state is in float32 for both sides and judged below.
    tensors = inputs(1, 20, 8, 100, dtype=torch.float32)
    assert_error_ratio(lambda **kw: ours(**kw)[0], lambda **kw: plain(**kw)[0], tensors, dtype)


def test_half_precision_beside_float32() -> None:
    tensors = inputs(dtype=torch.float32)
    for name in ("u", "delta", "B", "C", "z"):
        tensors[name] = tensors[name].bfloat16()
    found = results(ours, tensors)
    assert found["out"].dtype == torch.bfloat16
    assert found["d A"].dtype == found["out 1"].dtype == torch.float32
    expected = results(plain, to(torch.float64, tensors))
    assert float((found["out 1"] - expected["out 1"]).abs().max()) < 1e-5
    assert float((found["out"] - expected["out"]).abs().max()) < 2**-8 * float(
        expected["out"].abs().max()
    )


def complex_inputs(constant: str) -> dict[str, Tensor]:
    tensors = inputs(1, 10, 3, 37, constant=constant)
    for name in ("A", "B", "C", "initial_state"):
        tensors[name] = torch.complex(tensors[name], 3 * torch.randn_like(tensors[name]))
    return tensors


@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
def test_complex(isa: str, constant: str) -> None:
    tensors = complex_inputs(constant)
    leaves = [{n: x.clone().requires_grad_() for n, x in tensors.items()} for _ in range(2)]
    for f, kw in zip((ours, plain), leaves):
        out, state = f(**kw)
        (out.sum() + (state * (1 + 2j)).real.sum()).backward()
    for name, x in leaves[0].items():
        torch.testing.assert_close(x.grad, leaves[1][name].grad, msg=lambda m, n=name: f"d {n}: {m}")
    for a, b in zip(ours(**tensors), plain(**tensors)):
        torch.testing.assert_close(a, b)


def test_complex_in_pairs_along_time() -> None:
    tensors = complex_inputs("")
    pairs = {n: torch.view_as_real(tensors[n]).flatten(-2) for n in "BC"}
    assert torch.equal(ours(**tensors)[0], ours(**tensors | pairs)[0])
    assert torch.equal(ours(**tensors)[0], ours(**tensors | {n: x[:, 0] for n, x in pairs.items()})[0])


@pytest.mark.parametrize("constant", ["", "BC"])
def test_gradcheck(constant: str) -> None:
    tensors = inputs(1, 3, 2, 5, constant=constant)
    names = list(tensors)
    values = tuple(x.requires_grad_() for x in tensors.values())
    assert torch.autograd.gradcheck(lambda *xs: ours(**dict(zip(names, xs))), values)


def test_gradcheck_complex() -> None:
    tensors = complex_inputs("B")
    tensors = {n: x[..., :4] if n in ("u", "delta", "z", "C") else x for n, x in tensors.items()}
    names = list(tensors)
    values = tuple(x.contiguous().requires_grad_() for x in tensors.values())
    assert torch.autograd.gradcheck(lambda *xs: ours(**dict(zip(names, xs))), values, fast_mode=True)


# Identities of the recurrence


def slice_time(tensors: dict[str, Tensor], steps: slice) -> dict[str, Tensor]:
    varying = ("u", "delta", "z", "B", "C")
    return {n: x[..., steps] if n in varying and x.dim() > 2 else x for n, x in tensors.items()}


@pytest.mark.parametrize("at", [0, 1, 32, 50, 70])
def test_carried_state_is_one_call(at: int) -> None:
    tensors = inputs()
    out, state = ours(**tensors)
    first, middle = ours(**slice_time(tensors, slice(0, at)))
    second, last = ours(**slice_time(tensors, slice(at, None)) | {"initial_state": middle})
    torch.testing.assert_close(torch.cat([first, second], -1), out)
    torch.testing.assert_close(last, state)


def test_decoding_step_by_step_is_the_scan() -> None:
    tensors = inputs()
    out, last = ours(**tensors)
    state = tensors["initial_state"].clone()
    for t in range(out.shape[-1]):
        y = longspan.selective_state_update(
            state, tensors["u"][..., t], tensors["delta"][..., t], tensors["A"],
            tensors["B"][:, 0, :, t], tensors["C"][:, 0, :, t], tensors["D"], tensors["z"][..., t],
            tensors["delta_bias"], True,
        )  # fmt: skip
        torch.testing.assert_close(y, out[..., t])
    torch.testing.assert_close(state, last)


def test_no_decay_is_a_cumulative_sum() -> None:
    u, b = torch.randn(1, 4, 5000), torch.randn(1, 1, 1, 5000)
    ones = torch.ones(1, 4, 5000)
    out = longspan.selective_scan(u, ones, torch.zeros(4, 1), b, torch.ones(4, 1))
    torch.testing.assert_close(out, (u.double() * b[:, 0]).cumsum(-1).float(), rtol=1e-5, atol=2e-4)


def test_steps_of_zero_keep_the_state() -> None:
    tensors = inputs(without=("delta_bias",))
    tensors["delta"] = torch.zeros_like(tensors["delta"])
    _, last = longspan.selective_scan(**tensors, return_final_state=True)
    assert torch.equal(last, tensors["initial_state"])


def test_time_invariant_scan_is_a_convolution() -> None:
    steps, step, a, b, c = 200, 0.1, -0.7, 1.3, 0.4
    u = torch.randn(1, 1, steps, dtype=torch.float64)
    kernel = c * torch.exp(step * a * torch.arange(steps, dtype=torch.float64)) * step * b
    expected = F.conv1d(F.pad(u, (steps - 1, 0)), kernel.flip(0)[None, None])
    one = torch.ones(1, 1, dtype=torch.float64)
    out = longspan.selective_scan(u, torch.full_like(u, step), a * one, b * one, c * one)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_steps_and_decays(isa: str, dtype: torch.dtype) -> None:
    tensors = inputs(1, 8, 4, 40, dtype=dtype)
    tensors["delta"][:, 0] = 1e4
    tensors["delta"][:, 1] = -200.0
    tensors["delta"][:, 2] = 20.0
    tensors["A"][3:5] = -1e6
    tensors["A"][5] = -1e-9
    tensors["delta"][:, 6, 5] = 1e37 if dtype == torch.float32 else 1e300
    tensors["A"][6] = -100.0
    out, state = ours(**tensors)
    want, want_state = plain(**to(torch.float64, tensors))
    torch.testing.assert_close(out, want.to(dtype), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, want_state.to(dtype), rtol=1e-4, atol=1e-4)


def test_growth_overflows_to_infinity_as_torch() -> None:
    one = torch.ones(1, 1)
    out = longspan.selective_scan(
        one[None] * 1.0, 200 * one[None], one, one, one, initial_state=one[None]
    )
    assert out.item() == torch.inf


@pytest.mark.parametrize("name", ["delta", "B", "C"])
def test_nan_stays_in_its_channel_and_later(name: str) -> None:
    tensors = inputs(1, 20, 4, 40, dtype=torch.float32)
    tensors["u"][:, 3, 10] = torch.nan
    out, _ = ours(**tensors)
    assert out[:, 3, 10:].isnan().all()
    assert out[:, 3, :10].isfinite().all()
    assert out[:, [0, 1, 2, *range(4, 20)]].isfinite().all()


# Threads, layouts, packing


@pytest.mark.parametrize(
    "shape", [(1, 40, 16, 300), (1, 3, 16, 3000), (1, 3, 2, 3000), (3, 2, 4, 2000), (20, 5, 4, 30)]
)
def test_threads(shape: tuple[int, int, int, int]) -> None:
    tensors = inputs(*shape, dtype=torch.float32)
    assert_threads_change_nothing(lambda: results(ours, tensors))


@pytest.mark.parametrize("states", [2, 5, 16])
@pytest.mark.parametrize("constant", ["", "BC"])
def test_time_in_pieces(states: int, constant: str) -> None:
    assert_is_reference(inputs(1, 2, states, 2500, constant=constant))


def moved(x: Tensor) -> dict[str, Tensor]:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    wide[..., ::2] = x
    return {
        "last two exchanged": x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "every other": wide[..., ::2],
        "offset": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }


@pytest.mark.parametrize("name", ["u", "delta", "z", "A", "B", "C", "initial_state"])
def test_strides_change_nothing(name: str) -> None:
    tensors = inputs(dtype=torch.float32)
    expected = results(ours, tensors)
    for what in moved(tensors[name]):
        found = results(lambda w=what, **kw: ours(**kw | {name: moved(kw[name])[w]}), tensors)
        assert_same_bits(found, expected, f"with {name}: {what}")


def test_expanded_inputs() -> None:
    tensors = inputs(3, 20, 4, 40)
    tensors["delta"] = tensors["delta"][:1, :1].expand(3, 20, 40)
    tensors["A"] = tensors["A"][:, :1].expand(20, 4)
    dense = {n: x.contiguous() for n, x in tensors.items()}
    for a, b in zip(ours(**tensors), ours(**dense)):
        assert torch.equal(a, b)


def test_output_lies_as_u_does() -> None:
    tensors = inputs()
    tensors["u"] = tensors["u"].transpose(1, 2).contiguous().transpose(1, 2)
    assert ours(**tensors)[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("lengths", [[70], [1, 69], [0, 30, 0, 40, 0], [5] * 14, [600, 1400]])
def test_packed_sequences(lengths: list[int]) -> None:
    total = sum(lengths)
    tensors = inputs(1, 20, 5, total)
    tensors["initial_state"] = torch.randn(len(lengths), 20, 5, dtype=torch.float64)
    cu = torch.tensor([0, *lengths]).cumsum(0)

    def apart(**kw: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            plain(
                **slice_time(kw, slice(int(a), int(b)))
                | {"initial_state": kw["initial_state"][i : i + 1]}
            )
            for i, (a, b) in enumerate(pairwise(cu))
        ]
        return torch.cat([out for out, _ in parts], -1), torch.cat([state for _, state in parts])

    found = results(lambda **kw: ours(**kw, cu_seqlens=cu.int()), tensors)
    assert_agree(found, results(apart, tensors), {f"d {n}": total for n in tensors})


def test_steps_of_no_sequence_are_zero() -> None:
    tensors = inputs(1, 3, 4, 50, without=("initial_state",))
    found = results(lambda **kw: ours(**kw, cu_seqlens=torch.tensor([10, 40])), tensors)
    for name in ("out", "d u", "d delta", "d z", "d B", "d C"):
        assert not found[name][..., :10].any()
        assert not found[name][..., 40:].any()
        assert found[name][..., 10:40].any()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 4, 0), (2, 0, 4, 5)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    tensors = inputs(*shape)
    found = results(ours, tensors)
    assert found["out"].shape == tensors["u"].shape
    assert not found["d A"].any()
    if shape[0]:
        assert torch.equal(found["out 1"], tensors["initial_state"])


# torch's machinery


def test_opcheck() -> None:
    tensors = inputs(1, 3, 4, 40, dtype=torch.float32)
    tensors = {n: x.requires_grad_() for n, x in tensors.items()}
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    args = (*(tensors[n] for n in names), None, True, True)
    torch.library.opcheck(torch.ops.longspan.selective_scan_forward.default, args)


def test_compiles_whole(fresh_compiler: None) -> None:
    tensors = inputs(1, 3, 4, 40, dtype=torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_agree(results(compiled, tensors), results(ours, tensors))


def test_exports() -> None:
    class Scan(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return longspan.selective_scan(u, delta, A, B, C)

    tensors = inputs(1, 3, 4, 40, without=OPTIONAL, dtype=torch.float32)
    program = torch.export.export(Scan(), tuple(tensors.values()))
    assert torch.equal(program.module()(*tensors.values()), Scan()(*tensors.values()))


def test_autocast_leaves_dtypes_alone() -> None:
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = ours(**tensors)
    assert torch.equal(out, ours(**tensors)[0])
    assert state.dtype == torch.float32


def test_checkpointing_and_meta() -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = inputs(dtype=torch.float32)
    names = list(tensors)
    replayed = results(
        lambda **kw: checkpoint(
            lambda *xs: ours(**dict(zip(names, xs))), *kw.values(), use_reentrant=False
        ),
        tensors,
    )
    assert_same_bits(replayed, results(ours, tensors))
    out, state = ours(**{n: x.to("meta") for n, x in tensors.items()})
    assert out.shape == (2, 20, 70)
    assert state.shape == (2, 20, 16)


def test_no_second_derivative() -> None:
    tensors = {n: x.requires_grad_() for n, x in inputs().items()}
    (du,) = torch.autograd.grad(ours(**tensors)[0].sum(), tensors["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        du.sum().backward()


def test_scratch_is_linear_and_states_are_kept_at_chunks_only() -> None:
    channels, states = 1536, 16
    words = {}
    for steps in (1024, 2048):
        tensors = inputs(1, channels, states, steps, dtype=torch.float32)
        _C.scratch_reset_peak()
        results(ours, tensors)
        words[steps] = _C.scratch_peak() / 4
    assert words[2048] < 2.1 * words[1024]
    assert words[2048] < channels * 2048 / 2
    kept = torch.ops.longspan.selective_scan_forward(
        *(tensors[n] for n in ("u", "delta", "A", "B", "C")), None, None, None, None, None, False, True
    )[2]
    assert kept.numel() <= channels * 2048 / 2


@pytest.mark.parametrize(
    ("change", "kind", "parts"),
    [
        ({"u": 3}, TypeError, ["u", "expected a tensor", "int"]),
        ({"u": torch.zeros(2, 20)}, ValueError, ["u", "(batch, channels, steps)", "(2, 20)"]),
        ({"u": torch.zeros(2, 20, 70, dtype=torch.int64)}, TypeError, ["u", "int64"]),
        ({"delta": torch.zeros(2, 20, 71)}, ValueError, ["delta", "70", "71"]),
        ({"delta": torch.zeros(2, 20, 70).double()}, TypeError, ["delta", "float64"]),
        ({"A": torch.zeros(16, 20)}, ValueError, ["A", "(channels, states)", "(16, 20)"]),
        ({"B": torch.zeros(2, 15, 70)}, ValueError, ["B", "16", "15"]),
        ({"B": torch.zeros(2, 3, 16, 70)}, ValueError, ["B", "divide", "20", "3"]),
        ({"C": torch.zeros(2, 2, 16, 70)}, ValueError, ["C", "B's groups"]),
        ({"C": torch.zeros(2, 16, 70, dtype=torch.complex64)}, TypeError, ["C", "real"]),
        ({"D": torch.zeros(19)}, ValueError, ["D", "20", "19"]),
        ({"z": torch.zeros(2, 20, 7)}, ValueError, ["z", "70", "7"]),
        ({"delta_bias": torch.zeros(20, 1)}, ValueError, ["delta_bias", "(20, 1)"]),
        ({"initial_state": torch.zeros(1, 20, 16)}, ValueError, ["initial_state", "2", "1"]),
        ({"cu_seqlens": torch.tensor([0, 70])}, ValueError, ["cu_seqlens", "batch of 1", "2"]),
        ({"cu_seqlens": torch.tensor([0.0])}, TypeError, ["cu_seqlens", "int32"]),
    ],
)
def test_wrong_arguments(change: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    tensors: dict[str, Any] = inputs(dtype=torch.float32)
    assert_raises(kind, ["selective_scan", *parts], lambda: longspan.selective_scan(**tensors | change))


@pytest.mark.parametrize("cu", [[0, 71], [-1, 70], [0, 40, 30, 70]])
def test_wrong_offsets(cu: list[int]) -> None:
    tensors = inputs(1, without=("initial_state",))
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        ours(**tensors, cu_seqlens=torch.tensor(cu))
