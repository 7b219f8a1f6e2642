"""The audit trail: who did what, kept for ever in log.sqlite, each entry's hash chained over the one before.

What is allowed is entered in the transaction that does it. What is refused changes nothing, so it is collected, rationed and
entered within seconds. No secret, token or key is ever part of an entry.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import unquote

from common.errors import StorageError
from common.transport.tls import Peer

if TYPE_CHECKING:  # an operator's command shows entries and needs no log of events
    from fp_server.log import Database

FIRST = "0" * 64
"""What the first entry's hash is chained to."""
TEXT = 300
"""The longest object or outcome kept, in characters."""
PAGE = 500
"""Entries read at once."""
OK = "ok"


@dataclass(frozen=True)
class Actor:
    """Who did something: name, role and serial of the certificate, and where the connection came from."""

    name: str
    role: str = ""
    serial: str = ""
    address: str = ""

    @classmethod
    def of(cls, peer: Peer, address: str = "") -> Actor:
        """The caller of an RPC."""
        return cls(peer.name, peer.role, peer.serial, address)


SERVER = Actor("server")
"""The server by itself, or whoever works in its data directory."""


@dataclass(frozen=True)
class Entry:
    """One thing done or refused."""

    actor: Actor
    action: str
    object: str
    outcome: str = OK


@dataclass(frozen=True)
class Row:
    """An entry as it is kept. `time`: seconds since the epoch; `hash`: over all of it and the hash before."""

    seq: int
    time: float
    entry: Entry
    hash: str = field(compare=False, default="")


def address(peer: str) -> str:
    """Where a call came from, from gRPC's ``ipv4:…`` or ``ipv6:…``."""
    return unquote(peer).partition(":")[2][:80] if peer.startswith("ipv") else unquote(peer)[:80]


def _hash(previous: str, row: Row) -> str:
    who, what = row.entry.actor, row.entry
    values = [
        previous, row.seq, row.time, who.name, who.role, who.serial, who.address, what.action, what.object, what.outcome
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()


def append(c: sqlite3.Connection, entry: Entry, at: float | None = None) -> None:
    """Enter what the transaction of `c` does: both are there or neither is."""
    last = c.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    seq, previous = (last[0] + 1, str(last[1])) if last else (1, FIRST)
    kept = replace(entry, object=entry.object[:TEXT], outcome=entry.outcome[:TEXT])
    row = Row(seq, time.time() if at is None else at, kept)
    actor = kept.actor
    c.execute(
        "INSERT INTO audit (seq, time, actor, role, serial, address, action, object, outcome, hash) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            seq, row.time, actor.name, actor.role, actor.serial, actor.address, kept.action, kept.object, kept.outcome,
            _hash(previous, row),
        ),
    )  # fmt: skip


def page(c: sqlite3.Connection, after: int, since: float = 0.0) -> list[Row]:
    """The next entries after number `after`, of time `since` or later."""
    found = c.execute(
        "SELECT seq, time, actor, role, serial, address, action, object, outcome, hash FROM audit "
        "WHERE seq > ? AND time >= ? ORDER BY seq LIMIT ?",
        (after, since, PAGE),
    )
    return [Row(r[0], r[1], Entry(Actor(*r[2:6]), *r[6:9]), r[9]) for r in found]


def read(database: Database, since: float = 0.0) -> Iterator[Row]:
    """All entries of time `since` or later, oldest first, a page at a time."""
    last = 0
    while rows := database.run(lambda c, last=last: page(c, last, since)):  # type: ignore[misc]
        yield from rows
        last = rows[-1].seq


def verify(rows: Iterable[Row], head: str = "") -> Row | None:
    """Check the chain over all entries; the last one. `head`: a hash noted earlier, which must still be in it.

    Raises StorageError at the first entry that does not follow from the one before, and when `head` is not there: then
    entries were changed or removed since. The chain alone can't tell whether entries are missing at its end.
    """
    previous, last, found = FIRST, None, not head
    for number, row in enumerate(rows, 1):
        if row.seq != number or _hash(previous, row) != row.hash:
            raise StorageError(
                f"audit entry {number} does not follow from the one before: it was changed, or entries before it were removed"
            )
        previous, last, found = row.hash, row, found or row.hash == head
    if not found:
        raise StorageError(f"no audit entry has the hash {head[:16]}…: entries were removed or rewritten since it was noted")
    return last


class Refusals:
    """Refused attempts on their way into the trail. Like ones are counted together and all are rationed, so that whoever is
    refused can't fill the disk: one entry an hour for the same reason, `BURST` at once and one a minute in the long run."""

    WINDOW = 3600.0
    BURST = 100.0
    RATE = 1 / 60
    KNOWN = 1000
    """Kinds of refusals that are counted; the oldest goes."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database, self._clock = database, clock
        self._left, self._at = self.BURST, clock()
        self._seen: OrderedDict[tuple[str, ...], tuple[float, int, Entry]] = OrderedDict()
        self._pending: list[tuple[float, Entry]] = []
        self._dropped = 0

    def note(self, entry: Entry) -> None:
        """Take in a refusal; `flush` enters it."""
        host = entry.actor.address.rpartition(":")[0]
        key, now = (entry.actor.name, entry.actor.role, host, entry.action, entry.outcome), self._clock()
        if key in self._seen:
            begin, count, first = self._seen[key]
            self._seen[key] = begin, count + 1, first
        elif self._take(now):
            self._pending.append((time.time(), entry))
            self._seen[key] = now, 0, entry
            if len(self._seen) > self.KNOWN:
                self._recount(next(iter(self._seen)))
        else:
            self._dropped += 1

    async def flush(self) -> None:
        """Enter what has been noted. Raises StorageError; then it is kept for the next time."""
        now = self._clock()
        for key in [key for key, (begin, _, _) in self._seen.items() if now - begin >= self.WINDOW]:
            self._recount(key)
        if self._dropped and self._take(now):
            entry = Entry(SERVER, "call", f"{self._dropped} other attempts", "refused: too many to be entered one by one")
            self._pending.append((time.time(), entry))
            self._dropped = 0
        if not self._pending:
            return
        batch, self._pending = self._pending, []

        def work(c: sqlite3.Connection) -> None:
            for at, entry in batch:
                append(c, entry, at)

        try:
            await asyncio.shield(self._database.transact(work))
        except StorageError:
            self._pending = batch + self._pending
            raise

    def _recount(self, key: tuple[str, ...]) -> None:
        """Close an hour of like refusals: how many more there were is one entry."""
        _, count, entry = self._seen.pop(key)
        if count and self._take(self._clock()):
            outcome = f"{entry.outcome[: TEXT - 40]} ({count} more times within an hour)"
            self._pending.append((time.time(), replace(entry, outcome=outcome)))
        else:
            self._dropped += count

    def _take(self, now: float) -> bool:
        self._left = min(self.BURST, self._left + (now - self._at) * self.RATE)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
