"""Read a long document with torch's attention, longspan's exact one, and a window with sink tokens.

A real model reads the same text at each length in one pass (prefill, with a KV cache) with

  sdpa      torch's scaled_dot_product_attention, the baseline
  longspan  exact attention: its perplexity must agree with sdpa's to 3 digits, or the command fails
  window    longspan, each token seeing the last --window tokens and the first --sink-tokens

Every pass ends at the same token and the same last tokens are scored, so that perplexities may be
compared down a column as well as across. Seconds are those of the model's body, without the output
layer. Peak memory is the rise of the process's resident memory during it (sampled; the weights were
there before). The KV cache is what was kept; for the window, what a rolling cache of window + sink
tokens would hold. demo.json and demo.png are written anew after each row, so that a run that is
stopped loses no row that was printed.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import longspan
from longspan.cli._errors import CommandError, require
from longspan.cli._files import write_atomically, write_json
from longspan.cli._memory import PeakMemory
from longspan.cli._model import (
    DTYPES,
    PretrainedModel,
    add_model_arguments,
    parse_length,
    read_document,
    set_threads,
)

METHODS = ("sdpa", "longspan", "window")
SCORED_AT_MOST = 1024

_COLUMNS = (
    ("tokens", 7), ("attention", 10), ("prefill", 10), ("tokens/s", 10), ("peak memory", 12),
    ("KV cache", 10), ("perplexity", 11), ("vs sdpa", 8),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``longspan demo``."""
    add_model_arguments(parser)
    parser.add_argument(
        "--lengths",
        type=lambda text: [parse_length(part) for part in text.split(",")],
        default=[4096, 8192, 16384],
        metavar="N,N,...",
        help="how many tokens to read; default: 4k,8k,16k",
    )
    parser.add_argument("--window", type=parse_length, default=1024, metavar="N", help="default: 1024")
    parser.add_argument("--sink-tokens", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="FOLDER", help="default: ./demo")


def run(args: argparse.Namespace) -> int:
    """Run the demo: 0, or 1 where exact attention's perplexity is not SDPA's."""
    lengths = sorted(set(args.lengths))
    if lengths[0] < 16:
        raise CommandError(f"--lengths: expected 16 tokens or more, got {lengths[0]}")
    if args.sink_tokens < 0:
        raise CommandError(f"--sink-tokens: expected 0 or more, got {args.sink_tokens}")
    threads = set_threads(args.threads)
    text = read_document(args.document)
    for module, extra in (("psutil", "'longspan[hf]'"), ("tqdm", "tqdm"), ("matplotlib", "matplotlib")):
        require(module, extra)
    pretrained = PretrainedModel(args.model)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out: expected a folder, got {args.out} ({error})") from error

    print(f"Reading the tokenizer of {pretrained.label} ...", file=sys.stderr)
    tokens = pretrained.tokens(text)
    if tokens.shape[1] < lengths[-1]:
        raise CommandError(
            f"--lengths: expected no more tokens than the document has, {tokens.shape[1]}, got {lengths[-1]}"
        )
    print(f"Loading {pretrained.label} in {args.dtype} ...", file=sys.stderr)
    model = pretrained.load(DTYPES[args.dtype])
    _register(args.window, args.sink_tokens)

    # All passes end with the text's token lengths[-1], and the last `scored` tokens are predicted.
    tokens = tokens[:, : lengths[-1]]
    scored = min(SCORED_AT_MOST, lengths[0] // 2)
    trained = getattr(model.config, "max_position_embeddings", None)
    report: dict[str, Any] = {
        "model": pretrained.label,
        "document": str(args.document or "pydoc_data.topics"),
        "trained_tokens": trained,
        "dtype": args.dtype,
        "threads": threads,
        "torch": torch.__version__,
        "longspan": longspan.__version__,
        "isa": longspan.isa(),
        "window": args.window,
        "sink_tokens": args.sink_tokens,
        "scored_tokens": scored,
        "rows": [],
    }
    print(
        f"{pretrained.label} (trained to {trained} tokens), {args.dtype}, {threads} threads, {longspan.isa()}. "
        f"Perplexity of the last {scored} tokens; window {args.window} + {args.sink_tokens} sink tokens."
    )
    print("  ".join(f"{name:>{width}}" for name, width in _COLUMNS), flush=True)
    _warm_up(model, tokens)
    for length in lengths:
        baseline = None
        for method in METHODS:
            row = _read(model, method, tokens[:, -length:], scored, args.window + args.sink_tokens)
            baseline = baseline or row
            report["rows"].append(row)
            write_json(args.out / "demo.json", report)
            _plot(args.out / "demo.png", report)
            _print_row(row, baseline)
    return _conclude(report, args.out)


def _register(window: int, sink_tokens: int) -> None:
    """Tell transformers about "longspan" and, for this process alone, about "longspan_window"."""
    from transformers import AttentionInterface, AttentionMaskInterface

    functions = {
        "longspan": partial(_attend, window=(-1, 0), sink_tokens=0),
        "longspan_window": partial(_attend, window=(window - 1, 0), sink_tokens=sink_tokens),
    }
    for name, function in functions.items():
        AttentionInterface.register(name, function)
        # One sequence without padding, so that the causal order says it all.
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    window: tuple[int, int],
    sink_tokens: int,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """longspan.attention as transformers calls it: (B, H, T, D) in, (B, T, H, D) out."""
    out = longspan.attention(
        query, key, value, causal=True, window=window, sink_tokens=sink_tokens, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


def _use(model: Any, method: str) -> None:
    model.set_attn_implementation("longspan_window" if method == "window" else method)


@torch.inference_mode()
def _warm_up(model: Any, tokens: Tensor) -> None:
    """Pay for the first call's set-up (threads, oneDNN's kernels) before anything is timed."""
    for method in METHODS:
        _use(model, method)
        model(tokens[:, -256:], use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def _read(model: Any, method: str, tokens: Tensor, scored: int, window_tokens: int) -> dict[str, Any]:
    """One pass over ``tokens`` (1, T) with ``method``, measured: a row of the table."""
    length = tokens.shape[1]
    _use(model, method)
    with _progress(model, f"{length} tokens, {method}"), PeakMemory() as memory:
        seconds = math.nan
        start = time.perf_counter()

        def body_is_done(*_: Any) -> None:
            nonlocal seconds
            seconds = time.perf_counter() - start
            memory.stop()

        hook = model.base_model.register_forward_hook(body_is_done)
        try:
            output = model(tokens, use_cache=True, logits_to_keep=scored + 1)
        finally:
            hook.remove()
    # Named `cache` by newer versions of transformers.
    cache = output["cache"] if "cache" in output else output["past_key_values"]
    kept = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    if method == "window":
        kept = kept // length * min(length, window_tokens)
    return {
        "tokens": length,
        "attention": method,
        "prefill_seconds": seconds,
        "tokens_per_second": length / seconds,
        "peak_memory_bytes": memory.bytes,
        "kv_cache_bytes": kept,
        "perplexity": _perplexity(output.logits[0, :-1], tokens[0, -scored:]),
    }


def _perplexity(logits: Tensor, targets: Tensor) -> float:
    """exp of the mean negative log-likelihood of ``targets`` (T,) under ``logits`` (T, vocabulary).

    In slices of 128 tokens, so that not all the logits exist in float32 at once.
    """
    total = 0.0
    for part, target in zip(logits.split(128), targets.split(128)):
        total += torch.nn.functional.cross_entropy(part.float(), target, reduction="sum").item()
    return math.exp(total / targets.shape[0])


@contextmanager
def _progress(model: Any, label: str) -> Iterator[None]:
    """A bar on stderr that moves on with each of the model's layers, and goes when they are done."""
    from tqdm import tqdm

    layers = max(
        (m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len, default=()
    )
    with tqdm(total=len(layers), desc=label, unit="layer", leave=False) as bar:

        def layer_is_done(*_: Any) -> None:  # what a hook returns would replace the layer's output
            bar.update()

        hooks = [layer.register_forward_hook(layer_is_done) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _print_row(row: dict[str, Any], baseline: dict[str, Any]) -> None:
    cells = (
        f"{row['tokens']}",
        row["attention"],
        f"{row['prefill_seconds']:.2f} s",
        f"{row['tokens_per_second']:.0f}",
        f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
        f"{row['kv_cache_bytes'] / 1e6:.1f} MB",
        f"{row['perplexity']:.4g}",
        f"{baseline['prefill_seconds'] / row['prefill_seconds']:.2f}x",
    )
    print("  ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS)), flush=True)


def agree_to_3_digits(a: float, b: float) -> bool:
    """Whether ``a`` is less than one unit of ``b``'s third significant digit away from it.

    Example::

        agree_to_3_digits(6.979, 6.984)  # True; 6.97 and 7.00 do not agree
    """
    if not (math.isfinite(a) and math.isfinite(b) and b > 0):
        return False
    return abs(a - b) < 10.0 ** (math.floor(math.log10(b)) - 2)


def _conclude(report: dict[str, Any], out: Path) -> int:
    perplexity = {(row["tokens"], row["attention"]): row["perplexity"] for row in report["rows"]}
    lengths = sorted({tokens for tokens, _ in perplexity})
    differing = [
        n for n in lengths if not agree_to_3_digits(perplexity[n, "longspan"], perplexity[n, "sdpa"])
    ]
    report["exact_agrees_with_sdpa"] = not differing
    write_json(out / "demo.json", report)
    print(f"Wrote {out / 'demo.json'} and {out / 'demo.png'}.")
    for n in differing:
        print(
            f"longspan demo: at {n} tokens exact attention's perplexity, {perplexity[n, 'longspan']:.6g}, "
            f"is not SDPA's, {perplexity[n, 'sdpa']:.6g}, to 3 digits",
            file=sys.stderr,
        )
    if differing:
        return 1
    print("Exact attention's perplexity agrees with SDPA's to 3 digits at every length.")
    return 0


def _plot(path: Path, report: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = {
        "sdpa": "torch SDPA",
        "longspan": "longspan, exact",
        "window": f"longspan, window {report['window']} + {report['sink_tokens']} sinks",
    }
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, perplexity_axes = figure.subplots(1, 2)
    for method, marker in zip(METHODS, "osd"):
        rows = [row for row in report["rows"] if row["attention"] == method]
        x = [row["tokens"] for row in rows]
        style = {"marker": marker, "label": labels[method], "linestyle": "--" if method == "longspan" else "-"}
        time_axes.plot(x, [row["prefill_seconds"] for row in rows], **style)
        perplexity_axes.plot(x, [row["perplexity"] for row in rows], **style)
    ticks = sorted({row["tokens"] for row in report["rows"]})
    for axes, title, unit in (
        (time_axes, "Time to read the document", "prefill (seconds)"),
        (perplexity_axes, f"Perplexity of the last {report['scored_tokens']} tokens", "perplexity"),
    ):
        axes.set(title=title, xlabel="length (tokens)", ylabel=unit, xscale="log", yscale="log")
        axes.set_xticks(ticks, [f"{n}" for n in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(_plain_log_ticks())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    if report["trained_tokens"] and ticks[0] <= report["trained_tokens"] < ticks[-1]:
        perplexity_axes.axvline(report["trained_tokens"], color="grey", linestyle=":", label="trained length")
    perplexity_axes.legend()
    figure.suptitle(f"{report['model']}, {report['dtype']}, {report['threads']} threads")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))


def _plain_log_ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 2.0, 5.0))
