"""Feature maps of linearized attention, trained to repeat what softmax attention gives."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longspan._losses import token_losses
from longspan.hf._replace import give_back, replace_forward, replacements
from longspan.hf.linearized_attention import (
    LinearizedPass,
    exact_part,
    linear_part,
    linearized_attention,
)
from longspan.hf.linearized_forward import Linearization, projected
from longspan.ops.attention import attention

_BETAS, _WARMUP = (0.9, 0.95), 5


class Lesson:
    """What one pass of the teacher is for.

    Args:
        linearization: Of the model.
        purpose: "offset" sets each head's offset so that the linear part weighs what it should,
            "train" adds gradients, "measure" neither; the latter two take losses down.
    """

    def __init__(
        self, linearization: Linearization, purpose: Literal["offset", "train", "measure"]
    ) -> None:
        """Begin."""
        self.linearization, self.purpose = linearization, purpose
        self.losses: dict[int, float] = {}  # of the last pass
        self._step: LinearizedPass | None = None

    def step(self, q: Tensor) -> LinearizedPass:
        """Of this pass; layers share it."""
        batch, _, tokens, _ = q.shape
        if self._step is None or (self._step.batch, self._step.tokens) != (batch, tokens):
            window, sinks = self.linearization.window, self.linearization.sinks
            self._step = LinearizedPass(window, sinks, batch, tokens, device=q.device)
        return self._step


def teacher_forward(
    layer: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    *args: Any,
    lesson: Lesson,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The layer's own softmax attention, after which its feature maps have had their lesson."""
    q, k, v = projected(layer, hidden_states, position_embeddings)
    out, lse = attention(q, k, v, causal=True, scale=layer.scaling, return_lse=True)
    features, step = layer.linear_features, lesson.step(q)
    if lesson.purpose == "offset":
        _set_offset(features, q, k, v, lse, step, layer.scaling)
    else:
        training = lesson.purpose == "train"
        with torch.set_grad_enabled(training):
            guess = linearized_attention(features, q, k, v, step, None, layer.scaling)
            loss = relative_error(guess, out)
            if training:
                loss.backward()
        lesson.losses[layer.layer_idx] = loss.item()
    return layer.o_proj(out.transpose(1, 2).flatten(2)), None


def relative_error(guess: Tensor, target: Tensor) -> Tensor:
    """Squared error of (B, H, T, D) over the target's square, the mean over heads."""
    guess, target = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (guess, target))
    error = (guess - target).square().sum((0, 2, 3))
    return (error / target.square().sum((0, 2, 3)).clamp(min=1e-12)).mean()


def _set_offset(
    features: Any, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, step: LinearizedPass, scale: float
) -> None:
    """Weigh the linear part, over all queries that have one, as softmax attention weighs those tokens.

    Without it most of a short training went into finding these few numbers.
    """
    if features.offset is None:
        return
    assert step.enters is not None
    _, exact = exact_part(q, k, v, step, scale)
    _, linear, _ = linear_part(features, q, step.delayed(k), step.delayed(v), step)
    entered = step.enters[0]
    share = -torch.expm1(exact - lse)[:, :, entered]
    weight = (linear - lse)[:, :, entered].exp()
    off = share.clamp(min=1e-6).sum((0, 2)).log() - weight.sum((0, 2)).log()
    features.offset += off.nan_to_num(0, 0, 0)[:, None]


# ---- the course


@contextmanager
def taught(decoder: Any, layers: Sequence[Any], lesson: Lesson) -> Iterator[None]:
    """While this lasts, passes of the decoder alone are the teacher's."""
    before = list(replacements([decoder, *layers]))
    give_back([decoder, *layers])
    try:
        for layer in layers:
            replace_forward(layer, teacher_forward, lesson=lesson)
        with evaluating(decoder):
            yield
    finally:
        give_back(layers)
        for module, slot, found in before:
            setattr(module, slot, found)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While this lasts, all modules are in evaluation; afterwards each in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def distill(
    decoder: Any,
    layers: Sequence[Any],
    linearization: Linearization,
    tokens: Tensor,
    steps: int,
    length: int,
    batch: int,
    lr: float,
    seed: int,
    first: bool,
    progress: bool,
) -> None:
    """Train the layers' feature maps on windows from anywhere in ``tokens`` (N,).

    Each layer repeats its own softmax attention at the inputs of the unchanged model, so that one pass
    of it is a step of all of them, and no gradient goes from one to another (attention transfer, Zhang
    et al. 2024, LoLCATs).
    """
    from tqdm import tqdm

    parameters = [p for layer in layers for p in layer.linear_features.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=_BETAS)
    generator = torch.Generator().manual_seed(seed)
    device = parameters[0].device

    def windows() -> Tensor:
        begin = torch.randint(len(tokens) - length + 1, (batch, 1), generator=generator)
        return tokens[begin + torch.arange(length)].to(device)

    lesson = Lesson(linearization, "offset")
    with (
        taught(decoder, layers, lesson),
        tqdm(total=steps, desc="distilling", unit="step", disable=not progress) as bar,
        torch.no_grad(),
    ):
        if first and steps:
            decoder(windows(), use_cache=False)
        lesson.purpose = "train"
        for step in range(steps):
            warm = min(1.0, (step + 1) / _WARMUP)
            for group in optimizer.param_groups:
                group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            decoder(windows(), use_cache=False)
            optimizer.step()
            bar.set_postfix(error=f"{sum(lesson.losses.values()) / len(layers):.3f}", refresh=False)
            bar.update()
    optimizer.zero_grad()


@torch.no_grad()
def layer_errors(
    decoder: Any, layers: Sequence[Any], linearization: Linearization, tokens: Tensor, length: int
) -> dict[int, float]:
    """`relative_error` of each layer on the first window of ``tokens``."""
    lesson = Lesson(linearization, "measure")
    with taught(decoder, layers, lesson):
        decoder(tokens[None, :length].to(next(decoder.parameters()).device), use_cache=False)
    return lesson.losses


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, length: int, label: str, progress: bool) -> float:
    """Of ``tokens`` (N,) but the first, in windows of at most ``length`` that overlap by one."""
    from tqdm import tqdm

    device = next(model.parameters()).device
    begins = range(0, len(tokens) - 1, length - 1)
    bar = tqdm(begins, desc=f"perplexity {label}", unit="window", disable=not progress)
    total = 0.0
    with evaluating(model):
        for begin in bar:
            window = tokens[begin : begin + length].to(device)
            logits = model(window[None], use_cache=False).logits[0, :-1]
            total += token_losses(logits, window[1:]).sum().item()
    return math.exp(total / (len(tokens) - 1))
