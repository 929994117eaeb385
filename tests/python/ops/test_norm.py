"""`longspan.rms_norm_gated` computes what the reference computes in double."""

from typing import Any

import pytest
import torch
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_same_bits,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    results,
    to,
)
from torch import Tensor

import longspan
from longspan.reference import norm as reference

CASES = [
    (shape, group, before, gate, bias)
    for shape, group in (
        ((3, 4, 48), None),
        ((5, 48), 12),
        ((7,), 1),
        ((2, 3, 130), 65),
        ((1, 1), None),
        ((33, 8), 8),
    )
    for before in (False, True)
    for gate, bias in ((True, True), (True, False), (False, True))
]


def tensors(shape: tuple[int, ...], gate: bool = True, bias: bool = True) -> dict[str, Tensor]:
    made = {"x": torch.randn(shape), "weight": torch.randn(shape[-1:])}
    if bias:
        made["bias"] = torch.randn(shape[-1:])
    if gate:
        made["z"] = torch.randn(shape)
    return {name: x.double() for name, x in made.items()}


def with_options(function: Any, **options: Any) -> Any:
    return lambda **kw: function(**kw, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_options(isa: str, dtype: torch.dtype) -> None:
    for shape, group, before, gate, bias in CASES:
        given = tensors(shape, gate, bias)
        options = {"group_size": group, "norm_before_gate": before}
        # A group of one has rms 1: with it gradients are eps-sized differences of terms of size 1.
        assert_agree(
            results(with_options(longspan.rms_norm_gated, **options), to(dtype, given)),
            results(
                with_options(reference.rms_norm_gated, **options), to(torch.float64, to(dtype, given))
            ),
            {"d x": 16, "d z": 16, "d weight": 100, "d bias": 100},
        )


def test_more_rows_than_tasks() -> None:
    given = tensors((3, 501, 24))
    assert_agree(
        results(longspan.rms_norm_gated, given),
        results(reference.rms_norm_gated, given),
        {"d weight": 1503, "d bias": 1503},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("before", [False, True])
def test_half_precisions(isa: str, dtype: torch.dtype, before: bool) -> None:
    def plain(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor) -> Tensor:
        gate = torch.nn.functional.silu(z)
        v = x if before else x * gate
        y = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5) * weight + bias
        return y * gate if before else y

    ours = with_options(longspan.rms_norm_gated, norm_before_gate=before)
    assert_error_ratio(ours, plain, tensors((40, 96)), dtype)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group", [None, 3])
@pytest.mark.parametrize("gate", [False, True])
def test_gradcheck(before: bool, group: int | None, gate: bool) -> None:
    names, leaves = zip(*((k, v.requires_grad_()) for k, v in tensors((2, 2, 6), gate).items()))
    call = with_options(longspan.rms_norm_gated, norm_before_gate=before, group_size=group, eps=0.1)
    assert torch.autograd.gradcheck(lambda *args: call(**dict(zip(names, args))), leaves)


def test_strides_and_threads_change_nothing() -> None:
    given = to(torch.float32, tensors((3, 40, 24)))
    assert_strides_change_nothing(longspan.rms_norm_gated, given, ["x", "z"])
    many = to(torch.float32, tensors((700, 40)))
    assert_threads_change_nothing(lambda: results(longspan.rms_norm_gated, many))


def test_empty_tiny_and_huge() -> None:
    assert longspan.rms_norm_gated(torch.zeros(0, 8), torch.ones(8)).shape == (0, 8)
    found = results(longspan.rms_norm_gated, {"x": torch.zeros(0, 8), "weight": torch.ones(8)})
    assert torch.equal(found["d weight"], torch.zeros(8))
    out = longspan.rms_norm_gated(torch.zeros(2, 8), torch.ones(8), z=torch.full((2, 8), -1e4))
    assert torch.equal(out, torch.zeros(2, 8))
    x = torch.full((1, 4), 1e18)
    assert torch.allclose(longspan.rms_norm_gated(x, torch.ones(4)), torch.ones(1, 4))


def test_opcheck_compile_and_export(fresh_compiler: None) -> None:
    given = to(torch.float32, tensors((6, 24)))
    for wanted in (False, True):
        x, weight, bias, z = (v.detach().clone().requires_grad_(wanted) for v in given.values())
        for options in ((1e-5, 24, False), (1e-5, 8, True)):
            torch.library.opcheck(
                torch.ops.longspan.rms_norm_gated_forward, (x, weight, bias, z, *options)
            )
            torch.library.opcheck(
                torch.ops.longspan.rms_norm_gated_forward, (x, weight, None, None, *options)
            )
    backward = (given["x"], *given.values(), torch.rand(6, 3), 1e-5, 8, True)
    torch.library.opcheck(torch.ops.longspan.rms_norm_gated_backward, backward)

    given = to(torch.float32, tensors((2, 3, 24)))
    compiled = torch.compile(longspan.rms_norm_gated, fullgraph=True)
    assert_same_bits(results(compiled, given), results(longspan.rms_norm_gated, given))

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, z: Tensor) -> Tensor:
            return longspan.rms_norm_gated(x, weight, z=z)

    x, weight, z = given["x"], given["weight"], given["z"]
    program = torch.export.export(Module(), (x, weight, z))
    assert torch.equal(program.module()(x, weight, z), longspan.rms_norm_gated(x, weight, z=z))


def test_autocast_leaves_everything() -> None:
    given = to(torch.float32, tensors((6, 24)))
    with torch.autocast("cpu", torch.bfloat16):
        assert longspan.rms_norm_gated(**given).dtype == torch.float32
    mixed = {name: x.bfloat16() if name in ("x", "z") else x for name, x in given.items()}
    found = results(longspan.rms_norm_gated, mixed)
    assert found["out"].dtype == torch.bfloat16
    assert found["d weight"].dtype == torch.float32


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.randn(2, 6), torch.ones(6)
    norm = longspan.rms_norm_gated
    assert_raises(TypeError, ["x", "tensor"], lambda: norm(None, weight))
    assert_raises(TypeError, ["x", "int64"], lambda: norm(x.long(), weight))
    assert_raises(ValueError, ["x", "at least one dimension"], lambda: norm(torch.tensor(1.0), weight))
    assert_raises(ValueError, ["weight", "(6)", "(5,)"], lambda: norm(x, torch.ones(5)))
    assert_raises(TypeError, ["bias", "float32", "float16"], lambda: norm(x, weight, weight.half()))
    assert_raises(ValueError, ["z", "x's shape", "(2, 5)"], lambda: norm(x, weight, z=torch.ones(2, 5)))
    assert_raises(TypeError, ["z", "x's dtype"], lambda: norm(x, weight, z=x.double()))
    assert_raises(ValueError, ["group_size", "divisor of 6", "4"], lambda: norm(x, weight, group_size=4))
    assert_raises(ValueError, ["group_size", "0"], lambda: norm(x, weight, group_size=0))
    out = norm(x.requires_grad_(), weight).sum()
    (once,) = torch.autograd.grad(out, x, create_graph=True)
    assert_raises(RuntimeError, ["second derivative"], lambda: once.sum().backward())
