"""Show the version, the instruction set in use, the compiler, torch and its threads."""

import argparse
import platform

import torch

import longspan
from longspan import _C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``info`` has no options."""


def run(args: argparse.Namespace) -> int:
    """Print what a bug report should begin with, one fact a line."""
    facts = {
        "longspan": longspan.__version__,
        "isa": longspan.isa(),
        "isa levels": ", ".join(_C.isa_levels()),
        "compiler": _C.compiler,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0
