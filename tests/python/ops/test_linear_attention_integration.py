"""`longspan.linear_attention` under torch's machinery, and what it says to wrong arguments."""

import sys
from typing import Any

import pytest
import torch
from checks import assert_agree, assert_raises, assert_same_bits, results, to
from linear_attention_oracle import GATES, actual, tensors
from torch import Tensor

import longspan
from longspan import _C


def call(**kw: Any) -> tuple[Tensor, ...]:
    out, *states = actual(**kw)
    return out * 2, *states


def given_in_float(*shape: int, **options: Any) -> dict[str, Tensor]:
    return to(torch.float32, tensors(*(shape or (1, 300, 2, 1, 8, 16)), **options))


@pytest.mark.parametrize("gate", [*GATES[1:], "none", "not causal"])
@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(gate: str, normalize: bool) -> None:
    causal = gate != "not causal"
    made = given_in_float(gate=gate if causal else "none", positive=True)
    q, k, v = (made[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv")
    gates = made.get("gate")
    if gates is not None and gates.dim() == 1:
        gates = gates.view(1, 2, 1).expand(1, 2, 300)
    norm = made["initial_norm"] if normalize else None
    options = (causal, 0.3, normalize, 1e-3)
    for wanted in (False, True):
        leaves = [
            x if x is None else x.detach().requires_grad_(wanted)
            for x in (q, k, v, gates, made["initial_state"], norm)
        ]
        forward = torch.ops.longspan.linear_attention_forward
        torch.library.opcheck(forward, (*leaves, None, *options, True, False))
    packed = (q, k, v, gates, None, None, torch.tensor([0, 100, 300]), *options)
    torch.library.opcheck(forward, (*packed, False, True))
    inputs = (q, k, v, gates, made["initial_state"], norm, None, *options)
    out, state, z, denominators, boundaries = forward(*inputs, True, True)
    given = (out, state, z if normalize else None, out if normalize else None, denominators, boundaries)
    torch.library.opcheck(torch.ops.longspan.linear_attention_backward, (*given, *inputs))


@pytest.mark.parametrize("normalize", [False, True])
def test_compile(fresh_compiler: None, normalize: bool) -> None:
    def function(**kw: Any) -> tuple[Tensor, ...]:
        return call(**kw, normalize=normalize)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (300, 40):
        given = tensors(1, tokens, 2, 1, 8, 16, gate="channel", positive=True)
        if not normalize:
            del given["initial_norm"]
        assert_agree(results(compiled, given), results(function, given))


def test_compile_with_inductor(fresh_compiler: None) -> None:
    given = tensors(1, 300, 2, 1, 8, 16, gate="head", states=False)
    compiled = torch.compile(lambda **kw: longspan.linear_attention(**kw).sin(), fullgraph=True)
    want = results(lambda **kw: longspan.linear_attention(**kw).sin(), given)
    assert_agree(results(compiled, given), want, {"d gate": 2400})


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
            return longspan.linear_attention(q, k, v, gate=gate)

    tokens = torch.export.Dim("tokens", min=2)
    arguments = tuple(given_in_float(gate="token", states=False).values())
    program = torch.export.export(Module(), arguments, dynamic_shapes=({2: tokens},) * 4)
    assert "longspan.linear_attention_forward" in str(program.graph)
    longer = tuple(given_in_float(1, 517, 2, 1, 8, 16, gate="token", states=False).values())
    assert torch.equal(program.module()(*longer), Module()(*longer))


def test_checkpointing_changes_nothing() -> None:
    def again(**kw: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(lambda: call(**kw, normalize=True), use_reentrant=False)

    given = given_in_float(gate="channel", positive=True)
    assert_same_bits(results(again, given), results(lambda **kw: call(**kw, normalize=True), given))


def test_vmap_equals_a_batch() -> None:
    given = given_in_float(3, 40, 2, 1, 8, 5, gate="token", states=False)
    rows = {k: x.unsqueeze(1) for k, x in given.items()}
    found = torch.func.vmap(lambda q, k, v, gate: longspan.linear_attention(q, k, v, gate=gate))(
        *rows.values()
    )
    assert torch.equal(found.squeeze(1), longspan.linear_attention(**given))


def test_autocast_casts_what_the_products_read() -> None:
    given = given_in_float(gate="token")
    del given["initial_norm"]
    with torch.autocast("cpu", torch.bfloat16):
        out, state = call(**given)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    rounded = given | {k: given[k].bfloat16() for k in "qkv"}
    with torch.autocast("cpu", torch.bfloat16):  # feature maps give float32 beside bfloat16 values
        mixed = call(**given | {"v": given["v"].bfloat16()})
    assert_same_bits(dict(zip("01", mixed)), {"0": out, "1": state})
    assert_same_bits({"0": out, "1": state}, dict(zip("01", call(**rounded))))
    found = results(call, rounded)
    assert {found[f"d {k}"].dtype for k in ("gate", "initial_state")} == {torch.float32}


def test_states_between_spans_are_kept_for_a_gradient_alone() -> None:
    given = given_in_float(states=False)
    with torch.no_grad():
        assert longspan.linear_attention(**given).grad_fn is None
    leaves = {k: x.requires_grad_() for k, x in given.items()}
    kept = [x for x in longspan.linear_attention(**leaves).grad_fn.saved_tensors if x is not None]
    assert any(x.shape == (2, 2, 128) for x in kept)  # one boundary in 300 tokens, and one to spare
    assert not any(x.shape == (1, 2, 300, 16) and x is not leaves["v"] for x in kept)  # and no output


@pytest.mark.parametrize("gate", ["none", "channel", "not causal"])
def test_scratch_is_linear_in_the_tokens(gate: str) -> None:
    causal = gate != "not causal"

    def peak(tokens: int) -> int:
        given = given_in_float(1, tokens, 2, 2, 16, 16, gate=gate if causal else "none", states=False)
        _C.scratch_reset_peak()
        before = _C.scratch_peak()
        results(lambda **kw: longspan.linear_attention(**kw, causal=causal), given)
        return _C.scratch_peak() - before

    peak(256)
    small, large = peak(4096), peak(16384)
    assert large < 4.2 * small
    assert large < 4 * 16384 * 2 * 16 * 4  # of q, k, v and out


def test_meta_tensors_give_shapes() -> None:
    given = {k: x.to("meta") for k, x in given_in_float(gate="channel", states=False).items()}
    out, state = longspan.linear_attention(**given, return_final_state=True)
    assert out.shape == (1, 2, 300, 16)
    assert state.shape == (1, 2, 8, 16)


@pytest.mark.parametrize("normalize", [False, True])
def test_devices_without_kernels_take_the_reference(
    monkeypatch: pytest.MonkeyPatch, normalize: bool
) -> None:
    given = tensors(1, 40, 4, 2, 8, 5, gate="channel", sequences=2, positive=True)
    if not normalize:
        del given["initial_norm"]
    options = {"normalize": normalize, "cu_seqlens": torch.tensor([0, 15, 40])}
    want = results(lambda **kw: actual(**kw, **options), given)
    # The module is named in full: `longspan.ops.linear_attention` is the function.
    module = sys.modules["longspan.ops.linear_attention"]
    monkeypatch.setattr(module, "has_kernels", lambda *_: False)
    assert_agree(results(lambda **kw: actual(**kw, **options), given), want)


def test_wrong_arguments_are_named() -> None:
    given = given_in_float(2, 10, 4, 2, 8, 16, states=False)

    def fails(kind: type[Exception], *parts: str, **change: Any) -> None:
        call = given | change
        assert_raises(kind, ["linear_attention", *parts], lambda: longspan.linear_attention(**call))

    q, k, v = given.values()
    state, z = torch.zeros(2, 4, 8, 16), torch.zeros(2, 4, 8)
    fails(TypeError, "q", "tensor", "NoneType", q=None)
    fails(TypeError, "q", "int64", q=q.long())
    fails(ValueError, "q", "(batch, heads, tokens, key channels)", q=q[0])
    fails(TypeError, "k", "q's dtype", "bfloat16", k=k.bfloat16())
    fails(ValueError, "k", "(2, any, 10, 8)", "(2, 2, 10, 7)", k=k[..., :7])
    fails(ValueError, "k", "10", "(2, 2, 9, 8)", k=k[:, :, :9], v=v[:, :, :9])
    fails(ValueError, "k", "divides q's, 4", "3", k=k[:, [0, 0, 0]], v=v[:, [0, 0, 0]])
    fails(ValueError, "v", "k's shape", "(2, 2, 9, 16)", v=v[:, :, :9])
    fails(TypeError, "gate", "float32", "float64", gate=torch.zeros(4).double())
    fails(ValueError, "gate", "(heads,)", "(4)", "(3,)", gate=torch.zeros(3))
    fails(ValueError, "gate", "(batch, heads, tokens)", "(2, 4, 9)", gate=torch.zeros(2, 4, 9))
    fails(ValueError, "gate", "(2, 4, 10, 8)", "(2, 4, 10, 1)", gate=torch.zeros(2, 4, 10, 1))
    fails(ValueError, "gate", "none without causal", gate=torch.zeros(4), causal=False)
    fails(ValueError, "eps", "0 or more", "-1", eps=-1.0)
    fails(ValueError, "initial_state", "(2, 4, 8, 16)", "(1, 4, 8, 16)", initial_state=state[:1])
    fails(TypeError, "initial_state", "int64", initial_state=state.long())
    fails(TypeError, "initial_state", "tensor", "tuple", initial_state=(state, z))
    fails(TypeError, "initial_state", "pair", initial_state=state, normalize=True)
    fails(ValueError, "initial_state[1]", "(2, 4, 7)", initial_state=(state, z[..., :7]), normalize=True)
    fails(ValueError, "q", "batch of 1", "2", cu_seqlens=torch.tensor([0, 10]))
    one = {name: x[:1] for name, x in given.items()}
    fails(TypeError, "cu_seqlens", "int32 or int64", **one, cu_seqlens=torch.zeros(2))
    fails(ValueError, "cu_seqlens", "at least 2", **one, cu_seqlens=torch.tensor([0]))
    fails(RuntimeError, "cu_seqlens", "10", **one, cu_seqlens=torch.tensor([0, 9]))
    fails(RuntimeError, "cu_seqlens", "not to decrease", **one, cu_seqlens=torch.tensor([0, 7, 5, 10]))


def test_second_and_forward_derivatives_raise() -> None:
    q, k, v = given_in_float(states=False).values()
    q.requires_grad_()
    (once,) = torch.autograd.grad(longspan.linear_attention(q, k, v).sum(), q, create_graph=True)
    assert_raises(RuntimeError, ["second derivative"], lambda: once.sum().backward())
    assert_raises(
        RuntimeError, ["jvp"], lambda: torch.func.jvp(longspan.linear_attention, (q, k, v), (q, k, v))
    )
