"""The asyncio shell around the runs' state machines: commits events, hands them in, does what they ask.

One lock orders everything: an event is durable before its machine sees it, and the machine sees events in
the log's order. Slow work (choosing units, aggregating) runs in threads and comes back as an event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from common.errors import (
    DamagedError,
    FedPrunerError,
    InUseError,
    LimitError,
    NotFound,
    StorageError,
    TooLate,
    UnreachableError,
)
from common.faults import fault
from fp_server import audit, damage, folding
from fp_server import events as e
from fp_server.commands import (
    Aggregate,
    Choose,
    Command,
    Connected,
    Disconnected,
    Record,
    Recovered,
    Review,
    Send,
    SendAssignment,
    Stimulus,
    Tick,
)
from fp_server.config import ServerConfig
from fp_server.limits import OUTBOX, Complaints
from fp_server.log import Also, EventLog
from fp_server.narrate import tell
from fp_server.objects import ObjectStore
from fp_server.reviewing import review_round
from fp_server.rounds import RunMachine
from fp_server.roundstate import Entry
from fp_server.work import aggregate_round, choose_units

logger = logging.getLogger("fp_server")

TICK = 0.5
"""Seconds between looks at the clock."""
_FREEING = (e.RoundCommitted, e.RoundClosed, e.UpdatesReviewed, e.RunEnded)
"""Events after which objects may be needed no more."""
COLLECT = 3600.0
"""Seconds between looks for objects that nothing refers to, and how old these must be."""
STOPPING = "the server is stopping; try again later"
KEPT = 16
"""Ended runs whose folded state is kept for whoever asks."""

T = TypeVar("T")


def steady_clock() -> Callable[[], float]:
    """Seconds since the epoch as of now, counted on by the monotonic clock: a step of the wall clock drops no device."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class Session:
    """One device's open stream, as the coordinator sees it: a queue of what to say, and whether to hang up."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.outbox: asyncio.Queue[Send | FedPrunerError] = asyncio.Queue()
        self.reason = ""

    def close(self, error: FedPrunerError) -> None:
        """Ask the stream's handler to end it with this error."""
        self.reason = str(error)
        self.outbox.put_nowait(error)

    def say(self, command: Send) -> None:
        """Queue a message. A device that leaves too many unread is hung up: what it has missed is said again when it is back."""
        if self.outbox.qsize() < OUTBOX:
            self.outbox.put_nowait(command)
        elif not self.reason:
            self.close(LimitError(f"{self.device!r} has left {OUTBOX} messages unread"))


class Coordinator:
    """All runs and all sessions of one server."""

    def __init__(self, config: ServerConfig, log: EventLog, store: ObjectStore, clock: Callable[[], float] | None = None) -> None:
        self.config, self.log, self.store, self.clock = config, log, store, clock or steady_clock()
        self.active: RunMachine | None = None
        self.names: list[str] = []
        self.sessions: dict[str, Session] = {}
        self.complaints = Complaints()
        self._problems: dict[str, str] = {}
        self.changed = asyncio.Condition()
        self.lock = asyncio.Lock()
        self._heavy = ThreadPoolExecutor(1, thread_name_prefix="heavy")
        self._tasks: set[asyncio.Task[None]] = set()
        self._working: set[asyncio.Task[None]] = set()
        """Those of the tasks that choose or aggregate."""
        self._writes: set[asyncio.Task[Any]] = set()
        self._ended: dict[str, RunMachine] = {}
        self._kept: frozenset[str] = frozenset()
        """The ledgers and adapters of all ended runs."""
        self._bytes_down = 0
        store.quarantined = self._quarantined
        self.draining = False
        """The server is about to stop: it begins nothing more."""

    # -- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Fold the log; take up what was under way. Raises DamagedError when the log is damaged."""
        self.log.check()
        self.names = self.log.runs()
        for name in self.names:
            machine = self.fold(name)
            if machine.ended is None:
                self.active = machine
            else:
                self._kept |= machine.references()
        fault("server.start.folded")
        self._sweep()
        fault("server.start.swept")
        if self.active is not None:
            logger.info("run %s taken up again: %s", self.active.name, self.active.phase)
            await self.post(Recovered())
        self._spawn(self._tick())
        self._spawn(self._collect())

    def _wanted(self) -> tuple[frozenset[str], frozenset[str]]:
        """The objects that any run needs, and the devices that are expected to push."""
        if self.active is None:
            return self._kept, frozenset()
        arriving = frozenset(d for d in self.active.plans if isinstance(self.active.task(d), SendAssignment))
        return self._kept | self.active.references(), arriving

    def _sweep(self) -> None:
        """At a start: remove what a crash left behind, and what older versions never removed."""
        if removed := self.store.sweep(*self._wanted()):
            logger.info("%d objects that nothing refers to were removed", removed)

    async def _collect(self) -> None:
        """The same while it works, of what is old enough: what a failed removal or a broken-off push has left."""
        while True:
            await asyncio.sleep(COLLECT)
            wanted, arriving = self._wanted()
            try:
                loop = asyncio.get_running_loop()
                removed = await loop.run_in_executor(self._heavy, self.store.sweep, wanted, arriving, COLLECT)
            except OSError as error:
                logger.warning("objects that nothing refers to can't be removed: %s", error)
            else:
                if removed:
                    logger.info("%d objects that nothing refers to were removed", removed)

    def let_go(self, digest: str) -> None:
        """An object was adopted that no event will refer to."""
        if digest not in self._wanted()[0]:
            self._spawn(self._discard(frozenset({digest}), self.store.mark))

    async def _clear_arrivals(self, arriving: frozenset[str], before: float) -> None:
        """What has come in part and can't count any more must not take the disk of what can."""
        try:
            await asyncio.to_thread(self.store.sweep_arrivals, arriving, before)
        except OSError as error:
            logger.warning("updates in part can't be removed: %s", error)

    async def _discard(self, digests: frozenset[str], mark: int) -> None:
        try:  # in the thread that aggregates: what is being read stays until that is over
            await asyncio.get_running_loop().run_in_executor(self._heavy, self.store.discard, digests, mark)
        except OSError as error:  # they stay until the next start
            logger.warning("objects that are no longer needed can't be removed: %s", error)

    async def drain(self) -> None:
        """Begin nothing more: no session, round, choice or aggregation. Sessions are ended; the devices may come back."""
        self.draining = True
        for session in list(self.sessions.values()):
            session.close(UnreachableError(STOPPING))
        await self.announce()

    async def stop(self, patience: float = 0.0) -> None:
        """Drain, and wait for what is being written; for an aggregation or a choice under way at most `patience` seconds.

        One that isn't done by then is left to its thread and forgotten: it is begun again at the next start.
        """
        await self.drain()
        if self._working and patience:
            await asyncio.wait(self._working, timeout=patience)
        if self._working:
            logger.warning("what is being chosen or aggregated is not done; it is begun again at the next start")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._writes, return_exceptions=True)
        self._heavy.shutdown(wait=False, cancel_futures=True)

    def fold(self, run: str) -> RunMachine:
        """A run's state from its events. Raises NotFound, DamagedError."""
        return folding.fold(self.log, run)

    def past(self, run: str, index: int, count: int) -> list[Entry]:
        """At most `count` ended rounds of a run from the 0-based `index` on, read from the log. For a thread of its own."""
        return folding.past(self.log, run, index, count)

    def run(self, name: str) -> RunMachine:
        """A run by name, or the newest for an empty one. Raises NotFound."""
        if not name and not self.names:
            raise NotFound("no run has been started yet (`fp-server start RUN.toml`)")
        name = name or (self.active.name if self.active is not None else self.names[-1])
        if self.active is not None and self.active.name == name:
            return self.active
        if name not in self._ended:  # an ended run never changes; a watched one is asked for twice a second
            machine = self.fold(name)
            while len(self._ended) >= KEPT:
                del self._ended[next(iter(self._ended))]
            self._ended[name] = machine
        return self._ended[name]

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                await self.post(Tick())
            except Exception:  # the clock must go on, whatever one tick ran into
                logger.exception("a look at the clock failed")

    @property
    def problem(self) -> str:
        """What an operator should know; empty when all is well."""
        return "; ".join(self._problems.values())

    def note(self, source: str, problem: str = "") -> None:
        """What is wrong with `source` now; an empty problem takes it back."""
        if problem and problem != self._problems.get(source):
            logger.error("%s", problem)
        if problem:
            self._problems[source] = problem
        else:
            self._problems.pop(source, None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _work(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._spawn(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task failed", exc_info=error)

    # -- the one way in --------------------------------------------------------------------------

    async def post(self, happening: e.Event | Stimulus, also: Also | None = None) -> None:
        """Commit (if it is an event; `also` in its transaction), hand in, do what is asked. Raises StorageError; then nothing
        happened.

        What was begun is finished even when the caller is cancelled (its stream broke): an event that is in the
        log and not in the machine would be a state that no restart gives again.
        """
        await self.whole(self._locked_post(happening, also))

    async def whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Finish `work` even when the caller is cancelled."""
        task = asyncio.create_task(work)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return await asyncio.shield(task)

    async def _locked_post(self, happening: e.Event | Stimulus, also: Also | None) -> None:
        async with self.lock:
            await self.post_locked(happening, also)

    async def post_locked(self, happening: e.Event | Stimulus, also: Also | None = None) -> None:
        """`post`, for who holds the lock already."""
        machine = self.active
        if machine is None:
            return
        pending: deque[e.Event | Stimulus] = deque([happening])
        effects: list[Command] = []
        try:
            while pending:
                item, now = pending.popleft(), self.clock()
                if isinstance(item, e.Event):
                    if item.run != machine.name:
                        return
                    try:
                        await self.log.append(item, now, also if item is happening else None)
                    except StorageError as error:
                        self.note("log", str(error))
                        if item is happening:
                            raise
                        return  # what followed from it is asked for again at the next tick
                    self.note("log")
                    tell(item)
                before = machine.references() if isinstance(item, _FREEING) else frozenset()
                commands = machine.handle(item, now)
                if isinstance(item, e.Event):
                    fault("server.machine.handled", type(item).__name__)
                if machine.ended is not None:
                    self._kept |= machine.references()
                if isinstance(item, (*_FREEING, e.DeviceDropped)):
                    self._spawn(self._clear_arrivals(self._wanted()[1], time.time()))
                if gone := before - machine.references() - self._kept:  # durable: nothing will ask for them again
                    self._spawn(self._discard(gone, self.store.mark))
                for command in commands:
                    if isinstance(command, Record) and self.draining and isinstance(command.event, e.RoundOpened):
                        continue  # opened at the next start
                    if isinstance(command, Record):
                        pending.append(command.event)
                    else:
                        effects.append(command)
        finally:
            for command in effects:
                self._do(machine, command)
            if machine.ended is not None:
                self.active = None
            if not isinstance(happening, Tick) or effects:
                await self.announce()

    async def announce(self) -> None:
        """Wake those who watch the status."""
        async with self.changed:
            self.changed.notify_all()

    def _do(self, machine: RunMachine, command: Command) -> None:
        match command:
            case Choose() | Review() | Aggregate() if self.draining:  # asked for again when the log is folded
                pass
            case Choose():
                self._work(self._choose(machine, command))
            case Review() | Aggregate():
                self._work(self._aggregate(machine, command))
            case Record():
                raise AssertionError("records are handled where they are made")
            case _:
                if (session := self.sessions.get(command.device)) is not None:
                    session.say(command)

    async def _choose(self, machine: RunMachine, command: Choose) -> None:
        loop = asyncio.get_running_loop()
        try:
            event: e.Event = await loop.run_in_executor(self._heavy, choose_units, machine, command.key, command.device)
        except TooLate:  # the round was closed while this waited its turn
            return
        except FedPrunerError as error:
            event = e.DeviceDropped(machine.name, command.key, command.device, type(error).__name__, str(error))
        except Exception as error:
            logger.exception("choosing units for %s failed", command.device)
            event = e.DeviceDropped(
                machine.name, command.key, command.device, "FedPrunerError", f"choosing units failed: {error}"
            )
        await self.insist(event)

    async def _aggregate(self, machine: RunMachine, command: Review | Aggregate) -> None:
        loop = asyncio.get_running_loop()
        delay = 1.0
        while machine.ended is None and not self.draining:
            problem = f"round {command.key.round + 1} of {machine.name!r} can't be aggregated, trying again: "
            try:
                event: e.UpdatesReviewed | e.RoundCommitted
                if isinstance(command, Review):
                    event = await loop.run_in_executor(self._heavy, review_round, machine, self.store, command.key)
                else:
                    event = await loop.run_in_executor(
                        self._heavy, aggregate_round, machine, self.store, command.key, self._bytes_down
                    )
                    self._bytes_down = 0
            except TooLate:  # the run was stopped meanwhile
                break
            except damage.LostUpdates as error:  # the round goes on until they are there again, or by its usual rules
                await self.insist(e.UpdatesLost(machine.name, command.key, error.lost))
                break
            except FedPrunerError as error:
                self.note("aggregation", f"{problem}{error}")
            except Exception as error:
                logger.exception("aggregating failed")
                self.note("aggregation", f"{problem}{type(error).__name__}: {error}")
            else:
                self.note("aggregation")
                await self.insist(event)
                if isinstance(event, e.UpdatesReviewed):
                    return
                made = {ref.digest for unit in event.units for ref in (unit.ledger, unit.broadcast)}
                if unused := made - machine.references() - self._kept:  # the run was stopped meanwhile
                    await self._discard(frozenset(unused), self.store.mark)
                return
            await asyncio.sleep(delay)
            delay = min(60.0, delay * 2)
        self.note("aggregation")

    async def insist(self, event: e.Event) -> None:
        """Post an event that must not be lost, waiting for disk space if need be."""
        while True:
            try:
                return await self.post(event)
            except StorageError:  # noted where it was met
                await asyncio.sleep(1.0)

    # -- what devices do -------------------------------------------------------------------------

    async def connect(self, session: Session) -> None:
        """A device's session opened; an older one of the same device is hung up. Raises UnreachableError when stopping."""
        if self.draining:
            raise UnreachableError(STOPPING)
        if (old := self.sessions.pop(session.device, None)) is not None:
            old.close(InUseError(f"another session of {session.device!r} was opened; is a second daemon using its identity?"))
        self.sessions[session.device] = session
        logger.info("device %s connected", session.device)
        await self.post(Connected(session.device))
        await self.announce()

    async def disconnect(self, session: Session) -> None:
        """A session ended; nothing happens when a newer one has taken its place."""
        if self.sessions.get(session.device) is session:
            del self.sessions[session.device]
            logger.info("device %s disconnected%s", session.device, f": {session.reason}" if session.reason else "")
            await self.post(Disconnected(session.device))
            await self.announce()

    def machine_for(self, run: str) -> RunMachine:
        """The active run, if it is this one. Raises NotFound."""
        if self.active is None or self.active.name != run:
            raise NotFound(f"run {run!r} is not active here")
        return self.active

    async def readable(self, digest: str) -> Path:
        """Where an object of the adapter lies, checked, and made again if need be. Raises DamagedError when it can't be."""
        source = f"object {digest}"
        try:
            path = await asyncio.to_thread(self.store.checked, digest)
        except DamagedError:
            if self.active is None:
                raise
            loop = asyncio.get_running_loop()
            try:
                path = await loop.run_in_executor(self._heavy, damage.for_devices, self.active, self.store, digest)
            except StorageError as error:
                self.note(source, str(error))
                raise
        self.note(source)
        return path

    def _quarantined(self, digest: str, why: str) -> None:
        """Enter it in the audit trail; in the thread that found the damage."""
        entry = audit.Entry(audit.SERVER, "quarantine", f"object {digest}", why)
        try:
            self.log.enter(lambda c: audit.append(c, entry))
        except StorageError as error:
            logger.error("a damaged object can't be entered in the audit trail: %s", error)

    def fetched(self, size: int) -> None:
        """Bytes of adapter objects sent to devices, for the round's account."""
        self._bytes_down += size
