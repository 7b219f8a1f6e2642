"""The server's objects beside its runs: which of them are needed, when the others go, and what is done about a damaged one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from common.errors import DamagedError, StorageError
from fp_server import audit, damage
from fp_server.background import Background
from fp_server.commands import SendAssignment
from fp_server.log import EventLog
from fp_server.objects import ObjectStore, Stamp
from fp_server.rounds import RunMachine

logger = logging.getLogger("fp_server")

COLLECT = 3600.0
"""Seconds between looks for objects that nothing refers to, and how old these must be."""
RECENT = 60.0
"""For so many seconds an object that was read whole is not read again before it is sent."""


class Keeper:
    """Keeps what the runs refer to, and nothing else.

    `active`: the run under way, if any. `note`: told what is wrong with a source, or by an empty text that it is well again.
    """

    def __init__(
        self, log: EventLog, store: ObjectStore, background: Background, active: Callable[[], RunMachine | None],
        note: Callable[[str, str], None],
    ) -> None:  # fmt: skip
        self.store, self._log, self._background, self._active, self._note = store, log, background, active, note
        self.kept: frozenset[str] = frozenset()
        """The ledgers and adapters of all ended runs."""
        self._held: Counter[str] = Counter()
        self._making = 0
        self._read: dict[str, tuple[float, Stamp]] = {}
        """Digest -> when an object was found whole, and the stamp it had."""
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        store.quarantined = self._quarantined

    def wanted(self) -> tuple[frozenset[str], frozenset[str]]:
        """The objects that any run needs, and the devices that are expected to push."""
        kept = self.kept.union(self._held)
        if (machine := self._active()) is None:
            return kept, frozenset()
        arriving = frozenset(d for d in machine.plans if isinstance(machine.task(d), SendAssignment))
        return kept | machine.references(), arriving

    @contextlib.contextmanager
    def held(self, digest: str) -> Iterator[None]:
        """In here an object is adopted before the event that refers to it is in the log: it stays, however long that takes."""
        self._held[digest] += 1
        try:
            yield
        finally:
            self._held[digest] -= 1
            self._held = +self._held

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """The same for objects whose digests nobody knows yet: nothing is collected meanwhile."""
        self._making += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._making -= 1
            if not self._making:
                self._idle.set()

    def sweep(self) -> None:
        """At a start: remove what a crash left behind, and what older versions never removed."""
        if removed := self.store.sweep(*self.wanted()):
            logger.info("%d objects that nothing refers to were removed", removed)

    async def collect(self) -> None:
        """The same while it works, of what is old enough: what a failed removal or a broken-off push has left."""
        while True:
            await asyncio.sleep(COLLECT)
            await self._idle.wait()
            (wanted, arriving), before = self.wanted(), time.monotonic() - COLLECT
            try:
                removed = await self._background.heavy(self.store.sweep, wanted, arriving, before)
            except OSError as error:
                logger.warning("objects that nothing refers to can't be removed: %s", error)
            else:
                if removed:
                    logger.info("%d objects that nothing refers to were removed", removed)

    def let_go(self, digest: str) -> None:
        """An object was adopted that no event will refer to."""
        if digest not in self.wanted()[0]:
            self._background.spawn(self._discard(frozenset({digest}), self.store.mark))

    def free(self, before: frozenset[str], machine: RunMachine) -> Coroutine[Any, Any, None]:
        """Remove what was referred to `before` and isn't now, by any run. The event is durable: nothing will ask for it again."""
        return self._discard(before - machine.references() - self.kept - self._held.keys(), self.store.mark)

    def clear_arrivals(self) -> None:
        """What has come in part and can't count any more must not take the disk of what can."""
        self._background.spawn(self._clear_arrivals(self.wanted()[1], time.time()))

    async def _clear_arrivals(self, arriving: frozenset[str], before: float) -> None:
        try:
            await asyncio.to_thread(self.store.sweep_arrivals, arriving, before)
        except OSError as error:
            logger.warning("updates in part can't be removed: %s", error)

    async def _discard(self, digests: frozenset[str], mark: int) -> None:
        """Remove objects, but for those adopted again since the store's `mark`."""
        if not digests:
            return
        try:  # in the thread that aggregates: what is being read stays until that is over
            await self._background.heavy(self.store.discard, digests, mark)
        except OSError as error:  # they stay until the next start
            logger.warning("objects that are no longer needed can't be removed: %s", error)

    async def readable(self, digest: str) -> Path:
        """Where an object of the adapter lies, checked, and made again if need be. Raises DamagedError when it can't be."""
        source = f"object {digest}"
        try:
            path = await asyncio.to_thread(self.store.checked, digest)
        except DamagedError:
            if (machine := self._active()) is None:
                raise
            try:
                path = await self._background.heavy(damage.for_devices, machine, self.store, digest)
            except StorageError as error:
                self._note(source, str(error))
                raise
        self._note(source, "")
        return path

    async def sendable(self, digest: str) -> None:
        """`readable`, before an object is sent, but for one that was read a moment ago and nobody has touched since: who asks
        for its last byte again and again must not have the server read all of it each time. The device checks the digest, too."""
        now, stamp = time.monotonic(), self.store.stamp(digest)
        read, known = self._read.get(digest, (0.0, None))
        if stamp is not None and stamp == known and now - read < RECENT:
            return
        if (reading := self._reading.get(digest)) is None:  # for all who ask, and whoever cancels does not have it read anew
            reading = self._reading[digest] = self._background.keep(self._read_whole(digest, stamp))
            reading.add_done_callback(lambda _: self._reading.pop(digest, None))
        await asyncio.shield(reading)

    async def _read_whole(self, digest: str, stamp: Stamp | None) -> None:
        await self.readable(digest)
        now = time.monotonic()
        self._read = {one: seen for one, seen in self._read.items() if now - seen[0] < RECENT}
        if stamp is not None:  # of before it was read: one that was made again is read again
            self._read[digest] = now, stamp

    def _quarantined(self, digest: str, why: str) -> None:
        """Enter it in the audit trail; in the thread that found the damage."""
        entry = audit.Entry(audit.SERVER, "quarantine", f"object {digest}", why)
        try:
            self._log.enter(lambda c: audit.append(c, entry))
        except StorageError as error:
            logger.error("a damaged object can't be entered in the audit trail: %s", error)
