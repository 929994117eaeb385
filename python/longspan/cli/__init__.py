"""The ``longspan`` command: one file a subcommand.

Every module of this package whose name has no leading underscore is a subcommand of that name. It has
a docstring (its first line is the help), ``add_arguments(parser)`` and ``run(args) -> int``, the exit
status. Heavy imports (transformers, matplotlib) belong inside ``run``, so that ``--help`` stays quick.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

import longspan
from longspan.cli._errors import CommandError
from longspan.cli._memory import keep_freed_memory


def _subcommands() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longspan", description="Long sequences in PyTorch on the CPU."
    )
    parser.add_argument("--version", action="version", version=f"longspan {longspan.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _subcommands():
        module = importlib.import_module(f"{__name__}.{name}")
        assert module.__doc__ is not None, f"{module.__name__} has no docstring to show as help"
        summary = module.__doc__.strip().splitlines()[0]
        command = commands.add_parser(
            name.replace("_", "-"),
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(command=name, run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 is success; 1, what the subcommand found is not right; 2, it could not begin (the error names the
    option, what was expected and what came); 130, interrupted.

    Args:
        argv: Arguments without the program's name; None is ``sys.argv[1:]``.

    Example::

        longspan.cli.main(["info"])
    """
    args = _parser().parse_args(argv)
    if argv is None:  # the process is this command's
        keep_freed_memory()
    try:
        return args.run(args)
    except CommandError as error:
        print(f"longspan {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nlongspan {args.command}: interrupted", file=sys.stderr)
        return 130
