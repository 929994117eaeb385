"""`longspan.hf.accelerate` on BigBird's block-sparse attention, against the models' own."""

import numpy
import pytest
import torch
from hf_models import CLOSE, assert_gradients_agree
from sparse_models import BIGBIRD, BLOCK, SHORT, inputs, make, run, sparse_calls

import longspan.hf

LENGTH = 13 * BLOCK - 5
PADDED = [LENGTH, LENGTH - 50]
EXACT = {"atol": 1e-10, "rtol": 1e-10}
LAYERS = 2


def compare(model, kwargs, close=CLOSE, calls=1, **options):
    """Outputs, those of padding too, and gradients; accelerated second."""
    expected, expected_grads = run(model, **kwargs)
    assert sparse_calls(model, **kwargs) == 0
    with longspan.hf.accelerate(model, **options):
        assert sparse_calls(model, **kwargs) == LAYERS * calls
        found, grads = run(model, **kwargs)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, **close)
    # Sums over all tokens, and biases whose gradients cancel.
    assert_gradients_agree(grads, expected_grads, floor=1e-3, **{n: 4 * x for n, x in close.items()})


@pytest.mark.parametrize("kind", BIGBIRD)
def test_every_class_that_has_the_layer(kind):
    """In training, with the random blocks that transformers draws."""
    compare(make(kind).train(), inputs(kind, LENGTH, PADDED))


@pytest.mark.parametrize("length", [SHORT + 1, LENGTH, 20 * BLOCK, 40 * BLOCK + 3])
def test_training_in_double(length):
    kwargs = inputs("BigBirdModel", length, [length, length - 37])
    compare(make("BigBirdModel", torch.float64).train(), kwargs, EXACT)


@pytest.mark.parametrize("length", [LENGTH, 1024])
def test_evaluation_as_transformers_has_it(length):
    """Block 0 counts 1 + R times."""
    kwargs = inputs("BigBirdModel", length, [length, length - 50])
    compare(make("BigBirdModel", torch.float64), kwargs, EXACT, calls=2, hf_compat=True)


@pytest.mark.parametrize("kind", ["BigBirdForMaskedLM", "BigBirdPegasusForConditionalGeneration"])
def test_evaluation_of_other_classes_as_transformers_has_it(kind):
    compare(make(kind), inputs(kind, LENGTH, PADDED), calls=2, hf_compat=True)


def test_training_at_a_length_with_a_plan_of_its_own():
    """There transformers may draw what a row sees already, which then counts twice."""
    model = make("BigBirdModel", torch.float64).train()
    kwargs = inputs("BigBirdModel", 1024, [1024])
    compare(model, kwargs, EXACT, calls=2, hf_compat=True)
    expected = model(**kwargs).last_hidden_state
    longspan.hf.accelerate(model)
    assert (model(**kwargs).last_hidden_state - expected).abs().max() > 1e-4


def test_evaluation_is_training():
    """A set, the same one; not what transformers evaluates."""
    model, kwargs = make("BigBirdModel"), inputs("BigBirdModel", LENGTH, PADDED)
    theirs = model(**kwargs).last_hidden_state
    trained = model.train()(**kwargs).last_hidden_state
    longspan.hf.accelerate(model)
    ours = model.eval()(**kwargs).last_hidden_state
    assert torch.equal(model.train()(**kwargs).last_hidden_state, ours)
    torch.testing.assert_close(ours, trained, **CLOSE)
    assert (ours - theirs).abs().max() > 1e-2


def test_no_random_blocks():
    """Which transformers' layer cannot do without; then the multiset is a set."""
    model, kwargs = make("BigBirdModel", num_random_blocks=0), inputs("BigBirdModel", LENGTH, PADDED)
    with pytest.raises(RuntimeError, match="0 elements"):
        model(**kwargs)
    longspan.hf.accelerate(model)
    expected = model(**kwargs).last_hidden_state
    longspan.hf.accelerate(model, hf_compat=True)
    torch.testing.assert_close(model(**kwargs).last_hidden_state, expected)


def test_blocks_of_64():
    length = 10 * 64
    model = make("BigBirdModel", torch.float64, block_size=64).train()
    compare(model, inputs("BigBirdModel", length, [length, 555]), EXACT)


def test_numpy_s_generator_is_let_be():
    model, kwargs = make("BigBirdModel").train(), inputs("BigBirdModel", 17 * BLOCK, [17 * BLOCK])
    longspan.hf.accelerate(model)
    numpy.random.seed(8)
    expected = numpy.random.rand(3)
    numpy.random.seed(8)
    model(**kwargs)
    assert (numpy.random.rand(3) == expected).all()


@pytest.mark.parametrize("hf_compat", [False, True])
def test_bfloat16(hf_compat):
    """At most twice the error of transformers in the same precision."""
    kwargs = inputs("BigBirdModel", LENGTH, PADDED)
    train = not hf_compat
    exact = run(make("BigBirdModel").train(train), **kwargs)[0]["last_hidden_state"]
    model = make("BigBirdModel", torch.bfloat16).train(train)
    theirs = run(model, **kwargs)[0]["last_hidden_state"]
    longspan.hf.accelerate(model, hf_compat=hf_compat)
    found, grads = run(model, **kwargs)
    ours = found["last_hidden_state"]
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()
    assert all(x.isfinite().all() for x in grads.values())


def test_the_padded_are_not_seen_even_if_nan():
    model = make("BigBirdModel")
    layer = model.encoder.layer[0].attention.self
    tokens = 12 * BLOCK
    x, mask = torch.randn(2, tokens, 32), torch.ones(2, tokens)
    mask[1, 100:] = 0
    longspan.hf.accelerate(layer)
    expected, _ = layer(x, to_mask=mask[:, None, None])
    x[1, 100:] = torch.nan
    found, _ = layer(x, to_mask=mask[:, None, None])
    assert torch.equal(found, expected)
    assert (found[1, 100:] == 0).all()
    with pytest.raises(ValueError, match="multiple of 16 tokens, a block, got 100"):
        layer(x[:, :100])


@pytest.mark.parametrize("how", ["argument", "config"])
def test_weights_that_are_asked_for_come_from_the_layer_itself(how):
    model, kwargs = make("BigBirdModel"), inputs("BigBirdModel", LENGTH, PADDED)
    if how == "argument":
        kwargs["output_attentions"] = True
    else:
        model.config.output_attentions = True
    expected = model(**kwargs)
    longspan.hf.accelerate(model)
    found = model(**kwargs)
    assert len(found.attentions) == LAYERS
    for ours, theirs in zip(found.attentions, expected.attentions):
        assert torch.equal(ours, theirs)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_short_texts_go_over_to_full_attention():
    """For good, by transformers' own rule; set_attention_type makes new layers, to accelerate anew."""
    model = make("BigBirdModel").train()
    short, long = (inputs("BigBirdModel", n, [n]) for n in (SHORT, LENGTH))
    longspan.hf.accelerate(model)
    expected = model(**long).last_hidden_state
    plain = make("BigBirdModel").train()(**short).last_hidden_state
    assert torch.equal(model(**short).last_hidden_state, plain)
    assert model.attention_type == "original_full"
    model.set_attention_type("block_sparse")
    assert longspan.hf.accelerate(model).counts == {"BigBirdBlockSparseAttention": LAYERS}
    assert sparse_calls(model, **long) == LAYERS
    torch.testing.assert_close(model(**long).last_hidden_state, expected)


def test_compiled(fresh_compiler):
    """In pieces: masks follow from values, and dynamo does not look into how they are made."""
    model, kwargs = make("BigBirdModel").train(), inputs("BigBirdModel", LENGTH, PADDED)
    longspan.hf.accelerate(model)
    expected, expected_grads = run(model, **kwargs)
    found, grads = run(torch.compile(model, backend="aot_eager"), **kwargs)
    torch.testing.assert_close(found["last_hidden_state"], expected["last_hidden_state"], **CLOSE)
    assert_gradients_agree({n.removeprefix("_orig_mod."): g for n, g in grads.items()}, expected_grads)


def test_gradient_checkpointing():
    model, kwargs = make("BigBirdModel").train(), inputs("BigBirdModel", LENGTH, PADDED)
    longspan.hf.accelerate(model)
    _, expected = run(model, **kwargs)
    model.gradient_checkpointing_enable()
    _, grads = run(model, **kwargs)
    assert_gradients_agree(grads, expected)


def test_undo_twice_and_saving(tmp_path):
    model, kwargs = make("BigBirdModel").train(), inputs("BigBirdModel", LENGTH, PADDED)
    keys = list(model.state_dict())
    expected = model(**kwargs).last_hidden_state
    first, second = longspan.hf.accelerate(model), longspan.hf.accelerate(model, hf_compat=True)
    assert first.counts == second.counts == {"BigBirdBlockSparseAttention": LAYERS}
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert torch.equal(loaded(**kwargs).last_hidden_state, expected)
    first.undo()
    assert torch.equal(model(**kwargs).last_hidden_state, expected)
    assert second.counts == {}
