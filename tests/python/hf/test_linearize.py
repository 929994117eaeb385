"""`longspan.hf.linearize`: training, reports, undo, files, and what is refused."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from extend_models import make, tokens
from linear_models import FAMILIES, KINDS, linear
from safetensors import safe_open

import longspan.hf
from longspan.hf._features import NONLINEARITIES

SHORT = {"steps": 12, "length": 64, "progress": False}
LONGER = {**SHORT, "steps": 40}


def text(count=3000):
    """Tokens of which each says something about those after it."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 8, (count,), generator=generator)
    return (2 + (torch.arange(count) % 7) * 8 + noise).long()


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


# ---- training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_brings_every_layer_nearer(family, kind):
    linearized = longspan.hf.linearize(make(family), text(), **LONGER, **KINDS[kind])
    for layer, (before, after) in linearized.errors.items():
        assert after < (0.75 if kind == "pure" else 0.2) * before, layer


@pytest.mark.parametrize("feature_map", NONLINEARITIES)
def test_every_feature_map_learns(feature_map):
    options = {**LONGER, **KINDS["hybrid"], "feature_map": feature_map}
    linearized = longspan.hf.linearize(make(), text(), **options)
    assert all(after < 0.6 * before for before, after in linearized.errors.values())


def test_nothing_but_the_maps_changes():
    model = make()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.train()
    model.model.norm.eval()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    wanted = {name: x.requires_grad for name, x in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    rng = torch.get_rng_state()
    longspan.hf.linearize(model, text(), **SHORT, window=8)
    assert torch.equal(torch.get_rng_state(), rng)
    for name, x in model.state_dict().items():
        if "linear_features" not in name:
            assert torch.equal(x, state.pop(name)), name
    assert not state
    for name, x in model.named_parameters():
        assert x.grad is None, name
        assert x.requires_grad == wanted.get(name, True), name
    for name, module in model.named_modules():
        assert module.training == modes.get(name, True), name


def test_a_step_is_gradient_descent_on_each_layer_s_own_error():
    """The gradient that training sees is that of the error at the unchanged model's inputs."""
    from longspan.hf import _distill
    from longspan.hf.linearized_attention import LinearizedPass, linearized_attention
    from longspan.hf.linearized_forward import projected

    model, linearized = linear()
    decoder = model.model
    attentions = [layer.self_attn for layer in decoder.layers]
    ids = tokens(2, 40)
    lesson = _distill.Lesson(linearized._linearization, "train")
    with _distill.taught(decoder, attentions, lesson), torch.no_grad():
        decoder(ids, use_cache=False)
    linearized_before = [a.linear_features for a in attentions]
    linearized.undo()
    inputs = {}

    def keep(module, args, kwargs):
        inputs[module.layer_idx] = kwargs["hidden_states"], kwargs["position_embeddings"]

    hooks = [a.register_forward_pre_hook(keep, with_kwargs=True) for a in attentions]
    with torch.no_grad():
        model(ids)
    for hook, attention, features in zip(hooks, attentions, linearized_before):
        hook.remove()
        got = {name: p.grad.clone() for name, p in features.named_parameters()}
        features.zero_grad()
        with torch.no_grad():
            q, k, v = projected(attention, *inputs[attention.layer_idx])
            softmax = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
        step = LinearizedPass(linearized.window, linearized.sink_tokens, 2, 40)
        guess = linearized_attention(features, q, k, v, step, None, attention.scaling)
        error = (guess - softmax).square().sum((0, 2, 3)) / softmax.square().sum((0, 2, 3))
        error.mean().backward()
        assert lesson.losses[attention.layer_idx] == pytest.approx(error.mean().item(), rel=1e-4)
        for name, p in features.named_parameters():
            torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-3)


def test_the_same_seed_is_the_same_training_and_another_is_not():
    found = []
    for seed in (0, 0, 1):
        torch.rand(1)
        model = make()
        longspan.hf.linearize(model, text(), **SHORT, window=8, seed=seed)
        found.append(model.model.layers[0].self_attn.linear_features.key.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_report():
    model, ids = make(), text()
    linearized = longspan.hf.linearize(model, ids, layers=[-1], window=8, **SHORT)
    held_out = ids[-300:]

    def perplexity():
        windows = [held_out[i : i + 64] for i in range(0, 299, 63)]
        losses = [
            torch.nn.functional.cross_entropy(logits(model, w[None])[0, :-1], w[1:], reduction="sum")
            for w in windows
        ]
        return (sum(losses) / 299).exp().item()

    assert list(linearized.perplexity) == ["before", "untrained", "distilled"]
    assert linearized.perplexity["distilled"] == pytest.approx(perplexity(), rel=1e-4)
    printed = repr(linearized)
    linearized.undo()
    assert linearized.perplexity["before"] == pytest.approx(perplexity(), rel=1e-4)
    assert "layers: 1 of 2, sinks 4, window 8" in printed
    assert f"{linearized.perplexity['untrained']:.2f} untrained" in printed
    assert repr(linearized) == "Linearized(undone)"
    untrained = longspan.hf.linearize(model, ids, layers=[1], window=8, **{**SHORT, "steps": 0})
    assert untrained.perplexity["untrained"] == linearized.perplexity["untrained"]
    assert untrained.perplexity["distilled"] == untrained.perplexity["untrained"]
    own = longspan.hf.linearize(make(), ids[:500], held_out=held_out, layers=[1], window=8, **SHORT)
    assert own.perplexity["before"] == pytest.approx(linearized.perplexity["before"], rel=1e-6)


def test_training_goes_on():
    ids = text()
    linearized = longspan.hf.linearize(make(), ids, window=8, **SHORT)
    began, before = linearized.errors[0]
    offset = linearized._decoder.layers[0].self_attn.linear_features.offset.detach().clone()
    untrained = linearized.perplexity["untrained"]
    linearized.distill(ids, **{**SHORT, "steps": 30, "seed": 1})
    assert linearized.errors[0][0] == began
    assert linearized.errors[0][1] < before
    assert linearized.perplexity["untrained"] == untrained
    now = linearized._decoder.layers[0].self_attn.linear_features.offset
    assert (now - offset).abs().max() < 30 * 0.02 * 1.5  # moved by steps, not set anew


def test_progress_bars(capsys):
    options = {**SHORT, "steps": 2, "window": 8, "layers": [0]}
    longspan.hf.linearize(make(), text(1000), **options)
    assert capsys.readouterr().err == ""
    longspan.hf.linearize(make(), text(1000), **{**options, "progress": True})
    shown = capsys.readouterr().err
    assert "distilling" in shown
    assert "2/2" in shown


def test_under_any_mode_of_autograd():
    errors = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        model = make()
        with mode():
            errors.append(longspan.hf.linearize(model, text(), window=8, **SHORT).errors)
        model(tokens(1, 20)).logits.sum().backward()
        assert model.model.layers[0].self_attn.linear_features.key.weight.grad is not None
    assert errors[0] == errors[1] == errors[2]


def test_texts_as_lists():
    ids = text()
    expected = longspan.hf.linearize(make(), ids, window=8, **SHORT).errors
    for data in ([ids[:1000], ids[1000:]], [ids[:1000].tolist(), ids[1000:].tolist()], ids.tolist()):
        assert longspan.hf.linearize(make(), data, window=8, **SHORT).errors == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = make(dtype=dtype)
    longspan.hf.linearize(model, text(), window=8, **SHORT)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in model.model.layers[0].self_attn.linear_features.parameters()} == {wide}
    assert logits(model, tokens(1, 40)).dtype == dtype
    assert model.generate(tokens(1, 10), max_new_tokens=5).shape == (1, 15)


def test_sliding_layers_are_left_alone():
    kinds = ["sliding_attention", "full_attention"]
    model = make("qwen3", layer_types=kinds, use_sliding_window=True, sliding_window=16)
    linearized = longspan.hf.linearize(model, text(), window=8, **SHORT)
    assert linearized.layers == (1,)
    ids = tokens(1, 60)
    whole, cache = logits(model, ids), None
    parts = []
    for part in ids.split([30, 1, 29], 1):
        out = model(part, cache=cache, use_cache=True)
        parts.append(out.logits.detach())
        cache = out.cache
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=3e-5, rtol=3e-5)
    linearized.undo()
    for options, match in (({"layers": [0]}, r"full attention, got \[0\]"),):
        with pytest.raises(ValueError, match=match):
            longspan.hf.linearize(model, text(), **options, **SHORT)
    with pytest.raises(ValueError, match="at least one layer with full attention"):
        longspan.hf.linearize(make("mistral", sliding_window=16), text(), **SHORT)


# ---- undone, copied, kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_undo_leaves_no_trace(family, kind):
    model, ids = make(family), tokens(1, 60)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = logits(model, ids)
    with longspan.hf.linearize(model, text(), **SHORT, **KINDS[kind]) as linearized:
        assert not torch.equal(logits(model, ids), expected)
    linearized.undo()
    assert torch.equal(logits(model, ids), expected)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    longspan.hf.linearize(model, text(), **SHORT, **KINDS[kind])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_undoes(error, monkeypatch):
    model, ids = make(), tokens(1, 60)
    expected = logits(model, ids)
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 9:
            raise error
        return original(*args)

    from longspan.hf import _distill

    original = _distill.relative_error
    monkeypatch.setattr(_distill, "relative_error", fail)
    with pytest.raises(error):
        longspan.hf.linearize(model, text(), window=8, **SHORT)
    assert torch.equal(logits(model, ids), expected)
    assert not any("linear_features" in name for name, _ in model.named_modules())


def test_copied_and_pickled():
    model, linearized = linear()
    ids = tokens(2, 40)
    expected = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), expected)
        cache = other(ids[:, :30]).cache
        got = other(ids[:, 30:], cache=cache).logits.detach()
        torch.testing.assert_close(got, expected[:, 30:], atol=3e-5, rtol=3e-5)
    linearized.undo()
    assert torch.equal(logits(copy.deepcopy(model), ids), logits(model, ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family, kind, tmp_path):
    model, linearized = linear(family, kind, layers=[-1], feature_map="elu")
    ids = tokens(2, 40)
    expected = logits(model, ids)
    path = linearized.save(tmp_path / "new" / "folder")
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    again = make(family)
    with longspan.hf.load_linearized(again, path.parent) as loaded:
        assert torch.equal(logits(again, ids), expected)
        for name in ("layers", "window", "sink_tokens", "feature_map", "perplexity", "errors"):
            assert getattr(loaded, name) == getattr(linearized, name)
    with safe_open(path, framework="pt") as file:
        settings = json.loads(file.metadata()["longspan.linearize"])
    assert settings["perplexity"] == linearized.perplexity


def test_saved_beside_the_model(tmp_path):
    model, linearized = linear()
    ids = tokens(2, 40)
    expected = logits(model, ids)
    linearized.save(tmp_path)
    for undone in (False, True):
        if undone:
            linearized.undo()
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        longspan.hf.load_linearized(again, tmp_path)
        torch.testing.assert_close(logits(again, ids), expected)


def test_nothing_after_undo(tmp_path):
    _, linearized = linear()
    linearized.undo()
    for call in (
        lambda: linearized.save(tmp_path),
        lambda: linearized.distill(text(), **SHORT),
        linearized.new_cache,
    ):
        with pytest.raises(RuntimeError, match="got one after undo"):
            call()


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    import safetensors.torch

    model, linearized = linear()
    path = linearized.save(tmp_path)
    before = path.read_bytes()

    def fail(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    model.model.layers[0].self_attn.linear_features.query.bias.data += 1
    with pytest.raises(OSError, match="no space"):
        linearized.save(tmp_path)
    assert path.read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_what_loading_refuses(tmp_path):
    model, linearized = linear()
    linearized.save(tmp_path)
    with pytest.raises(ValueError, match="neither extended nor linearized"):
        longspan.hf.load_linearized(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="expected one with linearized"):
        longspan.hf.load_linearized(make(), tmp_path / "other")
    other = make(hidden_size=64)
    expected = logits(other, ids := tokens(1, 20))
    with pytest.raises(ValueError, match="expected one of the sizes"):
        longspan.hf.load_linearized(other, tmp_path)
    assert torch.equal(logits(other, ids), expected)
    with pytest.raises(ValueError, match="layers: expected indices from -1 to 0, got 1"):
        longspan.hf.load_linearized(make(num_hidden_layers=1), tmp_path)
    (tmp_path / "linearized.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"expected what Linearized\.save wrote"):
        longspan.hf.load_linearized(make(), tmp_path)


# ---- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "half"}, "layers: expected indices or 'all', got 'half'"),
        ({"layers": [2]}, "layers: expected indices from -2 to 1, got 2"),
        ({"layers": []}, "layers: expected at least one layer"),
        ({"window": 0}, "window: expected a number of tokens from 1, or None, got 0"),
        ({"sink_tokens": -1}, "sink_tokens: expected a number of tokens from 0, or None, got -1"),
        ({"window": None, "sink_tokens": 2}, "sink_tokens: expected 0 or None without a window, got 2"),
        ({"feature_map": "identity"}, "feature_map: expected one of hedgehog, elu, relu, softmax"),
        ({"steps": -1}, "steps: expected a number from 0 on, got -1"),
        ({"length": 12}, "length: expected a number from 13 on, got 12"),
        ({"batch": 0}, "batch: expected a number from 1 on, got 0"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        (
            {"length": 4000},
            "data: expected length tokens or more besides those held out, 4000, got 2700",
        ),
        ({"held_out": torch.arange(20)}, "held_out: expected length tokens or more, 64, got 20"),
    ],
)
def test_values_that_do_not_fit(options, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        longspan.hf.linearize(model, text(), **{**SHORT, "window": 8, **options})
    assert not any("linear_features" in name for name, _ in model.named_modules())


def test_models_and_data_that_do_not_fit():
    call = longspan.hf.linearize
    with pytest.raises(TypeError, match="model: expected a torch module, got str"):
        call("a name", text())
    with pytest.raises(ValueError, match=r"one decoder in it out of LlamaModel, .*found 0 in GPTNeoX"):
        call(make("gpt_neox"), text())
    with pytest.raises(ValueError, match="expected a language-model head"):
        call(make().model, text())
    for data, message in (
        ("a text", "data: expected .*, got str"),
        (torch.randn(300), "data: expected .*got torch.float32"),
        (torch.zeros(3, 300, dtype=torch.int64), r"data: expected .*\(3, 300\)"),
    ):
        with pytest.raises(TypeError, match=message):
            call(make(), data, **SHORT)
    model = make()
    extended = longspan.hf.extend_context(model)
    with pytest.raises(ValueError, match="neither extended nor linearized"):
        call(model, text(), **SHORT)
    extended.undo()
    with (
        call(model, text(), window=8, **SHORT),
        pytest.raises(ValueError, match="neither extended nor linearized"),
    ):
        longspan.hf.extend_context(model)
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="with the forward of their class"):
        call(model, text(), **SHORT)
