"""Adapter objects kept on disk under their digest: fetched once, checked on every read, bounded in bytes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from common.errors import StorageError
from common.files import digest_file, disk_full
from common.types import ObjectRef

Fetch = Callable[[ObjectRef, Path], Awaitable[None]]
"""Brings an object into a file, checked; see `Connection.fetch`."""


def storage_error(path: Path, error: OSError) -> StorageError:
    """An error of the disk, said plainly."""
    if disk_full(error):
        return StorageError(f"{path}: the disk is full; free some space, or lower [cache] max_size in client.toml")
    return StorageError(f"{path}: can't be written: {error.strerror}")


class ObjectCache:
    """Objects in `directory`, at most `limit` bytes of them; the least recently used go first."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit

    def path(self, ref: ObjectRef) -> Path:
        """Where an object lies or would lie. Digests are checked hex (serde), so they are safe in a path."""
        return self.directory / ref.digest

    def holds(self, ref: ObjectRef) -> bool:
        """Whether the object is here with its very bytes; a damaged copy is deleted."""
        path = self.path(ref)
        try:
            if path.stat().st_size == ref.size and digest_file(path) == ref.digest:
                os.utime(path)
                return True
            path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error(path, error) from None
        return False

    async def get(self, ref: ObjectRef, fetch: Fetch, keep: frozenset[str] = frozenset()) -> Path:
        """The object's file, fetched when it is missing or damaged. `keep`: digests that must not be evicted now.

        Raises StorageError when the disk is full, and whatever `fetch` raises.
        """
        path = self.path(ref)
        if not await asyncio.to_thread(self.holds, ref):
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._evict(ref.size, keep | {ref.digest})
                await fetch(ref, path)
            except OSError as error:
                raise storage_error(path, error) from None
        return path

    def _evict(self, room: int, keep: frozenset[str]) -> None:
        """Make `room` bytes within the limit, oldest first; partial fetches count and go like the others."""
        found = []
        for path in self.directory.iterdir():
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
        held = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held + room <= self.limit:
                return
            if path.name.removesuffix(".part") not in keep:
                path.unlink(missing_ok=True)
                held -= size
