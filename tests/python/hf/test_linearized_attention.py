"""What linearized layers compute: against dense maths in double, with caches, padding and packing."""

import copy

import pytest
import torch
from checks import assert_agree, assert_error_ratio, results, to
from extend_models import CLOSE, check_beams, in_parts, padded, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_models import (
    FAMILIES,
    KINDS,
    SINKS,
    WINDOW,
    dense_attention,
    dense_model,
    linear,
    randomise,
)
from transformers import DynamicCache, StaticCache

from longspan.hf._features import NONLINEARITIES, AttentionFeatures
from longspan.hf.linearized_attention import LinearizedLayer, LinearizedPass, linearized_attention

H, KV, D = 6, 2, 8
SCALE = D**-0.5


def features(kind="hedgehog", hybrid=True):
    made = AttentionFeatures(kind, H, KV, D, SCALE, hybrid, dtype=torch.float64)
    randomise(made)
    return made


def inputs(batch, length, dtype=torch.float64):
    return {
        name: torch.randn(batch, heads, length, D, dtype=torch.float64).to(dtype)
        for name, heads in (("q", H), ("k", KV), ("v", KV))
    }


def functions(made, window, sinks):
    """Ours and the dense one, of q, k, v and the maps' parameters by name."""

    def ours(q, k, v, **weights):
        step = LinearizedPass(window or 0, sinks, len(q), q.shape[2])
        weights = {name.replace("_", "."): x for name, x in weights.items()}
        return linearized_attention(Called(made, weights), q, k, v, step, None, SCALE)

    def dense(q, k, v, **weights):
        weights = {name.replace("_", "."): x for name, x in weights.items()}
        kind = made.query.kind
        rows = [dense_attention(weights, kind, *x, SCALE, window, sinks) for x in zip(q, k, v)]
        return torch.stack(rows)

    return ours, dense


class Called:
    """A module with other parameters than its own."""

    def __init__(self, module, weights):
        self.module, self.weights = module, weights

    def __call__(self, *args):
        return torch.func.functional_call(self.module, self.weights, args)

    def parameters(self):
        return self.weights.values()


def everything(made, batch, length):
    weights = {name.replace(".", "_"): x.detach() for name, x in made.named_parameters()}
    return {**inputs(batch, length), **weights}


# ---- the maths


@pytest.mark.parametrize("kind", NONLINEARITIES)
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (5, 0), (5, 3), (40, 2)])
def test_against_dense_weights_in_double(kind, window, sinks):
    made = features(kind, window is not None)
    ours, dense = functions(made, window, sinks)
    tensors = everything(made, 2, 70)
    if kind == "relu":  # else a first token may have no weight at all
        tensors["query_bias"] = tensors["query_bias"] + 3
        tensors["key_bias"] = tensors["key_bias"] + 3
    got, expected = results(ours, tensors), results(dense, tensors)
    unseen = {n for n, x in expected.items() if n.startswith("d ") and not x.abs().max() > 1e-9}
    assert len(unseen) == 0
    terms = dict.fromkeys(expected, 2 * 70 * 70)
    assert_agree(got, expected, terms)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 40),
    window=st.integers(1, 45),
    sinks=st.integers(0, 12),
    batch=st.integers(1, 2),
)
def test_any_sizes(length, window, sinks, batch):
    ours, dense = functions(made := features(), window, sinks)
    tensors = everything(made, batch, length)
    got, want = (results(f, tensors, gradients=False) for f in (ours, dense))
    assert_agree(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    made = features()
    ours, _ = functions(made, 5, 2)

    def fixed(function):
        weights = {n.replace(".", "_"): x.detach() for n, x in made.named_parameters()}
        return lambda q, k, v: function(
            q, k, v, **to(torch.promote_types(q.dtype, torch.float32), weights)
        )

    def plain(q, k, v):
        weights = {n: x.detach().to(q.dtype) for n, x in made.named_parameters()}
        rows = [dense_attention(weights, "hedgehog", *x, SCALE, 5, 2) for x in zip(q, k, v)]
        return torch.stack(rows)

    assert_error_ratio(fixed(ours), plain, inputs(1, 60), dtype)


def test_a_window_over_all_is_softmax_attention():
    x = inputs(2, 30)
    step = LinearizedPass(30, 0, 2, 30)
    got = linearized_attention(features(), *x.values(), step, None, SCALE)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *x.values(), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (1, 0), (6, 0), (6, 4), (1, 2), (30, 3)])
@pytest.mark.parametrize("grad", [False, True])
def test_any_split_and_padding_with_a_cache(window, sinks, grad):
    """Chunks and steps, rows of different lengths: each what it is alone in one pass."""
    made = features(hybrid=window > 0)
    length, padding = 50, torch.tensor([0, 13, 49, 3])
    x = inputs(4, length)
    for row, n in enumerate(padding):
        for y in x.values():
            y[row, :, :n] = torch.nan
    layer, parts, done = LinearizedLayer(), [], 0
    with torch.set_grad_enabled(grad):
        for size in [1, 5, 1, 1, 9, 1, 2, 20, 1, 1, 1, 7]:
            step = LinearizedPass(window, sinks, 4, size, done, padding=padding)
            some = (y[:, :, done : done + size] for y in x.values())
            parts.append(linearized_attention(made, *some, step, layer, SCALE))
            done += size
        got = torch.cat(parts, 2)
        assert done == length == layer.get_seq_length()
        for row, n in enumerate(padding):
            alone = [y[row : row + 1, :, n:] for y in x.values()]
            step = LinearizedPass(window, sinks, 1, length - int(n))
            expected = linearized_attention(made, *alone, step, None, SCALE)
            torch.testing.assert_close(got[row : row + 1, :, n:], expected)
    assert got.requires_grad == grad


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (6, 0), (6, 4)])
def test_gradients_through_a_cache(window, sinks):
    made, x = features(hybrid=window > 0), inputs(2, 30)

    def whole(q, k, v):
        step = LinearizedPass(window, sinks, 2, 30)
        return linearized_attention(made, q, k, v, step, None, SCALE)

    def split(q, k, v):
        layer, parts = LinearizedLayer(), []
        for begin, end in ((0, 12), (12, 13), (13, 30)):
            step = LinearizedPass(window, sinks, 2, end - begin, begin)
            some = (y[:, :, begin:end] for y in (q, k, v))
            parts.append(linearized_attention(made, *some, step, layer, SCALE))
        return torch.cat(parts, 2)

    assert_agree(results(split, x), results(whole, x))


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (6, 0), (6, 4)])
def test_packed_sequences(window, sinks):
    made, x = features(hybrid=window > 0), inputs(2, 40)
    offsets = torch.tensor([0, 3, 40, 55, 80])  # a row ends where a sequence does
    step = LinearizedPass(window, sinks, 2, 40, offsets=offsets)
    got = linearized_attention(made, *x.values(), step, None, SCALE)
    for row, begin, end in ((0, 0, 3), (0, 3, 40), (1, 0, 15), (1, 15, 40)):
        alone = [y[row : row + 1, :, begin:end] for y in x.values()]
        step = LinearizedPass(window, sinks, 1, end - begin)
        expected = linearized_attention(made, *alone, step, None, SCALE)
        torch.testing.assert_close(got[row : row + 1, :, begin:end], expected)


def test_huge_magnitudes_stay_finite():
    made = features()
    with torch.no_grad():
        made.key.magnitude.fill_(100)
        made.query.magnitude.fill_(-100)
    x = {n: 30 * y.float() for n, y in inputs(1, 60).items()}
    out = linearized_attention(made.float(), *x.values(), LinearizedPass(6, 2, 1, 60), None, SCALE)
    assert out.isfinite().all()


# ---- models


@pytest.mark.parametrize("layers", ["all", [1]])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_models_against_their_own_forward_with_dense_attention(family, kind, layers):
    model, linearized = linear(family, kind, layers=layers)
    assert linearized.layers == ((0, 1) if layers == "all" else (1,))
    ids = tokens(2, 60)
    got = model(ids).logits
    expected = dense_model(model, linearized)(ids, use_cache=False).logits
    torch.testing.assert_close(got.double(), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_text_in_parts_is_one_pass(family, kind):
    model, _ = linear(family, kind, layers=[1] if family == "qwen2" else "all")
    ids = tokens(2, 100)
    whole = model(ids, use_cache=False).logits
    got, cache = in_parts(model, ids, [1, 40, 1, 1, 30, 2, 25])
    torch.testing.assert_close(got, whole, **CLOSE)
    assert cache.get_seq_length() == 100


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generates_what_forwards_say(kind):
    model, linearized = linear(kind=kind)
    ids = tokens(1, 20)
    got = model.generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(got[:, 20:], model(got, use_cache=False).logits[:, 19:-1].argmax(-1))
    for cache in (DynamicCache(), DynamicCache(config=model.config), linearized.new_cache()):
        assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False, cache=cache), got)
    chunks = model.generate(ids, max_new_tokens=40, do_sample=False, prefill_chunk_size=7)
    assert torch.equal(chunks, got)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_beams(kind):
    model, _ = linear(kind=kind, layers=[0] if kind == "pure" else "all")
    check_beams(model, tokens(2, 20))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", ["all", [0]])
@torch.no_grad()
def test_left_padding(kind, layers):
    model, _ = linear(kind=kind, layers=layers)
    lengths = [40, 2, 31, 14]
    ids, mask, parts = padded(lengths)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=False)
    for row, (n, part) in enumerate(zip(lengths, parts)):
        alone = model.generate(part, max_new_tokens=25, do_sample=False)
        assert torch.equal(together[row, 40:], alone[0, n:]), row


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_right_padding(kind):
    model, _ = linear(kind=kind)
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[1, 22:] = 0
    out = model(ids, attention_mask=mask)
    torch.testing.assert_close(out.logits[1, :22], model(ids[1:, :22]).logits[0], **CLOSE)
    torch.testing.assert_close(out.logits[:1], model(ids[:1]).logits, **CLOSE)
    with pytest.raises(ValueError, match="on the left alone"):
        model(ids[:, :1], cache=out.cache)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packing_by_positions(kind):
    model, _ = linear(kind=kind)
    ids = tokens(1, 50)
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    got = model(ids, position_ids=positions, use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in ids.split([20, 30], 1)]
    torch.testing.assert_close(got, torch.cat(alone, 1), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_copies_selections_and_repetitions(kind):
    model, _ = linear(kind=kind)
    ids, more = tokens(3, 40), tokens(3, 30)
    cache = model(ids, use_cache=True).cache
    branch = copy.deepcopy(cache)
    expected, _ = in_parts(model, torch.cat([ids, more], 1), [40, 30])
    torch.testing.assert_close(model(more, cache=cache).logits, expected[:, 40:], **CLOSE)
    branch.batch_select_indices(torch.tensor([2, 0]))
    branch.batch_repeat_interleave(2)
    branch.reorder_cache(torch.tensor([3, 2, 1, 0]))
    rows = torch.tensor([0, 0, 2, 2])
    torch.testing.assert_close(model(more[rows], cache=branch).logits, expected[rows, 40:], **CLOSE)
    branch.reset()
    assert branch.get_seq_length() == 0
    torch.testing.assert_close(model(ids, cache=branch).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_memory_of_replaced_layers_does_not_grow(kind):
    model, _ = linear(kind=kind, layers=[1])
    cache = model(tokens(2, 30), use_cache=True).cache
    config = model.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    state = 2 * heads * 2 * size * (size + 1) * 4
    exact = 2 * 2 * heads * (WINDOW + SINKS) * size * 4 if kind == "hybrid" else 0
    for _ in range(3):
        assert cache.layers[1].nbytes == state + exact
        for _ in range(20):
            model(tokens(2, 1), cache=cache, use_cache=True)
        model(tokens(2, 50), cache=cache, use_cache=True)
    assert cache.layers[0].keys.shape[2] == cache.get_seq_length() == 240


def test_memory_with_one_key_head():
    made = AttentionFeatures("hedgehog", 4, 1, D, SCALE, True, dtype=torch.float32)
    q, k, v = torch.randn(1, 4, 30, D), *torch.randn(2, 1, 1, 30, D)
    layer = LinearizedLayer()
    linearized_attention(made, q, k, v, LinearizedPass(6, 2, 1, 30), layer, SCALE)
    assert layer.nbytes == 4 * (2 * D * (D + 1) + 2 * 8 * D)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_checkpointing(kind):
    model, _ = linear(kind=kind)
    ids = tokens(2, 40)
    grads = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert any("linear_features" in name for name in grads[0])
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_modes_of_autograd_may_change_between_forwards(kind):
    model, _ = linear(kind=kind)
    ids = tokens(1, 30)
    expected = model(ids, use_cache=False).logits.detach()
    with torch.inference_mode():
        first = model(ids[:, :20], use_cache=True)
    step = model(ids[:, 20:21], cache=first.cache)
    with torch.no_grad():
        last = model(ids[:, 21:22], cache=step.cache)
        rest = model(ids[:, 22:], cache=last.cache)
    step.logits.sum().backward()
    got = torch.cat([x.logits.detach() for x in (first, step, last, rest)], 1)
    torch.testing.assert_close(got, expected, **CLOSE)


@torch.no_grad()
def test_bfloat16_and_autocast():
    model, linearized = linear()
    ids = tokens(1, 80)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(ids).logits
    model.bfloat16()
    got, _ = in_parts(model, ids, [50, 1, 29])
    error = (got.float() - exact).abs().mean()
    linearized.undo()
    plain = model(ids).logits.float()
    theirs = (plain - model.float()(ids).logits).abs().mean()
    assert error < 2 * theirs
    assert (cast.float() - exact).abs().mean() < 2 * theirs


# ---- refused


def test_what_a_call_refuses():
    model, linearized = linear()
    ids = tokens(2, 12)
    ones = torch.ones(2, 12, dtype=torch.int64)
    holes = ones.clone()
    holes[0, 4] = 0
    for options, text in (
        ({"output_attentions": True}, "output_attentions: expected False"),
        ({"attention_mask": holes}, "got one with holes"),
        (
            {"attention_mask": torch.ones(2, 1, 12, 12)},
            r"attention_mask: .*\(2, 12\), got \(2, 1, 12, 12\)",
        ),
        ({"attention_mask": ones[:, :7]}, r"\(2, 12\), got \(2, 7\)"),
        ({"cache": StaticCache(model.config, max_cache_len=20)}, "cache: .*got a StaticCache"),
        ({"cu_seq_lens_q": torch.tensor([0, 12]), "use_cache": True}, "batch of 1 row"),
    ):
        with pytest.raises(ValueError, match=text):
            model(ids, **options)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids[:1], cu_seq_lens_q=torch.tensor([0, 5, 12]))
    cache = model(ids).cache
    late = torch.ones(2, 13, dtype=torch.int64)
    late[1, :3] = 0
    with pytest.raises(ValueError, match=r"\[0, 0\] on the left, got \[0, 3\]"):
        model(ids[:, :1], attention_mask=late, cache=cache)
    with pytest.raises(RuntimeError, match="tokens_to_remove: expected 0"):
        cache.crop(-1)
    assert not cache.is_croppable
    with pytest.raises(RuntimeError, match="call by its decoder"):
        model.model.layers[0].self_attn(torch.randn(1, 3, 32), None)
    other, _ = linear("qwen2")
    with pytest.raises(ValueError, match="got a filled DynamicCache"):
        other(ids, cache=cache)
    linearized.undo()
    with pytest.raises(RuntimeError, match="before its undo"):
        model(ids, cache=cache)
    filled = model(ids).cache
    again, _ = linear()
    with pytest.raises(ValueError, match="got a filled DynamicCache"):
        again(ids, cache=filled)
