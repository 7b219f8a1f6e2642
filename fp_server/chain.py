"""The hash chain of the event log: each row's hash covers the row and the hash before it, over all runs.

So a flipped bit, a changed row and a missing one are found, wherever they are; also rows missing at the end, as SQLite keeps
the last number it gave. It shows damage. Who means to deceive and can write the file can write the whole chain anew.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from common.errors import DamagedError

FIRST = "0" * 64
"""What the first event's hash is chained to."""
PAGE = 500
"""Rows read at once."""

Values = tuple[int, str, float, str, str]
"""seq, run, time (seconds since the epoch), kind, body."""


@dataclass(frozen=True)
class Head:
    """The last event's number (0: there is none) and hash."""

    seq: int = 0
    hash: str = FIRST


def link(previous: str, row: Values) -> str:
    """The hash of a row, 64 hex digits: sha256 of the hash before it and the row's values, a line each."""
    seq, run, time, kind, body = row
    text = f"{previous}\n{seq}\n{run}\n{time!r}\n{kind}\n{body}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def damaged(what: str) -> DamagedError:
    """The error that refuses a damaged log."""
    return DamagedError(
        f"the event log is damaged: {what}. Keep a copy of the directory as it is, see what `fp-server verify` finds there, and "
        "restore the last backup (docs/run-a-server.md, 'Damage')"
    )


def add_column(c: sqlite3.Connection) -> None:
    """Give a log of an older version its chain."""
    c.execute("BEGIN IMMEDIATE")
    if not has_column(c):
        c.execute("ALTER TABLE events ADD COLUMN chain TEXT NOT NULL DEFAULT ''")
    fill(c)
    c.execute("COMMIT")


def has_column(c: sqlite3.Connection) -> bool:
    """Whether the log has a chain."""
    return any(row[1] == "chain" for row in c.execute("PRAGMA table_info(events)"))


def head(c: sqlite3.Connection) -> Head:
    """The end of the chain, as the last row says."""
    row = c.execute("SELECT seq, chain FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    return Head() if row is None else Head(int(row[0]), str(row[1]))


def fill(c: sqlite3.Connection) -> Head:
    """Chain the last rows where an older version has left them without a hash; the end of the chain. In a transaction."""
    last = head(c)
    if last.hash:
        return last
    row = c.execute("SELECT seq, chain FROM events WHERE chain != '' ORDER BY seq DESC LIMIT 1").fetchone()
    last = Head() if row is None else Head(int(row[0]), str(row[1]))
    while page := _page(c, last.seq):
        for row in page:
            last = Head(row[0], link(last.hash, row[:5]))
            c.execute("UPDATE events SET chain = ? WHERE seq = ?", (last.hash, last.seq))
    return last


def _page(c: sqlite3.Connection, after: int) -> list[tuple[int, str, float, str, str, str]]:
    query = "SELECT seq, run, time, kind, body, chain FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
    return c.execute(query, (after, PAGE)).fetchall()


def follow(row: Values, hash_: str, previous: str | None) -> None:
    """One row, with its hash and the hash of the row numbered one less (None: there is no such row). Raises DamagedError."""
    seq = row[0]
    previous = FIRST if seq == 1 else previous
    if previous is None:
        raise damaged(f"event {seq - 1} is missing")
    if link(previous, row) != hash_:
        raise damaged(f"event {seq} is not what was written" + (f", or event {seq - 1} is not" if seq > 1 else ""))


def check(pages: Iterable[tuple[int, str, float, str, str, str]], given: int, unchained: bool = False) -> Head:
    """Check all rows, in order; the last one. `given`: the last number SQLite has given (`sqlite_sequence`); 0: none.

    `unchained`: rows without a hash at the end are an older version's, not yet chained. Raises DamagedError that names the
    first event that is not what was written, or is missing.
    """
    last, blank = Head(), 0
    for row in pages:
        seq, hash_ = row[0], row[5]
        if seq != last.seq + 1:
            raise damaged(f"event {last.seq + 1} is missing")
        if blank and hash_:
            raise damaged(f"event {blank} is not what was written")
        wanted = link(last.hash, row[:5])
        if not hash_ and unchained:
            blank = blank or seq
        elif hash_ != wanted:
            raise damaged(f"event {seq} is not what was written")
        last = Head(seq, wanted)
    if given > last.seq:
        missing = f"event {given} is missing" if given == last.seq + 1 else f"events {last.seq + 1} to {given} are missing"
        raise damaged(missing)
    return last


def rows(c: sqlite3.Connection, after: int = 0) -> Iterator[tuple[int, str, float, str, str, str]]:
    """All rows after number `after`, a page at a time."""
    while page := _page(c, after):
        yield from page
        after = page[-1][0]
