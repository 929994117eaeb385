"""Score the same tokens with ever more text before them, by every scaling method of RoPE.

Each pass ends at the same token, --end, and the same last tokens are scored, so that a row of the table
shows what a method makes of a length, and a column what more text is worth. A method's factor is what
the length needs (length / trained length), unless it is given as in yarn@2. Rows with the same
frequencies, such as those of every method up to the trained length, are scored once.

  longspan perplexity --methods none,linear,dynamic,yarn --lengths 2k,4k,8k,16k,32k

perplexity.json is written anew after each row and perplexity.png after each length. A run that was
stopped goes on where it was if it is started again with the same options.
"""

import argparse
import hashlib
import math
import sys
import time
from pathlib import Path
from typing import Any

from longspan import rope
from longspan._files import write_atomically
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
    add_scaling_arguments,
    check_methods,
    facts,
    make_folder,
    print_line,
    progress,
    read_methods,
    trained_length,
)
from longspan.cli._scoring import END, SCORED_AT_MOST, last_losses, layer_progress, plain_log_ticks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``longspan perplexity``."""
    add_model_arguments(parser)
    add_scaling_arguments(parser, [2048, 4096, 8192, 16384, 32768])
    parser.add_argument(
        "--scored",
        type=parse_length,
        metavar="N",
        help=f"last tokens that are scored; default: {SCORED_AT_MOST}, at most half the least length",
    )
    parser.add_argument(
        "--end",
        type=parse_length,
        metavar="N",
        help=f"where passes end; default: {END}, or the document's end",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("perplexity"), metavar="FOLDER", help="default: ./perplexity"
    )


def run(args: argparse.Namespace) -> int:
    """Score; 0."""
    lengths, (methods, parameters) = args.lengths, read_methods(args)
    if lengths[0] < 16:
        raise CommandError(f"--lengths: expected 16 tokens or more, got {lengths[0]}")
    scored = min(SCORED_AT_MOST, lengths[0] // 2) if args.scored is None else args.scored
    if scored >= lengths[0]:
        raise CommandError(f"--scored: expected less than the least length, {lengths[0]}, got {scored}")
    threads = set_threads(args.threads)
    text = read_document(args.document)
    for module in ("tqdm", "matplotlib"):
        require(module, module)
    pretrained = PretrainedModel(args.model)
    make_folder(args.out)
    print(f"Reading the tokenizer of {pretrained.label} ...", file=sys.stderr)
    tokens = pretrained.tokens(text)
    end = min(END, tokens.shape[1]) if args.end is None else args.end
    if not lengths[-1] <= end <= tokens.shape[1]:
        raise CommandError(
            f"--lengths: expected no more tokens than there are up to --end, {end} of the document's "
            f"{tokens.shape[1]}, got {lengths[-1]}"
        )
    tokens = tokens[:, :end]
    report = Report(
        args.out / "perplexity.json",
        {
            "model": pretrained.label,
            "text": hashlib.sha256(text.encode()).hexdigest(),
            "end": end,
            "scored": scored,
            "dtype": args.dtype,
            "attention": args.attention,
            "factors": parameters,
        },
        {
            **facts(args, pretrained.label, threads),
            "document": str(args.document or "pydoc_data.topics"),
        },
    )
    wanted = [(length, str(method)) for length in lengths for method in methods]
    done = sum(report.find(tokens=length, method=name) is not None for length, name in wanted)
    model = None
    if done < len(wanted):
        print(f"Loading {pretrained.label} in {args.dtype} ...", file=sys.stderr)
        model = pretrained.load(DTYPES[args.dtype])
        report.write(trained_tokens=trained_length(model))
        check_methods(model, methods, lengths, parameters, args.attention)
    widths = [7, *(max(10, len(str(method))) for method in methods)]
    print(f"Perplexity of tokens {end - scored} to {end - 1} of {pretrained.label}, {args.dtype}.")
    print_line(["tokens", *map(str, methods)], widths)
    with progress(len(wanted), done, "pass") as bar:
        for length in lengths:
            for method in methods:
                if report.find(tokens=length, method=str(method)) is None:
                    _score(report, model, method, parameters, args.attention, tokens, length, scored)
                    bar.update()
            rows = [report.find(tokens=length, method=str(method)) for method in methods]
            print_line([f"{length}", *(f"{row['perplexity']:.4g}" for row in rows if row)], widths)
            _plot(args.out / "perplexity.png", report)
    print(f"Wrote {args.out / 'perplexity.json'} and {args.out / 'perplexity.png'}.")
    return 0


def _score(
    report: Report, model: Any, method: Any, parameters: Any, attention: str, tokens: Any, length: int,
    scored: int,
) -> None:  # fmt: skip
    """Add the row of a method and a length: by a pass over the text, or a row of the same angles."""
    extended = method.extend(model, length, trained_length(model), parameters, attention)
    row: dict[str, Any] = {"tokens": length, "method": str(method)}
    with extended, layer_progress(model, f"{length} tokens, {method}"):
        inv_freq, scale = rope.frequencies(**extended.settings, seq_len=length)
        seen = min(length, extended.tokens_seen or length)
        row["frequencies"] = hashlib.sha256(
            f"{inv_freq.tolist()} {scale}{f' {seen}' if seen < length else ''}".encode()
        ).hexdigest()[:16]
        same = report.find(tokens=length, frequencies=row["frequencies"])
        if same is None:
            start = time.perf_counter()
            losses = last_losses(model, tokens[:, -length:], scored)
            row["seconds"] = time.perf_counter() - start
            row["perplexity"] = losses.mean().exp().item()
            # Of the mean of the losses, as if tokens were independent.
            row["standard_error"] = losses.std().item() / math.sqrt(scored)
        else:
            row |= {name: same[name] for name in ("perplexity", "standard_error")}
            row["same_as"] = same["method"]
    report.add(row)


def _plot(path: Path, report: Report) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(dict.fromkeys(row["method"] for row in report.rows))
    for name, marker in zip(names, "osd^v<>P*X" * len(names)):
        rows = sorted((r for r in report.rows if r["method"] == name), key=lambda row: row["tokens"])
        x, y = [r["tokens"] for r in rows], [r["perplexity"] for r in rows]
        axes.plot(x, y, marker=marker, label="as trained" if name == "none" else name)
    ticks = sorted({row["tokens"] for row in report.rows})
    settings, trained = report.content["settings"], report.content.get("trained_tokens")
    axes.set(
        title=f"{settings['model']}, {settings['dtype']}", xlabel="length (tokens)", xscale="log",
        ylabel=f"perplexity of the same {settings['scored']} tokens", yscale="log",
    )  # fmt: skip
    axes.set_xticks(ticks, [f"{n}" for n in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(plain_log_ticks())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    if trained and ticks[0] <= trained < ticks[-1]:
        axes.axvline(trained, color="grey", linestyle=":", label="trained length")
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
