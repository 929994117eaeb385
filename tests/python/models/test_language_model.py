"""`LanguageModel`: against transformers, its loss, its cache, its files, and families of one's own."""

import dataclasses
import json
import math
import os

import pytest
import torch
from checks import assert_raises
from torch.testing import assert_close

from longspan.models import (
    FAMILIES,
    Family,
    LanguageModel,
    LanguageModelConfig,
    MambaLM,
    cosine_with_warmup,
    language_model,
    parameter_groups,
    register_family,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers' import
pytest.importorskip("safetensors")

OPTIONS = {
    "mamba": {"mixer": {"d_state": 8}},
    "mamba2": {"mixer": {"headdim": 16, "d_state": 16, "chunk_size": 16}},
    "attention": {"mixer": {"num_heads": 4, "num_kv_heads": 2, "window": 20, "sink_tokens": 2}},
    "linear_attention": {"mixer": {"num_heads": 4, "num_kv_heads": 2}},
    "performer": {"mixer": {"num_heads": 2, "num_features": 16}},
    "retention": {"mixer": {"num_heads": 2, "expand_v": 1.0, "use_short_conv": True}},
    "gla": {"mixer": {"num_heads": 2, "use_short_conv": True, "conv_size": 3}},
    "delta_net": {"mixer": {"num_heads": 2}},
    "gated_delta_net": {"mixer": {"num_heads": 2, "head_dim": 8, "num_v_heads": 4}},
    "mamba with MLP": {"d_intermediate": 40, "rms_norm": False, "tie_embeddings": False},
}


def config_of(name, **more):
    options = {"vocab_size": 50, "d_model": 32, "n_layer": 2, "family": name.split()[0], **OPTIONS[name]}
    return LanguageModelConfig(**options | more)


@pytest.fixture(params=OPTIONS)
def model(request):
    return LanguageModel(config_of(request.param), dtype=torch.float64)


def tokens(*shape, vocab_size=50):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


# ---- what it computes


def mamba_ssm_weights(config, layer_shapes):
    """Random weights under mamba-ssm's names, written down from its modules, not from ours."""
    rows = -(-config["vocab_size"] // 8) * 8
    shapes = {"backbone.embedding.weight": (rows, 32), "backbone.norm_f.weight": (32,)}
    for i in range(config["n_layer"]):
        shapes[f"backbone.layers.{i}.norm.weight"] = (32,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in layer_shapes.items()}
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    return weights


def hf_mamba(transformers):
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=56, hidden_size=32, state_size=16, num_hidden_layers=2, time_step_rank=2,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def hf_mamba2(transformers):
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=56, hidden_size=32, state_size=16, num_hidden_layers=2, num_heads=4, head_dim=16,
            n_groups=2, chunk_size=16, tie_word_embeddings=True,
        )
    )  # fmt: skip


PEERS = {
    "mamba": (
        {},
        {
            "A_log": (64, 16), "D": (64,), "in_proj.weight": (128, 32), "conv1d.weight": (64, 1, 4),
            "conv1d.bias": (64,), "x_proj.weight": (34, 64), "dt_proj.weight": (64, 2),
            "dt_proj.bias": (64,), "out_proj.weight": (32, 64),
        },
        hf_mamba,
    ),
    "mamba2": (
        {"layer": "Mamba2", "d_state": 16, "headdim": 16, "ngroups": 2},
        {
            "A_log": (4,), "D": (4,), "dt_bias": (4,), "in_proj.weight": (196, 32),
            "conv1d.weight": (128, 1, 4), "conv1d.bias": (128,), "norm.weight": (64,),
            "out_proj.weight": (32, 64),
        },
        hf_mamba2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", PEERS)
def test_a_checkpoint_of_mamba_ssm_loads_and_agrees_with_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    ssm_cfg, layer_shapes, make_peer = PEERS[family]
    config = {
        "d_model": 32, "n_layer": 2, "vocab_size": 50, "ssm_cfg": ssm_cfg, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    weights = mamba_ssm_weights(config, layer_shapes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = MambaLM.from_pretrained(tmp_path)

    peer = make_peer(transformers)
    theirs = {name.replace("embedding.", "embeddings."): x for name, x in weights.items()}
    peer.load_state_dict(theirs)
    ids = tokens(2, 37)
    expected = peer(ids).logits[..., :50]
    logits = model(ids).logits
    assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    expected.square().mean().backward()
    logits.square().mean().backward()
    wanted = {name: x.grad for name, x in peer.named_parameters()}
    for name, x in model.named_parameters():
        want = wanted[name.replace("embedding.", "embeddings.")]
        error = (x.grad - want).abs().max() / want.abs().max()
        assert error < 1e-3, f"{name}: {error:.2g}"


def test_no_token_sees_a_later_one(model):
    ids = tokens(1, 30)
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 50
    before, after = model(ids).logits, model(changed).logits
    assert_close(before[:, :20], after[:, :20], rtol=0, atol=0)
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


def test_loss_is_the_cross_entropy_of_the_next_token(model):
    ids = tokens(2, 20)
    labels = ids.clone()
    labels[0, 5:9] = -100
    expected = torch.nn.functional.cross_entropy(
        model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    output = model(ids, labels=labels)
    assert output.logits is None
    assert_close(output.loss, expected)


def test_loss_in_slices(model, monkeypatch):
    ids = tokens(2, 20)
    whole = model(ids, labels=ids).loss
    expected = torch.autograd.grad(whole, list(model.parameters()))
    monkeypatch.setattr(language_model, "_LOGITS_AT_ONCE", 7 * 50)
    sliced = model(ids, labels=ids).loss
    assert_close(sliced, whole)
    assert_close(torch.autograd.grad(sliced, list(model.parameters())), expected)


def test_slices_bound_the_memory_of_logits(monkeypatch):
    monkeypatch.setattr(language_model, "_LOGITS_AT_ONCE", 1 << 16)
    model = LanguageModel(LanguageModelConfig(vocab_size=5000, d_model=8, n_layer=1))
    ids = tokens(1, 500)
    greatest = kept = 0

    def pack(x):
        nonlocal greatest, kept
        greatest, kept = max(greatest, x.numel()), kept + x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, labels=ids).loss
        assert kept < 500 * 5000 / 4  # after the forward, no logits at all
        loss.backward()
    assert 0 < greatest <= 1 << 16  # in the backward, those of a slice


@pytest.mark.parametrize("family", ["mamba", "attention"])
@pytest.mark.parametrize(("wide", "kept"), [(True, torch.float32), (False, torch.bfloat16)])
def test_precision_of_the_residual_beside_half_precision_weights(family, wide, kept):
    model = LanguageModel(config_of(family, residual_in_fp32=wide), dtype=torch.bfloat16)
    seen = []
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    ids = tokens(1, 20)
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert seen == [kept, kept]
    exact = LanguageModel(model.config, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    expected = exact(ids).logits
    assert (logits.double() - expected).abs().max() < 0.05 * expected.abs().max()


def test_autocast():
    model = LanguageModel(config_of("mamba"))
    ids = tokens(2, 30)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=1e-2, atol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compiled_and_exported(model, fresh_compiler):
    ids = tokens(2, 40)
    compiled = torch.compile(model, fullgraph=True)
    loss = compiled(ids, labels=ids).loss
    expected = model(ids, labels=ids).loss
    assert_close(loss, expected)
    weights = list(model.parameters())
    assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights))
    with torch.no_grad():
        assert_close(torch.export.export(model, (ids,)).module()(ids).logits, model(ids).logits)


# ---- how it starts


def test_initialisation_is_mamba_ssms():
    deep = LanguageModelConfig(vocab_size=500, d_model=64, n_layer=9)
    model = MambaLM(deep)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert_close(model.backbone.embedding.weight.std().item(), 0.02, rtol=0.05, atol=0)
    bound = 1 / math.sqrt(128)  # of nn.Linear(128, 64)
    ends = [layer.mixer.out_proj.weight.abs().max().item() for layer in model.backbone.layers]
    assert all(0.95 * bound / 3 < end <= bound / 3 for end in ends)
    assert all(layer.mixer.dt_proj.bias.abs().max() > 0 for layer in model.backbone.layers)

    with_mlp = LanguageModel(dataclasses.replace(deep, family="attention", n_layer=2))
    layer = with_mlp.backbone.layers[0]
    assert layer.mlp.fc1.weight.shape == (512, 64)  # 8/3 of 64, up to a multiple of 128, twice
    for weight, inputs in ((layer.mixer.o_proj.weight, 64), (layer.mlp.fc2.weight, 256)):
        bound = 1 / math.sqrt(inputs) / 2  # two projections in each of two layers
        assert 0.95 * bound < weight.abs().max().item() <= bound


def test_parameter_groups():
    model = LanguageModel(config_of("mamba"))
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)].split(".", 3)[-1] for p in decayed["params"]) == sorted(
        [["embedding", "weight"][-1]]
        + 2 * [f"mixer.{n}.weight" for n in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")]
    )
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    model.backbone.embedding.weight.requires_grad_(False)
    assert len(parameter_groups(model, 0.1)[0]["params"]) == len(decayed["params"]) - 1
    assert_raises(ValueError, ["weight_decay", "-1"], lambda: parameter_groups(model, -1))


def test_cosine_with_warmup():
    factors = [cosine_with_warmup(step, 100, warmup=10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)
    assert cosine_with_warmup(0, 1, warmup=1) == 1


# ---- decoding


def test_greedy_generation_is_what_recomputing_all_gives(model):
    ids = tokens(3, 9)
    found = model.generate(ids, 30)
    for _ in range(30):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


@torch.no_grad()
def test_a_cache_goes_on_anywhere(model):
    ids = tokens(2, 40)
    expected = model(ids).logits
    cache = model.make_cache(2, 40)
    pieces = [model(piece, cache=cache).logits for piece in ids.split([1, 17, 1, 1, 20], dim=1)]
    assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-9, atol=1e-9)
    assert cache.seqlen_offset == 40
    last = model(ids, last_logits=3).logits
    assert_close(last, expected[:, -3:])


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@torch.no_grad()
def test_mambas_cache_does_not_grow(family):
    model = LanguageModel(config_of(family))
    sizes = []
    for length in (10, 1000):
        cache = model.make_cache(1, length)
        model(tokens(1, length), cache=cache)
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1] > 0


def test_sampling_draws_from_the_softmax():
    sampler = language_model.Sampler(
        2.0, None, 1.0, None, torch.Generator().manual_seed(0), torch.device("cpu")
    )
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    drawn = sampler(logits.expand(20000, 4)).bincount(minlength=4) / 20000
    assert_close(drawn, (logits / 2).softmax(0), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(2, 1.0, {1, 3}), (None, 0.79, {1, 3}), (None, 0.81, {0, 1, 3}), (3, 0.5, {3}), (9, 1e-9, {3})],
)
def test_sampling_is_restricted(top_k, top_p, kept):
    sampler = language_model.Sampler(1.0, top_k, top_p, 0, None, torch.device("cpu"))
    logits = torch.tensor([0.15, 0.3, 0.05, 0.5], dtype=torch.float64).log()
    assert set(sampler(logits.expand(1000, 4)).tolist()) == kept


def test_seeds_and_temperatures():
    model = LanguageModel(config_of("mamba"))
    ids = tokens(2, 5)
    draws = [model.generate(ids, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    drawn = model.generate(ids, 20, temperature=1.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, draws[0])
    greedy = model.generate(ids, 20)
    assert torch.equal(model.generate(ids, 20, temperature=1e-300, seed=0), greedy)
    assert torch.equal(model.generate(ids, 20, temperature=1.0, top_k=1), greedy)
    assert torch.equal(model.generate(ids, 0), ids)


def test_a_sequence_ends_with_eos():
    model = LanguageModel(config_of("mamba"))
    ids = tokens(4, 5)
    free = model.generate(ids, 40, temperature=1.0, seed=3)
    eos = int(free[0, 12])
    found = model.generate(ids, 40, temperature=1.0, seed=3, eos_token_id=eos)
    for row, unended in zip(found, free):
        new = unended[5:].tolist()
        end = new.index(eos) if eos in new else len(new)
        assert torch.equal(row[: 5 + end], unended[: 5 + end])
        assert (row[5 + end :] == eos).all()
    alone = model.generate(ids[:1], 40, eos_token_id=int(model.generate(ids[:1], 1)[0, -1]))
    assert alone.shape == (1, 6)


def test_padding_of_the_vocabulary_is_never_predicted():
    model = LanguageModel(config_of("mamba", vocab_size=9))
    assert model.lm_head.weight.shape == (16, 32)
    with torch.no_grad():
        model.lm_head.weight[9:] = 100 * model.lm_head.weight[:1]
    assert model(tokens(1, 5, vocab_size=9)).logits.shape == (1, 5, 9)
    assert model.generate(tokens(8, 5, vocab_size=9), 20, temperature=5.0, seed=0).max() < 9


# ---- files


def test_saved_and_loaded(model, tmp_path):
    ids = tokens(1, 12)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = LanguageModel.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert loaded.backbone.embedding.weight.dtype == torch.float64
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tied = loaded.lm_head.weight is loaded.backbone.embedding.weight
    assert tied == model.config.tie_embeddings
    half = LanguageModel.from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert half.backbone.layers[0].norm.weight.dtype == torch.bfloat16


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    first = LanguageModel(config_of("mamba"))
    first.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["config.json", "model.safetensors"]

    def breaks(weights, path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", breaks)
    with pytest.raises(KeyboardInterrupt):
        LanguageModel(config_of("mamba")).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def write_config(folder, **entries):
    base = {"vocab_size": 50, "d_model": 32, "n_layer": 2}
    (folder / "config.json").write_text(json.dumps(base | entries))


def test_what_does_not_load_says_why(tmp_path):
    def load():
        return LanguageModel.from_pretrained(tmp_path)

    assert_raises(FileNotFoundError, ["config.json", str(tmp_path)], load)
    (tmp_path / "config.json").write_text("{")
    assert_raises(ValueError, ["config.json", "expected JSON"], load)
    (tmp_path / "config.json").write_text("[]")
    assert_raises(ValueError, ["config.json", "JSON object", "list"], load)
    write_config(tmp_path)
    assert_raises(FileNotFoundError, ["model.safetensors", "pytorch_model.bin"], load)

    model = LanguageModel(config_of("mamba", mixer={}))
    weights = model.state_dict()
    for name, parts in (
        ("backbone.norm_f.weight", ["Missing key", "backbone.norm_f.weight"]),
        ("backbone.embedding.weight", ["Missing key", "backbone.embedding.weight"]),
    ):
        torch.save({k: x for k, x in weights.items() if k != name}, tmp_path / "pytorch_model.bin")
        assert_raises(ValueError, [*parts, str(tmp_path)], load)
    torch.save(
        weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, tmp_path / "pytorch_model.bin"
    )
    assert_raises(ValueError, ["lm_head.weight", "tie_embeddings"], load)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert isinstance(load(), LanguageModel)

    for entries, parts in (
        ({"attn_layer_idx": [1]}, ["attn_layer_idx", "[1]"]),
        ({"ssm_cfg": {"layer": "Mamba3"}}, ["ssm_cfg", "Mamba2", "Mamba3"]),
        ({"ssm_cfg": {"d_stat": 1}}, ["mixer", "d_state", "d_stat"]),
        ({"model_type": "mamba"}, ["model_type mamba", "transformers"]),
        ({"family": "mamba", "layers": 3}, ["n_layer", "layers"]),
        ({"n_layer": 3}, ["Missing key", "layers.2"]),
        ({"d_model": 40}, ["size mismatch"]),
    ):
        write_config(tmp_path, **entries)
        assert_raises(ValueError, parts, load)
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 32}))
    assert_raises(ValueError, ["vocab_size", "n_layer"], load)


# ---- families


class RunningMean(torch.nn.Module):
    """The least of mixers: each token sees the mean of all so far."""

    def __init__(self, d_model, gain=1.0, device=None, dtype=None):
        super().__init__()
        self.gain = gain
        self.last = torch.nn.Linear(d_model, d_model, device=device, dtype=dtype)

    def forward(self, x, cache=None):
        total, count = x.new_zeros(x.shape[0], x.shape[2]), 0
        if cache is not None:
            total, count = cache.key_value_memory_dict.get(self.layer_idx, (total, count))
        sums = total[:, None] + x.cumsum(1)
        counts = count + torch.arange(1, x.shape[1] + 1)
        if cache is not None:
            cache.key_value_memory_dict[self.layer_idx] = (sums[:, -1], counts[-1])
        return self.gain * self.last(sums / counts[:, None])


@pytest.fixture
def running_mean(monkeypatch):
    monkeypatch.setattr("longspan.models.families.FAMILIES", FAMILIES.copy())
    register_family("running mean", Family(RunningMean, lambda m, x, cache: m(x, cache), "last", 2.0))


def test_a_family_of_ones_own(running_mean, tmp_path):
    config = LanguageModelConfig(
        vocab_size=50, d_model=32, n_layer=2, family="running mean", mixer={"gain": 2.0}
    )
    model = LanguageModel(config, dtype=torch.float64)
    assert model.config.d_intermediate == 64
    test_greedy_generation_is_what_recomputing_all_gives(model)
    test_saved_and_loaded(model, tmp_path)
    assert_raises(ValueError, ["name", "mamba"], lambda: register_family("mamba", FAMILIES["mamba2"]))


# ---- errors


@pytest.mark.parametrize(
    ("options", "kind", "parts"),
    [
        ({"vocab_size": 0}, ValueError, ["vocab_size", "1 or more", "got 0"]),
        ({"n_layer": 2.0}, TypeError, ["n_layer", "an int", "2.0"]),
        ({"d_model": True}, TypeError, ["d_model", "True"]),
        ({"d_intermediate": -1}, ValueError, ["d_intermediate", "-1"]),
        ({"mixer": [1]}, TypeError, ["mixer", "mapping", "list"]),
        ({"norm_eps": 0}, ValueError, ["norm_eps", "0"]),
        ({"pad_vocab_size_multiple": 0}, ValueError, ["pad_vocab_size_multiple", "0"]),
        ({"family": "mumba"}, ValueError, ["family", "attention, mamba, mamba2", "'mumba'"]),
        ({"mixer": {"d_sate": 1}}, ValueError, ["mixer", "options of mamba", "d_state", "d_sate"]),
        ({"mixer": {"layer_idx": 1}}, ValueError, ["mixer", "got layer_idx"]),
        ({"mixer": {"d_state": 0}}, ValueError, ["d_state", "got 0"]),
        ({"family": "attention", "mixer": {"window": 0}}, ValueError, ["window", "0"]),
        ({"family": "attention", "mixer": {"num_heads": 32}}, ValueError, ["head_dim", "even", "1"]),
    ],
)
def test_wrong_configs(options, kind, parts):
    base = {"vocab_size": 50, "d_model": 32, "n_layer": 2}
    assert_raises(kind, parts, lambda: LanguageModel(LanguageModelConfig(**base | options)))


def test_wrong_arguments():
    model = LanguageModel(config_of("mamba"))
    ids = tokens(2, 5)
    cache = model.make_cache(2, 6)
    for kind, parts, call in (
        (TypeError, ["input_ids", "int64", "float32"], lambda: model(ids.float())),
        (ValueError, ["input_ids", "(batch, tokens)", "(5,)"], lambda: model(ids[0])),
        (ValueError, ["labels", "(2, 5)", "(2, 4)"], lambda: model(ids, labels=ids[:, 1:])),
        (ValueError, ["labels", "None beside"], lambda: model(ids, labels=ids, cache=cache)),
        (ValueError, ["last_logits", "got 0"], lambda: model(ids, last_logits=0)),
        (ValueError, ["cache", "1 sequences", "got 2"], lambda: model(ids[:1], cache=cache)),
        (ValueError, ["cache", "max_length of 7", "got 6"], lambda: model(tokens(2, 7), cache=cache)),
        (ValueError, ["batch_size", "got 0"], lambda: model.make_cache(0, 5)),
        (ValueError, ["max_length", "got 0"], lambda: model.make_cache(1, 0)),
        (ValueError, ["input_ids", "(2, 0)"], lambda: model.generate(ids[:, :0], 5)),
        (ValueError, ["max_new_tokens", "-1"], lambda: model.generate(ids, -1)),
        (ValueError, ["temperature", "-1"], lambda: model.generate(ids, 5, temperature=-1)),
        (ValueError, ["temperature", "nan"], lambda: model.generate(ids, 5, temperature=math.nan)),
        (ValueError, ["top_k", "got 0"], lambda: model.generate(ids, 5, top_k=0)),
        (ValueError, ["top_p", "got 0"], lambda: model.generate(ids, 5, top_p=0)),
        (ValueError, ["eos_token_id", "0 to 49", "50"], lambda: model.generate(ids, 5, eos_token_id=50)),
        (
            ValueError,
            ["seed and generator", "one of them"],
            lambda: model.generate(ids, 5, seed=0, generator=torch.Generator()),
        ),
        (ValueError, ["family", "'attention'"], lambda: MambaLM(config_of("attention"))),
    ):
        assert_raises(kind, parts, call)
