"""Describe a sparse attention pattern, and draw it.

Prints what the pattern costs: the share of the score matrix in blocks that attention visits, how many
blocks those are, and what the mask itself takes. --png draws it, queries downwards and keys to the
right.

  longspan mask longformer --length 1024 --window 128 --global-tokens 0 --png mask.png
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longspan import patterns
from longspan._files import write_atomically
from longspan.cli._errors import CommandError, require
from longspan.patterns import BlockMask


def _positions(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text}") from error


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _window(a: argparse.Namespace) -> BlockMask:
    return patterns.dilated_window(
        a.length, window=(a.left, a.right), dilation=a.dilation, block_size=a.block_size
    )


def _longformer(a: argparse.Namespace) -> BlockMask:
    return patterns.longformer(
        a.length,
        window=a.window,
        global_tokens=a.global_tokens,
        dilation=a.dilation,
        causal=a.causal,
        block_size=a.block_size,
    )


def _bigbird(a: argparse.Namespace) -> BlockMask:
    return patterns.bigbird(
        a.length,
        block_size=a.block_size,
        num_random_blocks=a.random_blocks,
        heads=a.heads,
        seed=a.seed,
        extra_tokens=a.extra_tokens,
    )


def _sparse_transformer(a: argparse.Namespace) -> BlockMask:
    return patterns.sparse_transformer(
        a.length,
        stride=a.stride,
        mode=a.mode,
        summary=a.summary,
        heads=a.heads,
        block_size=a.block_size,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each pattern, with the options that it has."""
    kinds = parser.add_subparsers(title="patterns", metavar="PATTERN", dest="pattern", required=True)

    def pattern(name: str, build: Callable[[argparse.Namespace], BlockMask], text: str) -> Any:
        kind = kinds.add_parser(name, help=text, description=text)
        kind.set_defaults(build=build)
        kind.add_argument("--length", type=int, required=True, help="tokens")
        kind.add_argument("--block-size", type=int, default=64, help="default: 64")
        kind.add_argument("--head", type=int, default=0, help="the head to draw; default: 0")
        kind.add_argument("--png", type=Path, help="draw it into this file")
        return kind

    kind = pattern("window", _window, "keys around each token")
    kind.add_argument("--left", type=int, default=-1, help="keys before; -1: all; default: -1")
    kind.add_argument("--right", type=int, default=-1, help="keys after; 0: causal; default: -1")
    kind.add_argument("--dilation", type=int, default=1, help="between the keys; default: 1")
    kind = pattern("longformer", _longformer, "a window and global tokens")
    kind.add_argument("--window", type=int, required=True, help="total width, even")
    kind.add_argument("--global-tokens", type=_positions, default=[0], help="as 0,7,9; default: 0")
    kind.add_argument("--dilation", type=int, default=1, help="between the window's keys; default: 1")
    kind.add_argument("--causal", action="store_true", help="leave out what looks ahead")
    kind = pattern("bigbird", _bigbird, "neighbouring, random and global blocks")
    kind.add_argument("--random-blocks", type=int, default=3, help="default: 3")
    kind.add_argument("--heads", type=int, default=1, help="each draws its own; default: 1")
    kind.add_argument("--seed", type=int, default=0, help="of the random blocks; default: 0")
    kind.add_argument("--extra-tokens", type=int, default=0, help="global ones in front; default: 0")
    kind = pattern("sparse-transformer", _sparse_transformer, "strided or fixed factors, causal")
    kind.add_argument("--stride", type=int, required=True, help="about the root of the length")
    kind.add_argument("--mode", choices=["strided", "fixed"], default="strided", help="default: strided")
    kind.add_argument("--summary", type=int, default=8, help="of mode fixed; default: 8")
    kind.add_argument("--heads", type=_words, help="as local,strided; default: both in every head")


def run(args: argparse.Namespace) -> int:
    """Build the mask, print its facts, draw it."""
    if args.png is not None:
        require("matplotlib", "'longspan[train]'")
        if not args.png.absolute().parent.is_dir():
            raise CommandError(f"--png: expected a file in a folder that is there, got {args.png}")
    try:
        mask = args.build(args)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if not 0 <= args.head < mask.heads:
        raise CommandError(f"--head: expected 0 to {mask.heads - 1}, got {args.head}")
    lists = (mask.row_begins, mask.columns, mask.row_patterns, mask.column_begins, mask.rows)
    size = sum(x.numel() * x.element_size() for x in (*lists, mask.column_patterns, mask.bits))
    whole = int(torch.count_nonzero(mask.row_patterns == 0))
    facts = {
        "tokens": f"{mask.shape[0]} x {mask.shape[1]}, heads {mask.heads}",
        "density": f"{mask.density:.4f} of the scores are in visited blocks",
        "blocks": f"{len(mask.columns)}, {whole} of them whole, of "
        f"{mask.block_size[0]} x {mask.block_size[1]}",
        "memory": f"{size / 1024:.0f} KiB",
    }
    for name, value in facts.items():
        print(f"{name:<8} {value}")
    if args.png is not None:
        figure = mask.plot(head=args.head)
        write_atomically(args.png, lambda path: figure.savefig(path, dpi=150, format="png"))
        print(f"wrote {args.png}")
    return 0
