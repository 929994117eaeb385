"""`longspan.hf.accelerate` on Longformer's and LED's attention, against the models' own."""

import pytest
import torch
from hf_models import CLOSE, assert_gradients_agree
from sparse_models import LONGFORMER, WINDOWS, inputs, make, run, sparse_calls
from torch import nn
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

import longspan.hf
from longspan.nn import _sparse

GLOBALS = {
    "none": None,
    "no one": [[], []],
    "cls": [[0], [0]],
    "different counts": [[0, 1, 2, 40, 99], [50]],
    "of one row only": [[], [3, 4]],
    "padded": [[0, 100], [0, 90, 99]],  # the second row ends before 90
    "all": [range(101), range(101)],
}


def compare(model, kwargs):
    """Outputs, those of padding too, and gradients; accelerated second."""
    expected, expected_grads = run(model, **kwargs)
    assert sparse_calls(model, **kwargs) == 0
    with longspan.hf.accelerate(model):
        assert sparse_calls(model, **kwargs) == len(WINDOWS)
        found, grads = run(model, **kwargs)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, **CLOSE)
    # Sums over all tokens, and biases whose gradients cancel.
    assert_gradients_agree(grads, expected_grads, floor=1e-3, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("where", GLOBALS)
def test_outputs_and_gradients(where):
    model = make("LongformerModel").train()
    compare(model, inputs("LongformerModel", 101, [101, 70], GLOBALS[where]))


@pytest.mark.parametrize("kind", LONGFORMER)
def test_every_class_that_has_the_layer(kind):
    compare(make(kind).train(), inputs(kind, 101, [101, 70], [[0, 1, 2], [0]]))


@pytest.mark.parametrize("length", [1, 5, 32, 250])
def test_lengths(length):
    kwargs = inputs("LongformerModel", length, [length, max(1, length - 4)], [[0], [0]])
    compare(make("LongformerModel"), kwargs)


def test_double():
    """transformers' softmax is float32; its own gradients are NaN with padding or different counts."""
    model = make("LongformerModel", torch.float64)
    compare(model, inputs("LongformerModel", 96, [96, 96], [[0], [50]]))


def test_batches_that_are_padded_whole():
    """A row of nothing but padding does no harm to others, and has finite gradients."""
    model, kwargs = make("LongformerModel"), inputs("LongformerModel", 64, [64, 0], [[0], [0]])
    longspan.hf.accelerate(model)
    found, grads = run(model, **kwargs)
    alone = {n: x[:1] for n, x in kwargs.items()}
    torch.testing.assert_close(
        found["last_hidden_state"][:1], run(model, **alone)[0]["last_hidden_state"]
    )
    assert all(x.isfinite().all() for x in (*found.values(), *grads.values()))


@pytest.mark.parametrize("where", ["cls", "all"])
def test_bfloat16(where):
    """At most twice the error of transformers in the same precision."""
    kwargs = inputs("LongformerModel", 101, [101, 70], GLOBALS[where])
    exact = run(make("LongformerModel"), **kwargs)[0]["last_hidden_state"]
    model = make("LongformerModel", torch.bfloat16)
    theirs = run(model, **kwargs)[0]["last_hidden_state"]
    longspan.hf.accelerate(model)
    found, grads = run(model, **kwargs)
    ours = found["last_hidden_state"]
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()
    assert all(x.isfinite().all() for x in grads.values())


def test_autocast():
    model, kwargs = make("LongformerModel"), inputs("LongformerModel", 101, [101, 70], GLOBALS["cls"])
    exact = run(model, **kwargs)[0]["last_hidden_state"]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(model, **kwargs)[0]["last_hidden_state"]
        longspan.hf.accelerate(model)
        ours = run(model, **kwargs)[0]["last_hidden_state"]
    assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()


# ---- the layer


def layer_and_call(tokens, window=32, **options):
    """A layer, and its call on x with token 0 global."""
    torch.manual_seed(1)
    layer = LongformerSelfAttention(make("LongformerModel", attention_window=[window] * 2).config, 0)
    where = torch.zeros(2, tokens)
    where[:, 0] = 10000
    flags = {"is_index_masked": where < 0, "is_index_global_attn": where > 0, "is_global_attn": True}
    return layer, lambda x: layer(x, attention_mask=where, **flags, **options)


def test_lengths_need_not_be_multiples_of_the_window():
    layer, call = layer_and_call(50)
    x = torch.randn(2, 50, 32)
    with pytest.raises(AssertionError, match="multiple"):
        call(x)
    longspan.hf.accelerate(layer)
    (found,) = call(x)
    mask = torch.zeros(2, 64)
    mask[:, 0], mask[:, 50:] = 10000, -10000
    padded = nn.functional.pad(x, (0, 0, 0, 14))
    (expected,) = LongformerSelfAttention.forward(layer, padded, mask, mask < 0, mask > 0, True)
    torch.testing.assert_close(found, expected[:, :50], **CLOSE)
    torch.testing.assert_close(layer(x, attention_mask=mask[:, :50] * (mask[:, :50] > 0))[0], found)


def test_the_padded_are_not_seen_even_if_nan():
    layer, _ = layer_and_call(64)
    longspan.hf.accelerate(layer)
    x, mask = torch.randn(2, 64, 32), torch.zeros(2, 64)
    mask[:, 0], mask[1, 40:] = 10000, -10000
    expected = layer(x, attention_mask=mask)[0]
    x[1, 40:] = torch.nan
    found = layer(x, attention_mask=mask)[0]
    assert torch.equal(found, expected)
    assert (found[1, 40:] == 0).all()


class Adapted(nn.Module):
    """As an adapter wraps a layer: only calls show what it adds."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) * 1.5


def test_projections_of_all_tokens_are_spared_where_queries_are_few():
    """And made where they are wrapped, or queries are many; with the same results."""
    layer, call = layer_and_call(64)
    x = torch.randn(2, 64, 32)
    layer.key_global, layer.value_global = Adapted(layer.key_global), Adapted(layer.value_global)
    expected = call(x)[0]
    longspan.hf.accelerate(layer)
    seen = []
    for name in ("key_global", "value_global"):
        getattr(layer, name).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(call(x)[0], expected, **CLOSE)
    assert len(seen) == 2
    layer.key_global, layer.value_global = nn.Linear(32, 32), nn.Linear(32, 32)
    spared = call(x)[0]
    for name in ("key_global", "value_global"):
        getattr(layer, name).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(call(x)[0], spared, **CLOSE)
    assert len(seen) == 4


# ---- dropout, weights, and what a model does with its layers


def test_dropout_in_training_alone():
    layer, call = layer_and_call(64)
    layer.dropout = 0.3
    longspan.hf.accelerate(layer)
    x = torch.randn(2, 64, 32)
    layer.eval()
    exact = call(x)[0]
    assert torch.equal(call(x)[0], exact)
    layer.train()
    torch.manual_seed(5)
    first = call(x)[0]
    assert not torch.equal(call(x)[0], first)
    torch.manual_seed(5)
    assert torch.equal(call(x)[0], first)
    with torch.no_grad():  # unbiased, for the global rows and the others
        mean = torch.stack([call(x)[0] for _ in range(400)]).mean(0)
    spread = (first - exact).std() / 400**0.5
    assert (mean - exact).abs().mean() < 2 * spread
    assert (mean - exact)[:, 0].abs().mean() < 2 * (first - exact)[:, 0].std() / 400**0.5


def test_compiled(fresh_compiler):
    """In pieces: masks follow from values, and dynamo does not look into how they are made."""
    model, kwargs = make("LongformerModel"), inputs("LongformerModel", 101, [101, 70], GLOBALS["cls"])
    longspan.hf.accelerate(model)
    expected, expected_grads = run(model, **kwargs)
    found, grads = run(torch.compile(model, backend="aot_eager"), **kwargs)
    torch.testing.assert_close(found["last_hidden_state"], expected["last_hidden_state"], **CLOSE)
    grads = {n.removeprefix("_orig_mod."): g for n, g in grads.items()}
    assert_gradients_agree(grads, expected_grads, floor=1e-3, atol=2e-4, rtol=2e-4)


def test_gradient_checkpointing_replays_dropout():
    model = make("LongformerModel", attention_probs_dropout_prob=0.2).train()
    kwargs = inputs("LongformerModel", 101, [101, 70], GLOBALS["cls"])
    longspan.hf.accelerate(model)
    torch.manual_seed(0)
    _, expected = run(model, **kwargs)
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    _, grads = run(model, **kwargs)
    assert_gradients_agree(grads, expected)


def test_weights_that_are_asked_for_come_from_the_layer_itself():
    model, kwargs = make("LongformerModel"), inputs("LongformerModel", 64, [64, 40], [[0, 1], [0]])
    expected = model(**kwargs, output_attentions=True)
    longspan.hf.accelerate(model)
    found = model(**kwargs, output_attentions=True)
    for name in ("attentions", "global_attentions"):
        assert len(found[name]) == 2
        for ours, theirs in zip(found[name], expected[name]):
            assert torch.equal(ours, theirs)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_no_token_is_padded_to_fill_a_window():
    """Unless a layer is not ours, which would miss it."""
    model, kwargs = make("LongformerModel"), inputs("LongformerModel", 101, [101, 70], [[0, 1], [0]])
    expected = model(**kwargs, output_hidden_states=True)
    lengths = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, args, out: lengths.append(out[0].shape[1]))
    accelerated = longspan.hf.accelerate(model)
    found = model(**kwargs, output_hidden_states=True)
    assert lengths == [101, 101]
    for ours, theirs in zip(found.hidden_states, expected.hidden_states):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    found = model(**kwargs, output_attentions=True)
    assert lengths[2:] == [128, 128]
    assert found.attentions[0].shape[2] == 101
    del model.encoder.layer[1].attention.self.forward
    torch.testing.assert_close(model(**kwargs).last_hidden_state, expected.last_hidden_state, **CLOSE)
    assert lengths[4:] == [128, 128]
    accelerated.undo()
    assert torch.equal(model(**kwargs).last_hidden_state, expected.last_hidden_state)


def test_layers_of_one_window_share_a_mask(monkeypatch):
    """However many there are, and again in the next batch of that padding."""
    made = []
    build = _sparse.longformer_by_row
    monkeypatch.setattr(
        _sparse, "longformer_by_row", lambda *options: made.append(options) or build(*options)
    )
    model = make("LongformerModel", attention_window=[32] * 2)
    longspan.hf.accelerate(model)
    for _ in range(2):
        model(**inputs("LongformerModel", 160, [160, 133], [[0], [0]]))
    assert len(made) == 1


def test_undo_twice_and_saving(tmp_path):
    model, kwargs = make("LongformerModel"), inputs("LongformerModel", 64, [64, 40], [[0], [0]])
    keys = list(model.state_dict())
    expected = model(**kwargs).last_hidden_state
    first, second = longspan.hf.accelerate(model), longspan.hf.accelerate(model)
    counts = {"LongformerSelfAttention": 2, "LongformerEncoder": 1}
    assert first.counts == second.counts == counts
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**kwargs).last_hidden_state, expected)
    first.undo()
    assert torch.equal(model(**kwargs).last_hidden_state, expected)
    assert second.counts == {}
