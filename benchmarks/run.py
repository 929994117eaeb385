"""Measure longspan beside its peers: ``python benchmarks/run.py [family ...] [--quick]``.

Each family is a module of this folder; without names all of them run. Results of both sides are
compared before anything is timed. Writes results/<family>.json after each row, so that a stopped run
keeps its rows, and results/<family>.png; exits with 1 if a result was wrong.
"""

import argparse
import importlib
import sys
from dataclasses import asdict
from pathlib import Path

import _measure
import torch

import longspan
from longspan._files import write_json

FOLDER = Path(__file__).parent


def families() -> list[str]:
    return sorted(
        path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_") and path.stem != "run"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="family", help=", ".join(families()))
    parser.add_argument("--quick", action="store_true", help="fewer repetitions of the same problems")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains this")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: ./results")
    args = parser.parse_args()
    for name in args.families:
        if name not in families():
            parser.error(f"family: expected one of {', '.join(families())}, got {name}")
    args.out.mkdir(parents=True, exist_ok=True)

    bench = _measure.Bench(args.threads, args.quick)
    limits = {key: value for key, value in asdict(bench.limits).items() if value is not None}
    print(
        f"longspan {longspan.__version__} ({longspan.isa()}), torch {torch.__version__}; "
        f"limits: {limits}"
    )
    wrong = False
    for family in args.families or families():
        print(f"\n{family}")
        _measure.print_header()
        rows: list[_measure.Row] = []
        for work, measure in importlib.import_module(family).cases():
            if args.only not in work:
                continue
            try:
                row = measure(bench)
            except Exception as error:  # one that does not run must not cost the rows after it
                row = _measure.Row(error=f"raised {type(error).__name__}: {error}")
            row.work = work
            rows.append(row)
            wrong |= bool(row.error)
            _measure.print_row(row)
            facts = {"torch": torch.__version__, "longspan": longspan.__version__, "isa": longspan.isa()}
            write_json(args.out / f"{family}.json", _measure.to_json(rows, limits=limits, **facts))
        if rows:
            title = f"{family}: longspan against its peers, {args.threads} threads"
            _measure.plot(args.out / f"{family}.png", rows, title)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
