"""longspan.nn.Attention against the same layer written out densely in float64."""

import itertools
import math

import pytest
import torch

from longspan.nn import Attention, KVCache

F64 = torch.float64
HIDDEN = 24


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rotary(q, k, positions):
    """Rotary position embedding, halves together (Su et al. 2021)."""
    half = q.shape[-1] // 2
    angle = positions[:, None, :, None] * 10.0 ** -torch.arange(half, dtype=F64)
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

    def turn(x):
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return turn(q), turn(k)


def make(*args, dtype=F64, **options):
    """A layer whose every parameter has a part in the result."""
    layer = Attention(*(args or (HIDDEN, 4, 2, 8)), dtype=dtype, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def dense(layer, x, real=None):
    """The layer on x (T, hidden), tokens where ``real``; rows of padding are 0."""
    t = x.shape[0]
    real = torch.ones(t, dtype=torch.bool) if real is None else real
    h, g, d = layer.num_heads, layer.num_kv_heads, layer.head_dim
    q, k, v = (
        (x @ p.weight.T + (0 if p.bias is None else p.bias)).reshape(1, t, n, d).transpose(1, 2)
        for p, n in ((layer.q_proj, h), (layer.k_proj, g), (layer.v_proj, g))
    )
    if layer.q_norm is not None:
        q, k = (
            y * (y.square().mean(-1, keepdim=True) + m.eps).rsqrt() * m.weight
            for y, m in ((q, layer.q_norm), (k, layer.k_norm))
        )
    if layer.rotary is not None:
        q, k = layer.rotary(q, k, (real.cumsum(0) - 1).clamp(min=0)[None])
    k, v = (y.repeat_interleave(h // g, dim=1) for y in (k, v))
    score = q @ k.transpose(-1, -2) * (d**-0.5 if layer.scale is None else layer.scale)
    if layer.softcap:
        score = layer.softcap * torch.tanh(score / layer.softcap)
    at, key = torch.arange(t)[:, None], torch.arange(t)[None]
    seen = real[None].expand(t, t)
    left, right = layer.window
    if layer.causal or right >= 0:
        seen = seen & (key <= at + (0 if layer.causal else right))
    if left >= 0:
        first = int(real.int().argmax())
        seen = seen & ((key >= at - left) | (key < first + layer.sink_tokens))
    score = score.masked_fill(~seen, -1e30)
    if layer.sinks is not None:
        score = torch.cat([score, layer.sinks[None, :, None, None].expand(1, h, t, 1)], -1)
    weight = torch.softmax(score, -1)[..., :t] * seen
    y = (weight @ v).transpose(1, 2).reshape(t, h * d) @ layer.o_proj.weight.T
    y = y if layer.o_proj.bias is None else y + layer.o_proj.bias
    return y * real[:, None]


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


def gradients(layer, x, y):
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])


RICH = {
    "causal": True,
    "window": (6, 0),
    "sink_tokens": 2,
    "sinks": True,
    "qk_norm": True,
    "rotary": rotary,
    "softcap": 4.0,
    "qkv_bias": True,
    "out_bias": True,
}
OPTIONS = [
    {},
    {"qkv_bias": True},
    {"out_bias": True, "scale": 0.2},
    {"causal": True, "rotary": rotary},
    {"qk_norm": True, "norm_eps": 0.1},
    {"window": (3, 2)},
    {"window": (4, -1), "causal": True, "sink_tokens": 3},
    {"sinks": True, "causal": True},
    {"softcap": 0.7},
    RICH,
]


# ---- the layer


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_forward_and_every_gradient(options):
    layer = make(**options)
    x = torch.randn(2, 19, HIDDEN, dtype=F64, requires_grad=True)
    y = layer(x)
    expected = torch.stack([dense(layer, row) for row in x])
    close(y, expected)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, got, want in zip(names, gradients(layer, x, y), gradients(layer, x, expected)):
        close(got, want, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("heads", [(HIDDEN, 4), (HIDDEN, 6, 1), (HIDDEN, 3, 3, 5), (10, 4, 2, 8)])
def test_heads(heads):
    layer = make(*heads, causal=True)
    x = torch.randn(1, 9, heads[0], dtype=F64)
    close(layer(x)[0], dense(layer, x[0]))


def test_a_module_as_rotary_is_trained_with_the_layer():
    class Gain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(1.5, dtype=F64))

        def forward(self, q, k, positions):
            return q * self.gain, k

    layer = make(rotary=Gain())
    assert "rotary.gain" in layer.state_dict()
    layer(torch.randn(1, 5, HIDDEN, dtype=F64)).square().sum().backward()
    assert layer.rotary.gain.grad.abs() > 0


def test_state_dict_has_llamas_names_and_round_trips():
    layer = make(**RICH)
    names = {f"{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    assert set(layer.state_dict()) == names | {"q_norm.weight", "k_norm.weight", "sinks"}
    assert set(Attention(HIDDEN, 4).state_dict()) == {f"{p}_proj.weight" for p in "qkvo"}
    other = make(**RICH)
    x = torch.randn(1, 12, HIDDEN, dtype=F64)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_dropout_is_for_training_and_follows_the_seed():
    layer = make(dropout=0.5)
    x = torch.randn(1, 20, HIDDEN, dtype=F64)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(layer(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    mean = torch.stack([layer(x).detach() for _ in range(200)]).mean(0)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    close(layer(x)[0], dense(layer, x[0]))
    assert (mean - layer(x)).abs().max() < 0.4 * (results[0] - layer(x)).abs().max()


def test_gradcheck():
    layer = make(4, 2, 1, 2, **RICH)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        arguments = dict(zip(names, parameters))
        kwargs = {"lengths": torch.tensor([5, 3])}
        return torch.func.functional_call(layer, arguments, (x,), kwargs)

    x = torch.randn(2, 5, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


def test_checkpointed_layer_has_the_same_gradients():
    layer = make(dropout=0.3, causal=True)
    x = torch.randn(1, 12, HIDDEN, dtype=F64, requires_grad=True)
    torch.manual_seed(1)
    plain = gradients(layer, x, layer(x))
    torch.manual_seed(1)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    for a, b in zip(gradients(layer, x, y), plain):
        assert torch.equal(a, b)


# ---- padding and packing


PADDINGS = {
    "right": [[1] * 6 + [0] * 5, [1] * 11, [1] + [0] * 10],
    "left": [[0] * 5 + [1] * 6, [1] * 11, [0] * 10 + [1]],
    "both": [[0, 0] + [1] * 6 + [0] * 3, [1] * 10 + [0], [0] + [1] * 10],
    "holes": [[1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1], [1] * 11],
    "nothing": [[0] * 11, [1] * 11, [0] * 11],
}


@pytest.mark.parametrize("options", [{}, {"causal": True, "out_bias": True}, RICH], ids=lambda o: len(o))
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_reaches_nothing(padding, options):
    layer = make(**options)
    mask = torch.tensor(PADDINGS[padding], dtype=torch.bool)
    clean = torch.randn(3, 11, HIDDEN, dtype=F64) * mask[..., None]
    clean.requires_grad_()
    dirty = torch.where(mask[..., None], clean.detach(), math.nan).requires_grad_()
    expected = torch.stack([dense(layer, row, real) for row, real in zip(clean, mask)])
    wanted = [
        g * mask[..., None] if i == 0 else g for i, g in enumerate(gradients(layer, clean, expected))
    ]
    calls = [{"key_mask": mask}]
    if padding == "right":
        calls.append({"lengths": mask.sum(1).int()})
    for call in calls:
        y = layer(dirty, **call)
        close(y, expected)
        assert not y[~mask].any()
        for got, want in zip(gradients(layer, dirty, y), wanted):
            close(got, want)


def test_padding_on_either_side_is_the_sequence_alone():
    layer = make(**RICH)
    x = torch.randn(1, 8, HIDDEN, dtype=F64)
    alone = layer(x)
    for left, right in ((5, 0), (0, 5), (2, 3)):
        padded = torch.nn.functional.pad(x, (0, 0, left, right), value=7.0)
        mask = torch.zeros(1, 13, dtype=torch.bool)
        mask[:, left : left + 8] = True
        close(layer(padded, key_mask=mask)[:, left : left + 8], alone)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_are_each_alone(dtype):
    layer = make(**RICH)
    cu = torch.tensor([0, 7, 7, 20, 21], dtype=dtype)
    x = torch.randn(23, HIDDEN, dtype=F64, requires_grad=True)
    y = layer(x, cu_seqlens=cu)
    parts = [layer(x[None, a:b])[0] for a, b in itertools.pairwise(cu) if b > a]
    expected = torch.cat([*parts, layer.o_proj.bias.expand(2, HIDDEN)])  # rows of no sequence
    close(y, expected)
    for got, want in zip(gradients(layer, x, y), gradients(layer, x, expected)):
        close(got, want)


def test_positions_are_the_users():
    layer = make(causal=True, rotary=rotary)
    x = torch.randn(2, 6, HIDDEN, dtype=F64)
    close(layer(x, positions=torch.arange(40, 46)[None]), layer(x))  # rotary is relative
    spread = layer(x, positions=torch.tensor([[0, 2, 4, 6, 8, 10], [0, 1, 2, 3, 4, 5]]))
    close(spread[1], layer(x)[1])
    assert (spread[0] - layer(x)[0]).abs().max() > 1e-3
    packed = layer(x.flatten(0, 1), cu_seqlens=torch.tensor([0, 6, 12]), positions=torch.arange(12))
    close(packed.unflatten(0, (2, 6)), layer(x))


# ---- the cache


CACHED = [{"causal": True}, {"causal": True, "window": (5, 0)}, RICH]


@pytest.mark.parametrize("options", CACHED, ids=lambda o: len(o))
@pytest.mark.parametrize("chunks", [[1] * 30, [17] + [1] * 13, [3, 9, 1, 8, 9], [30]], ids=str)
@torch.no_grad()
def test_steps_are_the_whole(options, chunks):
    layer = make(**options)
    x = torch.randn(2, 30, HIDDEN, dtype=F64)
    cache = layer.make_cache(2, 30)
    cache.k.fill_(math.nan)  # what was not written is not read
    cache.v.fill_(math.nan)
    got = torch.cat([layer(part, cache=cache) for part in x.split(chunks, 1)], 1)
    close(got, layer(x))
    assert cache.lengths.tolist() == [30, 30]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_prompt_and_its_continuation(side):
    layer = make(**RICH)
    prompts = [torch.randn(n, HIDDEN, dtype=F64) for n in (13, 4, 20)]
    more = [torch.randn(n, HIDDEN, dtype=F64) for n in (9, 3, 0)]  # a second padded chunk
    steps = torch.randn(3, 3, HIDDEN, dtype=F64)
    cache = layer.make_cache(3, 25)
    cache.k.fill_(math.nan)
    cache.v.fill_(math.nan)

    def feed(rows, width):
        x = torch.full((3, width, HIDDEN), math.nan, dtype=F64)
        mask = torch.zeros(3, width, dtype=torch.bool)
        for b, row in enumerate(rows):
            at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            x[b, at], mask[b, at] = row, True
        by_length = {"lengths": mask.sum(1)} if side == "right" else {"key_mask": mask}
        y = layer(x, cache=cache, **by_length)
        assert not y[~mask].any()
        return [y[b, mask[b]] for b in range(3)]

    outs = list(zip(feed(prompts, 20), feed(more, 9)))
    last = torch.cat([layer(steps[:, i : i + 1], cache=cache) for i in range(3)], 1)
    assert cache.lengths.tolist() == [25, 10, 23]
    for b in range(3):
        whole = layer(torch.cat([prompts[b], more[b], steps[b]])[None])[0]
        close(torch.cat([*outs[b], last[b]]), whole)


@torch.no_grad()
def test_cache_is_preallocated_and_written_in_place():
    layer = make(causal=True, dtype=torch.float32)
    cache = layer.make_cache(2, 64)
    assert cache.k.shape == cache.v.shape == (2, 2, 64, 8)
    assert cache.nbytes == 2 * 2 * 2 * 64 * 8 * 4
    at = cache.k.data_ptr(), cache.v.data_ptr()
    for n in (20, 1, 3):
        layer(torch.randn(2, n, HIDDEN), cache=cache)
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == at
    assert cache.k[:, :, :24].abs().amin() > 0
    assert not cache.k[:, :, 24:].any()


@torch.no_grad()
def test_reorder_reset_clone_detach():
    layer = make(causal=True, rotary=rotary)
    x, step = torch.randn(3, 9, HIDDEN, dtype=F64), torch.randn(3, 1, HIDDEN, dtype=F64)
    cache = layer.make_cache(3, 12)
    lengths = torch.tensor([9, 5, 7])
    layer(x, lengths=lengths, cache=cache)
    copy, view = cache.clone(), cache.detach()
    beam = torch.tensor([2, 2, 0])
    copy.reorder(beam)
    assert copy.lengths.tolist() == [7, 7, 9]
    got = layer(step, cache=copy)
    for b, source in enumerate(beam):
        whole = torch.cat([x[source, : lengths[source]], step[b]])
        close(got[b, 0], layer(whole[None])[0, -1])
    assert cache.lengths.tolist() == [9, 5, 7]  # the clone is apart
    assert view.k.data_ptr() == cache.k.data_ptr() != copy.k.data_ptr()
    cache.reset(torch.tensor([False, True, False]))
    assert view.lengths.tolist() == [9, 0, 7]
    got = layer(step, cache=cache)
    close(got[1, 0], layer(step[1][None])[0, 0])
    close(got[2, 0], layer(torch.cat([x[2, :7], step[2]])[None])[0, -1])
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]
    close(layer(x, cache=cache), layer(x))


# ---- torch


@pytest.mark.parametrize("kind", ["dropout", "key_mask", "packed"])
def test_compiles_whole_for_training(kind):
    layer = make(dtype=torch.float32, **RICH, dropout=0.3 if kind == "dropout" else 0.0)
    x = torch.randn(2, 12, HIDDEN, requires_grad=True)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    kwargs = {
        "dropout": {"lengths": torch.tensor([12, 3])},
        "key_mask": {"key_mask": mask},
        "packed": {"cu_seqlens": torch.tensor([0, 5, 12])},
    }[kind]
    x = x[0].detach().requires_grad_() if kind == "packed" else x
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    y = compiled(x, **kwargs)
    got = gradients(layer, x, y)
    torch.manual_seed(3)
    expected = layer(x, **kwargs)
    want = gradients(layer, x, expected)
    close(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, want):
        close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiles_whole_for_a_step():
    layer = make(**RICH)
    x = torch.randn(2, 6, HIDDEN, dtype=F64)
    cache = layer.make_cache(2, 6)
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = torch.cat([step(x[:, i : i + 1], cache=cache) for i in range(6)], 1)
    close(got, layer(x))
    with pytest.raises(RuntimeError, match="slots"):
        step(x[:, :1], cache=cache)


@pytest.mark.parametrize("options", [{"causal": True}, RICH], ids=lambda o: len(o))
def test_autocast(options):
    layer = make(dtype=torch.float32, **options)
    x = torch.randn(2, 40, HIDDEN, requires_grad=True)
    exact = make(**options)
    exact.load_state_dict(layer.state_dict())
    want = exact(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        plain = torch.stack([dense(layer, row) for row in x])
        with torch.no_grad():
            cache = layer.make_cache(2, 40)
            assert cache.k.dtype == torch.bfloat16
            steps = torch.cat([layer(part, cache=cache) for part in x.split([30] + [1] * 10, 1)], 1)
    error = (plain - want).abs().max()
    assert (y - want).abs().max() <= 2 * error
    assert (steps - want).abs().max() <= 2 * error
    y.float().square().sum().backward()
    want.square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), exact.parameters()):
        assert p.grad.dtype == torch.float32, name
        assert (p.grad - q.grad).norm() <= 0.05 * q.grad.norm(), name


# ---- errors


def _raises(kind, match, function, *args, **options):
    with pytest.raises(kind, match=match):
        function(*args, **options)


def test_errors_of_construction():
    _raises(ValueError, "num_heads: expected 1 or more, got 0", Attention, 8, 0)
    _raises(ValueError, "num_kv_heads: expected a divisor of num_heads, 4, got 3", Attention, 8, 4, 3)
    _raises(ValueError, "head_dim: expected where hidden_size", Attention, 10, 4)
    _raises(ValueError, "window: expected", Attention, 8, 2, window=(-2, 0))
    _raises(ValueError, "sink_tokens: expected", Attention, 8, 2, sink_tokens=-1)
    _raises(ValueError, "softcap: expected", Attention, 8, 2, softcap=-1.0)
    _raises(ValueError, "dropout: expected", Attention, 8, 2, dropout=1.0)
    _raises(ValueError, "max_length: expected 1 or more, got 0", KVCache, 1, 2, 0, 8)


def test_errors_of_a_call():
    layer = make()
    x = torch.randn(2, 5, HIDDEN, dtype=F64)
    _raises(TypeError, "x: expected a tensor", layer, [1])
    _raises(TypeError, "x: expected float32", layer, x.long())
    _raises(ValueError, r"x: expected \(batch, tokens, hidden_size\)", layer, x[0])
    _raises(ValueError, r"x: .*got \(2, 5, 23\)", layer, x[..., 1:])
    _raises(ValueError, r"x: expected \(total, hidden_size\)", layer, x, cu_seqlens=torch.tensor([0, 5]))
    _raises(TypeError, "lengths: expected int32 or int64", layer, x, lengths=torch.ones(2))
    _raises(ValueError, "lengths: .*got .3", layer, x, lengths=torch.ones(3, dtype=torch.int32))
    _raises(TypeError, "key_mask: expected bool", layer, x, key_mask=torch.ones(2, 5))
    _raises(ValueError, "key_mask: .*got .2, 4", layer, x, key_mask=torch.ones(2, 4, dtype=torch.bool))
    mask = torch.ones(2, 5, dtype=torch.bool)
    _raises(ValueError, "expected one of them", layer, x, key_mask=mask, lengths=mask.sum(1))
    _raises(ValueError, "positions: expected 2 rows", layer, x, positions=torch.zeros(3, 5).long())
    cu = torch.tensor([0, 5])
    for name in ("lengths", "key_mask", "cache"):
        _raises(
            ValueError, f"{name}: expected None beside cu", layer, x[0], cu_seqlens=cu, **{name: mask}
        )


def test_errors_of_the_cache():
    layer = make(causal=True)
    x = torch.randn(2, 5, HIDDEN, dtype=F64)
    cache = layer.make_cache(2, 8)
    _raises(RuntimeError, "no gradient passes a cache", layer, x, cache=cache)
    with torch.no_grad():
        layer(x, cache=cache)
        before = cache.clone()
        _raises(ValueError, "cache: expected 10 slots or more, got 8", layer, x, cache=cache)
        wide = torch.randn(2, 30, HIDDEN, dtype=F64)
        _raises(ValueError, "cache: expected 35 slots or more, got 8", layer, wide, cache=cache)
        holes = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
        _raises(ValueError, "one run of tokens", layer, x, key_mask=holes, cache=cache)
        _raises(ValueError, "cache: .*got .3, 2", layer, x, cache=layer.make_cache(3, 8))
        _raises(
            TypeError,
            "cache: expected k's dtype",
            layer,
            x,
            cache=layer.make_cache(2, 8, dtype=torch.half),
        )
        _raises(ValueError, "expected causal=True", make(), x, cache=cache)
        _raises(ValueError, "expected eval", make(causal=True, dropout=0.1), x, cache=cache)
        make(causal=True, dropout=0.1).eval()(x, cache=layer.make_cache(2, 8))
    assert torch.equal(cache.k, before.k)
    assert torch.equal(cache.lengths, before.lengths)
    _raises(TypeError, "mask: expected bool", cache.reset, torch.ones(2))
    _raises(TypeError, "beam_idx: expected int32 or int64", cache.reorder, torch.ones(2))
    _raises(ValueError, "beam_idx: .*got .3", cache.reorder, torch.zeros(3, dtype=torch.int64))
