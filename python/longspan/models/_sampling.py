"""The choice of a next token among logits."""

import torch
from torch import Tensor


class Sampler:
    """Takes the likeliest token, or draws one; arguments as `LanguageModel.generate` has them."""

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float,
        seed: int | None,
        generator: torch.Generator | None,
        device: torch.device,
    ) -> None:
        """Check the values."""
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"generate: temperature: expected 0 or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k: expected 1 or more, got {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"generate: top_p: expected above 0, up to 1, got {top_p}")
        if seed is not None and generator is not None:
            raise ValueError("generate: seed and generator: expected one of them")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        if seed is not None:
            generator = torch.Generator(device).manual_seed(seed)
        self.generator = generator

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose from logits (B, vocabulary): (B,) int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        # Shifted first: a small temperature then overflows to minus infinity only, never to NaN.
        logits = logits.double() - logits.double().amax(-1, keepdim=True)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            # A token stays where those before it have less than top_p together: the first always.
            enough = ordered.cumsum(-1) - ordered >= self.top_p
            probabilities = probabilities.scatter(-1, order, ordered.masked_fill(enough, 0))
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
