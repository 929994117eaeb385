"""`longspan.hf.accelerate` with caches: prefill, decoding, chunks, beams, and packed sequences."""

import pytest
import torch
import transformers
from hf_models import padding, tokens
from recurrent_models import ALL, LIMITED, MAMBA1, MAMBA2, make

import longspan
import longspan.hf

LENGTH = 29
CLOSE = {"atol": 5e-5, "rtol": 5e-5}
PACKS = ["zamba", *MAMBA2[1:]]  # whose CausalLM hands packing to its layers


def states(cache):
    """Convolution and recurrent states of every layer that has them."""
    found = []
    for layer in cache.layers:
        if hasattr(layer, "conv_states"):
            found += [layer.conv_states[0], layer.recurrent_states[0]]
    return found


def assert_same_states(cache, expected):
    ours, theirs = states(cache), states(expected)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **CLOSE)


def in_chunks(model, ids, sizes, mask=None):
    """Logits of ``ids`` given in pieces, one after the other, and the cache.

    With positions, as ``generate`` gives them: Bamba by itself counts every piece from 0.
    """
    cache, parts, start = transformers.DynamicCache(config=model.config), [], 0
    for size in sizes:
        stop = start + size
        given = {"position_ids": torch.arange(start, stop)[None], "cache": cache, "use_cache": True}
        if mask is not None:
            given["attention_mask"] = mask[:, :stop]
        parts.append(model(ids[:, start:stop], **given).logits)
        start = stop
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_prefill_leaves_the_same_states(name, pad):
    model, ids, mask = make(name), tokens(2, LENGTH), padding(pad, 2, LENGTH)
    expected = model(ids, attention_mask=mask, use_cache=True).cache
    longspan.hf.accelerate(model)
    assert_same_states(model(ids, attention_mask=mask, use_cache=True).cache, expected)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_prompt_shorter_than_the_convolution(name):
    model, ids = make(name), tokens(2, 6)
    expected, expected_cache = in_chunks(model, ids, (2, 1, 1, 1, 1))
    longspan.hf.accelerate(model, hf_compat=True)
    got, cache = in_chunks(model, ids, (2, 1, 1, 1, 1))
    torch.testing.assert_close(got, expected, **CLOSE)
    assert_same_states(cache, expected_cache)


@pytest.mark.parametrize("pad", ["none", "left", "holes"])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_chunks_give_what_one_pass_gives(name, pad):
    """Against the torch path without a cache, whose own chunks are wrong in Mamba-1 layers.

    A single padded token is let in by transformers (its masks do not look at one token's).
    """
    model, ids, mask = make(name), tokens(2, LENGTH), padding(pad, 2, LENGTH)
    expected = model(ids, attention_mask=mask).logits
    longspan.hf.accelerate(model)
    got, _ = in_chunks(model, ids, (20, 5, 1, 1, 2), mask)
    where = mask.bool()
    torch.testing.assert_close(got[where], expected[where], **CLOSE)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_hf_compat_gives_what_transformers_gives_in_chunks(name):
    model, ids, sizes = make(name), tokens(2, LENGTH), (13, 1, 1, 7, 1, 1, 5)
    expected, expected_cache = in_chunks(model, ids, sizes)
    whole = model(ids).logits
    with longspan.hf.accelerate(model, hf_compat=True):
        got, cache = in_chunks(model, ids, sizes)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert_same_states(cache, expected_cache)
    # It is what the option is for that makes the difference:
    wrong = name in MAMBA1 or name in LIMITED
    assert ((expected - whole).abs().max() > 1e-3) == wrong
    with longspan.hf.accelerate(model):
        got, _ = in_chunks(model, ids, sizes)
    torch.testing.assert_close(got, whole, **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_decoding_without_no_grad(name):
    """The kernels that write in place have no gradient; with one wanted the others take the step."""
    model, ids = make(name), tokens(2, LENGTH)
    longspan.hf.accelerate(model)
    expected, expected_grads = model(ids).logits, {}
    expected[:, 20:].square().sum().backward()
    for key, p in model.named_parameters():
        expected_grads[key] = p.grad.clone()
        p.grad = None
    got, _ = in_chunks(model, ids, (20, 4, 1, 1, 3))
    torch.testing.assert_close(got, expected, **CLOSE)
    # The gradient reaches back through the states, over every chunk.
    got[:, 20:].square().sum().backward()
    for key, p in model.named_parameters():
        scale = expected_grads[key].abs().max()
        torch.testing.assert_close(p.grad / scale, expected_grads[key] / scale, **CLOSE)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_cache_that_records_its_past(name):
    """As for speculative decoding: convolution states grow until they are cropped."""
    model, ids = make(name), tokens(2, LENGTH)
    caches, outs = [], []
    for accelerated in (False, True):
        if accelerated:
            longspan.hf.accelerate(model, hf_compat=True)
        cache = transformers.DynamicCache(config=model.config)
        cache.activate_past_recording()
        outs.append([])
        for start, stop in ((0, 2), (2, 3), (3, 9), (9, 10)):
            outs[-1].append(model(ids[:, start:stop], cache=cache, use_cache=True).logits)
        caches.append(cache)
    torch.testing.assert_close(torch.cat(outs[1], 1), torch.cat(outs[0], 1), **CLOSE)
    assert_same_states(caches[1], caches[0])


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_a_cache_is_reset_and_used_again(name):
    model, ids = make(name), tokens(2, LENGTH)
    longspan.hf.accelerate(model)
    expected, cache = in_chunks(model, ids, (20, 1))
    cache.reset()
    got = model(ids[:, :20], cache=cache, use_cache=True).logits
    torch.testing.assert_close(got, expected[:, :20], **CLOSE)


# ---- generate


@pytest.mark.parametrize("pad", ["none", "left"])
@pytest.mark.parametrize("name", ALL)
def test_generation_token_for_token(name, pad):
    model, ids, mask = make(name), tokens(2, 20), padding(pad, 2, 20)
    options = {
        "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    expected = model.generate(ids, **options)
    longspan.hf.accelerate(model, hf_compat=name in LIMITED)
    got = model.generate(ids, **options)
    assert got.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **CLOSE)


@pytest.mark.parametrize("name", ["mamba", "zamba", "mamba2", "bamba", "falcon_h1"])
def test_beams_are_reordered(name):
    model, ids, mask = make(name), tokens(2, 20), padding("left", 2, 20)
    options = {
        "attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, "do_sample": False,
        "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    expected = model.generate(ids, **options)
    longspan.hf.accelerate(model)
    got = model.generate(ids, **options)
    assert got.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, **CLOSE)


@pytest.mark.parametrize("name", ["mamba2", pytest.param("bamba", marks=pytest.mark.slow)])
def test_compiled_generation_with_a_static_cache(name, fresh_compiler):
    model, ids, mask = make(name), tokens(2, 12), padding("left", 2, 12)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    longspan.hf.accelerate(model)
    compiled = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    got = model.generate(ids, cache_implementation="static", compile_config=compiled, **options)
    assert hasattr(model, "_compiled_call")
    assert got.tolist() == expected.tolist()


# ---- packed sequences

LENGTHS = (9, 1, 19)


def packing(kind):
    """Keywords that say so, by the names of transformers' collator for flattened batches."""
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    indices = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None].int()
    by_offsets = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "position_ids": positions}
    return {
        "seq_idx": {"seq_idx": indices, **by_offsets},
        "cu_seq_lens": by_offsets,
        "positions": {"position_ids": positions},
    }[kind]


def assert_packed_as_alone(model, ids, **kwargs):
    """Outputs and gradients, of what a model gives first."""
    grads = []
    weights = torch.randn(1, LENGTH, 1)
    for packed in (True, False):
        model.zero_grad()
        if packed:
            got = out = model(ids, use_cache=False, **kwargs)[0]
        else:
            parts = ids.split(LENGTHS, dim=1)
            out = torch.cat([model(part, use_cache=False)[0] for part in parts], 1)
        (out * weights).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(got, out, **CLOSE)
    for key, want in grads[1].items():
        scale = want.abs().max()
        torch.testing.assert_close(grads[0][key] / scale, want / scale, **CLOSE)


@pytest.mark.parametrize("kind", ["seq_idx", "cu_seq_lens"])
@pytest.mark.parametrize("name", PACKS)
def test_packed_sequences(name, kind):
    """transformers raises in its torch path, or (cu_seq_lens) lets its layers run across."""
    model, ids = make(name), tokens(1, LENGTH)
    if name == "granite":  # its masks do not look at positions
        model.set_attn_implementation("longspan")
    if kind == "seq_idx":
        with pytest.raises(ValueError, match="packed"):
            model(ids, use_cache=False, **packing(kind))
    longspan.hf.accelerate(model)
    assert_packed_as_alone(model, ids, **packing(kind))


@pytest.mark.parametrize("kind", ["seq_idx", "cu_seq_lens", "positions"])
def test_packed_sequences_of_mamba2(kind):
    """Mamba2Model hands on what Mamba2ForCausalLM does not, position_ids among it."""
    model = make("mamba2")
    longspan.hf.accelerate(model)
    assert_packed_as_alone(model.backbone, tokens(1, LENGTH), **packing(kind))


@pytest.mark.parametrize("name", ["mamba", "zamba", "mamba2"])
@torch.no_grad()
def test_a_mixer_keeps_packed_rows_apart_and_remembers_the_last(name):
    """Of two rows, packed otherwise: outputs, and the states that a cache has afterwards."""
    model = make(name)
    longspan.hf.accelerate(model)
    mixer = next(m for n, m in model.named_modules() if n.endswith(("mixer", "mamba")))
    x, lengths = torch.randn(2, LENGTH, 32), ((20, 2, 7), (2, 24, 3))
    rows = [torch.repeat_interleave(torch.arange(3), torch.tensor(n)) for n in lengths]
    cache = transformers.DynamicCache(config=model.config)
    got = mixer(x, cache=cache, seq_idx=torch.stack(rows))
    for row, sizes in enumerate(lengths):
        alone = [transformers.DynamicCache(config=model.config) for _ in sizes]
        parts = x[row : row + 1].split(sizes, dim=1)
        expected = torch.cat([mixer(part, cache=c) for part, c in zip(parts, alone)], 1)
        torch.testing.assert_close(got[row : row + 1], expected, **CLOSE)
        for name_of in ("conv_states", "recurrent_states"):
            ours, theirs = (getattr(c.layers[0], name_of)[0] for c in (cache, alone[-1]))
            torch.testing.assert_close(ours[row : row + 1], theirs, **CLOSE)


def test_cu_seq_lens_are_of_one_row():
    model = make("mamba2")
    longspan.hf.accelerate(model)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model.backbone(tokens(2, 4), cu_seq_lens_q=torch.tensor([0, 2, 4]))
