"""Memory that is read again and again, such as a cache of keys."""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE = 2 << 20  # bytes of a huge page


def empty_to_keep(
    shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    """`torch.empty`, for much of it in huge pages, where the system gives them to who asks (Linux).

    A step of decoding reads a cache once and whole; in pages of 4 KiB it would look up each of them
    anew, for a sixth of the time. Memory from malloc is often used memory, whose pages are small
    already, so that this is mapped.

    Example::

        empty_to_keep((1, 8, 4096, 64), torch.bfloat16, torch.device("cpu"))
    """
    x = torch.empty(0, dtype=dtype, device=device)
    size = math.prod(shape) * x.element_size()
    fake = type(x) is not Tensor  # without memory
    if fake or x.device.type != "cpu" or size < 2 * _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)  # a hint
    begin = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % _HUGE
    return torch.frombuffer(memory, dtype=x.dtype, count=math.prod(shape), offset=begin).view(*shape)
