"""longspan.nn.Mamba against the layer written out token by token, and against transformers'."""

import copy
import gc
import itertools
import math
import types
import weakref
from typing import Any

import pytest
import torch
from checks import assert_agree, assert_error_ratio, assert_raises, assert_same_bits, results, to
from mamba_oracle import mamba, packed
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from longspan.nn import Mamba

D_MODEL = 12
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "biases": {"bias": True, "dt_rank": 3},
    "no bias": {"conv_bias": False, "d_state": 5, "d_conv": 2, "expand": 3},
    "width 1": {"d_conv": 1, "d_state": 1},
}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> Mamba:
    """A layer whose every parameter has a part in the result."""
    layer = Mamba(D_MODEL, layer_idx=0, dtype=dtype, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def tensors(layer: Mamba, batch: int, length: int) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    return {"x": torch.randn(batch, length, D_MODEL, dtype=layer.in_proj.weight.dtype), **parameters}


def run(layer: Mamba, **call: Any) -> Any:
    """The layer as a function of named tensors."""
    return lambda x, **p: functional_call(layer, p, (x,), call)


def oracle(x: Tensor, **p: Tensor) -> Tensor:
    return mamba(p, x)[0]


def params() -> Any:
    return types.SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 70])
def test_the_equations(options: dict[str, Any], length: int) -> None:
    layer = make(**options)
    given = tensors(layer, 2, length)
    assert_agree(results(run(layer), given), results(oracle, given))


def test_float32() -> None:
    layer = make()
    given = to(torch.float32, tensors(layer, 3, 65))
    expected = results(oracle, to(torch.float64, given))
    terms = dict.fromkeys(expected, 3 * 65 * 24)
    assert_agree(results(run(layer.float()), given), expected, terms)


def test_bfloat16_error() -> None:
    layer = make()
    assert_error_ratio(run(layer), oracle, tensors(layer, 2, 50), torch.bfloat16)


def test_float16_error() -> None:
    layer = make()
    assert_error_ratio(run(layer), oracle, tensors(layer, 2, 50), torch.float16)


def test_gradcheck() -> None:
    layer = Mamba(3, d_state=2, d_conv=2, dt_rank=1, dtype=torch.float64)
    x = torch.randn(1, 7, 3, dtype=torch.float64, requires_grad=True)
    p = {name: q.detach().clone().requires_grad_() for name, q in layer.named_parameters()}
    cu_seqlens = torch.tensor([0, 3, 3, 7])
    for call in ({}, {"cu_seqlens": cu_seqlens}):

        def f(x: Tensor, *values: Tensor, call: dict[str, Any] = call) -> Tensor:
            return functional_call(layer, dict(zip(p, values)), (x,), call)

        assert torch.autograd.gradcheck(f, (x, *p.values()))


@pytest.mark.parametrize("length", [1, 5, 40])
def test_transformers_layer_with_these_weights(length: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(
        hidden_size=D_MODEL, state_size=7, num_hidden_layers=1, use_bias=True, time_step_rank=2
    )
    ours = make(torch.float32, d_state=7, bias=True, dt_rank=2)
    theirs = MambaMixer(config, 0)
    theirs.load_state_dict(ours.state_dict())  # strict
    again = Mamba(D_MODEL, d_state=7, bias=True, dt_rank=2)
    again.load_state_dict(theirs.state_dict())
    x = torch.randn(2, length, D_MODEL)
    for layer in (ours, again):
        torch.testing.assert_close(layer(x), theirs(x), rtol=2e-6, atol=2e-6)


# ---- parameters


def test_names_shapes_and_dtypes() -> None:
    layer = Mamba(32, d_state=8, d_conv=3, expand=2, bias=True, dtype=torch.bfloat16)
    shapes = {
        "A_log": (64, 8), "D": (64,), "in_proj.weight": (128, 32), "in_proj.bias": (128,),
        "conv1d.weight": (64, 1, 3), "conv1d.bias": (64,), "x_proj.weight": (18, 64),
        "dt_proj.weight": (64, 2), "dt_proj.bias": (64,), "out_proj.weight": (32, 64),
        "out_proj.bias": (32,),
    }  # fmt: skip
    state = layer.state_dict()
    assert {name: tuple(p.shape) for name, p in state.items()} == shapes
    wide = {"A_log", "D"}
    assert {name for name, p in state.items() if p.dtype == torch.float32} == wide
    assert all(p.dtype == torch.bfloat16 for name, p in state.items() if name not in wide)
    assert {n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)} == wide
    assert {n for n, p in layer.named_parameters() if getattr(p, "_no_reinit", False)} == {
        "dt_proj.bias"
    }
    assert Mamba(33).dt_rank == 3  # ceil(33 / 16)
    assert layer(torch.randn(1, 4, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_initialisation() -> None:
    layer = Mamba(256, dt_min=0.002, dt_max=0.2, dt_scale=2.0)
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17).repeat(512, 1))
    assert layer.D.eq(1).all()
    step = torch.nn.functional.softplus(layer.dt_proj.bias).log()
    low, high = math.log(0.002), math.log(0.2)
    assert step.min() >= low - 1e-3
    assert step.max() <= high + 1e-3
    assert abs(step.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * 512)
    weight, bound = layer.dt_proj.weight, 2 * 16**-0.5
    assert bound * 0.99 < weight.abs().max() <= bound
    assert abs(weight.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert Mamba(32, dt_init="constant", dt_scale=3.0).dt_proj.weight.eq(3 * 2**-0.5).all()
    floored = Mamba(32, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-3)
    step = torch.nn.functional.softplus(floored.dt_proj.bias)
    torch.testing.assert_close(step, torch.full((64,), 1e-3), rtol=1e-4, atol=0)


# ---- decoding


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_equal_the_whole(options: dict[str, Any]) -> None:
    layer = make(**options)
    x = torch.randn(3, 9, D_MODEL, dtype=torch.float64)
    states = layer.allocate_inference_cache(3, 9)
    with torch.no_grad():
        outs = [layer.step(token, *states)[0] for token in x.split(1, dim=1)]
    expected, (past, h) = mamba(layer.state_dict(), x)
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    torch.testing.assert_close(states[0], past)
    torch.testing.assert_close(states[1], h)


@pytest.mark.parametrize("sizes", [(5, 1, 1, 9), (1, 1, 14), (2, 3, 5, 6), (15, 1)], ids=str)
def test_calls_that_go_on_equal_one(sizes: tuple[int, ...]) -> None:
    layer, context = make(), params()
    x = torch.randn(2, 16, D_MODEL, dtype=torch.float64)
    outs = []
    with torch.no_grad():
        for part in x.split(sizes, dim=1):
            outs.append(layer(part, inference_params=context))
            context.seqlen_offset += part.shape[1]
    expected, state = mamba(layer.state_dict(), x)
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    torch.testing.assert_close(context.key_value_memory_dict[0], state)


def test_a_new_prompt_does_not_see_the_last_one() -> None:
    layer, context = make(), params()
    x = torch.randn(2, 6, D_MODEL, dtype=torch.float64)
    with torch.no_grad():
        layer(torch.full_like(x, torch.nan), inference_params=context)
        out = layer(x[:, :2], inference_params=context)
    expected, state = mamba(layer.state_dict(), x[:, :2])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(context.key_value_memory_dict[0], state)


def test_the_cache_is_made_and_reset_on_demand() -> None:
    layer, context = make(), params()
    first = layer._get_states_from_cache(context, 2)
    for state in first:
        state.fill_(1)
    again = layer._get_states_from_cache(context, 2)
    assert all(a is b for a, b in zip(first, again))
    assert all(state.eq(1).all() for state in again)
    layer._get_states_from_cache(context, 2, initialize_states=True)
    assert all(state.eq(0).all() for state in first)


def test_dtypes_of_the_cache() -> None:
    layer = Mamba(D_MODEL, dtype=torch.bfloat16)
    conv, ssm = layer.allocate_inference_cache(2, 10)
    assert (conv.shape, conv.dtype) == ((2, 24, 4), torch.bfloat16)
    assert (ssm.shape, ssm.dtype) == ((2, 24, 16), torch.float32)
    conv, ssm = layer.allocate_inference_cache(2, 10, dtype=torch.float16)
    assert conv.dtype == ssm.dtype == torch.float16
    layer = Mamba(D_MODEL)
    with torch.autocast("cpu", torch.bfloat16):
        conv, ssm = layer.allocate_inference_cache(2, 10)
        assert (conv.dtype, ssm.dtype) == (torch.bfloat16, torch.float32)
        with torch.no_grad():
            assert layer.step(torch.randn(2, 1, D_MODEL), conv, ssm)[0].dtype == torch.bfloat16
    with torch.no_grad():  # a state of another dtype than the activations'
        conv, ssm = layer.allocate_inference_cache(2, 10, dtype=torch.bfloat16)
        assert layer.step(torch.randn(2, 1, D_MODEL), conv, ssm)[0].dtype == torch.float32


def test_states_hold_no_graph_and_steps_have_no_gradient() -> None:
    layer, context = make(), params()
    x = torch.randn(1, 5, D_MODEL, dtype=torch.float64)
    out = layer(x[:, :3], inference_params=context)
    context.seqlen_offset = 3
    out = out.sum() + layer(x[:, 3:], inference_params=context).sum()
    assert not any(state.requires_grad for state in context.key_value_memory_dict[0])
    out.backward()  # what a later call wrote into the states is no part of it
    before = [state.clone() for state in context.key_value_memory_dict[0]]
    layer.requires_grad_(False).out_proj.requires_grad_(True)  # asked for after the states' part
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(x[:, :1], inference_params=context)
    assert all(map(torch.equal, before, context.key_value_memory_dict[0]))


# ---- packing


def test_packed_sequences_are_apart() -> None:
    layer, bounds = make(), [0, 1, 1, 8, 25, 40]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    given = tensors(layer, 1, 40)

    def apart(x: Tensor, **p: Tensor) -> Tensor:
        return packed(mamba, p, x, bounds)

    assert_agree(results(run(layer, cu_seqlens=cu_seqlens), given), results(apart, given))
    before = layer(given["x"], cu_seqlens=cu_seqlens.long())
    given["x"][:, 8:25] = torch.nan
    after = layer(given["x"], cu_seqlens=cu_seqlens)
    for begin, end in itertools.pairwise(bounds):
        assert torch.equal(before[:, begin:end], after[:, begin:end]) == (begin != 8)


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
        torch.testing.assert_close(found[s], mamba(layer.state_dict(), whole)[0][0, -1:])


# ---- in a training loop


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """As accurate as plain torch under autocast, twice its error allowed."""
    layer = make().float()
    given = to(torch.float32, tensors(layer, 2, 40))

    def cast(function: Any) -> Any:
        def f(**kw: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                out = function(**kw)
            assert out.dtype == dtype
            return out

        return f

    truth = results(oracle, to(torch.float64, given))
    theirs, ours = results(cast(oracle), given), results(cast(run(layer)), given)
    for name, want in truth.items():
        assert name == "out" or ours[name].dtype == torch.float32
        allowed = 2 * (theirs[name].double() - want).abs().max()
        assert (ours[name].double() - want).abs().max() <= allowed, name


def test_the_backward_keeps_less() -> None:
    """use_fast_path changes what is kept, and no bit of the result, whatever is around it."""
    x = torch.randn(1, 3000, 64, requires_grad=True)
    layer = Mamba(64)
    seen: dict[str, Any] = {}
    convolve = layer._conv

    def watched(*args: Any) -> Tensor:
        out = convolve(*args)
        seen["convolved"] = weakref.ref(out.untyped_storage())
        return out

    layer._conv = watched
    layer.in_proj.register_forward_hook(
        lambda _, __, out: seen.update(projected=weakref.ref(out.untyped_storage()))
    )

    def kept(call: Any) -> set[str]:
        """What outlives the forward."""
        out = call(x)
        gc.collect()
        assert out.requires_grad
        return {name for name, storage in seen.items() if storage() is not None}

    def gradients(call: Any, times: int = 2) -> dict[str, Tensor]:
        x.grad = None
        layer.zero_grad()
        loss = call(x).float().square().sum()
        for _ in range(times):
            loss.backward(retain_graph=True)
        return {n: p.grad * (2 / times) for n, p in [("x", x), *layer.named_parameters()]}

    def halved(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    layer.use_fast_path = False
    assert kept(layer) == {"projected", "convolved"}
    expected, in_half = gradients(layer), gradients(halved)
    layer.use_fast_path = True
    assert kept(layer) == kept(halved) == {"projected"}
    assert_same_bits(gradients(layer), expected)
    assert_same_bits(gradients(halved), in_half)
    assert kept(checkpointed) == set()
    assert_same_bits(gradients(checkpointed, times=1), expected)


def test_nothing_is_copied() -> None:
    """Activations stay as the projections leave them; no operator is there to copy them."""
    seen: set[str] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    layer, x = Mamba(32), torch.randn(2, 20, 32)
    with torch.no_grad(), Names():
        layer(x)
    assert "longspan::selective_scan_forward" in seen
    assert not seen & {f"aten::{op}" for op in ("clone", "copy_", "_to_copy", "cat", "contiguous")}


@pytest.mark.usefixtures("fresh_compiler")
def test_compile() -> None:
    layer = Mamba(16, dtype=torch.float64)
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


def test_export() -> None:
    layer, x = Mamba(16), torch.randn(2, 30, 16)
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: length},))
    x = torch.randn(2, 77, 16)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_copies_and_meta() -> None:
    layer, x = make(torch.float32), torch.randn(2, 5, D_MODEL)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x))
    on_meta = Mamba(D_MODEL, device="meta")
    assert on_meta(x.to("meta")).shape == x.shape
    assert "d_state=16" in repr(layer)


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


# ---- errors


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"d_model": 0}, ["d_model", "1 or more", "0"]),
        ({"d_state": 0}, ["d_state"]),
        ({"d_conv": 0}, ["d_conv"]),
        ({"dt_rank": 0}, ["dt_rank"]),
        ({"dt_rank": "half"}, ["dt_rank", "auto", "'half'"]),
        ({"dt_init": "zero"}, ["dt_init", "random", "constant", "'zero'"]),
        ({"dt_min": 0.2}, ["dt_min", "0.2", "0.1"]),
    ],
)
def test_wrong_options(options: dict[str, Any], parts: list[str]) -> None:
    assert_raises(ValueError, ["Mamba", *parts], lambda: Mamba(**{"d_model": 8, **options}))


def test_wrong_calls() -> None:
    layer = Mamba(8, layer_idx=0)
    x = torch.randn(2, 5, 8)
    assert_raises(TypeError, ["hidden_states", "list"], lambda: layer([1]))
    assert_raises(TypeError, ["hidden_states", "int64"], lambda: layer(x.long()))
    assert_raises(ValueError, ["hidden_states", "any, any, 8", "(2, 5)"], lambda: layer(x[..., 0]))
    assert_raises(
        ValueError,
        ["cu_seqlens", "batch of 1", "2"],
        lambda: layer(x, cu_seqlens=torch.tensor([0, 5])),
    )
    assert_raises(TypeError, ["cu_seqlens", "int32"], lambda: layer(x[:1], cu_seqlens=x[0, :, 0]))
    assert_raises(
        ValueError, ["cu_seqlens", "2 entries"], lambda: layer(x[:1], cu_seqlens=torch.tensor([0]))
    )
    states = layer.allocate_inference_cache(2, 1)
    assert_raises(ValueError, ["step", "(any, 1, 8)", "(2, 5, 8)"], lambda: layer.step(x, *states))
    assert_raises(
        ValueError, ["conv_state", "(1, 16, 4)", "(2, 16, 4)"], lambda: layer.step(x[:1, :1], *states)
    )
    context = params()
    with torch.no_grad():
        layer(x, inference_params=context)
    assert_raises(
        ValueError, ["conv_state", "(2, 16, 4)"], lambda: layer(x[:1], inference_params=context)
    )
    context.seqlen_offset = 5
    assert_raises(
        ValueError,
        ["cu_seqlens", "None"],
        lambda: layer(x[:1], inference_params=context, cu_seqlens=torch.tensor([0, 2, 5])),
    )
    unnamed = Mamba(8)
    assert_raises(ValueError, ["layer_idx"], lambda: unnamed(x, inference_params=params()))
