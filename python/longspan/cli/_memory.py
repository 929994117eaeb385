"""The process's memory: what is kept of it, and its peak during a piece of work."""

import ctypes
import gc
import sys
import threading
from types import TracebackType


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for what is asked for next; whether it does.

    By default a tensor of some megabytes gets new memory, which goes back to the system with it, and
    the system clears every page anew: a fifth of the time of a pass over 16384 tokens. What
    ``MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0`` in the environment says, for this process.

    Example::

        keep_freed_memory()
    """
    trim_threshold, mmap_max = -1, -4  # glibc's names are M_TRIM_THRESHOLD and M_MMAP_MAX
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(trim_threshold, -1)) and bool(mallopt(mmap_max, 0))


class PeakMemory:
    """Context manager: the greatest rise of resident memory over what it was at entry, in bytes.

    A thread samples the resident set every 2 ms, so what lives shorter than that can be missed, and
    what the allocator kept from earlier work and now reuses is not a rise; at entry garbage is
    collected and glibc's free memory goes back to the system, to keep that small.

    Example::

        with PeakMemory() as memory:
            torch.randn(1000, 1000, 10)
        memory.bytes  # 40 million, and a little
    """

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._start = self._peak = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)
        self._start = self._peak = self._resident()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the measurement before the block does; a second call changes nothing."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._peak = max(self._peak, self._resident())

    @property
    def bytes(self) -> int:
        """The greatest rise so far."""
        return self._peak - self._start

    def _resident(self) -> int:
        return self._process.memory_info().rss

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, self._resident())
