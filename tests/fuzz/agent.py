"""The device's daemon under a random server: whatever it says, the daemon stays within its directory and its bounds."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server_side import plan_report, probe_report

from common.errors import (
    BudgetError,
    DigestError,
    FedPrunerError,
    IdentityError,
    NotFound,
    TooLate,
    UnreachableError,
    WorkerError,
)
from common.pb import session_pb2
from common.transport.wire import Backoff
from common.types import ObjectRef, PlanReport, ProbeReport, ProbeTask, RunSpec, UpdateReady
from fp_client.agent import Agent
from fp_client.cache import ObjectCache
from fp_client.messages import TrainResult
from fp_client.policy import Policy
from fp_client.rpc import heard
from fp_client.rpc_objects import OnBytes, Sent
from fp_client.state import KEPT, Outbox, Runs
from fuzz.base import METRICS, SPEC, message_of, shared_memory
from fuzz.decoders import SERVER_MESSAGES
from fuzz.session import Alarm, Inline
from fuzz.source import Source

ERRORS = (None, None, None, BudgetError("too small", 5), WorkerError("it broke"), UnreachableError("away"))


class FakeWork:
    """A worker that does what it is asked or fails, as the bytes say."""

    budget_bytes = 1 << 20

    def __init__(self, source: Source) -> None:
        self._source = source

    async def _may_fail(self) -> None:
        await asyncio.sleep(0)
        if (error := self._source.of(ERRORS)) is not None:
            raise error

    async def fingerprint(self, spec: RunSpec, progress: Any) -> str:
        await self._may_fail()
        return "ab" * 32

    async def plan(self, spec: RunSpec) -> PlanReport:
        await self._may_fail()
        return plan_report(spec.run)

    async def probe(self, spec: RunSpec, task: ProbeTask, adapter: Any, progress: Any) -> ProbeReport:
        await self._may_fail()
        return probe_report(task, "alice", 6)

    async def train(self, spec: RunSpec, task: Any, adapter: Any, out: Path, progress: Any) -> TrainResult:
        await self._may_fail()
        out.write_bytes(b"an update")  # noqa: ASYNC240
        return TrainResult(METRICS)

    async def close(self) -> None:
        pass


class FakeTransfer:
    """Objects that come, don't come, or are others."""

    def __init__(self, source: Source) -> None:
        self._source = source

    async def fetch(self, ref: ObjectRef, target: Path, progress: Any) -> None:
        await asyncio.sleep(0)
        if self._source.below(3) == 0:
            raise self._source.of((NotFound("gone"), DigestError("other bytes")))
        target.write_bytes(b"x")  # noqa: ASYNC240

    async def push(self, ready: UpdateReady, path: Path, progress: OnBytes, allowed: Callable[[int], None], sent: Sent) -> bool:
        allowed(sent.bytes + ready.ref.size)
        await asyncio.sleep(0)
        sent.bytes += ready.ref.size  # also where it fails: the account is of what has left the device
        if self._source.below(3) == 0:
            raise self._source.of((TooLate("late"), UnreachableError("away")))
        return False


class FakeSession:
    """What a server says, decoded as the real session does."""

    device, server_version = "alice", "fuzz"

    def __init__(self, source: Source, messages: int) -> None:
        self._source, self._messages = source, messages

    async def __aiter__(self) -> Any:
        for _ in range(self._messages):
            if self._source.left <= 0:
                return
            message = message_of(session_pb2.ServerMessage, SERVER_MESSAGES, self._source.bytes(60))
            yield heard(message, "fuzz")
            for _ in range(self._source.below(30)):
                await asyncio.sleep(0)

    async def send(self, value: Any) -> None:
        if self._source.below(8) == 1:
            raise UnreachableError("the session has ended")

    async def close(self) -> None:
        pass


async def _play(source: Source, directory: Path) -> None:
    home = directory / "home"
    home.mkdir()
    runs, sessions = Runs(home / "runs"), 0

    async def opened() -> Any:
        nonlocal sessions
        sessions += 1
        if sessions > 3:
            raise IdentityError("enough")
        return FakeSession(source, 30)

    agent = Agent(
        opened, FakeTransfer(source), FakeWork(source), Policy(), ObjectCache(home / "objects", 1 << 20), runs,  # type: ignore[arg-type]
        Outbox(home / "outbox"), Backoff(0.0, 0.0, attempts=9), beat_seconds=0.01,
    )  # fmt: skip
    runs.remember(SPEC)
    try:
        await agent.run()
    except FedPrunerError as error:
        assert isinstance(error, IdentityError), error
    assert len(list((home / "runs").glob("[!.]*.json"))) <= KEPT


def agent(data: bytes) -> None:
    """One case, from its bytes."""
    directory, alarm = shared_memory("fuzz-agent-"), Alarm()
    outside = [directory / name for name in ("x.json", "x.safetensors", "etc.json", "home.json")]
    for one in outside:
        one.write_bytes(b"not the daemon's")
    logger = logging.getLogger("fp_client")
    logger.addHandler(alarm)
    loop = asyncio.new_event_loop()
    loop.set_default_executor(Inline(1))
    loop.set_exception_handler(lambda _, context: alarm.found.append(str(context)))
    try:
        loop.run_until_complete(_play(Source(data), directory))
        loop.run_until_complete(loop.shutdown_default_executor())
        assert sorted(p.name for p in directory.iterdir()) == sorted([*(p.name for p in outside), "home"])
    finally:
        loop.close()
        logger.removeHandler(alarm)
        shutil.rmtree(directory)
    assert not alarm.found, alarm.found


def agent_seeds() -> list[bytes]:
    """Each message as it is, one after the other; and messages with the bytes that the work on them takes, so that it is done."""
    said = [bytes((3, 1, n, 0)) + bytes((20,)) for n in range(len(SERVER_MESSAGES))]
    none = bytes((4, 0, 255, 255, 255, 5))  # a message that doesn't decode, in the middle of a session
    orders = b"".join(said), b"".join(said[n] for n in (0, 1, 1, 2, 2, 3, 0, 2, 4)), b"".join(reversed(said))
    plan, probe, train, again, ended = (_done(n, works) for n, works in ((0, 3), (1, 4), (2, 4), (2, 1), (4, 0)))
    whole = plan + probe + train + again + ended
    return [*orders, said[0] + none + said[1] + none, whole, train * 2]


def _done(number: int, works: int) -> bytes:
    """A message, time for what it asks for, and a byte for each thing that could fail then. 2: it doesn't, whatever it is."""
    return bytes((3, 1, number, 0, 29, *(2,) * works))
