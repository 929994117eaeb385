"""Small random Longformer, LED, BigBird and BigBirdPegasus models: every class with their layer."""

import torch
import transformers
from hf_models import VOCABULARY, tokens
from torch.utils._python_dispatch import TorchDispatchMode

WINDOWS = [32, 16]
BLOCK, RANDOM = 16, 2
SHORT = (5 + 2 * RANDOM) * BLOCK  # BigBird's transformers layer goes over to full attention up to here

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
    "sep_token_id": 2,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def _config(kind):
    if kind.startswith("Longformer"):
        return transformers.LongformerConfig(
            **_SIZES, max_position_embeddings=600, attention_window=list(WINDOWS)
        )
    if kind.startswith("LED"):
        return transformers.LEDConfig(
            **_SEQ2SEQ, max_encoder_position_embeddings=600, max_decoder_position_embeddings=600,
            attention_window=list(WINDOWS),
        )  # fmt: skip
    sparse = {"block_size": BLOCK, "num_random_blocks": RANDOM, "max_position_embeddings": 4096}
    if kind.startswith("BigBirdPegasus"):
        return transformers.BigBirdPegasusConfig(**_SEQ2SEQ, **sparse)
    return transformers.BigBirdConfig(**_SIZES, **sparse)


_HEADS = ["ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification",
          "ForMultipleChoice"]  # fmt: skip
LONGFORMER = ["LongformerModel", *(f"Longformer{head}" for head in _HEADS)]
LONGFORMER += ["LEDForConditionalGeneration", "LEDForQuestionAnswering"]
BIGBIRD = ["BigBirdModel", "BigBirdForPreTraining", *(f"BigBird{head}" for head in _HEADS)]
BIGBIRD += [f"BigBirdPegasusFor{head}" for head in
            ("ConditionalGeneration", "SequenceClassification", "QuestionAnswering")]  # fmt: skip


def make(kind, dtype=torch.float32, **changes):
    """Its weights are large enough that attention is far from uniform."""
    torch.manual_seed(1)
    config = _config(kind)
    for key, value in changes.items():
        setattr(config, key, value)
    model = getattr(transformers, kind)(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def inputs(kind, length, lengths, global_tokens=None):
    """Keywords of a call: ids, padding on the right, labels or what else the class asks for.

    Args:
        lengths: Tokens of each row that are no padding.
        global_tokens: For each row which are global; None leaves the mask out.
    """
    batch = len(lengths)
    ids = tokens(batch, length)
    ids[ids == 2] = 3
    ids[:, -1] = 2  # one end of sequence each, as classifiers of encoder-decoders want it
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    found = {"input_ids": ids, "attention_mask": mask}
    if global_tokens is not None:
        found["global_attention_mask"] = torch.zeros_like(ids)
        for row, where in zip(found["global_attention_mask"], global_tokens):
            row[where] = 1
    if kind.endswith("MultipleChoice"):
        found = {name: x.unsqueeze(1).repeat(1, 2, 1) for name, x in found.items()}
        found["input_ids"][:, 1] = tokens(batch, length)
        found["labels"] = torch.arange(batch) % 2
    elif kind.endswith("QuestionAnswering"):
        found |= {"start_positions": torch.arange(batch) + 3, "end_positions": torch.arange(batch) + 7}
    elif kind.endswith("SequenceClassification"):
        found["labels"] = torch.arange(batch) % 2
    elif kind.endswith("ConditionalGeneration"):
        found["labels"] = tokens(batch, 9)
    elif kind.endswith("TokenClassification"):
        found["labels"] = (ids % 2).masked_fill(mask == 0, -100)
    elif kind.endswith(("MaskedLM", "PreTraining")):
        found["labels"] = ids.masked_fill(mask == 0, -100)
    if kind.endswith("PreTraining"):
        found["next_sentence_label"] = torch.arange(batch) % 2
    return found


def run(model, **kwargs):
    """Every floating output by name, and the gradient of each parameter that has one."""
    model.zero_grad()
    out = model(**kwargs)
    found = {n: x for n, x in out.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    loss = out.get("loss")
    if loss is None:  # of a model without a head
        x = found["last_hidden_state"].float()
        loss = (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {n: x.detach() for n, x in found.items()}, grads


class Operators(TorchDispatchMode):
    """Counts our attention over blocks."""

    def __init__(self):
        super().__init__()
        self.sparse = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.sparse += func._schema.name == "longspan::block_sparse_attention_forward"
        return func(*args, **(kwargs or {}))


def sparse_calls(model, **kwargs):
    """How often a forward attends by blocks."""
    with torch.no_grad(), Operators() as operators:
        model(**kwargs)
    return operators.sparse
