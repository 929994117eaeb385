"""The training of a language model on a text: options, steps, and the state that resumes them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan._files import write_atomically
from longspan.cli._corpus import Corpus
from longspan.cli._errors import CommandError
from longspan.cli._model import DTYPES
from longspan.models import (
    LanguageModel,
    LanguageModelConfig,
    cosine_with_warmup,
    parameter_groups,
)

_BETAS = (0.9, 0.95)
_GREATEST_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainingOptions:
    """A run's options, as ``longspan train`` names them; None is not decided yet."""

    model: str = "mamba"
    mixer: Mapping[str, Any] = field(default_factory=dict)
    layers: int = 4
    width: int = 256
    text: str | None = None
    tokenizer: str = "bytes"
    length: int = 1024
    batch: int | None = None
    steps: int = 600
    lr: float = 3e-3
    weight_decay: float = 0.1
    dtype: str = "float32"
    seed: int = 0
    eval_every: int = 50
    checkpoint_every: int = 50
    threads: int | None = None

    def check(self) -> None:
        """Raise CommandError where a value is out of range."""
        for label in ("layers", "width", "batch", "steps", "eval_every", "checkpoint_every"):
            value = getattr(self, label)
            if value < 1:
                raise CommandError(f"--{label.replace('_', '-')}: expected 1 or more, got {value}")
        if self.length < 2:
            raise CommandError(f"--length: expected 2 tokens or more, got {self.length}")
        if not 0 < self.lr < math.inf:
            raise CommandError(f"--lr: expected above 0, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise CommandError(f"--weight-decay: expected 0 or more, got {self.weight_decay}")
        if not 0 <= self.seed < 2**63:
            raise CommandError(f"--seed: expected 0 to 2^63 - 1, got {self.seed}")


class Trainer:
    """A model, its optimizer, and where in the text and in the schedule they are.

    Windows of ``length`` tokens are drawn from anywhere in the training text. All that a next step
    depends on is in `save`'s file: a run that goes on from it computes the bits of one that never
    stopped, on the same machine with the same number of threads.

    Args:
        options: Checked.
        corpus: What to train on.

    Attributes:
        step: Steps done.

    Raises:
        CommandError: The text is shorter than a window, or the family does not take the options.
    """

    def __init__(self, options: TrainingOptions, corpus: Corpus) -> None:
        """Make the model, seeded."""
        if len(corpus.training) < options.length:
            raise CommandError(
                f"--length: expected no more than the training text's {len(corpus.training)} tokens, "
                f"got {options.length}"
            )
        self.options, self.corpus, self.step = options, corpus, 0
        torch.manual_seed(options.seed)
        try:
            config = LanguageModelConfig(
                vocab_size=corpus.vocab_size,
                d_model=options.width,
                n_layer=options.layers,
                family=options.model,
                mixer=options.mixer,
            )
            self.model = LanguageModel(config)
        except (TypeError, ValueError) as error:
            raise CommandError(f"--model, --width or --mixer: {error}") from error
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, options.weight_decay), lr=options.lr, betas=_BETAS, fused=True
        )
        self.windows = torch.Generator().manual_seed(options.seed)

    @property
    def tokens_a_step(self) -> int:
        """Tokens that a step reads."""
        assert self.options.batch is not None
        return self.options.batch * self.options.length

    def train_step(self) -> dict[str, float]:
        """Do one step -> its loss, learning rate and gradient norm.

        Raises:
            FloatingPointError: The loss or its gradient is not finite; weights stay as they were.
        """
        options = self.options
        warmup = max(1, options.steps // 20)
        rate = options.lr * cosine_with_warmup(self.step, options.steps, warmup=warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        loss = self._loss(self._next_windows())
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), _GREATEST_GRADIENT_NORM)
        for label, value in (("loss", loss), ("gradient's norm", norm)):
            if not value.isfinite():
                raise FloatingPointError(f"the {label} of step {self.step + 1} is {value.item()}")
        self.optimizer.step()
        self.step += 1
        return {"loss": loss.item(), "learning_rate": rate, "gradient_norm": norm.item()}

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss on ``corpus.held_out[1:]``, read in windows that know nothing earlier."""
        self.model.eval()  # a Performer, for one, draws directions in training
        total = 0.0
        for batch in self._held_out_batches():
            total += self._loss(batch).item() * batch.shape[0] * (batch.shape[1] - 1)
        return total / (len(self.corpus.held_out) - 1)

    def sample(self, prompt_tokens: int, new_tokens: int) -> tuple[str, str]:
        """The beginning of the held-out text, and how the model goes on from there."""
        self.model.eval()
        prompt = self.corpus.held_out[None, :prompt_tokens]
        with self._autocast():
            tokens = self.model.generate(prompt, new_tokens, temperature=0.8, top_p=0.95, seed=0)
        new = tokens[0, prompt.shape[1] :]
        return self.corpus.decode(prompt[0].tolist()), self.corpus.decode(new.tolist())

    def save(self, path: Path) -> None:
        """Write all that the next step depends on, whole or not at all."""
        state = {
            "options": asdict(self.options),
            "fingerprint": self.corpus.fingerprint,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "windows": self.windows.get_state(),
            "rng": torch.get_rng_state(),
        }
        write_atomically(path, lambda temporary: torch.save(state, temporary))

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `read_checkpoint` gave.

        Raises:
            CommandError: It was another text.
        """
        if state["fingerprint"] != self.corpus.fingerprint:
            raise CommandError("--text: expected the text that the run began with, got another one")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.windows.set_state(state["windows"])
        torch.set_rng_state(state["rng"])

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES[self.options.dtype]
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    def _loss(self, windows: Tensor) -> Tensor:
        with self._autocast():
            loss = self.model(windows, labels=windows).loss
        return loss

    def _next_windows(self) -> Tensor:
        """(batch, length) tokens from anywhere in the training text."""
        text, length, batch = self.corpus.training, self.options.length, self.options.batch
        assert batch is not None
        begin = torch.randint(len(text) - length + 1, (batch, 1), generator=self.windows)
        return text[begin + torch.arange(length)]

    def _held_out_batches(self) -> Iterator[Tensor]:
        """Windows that overlap by a token, so that each token but the first is predicted once."""
        text, length = self.corpus.held_out, self.options.length
        if len(text) >= length:
            whole = text.unfold(0, length, length - 1)
            yield from whole.split(self.options.batch)
            text = text[len(whole) * (length - 1) :]
        if len(text) > 1:
            yield text[None]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `Trainer.save` wrote.

    Raises:
        CommandError: There is no such file, or it is not whole.
    """
    if not path.is_file():
        raise CommandError(f"--resume: expected a run in --out, got {path.parent}, with no {path.name}")
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises whatever its reader stumbles over
        raise CommandError(f"--resume: {path} cannot be read ({error})") from error
    if not isinstance(state, dict) or "fingerprint" not in state:
        raise CommandError(f"--resume: expected a checkpoint of longspan train, got {path}")
    return state
