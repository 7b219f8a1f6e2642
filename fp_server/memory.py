"""The C library's heap, where it is glibc's: one of it, and what a round has left unused given back to the machine."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
"""malloc.h's names for what mallopt sets."""
BIG = 128 << 10
"""Bytes from which a buffer is mapped by itself."""


def pin() -> None:
    """One heap, and every buffer from 128 KiB on mapped by itself. Does nothing where the C library is not glibc.

    Without it a heap a thread and a threshold that grows keep the chunks of eight pushes at once: the process grew by
    90 MiB instead of 38 (benchmarks/transfer.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, BIG), (_M_TRIM_THRESHOLD, BIG)):
            mallopt(option, value)


def give_back() -> None:
    """Give pages that nothing lies on back to the machine. Does nothing where the C library is not glibc.

    glibc gives back only the end of its heap, and after a round something small always lies there: a thousand
    sessions held 5 to 20 MiB of holes (benchmarks/load.py). Takes milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
