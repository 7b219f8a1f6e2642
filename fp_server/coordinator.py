"""The asyncio shell around the runs' state machines: commits events, hands them in, does what they ask.

One lock orders everything: an event is durable before its machine sees it, and the machine sees events in
the log's order. Slow work (choosing units, aggregating) runs in threads and comes back as an event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

from common.bucket import Buckets
from common.errors import FedPrunerError, InUseError, NotFound, StorageError, TooLate, UnreachableError
from common.faults import fault
from fp_server import books, memory
from fp_server import events as e
from fp_server.archive import Archive
from fp_server.background import Background
from fp_server.commands import (
    Aggregate,
    Choose,
    Command,
    Connected,
    Disconnected,
    Record,
    Recovered,
    Review,
    Stimulus,
    Tick,
)
from fp_server.config import ServerConfig
from fp_server.elapsed import Elapsed
from fp_server.keeping import Keeper
from fp_server.ledger import LostUpdates
from fp_server.limits import Complaints
from fp_server.log import Also, EventLog
from fp_server.narrate import tell
from fp_server.objects import ObjectStore
from fp_server.reviewing import review_round
from fp_server.rounds import RunMachine
from fp_server.sessions import Session
from fp_server.work import aggregate_round, choose_units

logger = logging.getLogger("fp_server")

TICK = 0.5
"""Seconds between looks at the clock."""
STALL_SECONDS = 5.0
"""Seconds without such a look after which the process has stood still: it was frozen, or has waited for its disk."""
AGAIN = 1.0
"""Seconds until an event that must not be lost is tried again on a full disk."""
PLANS, PLANS_AT_ONCE = 30.0, 20.0
"""Seconds between plans of one device that differ, each an event in the log, and how many at once."""
_FREEING = (e.RoundCommitted, e.RoundClosed, e.UpdatesReviewed, e.RunEnded, e.DeviceDropped)
"""Events after which objects may be needed no more."""
STOPPING = "the server is stopping; try again later"


def steady_clock() -> Callable[[], float]:
    """Seconds since the epoch as of now, counted on by the monotonic clock: a step of the wall clock drops no device."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class Coordinator(Archive):
    """All runs and all sessions of one server."""

    def __init__(self, config: ServerConfig, log: EventLog, store: ObjectStore, clock: Callable[[], float] | None = None) -> None:
        super().__init__(log)
        self.config, self.store, self.clock = config, store, clock or steady_clock()
        self.sessions: dict[str, Session] = {}
        self.complaints = Complaints()
        self.new_plans = Buckets(1 / PLANS, PLANS_AT_ONCE)
        self._problems: dict[str, str] = {}
        self.changed = asyncio.Condition()
        self.lock = asyncio.Lock()
        self.background = Background()
        self.keeper = Keeper(log, store, self.background, lambda: self.active, self.note)
        self._elapsed = Elapsed(store.scratch.parent)
        self._bytes_down = 0
        self._failing_since: float | None = None
        """Since when the log can't be written, as far as that is not made up for yet."""
        self._looked: float | None = None
        """When the state was last looked at, by the clock."""
        self.draining = False
        """The server is about to stop: it begins nothing more."""

    # -- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Fold the log; take up what was under way. Raises DamagedError when the log is damaged, StorageError when a revoked
        device can't leave the round because the disk is full."""
        self.log.check()
        self.names = self.log.runs()
        for name in self.names:
            machine = self.fold(name)
            if machine.ended is None:
                self.active = machine
            else:
                self.keeper.kept |= machine.references()
        fault("server.start.folded")
        if self.active is not None:
            await self._leave_revoked(self.active)
        self.keeper.sweep()
        fault("server.start.swept")
        if self.active is not None:
            logger.info("run %s taken up again: %s", self.active.name, self.active.phase)
            current = self.active.current
            await self.post(Recovered(None if current is None else self._elapsed.of(current.opened.key)))
        self.background.spawn(self._tick())
        self.background.spawn(self.keeper.collect())

    async def _leave_revoked(self, machine: RunMachine) -> None:
        """Revoked devices leave the open round as `operations.kick` has it, where a crash came between it and the revocation.

        Before anything is decided, or a round that is complete would be closed with their updates. It is handed in at the time
        that the fold has come to: the time the server was down is nobody's, and what follows is decided when all is taken up.
        """
        revoked: list[str] = []
        self.log.enter(lambda c: revoked.extend(name for name in sorted(machine.plans) if books.revoked(c, name)))
        machine.revoked.update(revoked)
        for name in revoked:
            if (event := machine.leaving(name)) is not None:
                await self.log.append(event, machine.told_at)
                tell(event)
                machine.handle(event, machine.told_at)

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
        await self.background.stop(patience)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                await self.look_at_log()
                await self.post(Tick())
                await self._note_elapsed()
            except Exception:  # the clock must go on, whatever one tick ran into
                logger.exception("a look at the clock failed")

    async def _note_elapsed(self) -> None:
        now = self.clock()
        if self.active is not None and (current := self.active.current) is not None and self._elapsed.due(now):
            await asyncio.to_thread(self._elapsed.note, current.opened.key, now - current.opened_at, now)

    async def look_at_log(self) -> None:
        """Where the log could not be written: whether it can again, as nobody else may have anything to write."""
        if self._failing_since is None:
            return
        async with self.lock:
            try:
                await self.log.touch()
            except StorageError as error:
                self.note("log", str(error))
                return
            if self.active is not None:
                self._excuse(self.active, self.clock())
            self._failing_since = None
            self.note("log")

    def _excuse(self, machine: RunMachine, now: float) -> None:
        """What devices said while the log could not be written, or this process stood still, was not heard: that time is not
        theirs."""
        if self._failing_since is not None:
            machine.pardon(now - self._failing_since, now)
            self._failing_since = now
        elif self._looked is not None and now - self._looked > STALL_SECONDS:
            stood = now - self._looked
            logger.warning("the server stood still for %.0f s; that time is not the devices', within the round's limit", stood)
            machine.pardon(stood, now)
        self._looked = now

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

    # -- the one way in --------------------------------------------------------------------------

    async def post(self, happening: e.Event | Stimulus, also: Also | None = None) -> None:
        """Commit (if it is an event; `also` in its transaction), hand in, do what is asked. Raises StorageError; then nothing
        happened.

        What was begun is finished even when the caller is cancelled (its stream broke): an event that is in the
        log and not in the machine would be a state that no restart gives again.
        """
        await self.background.whole(self._locked_post(happening, also))

    async def _locked_post(self, happening: e.Event | Stimulus, also: Also | None) -> None:
        async with self.lock:
            await self.post_locked(happening, also)

    async def post_locked(self, happening: e.Event | Stimulus, also: Also | None = None) -> None:
        """`post`, for who holds the lock already."""
        machine = self.active
        if machine is None:
            self._looked = self.clock()
            return
        pending: deque[e.Event | Stimulus] = deque([happening])
        effects: list[Command] = []
        try:
            while pending:
                item, now = pending.popleft(), self.clock()
                self._excuse(machine, now)
                if isinstance(item, e.Event):
                    if item.run != machine.name:
                        return
                    try:
                        await self.log.append(item, now, also if item is happening else None)
                    except StorageError as error:
                        self.note("log", str(error))
                        self._failing_since = now
                        if item is happening:
                            raise
                        return  # what followed from it is asked for again at the next tick
                    self.note("log")
                    self._failing_since = None
                    tell(item)
                before = machine.references() if isinstance(item, _FREEING) else frozenset()
                commands = machine.handle(item, now)
                if isinstance(item, e.Event):
                    fault("server.machine.handled", type(item).__name__)
                if machine.ended is not None:
                    self.keeper.kept |= machine.references()
                if isinstance(item, _FREEING):
                    self.keeper.clear_arrivals()
                if before:
                    self.background.spawn(self.keeper.free(before, machine))
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
                for source in set(self._problems) - {"log"}:  # the others were of its objects
                    self.note(source)
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
                self.background.work(self._choose(machine, command))
            case Review() | Aggregate():
                self.background.work(self._aggregate(machine, command))
            case Record():
                raise AssertionError("records are handled where they are made")
            case _:
                if (session := self.sessions.get(command.device)) is not None:
                    session.say(command)

    async def _choose(self, machine: RunMachine, command: Choose) -> None:
        try:
            event: e.Event = await self.background.heavy(choose_units, machine, command.key, command.device)
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
        with self.keeper.making():
            await self._aggregated(machine, command)

    async def _aggregated(self, machine: RunMachine, command: Review | Aggregate) -> None:
        delay = 1.0
        while machine.ended is None and not self.draining:
            problem = f"round {command.key.round + 1} of {machine.name!r} can't be aggregated, trying again: "
            try:
                event: e.UpdatesReviewed | e.RoundCommitted
                if isinstance(command, Review):
                    event = await self.background.heavy(review_round, machine, self.store, command.key)
                else:
                    event = await self.background.heavy(aggregate_round, machine, self.store, command.key, self._bytes_down)
                    self._bytes_down = 0
            except TooLate:  # the run was stopped meanwhile
                break
            except LostUpdates as error:  # the round goes on until they are there again, or by its usual rules
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
                await self.keeper.free(frozenset(made), machine)  # the run was stopped meanwhile
                await self.background.heavy(memory.give_back)
                return
            await asyncio.sleep(delay)
            delay = min(60.0, delay * 2)
        self.note("aggregation")

    async def insist(self, event: e.Event) -> None:
        """Post an event that must not be lost, waiting for disk space if need be."""
        await self.until_stored(lambda: self.post(event))

    async def until_stored(self, write: Callable[[], Awaitable[None]]) -> None:
        """Try a write again for as long as it raises StorageError."""
        while True:
            try:
                return await write()
            except StorageError:  # noted where it was met
                await asyncio.sleep(AGAIN)

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

    def fetched(self, size: int) -> None:
        """Bytes of adapter objects sent to devices, for the round's account."""
        self._bytes_down += size
