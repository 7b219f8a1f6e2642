"""Disk that updates on their way in may take: bounded over all devices, and never the last of it, which the log needs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from common.errors import LimitError, StorageError
from fp_server.limits import ServerLimits
from fp_server.objects import storage_error


class Quota:
    """Room for arrivals below one directory, a folder a device. A device has one update at a time, so at most that much each."""

    def __init__(self, directory: Path, limits: ServerLimits) -> None:
        self._directory, self._limits = directory, limits
        self._arriving: dict[object, tuple[str, int]] = {}
        """Each under a key of its own: what one that was broken off leaves must not be taken for the next one of its device."""
        self._touched: set[str] | None = None
        """Devices that may have bytes there; None before the first look. Not everybody who was ever drawn, and has a folder."""
        self._lock = threading.Lock()

    @contextlib.asynccontextmanager
    async def held(self, device: str, size: int) -> AsyncIterator[None]:
        """Keep room for an update of that size while it arrives. Raises LimitError or StorageError; the device tries again."""
        place = object()
        taking = asyncio.ensure_future(asyncio.to_thread(self._take, place, device, size))
        try:
            await asyncio.shield(taking)
            yield
        finally:
            if taking.done():
                self._arriving.pop(place, None)
            else:  # broken off: the thread will take it all the same
                taking.add_done_callback(lambda done: self._given_up(place, done))

    def fits(self, size: int) -> bool:
        """Whether there is room for an update of that size when no other is on its way: who waits for it waits for others."""
        return size <= self._limits.arrival_bytes

    def _given_up(self, place: object, taking: asyncio.Future[None]) -> None:
        self._arriving.pop(place, None)
        if not taking.cancelled():
            taking.exception()  # nobody is left to hear it

    def _take(self, place: object, device: str, size: int) -> None:
        with self._lock:
            self._check(device, size)
            self._arriving[place] = device, size
            if self._touched is not None:
                self._touched.add(device)

    def _check(self, device: str, size: int) -> None:
        try:
            there = self._there()
            free = shutil.disk_usage(self._directory).free
        except OSError as error:
            raise storage_error(self._directory, error) from None
        announced = {
            **there,
            **{one: max(bytes_, there.get(one, 0)) for one, bytes_ in list(self._arriving.values())},
            device: size,
        }
        total, most = sum(announced.values()), self._limits.arrival_bytes
        if total > most:
            raise LimitError(
                f"updates on their way in would take {_mib(total)}, and server.toml allows {_mib(most)} (limits.arrival_bytes)"
            )
        missing = sum(bytes_ - min(bytes_, there.get(one, 0)) for one, bytes_ in announced.items())
        if free - missing < (kept := self._limits.disk_reserve_bytes):
            raise StorageError(
                f"{self._directory}: {_mib(free)} are free, {_mib(missing)} are on their way, and the server keeps {_mib(kept)} "
                "for its log (limits.disk_reserve_bytes); free some space, what was stored before is kept"
            )

    def _there(self) -> dict[str, int]:
        """Device -> its bytes that have come; of a device without any, nothing or 0. Raises OSError."""
        if self._touched is None:
            with os.scandir(self._directory) as folders:
                self._touched = {folder.name for folder in folders}
        arriving = {device for device, _ in list(self._arriving.values())}  # before the looks: it may end during them
        there = {device: _size(self._directory / device) for device in self._touched}
        self._touched = arriving | {device for device, size in there.items() if size}
        return there


def _mib(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count} {'byte' if count == 1 else 'bytes'}"


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; files and folder may go meanwhile."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # adopted or dropped
                total += file.stat().st_size
    return total
