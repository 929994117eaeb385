"""`longspan.delta_rule` under torch's machinery, and what it says to wrong arguments."""

import sys
from typing import Any

import pytest
import torch
from checks import assert_agree, assert_raises, assert_same_bits, results, to
from delta_rule_oracle import actual, tensors
from torch import Tensor

import longspan
from longspan import _C


def call(**kw: Any) -> tuple[Tensor, ...]:
    out, state = actual(**kw)
    return out * 2, state


def given_in_float(*shape: int, **options: Any) -> dict[str, Tensor]:
    return to(torch.float32, tensors(*(shape or (1, 300, 2, 4, 8, 16)), **options))


@pytest.mark.parametrize("gate", [False, True])
def test_opcheck(gate: bool) -> None:
    made = given_in_float(gate=gate)
    q, k, v = (made[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv")
    rest = (made["beta"], made.get("gate"), made["initial_state"])
    forward = torch.ops.longspan.delta_rule_forward
    for wanted in (False, True):
        leaves = [x if x is None else x.detach().requires_grad_(wanted) for x in (q, k, v, *rest)]
        torch.library.opcheck(forward, (*leaves, None, 0.3, True, False))
    packed = (q, k, v, *rest[:2], None, torch.tensor([0, 100, 300]), 0.3)
    torch.library.opcheck(forward, (*packed, False, True))
    inputs = (q, k, v, *rest, None, 0.3)
    out, state, boundaries = forward(*inputs, True, True)
    torch.library.opcheck(torch.ops.longspan.delta_rule_backward, (out, state, boundaries, *inputs))
    inputs = (q, k, v, *rest[:2], None, None, 0.3)
    torch.library.opcheck(torch.ops.longspan.delta_rule_backward, (out, None, boundaries, *inputs))


def test_compile(fresh_compiler: None) -> None:
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (300, 40):
        given = tensors(1, tokens, 2, 4, 8, 16)
        assert_agree(results(compiled, given), results(call, given))


def test_compile_with_inductor(fresh_compiler: None) -> None:
    given = tensors(1, 300, 2, 2, 8, 16, states=False)
    compiled = torch.compile(lambda **kw: longspan.delta_rule(**kw).sin(), fullgraph=True)
    want = results(lambda **kw: longspan.delta_rule(**kw).sin(), given)
    assert_agree(results(compiled, given), want, {"d gate": 2400})


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
            return longspan.delta_rule(q, k, v, beta, gate=gate)

    tokens = torch.export.Dim("tokens", min=2)
    arguments = tuple(given_in_float(states=False).values())
    program = torch.export.export(Module(), arguments, dynamic_shapes=({2: tokens},) * 5)
    assert "longspan.delta_rule_forward" in str(program.graph)
    longer = tuple(given_in_float(1, 517, 2, 4, 8, 16, states=False).values())
    assert torch.equal(program.module()(*longer), Module()(*longer))


def test_checkpointing_changes_nothing() -> None:
    def again(**kw: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(lambda: call(**kw), use_reentrant=False)

    given = given_in_float()
    assert_same_bits(results(again, given), results(call, given))


def test_vmap_equals_a_batch() -> None:
    given = given_in_float(3, 40, 2, 4, 8, 5, states=False)
    rows = [x.unsqueeze(1) for x in given.values()]
    found = torch.func.vmap(lambda q, k, v, b, g: longspan.delta_rule(q, k, v, b, gate=g))(*rows)
    assert torch.equal(found.squeeze(1), longspan.delta_rule(**given))


def test_autocast_casts_what_the_products_read() -> None:
    given = given_in_float()
    with torch.autocast("cpu", torch.bfloat16):
        out, state = call(**given)
        mixed = call(**given | {"v": given["v"].bfloat16()})
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    rounded = given | {k: given[k].bfloat16() for k in "qkv"}
    assert_same_bits(dict(zip("01", mixed)), {"0": out, "1": state})
    assert_same_bits({"0": out, "1": state}, dict(zip("01", call(**rounded))))
    found = results(call, rounded)
    assert {found[f"d {k}"].dtype for k in ("beta", "gate", "initial_state")} == {torch.float32}


def test_beta_and_gate_in_a_half_precision_have_gradients_in_it() -> None:
    given = to(torch.bfloat16, tensors())
    found = results(call, given)
    assert {x.dtype for name, x in found.items() if name != "out 1"} == {torch.bfloat16}
    assert found["out 1"].dtype == torch.float32


def test_states_between_spans_are_kept_for_a_gradient_alone() -> None:
    given = given_in_float(states=False)
    with torch.no_grad():
        assert longspan.delta_rule(**given).grad_fn is None
    leaves = {k: x.requires_grad_() for k, x in given.items()}
    kept = [x for x in longspan.delta_rule(**leaves).grad_fn.saved_tensors if x is not None]
    assert any(x.shape == (2, 4, 8, 16) for x in kept)  # one boundary in 300 tokens, and one to spare
    assert not any(x.shape == (1, 4, 300, 16) and x is not leaves["v"] for x in kept)  # and no output


@pytest.mark.parametrize("heads", [1, 8])
def test_scratch_is_linear_in_the_tokens(heads: int) -> None:
    def peak(tokens: int) -> int:
        given = given_in_float(1, tokens, heads, heads, 16, 16, states=False)
        _C.scratch_reset_peak()
        before = _C.scratch_peak()
        results(longspan.delta_rule, given)
        return _C.scratch_peak() - before

    peak(256)
    small, large = peak(4096), peak(16384)
    assert large < 4.2 * small
    if heads == 8:
        assert large == small
    else:  # two triangles of 32 a token, and a state in 256
        assert large - small == 12288 * 4 * (64 + 1)


def test_meta_tensors_give_shapes() -> None:
    given = {k: x.to("meta") for k, x in given_in_float(states=False).items()}
    out, state = longspan.delta_rule(**given, return_final_state=True)
    assert out.shape == (1, 4, 300, 16)
    assert state.shape == (1, 4, 8, 16)


def test_devices_without_kernels_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors(1, 40, 2, 4, 8, 5, sequences=2)
    options = {"cu_seqlens": torch.tensor([0, 15, 40])}
    want = results(lambda **kw: actual(**kw, **options), given)
    # The module is named in full: `longspan.ops.delta_rule` is the function.
    module = sys.modules["longspan.ops.delta_rule"]
    monkeypatch.setattr(module, "has_kernels", lambda *_: False)
    assert_agree(results(lambda **kw: actual(**kw, **options), given), want)


def test_wrong_arguments_are_named() -> None:
    given = given_in_float(2, 10, 2, 4, 8, 16, states=False)

    def fails(kind: type[Exception], *parts: str, **change: Any) -> None:
        call = given | change
        assert_raises(kind, ["delta_rule", *parts], lambda: longspan.delta_rule(**call))

    q, k, v, beta, gate = given.values()
    state = torch.zeros(2, 4, 8, 16)
    fails(TypeError, "q", "tensor", "NoneType", q=None)
    fails(TypeError, "q", "int64", q=q.long())
    fails(ValueError, "q", "(batch, heads, tokens, key channels)", q=q[0])
    fails(TypeError, "k", "q's dtype", "bfloat16", k=k.bfloat16())
    fails(ValueError, "k", "q's shape", "(2, 2, 10, 8)", "(2, 2, 10, 7)", k=k[..., :7])
    fails(ValueError, "v", "(2, any, 10, any)", "(2, 4, 9, 16)", v=v[:, :, :9])
    fails(ValueError, "v", "multiple of q's 2 heads", "3", v=v[:, :3])
    fails(ValueError, "v", "multiple of q's 2 heads", "1", v=v[:, :1])
    fails(TypeError, "beta", "tensor", "NoneType", beta=None)
    fails(TypeError, "beta", "float32", "float64", beta=beta.double())
    fails(ValueError, "beta", "(2, 4, 10)", "(2, 2, 10)", beta=beta[:, :2])
    fails(TypeError, "gate", "float32", "float64", gate=gate.double())
    fails(ValueError, "gate", "(2, 4, 10)", "(2, 4, 10, 8)", gate=torch.zeros(2, 4, 10, 8))
    fails(ValueError, "initial_state", "(2, 4, 8, 16)", "(1, 4, 8, 16)", initial_state=state[:1])
    fails(TypeError, "initial_state", "int64", initial_state=state.long())
    fails(ValueError, "q", "batch of 1", "2", cu_seqlens=torch.tensor([0, 10]))
    one = {name: x[:1] for name, x in given.items()}
    fails(TypeError, "cu_seqlens", "int32 or int64", **one, cu_seqlens=torch.zeros(2))
    fails(ValueError, "cu_seqlens", "at least 2", **one, cu_seqlens=torch.tensor([0]))
    fails(RuntimeError, "cu_seqlens", "10", **one, cu_seqlens=torch.tensor([0, 9]))
    fails(RuntimeError, "cu_seqlens", "not to decrease", **one, cu_seqlens=torch.tensor([0, 7, 5, 10]))


def test_second_and_forward_derivatives_raise() -> None:
    q, k, v, beta, _ = given_in_float(1, 30, 2, 2, 8, 8, states=False).values()
    q.requires_grad_()
    (once,) = torch.autograd.grad(longspan.delta_rule(q, k, v, beta).sum(), q, create_graph=True)
    assert_raises(RuntimeError, ["second derivative"], lambda: once.sum().backward())
    given = (q, k, v, beta)
    assert_raises(RuntimeError, ["jvp"], lambda: torch.func.jvp(longspan.delta_rule, given, given))
