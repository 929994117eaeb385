"""Read a long document with torch's attention, longspan's exact one, and a window with sink tokens.

A real model reads the same text at each length in one pass (prefill, with a KV cache) with

  sdpa      torch's scaled_dot_product_attention, the baseline
  longspan  exact attention: its perplexity must agree with sdpa's, or the command fails
  window    longspan, each token seeing the last --window tokens and the first --sink-tokens

Every pass ends at the same token and the same last tokens are scored, so that perplexities may be
compared down a column as well as across. Seconds are those of the model's body, without the output
layer. Peak memory is the rise of the process's resident memory during it (sampled; the weights were
there before). The KV cache is what was kept; for the window, what a rolling cache of window + sink
tokens would hold.

Agreement is to 3 digits. In bf16 rounding alone moves the perplexity of this many tokens, by 0.2 % and,
beyond the trained length, where it is in the thousands, by several, whichever attention is right. So
with --dtype bf16 the 3 digits are first checked on a float32 copy of the model, and where a bf16 row
differs, that copy reads its tokens with sdpa: longspan's losses of the tokens may then lie at most twice
as far from these as sdpa's own in bf16 do (root mean square).

demo.json is written anew after each row and demo.png after each length, so that a run that is stopped
loses no row that was printed.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import longspan
from longspan._files import write_atomically, write_json
from longspan._losses import token_losses
from longspan.cli._errors import CommandError, require
from longspan.cli._memory import PeakMemory
from longspan.cli._model import (
    DTYPES,
    PretrainedModel,
    add_model_arguments,
    parse_length,
    read_document,
    set_threads,
)
from longspan.cli._scoring import SCORED_AT_MOST, layer_progress, plain_log_ticks

METHODS = ("sdpa", "longspan", "window")

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
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="FOLDER", help="default: ./demo"
    )


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
            f"--lengths: expected no more tokens than the document has, {tokens.shape[1]}, "
            f"got {lengths[-1]}"
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
    _warm_up(model, tokens)
    if args.dtype != "float32":
        report["float32_check"] = _check_in_float32(model, tokens[:, -min(lengths[0], 4096) :], scored)
    print(
        f"{pretrained.label} (trained to {trained} tokens), {args.dtype}, {threads} threads, "
        f"{longspan.isa()}. Perplexity of the last {scored} tokens; "
        f"window {args.window} + {args.sink_tokens} sink tokens."
    )
    print("  ".join(f"{name:>{width}}" for name, width in _COLUMNS), flush=True)
    for length in lengths:
        baseline: tuple[dict[str, Any], Tensor] | None = None
        for method in METHODS:
            row, losses = _read(
                model, method, tokens[:, -length:], scored, args.window + args.sink_tokens
            )
            baseline = baseline or (row, losses)
            if method == "longspan":
                row["agrees_to"] = _agreement(losses, baseline[1])
                if not row["agrees_to"] and args.dtype != "float32":
                    truth = _losses_in_float32(model, ("sdpa",), tokens[:, -length:], scored)["sdpa"]
                    row["agrees_to"] = _agreement(losses, baseline[1], truth)
            report["rows"].append(row)
            write_json(args.out / "demo.json", report)
            _print_row(row, baseline[0])
        _plot(args.out / "demo.png", report)
    return _conclude(report, args.out)


def _register(window: int, sink_tokens: int) -> None:
    """Tell transformers about "longspan" and, with these two numbers, about "longspan_window"."""
    from transformers import AttentionInterface, AttentionMaskInterface

    import longspan.hf

    longspan.hf.register()

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        out = longspan.attention(
            query,
            key,
            value,
            causal=True,
            window=(window - 1, 0),
            sink_tokens=sink_tokens,
            scale=scaling,
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("longspan_window", attend)
    # One sequence without padding: the causal order and the window say it all.
    AttentionMaskInterface.register("longspan_window", lambda *args, **kwargs: None)


def _use(model: Any, method: str) -> None:
    model.set_attn_implementation("longspan_window" if method == "window" else method)


@torch.inference_mode()
def _warm_up(model: Any, tokens: Tensor) -> None:
    """Pay for the first call's set-up (threads, oneDNN's kernels) before anything is timed."""
    for method in METHODS:
        _use(model, method)
        model(tokens[:, -256:], use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def _read(
    model: Any, method: str, tokens: Tensor, scored: int, window_tokens: int
) -> tuple[dict[str, Any], Tensor]:
    """One pass over ``tokens`` (1, T), measured: a row of the table, and the scored tokens' losses."""
    length = tokens.shape[1]
    _use(model, method)
    with layer_progress(model, f"{length} tokens, {method}"), PeakMemory() as memory:
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
    kept = sum(
        x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values)
    )
    if method == "window":
        kept = kept // length * min(length, window_tokens)
    losses = token_losses(output.logits[0, :-1], tokens[0, -scored:])
    row = {
        "tokens": length,
        "attention": method,
        "prefill_seconds": seconds,
        "tokens_per_second": length / seconds,
        "peak_memory_bytes": memory.bytes,
        "kv_cache_bytes": kept,
        "perplexity": losses.mean().exp().item(),
    }
    return row, losses


@torch.inference_mode()
def _losses_in_float32(
    model: Any, methods: Sequence[str], tokens: Tensor, scored: int
) -> dict[str, Tensor]:
    """The scored tokens' losses by a float32 copy of the model, by method."""
    model = copy.deepcopy(model).float()
    losses = {}
    for method in methods:
        _use(model, method)
        with layer_progress(model, f"float32 check, {tokens.shape[1]} tokens, {method}"):
            logits = model(tokens, logits_to_keep=scored + 1).logits
        losses[method] = token_losses(logits[0, :-1], tokens[0, -scored:])
    return losses


def _check_in_float32(model: Any, tokens: Tensor, scored: int) -> dict[str, Any]:
    """Exact attention against SDPA where rounding hides nothing: perplexity of both, and the verdict."""
    losses = _losses_in_float32(model, ("sdpa", "longspan"), tokens, scored)
    perplexity = {method: x.mean().exp().item() for method, x in losses.items()}
    agrees_to = _agreement(losses["longspan"], losses["sdpa"])
    print(
        f"float32 check at {tokens.shape[1]} tokens: perplexity {perplexity['sdpa']:.6f} with SDPA, "
        f"{perplexity['longspan']:.6f} with longspan: " + ("agrees" if agrees_to else "DIFFERS"),
        flush=True,
    )
    return {"tokens": tokens.shape[1], "perplexity": perplexity, "agrees_to": agrees_to}


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


def _agreement(losses: Tensor, baseline: Tensor, truth: Tensor | None = None) -> str:
    """How far exact attention's losses agree with SDPA's: "3 digits", "rounding", or "" for not.

    Rounding it is where they lie at most twice as far from the truth, SDPA's in float32, as SDPA's do.
    """
    if agree_to_3_digits(losses.mean().exp().item(), baseline.mean().exp().item()):
        return "3 digits"
    if truth is not None:
        ours, theirs = ((x - truth).square().mean().sqrt() for x in (losses, baseline))
        if ours <= 2 * theirs:
            return "rounding"
    return ""


def _conclude(report: dict[str, Any], out: Path) -> int:
    exact = [row for row in report["rows"] if row["attention"] == "longspan"]
    agrees = (
        all(row["agrees_to"] for row in exact) and report.get("float32_check", {}).get("agrees_to") != ""
    )
    report["exact_agrees_with_sdpa"] = agrees
    write_json(out / "demo.json", report)
    print(f"Wrote {out / 'demo.json'} and {out / 'demo.png'}.")
    verdicts = [f"{row['tokens']} tokens: {row['agrees_to'] or 'DIFFERS'}" for row in exact]
    print(f"Exact attention's perplexity against SDPA's agrees to: {'; '.join(verdicts)}.")
    if not agrees:
        print("longspan demo: exact attention's perplexity is not SDPA's", file=sys.stderr)
    return int(not agrees)


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
        style = {
            "marker": marker,
            "label": labels[method],
            "linestyle": "--" if method == "longspan" else "-",
        }
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
        axes.yaxis.set_major_locator(plain_log_ticks())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    if report["trained_tokens"] and ticks[0] <= report["trained_tokens"] < ticks[-1]:
        perplexity_axes.axvline(
            report["trained_tokens"], color="grey", linestyle=":", label="trained length"
        )
    perplexity_axes.legend()
    figure.suptitle(f"{report['model']}, {report['dtype']}, {report['threads']} threads")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
