"""longspan.nn.Mamba2 and RMSNormGated against the layer token by token, and against transformers'."""

import gc
import itertools
import math
import types
import weakref
from typing import Any

import pytest
import torch
from checks import assert_agree, assert_error_ratio, assert_raises, assert_same_bits, results, to
from mamba_oracle import mamba2, packed
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.nn import Mamba2, RMSNormGated

D_MODEL = 12
SMALL: dict[str, Any] = {"headdim": 4, "d_state": 6}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "groups": {"ngroups": 3, "bias": True, "norm_before_gate": True, "d_conv": 2},
    "linear unit": {"d_ssm": 16, "ngroups": 2, "D_has_hdim": True},
    "gate alone": {"rmsnorm": False, "conv_bias": False, "d_conv": 1},
    "limit": {"dt_limit": (0.3, 0.5), "expand": 1, "D_has_hdim": True},
}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> Mamba2:
    """A layer whose every parameter has a part in the result, and whose dt_limit has one."""
    layer = Mamba2(D_MODEL, layer_idx=0, dtype=dtype, **SMALL | options)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
        layer.dt_bias += 2
    return layer


def tensors(layer: Mamba2, batch: int, length: int) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    return {"x": torch.randn(batch, length, D_MODEL, dtype=layer.in_proj.weight.dtype), **parameters}


def run(layer: Mamba2, **call: Any) -> Any:
    """The layer as a function of named tensors."""
    return lambda x, **p: functional_call(layer, p, (x,), call)


def oracle(**options: Any) -> Any:
    return lambda x, **p: mamba2(p, x, **SMALL | options)[0]


def params() -> Any:
    return types.SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("length", [1, 2, 17, 70])
def test_the_equations(options: dict[str, Any], length: int) -> None:
    layer = make(**options)
    given = tensors(layer, 2, length)
    expected = results(oracle(**options), given)
    # Gradients of parameters are sums over rows, steps, channels or states.
    assert_agree(results(run(layer), given), expected, dict.fromkeys(expected, 2 * length * 24))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float32(options: dict[str, Any]) -> None:
    layer = make(**options)
    given = to(torch.float32, tensors(layer, 3, 65))
    expected = results(oracle(**options), to(torch.float64, given))
    terms = dict.fromkeys(expected, 3 * 65 * 24)
    assert_agree(results(run(layer.float()), given), expected, terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error(dtype: torch.dtype) -> None:
    layer = make(ngroups=2)
    assert_error_ratio(run(layer), oracle(ngroups=2), tensors(layer, 2, 50), dtype)


def test_gradcheck() -> None:
    layer = make(headdim=6, d_state=2, d_ssm=12, d_conv=2)
    x = torch.randn(1, 5, D_MODEL, dtype=torch.float64, requires_grad=True)
    p = {name: q.detach().clone().requires_grad_() for name, q in layer.named_parameters()}
    for call in ({}, {"seq_idx": torch.tensor([[3, 3, 1, 1, 1]])}):

        def f(x: Tensor, *values: Tensor, call: dict[str, Any] = call) -> Tensor:
            return functional_call(layer, dict(zip(p, values)), (x,), call)

        assert torch.autograd.gradcheck(f, (x, *p.values()), fast_mode=True)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_transformers_layer_with_these_weights(length: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=D_MODEL, state_size=6, num_hidden_layers=1, use_bias=True, num_heads=6, head_dim=4,
        n_groups=2, time_step_limit=(0.5, 2.0), chunk_size=8,
    )  # fmt: skip
    ours = make(torch.float32, bias=True, ngroups=2, dt_limit=(0.5, 2.0))
    theirs = Mamba2Mixer(config, 0)
    theirs.load_state_dict(ours.state_dict())  # strict
    again = Mamba2(D_MODEL, bias=True, ngroups=2, dt_limit=(0.5, 2.0), **SMALL)
    again.load_state_dict(theirs.state_dict())
    x = torch.randn(2, length, D_MODEL)
    for layer in (ours, again):
        torch.testing.assert_close(layer(x), theirs(x), rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("chunk_size", [16, 32, 128, 256])
def test_chunks_change_nothing_but_rounding(chunk_size: int) -> None:
    layer = make()
    x = torch.randn(1, 300, D_MODEL, dtype=torch.float64)
    expected = layer(x)
    layer.chunk_size = chunk_size
    torch.testing.assert_close(layer(x), expected)


# ---- parameters


def test_names_shapes_and_dtypes() -> None:
    layer = Mamba2(
        32, d_state=8, headdim=16, ngroups=2, d_ssm=32, d_conv=3, bias=True, dtype=torch.bfloat16
    )
    shapes = {
        "dt_bias": (2,), "A_log": (2,), "D": (2,), "in_proj.weight": (162, 32), "in_proj.bias": (162,),
        "conv1d.weight": (64, 1, 3), "conv1d.bias": (64,), "norm.weight": (32,),
        "out_proj.weight": (32, 64), "out_proj.bias": (32,),
    }  # fmt: skip
    state = layer.state_dict()
    assert {name: tuple(p.shape) for name, p in state.items()} == shapes
    assert {name for name, p in state.items() if p.dtype == torch.float32} == {"D"}
    assert all(p.dtype == torch.bfloat16 for name, p in state.items() if name != "D")
    marked = {n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"dt_bias", "A_log", "D"}
    assert layer(torch.randn(1, 4, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    other = Mamba2(32, headdim=16, rmsnorm=False, D_has_hdim=True).state_dict()
    assert other["D"].shape == (64,)
    assert "norm.weight" not in other


def test_initialisation() -> None:
    layer = Mamba2(1024, headdim=4, dt_min=0.002, dt_max=0.2, A_init_range=(2, 9), conv_init=0.01)
    heads = 512
    decay = layer.A_log.exp()
    assert decay.min() >= 2 - 1e-5
    assert decay.max() <= 9 + 1e-5
    assert abs(decay.mean() - 5.5) < 5 * 7 / math.sqrt(12 * heads)
    step = torch.nn.functional.softplus(layer.dt_bias).log()
    low, high = math.log(0.002), math.log(0.2)
    assert step.min() >= low - 1e-3
    assert step.max() <= high + 1e-3
    assert abs(step.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * heads)
    assert 0.0099 < layer.conv1d.weight.abs().max() <= 0.01
    assert layer.D.eq(1).all()
    assert layer.norm.weight.eq(1).all()
    floored = Mamba2(32, headdim=4, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-3)
    step = torch.nn.functional.softplus(floored.dt_bias)
    torch.testing.assert_close(step, torch.full((16,), 1e-3), rtol=1e-4, atol=0)


# ---- decoding


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_equal_the_whole(options: dict[str, Any]) -> None:
    """With limits of the step size too, which mamba-ssm's step forgets."""
    layer = make(**options)
    x = torch.randn(3, 9, D_MODEL, dtype=torch.float64)
    states = layer.allocate_inference_cache(3, 9)
    with torch.no_grad():
        outs = [layer.step(token, *states)[0] for token in x.split(1, dim=1)]
    expected, (past, h) = mamba2(layer.state_dict(), x, **SMALL | options)
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    torch.testing.assert_close(states[0], past)
    torch.testing.assert_close(states[1], h)


@pytest.mark.parametrize("sizes", [(5, 1, 1, 9), (1, 1, 14), (2, 3, 5, 6), (15, 1)], ids=str)
def test_calls_that_go_on_equal_one(sizes: tuple[int, ...]) -> None:
    layer, context = make(ngroups=2), params()
    x = torch.randn(2, 16, D_MODEL, dtype=torch.float64)
    outs = []
    with torch.no_grad():
        for part in x.split(sizes, dim=1):
            outs.append(layer(part, inference_params=context))
            context.seqlen_offset += part.shape[1]
    expected, state = mamba2(layer.state_dict(), x, ngroups=2, **SMALL)
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    torch.testing.assert_close(context.key_value_memory_dict[0], state)


def test_dtypes_of_the_cache() -> None:
    layer = Mamba2(D_MODEL, dtype=torch.bfloat16, **SMALL)
    conv, ssm = layer.allocate_inference_cache(2, 10)
    assert (conv.shape, conv.dtype) == ((2, 36, 4), torch.bfloat16)
    assert (ssm.shape, ssm.dtype) == ((2, 6, 4, 6), torch.float32)
    layer.float()
    for dtype in (torch.float32, torch.bfloat16):
        conv, ssm = layer.allocate_inference_cache(2, 10, dtype=dtype)
        assert conv.dtype == ssm.dtype == dtype
        with torch.no_grad():
            assert layer.step(torch.randn(2, 1, D_MODEL), conv, ssm)[0].dtype == torch.float32


def test_states_hold_no_graph_and_steps_have_no_gradient() -> None:
    layer, context = make(), params()
    x = torch.randn(1, 5, D_MODEL, dtype=torch.float64)
    out = layer(x[:, :3], inference_params=context)
    context.seqlen_offset = 3
    out = out.sum() + layer(x[:, 3:], inference_params=context).sum()
    assert not any(state.requires_grad for state in context.key_value_memory_dict[0])
    out.backward()
    before = [state.clone() for state in context.key_value_memory_dict[0]]
    layer.requires_grad_(False).out_proj.requires_grad_(True)  # asked for after the states' part
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(x[:, :1], inference_params=context)
    assert all(map(torch.equal, before, context.key_value_memory_dict[0]))


# ---- packing


@pytest.mark.parametrize("by", ["cu_seqlens", "seq_idx", "both"])
def test_packed_sequences_are_apart(by: str) -> None:
    layer, bounds = make(ngroups=2), [0, 1, 8, 25, 40]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    seq_idx = torch.repeat_interleave(torch.tensor([5, 0, 7, 2]), cu_seqlens.diff())[None]
    ways = {"cu_seqlens": {"cu_seqlens": cu_seqlens}, "seq_idx": {"seq_idx": seq_idx}}
    call = ways.get(by, {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx})
    given = tensors(layer, 1, 40)

    def apart(x: Tensor, **p: Tensor) -> Tensor:
        return packed(mamba2, p, x, bounds, ngroups=2, **SMALL)

    assert_agree(results(run(layer, **call), given), results(apart, given))
    before = layer(given["x"], **call)
    given["x"][:, 8:25] = torch.nan
    after = layer(given["x"], **call)
    for begin, end in itertools.pairwise(bounds):
        assert torch.equal(before[:, begin:end], after[:, begin:end]) == (begin != 8)


def test_rows_of_a_batch_are_cut_apart() -> None:
    layer = make()
    x = torch.randn(2, 9, D_MODEL, dtype=torch.float64)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [3] * 2])
    found = layer(x, seq_idx=seq_idx)
    for row, cut in enumerate((4, 7)):
        expected = packed(mamba2, layer.state_dict(), x[row : row + 1], [0, cut, 9], **SMALL)
        torch.testing.assert_close(found[row : row + 1], expected)


def test_states_after_packed_sequences() -> None:
    layer, context, bounds = make(), params(), [0, 2, 2, 9, 10]
    x = torch.randn(1, 10, D_MODEL, dtype=torch.float64)
    tokens = torch.randn(4, 1, D_MODEL, dtype=torch.float64)
    with torch.no_grad():
        layer(x, inference_params=context, cu_seqlens=torch.tensor(bounds))
        context.seqlen_offset = 1
        found = layer(tokens, inference_params=context)
    for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
        whole = torch.cat([x[:, begin:end], tokens[s : s + 1]], 1)
        torch.testing.assert_close(found[s], mamba2(layer.state_dict(), whole, **SMALL)[0][0, -1:])


def test_rows_in_one_dimension() -> None:
    """seqlen: the batch and the length in one dimension."""
    layer = make()
    x = torch.randn(3, 7, D_MODEL, dtype=torch.float64)
    assert torch.equal(layer(x.flatten(0, 1), seqlen=7), layer(x).flatten(0, 1))


# ---- in a training loop


def test_autocast() -> None:
    """As accurate as plain torch under autocast, twice its error allowed."""
    layer = make().float()
    given = to(torch.float32, tensors(layer, 2, 40))

    def cast(function: Any) -> Any:
        def f(**kw: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out = function(**kw)
            assert out.dtype == torch.bfloat16
            return out

        return f

    truth = results(oracle(), to(torch.float64, given))
    theirs, ours = results(cast(oracle()), given), results(cast(run(layer)), given)
    for name, want in truth.items():
        assert name == "out" or ours[name].dtype == torch.float32
        allowed = 2 * (theirs[name].double() - want).abs().max()
        assert (ours[name].double() - want).abs().max() <= allowed, name


def test_the_backward_keeps_less() -> None:
    """use_mem_eff_path changes what is kept, and no bit of the result."""
    x = torch.randn(1, 1500, 64, requires_grad=True)
    layer = Mamba2(64, d_state=16, headdim=32)
    found = []
    for layer.use_mem_eff_path in (False, True):
        convolved: list[Any] = []
        convolve = type(layer)._conv.__get__(layer)

        def watched(*args: Any, convolve: Any = convolve, convolved: list[Any] = convolved) -> Tensor:
            out = convolve(*args)
            convolved.append(weakref.ref(out.untyped_storage()))
            return out

        layer._conv = watched
        out = layer(x)
        gc.collect()
        assert (convolved[0]() is None) == layer.use_mem_eff_path
        x.grad = None
        layer.zero_grad()
        out.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in [("x", x), *layer.named_parameters()]})
    assert_same_bits(found[1], found[0])


def test_nothing_is_copied() -> None:
    """Activations stay as the projections leave them; no operator is there to copy them."""
    seen: set[str] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    layer, x = Mamba2(32, headdim=16), torch.randn(2, 20, 32)
    with torch.no_grad(), Names():
        layer(x)
    assert "longspan::ssd_forward" in seen
    assert not seen & {f"aten::{op}" for op in ("clone", "copy_", "_to_copy", "cat", "contiguous")}


@pytest.mark.usefixtures("fresh_compiler")
def test_compile() -> None:
    layer = Mamba2(16, headdim=8, d_state=8, dt_limit=(0.0, 0.5), dtype=torch.float64)
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    packed = {"cu_seqlens": torch.tensor([0, 4, 20])}
    for backend, call in (("inductor", {}), ("aot_eager", packed)):  # the latter is quicker to compile
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        found = []
        for f in (layer, compiled):
            layer.zero_grad()
            out = f(x, **call)
            out.square().sum().backward()
            found.append([out.detach(), *(p.grad.clone() for p in layer.parameters())])
        torch.testing.assert_close(found[1], found[0])
    with torch.no_grad():
        states, other = (layer.allocate_inference_cache(1, 1) for _ in range(2))
        step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
        for token in x[:, :3].split(1, dim=1):
            torch.testing.assert_close(step(token, *states), layer.step(token, *other))


def test_export_and_meta() -> None:
    layer, x = Mamba2(16, headdim=8, d_state=8), torch.randn(2, 30, 16)
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: length},))
    x = torch.randn(2, 77, 16)
    torch.testing.assert_close(program.module()(x), layer(x))
    assert Mamba2(16, headdim=8, device="meta")(x.to("meta")).shape == x.shape
    assert "headdim=8" in repr(layer)


def test_empty() -> None:
    layer = make()
    for shape in ((2, 0, D_MODEL), (0, 5, D_MODEL)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        layer.zero_grad()
        out = layer(x)
        assert out.shape == shape
        out.sum().backward()
        assert all(p.grad is None or p.grad.eq(0).all() for p in layer.parameters())
    context = params()
    with torch.no_grad():
        layer(torch.randn(2, 0, D_MODEL, dtype=torch.float64), inference_params=context)
    assert all(state.eq(0).all() for state in context.key_value_memory_dict[0])


# ---- RMSNormGated


@pytest.mark.parametrize("before", [False, True])
def test_norm(before: bool) -> None:
    norm = RMSNormGated(12, eps=1e-3, group_size=4, norm_before_gate=before, dtype=torch.float64)
    with torch.no_grad():
        norm.weight += torch.randn(12)
    x, z = torch.randn(2, 3, 5, 12, dtype=torch.float64)

    def plain(y: Tensor) -> Tensor:
        groups = y.unflatten(-1, (3, 4))
        return (groups / (groups.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(
            -2
        ) * norm.weight

    gate = torch.nn.functional.silu(z)
    torch.testing.assert_close(norm(x, z), plain(x) * gate if before else plain(x * gate))
    torch.testing.assert_close(norm(x), plain(x))
    assert [*norm.state_dict()] == ["weight"]
    assert f"norm_before_gate={before}" in repr(norm)


# ---- errors


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"d_model": 0}, ["d_model", "1 or more"]),
        ({"headdim": 5}, ["d_ssm", "multiple of headdim, 5", "16"]),
        ({"d_ssm": 24}, ["d_ssm", "up to 16", "24"]),
        ({"ngroups": 3}, ["ngroups", "divisor of 4", "3"]),
        ({"A_init_range": (0, 16)}, ["A_init_range", "(0, 16)"]),
        ({"dt_min": 0.2}, ["dt_min", "0.2"]),
        ({"dt_limit": (2, 1)}, ["dt_limit", "(2, 1)"]),
        ({"chunk_size": 100}, ["chunk_size", "16", "256", "100"]),
        ({"process_group": object()}, ["process_group", "None"]),
        ({"sequence_parallel": True}, ["sequence_parallel", "None"]),
    ],
)
def test_wrong_options(options: dict[str, Any], parts: list[str]) -> None:
    given = {"d_model": 8, "headdim": 4, **options}
    assert_raises(ValueError, ["Mamba2", *parts], lambda: Mamba2(**given))


def test_wrong_calls() -> None:
    layer = Mamba2(8, headdim=4, d_state=4, layer_idx=0)
    x = torch.randn(2, 5, 8)
    assert_raises(ValueError, ["u", "any, any, 8", "(2, 5)"], lambda: layer(x[..., 0]))
    assert_raises(ValueError, ["seqlen", "divisor of 10", "3"], lambda: layer(x.flatten(0, 1), seqlen=3))
    assert_raises(
        ValueError, ["cu_seqlens", "batch of 1"], lambda: layer(x, cu_seqlens=torch.tensor([0, 5]))
    )
    assert_raises(
        ValueError, ["seq_idx", "(2, 5)", "(1, 5)"], lambda: layer(x, seq_idx=torch.zeros(1, 5).int())
    )
    states = layer.allocate_inference_cache(2, 1)
    assert_raises(ValueError, ["step", "(any, 1, 8)", "(2, 5, 8)"], lambda: layer.step(x, *states))
    assert_raises(
        ValueError, ["ssm_state", "(2, 4, 4, 4)"], lambda: layer.step(x[:, :1], states[0], states[0])
    )
    context = params()
    with torch.no_grad():
        layer(x, inference_params=context)
    context.seqlen_offset = 5
    assert_raises(
        ValueError,
        ["seq_idx", "None"],
        lambda: layer(x, inference_params=context, seq_idx=torch.zeros(2, 5).int()),
    )
    assert_raises(ValueError, ["group_size", "8", "3"], lambda: RMSNormGated(8, group_size=3))
