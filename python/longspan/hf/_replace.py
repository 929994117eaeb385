"""Forwards put in place of a module's own, and the way back."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

# Where a module's own forward may lie: accelerate's hooks (device maps) move it to the second.
_SLOTS = ("forward", "_old_forward")


class Replacement(functools.partial[Any]):
    """A forward bound to its module, in place of the class's; copied and pickled with the module."""

    replaced: Any = None  # what the slot held before, if it was not the class's own
    of_class: str = ""


def replace_forward(module: nn.Module, forward: Callable[..., Any], **options: Any) -> None:
    """Put ``forward``, called with the module first and ``options``, in place of the module's own.

    A replacement that is there already gives way, and what it had replaced is what `give_back` restores.
    """
    ours = Replacement(forward, module, **options)
    ours.of_class = type(module).__name__
    ours.replaced = patched_forward(module)
    setattr(module, _slot(module), ours)


def patched_forward(module: nn.Module) -> Any:
    """What stands in the place of the class's own forward and is no replacement; None for nothing."""
    before = module.__dict__.get(_slot(module))
    if isinstance(before, Replacement):
        return before.replaced
    return None if getattr(before, "__func__", None) is type(module).forward else before


def _slot(module: nn.Module) -> str:
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def as_keywords(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decoder's arguments by name, ``args`` those of ``names``, and its cache as ``cache``."""
    kwargs = {**kwargs, **dict(zip(names, args))}
    cache = kwargs.pop("past_key_values", None)
    return kwargs if cache is None else {**kwargs, "cache": cache}


def replacements(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Replacement]]:
    """Each replacement that is in place now, with its module and slot."""
    for module in modules:
        for slot in _SLOTS:
            found = module.__dict__.get(slot)
            if isinstance(found, Replacement):
                yield module, slot, found


def give_back(modules: Iterable[nn.Module]) -> None:
    """Give every module its own forward back; harmless where that was done before."""
    for module, slot, found in list(replacements(modules)):
        if found.replaced is not None:
            setattr(module, slot, found.replaced)
        elif slot == "forward":
            del module.__dict__[slot]
        else:
            setattr(module, slot, type(module).forward.__get__(module))


def known_class(kind: type[nn.Module], known: Iterable[str]) -> str | None:
    """The name, as ``llama.LlamaModel``, of the class of transformers whose forward this one has.

    Its own or inherited; None where that is not among ``known``.
    """
    for base in kind.__mro__:
        if "forward" in vars(base):
            package, _, module = base.__module__.rpartition(".modeling_")
            name = f"{module}.{base.__qualname__}"
            return name if package == f"transformers.models.{module}" and name in known else None
    return None


def unchanged_decoder(function: str, model: Any, known: Iterable[str]) -> Any:
    """The one module in ``model`` whose class is among ``known``; `function` says who asks.

    Raises:
        TypeError: ``model`` is no torch module.
        ValueError: There is none or more than one, or its forward was replaced already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model: expected a torch module, got {type(model).__name__}")
    known = tuple(known)
    found = [module for module in model.modules() if known_class(type(module), known)]
    if len(found) != 1:
        names = ", ".join(name.split(".")[1] for name in known)
        raise ValueError(
            f"{function}: model: expected one decoder in it out of {names}, found {len(found)} in "
            f"{type(model).__name__}"
        )
    decoder: Any = found[0]
    if any(replacements([decoder, decoder.rotary_emb])):
        raise ValueError(
            f"{function}: model: expected one that is neither extended nor linearized, got one that "
            "is; call undo() of what extend_context or linearize returned first"
        )
    return decoder


class Shared:
    """What parts of one model share. A copy of it is itself: copied models go on with their caches."""

    def __copy__(self: "_Self") -> "_Self":
        """Itself."""
        return self

    def __deepcopy__(self: "_Self", memo: dict[int, Any]) -> "_Self":
        """Itself."""
        return self


_Self = TypeVar("_Self")


class Undoable:
    """What was done to a model: undone by `undo`, or on leaving it as a context."""

    def undo(self) -> None:
        """Put back what was there before; harmless where that was done already."""
        raise NotImplementedError

    def __enter__(self: _Self) -> _Self:
        """Leave the model as it is until the context is left."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Undo, also after an error."""
        self.undo()
