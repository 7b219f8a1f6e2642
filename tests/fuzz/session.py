"""The session state machine under random devices, operators, clocks and restarts.

A case is a sequence of moves. Honest moves take a run forward, so that the others meet it in every state: mutated and replayed
messages, messages of other devices and rounds, pushes of every kind, connections that come and go, ticks, operators, restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sqlite3
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from server_side import MANIFEST, blocks_of, digest_of, plan_report, probe_report, ready_for, run_toml

from common.blocks import write_blocks
from common.bucket import Buckets
from common.errors import FedPrunerError, StorageError
from common.pb import objects_pb2, session_pb2
from common.transport import serde
from common.types import Assignment, ModelManifest, TaskKey
from fp_server import commands as c
from fp_server import coordinator as coordinating
from fp_server import events as e
from fp_server import operations, reports
from fp_server.config import ServerConfig
from fp_server.coordinator import Coordinator
from fp_server.limits import OUTBOX, ServerLimits
from fp_server.log import Also
from fp_server.objects import ObjectStore
from fp_server.roundstate import PHASES
from fp_server.service import Sessions
from fp_server.sessions import Session
from fp_server.status import status
from fp_server.validation import check_metrics, check_update
from fuzz.base import shared_memory
from fuzz.source import TEXTS, Source, mutate

DEVICES = ("alice", "bob", "carol")
SMALL = ModelManifest("toy", "llama", 3, 8, 16, tuple(m for m in MANIFEST.modules if m.name == "self_attn.q_proj"), "ab" * 32)
EVENTS_A_MOVE = 24
"""No move may write more events than this: what devices say must not fill the log."""
MOVES = 60
"""Moves a case has at most."""


class MemoryLog:
    """An event log as text in memory: what is replayed has been encoded and decoded like the real one's."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str, str]] = []
        self.full = 0
        """So many writes fail from now on."""
        self._books = sqlite3.connect(":memory:")  # of an authority that has issued and revoked nothing
        self._books.executescript("CREATE TABLE certificates (name, role, revoked); CREATE TABLE revocations (name);")

    def enter(self, also: Also) -> None:
        also(self._books)

    async def touch(self) -> None:
        if self.full:
            self.full -= 1
            raise StorageError("the disk is full")

    async def append(self, event: e.Event, at: float = 0.0, also: Any = None) -> None:
        await self.touch()
        self.rows.append((event.run, at, *e.encode(event)))

    def check(self) -> None:
        pass

    def runs(self) -> list[str]:
        return [run for run, _, kind, _ in self.rows if kind == "RunStarted"]

    def replay(self, run: str, first: int = 0) -> Any:
        return ((at, e.decode(kind, body)) for name, at, kind, body in self.rows[first:] if name == run)

    def of(self, kind: type) -> list[Any]:
        return [e.decode(kind.__name__, body) for _, _, name, body in self.rows if name == kind.__name__]


class Inline(ThreadPoolExecutor):
    """What is for a thread done at once: the same bytes give the same case."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done


class Alarm(logging.Handler):
    """Whatever is logged with a trace is a finding."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.found.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


@dataclass
class Peer:
    """A device as the case sees it."""

    session: Session | None = None
    tasks: list[Any] = field(default_factory=list)


class Case:
    """One case: a server without wire or clock, and three devices."""

    def __init__(self, source: Source, directory: Path) -> None:
        self.source, self.directory, self.now = source, directory, 1000.0
        self.log = MemoryLog()
        self.peers = {name: Peer() for name in DEVICES}
        self.said: list[bytes] = []
        self.pushed: list[tuple[bytes, bytes]] = []
        self.runs = 0
        self.coordinator = self._server()

    def _server(self) -> Coordinator:
        config = ServerConfig(names=["x"], limits=ServerLimits(disk_reserve_bytes=0))
        made = Coordinator(config, self.log, ObjectStore(self.directory), lambda: self.now)  # type: ignore[arg-type]
        made.background.thread = Inline()
        made.new_plans = Buckets(1e9, 1e9)  # who is slowed down takes real time
        self.ears = Sessions(made, None)  # type: ignore[arg-type]
        return made

    async def play(self) -> None:
        """All moves, and what must hold after each."""
        await self.coordinator.start()
        try:
            await self._start()
            for move in range(MOVES):
                if self.source.left <= 0:
                    break
                before = len(self.log.rows)
                with contextlib.suppress(FedPrunerError):  # the session's handler makes a status of it
                    await self._move()
                await self._settle()
                assert len(self.log.rows) - before <= EVENTS_A_MOVE, f"{len(self.log.rows) - before} events of one move"
                self._check(folds=move % 8 == 7)
            self._check(folds=True)
            self._check_log()
        finally:
            await self.coordinator.stop()

    async def _settle(self) -> None:
        """Let what the coordinator has begun come to its end, and deliver what it says."""
        for _ in range(200):
            busy = [t for t in self.coordinator.background.tasks if t.get_coro().__name__ not in ("_tick", "collect")]  # type: ignore[union-attr]
            if not busy and not self.coordinator.background.writes:
                break
            await asyncio.sleep(0)
        for peer in self.peers.values():
            while peer.session is not None and not peer.session.outbox.empty():
                command = peer.session.outbox.get_nowait()
                if isinstance(command, FedPrunerError):
                    await self.coordinator.disconnect(peer.session)
                    peer.session = None
                else:
                    peer.tasks = [*peer.tasks[-7:], command]

    # -- moves -----------------------------------------------------------------------------------

    async def _start(self) -> None:
        self.runs += 1
        source = self.source
        toml = run_toml(
            source.of(("fresh", "global")), name=f"run-{self.runs}", rounds=1 + source.below(3), min_devices=1 + source.below(2),
            quorum=source.of((1.0, 0.5)), max_attempts=2, lora_rank=1,
            method=source.of(("random", "random", "random", "fedpruner")),
        )  # fmt: skip
        await operations.start_run(self.coordinator, toml, SMALL)

    async def _move(self) -> None:
        source = self.source
        name = source.of(DEVICES)
        peer = self.peers[name]
        match source.below(17):
            case 0 | 1:
                peer.session = Session(name)
                await self.coordinator.connect(peer.session)
            case 2:
                if peer.session is not None:
                    await self.coordinator.disconnect(peer.session)
                    peer.session = None
            case 3:
                self.now += source.of((0.5, 1.0, 60.0, 601.0, 90_000.0, -5.0))
                await self.coordinator.look_at_log()
                await self.coordinator.post(c.Tick())
            case 4 | 5 | 6:
                for one in DEVICES:
                    await self._answer(one, False)
            case 7:
                await self._answer(name, True)
            case 8:
                await self._say(name, self._raw())
            case 9:
                if self.said:
                    await self._say(name, source.of(self.said))
            case 10:
                await self._push(name, True)
            case 11:
                if self.pushed:
                    await self._arrive(name, *source.of(self.pushed))
            case 12:
                run = source.of((*self.coordinator.names, "none"))
                await operations.control(self.coordinator, run, source.of(("pause", "resume", "stop", "x")))
            case 13:
                await self._restart()
            case 14:
                if source.below(3) == 0:
                    await operations.kick(self.coordinator, name)
                elif self.coordinator.active is None:
                    await self._start()
            case 16:
                self.log.full = 1 + source.below(5)
            case 15:
                status(self.coordinator.active, "", [name], source.of((0, 1, 3)), source.of((0, 1, 2**32 - 1)))

    def _raw(self) -> bytes:
        message = session_pb2.DeviceMessage()
        if self.source.below(2):
            mutate(message, self.source, 3)
            return message.SerializeToString()
        return self.source.bytes(64)

    async def _answer(self, name: str, mutated: bool) -> None:
        """What the device was asked last, honestly or not."""
        peer = self.peers[name]
        command = peer.tasks.pop() if peer.tasks else None
        message = session_pb2.DeviceMessage()
        if isinstance(command, c.SendPlanRequest):
            message.plan.CopyFrom(serde.plan_report_to_pb(plan_report(command.spec.run, SMALL, 2)))
        elif isinstance(command, c.SendProbe):
            message.probe.CopyFrom(serde.probe_report_to_pb(probe_report(command.task, name, SMALL.layers)))
        elif isinstance(command, c.SendAssignment):
            await self._push(name, mutated, command.assignment)
            return
        else:
            return
        if mutated:
            mutate(message, self.source, 1 + self.source.below(3))
        await self._say(name, message.SerializeToString())

    async def _say(self, name: str, raw: bytes) -> None:
        """As `Sessions._listen` does: only a connected device is heard."""
        if self.peers[name].session is None:
            return
        self.said = [*self.said[-15:], raw]
        try:
            message = session_pb2.DeviceMessage.FromString(raw)
        except DecodeError:
            return
        await self.ears._hear(name, message)

    async def _push(self, name: str, mutated: bool, assignment: Assignment | None = None) -> None:
        machine, source = self.coordinator.active, self.source
        if assignment is None:
            if machine is None or machine.current is None:
                return
            assignment = machine.assignment(name, machine.current.opened.key)
        path = self.directory / "update"
        write_blocks(path, blocks_of(assignment, name, SMALL))
        data = path.read_bytes()
        header = serde.ready_to_pb(ready_for(assignment.key, data), 0)
        if mutated:
            match source.below(4):
                case 0:
                    data = data[: source.byte()] + source.bytes(16) + data[source.byte() :]
                    header = serde.ready_to_pb(ready_for(assignment.key, data), 0)
                case 1:
                    header.key.round, header.key.attempt = source.below(4), source.below(4)
                case 2:
                    header.key.run = source.of((*TEXTS, *self.coordinator.names))
                case 3:
                    mutate(header, source, 2)
        self.pushed = [*self.pushed[-7:], (header.SerializeToString(), data)]
        await self._arrive(name, header.SerializeToString(), data)

    async def _arrive(self, name: str, header: bytes, data: bytes) -> None:
        """The steps of `Objects.Push`, with the bytes there already."""
        coordinator = self.coordinator
        ready = serde.ready_from_pb(objects_pb2.PushHeader.FromString(header))
        machine = coordinator.machine_for(ready.key.run)
        if machine.check_push(name, ready.key, ready.ref):
            return
        assignment = machine.assignment(name, ready.key)
        path = self.directory / "arrived"
        path.write_bytes(data)
        try:
            check_metrics(ready.metrics, len(assignment.units))
            if digest_of(data) != ready.ref.digest or len(data) != ready.ref.size:
                return
            check_update(path, assignment, machine.manifest)
        except FedPrunerError as error:
            await reports.reject(coordinator, name, ready.key, error)
            raise
        coordinator.store.adopt(path, ready.ref.digest)
        await reports.accept(coordinator, name, ready)

    async def _restart(self) -> None:
        """kill -9 and start again: what the log says is what was."""
        for peer in self.peers.values():
            peer.session, peer.tasks = None, []
        await self.coordinator.stop()
        self.coordinator = self._server()
        await self.coordinator.start()

    # -- what must hold --------------------------------------------------------------------------

    def _check(self, folds: bool) -> None:
        coordinator, machine = self.coordinator, self.coordinator.active
        known = set(DEVICES)
        assert set(coordinator.sessions) <= known and len(coordinator._problems) <= 4
        for session in coordinator.sessions.values():
            assert session.outbox.qsize() <= OUTBOX + 1
        if machine is None:
            return
        assert machine.connected <= known and machine.stale <= known and set(machine.plans) <= known
        if machine.current is not None:
            assert set(machine.current.members) <= known
            for member in machine.current.members.values():
                assert set(member.reached) <= PHASES
        if folds:
            assert state(coordinator.fold(machine.name)) == state(machine), "the log folds to something else"

    def _check_log(self) -> None:
        accepted: Counter[tuple[str, TaskKey]] = Counter((one.device, one.key) for one in self.log.of(e.UpdateAccepted))
        assert not accepted or max(accepted.values()) == 1, "an update was accepted twice"
        committed: Counter[tuple[str, int]] = Counter()
        for one in self.log.of(e.RoundCommitted):
            committed[one.run, one.key.round] += 1
            assert all(accepted[device, one.key] == 1 for device in one.weights), "an update counts that was not accepted"
        assert not committed or max(committed.values()) == 1, "a round was committed twice"


def state(machine: Any) -> Any:
    """What a fold must give again, comparable."""

    def member(one: Any) -> Any:
        return (one.stage, *(None if x is None else e.encode(x) for x in (one.probe, one.assigned, one.accepted, one.dropped)))

    def a_round(one: Any) -> Any:
        return (
            e.encode(one.opened),
            {d: member(m) for d, m in one.members.items()},
            one.closed and e.encode(one.closed),
            one.reviewed and e.encode(one.reviewed),
        )

    return (
        {d: e.encode(p) for d, p in machine.plans.items()}, machine.ledger, machine.broadcast, machine.next_round,
        machine.attempt, machine.failures, machine.paused, machine.ended and e.encode(machine.ended),
        machine.current and a_round(machine.current),
        [(a_round(one), commit and e.encode(commit)) for one, commit in machine.history],
    )  # fmt: skip


def session(data: bytes) -> None:
    """One case, from its bytes."""
    run_case(Case, Source(data))


def run_case(kind: type[Case], source: Source) -> None:
    """Play a case. Raises what it finds."""
    coordinating.AGAIN = 0.0
    directory, alarm = shared_memory("fuzz-session-"), Alarm()
    logger = logging.getLogger("fp_server")
    logger.addHandler(alarm)
    loop = asyncio.new_event_loop()
    loop.set_default_executor(Inline(1))
    loop.set_exception_handler(lambda _, context: alarm.found.append(str(context)))
    try:
        loop.run_until_complete(kind(source, directory).play())
    finally:
        loop.close()
        logger.removeHandler(alarm)
        shutil.rmtree(directory)
    assert not alarm.found, alarm.found


def session_seeds() -> list[bytes]:
    """Runs that get somewhere: connect all, then answers and ticks."""
    connect, answer, tick = bytes((0, 0, 1, 0, 2, 0)), bytes((0, 4)), bytes((0, 3, 1))
    whole = bytes((0, 0, 0, 0, 0)) + connect + answer * 12
    return [
        whole,
        whole[:11] + (answer + tick) * 8,
        whole + bytes((0, 13)) + connect + answer * 6,
        whole + bytes((1, 7, 3, 2, 10, 2)),
        whole[:11] + (answer + bytes((0, 16, 1)) + answer + tick) * 6,
    ]
