"""Find the scaling of RoPE that suits a model and a text, beyond the length it was trained for.

  longspan rope search --length 16k --out factors
  longspan perplexity --methods none,yarn,longrope --factors factors/rope_parameters.json

`search` looks for LongRoPE's factors by evolution (Ding et al. 2024): one a pair of channels, none less
than the one before it, and the factor of cosine and sine. It begins with YaRN, NTK and position
interpolation, so that on its own tokens it ends no worse than these. With --simple it tries a grid over
YaRN's factor and temperature instead.

Up to the trained length nothing changes: short_factor and short_mscale are 1.

A search is best begun where another one ended: with --start, such as at what --simple found, or at what
was found for half the length.

The loss is that of the last --scored tokens of --samples pieces of the text, each of --length tokens,
from token --from on: by default behind those that `longspan perplexity` scores.

rope_parameters.json, for --factors and longspan.hf.extend_context, and search.json are written anew
after each evaluation. A search that was stopped goes on where it was if it is started again with the
same options; with more --generations it goes on beyond.
"""

import argparse
import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from longspan import rope
from longspan._files import write_json
from longspan.cli._errors import CommandError, require
from longspan.cli._model import (
    DTYPES,
    PretrainedModel,
    add_model_arguments,
    parse_length,
    read_document,
    set_threads,
)
from longspan.cli._scaling import (
    Report,
    facts,
    make_folder,
    progress,
    read_parameters,
    trained_length,
)
from longspan.cli._scoring import END, last_losses, layer_progress
from longspan.rope.search import Candidate, as_candidate, evolve, grid, starting_points

_ROOM = 2.0  # times the factor of lengths, up to which a pair's factor may go


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between, got {text!r}"
        ) from error
    if min(numbers) <= 0:
        raise argparse.ArgumentTypeError(f"expected numbers above 0, got {text!r}")
    return numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``search`` and its options."""
    kinds = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    kind = kinds.add_parser("search", help="find factors", description=__doc__)
    kind.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(kind)

    def add(option: str, text: str, kind_of: Any = int, **more: Any) -> None:
        if more.get("default") is not None:
            text += f"; default: {more['default']}"
        kind.add_argument(option, type=kind_of, metavar="N", help=text, **more)

    add("--length", "tokens of a piece of text", parse_length, required=True)
    add("--factor", "how many times longer than trained; default: what --length needs", float)
    add("--from", f"where the pieces begin; default: {END}", parse_length, default=END, dest="begin")
    add("--samples", "pieces of text", default=1)
    add("--scored", "last tokens of each that count", parse_length, default=1024)
    kind.add_argument(
        "--start", type=Path, nargs="+", default=[], metavar="FILE",
        help="rope_parameters to begin with instead, such as an earlier search found",
    )  # fmt: skip
    add("--population", "candidates of a generation", default=8)
    add("--parents", "of them that stay; default: half")
    add("--generations", "after the first", default=5)
    add("--seed", "of the search", default=0)
    kind.add_argument("--simple", action="store_true", help="a grid over YaRN's factor and temperature")
    kind.add_argument(
        "--yarn-factors", type=_numbers, metavar="X,...",
        help="of the grid; default: 1, 1.25, 1.5 and 2 times --factor",
    )  # fmt: skip
    kind.add_argument(
        "--temperatures", type=_numbers, metavar="X,...",
        help="attention factors of the grid; default: 0.98, 1 and 1.02 times YaRN's own",
    )  # fmt: skip
    kind.add_argument(
        "--attention", choices=["longspan", "sdpa"], default="longspan", help="default: longspan"
    )
    kind.add_argument(
        "--out", type=Path, default=Path("rope-search"), metavar="FOLDER", help="default: ./rope-search"
    )


def run(args: argparse.Namespace) -> int:
    """Search; 0."""
    _check(args)
    threads = set_threads(args.threads)
    text = read_document(args.document)
    require("tqdm", "tqdm")
    pretrained = PretrainedModel(args.model)
    make_folder(args.out)
    print(f"Reading the tokenizer of {pretrained.label} ...", file=sys.stderr)
    pieces = _pieces(pretrained.tokens(text), args)
    print(f"Loading {pretrained.label} in {args.dtype} ...", file=sys.stderr)
    model = pretrained.load(DTYPES[args.dtype])
    space = _Space(model, args)
    report = Report(
        args.out / "search.json",
        {
            "model": pretrained.label,
            "text": hashlib.sha256(text.encode()).hexdigest(),
            "dtype": args.dtype,
            "attention": args.attention,
            **{name: getattr(args, name) for name in ("length", "begin", "samples", "scored")},
            "factor": space.factor,
            **space.settings(args),
        },
        {
            **facts(args, pretrained.label, threads),
            "document": str(args.document or "pydoc_data.topics"),
        },
    )
    with progress(space.total, len(report.rows), "candidate") as bar:

        def loss_of(parameters: dict[str, Any]) -> float:
            total = 0.0
            with _extended(model, parameters, args.attention):
                for number, piece in enumerate(pieces, 1):
                    with layer_progress(model, f"piece {number} of {len(pieces)}"):
                        total += last_losses(model, piece, args.scored).mean().item()
            return total / len(pieces)

        def evaluated(entry: dict[str, Any], parameters: dict[str, Any], loss: float) -> None:
            best = min((row["loss"] for row in report.rows), default=float("inf"))
            report.add({**entry, "loss": loss})
            if loss < best:
                write_json(args.out / "rope_parameters.json", parameters)
                bar.write(f"{len(report.rows):>4}  loss {loss:.4f}  {_described(parameters)}")
            bar.update()

        best, loss = space.search(args, report.rows, loss_of, evaluated)
    write_json(args.out / "rope_parameters.json", best)
    print(f"The best of {len(report.rows)}: loss {loss:.4f}, {_described(best)}.")
    print(f"Wrote {args.out / 'rope_parameters.json'} and {args.out / 'search.json'}.")
    return 0


def _extended(model: Any, parameters: dict[str, Any], attention: str) -> Any:
    """The model with these ``rope_parameters``, as a context."""
    from longspan.hf import extend_context

    return extend_context(model, parameters, attention=attention)


def _check(args: argparse.Namespace) -> None:
    for name, least in (("samples", 1), ("population", 2), ("generations", 0)):
        if getattr(args, name) < least:
            raise CommandError(f"--{name}: expected {least} or more, got {getattr(args, name)}")
    if args.parents is not None and not 1 <= args.parents < args.population:
        raise CommandError(
            f"--parents: expected 1 or more and less than --population, got {args.parents}"
        )
    if args.scored >= args.length:
        raise CommandError(f"--scored: expected less than --length, {args.length}, got {args.scored}")
    if args.simple and args.start:
        raise CommandError("--start: expected without --simple, which begins with nothing")
    if not args.simple and (args.yarn_factors or args.temperatures):
        raise CommandError("--yarn-factors and --temperatures: expected with --simple alone")


def _pieces(tokens: Tensor, args: argparse.Namespace) -> list[Tensor]:
    """``samples`` pieces (1, length), as far apart as the text allows, the scored tokens all others."""
    room = tokens.shape[1] - args.begin - args.length
    if room < args.scored * (args.samples - 1):
        raise CommandError(
            "--length and --samples: expected no more than the document has from token "
            f"{args.begin} on, {max(tokens.shape[1] - args.begin, 0)}, "
            f"got {args.samples} x {args.length}"
        )
    step = room // max(args.samples - 1, 1)
    begins = [args.begin + i * min(step, args.length) for i in range(args.samples)]
    return [tokens[:, begin : begin + args.length] for begin in begins]


def _described(parameters: dict[str, Any]) -> str:
    scale = f"attention factor {parameters['attention_factor']:.4f}"
    if parameters["rope_type"] == "yarn":
        return f"YaRN x{parameters['factor']:g}, {scale}"
    factors = parameters["long_factor"]
    shown = [factors[i * (len(factors) - 1) // 4] for i in range(5)]
    return f"{scale}, factors " + " .. ".join(f"{x:.2f}" for x in shown)


class _Space:
    """What is searched, and how it is written down."""

    def __init__(self, model: Any, args: argparse.Namespace) -> None:
        own = rope.from_config(model.config)
        if own["method"] != "default":
            raise CommandError(
                f"--model: expected one that is not scaled, got one with {own['method']}, and scalings "
                "do not compose"
            )
        self.trained = trained_length(model)
        self.factor = args.length / self.trained if args.factor is None else args.factor
        if not self.factor > 1:
            raise CommandError(
                f"--length: expected more than the model was trained for, {self.trained}, or a --factor "
                f"above 1, got {args.length} and {self.factor:g}"
            )
        names = ("head_dim", "base", "partial_rotary_factor")
        self._model = {"base": 10000.0, **{name: own[name] for name in names if name in own}}
        self._common = {"rope_theta": self._model["base"]}
        if "partial_rotary_factor" in self._model:
            self._common["partial_rotary_factor"] = self._model["partial_rotary_factor"]
        self.total, self._yarn = 0, ([1.0], [1.0])
        if args.simple:
            _, own_scale = rope.frequencies("yarn", **self._of_yarn(self.factor))
            self._yarn = (
                args.yarn_factors or [self.factor * x for x in (1.0, 1.25, 1.5, 2.0)],
                args.temperatures or [round(own_scale * x, 4) for x in (0.98, 1.0, 1.02)],
            )
            if min(self._yarn[0]) < 1:
                raise CommandError(f"--yarn-factors: expected 1 or more, got {min(self._yarn[0]):g}")
            self.total = len(self._yarn[0]) * len(self._yarn[1])
        else:
            self.start = [self._started(path, args.length) for path in args.start] or starting_points(
                **self._model, factor=self.factor, trained=self.trained
            )
            if args.population < len(self.start):
                raise CommandError(
                    f"--population: expected {len(self.start)} or more, with which it begins, "
                    f"got {args.population}"
                )
            parents = args.population // 2 if args.parents is None else args.parents
            self.total = args.population + args.generations * (args.population - parents)

    def _started(self, path: Path, length: int) -> Candidate:
        """What a file of --start has."""
        try:
            settings = rope.from_config(
                {**self._common, **read_parameters(path, "--start")},
                head_dim=self._model["head_dim"],
                max_position=self.trained,
            )
            return as_candidate(settings, length)
        except ValueError as error:
            raise CommandError(f"--start: {path}: {error}") from error

    def _of_yarn(self, factor: float) -> dict[str, Any]:
        return {
            **self._model,
            "factor": factor,
            "original_max_position_embeddings": self.trained,
        }

    def settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """What the candidates hang on. More generations of the same search go on from fewer."""
        if args.simple:
            return {"simple": True}
        names = ("simple", "population", "parents", "seed")
        return {
            **{name: getattr(args, name) for name in names},
            "start": [dataclasses.asdict(candidate) for candidate in self.start],
        }

    def search(self, args: Any, rows: list[dict[str, Any]], loss_of: Any, evaluated: Any) -> Any:
        """-> the best rope_parameters, their loss."""
        if args.simple:
            known = {(row["factor"], row["attention_factor"]): row["loss"] for row in rows}
            pair, losses = grid(
                lambda *pair: loss_of(self._yarn_parameters(*pair)),
                *self._yarn,
                known=known,
                on_evaluated=lambda pair, loss: evaluated(
                    {"factor": pair[0], "attention_factor": pair[1]}, self._yarn_parameters(*pair), loss
                ),
            )
            return self._yarn_parameters(*pair), losses[pair]
        found = evolve(
            lambda candidate: loss_of(self._longrope_parameters(candidate)),
            self.start,
            greatest=_ROOM * self.factor,
            population=args.population,
            parents=args.parents,
            generations=args.generations,
            seed=args.seed,
            known={_candidate(row): row["loss"] for row in rows},
            on_evaluated=lambda candidate, loss: evaluated(
                {"factors": candidate.factors, "attention_factor": candidate.attention_factor},
                self._longrope_parameters(candidate),
                loss,
            ),
        )
        return self._longrope_parameters(found.best), found.loss

    def _longrope_parameters(self, candidate: Candidate) -> dict[str, Any]:
        return {
            **self._common,
            "rope_type": "longrope",
            "factor": self.factor,
            "original_max_position_embeddings": self.trained,
            "attention_factor": candidate.attention_factor,
            # Up to the trained length the model stays what it was. transformers' own LongRoPE does not
            # look at these two, and has the attention factor for short text as well.
            "short_mscale": 1.0,
            "long_mscale": candidate.attention_factor,
            "short_factor": [1.0] * len(candidate.factors),
            "long_factor": list(candidate.factors),
        }

    def _yarn_parameters(self, factor: float, attention_factor: float) -> dict[str, Any]:
        return {
            **self._common,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self.trained,
            "attention_factor": attention_factor,
        }


def _candidate(row: dict[str, Any]) -> Candidate:
    return Candidate(tuple(row["factors"]), row["attention_factor"])
