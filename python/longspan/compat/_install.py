"""`install`: the compat packages under the peers' names."""

import importlib
import pkgutil
import sys
import warnings
from types import ModuleType

_PACKAGES = ("mamba_ssm", "causal_conv1d", "flash_attn", "fla", "fast_transformers")
# What a transformers modeling file binds, once, when it is imported.
_BOUND_ONCE = ("causal_conv1d_fn", "causal_conv1d_update")


def install(*names: str) -> None:
    """Let ``import mamba_ssm`` and the like, in this process, mean longspan's packages.

    Call it before anything imports the peers, transformers' modeling files in particular: those bind
    the functions that they find when they are imported. The modules are put into ``sys.modules``;
    nothing is written to disk, and package metadata stays as it is: ``importlib.metadata`` reports what
    pip has installed. A peer that is installed but not yet imported is hidden for this process.

    Args:
        names: Of "mamba_ssm", "causal_conv1d", "flash_attn", "fla" and "fast_transformers"; none is all
            of them. A second call changes nothing.

    Raises:
        ValueError: A name is not one of these.
        RuntimeError: The real package is already imported: code holds its functions, and only some of
            it would see longspan's. Nothing is installed then.

    Warns:
        UserWarning: transformers' modeling files that would have bound the functions are already
            imported, so they keep what they have.

    Example::

        import longspan.compat

        longspan.compat.install()
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # longspan's
    """
    names = names or _PACKAGES
    for name in names:
        if name not in _PACKAGES:
            raise ValueError(f"install: names: expected some of {', '.join(_PACKAGES)}, got {name!r}")
    found = {name: _modules(name) for name in names}
    for modules in found.values():
        for name, module in modules.items():
            there = sys.modules.get(name)
            if there is not None and there is not module:
                raise RuntimeError(
                    f"install: names: {name} is already imported, from "
                    f"{getattr(there, '__file__', None) or 'elsewhere'}; call install() before that"
                )
    fresh = [name for name in names if name not in sys.modules]
    for modules in found.values():
        sys.modules.update(modules)
    if "mamba_ssm" in fresh or "causal_conv1d" in fresh:
        _warn_of_bound()


def _modules(name: str) -> dict[str, ModuleType]:
    """The compat package of a peer and all below it, by the peer's names."""
    ours = f"longspan.compat.{name}"
    package = importlib.import_module(ours)
    below = pkgutil.walk_packages(package.__path__, f"{ours}.")
    modules = [package, *(importlib.import_module(info.name) for info in below)]
    return {name + module.__name__.removeprefix(ours): module for module in modules}


def _warn_of_bound() -> None:
    bound = [
        name
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.")
        and ".modeling_" in name
        and any(hasattr(module, function) for function in _BOUND_ONCE)
    ]
    if bound:
        warnings.warn(
            f"install: {', '.join(sorted(bound))} already imported: what these bound stays as it is; "
            "call install() before importing them",
            stacklevel=3,
        )
