"""Losses of tokens, for whoever judges a language model."""

import torch
from torch import Tensor


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each of ``targets`` (T,) under ``logits`` (T, vocabulary), float64.

    In slices of 128 tokens, so that not all the logits exist in float32 at once.
    """
    parts = [
        torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
        for part, target in zip(logits.split(128), targets.split(128))
    ]
    return torch.cat(parts).double()
