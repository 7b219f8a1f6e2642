"""Activations between two visits of a layer: in memory while they fit, on disk beyond that."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from common.errors import StorageError
from common.faults import fault
from fp_client.tensors import bytes_view


class Spill:
    """A shelf of tensors by key. Up to `memory` bytes stay in memory, what comes after goes to one file."""

    def __init__(self, memory: int, directory: Path, device: torch.device | str = "cpu") -> None:
        """`memory` < 0: everything stays in memory. The file has no name and goes with the process."""
        self.memory, self.directory, self.device = memory, directory, torch.device(device)
        self.held = 0
        """Bytes in memory."""
        self.spilled = 0
        """Bytes of the file."""
        self._inside: dict[Hashable, torch.Tensor] = {}
        self._outside: dict[Hashable, tuple[int, torch.Size, torch.dtype]] = {}
        self._free: dict[int, list[int]] = {}
        self._file: int | None = None

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep a tensor; it must not be changed afterwards. Raises StorageError when the disk is full."""
        size = tensor.numel() * tensor.itemsize
        if self.memory < 0 or self.held + size <= self.memory:
            self._inside[key] = tensor
            self.held += size
            return
        at = self._slot(size)
        view, done = bytes_view(tensor.detach().cpu().contiguous()), 0
        with self._failing("spilled"):
            fault("worker.spill.write")
            while done < size:
                done += os.pwrite(self._opened(), view[done:], at + done)
        self._outside[key] = (at, tensor.shape, tensor.dtype)

    def get(self, key: Hashable) -> torch.Tensor:
        """The tensor, which stays on the shelf. Raises KeyError, and StorageError when the disk does not give it back."""
        if key in self._inside:
            return self._inside[key]
        at, shape, dtype = self._outside[key]
        out = torch.empty(shape, dtype=dtype)
        view, done = bytes_view(out), 0
        with self._failing("read back"):
            fault("worker.spill.read")
            while done < len(view):
                got = os.preadv(self._opened(), [view[done:]], at + done)
                if got == 0:
                    raise StorageError(f"{self.directory}: spilled activations have been cut short")
                done += got
        return out.to(self.device)

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = "the disk is full: free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise StorageError(f"{self.directory}: activations can't be {what}: {why}") from None

    def take(self, key: Hashable) -> torch.Tensor:
        """The tensor, and its place is free again. Raises KeyError."""
        out = self.get(key)
        if key in self._inside:
            del self._inside[key]
            self.held -= out.numel() * out.itemsize
        else:
            at, _, _ = self._outside.pop(key)
            self._free.setdefault(out.numel() * out.itemsize, []).append(at)
            if not self._outside:  # other sizes may come next (rows of another length), and places of these are no use to them
                self._free.clear()
                self.spilled = 0
        return out

    def _slot(self, size: int) -> int:
        if self._free.get(size):
            return self._free[size].pop()
        at, self.spilled = self.spilled, self.spilled + size
        return at

    def _opened(self) -> int:
        if self._file is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115  (closed in `close`)
            self._file = os.dup(file.fileno())
            file.close()
        return self._file

    def close(self) -> None:
        """Drop everything."""
        self._inside.clear()
        self._outside.clear()
        self._free.clear()
        self.held = self.spilled = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
