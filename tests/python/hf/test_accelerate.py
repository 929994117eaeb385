"""`longspan.hf.accelerate`: every model's logits and gradients against its own torch path."""

import sys

import pytest
import torch
from hf_models import CLOSE, assert_gradients_agree, padding, tokens
from recurrent_models import ALL, DELTA, MAMBA1, MAMBA2, make, mixers
from torch.utils._python_dispatch import TorchDispatchMode

import longspan
import longspan.hf

LENGTH = 37  # no multiple of a chunk
SLOWLY_COMPILED = [name for name in ALL if name not in ("mamba", "bamba")]


class Operators(TorchDispatchMode):
    """Collects the names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def run(model, ids, labels=None, **kwargs):
    """Logits, and the gradient of each parameter by name of a loss over ``labels``."""
    model.zero_grad()
    logits = model(ids, **kwargs).logits
    if labels is None:
        return logits.detach(), {}
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
    return logits.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def test_the_torch_paths_are_what_we_compare_with():
    """No operator of ours runs in them, whatever other tests have put into sys.modules."""
    for name in ALL:
        model = make(name)
        with torch.no_grad(), Operators() as slow:
            model(tokens(1, 3))
        assert not any(op.startswith("longspan") for op in slow.names)
        longspan.hf.accelerate(model)
        with torch.no_grad(), Operators() as fast:
            model(tokens(1, 3))
        scan = "selective_scan" if name in MAMBA1 else "ssd" if name in MAMBA2 else "delta_rule"
        assert {f"longspan::{scan}_forward", "longspan::causal_conv1d_forward"} <= fast.names


@pytest.mark.parametrize("name", ALL)
def test_every_mixer_is_replaced(name):
    model = make(name)
    counts = longspan.hf.accelerate(model).counts
    assert counts.pop(next(iter(counts))) == mixers(name)
    # and its norm, where it has one
    assert list(counts.values()) == [mixers(name)] * (name in MAMBA2 + DELTA and name != "falcon_h1")


@pytest.mark.parametrize("pad", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", ALL)
def test_logits_and_gradients(name, pad):
    model, ids, mask = make(name), tokens(2, LENGTH), padding(pad, 2, LENGTH)
    where = mask.bool()
    labels = tokens(2, LENGTH).masked_fill(~where, -100)
    expected, expected_grads = run(model, ids, labels, attention_mask=mask)
    longspan.hf.accelerate(model)
    got, grads = run(model, ids, labels, attention_mask=mask)
    torch.testing.assert_close(got[where], expected[where], **CLOSE)
    assert got.isfinite().all()
    assert_gradients_agree(grads, expected_grads)


@pytest.mark.parametrize("name", ALL)
def test_training_mode_without_a_cache_or_a_mask(name):
    model, ids, labels = make(name).train(), tokens(2, LENGTH), tokens(2, LENGTH)
    expected, expected_grads = run(model, ids, labels)
    longspan.hf.accelerate(model)
    got, grads = run(model, ids, labels)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert_gradients_agree(grads, expected_grads)


@pytest.mark.parametrize("name", ALL)
def test_the_padded_are_not_seen_even_if_nan(name):
    """A padded token's embedding reaches nothing: masks select, where transformers multiplies."""
    model, mask = make(name), padding("left", 2, LENGTH)
    longspan.hf.accelerate(model)
    where = mask.bool()
    mixer = next(m for n, m in model.named_modules() if n.endswith(("mixer", "mamba", "linear_attn")))
    x = torch.randn(2, LENGTH, 32)
    with torch.no_grad():
        expected = mixer(x, attention_mask=mask)
        got = mixer(x.masked_fill(~where[..., None], torch.nan), attention_mask=mask)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ALL)
def test_a_longer_sequence_than_any_block(name):
    model, ids = make(name), tokens(1, 300)
    with torch.no_grad():
        expected = model(ids).logits
        with longspan.hf.accelerate(model):
            torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


def parts_of(logits, grads):
    """Logits and gradients, in groups: all layers' weights of a name, and everything that is small."""
    found = {"logits": [logits]}
    for key, grad in grads.items():
        small = grad.numel() < 256
        found.setdefault("small" if small else ".".join(key.split(".")[-2:]), []).append(grad)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_no_worse_than_the_torch_path(name, dtype):
    """flash-attention's rule: errors against float32 at most twice the torch path's.

    Relative errors, in root mean square over a group: the error of a gradient of 8 numbers by itself
    is small or large by luck.
    """
    half, exact = make(name, dtype), make(name)
    exact.load_state_dict(half.state_dict())  # the same rounded weights
    errors = {}
    for _ in range(3):
        ids, labels = tokens(2, LENGTH), tokens(2, LENGTH)
        truth, theirs = (parts_of(*run(model, ids, labels)) for model in (exact, half))
        with longspan.hf.accelerate(half):
            ours = parts_of(*run(half, ids, labels))
        for key, tensors in truth.items():
            for want, *found in zip(tensors, ours[key], theirs[key]):
                assert found[0].dtype == found[1].dtype
                squares = torch.stack([(x.float() - want).square().sum() for x in found])
                errors[key] = errors.get(key, 0) + squares / want.square().sum()
    for key, (error, allowed) in errors.items():
        assert error <= 4 * allowed, f"{key}: {error**0.5:.3g}, the torch path's {allowed**0.5:.3g}"


@pytest.mark.parametrize("name", ["mamba", "jamba", "mamba2", "nemotron_h", "falcon_h1_normed"])
def test_autocast(name):
    model, ids, labels = make(name), tokens(2, LENGTH), tokens(2, LENGTH)
    truth, _ = run(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_grads = run(model, ids, labels)
        longspan.hf.accelerate(model)
        got, grads = run(model, ids, labels)
    assert got.dtype == expected.dtype
    assert (got - truth).norm() <= 1.5 * (expected - truth).norm()
    assert {n: g.dtype for n, g in grads.items()} == {n: g.dtype for n, g in expected_grads.items()}


@pytest.mark.parametrize("name", ["mamba", "zamba", "mamba2", "nemotron_h"])
def test_double_is_double_throughout(name):
    """Where transformers rounds A and states to float32: the same model in float32 is as near to it."""
    single, double, ids = make(name), make(name, torch.float64), tokens(2, LENGTH)
    labels = tokens(2, LENGTH)
    expected, expected_grads = run(single, ids, labels)
    longspan.hf.accelerate(double)
    got, grads = run(double, ids, labels)
    torch.testing.assert_close(got.float(), expected, **CLOSE)
    assert_gradients_agree({n: g.float() for n, g in grads.items()}, expected_grads)
    with torch.no_grad():  # chunks agree to double's rounding
        cache = double(ids[:, :20], use_cache=True).cache
        rest = double(ids[:, 20:], cache=cache, use_cache=True).logits
    torch.testing.assert_close(rest, got[:, 20:], atol=1e-12, rtol=1e-12)


def test_gradient_checkpointing():
    for name in ("mamba", "bamba", "zamba2"):
        model, ids, labels = make(name).train(), tokens(2, LENGTH), tokens(2, LENGTH)
        longspan.hf.accelerate(model)
        expected, expected_grads = run(model, ids, labels)
        model.gradient_checkpointing_enable()
        with Operators() as ran:
            got, grads = run(model, ids, labels)
        assert any(op.startswith("longspan") for op in ran.names)
        assert torch.equal(got, expected)
        assert_gradients_agree(grads, expected_grads)


@pytest.mark.parametrize(
    "name", ["mamba", "bamba", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOWLY_COMPILED)]
)
def test_fullgraph_compile(name, fresh_compiler):
    """With padding, which a graph cannot look at, and with gradients."""
    model, ids, mask = make(name), tokens(2, LENGTH), padding("left", 2, LENGTH)
    labels = tokens(2, LENGTH).masked_fill(mask == 0, -100)
    longspan.hf.accelerate(model)
    expected, expected_grads = run(model, ids, labels, attention_mask=mask, use_cache=False)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    got, grads = run(model, ids, labels, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)
    assert_gradients_agree(grads, expected_grads)


@pytest.mark.parametrize("name", ["falcon_mamba", "zamba", "mamba2"])
def test_devices_without_kernels_take_the_reference(name, monkeypatch):
    model, ids, mask = make(name), tokens(2, 11), padding("left", 2, 11)
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    expected, expected_grads = run(model, ids, ids)
    sequences = model.generate(ids, **options)
    longspan.hf.accelerate(model)
    for module in ("conv", "norm", "selective_scan", "ssd"):
        # By sys.modules, for `longspan.ops.ssd` is the function.
        monkeypatch.setattr(sys.modules[f"longspan.ops.{module}"], "has_kernels", lambda *_: False)
    with Operators() as ran:
        got, grads = run(model, ids, ids)
    assert not any(op.startswith("longspan") for op in ran.names)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert_gradients_agree(grads, expected_grads)
    assert torch.equal(model.generate(ids, **options), sequences)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "granite"])
def test_nothing_is_copied_between_the_kernels(name):
    """in_proj's layout goes through: no transposed copies, in the forward without padding."""
    model = make(name)
    longspan.hf.accelerate(model)
    mixer = next(m for n, m in model.named_modules() if n.endswith(("mixer", "mamba", "linear_attn")))
    x = torch.randn(2, LENGTH, 32)
    with torch.no_grad(), Operators() as ran:
        mixer(x)
    copies = {"aten::clone", "aten::copy_", "aten::contiguous", "aten::_to_copy", "aten::cat"}
    assert not ran.names & copies
