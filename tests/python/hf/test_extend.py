"""`longspan.hf.extend_context`: frequencies, what is saved, what is undone, and what is refused."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from extend_models import CLOSE, FAMILIES, TRAINED, in_parts, make, tokens
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import longspan.hf
from longspan import rope

LONG = 100  # tokens, beyond TRAINED


def factors(model, last):
    pairs = model.base_model.rotary_emb.inv_freq.shape[0]
    return [1 + (last - 1) * i / (pairs - 1) for i in range(pairs)]


def options_of(model, method):
    if method == "longrope":
        return {"short_factor": factors(model, 1.2), "long_factor": factors(model, 3.0)}
    if method == "llama3":
        return {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def reloaded(model, folder):
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


# ---- against transformers


@pytest.mark.parametrize("method", ["linear", "dynamic", "yarn", "longrope", "llama3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_by_transformers_alone(family, method, tmp_path):
    if family == "phi3" and method == "dynamic":
        pytest.skip("test_phi3_cannot_grow")
    model, ids = make(family), tokens(2, LONG)
    before = logits(model, ids)
    longspan.hf.extend_context(model, method, 2, **options_of(model, method))
    got = logits(model, ids)
    again = reloaded(model, tmp_path)
    torch.testing.assert_close(got, logits(again, ids), **CLOSE)
    assert (got - before).abs().max() > 0.01
    name = "inv_freq"
    ours, theirs = (getattr(m.base_model.rotary_emb, name) for m in (model, again))
    fresh = type(again.base_model.rotary_emb)(again.config).inv_freq
    torch.testing.assert_close(theirs if method not in ("dynamic", "longrope") else fresh, ours)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ntk", {}), ("ntk_by_parts", {}), ("dynamic_linear", {}), ("yarn", {"dynamic": True}),
        ("yarn", {"truncate": False, "beta_fast": 20.0, "attention_factor": 1.2}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_methods_that_transformers_has_not_are_saved_too(family, method, options, tmp_path):
    model, ids = make(family), tokens(1, LONG)
    growing = method == "dynamic_linear" or options.get("dynamic")
    extended = longspan.hf.extend_context(model, method, None if growing else 3, **options)
    again = reloaded(model, tmp_path)
    torch.testing.assert_close(logits(model, ids), logits(again, ids), **CLOSE)
    if growing:
        assert ROPE_INIT_FUNCTIONS[
            json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_type"]
        ]
    # Read from the configuration, and the same again.
    settings = longspan.hf.extend_context(again, None).settings
    for seq_len in (1, TRAINED, LONG, 3 * TRAINED):
        (a, scale_a), (b, scale_b) = (
            rope.frequencies(**s, seq_len=seq_len) for s in (settings, extended.settings)
        )
        torch.testing.assert_close(a, b)
        assert scale_a == pytest.approx(scale_b)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
@pytest.mark.parametrize("cache", ["full", "unrotated"])
def test_a_scale_for_long_text_alone_leaves_short_text_as_it_was(family, cache, tmp_path):
    model, short, long = make(family), tokens(1, TRAINED), tokens(1, TRAINED + 1)
    before, beyond = logits(model, short), logits(model, long)
    factors = options_of(model, "longrope")
    factors["short_factor"] = [1.0] * len(factors["short_factor"])
    options = {**factors, "short_mscale": 1.0, "long_mscale": 1.2}
    extended = longspan.hf.extend_context(model, "longrope", 2, cache=cache, **options)
    torch.testing.assert_close(logits(model, short), before, **CLOSE)
    found = logits(model, long)
    assert (found - beyond).abs().max() > 1e-3
    # The configuration keeps both.
    again = reloaded(model, tmp_path)
    settings = longspan.hf.extend_context(again, None, cache=cache).settings
    assert {name: settings[name] for name in options} == {
        name: extended.settings[name] for name in options
    }
    torch.testing.assert_close(logits(again, short), before, **CLOSE)
    torch.testing.assert_close(logits(again, long), found, **CLOSE)


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn"])
def test_phi3_stores_every_fixed_method_as_longrope(method, tmp_path):
    model, ids = make("phi3"), tokens(1, LONG)
    longspan.hf.extend_context(model, method, 2)
    assert model.config.rope_parameters["rope_type"] == "longrope"
    torch.testing.assert_close(logits(model, ids), logits(reloaded(model, tmp_path), ids), **CLOSE)


def test_phi3_cannot_grow():
    for options in ({"method": "dynamic"}, {"method": "yarn", "dynamic": True}):
        with pytest.raises(
            ValueError, match="fits into the configuration of a Phi-3 model, got dynamic"
        ):
            longspan.hf.extend_context(make("phi3"), **options)


def test_the_greatest_length_and_factor_of_the_configuration():
    model = make()
    longspan.hf.extend_context(model)
    assert model.config.max_position_embeddings == 4 * TRAINED
    assert model.config.rope_parameters == {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    }  # fmt: skip
    model = make()
    longspan.hf.extend_context(model, "dynamic", 2)
    assert model.config.max_position_embeddings == TRAINED  # from which it grows


def test_a_dictionary_as_rope_search_writes_it():
    model, ids = make(), tokens(1, LONG)
    parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "attention_factor": 1.1,
        "original_max_position_embeddings": TRAINED, **options_of(model, "longrope"),
    }  # fmt: skip
    with longspan.hf.extend_context(model, parameters) as extended:
        got = logits(model, ids)
        assert extended.rope_parameters == parameters
    options = {name: parameters[name] for name in ("attention_factor", "short_factor", "long_factor")}
    with longspan.hf.extend_context(model, "longrope", 2, **options):
        torch.testing.assert_close(got, logits(model, ids), rtol=0, atol=0)


# ---- undone


@pytest.mark.parametrize("cache", ["full", "unrotated", "window"])
@pytest.mark.parametrize("family", FAMILIES)
def test_undo_leaves_no_trace(family, cache):
    model, ids = make(family), tokens(1, LONG)
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    config, expected = model.config.to_dict(), logits(model, ids)
    window = 16 if cache == "window" else None
    extended = longspan.hf.extend_context(model, "yarn", 2, cache=cache, window=window)
    assert (logits(model, ids) - expected).abs().max() > 0.01
    extended.undo()
    extended.undo()
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)
    assert repr(extended) == "Extended(undone)"


def test_a_context_undoes_also_after_an_error():
    model = make()
    with pytest.raises(ZeroDivisionError), longspan.hf.extend_context(model):
        raise ZeroDivisionError
    assert model.config.max_position_embeddings == TRAINED
    assert "forward" not in vars(model.base_model)


def test_what_it_prints():
    text = str(longspan.hf.extend_context(make(), cache="window", window=16, sink_tokens=2))
    assert text.splitlines() == [
        "Extended(LlamaForCausalLM",
        "  rope_parameters: {rope_theta: 10000, rope_type: default} -> {rope_theta: 10000, rope_type: "
        "yarn, factor: 4, original_max_position_embeddings: 64}",
        "  max_position_embeddings: 64 -> 256",
        "  attention: sdpa -> longspan",
        "  cache: transformers' own -> WindowCache",
        "  window: None -> 16",
        "  sink_tokens: None -> 2)",
    ]


def test_copied_and_pickled_models_stay_extended():
    model, ids = make(), tokens(1, LONG)
    longspan.hf.extend_context(model, "dynamic", 2, cache="unrotated")
    expected = logits(model, ids)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(same, ids), expected, rtol=0, atol=0)
        got, _ = in_parts(same, ids, [LONG - 1, 1])
        torch.testing.assert_close(got[:, -1].argmax(-1), expected[:, -1].argmax(-1))


def test_models_below_the_head_and_compiled():
    model, ids = make(), tokens(1, LONG)
    expected = model(ids, use_cache=False).logits
    extended = longspan.hf.extend_context(model.base_model, "yarn", 2)
    got = model(ids, use_cache=False).logits
    assert (got - expected).abs().max() > 0.01
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mask = torch.ones_like(ids)
    torch.testing.assert_close(compiled(ids, attention_mask=mask, use_cache=False).logits, got, **CLOSE)
    torch._dynamo.reset()
    extended.undo()


# ---- angles


def test_positions_beyond_float_integers_neither_collide_nor_lose_digits():
    model, ids = make(dtype=torch.float64), tokens(1, 40)
    longspan.hf.extend_context(model, "linear", 4)
    near = model(ids).logits
    for first in (2**24 - 7, 2**24 + 1, 2**31 + 5):
        far = model(ids, position_ids=torch.arange(first, first + 40)[None]).logits
        # Angles of 2^31 have 22 bits left behind the point.
        torch.testing.assert_close(far, near, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_angles_of_neighbours_differ_in_half_precision(dtype):
    model = make(dtype=dtype)
    longspan.hf.extend_context(model, "linear", 1)
    x = torch.zeros(1, 1, dtype=dtype)
    for first in (256, 2**16, 2**24, 2**24 + 2**10):
        at = torch.arange(first, first + 64)[None]
        cos, sin = model.base_model.rotary_emb(x, at)
        inv_freq, _ = rope.frequencies("linear", head_dim=8, factor=1)
        angle = at.double()[..., None] * inv_freq.double()
        torch.testing.assert_close(cos[..., :4], angle.cos().to(dtype))
        assert cos.dtype == dtype
        pairs = torch.stack([cos[0, :, 0], sin[0, :, 0]], -1)
        assert len(torch.unique(pairs, dim=0)) == 64


# ---- refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "yarm"}, ValueError, "method: expected one of default, linear"),
        ({"method": "yarn", "beta": 3}, TypeError, "beta: expected yarn's options"),
        ({"factor": 0.5}, ValueError, "factor: expected a number of 1 or more"),
        ({"method": "default", "factor": 2}, TypeError, "factor: expected default's options"),
        ({"method": "longrope"}, TypeError, "short_factor: expected it"),
        ({"method": None, "factor": 2}, ValueError, "factor: expected none with method=None"),
        ({"method": {"rope_type": "yarn", "factor": 2.0}, "factor": 3}, ValueError,
         "factor: expected none beside a dictionary"),
        ({"method": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 5.0}}, ValueError,
         "rope_theta: expected the model's, 10000"),
        ({"method": {"rope_type": "yarn", "factor": 2.0, "beta": 5.0}}, TypeError, "beta: expected"),
        ({"attention": "nonsense"}, ValueError, "nonsense"),
        ({"cache": "half"}, ValueError, "cache: expected full, unrotated or window, got 'half'"),
        ({"window": 8}, ValueError, "window: expected None with cache='full', got 8"),
        ({"sink_tokens": 8}, ValueError, "sink_tokens: expected its default"),
        ({"cache": "window"}, ValueError, "window: expected a number of tokens from 1"),
        ({"cache": "window", "window": 0}, ValueError, "window: expected a number of tokens from 1"),
        ({"cache": "window", "window": 8, "sink_tokens": -1}, ValueError, "sink_tokens: expected"),
        ({"cache": "window", "window": 8, "attention": "sdpa"}, ValueError, "expected longspan"),
        ({"cache": "unrotated", "attention": "eager"}, ValueError, "attention: expected, with cache="),
    ],
)  # fmt: skip
def test_bad_settings_are_named_and_change_nothing(options, error, message):
    model = make()
    config = model.config.to_dict()
    with pytest.raises(error, match=message):
        longspan.hf.extend_context(model, **options)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model.base_model)


def test_models_that_it_is_not_for():
    with pytest.raises(TypeError, match="model: expected a torch module, got str"):
        longspan.hf.extend_context("llama")
    with pytest.raises(ValueError, match="expected one decoder in it out of GPTNeoXModel"):
        longspan.hf.extend_context(torch.nn.Linear(2, 2))
    two = torch.nn.ModuleList([make(), make()])
    with pytest.raises(ValueError, match="found 2 in ModuleList"):
        longspan.hf.extend_context(two)
    model = make()
    longspan.hf.extend_context(model)
    with pytest.raises(ValueError, match="neither extended nor linearized"):
        longspan.hf.extend_context(model, "linear")
    scaled = make(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match="scaled by linear already"):
        longspan.hf.extend_context(scaled)
    sliding = make("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="no more than the model's own sliding window, 8"):
        longspan.hf.extend_context(sliding, cache="window", window=16)


def test_a_model_that_is_scaled_keeps_its_scaling():
    model, ids = (
        make(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        tokens(1, LONG),
    )
    expected = logits(model, ids)
    extended = longspan.hf.extend_context(model, None, attention=None)
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    assert list(extended.changes) == ["cache"]
