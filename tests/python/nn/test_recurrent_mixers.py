"""The layers of linear attention: their formulas, their three forms, states, padding, parameters."""

import copy
import io
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_raises
from torch import Tensor, nn
from torch.testing import assert_close

import longspan
from longspan.nn import (
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    LinearAttention,
    MultiScaleRetention,
    PerformerAttention,
    RecurrentState,
)
from longspan.nn.feature_maps import FEATURE_MAPS

SIZE = 32
LAYERS: dict[str, Callable[..., Any]] = {
    "linear": lambda **kind: LinearAttention(SIZE, num_heads=4, num_kv_heads=2, **kind),
    "hedgehog": lambda **kind: LinearAttention(
        SIZE, 0.5, 2.0, 4, feature_map="hedgehog", output_norm="rmsnorm", norm_q=True, norm_k=True,
        do_feature_map_norm=False, **kind,
    ),
    "performer": lambda **kind: PerformerAttention(SIZE, 4, 2, num_features=16, **kind),
    "hyperbolic": lambda **kind: PerformerAttention(
        SIZE, 2, head_dim=8, num_features=12, kind="hyperbolic", eps=1e-3, **kind
    ),
    "generalised": lambda **kind: PerformerAttention(SIZE, 4, num_features=12, kind=F.relu, **kind),
    "retention": lambda **kind: MultiScaleRetention(SIZE, num_heads=4, num_kv_heads=2, **kind),
    "retention with convolutions": lambda **kind: MultiScaleRetention(
        SIZE, 0.5, 1.0, 4, use_short_conv=True, conv_size=3, feature_map="silu", gate_fn="sigmoid",
        rotary_interleaved=True, **kind,
    ),
    "gla": lambda **kind: GatedLinearAttention(SIZE, num_heads=4, num_kv_heads=2, **kind),
    "gla with convolutions": lambda **kind: GatedLinearAttention(
        SIZE, 1.0, 0.5, 4, use_short_conv=True, conv_bias=True, feature_map="relu",
        use_output_gate=False, elementwise_affine=False, clamp_min=-0.5, **kind,
    ),
    "delta net": lambda **kind: DeltaNet(SIZE, 0.5, 1.0, 4, use_gate=True, **kind),
    "delta net without convolutions": lambda **kind: DeltaNet(
        SIZE, num_heads=4, use_beta=False, use_short_conv=False, qk_activation="elu", qk_norm="sum",
        **kind,
    ),
    "gated delta net": lambda **kind: GatedDeltaNet(
        SIZE, 1.5, 8, 2, 4, conv_bias=True, allow_neg_eigval=True, **kind
    ),
    "gated delta net without convolutions": lambda **kind: GatedDeltaNet(
        SIZE, 1.0, 8, 2, use_gate=False, use_short_conv=False, **kind
    ),
}  # fmt: skip


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Any:
    made = LAYERS[request.param](dtype=torch.float64)
    for p in made.parameters():  # norms and gates that are not all alike
        with torch.no_grad():
            p += 0.1 * torch.randn_like(p)
    return made


def hidden(batch: int = 2, tokens: int = 21) -> Tensor:
    return torch.randn(batch, tokens, SIZE, dtype=torch.float64)


# ---- the formulas, written out


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps) ** -0.5 * weight


def test_linear_attention_is_the_papers() -> None:
    layer, x = LAYERS["linear"](dtype=torch.float64), hidden()
    q, k, v = heads(layer.q_proj(x), 4), heads(layer.k_proj(x), 2), heads(layer.v_proj(x), 2)
    q, k = (F.elu(y) + 1 for y in (q, k.repeat_interleave(2, 1)))
    weights = (q @ k.transpose(-1, -2)).tril()
    out = (weights / weights.sum(-1, keepdim=True)) @ v.repeat_interleave(2, 1)
    # The sum is over sqrt(K), and 1e-6 is added to it.
    assert_close(layer(x), layer.o_proj(out.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-6)


def test_not_causal_linear_attention() -> None:
    layer, x = LAYERS["linear"](dtype=torch.float64, causal=False), hidden()
    assert_close(layer(x).flip(1), layer(x.flip(1)))
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[0, 15:] = False
    assert_close(layer(x, key_mask=mask)[:1, :15], layer(x[:1, :15]))
    for options in ({"return_final_state": True}, {"cache": layer.make_cache(2)}):
        assert_raises(ValueError, ["LinearAttention", "causal=True"], lambda o=options: layer(x, **o))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps(name: str) -> None:
    make, times = FEATURE_MAPS[name]
    f, x = make(6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    y = f(x)
    assert y.shape == (3, 6 * times)
    if name == "elu":
        assert_close(y, F.elu(x) + 1)
        tiny = torch.tensor([-60.0, 0.0], requires_grad=True)
        assert bool((f(tiny) > 0).all())
        assert_close(torch.autograd.grad(f(tiny).sum(), tiny)[0], torch.tensor([math.exp(-60), 1.0]))
    if name == "dpfp":
        both = torch.cat([x.relu(), (-x).relu()], -1)
        wanted = [both[:, i] * both[:, (i - j) % 12] for j in (1, 2, 3, 4) for i in range(12)]
        assert_close(y, torch.stack(wanted, -1))
    if name == "hedgehog":
        assert_close(y, torch.cat([2 * x, -2 * x], -1).softmax(-1))
    if name == "softmax":
        assert_close(y.sum(-1), torch.ones(3).double())
    tied = LinearAttention(SIZE, num_heads=4, feature_map=name, tie_feature_map_qk=True)
    assert tied.feature_map_q is tied.feature_map_k
    assert bool(tied(torch.randn(1, 5, SIZE)).isfinite().all())


@pytest.mark.parametrize("interleaved", [False, True])
def test_retention_is_the_papers_parallel_form(interleaved: bool) -> None:
    layer = MultiScaleRetention(SIZE, num_heads=4, rotary_interleaved=interleaved, dtype=torch.float64)
    with torch.no_grad():
        layer.g_norm_swish_gate.weight.uniform_(0.5, 1.5)
    x = hidden()
    q, k, v = (heads(p(x), 4) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    at = torch.arange(21, dtype=torch.float64)
    angle = at[:, None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)

    def turn(y: Tensor) -> Tensor:
        a, b = (y[..., ::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
        pairs = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
        return torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)

    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
    assert gamma.tolist() == [0.96875, 0.984375, 0.9921875, 0.99609375]
    decay = (gamma[:, None, None] ** (at[:, None] - at)).tril()
    out = (turn(q) @ turn(k).transpose(-1, -2) / 8**0.5 * decay) @ v
    gate = heads(layer.g_proj(x), 4)
    out = rms(out, layer.g_norm_swish_gate.weight) * F.silu(gate)
    assert_close(layer(x), layer.o_proj(out.transpose(1, 2).flatten(2)))


def test_gla_is_the_papers_recurrence() -> None:
    layer, x = LAYERS["gla"](dtype=torch.float64), hidden()
    q, k, v = heads(layer.q_proj(x), 4), heads(layer.k_proj(x), 2), heads(layer.v_proj(x), 2)
    gate = F.logsigmoid(layer.gk_proj[1](layer.gk_proj[0](x))) / 16
    k, v, gate = (y.repeat_interleave(2, 1) for y in (k, v, heads(gate, 2)))
    S, outs = torch.zeros(2, 4, 4, 8, dtype=torch.float64), []
    for t in range(21):
        S = gate[:, :, t].exp()[..., None] * S + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], S) / 4**0.5)
    out = torch.stack(outs, 1)
    norm = layer.g_norm_swish_gate
    out = rms(out, norm.weight) * F.silu(layer.g_proj(x)).unflatten(-1, (4, 8))
    assert_close(layer(x), layer.o_proj(out.flatten(2)))


@pytest.mark.parametrize("gated", [False, True])
def test_delta_net_is_the_papers_recurrence(gated: bool) -> None:
    layer: Any
    if gated:
        layer = GatedDeltaNet(SIZE, 1.5, 8, 2, 4, allow_neg_eigval=True, dtype=torch.float64)
    else:
        layer = DeltaNet(SIZE, num_heads=4, use_gate=True, dtype=torch.float64)
    x, count = hidden(), 2 if gated else 4

    def convolved(name: str, count: int) -> Tensor:
        y = getattr(layer, f"{name}_proj")(x).transpose(1, 2)
        return heads(F.silu(getattr(layer, f"{name}_conv1d")(y)[..., :21]).transpose(1, 2), count)

    q, k = (
        y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        for y in (convolved("q", count), convolved("k", count))
    )
    q, k, v = q.repeat_interleave(4 // count, 1), k.repeat_interleave(4 // count, 1), convolved("v", 4)
    beta, decay = layer.b_proj(x).sigmoid(), torch.ones(2, 21, 4, dtype=torch.float64)
    if gated:
        beta = 2 * beta
        decay = (-layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias)).exp()
    S, outs = torch.zeros(2, 4, 8, v.shape[-1], dtype=torch.float64), []
    for t in range(21):
        S = decay[:, t, :, None, None] * S
        error = v[:, :, t] - torch.einsum("bhk,bhkv->bhv", k[:, :, t], S)
        S = S + k[:, :, t, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], S) / 8**0.5)
    out = rms(torch.stack(outs, 1), layer.o_norm.weight)
    out = out * F.silu(layer.g_proj(x)).unflatten(-1, (4, -1))
    assert_close(layer(x), layer.o_proj(out.flatten(2)))


def test_convolutions_come_before_the_heads() -> None:
    plain = GatedLinearAttention(SIZE, num_heads=4, dtype=torch.float64)
    layer = GatedLinearAttention(
        SIZE, num_heads=4, use_short_conv=True, conv_bias=True, dtype=torch.float64
    )
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = hidden()
    for name in "qkv":
        conv, projection = getattr(layer, f"{name}_conv1d"), getattr(plain, f"{name}_proj")
        y = projection(x).transpose(1, 2)
        setattr(plain, f"{name}_proj", Fixed(F.silu(conv(y)[..., :21]).transpose(1, 2)))
    assert_close(layer(x), plain(x))


class Fixed(nn.Module):
    """Gives one tensor whatever it is asked."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, x: Tensor) -> Tensor:
        return self.y


def test_performer_loads_attentions_weights_and_approaches_it() -> None:
    exact = longspan.nn.Attention(SIZE, 4, 2, causal=True)
    layer = PerformerAttention(SIZE, 4, 2, num_features=8192)
    missing, unexpected = layer.load_state_dict(exact.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {"projection", "seed", "calls"}
    x = torch.randn(2, 50, SIZE)
    with torch.no_grad():
        error = (layer(x) - exact(x)).norm() / exact(x).norm()
    assert float(error) < 0.03


# ---- the three forms


@torch.no_grad()
def test_pieces_and_steps_with_a_cache_equal_the_whole(layer: Any) -> None:
    x = hidden()
    cache, outs, start = layer.make_cache(2), [], 0
    for length in (7, 1, 1, 6, *[1] * 6):
        outs.append(layer(x[:, start : start + length], cache=cache))
        start += length
    assert_close(torch.cat(outs, 1), layer(x))
    assert cache.tokens.tolist() == [21, 21]
    assert cache.nbytes == layer.make_cache(2).nbytes  # of one size, however many tokens
    _, state = layer(x, return_final_state=True)
    for a, b in zip((*cache.memory, *cache.conv), (*state.memory, *state.conv)):
        assert_close(a, b)


def test_states_are_handed_on_with_their_gradients(layer: Any) -> None:
    x = hidden().requires_grad_()
    whole, end = layer(x, return_final_state=True)
    first, state = layer(x[:, :9], return_final_state=True)
    rest, last = layer(x[:, 9:], initial_state=state, return_final_state=True)
    joined = torch.cat([first, rest], 1)
    assert_close(joined, whole)
    leaves = [x, *layer.parameters()]
    losses = (y.square().sum() + sum(m.square().sum() for m in s.memory if bool(m.isfinite().all()))
              for y, s in ((joined, last), (whole, end)))  # fmt: skip
    found, wanted = (torch.autograd.grad(loss, leaves) for loss in losses)
    for a, b in zip(found, wanted):
        assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("begun", [False, True])
def test_packed_rows_are_their_own(layer: Any, begun: bool) -> None:
    x, parts = hidden(1, 40), ((0, 17), (17, 17), (17, 19), (19, 40))
    bounds = torch.tensor([0, 17, 17, 19, 40])
    state = None
    if begun:
        _, state = layer(hidden(4, 5), return_final_state=True)
    out, end = layer(x, cu_seqlens=bounds, initial_state=state, return_final_state=True)
    assert_close(out, layer(x, cu_seqlens=bounds, initial_state=state))
    for i, (begin, finish) in enumerate(parts):
        own = None
        if state is not None:
            own = RecurrentState(
                state.tokens[i : i + 1], tuple(m[i : i + 1] for m in state.memory),
                tuple(c[i : i + 1] for c in state.conv),
            )  # fmt: skip
        if begin == finish and own is None:
            continue
        want, last = layer(x[:, begin:finish], initial_state=own, return_final_state=True)
        assert_close(out[:, begin:finish], want)
        for a, b in zip((end.tokens, *end.memory, *end.conv), (last.tokens, *last.memory, *last.conv)):
            assert_close(a[i : i + 1], b)


@torch.no_grad()
def test_padding_is_not_read(layer: Any) -> None:
    x = hidden(3)
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[0, :5], mask[1, 18:], mask[2, [3, 9]] = False, False, False
    x[~mask] = torch.nan
    out = layer(x, key_mask=mask)
    assert not out[~mask].any()
    cache = layer.make_cache(3)
    assert_close(layer(x, key_mask=mask, cache=cache), out)
    step = hidden(3, 1)
    after = layer(step, cache=cache)
    for i in range(3):
        row = x[i : i + 1, mask[i]]
        own = layer.make_cache(1)
        assert_close(out[i : i + 1, mask[i]], layer(row, cache=own))
        assert_close(after[i : i + 1], layer(step[i : i + 1], cache=own))
    assert cache.tokens.tolist() == [17, 19, 20]


@torch.no_grad()
def test_caches_are_reordered_reset_and_cloned(layer: Any) -> None:
    x, cache = hidden(3, 6), layer.make_cache(3)
    layer(x, cache=cache)
    other = cache.clone()
    other.reorder(torch.tensor([2, 2, 0]))
    token = hidden(1, 1).expand(3, -1, -1)
    want = layer(token, cache=cache.clone())
    assert_close(layer(token, cache=other), want[[2, 2, 0]])
    cache.reset(torch.tensor([True, False, False]))
    assert cache.tokens.tolist() == [0, 6, 6]
    assert_close(layer(token, cache=cache)[:1], layer(token[:1], cache=layer.make_cache(1)))
    cache.reset()
    for a, b in zip(cache._tensors(), layer.make_cache(3)._tensors()):
        assert torch.equal(a, b)
    assert cache.detach().memory[0].data_ptr() == cache.memory[0].data_ptr()


# ---- training


def test_gradients_are_the_numerical_ones(layer: Any) -> None:
    x = hidden(1, 5).requires_grad_()
    if isinstance(layer, PerformerAttention):  # a kink has no numerical derivative, nor do maxima
        layer.kind, layer.eps = F.softplus if callable(layer.kind) else layer.kind, 0.0
    if isinstance(layer, GatedLinearAttention) and layer.clamp_min is not None:
        layer.clamp_min, layer._feature_map = -100.0, F.softplus
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-6)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_half_precision_and_autocast(layer: Any) -> None:
    x = hidden()
    exact = layer(x).detach()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    found = half(x.bfloat16()).detach()
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 0.05
    wide = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = wide(x.float())
        found = found.detach()
        with torch.no_grad():
            cache = wide.make_cache(2)
            steps = [wide(x[:, t : t + 1].float(), cache=cache) for t in range(21)]
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 0.05
    assert float((torch.cat(steps, 1).double() - exact).norm() / exact.norm()) < 0.05


def test_compile(fresh_compiler: None, layer: Any) -> None:
    x = hidden()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))
    leaves = list(layer.parameters())
    for a, b in zip(
        torch.autograd.grad(compiled(x).square().sum(), leaves),
        torch.autograd.grad(layer(x).square().sum(), leaves),
    ):
        assert_close(a, b)


def test_saving_and_loading(layer: Any) -> None:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(layer)
    for p in other.state_dict().values():
        p.zero_()
    other.load_state_dict(torch.load(file))
    x = hidden()
    assert torch.equal(other(x), layer(x))


FLA = {  # the parameters of flash-linear-attention's layers, for hidden_size 32
    "linear": (
        lambda: LinearAttention(32, num_heads=4, output_norm="rmsnorm", feature_map="hedgehog"),
        {
            "q_proj.weight": (32, 32), "k_proj.weight": (32, 32), "v_proj.weight": (32, 32),
            "o_proj.weight": (32, 32), "norm.weight": (8,), "feature_map_q.layer.weight": (8, 8),
            "feature_map_q.layer.bias": (8,), "feature_map_k.layer.weight": (8, 8),
            "feature_map_k.layer.bias": (8,),
        },
    ),
    "retention": (
        lambda: MultiScaleRetention(32, num_heads=4, num_kv_heads=2),
        {
            "q_proj.weight": (32, 32), "k_proj.weight": (16, 32), "v_proj.weight": (32, 32),
            "g_proj.weight": (64, 32), "o_proj.weight": (32, 64), "g_norm_swish_gate.weight": (16,),
        },
    ),
    "gla": (
        lambda: GatedLinearAttention(32, num_heads=4, use_short_conv=True, conv_bias=True),
        {
            "q_proj.weight": (16, 32), "k_proj.weight": (16, 32), "v_proj.weight": (32, 32),
            "g_proj.weight": (32, 32), "o_proj.weight": (32, 32), "g_norm_swish_gate.weight": (8,),
            "gk_proj.0.weight": (16, 32), "gk_proj.1.weight": (16, 16), "gk_proj.1.bias": (16,),
            "q_conv1d.weight": (16, 1, 4), "q_conv1d.bias": (16,), "k_conv1d.weight": (16, 1, 4),
            "k_conv1d.bias": (16,), "v_conv1d.weight": (32, 1, 4), "v_conv1d.bias": (32,),
        },
    ),
    "delta net": (
        lambda: DeltaNet(32, num_heads=4, use_gate=True),
        {
            "q_proj.weight": (32, 32), "k_proj.weight": (32, 32), "v_proj.weight": (32, 32),
            "b_proj.weight": (4, 32), "g_proj.weight": (32, 32), "o_proj.weight": (32, 32),
            "o_norm.weight": (8,), "q_conv1d.weight": (32, 1, 4), "k_conv1d.weight": (32, 1, 4),
            "v_conv1d.weight": (32, 1, 4),
        },
    ),
    "gated delta net": (
        lambda: GatedDeltaNet(32, 2, 8, 2, 4),
        {
            "q_proj.weight": (16, 32), "k_proj.weight": (16, 32), "v_proj.weight": (64, 32),
            "a_proj.weight": (4, 32), "b_proj.weight": (4, 32), "g_proj.weight": (64, 32),
            "o_proj.weight": (32, 64), "o_norm.weight": (16,), "A_log": (4,), "dt_bias": (4,),
            "q_conv1d.weight": (16, 1, 4), "k_conv1d.weight": (16, 1, 4),
            "v_conv1d.weight": (64, 1, 4),
        },
    ),
    "gla without fusing": (
        lambda: GatedLinearAttention(32, num_heads=4, fuse_norm=False, gate_low_rank_dim=3),
        {
            "q_proj.weight": (16, 32), "k_proj.weight": (16, 32), "v_proj.weight": (32, 32),
            "g_proj.weight": (32, 32), "o_proj.weight": (32, 32), "g_norm.weight": (8,),
            "gk_proj.0.weight": (3, 32), "gk_proj.1.weight": (16, 3), "gk_proj.1.bias": (16,),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLA)
def test_parameters_are_named_and_shaped_as_flas(name: str) -> None:
    make, shapes = FLA[name]
    assert {n: tuple(p.shape) for n, p in make().state_dict().items()} == shapes


def test_fusing_names_the_norm_and_changes_nothing() -> None:
    fused, apart = (
        GatedLinearAttention(SIZE, num_heads=4, fuse_norm=f, dtype=torch.float64) for f in (True, False)
    )
    apart.load_state_dict(
        {n.replace("g_norm_swish_gate", "g_norm"): p for n, p in fused.state_dict().items()}
    )
    x = hidden()
    assert_close(apart(x), fused(x))


# ---- arguments


def test_wrong_arguments_are_named(layer: Any) -> None:
    name, x = type(layer).__name__, hidden()
    state = layer.make_cache(2)

    def fails(error: type[Exception], *parts: str, x: Any = x, **options: Any) -> None:
        assert_raises(error, [name, *parts], lambda: layer(x, **options))

    fails(TypeError, "hidden_states", "tensor", x=None)
    fails(TypeError, "hidden_states", "int64", x=x.long())
    fails(ValueError, "hidden_states", "(any, any, 32)", x=x[..., :31])
    fails(TypeError, "key_mask", "bool", key_mask=torch.ones(2, 21))
    fails(ValueError, "key_mask", "(2, 21)", key_mask=torch.ones(2, 20, dtype=torch.bool))
    fails(ValueError, "cu_seqlens", "batch of 1", cu_seqlens=torch.tensor([0, 21]))
    fails(ValueError, "initial_state and cache", initial_state=state, cache=state)
    fails(ValueError, "initial_state", "make_cache", initial_state=layer.make_cache(3))
    fails(TypeError, "initial_state", "RecurrentState", initial_state=state.memory[0])
    fails(RuntimeError, "cache", "no gradient", cache=state)
    fails(
        ValueError, "key_mask and cu_seqlens", x=x[:1], cu_seqlens=torch.tensor([0, 21]),
        key_mask=torch.ones(1, 21, dtype=torch.bool),
    )  # fmt: skip
    assert_raises(ValueError, ["make_cache", "batch_size", "0"], lambda: layer.make_cache(0))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: LinearAttention(32, num_heads=5), ["expand_k", "heads, 5", "32"]),
        (lambda: LinearAttention(32, num_heads=4, num_kv_heads=3), ["num_kv_heads", "4", "3"]),
        (lambda: LinearAttention(32, num_heads=0), ["num_heads", "1 or more"]),
        (lambda: LinearAttention(32, 0.3), ["expand_k", "9.6"]),
        (lambda: LinearAttention(32, feature_map="exp"), ["feature_map", "elu", "'exp'"]),
        (lambda: LinearAttention(32, output_norm="layer"), ["output_norm", "rmsnorm"]),
        (lambda: PerformerAttention(32, 4, num_features=0), ["num_features", "1 or more"]),
        (lambda: PerformerAttention(32, 4, kind="cosine"), ["kind", "positive"]),
        (lambda: PerformerAttention(32, 4, redraw_interval=0), ["redraw_interval", "1 or more"]),
        (lambda: PerformerAttention(32, 4, norms="unit"), ["norms", "gaussian"]),
        (lambda: MultiScaleRetention(24, num_heads=8), ["expand_k", "even", "3"]),
        (lambda: MultiScaleRetention(32, gate_fn="tan"), ["gate_fn", "swish", "'tan'"]),
        (lambda: MultiScaleRetention(32, feature_map="tan"), ["feature_map", "relu"]),
        (lambda: GatedLinearAttention(32, use_short_conv=True, conv_size=1), ["conv_size", "2"]),
        (lambda: GatedLinearAttention(32, gate_logit_normalizer=0), ["gate_logit", "above 0"]),
        (lambda: GatedLinearAttention(32, gate_low_rank_dim=0), ["gate_low_rank_dim", "1 or more"]),
        (lambda: DeltaNet(32, qk_activation="tan"), ["qk_activation", "silu", "'tan'"]),
        (lambda: DeltaNet(32, qk_norm="max"), ["qk_norm", "l2"]),
        (lambda: GatedDeltaNet(32, head_dim=8, num_heads=2, num_v_heads=3), ["num_v_heads", "2", "3"]),
        (lambda: GatedDeltaNet(32, 1.3, 8, 2), ["expand_v", "20.8"]),
        (lambda: GatedDeltaNet(32, head_dim=0), ["head_dim", "1 or more"]),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_named(make: Callable[[], Any], parts: list[str]) -> None:
    assert_raises(ValueError, parts, make)


# ---- when Performer draws


def performer(**options: Any) -> PerformerAttention:
    return PerformerAttention(SIZE, 4, num_features=16, **options)


def test_directions_are_redrawn_on_schedule_in_training_only() -> None:
    layer, x = performer(redraw_interval=3), torch.randn(1, 5, SIZE)
    seen = []
    for _ in range(7):
        layer(x)
        seen.append(layer.projection.clone())
    same = [torch.equal(a, b) for a, b in pairwise(seen)]
    assert same == [True, True, False, True, True, False]
    layer.eval()
    before = layer.projection.clone()
    for _ in range(4):
        layer(x)
    assert torch.equal(layer.projection, before)
    layer.train()
    with torch.no_grad():  # a decode has one projection, in training mode too
        cache = layer.make_cache(1)
        for _ in range(7):
            layer(x, cache=cache)
    assert torch.equal(layer.projection, before)
    fixed = performer()
    before = fixed.projection.clone()
    for _ in range(4):
        fixed(x)
    assert torch.equal(fixed.projection, before)
    fixed.redraw_projection(seed=4)
    again = performer()
    again.redraw_projection(seed=4)
    assert torch.equal(fixed.projection, again.projection)
    assert not torch.equal(fixed.projection, before)


def test_a_loaded_layer_goes_on_with_the_schedule() -> None:
    layer, x = performer(redraw_interval=3), torch.randn(1, 5, SIZE)
    layer(x), layer(x)
    other = performer(redraw_interval=3)
    other.load_state_dict(layer.state_dict())
    found = []
    for each in (layer, other):
        torch.manual_seed(1)
        found.append(([each(x) for _ in range(4)], each.projection))
    for a, b in zip(found[0][0], found[1][0]):
        assert torch.equal(a, b)
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0][0], found[0][0][1])  # the third call of each kind drew


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_compute_again_with_the_directions_of_their_call(reentrant: bool) -> None:
    """Several calls wait for their backward while others draw new directions."""
    xs = [torch.randn(1, 5, SIZE).requires_grad_() for _ in range(5)]

    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(3)
        layer = performer(redraw_interval=1)

        def call(x: Tensor) -> Tensor:
            if not checkpointed:
                return layer(x)
            return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)

        outs = [call(x) for x in xs]
        assert int(layer.calls) == 5
        found = []
        for out, x in reversed(list(zip(outs, xs))):
            x.grad = None
            out.square().sum().backward()
            found.append(x.grad)
        assert int(layer.calls) == 5  # what is computed again does not count
        return found

    for a, b in zip(gradients(True), gradients(False)):
        assert torch.equal(a, b)


def test_a_checkpoint_that_forgets_the_generator_is_refused() -> None:
    layer, x = performer(redraw_interval=1), torch.randn(1, 5, SIZE).requires_grad_()
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    assert_raises(RuntimeError, ["redraw_interval", "preserve_rng_state"], out.sum().backward)
