"""How every benchmark measures: the machine's limits, two sides interleaved, results checked first.

A family's module (``benchmarks/<family>.py``) has ``cases()``, which yields pairs of a name and a
function from `Bench` to `Row`; `run.py` calls them and prints, stores and plots the rows.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan._files import write_atomically
from longspan.cli._memory import PeakMemory

Work = Callable[[], Any]


class WrongAnswer(Exception):
    """Ours and the peer's results differ: there is no speed to speak of."""


@dataclass
class Limits:
    """What the machine does at most with this many threads; bf16 is None without the instruction."""

    threads: int
    float_gflops: float
    read_gbytes: float
    copy_gbytes: float
    bf16_gflops: float | None = None

    def gflops(self, dtype: torch.dtype) -> float:
        """Of multiply-adds on operands of this type (fp16 is computed in float)."""
        if dtype == torch.bfloat16 and self.bf16_gflops is not None:
            return self.bf16_gflops
        return self.float_gflops


def measure_limits(threads: int, arch: str = "native") -> Limits:
    """Compile limits.cc for ``-march=arch`` in a temporary folder and run it on 320 MB buffers."""
    source = Path(__file__).with_name("limits.cc")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "limits")
        flags = ["-std=c++20", "-O3", f"-march={arch}", "-ffp-contract=fast", "-fopenmp"]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", program], check=True)
        out = subprocess.run([program, str(threads), "320"], check=True, capture_output=True, text=True)
    return Limits(**json.loads(out.stdout))


@dataclass
class Row:
    """One line of a table. Times in seconds; a ratio of 2 means that ours takes half the time.

    ``value`` is what is judged (most often the ratio), ``at_least`` what it must reach; a row without
    it is for information. ``limit_fraction`` is ours against the machine's limit named in ``limit``.
    """

    work: str = ""
    value: float | None = None
    at_least: float | None = None
    peer: str = "torch SDPA"
    ours_seconds: float | None = None
    peer_seconds: float | None = None
    limit_fraction: float | None = None
    limit: str = ""
    limit_at_least: float | None = None
    ours_peak_bytes: int | None = None
    peer_peak_bytes: int | None = None
    error: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether every requirement is met; None without any."""
        if self.error:
            return False
        judged = [
            got is not None and got >= wanted
            for got, wanted in ((self.value, self.at_least), (self.limit_fraction, self.limit_at_least))
            if wanted is not None
        ]
        return all(judged) if judged else None


class Bench:
    """What a family's cases measure with.

    Args:
        threads: Of torch and of both sides.
        quick: Fewer repetitions of the same problems.
        limits: The machine's; None measures them.
    """

    def __init__(self, threads: int, quick: bool, limits: Limits | None = None) -> None:
        torch.set_num_threads(threads)
        self.threads = threads
        self.quick = quick
        self.limits = measure_limits(threads) if limits is None else limits

    def times(self, *sides: Work) -> list[float]:
        """Median seconds of each side, the sides taking turns so that a drift hits all alike.

        A turn is as many calls as make 20 ms; there are at least 3 turns (quick) or 7, and more for
        short work, up to a second or 4 of it.
        """
        turns_at_least, budget = (3, 1.0) if self.quick else (7, 4.0)
        for side in sides:
            side()
        first = [_seconds_a_call(side, 1) for side in sides]
        calls = [max(1, int(0.02 / seconds)) for seconds in first]
        turn = sum(n * seconds for n, seconds in zip(calls, first))
        turns = max(turns_at_least, min(50, int(budget / turn)))
        samples = [[_seconds_a_call(side, n) for side, n in zip(sides, calls)] for _ in range(turns)]
        return [statistics.median(mine) for mine in zip(*samples)]

    def compare(
        self,
        ours: Work,
        peer: Work,
        *,
        tolerance: float,
        at_least: float | None = None,
        peer_name: str = "torch SDPA",
        flops: float = 0.0,
        dtype: torch.dtype = torch.float32,
        bytes_read: float = 0.0,
        limit_at_least: float | None = None,
        memory: bool = True,
    ) -> Row:
        """Check that both give the same tensors, then measure peak memory and time of each.

        Args:
            ours: Returns a tensor or a sequence of them.
            peer: Likewise, the same values.
            tolerance: Greatest difference, as a fraction of the peer's greatest magnitude.
            at_least: What the ratio peer / ours must reach.
            peer_name: For the table.
            flops: Of ours, for the fraction of the machine's FMA (or bf16 dot) limit.
            dtype: Whose limit that is.
            bytes_read: Where memory is the limit instead.
            limit_at_least: What that fraction must reach.
            memory: False for work too small to measure its memory.
        """
        row = Row(at_least=at_least, peer=peer_name, limit_at_least=limit_at_least)
        try:
            check_same(ours(), peer(), tolerance)
        except WrongAnswer as error:
            row.error = str(error)
            return row
        if memory:
            row.ours_peak_bytes, row.peer_peak_bytes = peak_bytes(ours), peak_bytes(peer)
        row.ours_seconds, row.peer_seconds = self.times(ours, peer)
        row.value = row.peer_seconds / row.ours_seconds
        if bytes_read:
            row.limit = "read bandwidth"
            row.limit_fraction = bytes_read / row.ours_seconds / 1e9 / self.limits.read_gbytes
        elif flops:
            row.limit = (
                "bf16 dot" if self.limits.gflops(dtype) != self.limits.float_gflops else "float FMA"
            )
            row.limit_fraction = flops / row.ours_seconds / 1e9 / self.limits.gflops(dtype)
        return row


def _seconds_a_call(work: Work, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def peak_bytes(work: Work) -> int:
    """Rise of resident memory during one call."""
    with PeakMemory() as memory:
        work()
    return memory.bytes


def check_same(
    ours: Tensor | Sequence[Tensor], peer: Tensor | Sequence[Tensor], tolerance: float
) -> None:
    """Raise WrongAnswer unless each tensor differs by at most ``tolerance`` of the peer's maximum."""
    pairs = [(ours, peer)] if isinstance(ours, Tensor) else list(zip(ours, peer))
    for i, (a, b) in enumerate(pairs):
        if a.shape != b.shape:
            raise WrongAnswer(f"result {i}: shape {tuple(a.shape)}, the peer's is {tuple(b.shape)}")
        difference = (a.detach().float() - b.detach().float()).abs().max().item()
        allowed = tolerance * b.detach().float().abs().max().item()
        if not difference <= allowed:
            raise WrongAnswer(
                f"result {i}: differs from the peer's by {difference:.3g}, allowed {allowed:.3g}"
            )


def run_with_environment(module: Path, argument: str, environment: dict[str, str]) -> Any:
    """Run a benchmark module with one argument in a process of its own; its last line is JSON.

    For what is chosen once a process: instruction sets, of ours and of the peer's.
    """
    out = subprocess.run(
        [sys.executable, str(module), argument],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if out.returncode:
        raise RuntimeError(f"{module.name} {argument} failed:\n{out.stderr[-2000:]}")
    return json.loads(out.stdout.splitlines()[-1])


_COLUMNS = (
    ("work", 46), ("ours", 9), ("peer", 9), ("value", 7), ("needed", 7), ("of limit", 20),
    ("peak MB ours/peer", 18), ("", 4),
)  # fmt: skip


def print_header() -> None:
    """Print the table's first line."""
    print("  ".join(f"{name:<{width}}" for name, width in _COLUMNS).rstrip(), flush=True)


def print_row(row: Row) -> None:
    """Print one row; a wrong answer prints no speed."""
    if row.error:
        print(f"{row.work:<46}  WRONG: {row.error}", flush=True)
        return
    limit = ""
    if row.limit_fraction is not None:
        limit = f"{row.limit_fraction:.0%} {row.limit}"
        if row.limit_at_least is not None:
            limit += f" (>={row.limit_at_least:.0%})"
    memory = ""
    if row.ours_peak_bytes is not None and row.peer_peak_bytes is not None:
        memory = f"{row.ours_peak_bytes / 1e6:.0f} / {row.peer_peak_bytes / 1e6:.0f}"
    cells = (
        row.work,
        _seconds(row.ours_seconds),
        _seconds(row.peer_seconds),
        "" if row.value is None else f"{row.value:.2f}x",
        "" if row.at_least is None else f"{row.at_least:.2f}x",
        limit,
        memory,
        {True: "ok", False: "NOT", None: ""}[row.ok],
    )
    print(
        "  ".join(f"{cell:<{width}}" for cell, (_, width) in zip(cells, _COLUMNS)).rstrip(), flush=True
    )


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def to_json(rows: list[Row], **facts: Any) -> dict[str, Any]:
    """The table with what it was measured on."""
    return {**facts, "rows": [{**asdict(row), "ok": row.ok} for row in rows]}


def plot(path: Path, rows: list[Row], title: str) -> None:
    """Bars of each row's value, with a mark where it must reach; written atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.value is not None][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = {True: "tab:green", False: "tab:red", None: "tab:grey"}
    axes.barh(
        [f"{row.work} (vs {row.peer})" for row in shown],
        [row.value or 0.0 for row in shown],
        color=[colours[row.ok] for row in shown],
    )
    for y, row in enumerate(shown):
        if row.at_least is not None:
            axes.plot([row.at_least] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
    axes.axvline(1.0, color="grey", linestyle=":")
    axes.tick_params(axis="y", labelsize=7)
    axes.set(title=title, xlabel="times the peer's speed (black: required)", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
