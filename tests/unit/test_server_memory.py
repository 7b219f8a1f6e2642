"""The server's heap: holes between what lives are given back (a process of its own: the heap is the whole process's)."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

from fp_server import memory

HOLES = """
import ctypes, json, sys
from pathlib import Path
from fp_server import memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

memory.pin()
chunks = []
for _ in range(1024):
    chunks.append(libc.malloc(64 << 10))
    ctypes.memset(chunks[-1], 1, 64 << 10)
full = resident()
for chunk in chunks[:-1]:  # the last one stays, at the heap's end
    libc.free(chunk)
holes = resident()
memory.give_back()
print(json.dumps([full, holes, resident()]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_holes_below_the_heaps_end_are_given_back() -> None:
    said = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=60)
    full, holes, after = json.loads(said.stdout)
    assert full - holes < 4 << 20, "glibc gives the holes back by itself: give_back has nothing to do"
    assert holes - after > 56 << 20


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    memory.pin()
    memory.give_back()
