"""Autograd for the operators, by torch.library, with little overhead.

``torch.library.register_autograd`` builds a fresh ``autograd.Function`` and walks pytrees on every
call: measured on one attention of 16 tokens, 185 us forward and backward, where SDPA takes 65. The
same registration with a Function of our own takes 90.
"""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("longspan", "IMPL")


def overload(name: str) -> Callable[..., Any]:
    """``torch.ops.longspan.<name>.default``, typed."""
    return getattr(torch.ops.longspan, name).default


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """Call the operator's kernel (or fake), past its autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def wants_gradient(args: tuple[Any, ...]) -> bool:
    """Whether autograd must record a call with these arguments."""
    return torch.is_grad_enabled() and any(
        isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
    )


def register_autograd(name: str, function: type[torch.autograd.Function]) -> None:
    """Make ``function`` the derivative of ``longspan::name``; its forward calls `below_autograd`."""
    op = overload(name)

    def kernel(*args: Any) -> Any:
        return function.apply(*args) if wants_gradient(args) else below_autograd(op, *args)

    _library.impl(name, kernel, "Autograd")


def register_not_differentiable(name: str, why: str) -> None:
    """Make ``longspan::name`` raise where its gradient would be wanted."""
    op = overload(name)

    def kernel(*args: Any) -> Any:
        if wants_gradient(args):
            raise RuntimeError(f"longspan.{name}: {why}")
        return below_autograd(op, *args)

    _library.impl(name, kernel, "Autograd")
