"""How much memory a task takes, measured the same way everywhere.

Main memory: the kernel's high-water mark of the process (VmHWM), reset before the task, above the
footprint of the warmed worker. VRAM: the CUDA allocator's peak.
"""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from common.errors import WorkerError

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _status(key: str) -> int:
    """A memory figure of this process, in bytes."""
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match is None:
        raise WorkerError(f"{_STATUS} has no {key}: memory can only be measured on Linux")
    return int(match[1]) * 1024


def resident() -> int:
    """Main memory this process holds now, in bytes."""
    return _status("VmRSS")


def data_size() -> int:
    """Private writable address space of this process, in bytes: what RLIMIT_DATA bounds."""
    return _status("VmData")


def limit(above: int) -> None:
    """From now on, an allocation that would take this process more than `above` bytes beyond what it has now fails.

    The kernel counts private writable address space (RLIMIT_DATA), touched or not. Such an allocation then raises
    MemoryError or torch's RuntimeError, instead of waking the machine's out-of-memory killer.
    """
    bound = data_size() + above
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        bound = min(bound, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))


def trim() -> None:
    """Collect garbage and give freed heap pages back to the kernel."""
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc; musl returns pages by itself
            libc.malloc_trim(0)


class _Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2`` (mallinfo(3))."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )


def heap_holes() -> int:
    """Free bytes in the heap, below something that is in use. They may hold no memory, but what is allocated there later is
    not given back when it is freed. 0 where the C library doesn't say (glibc from 2.33 on does)."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    return int(mallinfo().fordblks)


def footprint() -> int:
    """Bytes resident with nothing to spare: the zero that a task's peak is counted from."""
    trim()
    return resident()


class Peak:
    """The most memory held inside the block, above `baseline` (by default, what is resident on entry).

    `host` and `device` are bytes after the block, `bytes` the one the budget is about. On CUDA the
    allocator's peak is counted from zero: a worker holds nothing there between tasks.
    """

    def __init__(self, device: str = "cpu", baseline: int | None = None) -> None:
        self.cuda = device.startswith("cuda")
        self.baseline = baseline
        self.host = self.device = 0

    @property
    def bytes(self) -> int:
        """VRAM on CUDA, main memory on the CPU."""
        return self.device if self.cuda else self.host

    def __enter__(self) -> Self:
        trim()
        if self.baseline is None:
            self.baseline = resident()
        try:
            _CLEAR.write_text("5")  # resets VmHWM to what is resident now (proc(5))
        except OSError as error:
            raise WorkerError(f"{_CLEAR} can't be written ({error.strerror}): the peak can't be measured here") from None
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.host = max(0, _status("VmHWM") - (self.baseline or 0))
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            self.device = torch.cuda.max_memory_allocated()
