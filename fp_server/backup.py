"""A consistent copy of a data directory, made while its server works: `fp-server backup`.

The log is copied by SQLite's online backup; then come the objects that the copied log needs, each checked on its way. A server
that moves on removes objects it needs no more: those of the run under way are opened all at once, and an open file stays whole;
where one was gone already, a newer log is copied.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import resource
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from common.errors import ConfigError, DamagedError, StorageError
from common.files import sync_directory
from fp_server import audit
from fp_server.audit import SERVER, Entry
from fp_server.folding import fold
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore, storage_error

FILES = ("ca.pem", "ca.key", "server.pem", "server.key", "operator.pem", "operator.key")
"""What is copied beside configuration, log and objects, where it is there."""
PRIVATE, OBJECT = 0o600, 0o444
TRIES, FEW = 20, 3
"""How often a newer log is copied because the server had removed an object of the older one; and where it may be missing."""
PIECE = 1 << 20

OnObject = Callable[[int, int], None]
"""(objects copied, objects in all)."""


@dataclass(frozen=True)
class Made:
    """A backup that was made."""

    out: Path
    events: int
    head: str
    objects: int
    bytes: int
    warning: str = ""
    left_out: tuple[str, ...] = ()
    """Digests of damaged or missing objects that are not in it."""


class _Sink(Protocol):
    def add(self, name: str, source: IO[bytes], size: int, mode: int) -> None:
        """Write a file of that size."""


class _Directory:
    def __init__(self, root: Path) -> None:
        self._root = root

    def add(self, name: str, source: IO[bytes], size: int, mode: int) -> None:
        path = self._root / name
        for parent in (path.parent.parent, path.parent):
            parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "wb") as out:
            shutil.copyfileobj(source, out, PIECE)
            out.flush()
            os.fchmod(out.fileno(), mode)
            os.fsync(out.fileno())
        sync_directory(path.parent)


class _Archive:
    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def add(self, name: str, source: IO[bytes], size: int, mode: int) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, mode, int(time.time())
        self._tar.addfile(info, source)


class _Hashed(io.RawIOBase):
    """A file whose digest is known when it has been read."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name, self.digest = file, name, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        with _readable(self._name):
            data = self._file.read(size)
        self.digest.update(data)
        return data


def backup(directory: Path, out: Path, seen: OnObject = lambda done, total: None, without_damaged: bool = False) -> Made:
    """Back a data directory up to `out`: a tar archive when its name ends in ``.tar``, else a directory like the original.

    It appears whole or not at all. Raises ConfigError when `directory` is no server's or `out` exists or lies in it,
    DamagedError when something to be copied is damaged (of objects only without `without_damaged`: it leaves these out),
    StorageError when `out` can't be written.
    """
    if not (directory / "log.sqlite").exists() or not (directory / "server.toml").exists():
        raise ConfigError(f"{directory}: not a server directory; run this on the server's machine, with its --dir")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: exists already; a backup replaces nothing, name another")
    if out.resolve().is_relative_to(directory.resolve()):
        raise ConfigError(f"{out}: lies in the directory it would be a backup of; name another place")
    warning = _enter(directory, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:  # 0700
            with _snapshot(directory, Path(work) / "log.sqlite", without_damaged) as (log, objects, opened):
                lost = _damaged(directory, objects, opened) if without_damaged else ()
                objects = [digest for digest in objects if digest not in lost]
                made = _write(directory, Path(work), out, log, objects, opened, seen)
            sync_directory(out.parent)
    except OSError as error:
        raise storage_error(out, error) from None
    except sqlite3.Error as error:
        raise StorageError(f"{out}: the log can't be copied: {error}") from None
    return Made(out, log.events, log.head, len(objects), made, warning, lost)


def _damaged(directory: Path, objects: list[str], opened: dict[str, IO[bytes]]) -> tuple[str, ...]:
    """Those that are damaged or missing: looked for before anything is written, as nothing can be taken out of an archive."""
    store, found = ObjectStore(directory, reading=True), list[str]()
    for digest in objects:
        try:
            if (file := opened.get(digest)) is None:
                store.sound(digest)
            else:
                with _readable(digest):
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:  # type: ignore[arg-type]
                        raise DamagedError(digest)
                file.seek(0)
        except DamagedError:
            found.append(digest)
    return tuple(found)


def _enter(directory: Path, out: Path) -> str:
    """The audit trail says who took the keys along. A full disk must not be in the way of a backup: then it is a warning."""
    try:
        database = Database(directory / "log.sqlite")
        try:
            database.run(lambda c: audit.append(c, Entry(SERVER, "backup", f"to {out.resolve()}")))
        finally:
            database.close()
    except DamagedError:
        raise
    except StorageError as error:
        return f"the backup is not in the audit trail: {error}"
    return ""


@dataclass(frozen=True)
class _Log:
    path: Path
    events: int
    head: str


@contextlib.contextmanager
def _snapshot(directory: Path, copy: Path, incomplete: bool) -> Iterator[tuple[_Log, list[str], dict[str, IO[bytes]]]]:
    """A copy of the log, the objects it needs, and those of them opened that the server may remove at any moment.

    `incomplete`: at the last try without those that are missing.
    """
    store, tries = ObjectStore(directory, reading=True), FEW if incomplete else TRIES
    for attempt in range(tries):
        log, objects, living = _copy_log(directory, copy)
        with contextlib.ExitStack() as held:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            opened: dict[str, IO[bytes]] = {}
            try:
                for digest in living:
                    with contextlib.suppress(*(FileNotFoundError,) if incomplete and attempt + 1 == tries else ()):
                        opened[digest] = held.enter_context((directory / "objects" / digest[:2] / digest).open("rb"))
            except FileNotFoundError:
                if attempt + 1 < tries:
                    copy.unlink()
                    time.sleep(0.1)
                    continue
                store.sound(digest)  # raises that it is missing
            yield log, objects, opened
            return


def _copy_log(directory: Path, copy: Path) -> tuple[_Log, list[str], list[str]]:
    """Copy the log; the copy, every object it needs, and those of runs under way."""

    def work(c: sqlite3.Connection) -> None:
        os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE))
        with contextlib.closing(sqlite3.connect(copy)) as target:
            c.backup(target)

    source = Database(directory / "log.sqlite", reading=True)
    try:
        source.run(work)
    finally:
        source.close()
    database = Database(copy)
    try:
        log = EventLog(database)
        head = log.check()
        objects, living = dict[str, None](), list[str]()
        for run in log.runs():
            machine = fold(log, run)
            found = machine.uses()
            objects |= dict.fromkeys(found)
            if machine.ended is None:
                living += found
    finally:
        database.close()
    return _Log(copy, head.seq, head.hash), list(objects), living


def _write(
    directory: Path, work: Path, out: Path, log: _Log, objects: list[str], opened: dict[str, IO[bytes]], seen: OnObject
) -> int:
    """Write all of it beside `out` and put it in its place; the bytes of its objects."""
    made = work / "made"
    total = 0

    def fill(sink: _Sink) -> None:
        nonlocal total
        for name in ("server.toml", *(one for one in FILES if (directory / one).exists())):
            data = (directory / name).read_bytes()
            sink.add(name, io.BytesIO(data), len(data), PRIVATE)
        with log.path.open("rb") as file:
            sink.add("log.sqlite", file, log.path.stat().st_size, PRIVATE)
        for done, digest in enumerate(objects):
            seen(done, len(objects))
            total += _add_object(directory, sink, digest, opened.get(digest))

    if out.suffix == ".tar":
        with os.fdopen(os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE), "w+b") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                fill(_Archive(tar))
            file.flush()
            os.fsync(file.fileno())
        _place(made, out)
    else:
        made.mkdir(mode=0o700)
        fill(_Directory(made))
        sync_directory(made)
        made.rename(out)
    return total


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """In here an object is read: a disk that can't is damage of the object."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise DamagedError(f"{what} can't be read: {error.strerror}") from None


def _place(made: Path, out: Path) -> None:
    """Give a finished file its name, replacing nothing."""
    try:
        os.link(made, out)  # which, unlike a rename, replaces nothing
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        os.close(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE))
        made.replace(out)


def _add_object(directory: Path, sink: _Sink, digest: str, file: IO[bytes] | None) -> int:
    place = f"objects/{digest[:2]}/{digest}"
    hint = f"; see `fp-server verify {directory}`, or use --without-damaged"
    with contextlib.ExitStack() as held:
        try:
            file = file or held.enter_context((directory / place).open("rb"))
        except FileNotFoundError:
            raise DamagedError(f"{directory / place} is missing{hint}") from None
        size, hashed = os.fstat(file.fileno()).st_size, _Hashed(file, str(directory / place))
        sink.add(place, hashed, size, OBJECT)  # type: ignore[arg-type]
    if hashed.digest.hexdigest() != digest:
        raise DamagedError(f"the bytes of {directory / place} are not what was written{hint}")
    return size
