"""What commands share that compare scaling methods: their names, factors files, runs that go on."""

import argparse
import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import longspan
from longspan import rope
from longspan._files import write_json
from longspan.cli._errors import CommandError
from longspan.cli._model import parse_length
from longspan.rope.frequencies import takes_factor

# Methods that `longspan rope search` finds: LongRoPE's factors, or whatever the file has.
_FROM_FILE = ("longrope", "searched")
_SINKS = 4  # first tokens that the method "window" keeps: StreamingLLM's default


@dataclass(frozen=True)
class Method:
    """A scaling method as ``--methods`` names it.

    Attributes:
        name: One of `longspan.rope.METHODS`, "none" for the model as it was trained, "searched" for
            what the factors file has, or "window": no scaling, but first tokens and as many of the last
            as the trained length has room for (StreamingLLM).
        factor: What follows the ``@``; None is the length over the trained one, 1 or more.
    """

    name: str
    factor: float | None = None

    def __str__(self) -> str:
        """As it was given."""
        return self.name if self.factor is None else f"{self.name}@{self.factor:g}"

    def extend(self, model: Any, length: int, trained: int, factors: Any, attention: str) -> Any:
        """Have ``model`` read ``length`` tokens with this method; to be undone, as a context.

        Args:
            model: Trained to ``trained`` tokens.
            length: Tokens.
            trained: Tokens.
            factors: A ``rope_parameters`` dictionary for longrope and searched.
            attention: The implementation.
        """
        from longspan.hf import extend_context

        if self.name == "none":
            return extend_context(model, None, attention=attention)
        if self.name == "window":
            window = trained - _SINKS
            return extend_context(
                model, None, attention=attention, cache="window", window=window, sink_tokens=_SINKS
            )
        if self.name in _FROM_FILE:
            return extend_context(model, factors, attention=attention)
        factor = max(1.0, length / trained) if self.factor is None else self.factor
        return extend_context(
            model, self.name, factor if takes_factor(self.name) else None, attention=attention
        )


def parse_methods(text: str) -> list[Method]:
    """Turn ``"none,dynamic,yarn@2"`` into methods.

    Raises:
        argparse.ArgumentTypeError: One is not known, has a factor and must not, or comes twice.
    """
    without = ("llama3", "default")  # one has options of its own, the other is "none"
    names = ("none", *(name for name in rope.METHODS if name not in without), "searched", "window")
    found: list[Method] = []
    for part in text.split(","):
        name, at, number = part.strip().partition("@")
        if name not in names:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(names)}, got {part!r}")
        factor = None
        if at:
            try:
                factor = float(number)
            except ValueError:
                factor = 0.0
            if factor < 1 or name in _FROM_FILE or not takes_factor(name):
                raise argparse.ArgumentTypeError(
                    f"expected a method that takes a factor, of 1 or more, after @, got {part!r}"
                )
        found.append(Method(name, factor))
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected each once, got {text!r}")
    return found


def add_scaling_arguments(parser: argparse.ArgumentParser, lengths: list[int]) -> None:
    """Add ``--methods``, ``--factors``, ``--lengths`` and ``--attention``."""
    parser.add_argument(
        "--methods",
        type=parse_methods,
        metavar="NAME[@FACTOR],...",
        help="scaling methods; a factor is how many times longer than the trained length, by default "
        "what each length needs; default: none,linear,dynamic,yarn, and that of --factors",
    )
    parser.add_argument(
        "--factors",
        type=Path,
        metavar="FILE",
        help="rope_parameters for the methods longrope and searched, of `longspan rope search`",
    )
    parser.add_argument(
        "--lengths",
        type=lambda text: sorted({parse_length(part) for part in text.split(",")}),
        default=lengths,
        metavar="N,N,...",
        help="how many tokens to read; default: "
        + ",".join(f"{n // 1024}k" if n % 1024 == 0 else f"{n}" for n in lengths),
    )
    parser.add_argument(
        "--attention", choices=["longspan", "sdpa"], default="longspan", help="default: longspan"
    )


def read_methods(args: argparse.Namespace) -> tuple[list[Method], Any]:
    """The methods to compare, and the ``rope_parameters`` of ``--factors``, or None.

    Raises:
        CommandError: The file is none, or it and the methods do not fit together.
    """
    parameters = None if args.factors is None else read_parameters(args.factors, "--factors")
    methods = args.methods
    if methods is None:
        names = ["none", "linear", "dynamic", "yarn"]
        if parameters is not None:
            names.append("longrope" if parameters["rope_type"] == "longrope" else "searched")
        methods = [Method(name) for name in names]
    from_file = [method.name for method in methods if method.name in _FROM_FILE]
    if bool(from_file) != (parameters is not None):
        got = "none" if parameters is None else f"{args.factors} and neither of them"
        raise CommandError(
            f"--factors: expected a file just where --methods has longrope or searched, got {got}"
        )
    if parameters is not None and "longrope" in from_file and parameters["rope_type"] != "longrope":
        raise CommandError(
            f"--factors: expected rope_type longrope for --methods longrope, got "
            f"{parameters['rope_type']!r}; the method searched takes it"
        )
    return methods, parameters


def read_parameters(path: Path, option: str) -> dict[str, Any]:
    """A file of ``rope_parameters``.

    Raises:
        CommandError: It is none.
    """
    try:
        parameters = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"{option}: expected a JSON file, got {path} ({error})") from error
    if not isinstance(parameters, dict) or "rope_type" not in parameters:
        raise CommandError(f"{option}: expected rope_parameters with a rope_type, got {path}")
    return parameters


def trained_length(model: Any) -> int:
    """The length that a model was trained for, by its configuration."""
    original = getattr(model.config, "original_max_position_embeddings", None)
    return model.config.max_position_embeddings if original is None else original


def check_methods(
    model: Any, methods: list[Method], lengths: list[int], parameters: Any, attention: str
) -> None:
    """Try every method on the model, before anything is computed.

    Raises:
        CommandError: One does not fit.
    """
    trained = trained_length(model)
    for length in lengths:
        for method in methods:
            try:
                method.extend(model, length, trained, parameters, attention).undo()
            except (TypeError, ValueError) as error:
                raise CommandError(f"--methods: {method}: {error}") from error


def make_folder(path: Path) -> None:
    """Make ``--out``.

    Raises:
        CommandError: It cannot be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out: expected a folder, got {path} ({error})") from error


def facts(args: argparse.Namespace, label: str, threads: int) -> dict[str, Any]:
    """What a report says about the machine and the model, and what does not change a result."""
    return {
        "model": label,
        "dtype": args.dtype,
        "threads": threads,
        "torch": torch.__version__,
        "longspan": longspan.__version__,
        "isa": longspan.isa(),
    }


class Report:
    """A JSON file of settings and rows, written anew with each row, from which a run goes on.

    Args:
        path: Of the file.
        settings: What rows hang on; a file with others is an error.
        facts: What else to say.

    Raises:
        CommandError: The file has rows of other settings, or is no report.
    """

    def __init__(self, path: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        """Read the rows that are there."""
        self.path, self.rows = path, list[dict[str, Any]]()
        self.content: dict[str, Any] = {**facts, "settings": settings, "rows": self.rows}
        if not path.exists():
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            theirs, rows = before["settings"], before["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(f"--out: expected {path} to be a report of this command") from error
        ours = json.loads(json.dumps(settings))
        for name in ours.keys() | theirs.keys():
            if ours.get(name) != theirs.get(name):
                raise CommandError(
                    f"--out: expected {path} to be of the same run, or another folder; its {name} is "
                    f"{theirs.get(name)!r}, here {ours.get(name)!r}"
                )
        self.rows.extend(rows)

    def find(self, **values: Any) -> dict[str, Any] | None:
        """The row that has these values."""
        return next((r for r in self.rows if all(r.get(k) == v for k, v in values.items())), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Add a row and write the file."""
        self.rows.append(row)
        self.write()
        return row

    def write(self, **more: Any) -> None:
        """Write the file, with ``more`` in it from now on."""
        self.content.update(more)
        write_json(self.path, self.content)


def progress(total: int, done: int, unit: str) -> Any:
    """A bar on stderr for the rows of a run."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit=unit, leave=False) if total > done else nullcontext()


def print_line(cells: Iterable[str], widths: Iterable[int]) -> None:
    """Print a line of a table, past a bar that may be there."""
    from tqdm import tqdm

    tqdm.write("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
