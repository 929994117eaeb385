"""`longspan.ssd` under torch's machinery, and what it says to wrong arguments."""

from typing import Any

import torch
from checks import assert_agree, assert_raises, assert_same_bits, results
from torch import Tensor

import longspan
from longspan import _C


def tensors(batch: int = 1, length: int = 300, heads: int = 2) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch, length, heads, 8),
        "dt": torch.randn(batch, length, heads),
        "A": -torch.rand(heads),
        "B": torch.randn(batch, length, 1, 16),
        "C": torch.randn(batch, length, 1, 16),
        "D": torch.randn(heads),
        "z": torch.randn(batch, length, heads, 8),
        "dt_bias": torch.randn(heads),
        "initial_states": torch.randn(batch, heads, 8, 16),
    }


def call(**kw: Any) -> tuple[Tensor, Tensor]:
    out, state = longspan.ssd(**kw, dt_softplus=True, return_final_states=True)
    return out * 2, state


def test_opcheck() -> None:
    given = tensors()
    skip = given["D"][:, None].expand(2, 8)
    options = (64, True, 0.0, float("inf"), True, False, False)
    for wanted in (False, True):
        x, dt, A, B, C, _, z, bias, state = (
            v.detach().clone().requires_grad_(wanted) for v in given.values()
        )
        torch.library.opcheck(
            torch.ops.longspan.ssd_forward, (x, dt, A, B, C, skip, z, bias, state, None, None, *options)
        )
        cu = torch.tensor([0, 100, 300])
        torch.library.opcheck(
            torch.ops.longspan.ssd_forward,
            (x, dt, A, B, C, None, None, None, None, None, cu, 16, False, 0.0, 1.0, False, True, False),
        )
    x, dt, A, B, C, _, z, bias, state = given.values()
    *_, boundaries = torch.ops.longspan.ssd_forward(
        x, dt, A, B, C, skip, z, bias, state, None, None, *options[:-1], True
    )
    torch.library.opcheck(
        torch.ops.longspan.ssd_backward,
        (x, state, None, boundaries, x, dt, A, B, C, skip, z, bias, state, None, None, *options[:4]),
    )


def test_compile(fresh_compiler: None) -> None:
    given = tensors()
    assert_agree(
        results(torch.compile(call, fullgraph=True), given),
        {k: v.double() for k, v in results(call, given).items()},
        {"d A": 10000, "d dt_bias": 10000, "d D": 2400},
    )


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return longspan.ssd(x, dt, A, B, C)

    names = ("x", "dt", "A", "B", "C")
    length = torch.export.Dim("length", min=2)
    dynamic = ({1: length}, {1: length}, {}, {1: length}, {1: length})
    program = torch.export.export(Module(), tuple(tensors()[k] for k in names), dynamic_shapes=dynamic)
    longer = tuple(tensors(length=517)[k] for k in names)
    assert torch.equal(program.module()(*longer), longspan.ssd(*longer))


def test_checkpointing_changes_nothing() -> None:
    def again(**kw: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(lambda: call(**kw), use_reentrant=False)

    given = tensors()
    assert_same_bits(results(again, given), results(call, given))


def test_autocast_casts_what_the_products_read() -> None:
    given = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out, state = call(**given)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    rounded = given | {k: given[k].bfloat16() for k in ("x", "B", "C", "z")}
    assert_same_bits(dict(enumerate((out, state))), dict(enumerate(call(**rounded))))  # type: ignore[arg-type]
    found = results(call, rounded)
    assert {k: found[f"d {k}"].dtype for k in ("dt", "A", "D", "dt_bias")} == dict.fromkeys(
        ("dt", "A", "D", "dt_bias"), torch.float32
    )


def test_states_between_spans_are_kept_for_a_gradient_alone() -> None:
    given = tensors()
    with torch.no_grad():
        assert call(**given)[0].grad_fn is None
    leaves = {k: v.requires_grad_() for k, v in given.items()}
    kept = [x for x in call(**leaves)[1].grad_fn.saved_tensors if x is not None]
    # One boundary in 300 tokens, and one that is always there.
    assert any(x.shape == (2, 2, 16, 8) for x in kept)


def test_scratch_is_linear_in_the_length() -> None:
    def peak(length: int) -> int:
        given = tensors(length=length)
        _C.scratch_reset_peak()
        before = _C.scratch_peak()
        results(call, given)
        return _C.scratch_peak() - before

    peak(256)
    small, large = peak(4096), peak(16384)
    assert large < 4.2 * small
    values = tensors(length=16384)
    assert large < 16 * sum(x.numel() * 4 for x in values.values())


def test_wrong_arguments_are_named() -> None:
    given = {k: v for k, v in tensors(2, 10).items() if k in ("x", "dt", "A", "B", "C")}

    def fails(kind: type[Exception], *parts: str, **change: Any) -> None:
        assert_raises(kind, parts, lambda: longspan.ssd(**given | change))

    x, B = given["x"], given["B"]
    fails(TypeError, "x", "tensor", "NoneType", x=None)
    fails(TypeError, "x", "int64", x=x.long())
    fails(ValueError, "x", "(batch, length, heads, channels)", x=x[0])
    fails(ValueError, "dt", "(2, 10, 2)", "(2, 10, 3)", dt=torch.randn(2, 10, 3))
    fails(TypeError, "dt", "float32", "float64", dt=given["dt"].double())
    fails(ValueError, "A", "(2)", "(3,)", A=torch.randn(3))
    fails(TypeError, "B", "x's dtype", "bfloat16", B=B.bfloat16())
    fails(ValueError, "B", "divides 2", "3", B=B.repeat(1, 1, 3, 1), C=B.repeat(1, 1, 3, 1))
    fails(ValueError, "C", "B's shape", C=torch.randn(2, 10, 1, 8))
    fails(ValueError, "D", "(heads, channels)", "(2, 7)", D=torch.randn(2, 7))
    fails(ValueError, "z", "x's shape", z=torch.randn(2, 10, 2, 7))
    fails(ValueError, "dt_bias", "(2)", dt_bias=torch.randn(1))
    fails(ValueError, "chunk_size", "64", "100", chunk_size=100)
    fails(ValueError, "dt_limit", "least", dt_limit=(1.0, 0.0))
    fails(
        ValueError,
        "initial_states",
        "(2, 2, 8, 16)",
        "(1, 2, 8, 16)",
        initial_states=torch.zeros(1, 2, 8, 16),
    )
    fails(TypeError, "seq_idx", "int32 or int64", seq_idx=torch.zeros(2, 10))
    fails(ValueError, "seq_idx", "(2, 10)", seq_idx=torch.zeros(2, 9).int())
    fails(ValueError, "return_varlen_states", "cu_seqlens", return_varlen_states=True)
    fails(ValueError, "x", "batch of 1", cu_seqlens=torch.tensor([0, 10]))
    one = {k: v[:1] if v.dim() > 1 else v for k, v in given.items()}
    fails(ValueError, "cu_seqlens", "at least 2", **one, cu_seqlens=torch.tensor([0]))
    fails(RuntimeError, "cu_seqlens", "10", **one, cu_seqlens=torch.tensor([0, 9]))
    fails(RuntimeError, "cu_seqlens", "not to decrease", **one, cu_seqlens=torch.tensor([0, 7, 5, 10]))
    out = longspan.ssd(**given | {"x": x.requires_grad_()}).sum()
    (once,) = torch.autograd.grad(out, x, create_graph=True)
    assert_raises(RuntimeError, ["second derivative"], lambda: once.sum().backward())
