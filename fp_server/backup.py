"""A consistent copy of a data directory, made while its server works: `fp-server backup`.

The log is copied by SQLite's online backup; then come the objects that the copied log needs, each checked on its way. A server
that moves on removes objects it needs no more: they are opened in the moment from which the copy is, before it is known which of
them the log needs, and an open file stays whole; where one was gone already, a newer log is copied.
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
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
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
"""What is copied beside configuration, log and objects, where it is there. The operator's can be made anew."""
PRIVATE, OBJECT = 0o600, 0o444
TRIES, FEW = 20, 3
"""How often a newer log is copied because the server had removed an object of the older one; and where it may be missing."""
HELD = 1 << 14
"""How many objects are held open at once at most while the log is read; and at most half of the files a process may open."""
PIECE = 1 << 20

Uses = dict[str, list[str]]
"""Digest -> what the object is, for a person."""
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
    needed: int
    """Objects that the log needs: more than `objects` where some were left out."""
    warning: str = ""
    left_out: tuple[str, ...] = ()
    """Digests of damaged or missing objects that are not in it."""
    bad: tuple[str, ...] = ()
    """Of each of these: where it lies, what it is, what is wrong with it."""
    missing: tuple[str, ...] = ()
    """Of `FILES`, those a server can't do without and which are not in it, because the directory has none."""


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

    It appears whole or not at all, and how that ended is entered in the audit trail. Raises ConfigError when `directory` is no
    server's or `out` exists, lies in it or has nothing to lie in, DamagedError when something to be copied is damaged (of
    objects only without `without_damaged`: it leaves these out), StorageError when `out` can't be written.
    """
    if not (directory / "log.sqlite").exists() or not (directory / "server.toml").exists():
        raise ConfigError(f"{directory}: not a server directory; run this on the server's machine, with its --dir")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: exists already; a backup replaces nothing, name another")
    if out.resolve().is_relative_to(directory.resolve()):
        raise ConfigError(f"{out}: lies in the directory it would be a backup of; name another place")
    if not out.parent.is_dir():  # a backup disk that isn't mounted
        raise ConfigError(f"{out.parent}: no such directory; mount the disk that it is on, or make it first")
    try:
        made = _make(directory, out, seen, without_damaged)
    except BaseException as error:
        with contextlib.suppress(StorageError):  # what went wrong first is to be told
            _enter(directory, out, f"failed: {str(error) or type(error).__name__}")
        raise
    try:
        _enter(directory, out, audit.OK)
    except StorageError as error:  # a full disk must not be in the way of a backup
        return replace(made, warning=f"the backup is not in the audit trail: {error}")
    return made


def _make(directory: Path, out: Path, seen: OnObject, without_damaged: bool) -> Made:
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:  # 0700
            tries = FEW if without_damaged else TRIES
            with _snapshot(directory, Path(work) / "log.sqlite", tries) as (log, uses, opened):
                lost = _damaged(directory, uses, opened) if without_damaged else {}
                objects = [digest for digest in uses if digest not in lost]
                try:
                    size, missing = _write(directory, Path(work), out, log, objects, opened, seen)
                except DamagedError as first:
                    raise _refusal(directory, uses, opened, first) from None
            sync_directory(out.parent)
    except OSError as error:
        ours = error.filename is not None and Path(str(error.filename)).is_relative_to(directory)
        raise storage_error(Path(str(error.filename)) if ours else out, error) from None
    except sqlite3.Error as error:
        raise StorageError(f"{out}: the log can't be copied: {error}") from None
    return Made(out, log.events, log.head, len(objects), size, len(uses), "", tuple(lost), tuple(lost.values()), missing)


def _damaged(directory: Path, uses: Uses, opened: dict[str, IO[bytes]]) -> dict[str, str]:
    """Digest -> what to say of those that are damaged or missing. Nothing can be taken out of an archive, so who leaves them out
    looks for them before anything is written."""
    store, found = ObjectStore(directory, reading=True), dict[str, str]()
    for digest, what in uses.items():
        path = directory / "objects" / digest[:2] / digest
        try:
            if (file := opened.get(digest)) is None:
                store.sound(digest)
            else:
                file.seek(0)
                with _readable(digest):
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:  # type: ignore[arg-type]
                        raise DamagedError(digest)
                file.seek(0)
        except DamagedError:
            found[digest] = f"{path} ({', '.join(what)}) is {'damaged' if path.exists() else 'missing'}"
    return found


def _refusal(directory: Path, uses: Uses, opened: dict[str, IO[bytes]], first: DamagedError) -> DamagedError:
    """The error that names every bad object, and not the first only."""
    bad = _damaged(directory, uses, opened)
    said = f"{len(bad)} of {len(uses)} objects: {'; '.join(bad.values())}" if bad else str(first)
    return DamagedError(f"{said}; see `fp-server verify {directory}`; `--without-damaged` leaves them out")


def _enter(directory: Path, out: Path, outcome: str) -> None:
    """The audit trail says who took the keys along, or tried to."""
    database = Database(directory / "log.sqlite")
    try:
        database.run(lambda c: audit.append(c, Entry(SERVER, "backup", f"to {out.resolve()}", outcome)))
    finally:
        database.close()


@dataclass(frozen=True)
class _Log:
    path: Path
    events: int
    head: str


@contextlib.contextmanager
def _snapshot(directory: Path, copy: Path, tries: int) -> Iterator[tuple[_Log, Uses, dict[str, IO[bytes]]]]:
    """A copy of the log, the objects it needs, and those of them opened that the server may remove at any moment.

    At the last try without those that are missing: they are damage.
    """
    for attempt in range(tries):
        with contextlib.ExitStack() as held:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            files: dict[str, io.FileIO] = {}
            held.callback(_let_go, files)
            _copy_log(directory, copy, files)
            log, uses, living = _read_log(copy)
            _let_go(files, but=living)
            opened: dict[str, IO[bytes]] = {}
            try:
                for digest in living:
                    if digest in files:
                        opened[digest] = held.enter_context(io.BufferedReader(files[digest]))
                        continue
                    with contextlib.suppress(*(FileNotFoundError,) if attempt + 1 == tries else ()):
                        opened[digest] = held.enter_context((directory / "objects" / digest[:2] / digest).open("rb"))
            except FileNotFoundError:
                copy.unlink()
                time.sleep(0.1)
                continue
            yield log, uses, opened
            return


def _hold(directory: Path, files: dict[str, io.FileIO]) -> None:
    """Open what is in the store, the newest first: what the server may remove belongs to the run under way, and that of ended
    runs is older. What can't be opened here is seen, and named, when it is its turn to be copied.

    Not by hard links: those don't reach another disk, where a backup should be, and change the stamp of an object.
    """
    found: list[tuple[int, str]] = []
    for path in (directory / "objects").glob("??/*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            found.append((path.stat().st_mtime_ns, path.name))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for _, digest in sorted(found, reverse=True)[: HELD if most == resource.RLIM_INFINITY else min(HELD, most // 2)]:
        with contextlib.suppress(OSError):
            files[digest] = (directory / "objects" / digest[:2] / digest).open("rb", buffering=0)


def _let_go(files: dict[str, io.FileIO], but: Collection[str] = ()) -> None:
    for digest in files.keys() - set(but):
        files.pop(digest).close()


def _copy_log(directory: Path, copy: Path, files: dict[str, io.FileIO]) -> None:
    """Copy the log, and hold the objects that are there in the moment from which the copy is."""

    def work(c: sqlite3.Connection) -> None:
        c.execute("SELECT count(*) FROM sqlite_master").fetchone()  # from here on the log is seen as it is now
        _hold(directory, files)  # not after the copy, which takes its time
        os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE))
        with _room(copy), contextlib.closing(sqlite3.connect(copy)) as target:
            c.backup(target)

    source = Database(directory / "log.sqlite", reading=True)
    try:
        source.run(work)
    finally:
        source.close()


def _read_log(copy: Path) -> tuple[_Log, Uses, list[str]]:
    """The copy, checked; every object it needs, and those of runs under way."""
    with _room(copy):
        database = Database(copy)
    try:
        log = EventLog(database)
        head = log.check()
        uses, living = Uses(), list[str]()
        for run in log.runs():
            machine = fold(log, run)
            found = machine.uses()
            for digest, what in found.items():
                uses.setdefault(digest, []).extend(what)
            if machine.ended is None:
                living += found
    finally:
        database.close()
    return _Log(copy, head.seq, head.hash), uses, living


@contextlib.contextmanager
def _room(copy: Path) -> Iterator[None]:
    """In here the copy of the log is written: a full disk is that of the copy, and not the log's own as SQLite has it."""
    try:
        yield
    except DamagedError:
        raise
    except (sqlite3.Error, StorageError) as error:
        if "disk is full" in str(error) or shutil.disk_usage(copy.parent).free < PIECE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise


def _write(
    directory: Path, work: Path, out: Path, log: _Log, objects: list[str], opened: dict[str, IO[bytes]], seen: OnObject
) -> tuple[int, tuple[str, ...]]:
    """Write all of it beside `out` and put it in its place; the bytes of its objects, and what it lacks of a server's files."""
    made = work / "made"
    total, there = 0, [name for name in FILES if (directory / name).exists()]

    def fill(sink: _Sink) -> None:
        nonlocal total
        for name in ("server.toml", *there):
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
    return total, tuple(name for name in FILES if name not in there and not name.startswith("operator."))


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
    with contextlib.ExitStack() as held:
        try:
            file = file or held.enter_context((directory / place).open("rb"))
        except FileNotFoundError:
            raise DamagedError(f"{directory / place} is missing") from None
        size, hashed = os.fstat(file.fileno()).st_size, _Hashed(file, str(directory / place))
        sink.add(place, hashed, size, OBJECT)  # type: ignore[arg-type]
    if hashed.digest.hexdigest() != digest:
        raise DamagedError(f"the bytes of {directory / place} are not what was written")
    return size
