"""What commands share that score a text with a model: losses, a bar of layers, ticks of a plot."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longspan._losses import token_losses

# PEERS' protocol and the default of what is scored: tokens 60000 to 61023 of the default document.
END, SCORED_AT_MOST = 61024, 1024


@torch.inference_mode()
def last_losses(model: Any, tokens: Tensor, scored: int) -> Tensor:
    """Losses of the last ``scored`` of ``tokens`` (1, T) in one pass over all of them, float64."""
    logits = model(tokens, use_cache=False, logits_to_keep=scored + 1).logits
    return token_losses(logits[0, :-1], tokens[0, -scored:])


@contextmanager
def layer_progress(model: Any, label: str) -> Iterator[None]:
    """A bar on stderr that moves on with each of the model's layers, and goes when they are done."""
    from tqdm import tqdm

    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len, default=())
    with tqdm(total=len(layers), desc=label, unit="layer", leave=False) as bar:

        def layer_is_done(*_: Any) -> None:  # what a hook returns would replace the layer's output
            bar.update()

        hooks = [layer.register_forward_hook(layer_is_done) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def plain_log_ticks() -> Any:
    """Ticks at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 2.0, 5.0))
