"""longspan.compat.mamba_ssm: mamba-ssm's signatures, layouts and return values over our operators."""

import importlib
import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_agree, assert_raises, assert_same_bits, results
from mamba_oracle import mamba, mamba2
from torch import Tensor

import longspan
from longspan.compat.mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from longspan.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from longspan.compat.mamba_ssm.ops.triton.layernorm_gated import RMSNorm as GatedRMSNorm
from longspan.compat.mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from longspan.compat.mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)
from longspan.compat.mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)
from longspan.compat.mamba_ssm.utils.generation import InferenceParams

F64 = torch.float64
_INNER = (
    "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, "
    "A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, "
    "delta_softplus=True, {}b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, "
    "b_c_dt_rms_eps=1e-06"
)
_SCAN = (
    "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
)
SIGNATURES = {
    selective_scan_fn: _SCAN,
    selective_scan_ref: _SCAN,
    mamba_inner_fn: _INNER.format("checkpoint_lvl=1, "),
    mamba_inner_ref: _INNER.format(""),
    selective_state_update: "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
    "state_batch_indices=None",
    mamba_chunk_scan_combined: "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, "
    "initial_states=None, seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), "
    "return_final_states=False, return_varlen_states=False, state_dtype=None",
    mamba_split_conv1d_scan_combined: "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, "
    "initial_states=None, seq_idx=None, dt_limit=(0.0, inf), return_final_states=False, "
    "activation='silu', rmsnorm_weight=None, rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, "
    "headdim=None, ngroups=1, norm_before_gate=True, state_dtype=None",
    rmsnorm_fn: "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True",
}


@pytest.mark.parametrize(("function", "signature"), SIGNATURES.items(), ids=lambda x: str(x)[:40])
def test_signatures(function: Any, signature: str) -> None:
    found = [str(p.replace(annotation=p.empty)) for p in inspect.signature(function).parameters.values()]
    assert ", ".join(found) == signature


def test_layers_are_longspans() -> None:
    package = importlib.import_module("longspan.compat.mamba_ssm")
    assert package.Mamba is package.modules.mamba_simple.Mamba is longspan.nn.Mamba
    assert package.Mamba2 is package.modules.mamba2.Mamba2 is longspan.nn.Mamba2
    assert package.selective_scan_fn is selective_scan_fn
    assert package.mamba_inner_fn is mamba_inner_fn


# ---- Mamba-1


def scan_tensors(is_complex: bool = False, groups: int | None = None) -> dict[str, Tensor]:
    """u (2, 6, 13) and the rest, in double."""
    kind = torch.complex128 if is_complex else F64
    shape = (2, 4, 26 if is_complex else 13) if groups is None else (2, groups, 4, 13)
    A = -torch.rand(6, 4, dtype=F64)
    if is_complex:
        A = torch.complex(A, torch.randn(6, 4, dtype=F64))
    return {
        "u": torch.randn(2, 6, 13, dtype=F64), "delta": torch.randn(2, 6, 13, dtype=F64),
        "A": A.to(kind), "B": torch.randn(shape, dtype=F64), "C": torch.randn(shape, dtype=F64),
        "D": torch.randn(6, dtype=F64), "z": torch.randn(2, 6, 13, dtype=F64),
        "delta_bias": torch.randn(6, dtype=F64),
    }  # fmt: skip


def scan(given: dict[str, Tensor], softplus: bool = True) -> tuple[Tensor, Tensor]:
    """Token by token, in numbers of A's kind."""
    A, (batch, channels, length) = given["A"], given["u"].shape

    def at(x: Tensor, t: int) -> Tensor:
        if x.dim() == 2:
            return x
        if A.is_complex() and x.shape[-1] == 2 * length:
            x = torch.complex(x[..., ::2], x[..., 1::2])
        x = x[:, None] if x.dim() == 3 else x
        return x.repeat_interleave(channels // x.shape[1], 1)[..., t]

    h, outs = torch.zeros(batch, channels, A.shape[1], dtype=A.dtype), []
    for t in range(length):
        step = given["delta"][..., t] + given.get("delta_bias", 0)
        step = F.softplus(step) if softplus else step
        u = given["u"][..., t]
        h = (step[..., None] * A).exp() * h + (step * u)[..., None] * at(given["B"], t)
        y = (h * at(given["C"], t)).sum(-1)
        y = (2 * y.real if y.is_complex() else y) + given["D"] * u
        outs.append(y * F.silu(given["z"][..., t]) if "z" in given else y)
    return torch.stack(outs, -1), h


@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref])
@pytest.mark.parametrize(
    ("is_complex", "groups"),
    [(False, None), (False, 2), (True, None)],
    ids=["real", "groups", "complex"],
)
def test_scan(function: Any, is_complex: bool, groups: int | None) -> None:
    given = scan_tensors(is_complex, groups)
    found = function(**given, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(found, scan(given))
    alone = function(**given, delta_softplus=True)
    assert torch.equal(alone, found[0])
    for name in ("z", "delta_bias"):
        del given[name]
    given["B"] = torch.randn(6, 4, dtype=given["A"].dtype)
    torch.testing.assert_close(function(**given), scan(given, softplus=False)[0])


def test_scan_in_double_with_parameters_in_float() -> None:
    """As transformers calls it after model.double()."""
    given = scan_tensors()
    in_float = {name: x.float() if name in ("A", "D", "delta_bias") else x for name, x in given.items()}
    expected = scan({name: x.double() for name, x in in_float.items()})[0]
    torch.testing.assert_close(selective_scan_fn(**in_float, delta_softplus=True), expected)


def test_last_state_has_a_gradient() -> None:
    def call(function: Any) -> Any:
        return lambda **kw: function(**kw, delta_softplus=True, return_last_state=True)

    given = scan_tensors()
    assert_agree(results(call(selective_scan_fn), given), results(call(selective_scan_ref), given))


def inner_tensors(layer: longspan.nn.Mamba, length: int = 11) -> dict[str, Any]:
    return {
        "xz": layer.in_proj(torch.randn(2, length, layer.d_model, dtype=F64)).detach().transpose(1, 2),
        "conv1d_weight": layer.conv1d.weight.detach(), "conv1d_bias": layer.conv1d.bias.detach(),
        "x_proj_weight": layer.x_proj.weight.detach(),
        "delta_proj_weight": layer.dt_proj.weight.detach(),
        "out_proj_weight": layer.out_proj.weight.detach(), "out_proj_bias": torch.randn(6, dtype=F64),
        "A": -layer.A_log.detach().exp(), "D": layer.D.detach(),
        "delta_bias": layer.dt_proj.bias.detach(),
    }  # fmt: skip


INNER_OPTIONS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "biases": {"B_proj_bias": torch.randn(5, dtype=F64), "C_proj_bias": torch.randn(5, dtype=F64)},
    "norms": {
        "b_rms_weight": torch.rand(5, dtype=F64) + 0.5,
        "c_rms_weight": torch.rand(5, dtype=F64) + 0.5,
        "dt_rms_weight": torch.rand(12, dtype=F64) + 0.5,
    },
    "B and C given": {"B": torch.randn(12, 5, dtype=F64), "C": torch.randn(2, 5, 11, dtype=F64)},
}


@pytest.mark.parametrize("options", INNER_OPTIONS.values(), ids=INNER_OPTIONS)
def test_inner(options: dict[str, Tensor]) -> None:
    given = inner_tensors(longspan.nn.Mamba(6, d_state=5, dt_rank=2, dtype=F64)) | options
    if "B" in options:  # then x_proj gives dt alone
        given["x_proj_weight"] = given["x_proj_weight"][:2].clone()
    terms = dict.fromkeys([f"d {name}" for name in given], 2 * 11 * 12)
    assert_agree(results(mamba_inner_fn, given), results(mamba_inner_ref, given), terms)


def test_inner_with_a_complex_A() -> None:
    given = inner_tensors(longspan.nn.Mamba(6, d_state=4, dt_rank=2, dtype=F64))
    A = torch.complex(given["A"][:, :2], torch.randn(12, 2, dtype=F64))
    given["A"] = A.contiguous()
    torch.testing.assert_close(mamba_inner_fn(**given), mamba_inner_ref(**given))


def test_inner_is_the_layer() -> None:
    layer = longspan.nn.Mamba(6, d_state=5, dtype=F64)
    x = torch.randn(2, 9, 6, dtype=F64)
    for function in (mamba_inner_fn, mamba_inner_ref):
        found = function(
            layer.in_proj(x).transpose(1, 2), layer.conv1d.weight, layer.conv1d.bias,
            layer.x_proj.weight, layer.dt_proj.weight, layer.out_proj.weight, None,
            -layer.A_log.exp(), D=layer.D, delta_bias=layer.dt_proj.bias,
        )  # fmt: skip
        torch.testing.assert_close(found, mamba(layer.state_dict(), x)[0])


def test_inner_checkpoint_level_changes_no_bit() -> None:
    layer = longspan.nn.Mamba(64)
    xz = layer.in_proj(torch.randn(1, 3000, 64)).detach().transpose(1, 2).requires_grad_()

    def gradients(level: int, autocast: bool) -> dict[str, Tensor]:
        layer.zero_grad()
        xz.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = mamba_inner_fn(
                xz, layer.conv1d.weight, layer.conv1d.bias, layer.x_proj.weight, layer.dt_proj.weight,
                layer.out_proj.weight, None, -layer.A_log.exp(), D=layer.D,
                delta_bias=layer.dt_proj.bias, checkpoint_lvl=level,
            )  # fmt: skip
        out.float().square().sum().backward()
        named = [("xz", xz), *layer.named_parameters()]
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    for autocast in (False, True):
        found = gradients(1, autocast)
        assert "x_proj.weight" in found
        assert_same_bits(found, gradients(0, autocast))
    assert_raises(ValueError, ["checkpoint_lvl", "0 or 1", "2"], lambda: gradients(2, False))


def test_inner_errors() -> None:
    given = inner_tensors(longspan.nn.Mamba(6, d_state=5, dt_rank=2, dtype=F64))
    for name, parts in {
        "xz": ["xz", "(any, 24, any)"],
        "conv1d_weight": ["conv1d_weight", "(channels, 1, width)"],
        "x_proj_weight": ["x_proj_weight", "(any, 12)"],
        "delta_proj_weight": ["delta_proj_weight", "(12, any)"],
    }.items():
        wrong = given | {name: given[name][:, None]}
        assert_raises(
            ValueError, ["mamba_inner_fn", *parts], lambda wrong=wrong: mamba_inner_fn(**wrong)
        )


@pytest.mark.parametrize("by_heads", [False, True])
def test_state_update(by_heads: bool) -> None:
    """None for D and dt_bias too, which mamba-ssm's own reference refuses."""
    wide = (3, 4) if by_heads else (12,)
    groups = (1,) if by_heads else ()
    state, x, z = torch.randn(2, *wide, 5), torch.randn(2, *wide), torch.randn(2, *wide)
    dt, bias, A, D = torch.randn(2, *wide), torch.randn(wide), -torch.rand(*wide, 5), torch.randn(wide)
    B, C = torch.randn(2, 2, *groups, 5)
    for dtype in (torch.float32, F64):  # in double, parameters stay float
        for options in ({}, {"D": D, "dt_bias": bias, "dt_softplus": True, "z": z.to(dtype)}):
            both = [state.to(dtype, copy=True) for _ in range(2)]
            outs = [
                f(s, x.to(dtype), dt.to(dtype), A, B.to(dtype), C.to(dtype), **options)
                for f, s in zip((selective_state_update, selective_state_update_ref), both)
            ]
            torch.testing.assert_close(outs[0], outs[1])
            torch.testing.assert_close(both[0], both[1])
            assert not torch.equal(both[0], state.to(dtype))
    rows = torch.zeros(4, *wide, 5)
    out = selective_state_update(
        rows, x, dt, A, B, C, state_batch_indices=torch.tensor([2, -1], dtype=torch.int32)
    )
    assert out[1].eq(0).all()
    assert rows.flatten(1).ne(0).any(1).tolist() == [False, False, True, False]


# ---- Mamba-2


def ssd_tensors(length: int = 21, batch: int = 1) -> dict[str, Tensor]:
    made = {
        "x": torch.randn(batch, length, 4, 3), "dt": torch.rand(batch, length, 4),
        "A": -torch.rand(4), "B": torch.randn(batch, length, 2, 5),
        "C": torch.randn(batch, length, 2, 5),
    }  # fmt: skip
    return {name: x.double() for name, x in made.items()}


def dense_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The whole semiseparable matrix at once; dt as it is."""
    B, C = (y.repeat_interleave(x.shape[2] // y.shape[2], 2) for y in (B, C))
    total = (dt * A).cumsum(1)
    before = torch.ones(x.shape[1], x.shape[1]).tril().bool()[None, :, :, None]
    decay = torch.where(before, (total[:, :, None] - total[:, None]).exp(), 0)
    scores = torch.einsum("bihn,bjhn->bijh", C, B) * decay * dt[:, None]
    out = torch.einsum("bijh,bjhp->bihp", scores, x)
    weight = (total[:, -1:] - total).exp() * dt
    state = torch.einsum("bjh,bjhp,bjhn->bhpn", weight, x, B)
    if initial is not None:
        out = out + torch.einsum("bih,bihn,bhpn->bihp", total.exp(), C, initial)
        state = state + total[:, -1].exp()[..., None, None] * initial
    return out, state


def part(given: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {name: x if name == "A" else x[:, begin:end] for name, x in given.items()}


@pytest.mark.parametrize("chunk_size", [1, 16, 50, 64, 256, 1000])
def test_chunk_scan(chunk_size: int) -> None:
    given = ssd_tensors(150, 2)
    initial = torch.randn(2, 4, 3, 5, dtype=F64)
    z, bias = torch.randn(2, 150, 4, 3, dtype=F64), torch.randn(4, dtype=F64)
    found = mamba_chunk_scan_combined(
        **given, chunk_size=chunk_size, D=torch.ones(4), z=z, dt_bias=bias, initial_states=initial,
        dt_softplus=True, dt_limit=(0.1, 1.0), return_final_states=True,
    )  # fmt: skip
    step = F.softplus(given["dt"] + bias).clamp(0.1, 1.0)
    out, state = dense_ssd(**given | {"dt": step}, initial=initial)
    torch.testing.assert_close(found, ((out + given["x"]) * F.silu(z), state))


BOUNDS = [0, 4, 4, 5, 21]


@pytest.mark.parametrize("isolated", [True, False], ids=["with seq_idx", "cu_seqlens alone"])
@pytest.mark.parametrize("begun", [False, True], ids=["from zero", "initial_states"])
def test_states_of_packed_sequences(isolated: bool, begun: bool) -> None:
    """cu_seqlens alone keeps states apart, and not outputs: what mamba-ssm means by it."""
    given, cu_seqlens = ssd_tensors(), torch.tensor(BOUNDS, dtype=torch.int32)
    seq_idx = torch.repeat_interleave(torch.arange(4), cu_seqlens.diff())[None] if isolated else None
    initial = torch.randn(1, 4, 3, 5, dtype=F64) if begun else None
    options = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx, "initial_states": initial}

    def call(**returned: bool) -> Any:
        return mamba_chunk_scan_combined(**given, chunk_size=64, **options, **returned)

    outs, states = [], []
    for begin, end in pairwise(BOUNDS):
        if begin == end:
            states.append(torch.zeros(1, 4, 3, 5, dtype=F64))
            continue
        out, state = dense_ssd(**part(given, begin, end), initial=initial if begin == 0 else None)
        outs.append(out)
        states.append(state)
    whole, final = dense_ssd(**given, initial=initial)
    if isolated:
        whole, final = torch.cat(outs, 1), states[-1]
    varlen = torch.cat(states)
    torch.testing.assert_close(call(), whole)
    torch.testing.assert_close(call(return_final_states=True), (whole, final))
    torch.testing.assert_close(call(return_varlen_states=True), (whole, varlen))
    every = call(return_final_states=True, return_varlen_states=True)
    torch.testing.assert_close(every, (whole, final, varlen))


def test_initial_states_belong_to_the_first_token() -> None:
    """Also where the first sequence is empty."""
    given, initial = ssd_tensors(6), torch.randn(1, 4, 3, 5, dtype=F64)
    _, varlen = mamba_chunk_scan_combined(
        **given, chunk_size=64, initial_states=initial, cu_seqlens=torch.tensor([0, 0, 6]),
        return_varlen_states=True,
    )  # fmt: skip
    torch.testing.assert_close(varlen[1:], dense_ssd(**given, initial=initial)[1])
    assert varlen[0].eq(0).all()


def test_dtype_of_states() -> None:
    given = {name: x.bfloat16() for name, x in ssd_tensors(21).items()}
    options = {"chunk_size": 64, "cu_seqlens": torch.tensor(BOUNDS), "return_varlen_states": True}
    _, final, varlen = mamba_chunk_scan_combined(**given, **options, return_final_states=True)
    assert final.dtype == varlen.dtype == torch.float32
    _, final, rounded = mamba_chunk_scan_combined(
        **given, **options, return_final_states=True, state_dtype=torch.bfloat16
    )
    assert final.dtype == torch.float32
    assert torch.equal(rounded, varlen.bfloat16())
    for wrong in (torch.float64, torch.int32):
        assert_raises(
            ValueError,
            ["state_dtype", "torch.float32", str(wrong)],
            lambda wrong=wrong: mamba_chunk_scan_combined(**given, chunk_size=64, state_dtype=wrong),
        )


def test_chunk_scan_errors() -> None:
    given = ssd_tensors()
    assert_raises(
        ValueError, ["chunk_size", "0"], lambda: mamba_chunk_scan_combined(**given, chunk_size=0)
    )
    assert_raises(
        ValueError,
        ["return_varlen_states", "cu_seqlens"],
        lambda: mamba_chunk_scan_combined(**given, chunk_size=64, return_varlen_states=True),
    )
    given = ssd_tensors(batch=2)
    assert_raises(
        ValueError,
        ["cu_seqlens", "batch of 1"],
        lambda: mamba_chunk_scan_combined(
            **given, chunk_size=64, return_varlen_states=True, cu_seqlens=torch.tensor(BOUNDS)
        ),
    )


SPLIT_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "groups, linear unit": {"ngroups": 2, "d_ssm": 8, "bias": True},
    "gate first": {"norm_before_gate": True, "D_has_hdim": True, "dt_limit": (0.2, 0.6)},
    "gate alone": {"rmsnorm": False, "conv_bias": False},
}


def split(layer: longspan.nn.Mamba2, **changed: Any) -> Any:
    """The arguments with which mamba-ssm's layer calls the function."""
    hdim = layer.D_has_hdim
    return {
        "conv1d_weight": layer.conv1d.weight.squeeze(1), "conv1d_bias": layer.conv1d.bias,
        "dt_bias": layer.dt_bias, "A": -layer.A_log.exp(),
        "D": layer.D.view(-1, layer.headdim) if hdim else layer.D, "chunk_size": 256,
        "dt_limit": layer.dt_limit, "rmsnorm_weight": layer.norm.weight if layer.rmsnorm else None,
        "rmsnorm_eps": 1e-5, "outproj_weight": layer.out_proj.weight,
        "outproj_bias": layer.out_proj.bias,
        "headdim": None if hdim else layer.headdim, "ngroups": layer.ngroups,
        "norm_before_gate": layer.norm_before_gate,
    } | changed  # fmt: skip


@pytest.mark.parametrize("options", SPLIT_OPTIONS.values(), ids=SPLIT_OPTIONS)
def test_split_conv1d_scan(options: dict[str, Any]) -> None:
    small = {"headdim": 4, "d_state": 5}
    layer = longspan.nn.Mamba2(8, **small, **options, dtype=F64)
    u = torch.randn(2, 17, 8, dtype=F64)
    seq_idx = torch.tensor([[0] * 6 + [1] * 11, [2] * 17])
    expected = mamba2(layer.state_dict(), u, **small | options)[0]
    zxbcdt = layer.in_proj(u)
    torch.testing.assert_close(mamba_split_conv1d_scan_combined(zxbcdt, **split(layer)), expected)
    torch.testing.assert_close(
        mamba_split_conv1d_scan_combined(zxbcdt, **split(layer), seq_idx=seq_idx),
        layer(u, seq_idx=seq_idx),
    )
    if layer.rmsnorm:
        bare = mamba_split_conv1d_scan_combined(zxbcdt, **split(layer, outproj_weight=None))
        torch.testing.assert_close(F.linear(bare, layer.out_proj.weight, layer.out_proj.bias), expected)


def test_split_conv1d_scan_gradients_and_states() -> None:
    layer = longspan.nn.Mamba2(8, headdim=4, d_state=5, dtype=F64)
    u = torch.randn(1, 17, 8, dtype=F64)
    found = []
    for call in (layer, lambda u: mamba_split_conv1d_scan_combined(layer.in_proj(u), **split(layer))):
        layer.zero_grad()
        call(u).square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(found[1], found[0])
    zxbcdt, options = layer.in_proj(u), split(layer, activation=None)
    first, state = mamba_split_conv1d_scan_combined(zxbcdt, **options, return_final_states=True)
    assert state.shape == (1, 4, 4, 5)
    again = mamba_split_conv1d_scan_combined(zxbcdt, **options, initial_states=state)
    assert not torch.allclose(again, first)
    torch.testing.assert_close(
        mamba_split_conv1d_scan_combined(zxbcdt, **options, initial_states=0 * state), first
    )


def test_split_conv1d_scan_errors() -> None:
    layer = longspan.nn.Mamba2(8, headdim=4, d_state=5)
    zxbcdt = layer.in_proj(torch.randn(1, 17, 8))
    for changed, parts in (
        ({"headdim": None}, ["headdim", "None"]),
        ({"ngroups": 3}, ["ngroups", "4 heads", "3"]),
        ({"conv1d_weight": torch.randn(17, 4)}, ["conv1d_weight", "16", "17"]),
        ({"conv1d_weight": torch.randn(46, 4)}, ["zxbcdt", "(1, 17, 46)"]),
        ({"D": torch.randn(4, 3), "headdim": 4}, ["D", "(any, 4)", "(4, 3)"]),
    ):
        options = split(layer, **changed)
        assert_raises(
            ValueError,
            ["mamba_split_conv1d_scan_combined", *parts],
            lambda options=options: mamba_split_conv1d_scan_combined(zxbcdt, **options),
        )


# ---- norms, generation


def test_gated_norm_gates_after_the_norm() -> None:
    x, z = torch.randn(2, 3, 5, 12, dtype=F64)
    weight, bias = torch.randn(12), torch.randn(12)
    plain = F.rms_norm(x.unflatten(-1, (3, 4)), (4,), eps=1e-6).flatten(-2) * weight
    torch.testing.assert_close(rmsnorm_fn(x, weight, bias, z, group_size=4), (plain + bias) * F.silu(z))
    gated = F.rms_norm(x * F.silu(z), (12,), eps=1e-6) * weight
    torch.testing.assert_close(rmsnorm_fn(x, weight, None, z, norm_before_gate=False), gated)
    norm = GatedRMSNorm(12, dtype=F64)
    assert norm.bias is None
    torch.testing.assert_close(norm(x, z), F.rms_norm(x, (12,), eps=1e-5) * F.silu(z))


@pytest.mark.parametrize("is_rms", [False, True])
def test_norm_of_a_sum(is_rms: bool) -> None:
    x, residual, x1 = torch.randn(3, 4, 5, 12, dtype=F64)
    weight, bias, weight1 = torch.randn(3, 12)
    scale = torch.rand(4, 5)

    def plain(y: Tensor, w: Tensor, b: Tensor | int = 0) -> Tensor:
        shape = y.shape[-1:]
        return (F.rms_norm(y, shape, eps=1e-6) if is_rms else F.layer_norm(y, shape, eps=1e-6)) * w + b

    def ours(*args: Any, **options: Any) -> Any:
        if is_rms:
            return rms_norm_fn(*args, **options)
        return layer_norm_fn(*args, **options)

    torch.testing.assert_close(ours(x, weight, bias), plain(x, weight, bias))
    total = x * scale[..., None] + residual
    torch.testing.assert_close(
        ours(x, weight, bias, residual, rowscale=scale, prenorm=True),
        (plain(total, weight, bias), total),
    )
    both = x + x1 + residual
    torch.testing.assert_close(
        ours(x, weight, None, residual, x1, weight1, bias, prenorm=True),
        (plain(both, weight), plain(both, weight1, bias), both),
    )
    torch.testing.assert_close(ours(x, weight, None, prenorm=True), (plain(x, weight), x))
    dropped, kept = ours(x, torch.ones(12), None, dropout_p=0.5, prenorm=True)
    assert set((kept / x).round(decimals=6).unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(dropped, plain(kept, torch.ones(12)))
    assert_raises(ValueError, ["rowscale", "x1"], lambda: ours(x, weight, None, x1=x1, rowscale=scale))
    assert_raises(ValueError, ["bias1", "weight1"], lambda: ours(x, weight, None, bias1=bias))
    assert_raises(ValueError, ["residual", "(4, 5, 12)"], lambda: ours(x, weight, None, residual[0]))


def test_norm_module_and_dtypes_of_the_sum() -> None:
    norm = RMSNorm(12)
    x = torch.randn(4, 12).bfloat16()
    out, total = norm(x, prenorm=True, residual_in_fp32=True)
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    out, total = norm(x, torch.randn(4, 12), prenorm=True)
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert norm(x, x, prenorm=True)[1].dtype == torch.bfloat16
    out.float().sum().backward()
    assert norm.weight.grad is not None
    half = RMSNorm(12, dropout_p=0.5)
    assert torch.equal(half.eval()(x), norm(x))
    assert not torch.equal(half.train()(x), norm(x))


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_generation_parameters(kind: str) -> None:
    options = {"headdim": 4, "d_state": 4} if kind == "Mamba2" else {}
    layer = getattr(longspan.nn, kind)(8, layer_idx=3, **options)
    params = InferenceParams(max_seqlen=20, max_batch_size=2)
    x = torch.randn(2, 9, 8)
    outs = []
    with torch.no_grad():
        for tokens in x.split([6, 1, 2], 1):
            outs.append(layer(tokens, inference_params=params))
            params.seqlen_offset += tokens.shape[1]
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))
    assert [*params.key_value_memory_dict] == [3]
    params.lengths_per_sample = torch.tensor([4, 2])
    params.reset(7, 1)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (7, 1, 0)
    assert params.lengths_per_sample.eq(0).all()
