"""What a training loop needs beside torch: which weights decay, and the learning rate's course."""

import math
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort a model's parameters into those that decay and those that do not, for torch.optim.

    Weights of projections and embeddings decay. Biases, norms and other parameters of fewer than two
    dimensions do not, nor what is marked ``_no_weight_decay``: Mamba's A_log and D.

    Args:
        model: Any module.
        weight_decay: Of the first group; the second has 0.

    Returns:
        Two groups, the first of them the one that decays.

    Raises:
        ValueError: ``weight_decay`` is negative.

    Example::

        torch.optim.AdamW(longspan.models.parameter_groups(model, 0.1), lr=3e-3)
    """
    if weight_decay < 0:
        raise ValueError(f"parameter_groups: weight_decay: expected 0 or more, got {weight_decay}")
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            marked = getattr(parameter, "_no_weight_decay", False)
            (kept if marked or parameter.dim() < 2 else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def cosine_with_warmup(step: int, steps: int, *, warmup: int, least: float = 0.1) -> float:
    """The factor of the learning rate at ``step`` of ``steps``, from 0 on.

    A straight line from 1 / warmup up to 1 over ``warmup`` steps, then half a cosine down to ``least``
    at the last step (Loshchilov and Hutter 2017).

    Example::

        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * longspan.models.cosine_with_warmup(step, 1000, warmup=50)
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return least + (1 - least) * (1 + math.cos(math.pi * min(1.0, done))) / 2
