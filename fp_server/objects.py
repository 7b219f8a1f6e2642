"""The content-addressed object store: immutable files named by their sha256.

An object is written under a temporary name, synced, renamed, and its directory synced before anyone
hears of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from common.errors import DamagedError, DigestError, NotFound, StorageError
from common.faults import fault
from common.files import digest_file, disk_full, make_directory, sync_directory
from common.types import ObjectRef

logger = logging.getLogger("fp_server")

Stamp = tuple[int, int, int, int]
"""Inode, size and times of a file: whatever writes to it changes one of them."""


def stamp_of(file: Path | int) -> Stamp | None:
    """The stamp of a file, by path or descriptor; None when there is none to be had."""
    try:
        seen = os.stat(file)  # noqa: PTH116 -- a descriptor, too
    except OSError:
        return None
    return seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns


def storage_error(path: Path, error: OSError) -> StorageError:
    """The error of ours for a failed write."""
    if disk_full(error):
        return StorageError(f"{path}: no space left on the device; free some, what was stored before is kept")
    return StorageError(f"{path}: {error.strerror}")


def size_of(path: Path) -> int:
    """The size of a file; 0 when it is not there. Raises StorageError."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise storage_error(path, error) from None


@contextlib.contextmanager
def stored(path: Path) -> Iterator[None]:
    """In here files are written: what fails is a StorageError that names the file, or else `path`."""
    try:
        yield
    except OSError as error:
        raise storage_error(Path(error.filename or path), error) from None


class ObjectStore:
    """Objects below `root`/objects, arrivals below `root`/partial, scratch files below `root`/scratch; what is damaged is moved
    to `root`/quarantine."""

    def __init__(self, root: Path, reading: bool = False) -> None:
        """`reading`: make no directory that is not there."""
        self._objects, self.partial, self.scratch = root / "objects", root / "partial", root / "scratch"
        self.quarantine = root / "quarantine"
        self.quarantined: Callable[[str, str], None] = lambda digest, why: None
        """Told of every object that is moved to quarantine, in the thread that found it."""
        self._changing = threading.Lock()
        self._adoptions: dict[str, tuple[int, float]] = {}
        """Digest -> the how-manieth adoption it was, and when by the monotonic clock."""
        self._count = 0
        self._folders: set[str] = set()
        """Of two digits each: those whose entry this process has synced. Who made one may have been killed before that."""
        self.running: dict[str, tuple[str, Stamp, Any]] = {}
        """Device -> what it sent last in part: the digest it announced, the file as it was left, and the digest of that."""
        for path in () if reading else (self._objects, self.partial, self.scratch):
            make_directory(path)

    def clear_scratch(self) -> None:
        """Remove what an interrupted aggregation left; for the one server of the directory only."""
        for leftover in self.scratch.iterdir():
            fault("server.sweep.scratch")
            leftover.unlink()

    def path(self, digest: str) -> Path:
        """Where an object lies. Raises NotFound when it is not here."""
        path = self._objects / digest[:2] / digest
        if not path.exists():
            raise NotFound(f"object {digest[:16]}… is not in the store")
        return path

    def has(self, digest: str) -> bool:
        """Whether the object is here."""
        return (self._objects / digest[:2] / digest).exists()

    def stamp(self, digest: str) -> Stamp | None:
        """By which an object is known to be untouched; None when it is not here."""
        return stamp_of(self._objects / digest[:2] / digest)

    def sound(self, digest: str) -> Path:
        """Where an object lies, whose bytes have just been read and have its digest. Raises DamagedError when they have not, or
        it is missing."""
        path = self._objects / digest[:2] / digest
        try:
            if digest_file(path) == digest:
                return path
        except FileNotFoundError:
            raise DamagedError(f"object {digest[:16]}… is missing") from None
        except OSError as error:
            if error.errno != errno.EIO:
                raise storage_error(path, error) from None
            raise DamagedError(f"object {digest[:16]}… can't be read: {error.strerror}") from None
        raise DamagedError(f"the bytes of object {digest[:16]}… are not what was written")

    def checked(self, digest: str) -> Path:
        """`sound`, for the one server of the directory: a damaged object is in quarantine when this raises."""
        try:
            return self.sound(digest)
        except DamagedError as error:
            with self._changing:
                if self.has(digest):
                    raise DamagedError(f"{error}; moved to {self._isolate(digest, str(error))}") from None
            raise

    def _isolate(self, digest: str, why: str) -> str:
        """Move a damaged object out of the way; where to, seen from the directory."""
        path = self._objects / digest[:2] / digest
        try:
            self.quarantine.mkdir(exist_ok=True)
            taken = {other.name for other in self.quarantine.iterdir()}
            name = next(n for n in (digest, *(f"{digest}.{i}" for i in range(1, len(taken) + 2))) if n not in taken)
            fault("server.quarantine.before")
            path.replace(self.quarantine / name)
            fault("server.quarantine.moved")
            sync_directory(path.parent)
        except OSError as error:
            raise storage_error(path, error) from None
        logger.error("%s; moved to quarantine/%s", why, name)
        self.quarantined(digest, why)
        return f"quarantine/{name}"

    def stored(self) -> dict[str, int]:
        """Digest -> size of every object that is here."""
        found: dict[str, int] = {}
        for path in self._objects.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                found[path.name] = path.stat().st_size
        return found

    def adopt(self, source: Path, digest: str | None = None, kind: str = "update") -> ObjectRef:
        """Move a finished file into the store; durable when this returns.

        `digest` is trusted when given: the caller has just computed it from these bytes. `kind`: update, ledger or broadcast.
        """
        try:
            digest = digest or digest_file(source)
        except OSError as error:
            raise storage_error(source, error) from None
        with self._changing:
            self._count += 1
            self._adoptions[digest] = self._count, time.monotonic()
            return self._adopt(source, digest, kind)

    @property
    def mark(self) -> int:
        """How many objects were adopted so far: what `discard` counts by."""
        return self._count

    def discard(self, digests: Iterable[str], mark: int) -> None:
        """Remove objects nothing refers to any more, unless they were adopted again after `mark` was taken."""
        for digest in digests:
            with self._changing:
                if self._adoptions.get(digest, (0, 0.0))[0] <= mark:
                    self._adoptions.pop(digest, None)
                    fault("server.object.discard")
                    (self._objects / digest[:2] / digest).unlink(missing_ok=True)

    def sweep(self, wanted: Collection[str], arriving: Collection[str], before: float | None = None) -> int:
        """Remove all objects but `wanted`, and what came in part from devices not in `arriving`; how many objects.

        `before`: of the monotonic clock, by default now; what was adopted later stays. It must be no later than the moment at
        which `wanted` was known: this may have waited for its thread, and events have come meanwhile that refer to other objects.
        """
        before, removed = time.monotonic() if before is None else before, 0
        for path in self._objects.glob("??/*"):
            with self._changing:
                if path.name not in wanted and self._adoptions.get(path.name, (0, 0.0))[1] <= before:
                    fault("server.sweep.object")
                    path.unlink(missing_ok=True)
                    self._adoptions.pop(path.name, None)
                    removed += 1
        self.sweep_arrivals(arriving, time.time() - (time.monotonic() - before))
        return removed

    def sweep_arrivals(self, arriving: Collection[str], before: float) -> None:
        """Remove what came in part, before a time (seconds since the epoch), from devices that are not expected to push."""
        for directory in self.partial.iterdir():
            if directory.name not in arriving:
                for path in directory.iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        if path.stat().st_mtime <= before:
                            fault("server.sweep.arrival")
                            path.unlink()

    def _adopt(self, source: Path, digest: str, kind: str) -> ObjectRef:
        try:
            size = source.stat().st_size
            target = self._objects / digest[:2] / digest
            if digest[:2] not in self._folders:
                target.parent.mkdir(exist_ok=True)
                fault("server.object.folder")
                sync_directory(self._objects)
                self._folders.add(digest[:2])
            if target.exists() and digest_file(target) != digest:
                self._isolate(digest, f"the bytes of object {digest[:16]}… are not what was written")
            if target.exists():
                sync_directory(target.parent)  # whoever moved it there may have been killed before this
                source.unlink()
                return ObjectRef(digest, size)
            fault("server.object.finished", kind)
            with source.open("rb") as file:
                os.fsync(file.fileno())
            fault("server.object.synced", kind)
            source.replace(target)
            fault("server.object.renamed", kind)
            target.chmod(0o444)
            sync_directory(target.parent)
            fault("server.object.stored", kind)
        except OSError as error:
            raise storage_error(source, error) from None
        return ObjectRef(digest, size)

    def chunks(self, digest: str, offset: int, size: int) -> Iterator[bytes]:
        """An object's bytes from `offset` on, `size` at a time."""
        try:
            file = self.path(digest).open("rb")
        except FileNotFoundError:  # removed in this moment
            raise NotFound(f"object {digest[:16]}… is not in the store any more") from None
        with file:
            file.seek(offset)
            while chunk := file.read(size):
                yield chunk

    def arrival(self, device: str, ref: ObjectRef) -> Arrival:
        """The arrival of one object from one device; goes on where an earlier one stopped."""
        return Arrival(self, self.partial / device, ref)

    def arrived(self, device: str, ref: ObjectRef) -> int:
        """How many bytes of an object have arrived from a device; nothing is touched. Raises StorageError."""
        return size_of(self.partial / device / ref.digest)

    def discard_arrivals(self, device: str) -> None:
        """Remove what a device has sent in part."""
        for path in (self.partial / device).glob("*"):
            path.unlink(missing_ok=True)


class Arrival:
    """An object on its way in: a file that grows, and the running digest of what it holds."""

    def __init__(self, store: ObjectStore, directory: Path, ref: ObjectRef) -> None:
        self._store, self.ref = store, ref
        self.path = directory / ref.digest
        try:
            directory.mkdir(exist_ok=True)
            for other in directory.glob("*"):  # a device has one update at a time
                if other.name != ref.digest:
                    other.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(directory, error) from None
        self._file: FileIO | None = None
        self._hash, self._hashed = hashlib.sha256(), 0
        self._using = threading.Lock()  # a push that was broken off is closed while a thread may still be writing for it

    @property
    def offset(self) -> int:
        """How many bytes have arrived. Raises StorageError."""
        return size_of(self.path)

    @property
    def expected(self) -> int:
        """Where a push must begin: what `open` will return, without reading what is there."""
        return have if (have := self.offset) <= self.ref.size else 0

    def open(self) -> int:
        """Get ready to append; returns the offset. Reads what is there to go on with its digest, unless it is as it was left: who
        begins again and again must not have the server read it each time."""
        with self._using:
            self._hash, self._hashed = hashlib.sha256(), 0
            try:
                if self.offset > self.ref.size:
                    self.path.unlink()
                self._file = self.path.open("ab", buffering=0)  # what was written survives a kill of the process
                left = self._store.running.get(self.path.parent.name)
                if left is not None and left[:2] == (self.ref.digest, stamp_of(self.path)):
                    self._hash, self._hashed = left[2].copy(), self.offset
                else:
                    self._read()
            except OSError as error:
                raise storage_error(self.path, error) from None
            return self.offset

    def _read(self) -> None:
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                self._hash.update(chunk)
                self._hashed += len(chunk)

    def write(self, data: bytes) -> None:
        """Append. Raises DigestError when more arrives than was announced, StorageError when the disk is full."""
        with self._using:
            if self._file is None:
                raise DigestError("the push is over")
            if self._file.tell() + len(data) > self.ref.size:
                raise DigestError(f"the push holds more than the {self.ref.size} bytes it announced")
            try:
                fault("server.object.arriving")
                view = memoryview(data)
                while view:
                    view = view[self._file.write(view) :]
                fault("server.object.arrived")
            except OSError as error:
                raise storage_error(self.path, error) from None
            self._hash.update(data)
            self._hashed += len(data)

    def close(self) -> None:
        """Keep what has arrived for a later push."""
        with self._using:
            if self._file is not None:
                file, self._file = self._file, None
                try:
                    stamp = stamp_of(file.fileno())
                    file.close()
                except OSError as error:
                    raise storage_error(self.path, error) from None
                self._store.running.pop(self.path.parent.name, None)
                if stamp is not None and stamp[1] == self._hashed:  # more is there when a write was not whole
                    self._store.running[self.path.parent.name] = self.ref.digest, stamp, self._hash.copy()

    def finish(self) -> Path:
        """All has arrived: the file, checked. Raises DigestError (and drops it) when its digest is wrong,
        or (keeping it) when it is not complete."""
        self.close()
        if self.offset != self.ref.size:
            raise DigestError(f"the push ended at byte {self.offset} of {self.ref.size}; go on from there")
        if self._hash.hexdigest() != self.ref.digest:
            self.path.unlink()
            raise DigestError(
                f"the bytes received do not have the digest {self.ref.digest[:16]}… that was announced; send them again"
            )
        return self.path

    def adopt(self) -> ObjectRef:
        """Move the finished file into the store."""
        return self._store.adopt(self.path, self.ref.digest)

    def discard(self) -> None:
        """Drop what has arrived."""
        self.close()
        self.path.unlink(missing_ok=True)
