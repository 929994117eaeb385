"""`computed_again`: let the backward compute a tensor again rather than keep it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_WORTH_IT = 1 << 19  # bytes; below, the hooks cost more time than memory is worth


def computed_again(
    *tensors: tuple[Tensor, Callable[[], Tensor]], enabled: bool = True
) -> AbstractContextManager[object]:
    """A context in which autograd, where it would keep one of ``tensors``, keeps how to make it.

    Unlike ``torch.utils.checkpoint`` only these tensors are made again, not the scan that reads them,
    and the backward may run more than once.

    Does nothing for small tensors, without gradients, or where something else decides what is kept:
    torch.compile, a surrounding checkpoint or offloading, torch.func.

    Args:
        tensors: Pairs of a tensor and a function that gives its values again, in the same place of
            memory relative to its storage.
        enabled: False does nothing.

    Example::

        u = causal_conv1d(x, weight)
        with computed_again((u, lambda: causal_conv1d(x, weight))):
            y = selective_scan(u, delta, A, B, C)
    """
    if (
        not enabled
        or tensors[0][0].is_meta
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        return nullcontext()
    recipes = {x.untyped_storage().data_ptr(): again for x, again in tensors if x.nbytes >= _WORTH_IT}
    if not recipes:
        return nullcontext()
    device = tensors[0][0].device.type
    autocast = torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
    )

    def pack(x: Tensor) -> Tensor | Callable[[], Tensor]:
        again = recipes.get(x.untyped_storage().data_ptr())
        if again is None:
            return x
        size, stride, offset = x.size(), x.stride(), x.storage_offset()

        def unpack_again() -> Tensor:
            with torch.no_grad(), autocast:
                return again().as_strided(size, stride, offset)

        return unpack_again

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
