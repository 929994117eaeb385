"""Ask a model for a number that is hidden in a long text, by depth, length and scaling method of RoPE.

Passkey retrieval (Mohtashami and Jaggi 2023): a sentence with five random digits stands at some depth of
a text that says nothing, and the model is to repeat them. A trial counts where greedy decoding gives all
of them. The text is the usual filler, or --document.

  longspan passkey --methods none,yarn,dynamic --lengths 4k,8k,16k --depths 5 --trials 4

passkey.json is written anew after each trial and passkey.png, the heat map, after each length. A run
that was stopped goes on where it was if it is started again with the same options.
"""

import argparse
import hashlib
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan._files import write_atomically
from longspan.cli._errors import CommandError, require
from longspan.cli._model import (
    DTYPES,
    PretrainedModel,
    add_model_arguments,
    read_document,
    set_threads,
)
from longspan.cli._scaling import (
    Report,
    add_scaling_arguments,
    check_methods,
    facts,
    make_folder,
    print_line,
    progress,
    read_methods,
    trained_length,
)
from longspan.cli._scoring import layer_progress

_TASK = (
    "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"
_LEAST_FILLER = 16  # tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``longspan passkey``."""
    add_model_arguments(parser, document="the usual filler about grass and sky")
    add_scaling_arguments(parser, [2048, 4096, 8192, 16384])
    parser.add_argument(
        "--depths", type=int, default=5, metavar="N", help="from the begin to the end; default: 5"
    )
    parser.add_argument(
        "--trials", type=int, default=4, metavar="N", help="a depth, each with its own key; default: 4"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the keys; default: 0")
    parser.add_argument(
        "--out", type=Path, default=Path("passkey"), metavar="FOLDER", help="default: ./passkey"
    )


def run(args: argparse.Namespace) -> int:
    """Ask; 0."""
    lengths, (methods, parameters) = args.lengths, read_methods(args)
    for name in ("depths", "trials"):
        if getattr(args, name) < 1:
            raise CommandError(f"--{name}: expected 1 or more, got {getattr(args, name)}")
    threads = set_threads(args.threads)
    filler = _FILLER if args.document is None else read_document(args.document)
    for module in ("tqdm", "matplotlib"):
        require(module, module)
    pretrained = PretrainedModel(args.model)
    make_folder(args.out)
    print(f"Reading the tokenizer of {pretrained.label} ...", file=sys.stderr)
    prompts = Prompts(pretrained.tokenizer(), filler)
    if lengths[0] < prompts.least:
        raise CommandError(
            f"--lengths: expected {prompts.least} tokens or more, which the question needs, "
            f"got {lengths[0]}"
        )
    report = Report(
        args.out / "passkey.json",
        {
            "model": pretrained.label,
            "filler": hashlib.sha256(filler.encode()).hexdigest(),
            "dtype": args.dtype,
            "attention": args.attention,
            "factors": parameters,
            "depths": args.depths,
            "trials": args.trials,
            "seed": args.seed,
        },
        {**facts(args, pretrained.label, threads), "document": args.document and str(args.document)},
    )
    depths = [i / max(args.depths - 1, 1) for i in range(args.depths)]
    places = [(depth, trial) for depth in depths for trial in range(args.trials)]

    def missing(length: int, method: Any) -> list[tuple[float, int]]:
        here = {"tokens": length, "method": str(method)}
        return [(d, t) for d, t in places if report.find(**here, depth=d, trial=t) is None]

    left = sum(len(missing(length, method)) for length in lengths for method in methods)
    total = len(lengths) * len(methods) * len(places)
    model = None
    if left:
        print(f"Loading {pretrained.label} in {args.dtype} ...", file=sys.stderr)
        model = pretrained.load(DTYPES[args.dtype])
        report.write(trained_tokens=trained_length(model))
        check_methods(model, methods, lengths, parameters, args.attention)
    widths = [7, *(max(10, len(str(method))) for method in methods)]
    print(f"Passkeys that {pretrained.label} retrieved, {args.dtype}, of {len(places)} a cell.")
    print_line(["tokens", *map(str, methods)], widths)
    with progress(total, total - left, "trial") as bar:
        for length in lengths:
            cells = [f"{length}"]
            for method in methods:
                if todo := missing(length, method):
                    trained = trained_length(model)
                    with method.extend(model, length, trained, parameters, args.attention):
                        for depth, trial in todo:
                            ids, answer = prompts.make(length, depth, _key(args.seed, depth, trial))
                            with layer_progress(model, f"{length} tokens, {method}, depth {depth:.0%}"):
                                right = retrieved(model, ids, answer)
                            row = {"tokens": length, "method": str(method), "depth": depth}
                            report.add({**row, "trial": trial, "retrieved": right})
                            bar.update()
                cells.append(f"{_share(report, length, str(method)):.0%}")
            print_line(cells, widths)
            _plot(args.out / "passkey.png", report, lengths, [str(m) for m in methods], depths)
    print(f"Wrote {args.out / 'passkey.json'} and {args.out / 'passkey.png'}.")
    return 0


def _key(seed: int, depth: float, trial: int) -> str:
    """Five digits: the same for all lengths and methods."""
    return f"{random.Random(f'{seed} {depth} {trial}').randrange(10000, 100000)}"


def _share(report: Report, length: int, method: str, depth: float | None = None) -> float:
    found = [
        row["retrieved"]
        for row in report.rows
        if row["tokens"] == length
        and row["method"] == method
        and (depth is None or row["depth"] == depth)
    ]
    return sum(found) / len(found) if found else math.nan


class Prompts:
    """Texts of so many tokens with a key in them.

    Args:
        tokenizer: Of the model.
        filler: Repeated as often as is needed.
    """

    def __init__(self, tokenizer: Any, filler: str) -> None:
        """Tokenize what does not change."""
        self._tokenizer = tokenizer
        self._task, self._question = self._tokens(_TASK), self._tokens(_QUESTION)
        self._filler = self._tokens(filler)
        if not self._filler:
            raise CommandError("--document: expected a text with tokens in it, got an empty one")
        # A key inside of a line is no sentence of its own, and a small model stumbles over it.
        self._line_ends = {i for i in set(self._filler) if tokenizer.decode([i]).endswith("\n")}

    @property
    def least(self) -> int:
        """Tokens that the shortest text needs."""
        needle = self._tokens(_NEEDLE.format(key="10000"))
        return len(self._task) + len(needle) + len(self._question) + 8 + _LEAST_FILLER

    def make(self, length: int, depth: float, key: str) -> tuple[Tensor, list[int]]:
        """A prompt and its answer, (1, length) together, and the answer's tokens.

        Args:
            length: Tokens of both.
            depth: Where in the filler the key stands, 0 at its begin, 1 at its end; between two lines.
            key: Digits.
        """
        needle = self._tokens(_NEEDLE.format(key=key))
        answer = self._tokens(f" {key}")
        filler = length - len(self._task) - len(needle) - len(self._question) - len(answer)
        copies = -(-filler // len(self._filler))
        text = self._filler * copies
        text = text[:filler] if copies == 1 else text[-filler:]  # whole lines at the end
        breaks = [0, *(i for i, token in enumerate(text, 1) if token in self._line_ends), filler]
        place = min(breaks, key=lambda i: abs(i - depth * filler))
        parts = self._task + text[:place] + needle + text[place:] + self._question + answer
        return torch.tensor([parts]), answer

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids


@torch.inference_mode()
def retrieved(model: Any, ids: Tensor, answer: list[int]) -> bool:
    """Whether greedy decoding of the prompt gives the answer that ``ids`` (1, T) end with.

    It does so just where each token of the answer is the likeliest one after those before it, so one
    pass says it.
    """
    logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
    return logits[0, :-1].argmax(-1).tolist() == answer


def _plot(
    path: Path, report: Report, lengths: list[int], methods: list[str], depths: list[float]
) -> None:
    """Depth down, length to the right, a picture a method; what was not asked stays white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    asked = [n for n in lengths if any(row["tokens"] == n for row in report.rows)]
    figure = Figure(figsize=(1.5 + 3 * len(methods), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    pictures = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    image: Any = None
    for axes, method in zip(pictures, methods):
        shares = [[_share(report, n, method, depth) for n in asked] for depth in depths]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(asked)), [f"{n}" for n in asked], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(title="as trained" if method == "none" else method, xlabel="length (tokens)")
        trained = report.content["trained_tokens"]
        if asked[0] <= trained < asked[-1]:
            beyond = sum(n <= trained for n in asked)
            axes.axvline(beyond - 0.5, color="black", linestyle=":")
    pictures[0].set_ylabel("depth of the key")
    figure.colorbar(image, ax=list(pictures), label="retrieved", format="{x:.0%}")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
