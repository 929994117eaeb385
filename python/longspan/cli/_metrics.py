"""What a training run has measured: rows in metrics.jsonl, lines of a table, a plot."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longspan._files import write_atomically

Row = dict[str, Any]

_COLUMNS = (
    ("step", 7), ("loss", 7), ("held-out", 9), ("vs bigram", 10), ("tokens/s", 9), ("memory", 9),
)  # fmt: skip


def read_rows(path: Path, step: int) -> list[Row]:
    """Rows up to ``step``; those of later steps were not in the checkpoint, and one may be cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= step:
            rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of these rows alone, to which `as_line` is appended later."""
    text = "".join(map(as_line, rows))
    write_atomically(path, lambda temporary: _write(temporary, text))


def as_line(row: Row) -> str:
    """A line of metrics.jsonl."""
    return json.dumps(row) + "\n"


class Table:
    """The lines that a run prints: one a held-out loss.

    Args:
        bigram_loss: What to compare with.
    """

    def __init__(self, bigram_loss: float) -> None:
        """Begin with no rows."""
        self._bigram = bigram_loss
        self._since: list[Row] = []
        self._held_out = ""

    def header(self) -> str:
        """Names of the columns."""
        return "  ".join(f"{name:>{width}}" for name, width in _COLUMNS)

    def add(self, row: Row) -> str | None:
        """Take in a step's row; where it has a held-out loss, a line for the steps since the last."""
        self._since.append(row)
        if "held_out_loss" not in row:
            return None
        self._held_out = f", held out {row['held_out_loss']:.3f}"
        seconds = [1 / part["tokens_per_second"] for part in self._since]
        cells = (
            f"{row['step']}",
            f"{sum(part['loss'] for part in self._since) / len(self._since):.3f}",
            f"{row['held_out_loss']:.3f}",
            f"{row['held_out_loss'] - self._bigram:+.3f}",
            f"{len(seconds) / sum(seconds):.0f}",
            _megabytes(row),
        )
        self._since.clear()
        return "  ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS))

    def summary(self, row: Row) -> str:
        """What stands beside the progress bar."""
        rate = row["tokens_per_second"]
        return f"loss {row['loss']:.3f}{self._held_out}, {rate:.0f} tokens/s, {_megabytes(row)}"


def plot_losses(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw training and held-out loss, and the baselines that the first row has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    if trained:
        axes.plot(*zip(*trained), color="tab:blue", linewidth=0.8, alpha=0.6, label="training")
    held_out = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    axes.plot(*zip(*held_out), color="tab:orange", marker="o", markersize=4, label="held out")
    for name, style in (("unigram", ":"), ("bigram", "--")):
        loss = rows[0][f"{name}_loss"]
        axes.axhline(loss, color="grey", linestyle=style, label=f"{name} model, {loss:.3f}")
    axes.set(title=title, xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))


def _megabytes(row: Row) -> str:
    return f"{row['memory_bytes'] / 1e6:.0f} MB"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
