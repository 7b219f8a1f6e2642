"""The durable event log: SQLite in WAL mode, every commit synced, one writer thread off the event loop."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from common.errors import NotFound, StorageError
from common.faults import fault
from fp_server import chain
from fp_server.chain import Head
from fp_server.events import Event, decode, encode

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    chain TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS events_run ON events (run, seq);
CREATE INDEX IF NOT EXISTS events_kind ON events (run, kind, seq);
CREATE TABLE IF NOT EXISTS tokens (
    hash TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    role TEXT NOT NULL,
    expires REAL NOT NULL,
    used_by TEXT
);
CREATE TABLE IF NOT EXISTS certificates (
    serial TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    role TEXT NOT NULL,
    token TEXT,
    pem TEXT NOT NULL,
    revoked REAL
);
CREATE INDEX IF NOT EXISTS certificates_name ON certificates (name);
CREATE TABLE IF NOT EXISTS revocations (
    name TEXT PRIMARY KEY,
    time REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS audit (
    seq INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    actor TEXT NOT NULL,
    role TEXT NOT NULL,
    serial TEXT NOT NULL,
    address TEXT NOT NULL,
    action TEXT NOT NULL,
    object TEXT NOT NULL,
    outcome TEXT NOT NULL,
    hash TEXT NOT NULL
);
CREATE TRIGGER IF NOT EXISTS audit_no_update BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit trail can only be added to'); END;
CREATE TRIGGER IF NOT EXISTS audit_no_delete BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit trail can only be added to'); END;
"""

T = TypeVar("T")
Also = Callable[[sqlite3.Connection], None]
"""What is written in an event's transaction besides it."""


class Database:
    """One SQLite file and the one thread that touches it."""

    def __init__(self, path: Path, reading: bool = False) -> None:
        """`reading`: change nothing, not even what an older version left undone.

        Raises StorageError when the file can't be used, DamagedError when it is damaged.
        """
        self.path, self.reading, self.chained = path, reading, False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        try:
            self._connection = self._thread.submit(self._open, reading).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def _open(self, reading: bool) -> sqlite3.Connection:
        if reading and not self.path.exists():
            raise StorageError(f"{self.path}: no such file")
        place = f"{self.path.resolve().as_uri()}?mode=ro" if reading else self.path
        connection = None
        try:
            connection = sqlite3.connect(place, isolation_level=None, uri=reading)
            # A flipped bit must be an event that is not what was written, and not text that can't be read.
            connection.text_factory = lambda raw: raw.decode(errors="surrogateescape")
            if reading:
                self.chained = chain.has_column(connection)
                return connection
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.executescript(_SCHEMA)
            if not chain.has_column(connection) or not chain.head(connection).hash:
                chain.add_column(connection)
            self.chained = True
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            raise self._error(error) from None
        return connection

    def _error(self, error: sqlite3.Error) -> StorageError:
        """What SQLite complains of, and what to do."""
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return chain.damaged(f"{self.path}: {error}")
        full = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
        return StorageError(f"{self.path}: {error}" + ("; free some space, nothing was lost" if full else ""))

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            self._connection.execute("BEGIN" if self.reading else "BEGIN IMMEDIATE")
            try:
                result = work(self._connection)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise self._error(error) from None
        return result

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in one durable transaction, waiting for it."""
        return self._thread.submit(self._transact, work).result()

    async def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The same without blocking the event loop."""
        return await asyncio.wrap_future(self._thread.submit(self._transact, work))

    def close(self) -> None:
        """Wait for the writer and close the file."""
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()


class EventLog:
    """Append and replay. An event is durable when `append` returns."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(
        self, event: Event, at: float | None = None, also: Callable[[sqlite3.Connection], None] | None = None
    ) -> None:
        """Commit one event, and in the same transaction what `also` does. Raises StorageError (disk full); then nothing was
        written."""
        kind, body = encode(event)
        when = time.time() if at is None else at

        def work(c: sqlite3.Connection) -> None:
            fault("server.log.append.before", kind, sqlite3.OperationalError)
            last = chain.fill(c)
            row = (last.seq + 1, event.run, when, kind, body)
            c.execute(
                "INSERT INTO events (seq, run, time, kind, body, chain) VALUES (?, ?, ?, ?, ?, ?)",
                (*row, chain.link(last.hash, row)),
            )
            if also is not None:
                also(c)
            fault("server.log.append.written", kind, sqlite3.OperationalError)

        await self._database.transact(work)
        fault("server.log.append.after", kind)

    async def touch(self) -> None:
        """Whether it can be written again: a durable write that changes nothing. Raises StorageError."""
        await self._database.transact(lambda c: c.execute("PRAGMA user_version = 0"))

    def enter(self, also: Also) -> None:
        """Write what is no event, in a transaction of its own. Raises StorageError. Not for the event loop: it waits."""
        self._database.run(also)

    def runs(self) -> list[str]:
        """All runs' names, oldest first."""
        return self._database.run(
            lambda c: [str(r[0]) for r in c.execute("SELECT run FROM events WHERE kind = 'RunStarted' ORDER BY seq")]
        )

    def opened(self, run: str, index: int) -> int:
        """The sequence number of the event that opened the run's round (attempt) number `index`, from 0. Raises NotFound."""
        row = self._database.run(
            lambda c: c.execute(
                "SELECT seq FROM events WHERE run = ? AND kind = 'RoundOpened' ORDER BY seq LIMIT 1 OFFSET ?", (run, index)
            ).fetchone()
        )
        if row is None:
            raise NotFound(f"run {run!r} has opened no round number {index + 1} (attempts counted)")
        return int(row[0])

    def check(self) -> Head:
        """Look at every event of every run: is each what was written, is none missing. The end of the chain.

        Raises DamagedError, which names the first event that is damaged or missing, and says what to do.
        """

        def work(c: sqlite3.Connection) -> Head:
            problems = [str(row[0]) for row in c.execute("PRAGMA integrity_check(3)")]
            if problems != ["ok"]:
                raise chain.damaged(f"{self._database.path}: {'; '.join(problems)}")
            given = c.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
            if not self._database.chained:
                return Head(int(given[0]) if given else 0, "")
            return chain.check(chain.rows(c), int(given[0]) if given else 0, self._database.reading)

        return self._database.run(work)

    def replay(self, run: str, first: int = 0) -> Iterator[tuple[float, Event]]:
        """(time, event) of one run, in order, a page at a time, from the sequence number `first` on.

        Raises DamagedError at an event that is not what was written.
        """
        last = first - 1
        while True:
            page = self._database.run(lambda c, last=last: self._page(c, run, last))  # type: ignore[misc]
            if not page:
                return
            for seq, at, kind, body in page:
                last = seq
                yield at, decode(kind, body)

    def _page(self, c: sqlite3.Connection, run: str, last: int) -> list[tuple[int, float, str, str]]:
        chained = self._database.chained
        hashes = "chain, (SELECT chain FROM events WHERE seq = e.seq - 1)" if chained else "'', ''"
        page = c.execute(
            f"SELECT seq, time, kind, body, {hashes} FROM events e WHERE run = ? AND seq > ? ORDER BY seq LIMIT 500", (run, last)
        ).fetchall()
        for seq, at, kind, body, hash_, previous in page:
            if chained and (hash_ or not self._database.reading):
                chain.follow((seq, run, at, kind, body), hash_, previous)
        return [row[:4] for row in page]
