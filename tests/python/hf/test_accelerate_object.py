"""What `longspan.hf.accelerate` gives back, undoes, refuses, and leaves as it was."""

import copy
import pickle

import accelerate
import pytest
import torch
import transformers
from hf_models import make as make_other
from hf_models import tokens
from recurrent_models import ALL, make
from torch import nn
from torch.nn.functional import silu
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

import longspan
import longspan.hf

CLOSE = {"atol": 5e-5, "rtol": 5e-5}


def mixers(model):
    return [m for n, m in model.named_modules() if n.endswith(("mixer", "mamba"))]


def runs_on_longspan(model):
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profile, torch.no_grad():
        model(tokens(1, 4))
    return any(event.key.startswith("longspan::") for event in profile.key_averages())


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_undo_gives_back_the_class_s_own_forwards(name):
    model = make(name)
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    accelerated = longspan.hf.accelerate(model)
    assert runs_on_longspan(model)
    accelerated.undo()
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before
    assert not runs_on_longspan(model)
    assert accelerated.counts == {}
    accelerated.undo()  # again


def test_a_context_undoes_on_exit_also_by_an_error():
    model = make("mamba")
    with longspan.hf.accelerate(model) as accelerated:
        assert runs_on_longspan(model)
        assert accelerated.counts == {"MambaMixer": 2}
        assert repr(accelerated) == "Accelerated(MambaMixer: 2)"
    assert not runs_on_longspan(model)
    with pytest.raises(ZeroDivisionError), longspan.hf.accelerate(model):
        1 / 0  # noqa: B018
    assert not runs_on_longspan(model)


@pytest.mark.parametrize("first", [True, False])
def test_twice_is_once(first):
    """Either result undoes; the second call's hf_compat holds."""
    model, ids = make("mamba"), tokens(1, 12)
    expected = model(ids).logits
    results = [longspan.hf.accelerate(model), longspan.hf.accelerate(model, hf_compat=True)]
    assert results[0].counts == results[1].counts == {"MambaMixer": 2}
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).cache
        rest = model(ids[:, 6:], cache=cache, use_cache=True).logits
    assert (rest - expected[:, 6:]).abs().max() > 1e-3  # begins from zero, as transformers does
    results[0 if first else 1].undo()
    assert not any("forward" in vars(m) for m in model.modules())


def test_any_part_of_a_model():
    model = make("nemotron_h")
    assert longspan.hf.accelerate(model.model.layers[0]).counts == {
        "NemotronHMamba2Mixer": 1, "NemotronHRMSNormGated": 1,
    }  # fmt: skip
    assert ["forward" in vars(m) for m in mixers(model) if hasattr(m, "conv1d")] == [True, False]
    model = make("mamba")
    assert longspan.hf.accelerate(mixers(model)[1]).counts == {"MambaMixer": 1}


def test_a_model_without_such_layers_is_an_error():
    with pytest.raises(ValueError, match=r"MambaMixer.*Mamba2Mixer.*found none in LlamaForCausalLM"):
        longspan.hf.accelerate(make_other("llama"))
    with pytest.raises(TypeError, match="model: expected a torch module, got str"):
        longspan.hf.accelerate("state-spaces/mamba-130m-hf")


class Own(MambaMixer):
    def forward(self, hidden_states, *args, **kwargs):
        return 2 * super().forward(hidden_states, *args, **kwargs)


class Inherited(MambaMixer):
    pass


def test_a_subclass_with_a_forward_of_its_own_is_let_be():
    model = make("mamba")
    first, second = mixers(model)
    first.__class__, second.__class__ = Own, Inherited
    assert longspan.hf.accelerate(model).counts == {"Inherited": 1}
    assert "forward" not in vars(first)


def test_somebody_else_s_forward_comes_back():
    model = make("mamba")
    mixer = mixers(model)[0]
    mixer.forward = theirs = lambda hidden_states, **kwargs: hidden_states
    with longspan.hf.accelerate(model), longspan.hf.accelerate(model):
        assert mixer.forward is not theirs
    assert mixer.forward is theirs


@pytest.mark.parametrize("name", ALL)
def test_state_dict_and_saving(name, tmp_path):
    model, ids = make(name), tokens(1, 9)
    before = {n: (p.data_ptr(), p.shape) for n, p in model.state_dict().items()}
    parts = [n for n, _ in model.named_modules()]
    longspan.hf.accelerate(model)
    assert {n: (p.data_ptr(), p.shape) for n, p in model.state_dict().items()} == before
    assert [n for n, _ in model.named_modules()] == parts
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not any("forward" in vars(m) for m in loaded.modules())
    torch.testing.assert_close(loaded(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["mamba", "zamba2"])
def test_copies_are_accelerated_by_themselves(name, how):
    model, ids = make(name), tokens(1, 9)
    accelerated = longspan.hf.accelerate(model)
    expected = model(ids).logits
    other = how(model)
    accelerated.undo()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # the copy's forwards use the copy's weights
    assert torch.equal(other(ids).logits, expected)
    assert runs_on_longspan(other)
    longspan.hf.accelerate(other).undo()
    assert not runs_on_longspan(other)


@pytest.mark.parametrize("hooks_first", [True, False])
@pytest.mark.parametrize("name", ["mamba", "zamba", "bamba"])
def test_offloaded_weights(name, hooks_first):
    """accelerate's hooks put weights in place at each call, of layers that are used without one too."""
    model, ids = make(name), tokens(1, 9)
    expected = model(ids).logits.detach()
    ours = None if hooks_first else longspan.hf.accelerate(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    ours = longspan.hf.accelerate(model)
    assert all(m.conv1d.weight.device.type == "meta" for m in mixers(model) if hasattr(m, "conv1d"))
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    assert runs_on_longspan(model)
    ours.undo()
    assert not runs_on_longspan(model)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


def test_hooks_taken_off_again():
    model, ids = make("mamba"), tokens(1, 9)
    expected = model(ids).logits.detach()
    accelerate.cpu_offload(model, execution_device="cpu")
    ours = longspan.hf.accelerate(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert runs_on_longspan(model)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    ours.undo()
    assert not runs_on_longspan(model)


def test_a_compiled_model_sees_the_change(fresh_compiler):
    model = make("mamba2")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled.config.use_cache = False
    assert not runs_on_longspan(compiled)
    with longspan.hf.accelerate(compiled):
        assert runs_on_longspan(compiled)
    assert not runs_on_longspan(compiled)


class Adapted(nn.Module):
    """As an adapter wraps a layer: only calls show what it adds."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + 0.5


def test_a_wrapped_time_step_projection_is_called():
    """transformers multiplies by its weight alone."""
    wrapped, added = make("mamba"), make("mamba")
    for mixer in mixers(wrapped):
        mixer.dt_proj = Adapted(mixer.dt_proj)
    for mixer in mixers(added):
        mixer.dt_proj.bias.data += 0.5
    longspan.hf.accelerate(wrapped)
    ids = tokens(2, 9)
    torch.testing.assert_close(wrapped(ids).logits, added(ids).logits, **CLOSE)


def test_the_cache_by_its_former_name():
    model = make("mamba")
    longspan.hf.accelerate(model)
    cache = transformers.DynamicCache(config=model.config)
    with pytest.warns(FutureWarning, match="cache_params"):
        mixers(model)[0](torch.randn(1, 5, 32), cache_params=cache)
    assert cache.get_recurrent_state(0) is not None


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_a_norm_by_itself_takes_what_it_took(x_dtype, z_dtype, weight_dtype):
    norm = MambaRMSNormGated(24, group_size=8).to(weight_dtype)
    nn.init.uniform_(norm.weight)
    x, z = torch.randn(2, 3, 24, dtype=x_dtype), torch.randn(2, 3, 24, dtype=z_dtype)
    expected, plain = norm(x, z), norm(x)
    longspan.hf.accelerate(norm)
    close = CLOSE if x_dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(norm(x, z), expected.to(x_dtype), **close)
    torch.testing.assert_close(norm(x), plain.to(x_dtype), **close)


def test_a_norm_before_the_gate():
    """FalconH1's order is its configuration's; its default is this one."""
    model = make("falcon_h1_normed")
    norm = mixers(model)[0].norm
    assert norm.norm_before_gate
    x, z = torch.randn(2, 2, 5, 64)
    with longspan.hf.accelerate(norm):
        torch.testing.assert_close(norm(x, z), norm(x) * silu(z))
    norm.norm_before_gate = False
    expected = norm(x, z)
    longspan.hf.accelerate(norm)
    torch.testing.assert_close(norm(x, z), expected)
