"""Autograd for the operators, by torch.library, with little overhead.

``torch.library.register_autograd`` builds a fresh ``autograd.Function`` and walks pytrees on every
call: measured on one attention of 16 tokens, 185 us forward and backward, where SDPA takes 65. The
same registration with a Function of our own takes 90.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

# An ordinary Function hands itself to functorch (torch.func.grad, vmap) first. At the dispatcher's
# autograd key functorch is already through, one level a call, so the base is the plain one.
OperatorFunction: Any = _SingleLevelFunction

_library = torch.library.Library("longspan", "IMPL")


def overload(name: str) -> Callable[..., Any]:
    """``torch.ops.longspan.<name>.default``, typed."""
    return getattr(torch.ops.longspan, name).default


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """Call the operator's kernel (or fake), past its autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def wants_gradient(args: tuple[Any, ...]) -> bool:
    """Whether autograd must record a call with these arguments.

    Inside forward-mode differentiation always: an `OperatorFunction` has no jvp, and says so.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(
        isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
    )


def register_autograd(name: str, function: Any) -> None:
    """Make ``function`` the derivative of ``longspan::name``; its forward calls `below_autograd`."""
    op = overload(name)

    def kernel(*args: Any) -> Any:
        if not wants_gradient(args):
            return below_autograd(op, *args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*args)
        return function.apply(*args)

    _library.impl(name, kernel, "Autograd")


def register_once_differentiable(name: str) -> None:
    """Let ``longspan::name``, a backward, be called while a graph is kept; a second derivative raises.

    torch.func.grad always keeps a graph, so the call itself must not raise.
    """
    op = overload(name)

    class Once(OperatorFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return below_autograd(op, *args)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError(f"longspan.{name}: this operator has no second derivative")

    register_autograd(name, Once)


def register_attention(name: str, tensors: int) -> None:
    """Make ``longspan::<name>_backward`` the derivative of ``longspan::<name>_forward``.

    The forward takes q, k and v, further arguments without gradients, ``tensors`` of all being tensors
    or None and the first ones, and gives (out, lse). The backward takes the gradients of both (None for
    that of lse where there is none), then q, k, v, out, lse and the further arguments.
    """
    forward_op, backward_op = overload(f"{name}_forward"), overload(f"{name}_backward")

    class Attention(OperatorFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = below_autograd(forward_op, *args)
            ctx.save_for_backward(*args[:3], *output, *args[3:tensors])
            ctx.scalars = args[tensors:]
            ctx.set_materialize_grads(False)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            d_out, d_lse = gradients
            q, k, v, out, lse, *rest = ctx.saved_tensors
            d_out = torch.zeros_like(out) if d_out is None else d_out
            found = backward_op(d_out, d_lse, q, k, v, out, lse, *rest, *ctx.scalars)
            return *found, *([None] * (len(rest) + len(ctx.scalars)))

    register_autograd(f"{name}_forward", Attention)
    register_once_differentiable(f"{name}_backward")


def register_not_differentiable(name: str, why: str) -> None:
    """Make ``longspan::name``, which writes in place, raise where its gradient would be wanted."""
    op = overload(name)

    def kernel(*args: Any) -> Any:
        if wants_gradient(args):
            raise RuntimeError(f"longspan.{name}: {why}")
        return below_autograd(op, *args)

    _library.impl(name, kernel, "Autograd")
