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
from fp_server.events import Event, decode, encode

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL
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

    def __init__(self, path: Path) -> None:
        """Raises StorageError when the file is damaged or can't be written."""
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        self._connection = self._thread.submit(self._open).result()

    def _open(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(self.path, isolation_level=None)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise StorageError(f"{self.path}: {error}") from None
        return connection

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(self._connection)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StorageError(f"{self.path}: {error}; free some space, nothing was lost") from None
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
        row = (event.run, time.time() if at is None else at, kind, body)

        def work(c: sqlite3.Connection) -> None:
            c.execute("INSERT INTO events (run, time, kind, body) VALUES (?, ?, ?, ?)", row)
            if also is not None:
                also(c)

        await self._database.transact(work)

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

    def replay(self, run: str, first: int = 0) -> Iterator[tuple[float, Event]]:
        """(time, event) of one run, in order, a page at a time, from the sequence number `first` on."""
        last = first - 1
        while True:
            page = self._database.run(
                lambda c, last=last: c.execute(  # type: ignore[misc]
                    "SELECT seq, time, kind, body FROM events WHERE run = ? AND seq > ? ORDER BY seq LIMIT 500", (run, last)
                ).fetchall()
            )
            if not page:
                return
            for seq, at, kind, body in page:
                last = seq
                yield at, decode(kind, body)
