"""The caches of `longspan.hf.extend_context`: whole, unrotated, and StreamingLLM's window."""

import copy

import pytest
import torch
from extend_models import (
    CLOSE,
    FAMILIES,
    TRAINED,
    check_beams,
    growing,
    in_parts,
    make,
    padded,
    reference_logits,
    streaming,
    tokens,
)
from transformers import DynamicCache, StaticCache

import longspan.hf

WINDOW, SINKS = 12, 3
KINDS = {
    "full": {},
    "unrotated": {"cache": "unrotated"},
    "window": {"cache": "window", "window": WINDOW, "sink_tokens": SINKS},
}
PARTS = [1, 40, 1, 1, 30, 2, 25]
FACTORS = [1.0, 1.5, 2.0, 4.0]
GROWING = {
    "dynamic": {"method": "dynamic", "factor": 2},
    "dynamic_linear": {"method": "dynamic_linear"},
    "dynamic_yarn": {"method": "yarn", "dynamic": True},
    "longrope": {"method": "longrope", "short_factor": [1.0] * 4, "long_factor": FACTORS},
}


# ---- all of them


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_text_in_parts_is_one_pass(family, kind):
    model, ids = make(family), tokens(2, sum(PARTS))
    longspan.hf.extend_context(model, "yarn", 2, **KINDS[kind])
    whole = model(ids, use_cache=False).logits
    got, cache = in_parts(model, ids, PARTS)
    torch.testing.assert_close(got, whole, **CLOSE)
    torch.testing.assert_close(model(ids).logits, whole, **CLOSE)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generates_what_forwards_say(kind):
    model, ids = make(), tokens(1, 20)
    longspan.hf.extend_context(model, "linear", 2, **KINDS[kind])
    got = model.generate(ids, max_new_tokens=60, do_sample=False)
    assert got.shape == (1, 80)
    expected = model(got, use_cache=False).logits[:, 19:-1].argmax(-1)
    assert torch.equal(got[:, 20:], expected)
    chunks = model.generate(ids, max_new_tokens=60, do_sample=False, prefill_chunk_size=7)
    assert torch.equal(chunks, got)
    own = model.generate(ids, max_new_tokens=60, do_sample=False, cache=DynamicCache())
    assert torch.equal(own, got)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_beams(kind):
    model, ids = make(), tokens(2, 20)
    longspan.hf.extend_context(model, "linear", 2, **KINDS[kind])
    check_beams(model, ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@torch.no_grad()
def test_left_padding(family, kind):
    model = make(family)
    longspan.hf.extend_context(model, "yarn", 2, **KINDS[kind])
    ids, mask, alone = padded([50, 2, 31, 14])
    together = model.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=False)
    for row, one in enumerate(alone):
        got = model.generate(one, max_new_tokens=25, do_sample=False)[0, one.shape[1] :]
        assert torch.equal(together[row, 50:], got), row
    # Forwards that are handed a mask and no positions count without padding too.
    together, cache = [], None
    for begin, end in ((0, 20), (20, 49), (49, 50)):
        out = model(ids[:, begin:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        together.append(out.logits)
        cache = out.cache
    together = torch.cat(together, 1)
    for row, one in enumerate(alone):
        expected = model(one, use_cache=False).logits[0]
        torch.testing.assert_close(together[row, 50 - len(expected) :], expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_copies_selections_and_repetitions(kind):
    model, ids = make(), tokens(3, 40)
    longspan.hf.extend_context(model, "yarn", 2, **KINDS[kind])
    more = tokens(3, 30)
    cache = model(ids, use_cache=True).cache
    branch = copy.deepcopy(cache)
    expected, _ = in_parts(model, torch.cat([ids, more], 1), [40, 30])
    got = model(more, cache=cache).logits
    torch.testing.assert_close(got, expected[:, 40:], **CLOSE)
    branch.batch_select_indices(torch.tensor([2, 0]))
    branch.batch_repeat_interleave(2)
    branch.reorder_cache(torch.tensor([3, 2, 1, 0]))
    rows = torch.tensor([0, 0, 2, 2])
    torch.testing.assert_close(model(more[rows], cache=branch).logits, expected[rows, 40:], **CLOSE)
    branch.reset()
    assert branch.get_seq_length() == 0
    torch.testing.assert_close(model(ids, cache=branch).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("kind", ["full", "unrotated"])
@torch.no_grad()
def test_cropped(kind):
    model, ids = make(), tokens(2, 50)
    longspan.hf.extend_context(model, "dynamic", 2, **KINDS[kind])
    cache = model(ids, use_cache=True).cache
    cache.crop(-20)
    got = model(ids[:, 30:40], cache=cache).logits
    torch.testing.assert_close(got, model(ids[:, :40]).logits[:, 30:], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_modes_of_autograd_may_change_between_forwards(kind):
    model, ids = make(), tokens(1, 60)
    longspan.hf.extend_context(model, "yarn", 2, **KINDS[kind])
    expected = model(ids, use_cache=False).logits.detach()
    with torch.inference_mode():
        out = model(ids[:, :20], use_cache=True)
        out = model(ids[:, 20:30], cache=out.cache)
    with torch.no_grad():
        out = model(ids[:, 30:40], cache=out.cache)
    torch.testing.assert_close(out.logits, expected[:, 30:40], **CLOSE)
    out = model(ids[:, 40:50], cache=out.cache)
    out.logits.sum().backward()  # what later forwards write leaves what it needs as it was
    with torch.inference_mode():
        out = model(ids[:, 50:], cache=out.cache)
    torch.testing.assert_close(out.logits, expected[:, 50:], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients(kind, use_cache):
    """Those of transformers' own model with the same frequencies, where the window is the text."""
    model, ids = make(), tokens(2, 50)
    extended = longspan.hf.extend_context(model, "yarn", 2, attention="sdpa")
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    extended.undo()
    model.zero_grad()
    options = {**KINDS[kind], "window": 50 if kind == "window" else None}
    longspan.hf.extend_context(model, "yarn", 2, **options)
    if use_cache:  # of a prompt that is not learnt from
        model(ids, labels=ids, use_cache=True).loss.backward()
    else:
        model.gradient_checkpointing_enable()
        model.train()(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bfloat16_is_as_near_as_transformers_own(kind):
    model, ids = make(dtype=torch.float32), tokens(1, 80)
    extended = longspan.hf.extend_context(model, "yarn", 2, **KINDS[kind])
    exact = model(ids).logits
    model.bfloat16()
    got, _ = in_parts(model, ids, [50, 1, 29])
    error = (got.float() - exact).abs().mean()
    if kind == "window":
        extended.undo()
        model.float()
        extended = longspan.hf.extend_context(model, "yarn", 2)
        exact = model(ids).logits
        model.bfloat16()
    extended.undo()
    longspan.hf.extend_context(model, "yarn", 2, attention="sdpa")
    theirs = (model(ids).logits.float() - exact).abs().mean()
    assert error < 2 * theirs


# ---- frequencies that change


@pytest.mark.parametrize("name", GROWING)
@torch.no_grad()
def test_unrotated_keys_make_a_step_what_it_is_in_one_pass(name):
    """Of one layer, whose keys hang on tokens alone: at every length across the trained one."""
    model, ids = make(num_hidden_layers=1), tokens(1, TRAINED + 20)
    gaps = {}
    for kind in ("unrotated", "full"):
        with longspan.hf.extend_context(model, **GROWING[name], **KINDS[kind]):
            one_pass = [model(ids[:, : n + 1]).logits[:, -1] for n in range(50, ids.shape[1])]
            got, _ = in_parts(model, ids, [50] + [1] * (ids.shape[1] - 50))
            gaps[kind] = (got[:, 50:] - torch.stack(one_pass, 1)).abs().max()
            prompt = model.generate(ids[:, :50], max_new_tokens=30, do_sample=False)
            if kind == "unrotated":
                for n in range(50, 80):
                    assert prompt[0, n] == model(prompt[:, :n]).logits[0, -1].argmax()
    assert gaps["unrotated"] < 3e-5
    assert gaps["full"] > 1e-2


@pytest.mark.parametrize("name", GROWING)
@torch.no_grad()
def test_deeper_layers_attend_with_the_frequencies_of_each_token_s_length(name):
    model, ids = make(), tokens(1, TRAINED + 16)
    extended = longspan.hf.extend_context(model, **GROWING[name], cache="unrotated")
    expected = reference_logits(model.state_dict(), model.config, ids[0], growing(extended.settings))
    got, _ = in_parts(model, ids, [1] * ids.shape[1])
    torch.testing.assert_close(got[0], expected.float(), **CLOSE)


@torch.no_grad()
def test_keys_are_rotated_again_only_when_frequencies_change(monkeypatch):
    turned = []
    model, ids = make(num_hidden_layers=1), tokens(1, TRAINED + 6)
    longspan.hf.extend_context(model, **GROWING["longrope"], cache="unrotated")
    _, cache = in_parts(model, ids[:, :60], [60])
    rotate = longspan.hf.extended_forward.Pass.rotate

    def counted(self, x, positions):
        turned.append(x.shape[2])
        return rotate(self, x, positions)

    monkeypatch.setattr(longspan.hf.extended_forward.Pass, "rotate", counted)
    for t in range(60, TRAINED + 6):
        model(ids[:, t : t + 1], cache=cache)
    keys = turned[::2]  # before each query
    assert keys == [1, 1, 1, 1, TRAINED + 1, 1, 1, 1, 1, 1]


# ---- the window


@pytest.mark.parametrize(("window", "sinks"), [(12, 3), (1, 4), (7, 0), (1, 0), (200, 4)])
@torch.no_grad()
def test_the_window_is_streaming_llm_s(window, sinks):
    model, ids = make(), tokens(1, 60)
    extended = longspan.hf.extend_context(
        model, "yarn", 2, cache="window", window=window, sink_tokens=sinks
    )
    see = streaming(extended.settings, window, sinks)
    expected = reference_logits(model.state_dict(), model.config, ids[0], see).float()
    torch.testing.assert_close(model(ids, use_cache=False).logits[0], expected, **CLOSE)
    for parts in ([60], [1] * 60, [2, 1, 20, 30, 1, 6], [59, 1]):
        got, _ = in_parts(model, ids, parts)
        torch.testing.assert_close(got[0], expected, **CLOSE)


def held(cache):
    """Bytes of all memory that the cache's tensors hold on to."""
    found = {}
    for layer in cache.layers:
        rows = [x for tail in layer._tails for x in (tail.rows, tail._memory) if x is not None]
        for x in rows + layer._sinks:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(found.values())


@torch.no_grad()
def test_the_window_s_memory_does_not_grow():
    model = make()
    longspan.hf.extend_context(model, None, **KINDS["window"])
    cache, most = None, []
    for length in (30, 1, 1, 500, *[1] * 200, 7, 9, 3000, 1):
        cache = model(tokens(1, length), cache=cache, use_cache=True).cache
        most.append(held(cache))
    token = 2 * 2 * 8 * 4 * 2  # keys and values of 2 heads, in 2 layers
    assert max(most) <= (5 * WINDOW + 64 + SINKS) * token
    assert cache.layers[0].keys.shape[2] == WINDOW - 1
    assert cache.get_seq_length() == sum((30, 1, 1, 500, 200, 7, 9, 3000, 1))


@torch.no_grad()
def test_the_window_far_into_a_text():
    """What it computes hangs on what it holds, not on how many tokens came before."""
    model, ids = make(num_hidden_layers=1), tokens(1, 60)
    longspan.hf.extend_context(model, None, **KINDS["window"])
    _, cache = in_parts(model, ids, [60])
    expected = model(ids[:, :20], cache=copy.deepcopy(cache)).logits
    beginning = ids[:, :SINKS]
    many = torch.cat([beginning, tokens(1, 5000), ids[:, -WINDOW:]], 1)
    _, cache = in_parts(model, many, [100, 4000, many.shape[1] - 4100])
    torch.testing.assert_close(model(ids[:, :20], cache=cache).logits, expected, atol=2e-4, rtol=2e-4)


def test_the_window_refuses_what_it_cannot_do():
    model, ids = make(), tokens(2, 30)
    longspan.hf.extend_context(model, None, **KINDS["window"])
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with pytest.raises(ValueError, match="attention_mask: expected, with a window cache, padding on"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask: expected, with a window cache, one of"):
        model(ids, attention_mask=torch.ones(2, 1, 30, 30))
    with pytest.raises(ValueError, match="position_ids: expected, with a window cache, positions that"):
        model(ids, position_ids=torch.arange(1, 31)[None])
    cache = model(ids, use_cache=True).cache
    with pytest.raises(RuntimeError, match="tokens_to_remove: expected 0"):
        cache.crop(-1)
    mask = torch.ones(2, 31, dtype=torch.int64)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="expected the padding that the cache's first tokens had"):
        model(ids[:, :1], attention_mask=mask, cache=cache)
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(ids, output_attentions=True)


# ---- whose cache


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_serves_the_model_that_filled_it_alone(kind):
    model, ids = make(), tokens(1, 20)
    before = model(ids, use_cache=True).cache
    extended = longspan.hf.extend_context(model, "linear", 2, **KINDS[kind])
    with pytest.raises(ValueError, match="cache: expected one that this extended model filled"):
        model(ids, cache=before)
    cache = model(ids, use_cache=True).cache
    made = extended.new_cache()
    extended.undo()
    for stale in (cache, made):
        with pytest.raises(RuntimeError, match="before its undo"):
            model(ids, cache=stale)
    longspan.hf.extend_context(model, "linear", 2, **KINDS[kind])
    with pytest.raises(ValueError, match="cache: expected one that this extended model filled"):
        model(ids, cache=cache)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, cache=DynamicCache()).logits, expected, **CLOSE)


@torch.no_grad()
def test_caches_of_transformers():
    model, ids = make(), tokens(1, 30)
    extended = longspan.hf.extend_context(model, "linear", 2)
    static = StaticCache(config=model.config, max_cache_len=64)
    expected = model(ids).logits
    torch.testing.assert_close(model(ids[:, :20], cache=static).logits, expected[:, :20], **CLOSE)
    torch.testing.assert_close(model(ids[:, 20:], cache=static).logits, expected[:, 20:], **CLOSE)
    assert type(model(ids, cache=DynamicCache()).cache.layers[0]).__name__ == "GrowingLayer"
    extended.undo()
    longspan.hf.extend_context(model, "linear", 2, cache="unrotated")
    with pytest.raises(ValueError, match="expected None, an empty DynamicCache or what new_cache"):
        model(ids, cache=StaticCache(config=model.config, max_cache_len=64))


@torch.no_grad()
def test_sliding_layers_of_a_model_stay():
    model, ids = make("mistral", sliding_window=24), tokens(1, 90)
    expected = {}
    for kind in ("full", "unrotated"):
        with longspan.hf.extend_context(model, "yarn", 2, **KINDS[kind]):
            expected[kind] = model(ids, use_cache=False).logits
            got, cache = in_parts(model, ids, [50, 1, 1, 38])
            torch.testing.assert_close(got, expected[kind], **CLOSE)
            if kind == "full":
                assert cache.layers[0].keys.shape[2] == 23
    torch.testing.assert_close(expected["full"], expected["unrotated"], **CLOSE)


def test_another_attention_is_noticed():
    model, ids = make(), tokens(1, 20)
    longspan.hf.extend_context(model, "linear", 2, cache="unrotated", attention="sdpa")
    model(ids)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation: expected sdpa_unrotated"):
        model(ids)
