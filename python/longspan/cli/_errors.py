"""The error that a subcommand raises where it cannot begin."""

import importlib
from types import ModuleType


class CommandError(Exception):
    """Names the option, what was expected and what came; the command prints it and exits with 2."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or raise CommandError that says how to install it.

    Args:
        module: The name to import.
        extra: longspan's extra that brings it, or the pip command's arguments.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CommandError(
            f"{module} is needed ({error}); install it with `pip install {extra}`"
        ) from error
