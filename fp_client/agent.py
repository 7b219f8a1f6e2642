"""The daemon's brain: what the server says comes in, work goes to the worker, reports go out.

One task at a time. Any failure of a task is told to the server and the daemon lives on; only a refused
identity, another schema, or a server that stays away or in trouble end it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Protocol

from common.bucket import Bucket
from common.errors import (
    AlreadyDone,
    ConfigError,
    DigestError,
    FedPrunerError,
    IdentityError,
    InUseError,
    LimitError,
    NotFound,
    ProtocolError,
    TooLate,
    UnreachableError,
    UpdateRejected,
    WorkerError,
)
from common.faults import fault
from common.transport.wire import Backoff
from common.types import (
    Assignment,
    PlanReport,
    ProbeReport,
    ProbeTask,
    Progress,
    RunSpec,
    TaskFailed,
    TaskKey,
    UnitObject,
    UpdateReady,
)
from fp_client.cache import ObjectCache
from fp_client.guard import Guard
from fp_client.health import Link
from fp_client.messages import AdapterFile, OnProgress, TrainResult
from fp_client.plans import WORDS, Plans, cancel, same_weights
from fp_client.policy import Policy
from fp_client.rpc import Session
from fp_client.rpc_objects import Transfer
from fp_client.says import Cancel, DeviceSays, RunEnded, ServerSays, Unreadable
from fp_client.state import Outbox, Runs

log = logging.getLogger(__name__)

SETTLED_SECONDS = 30.0
"""A session that has lived this long counts as a success for the backoff, whatever ended it. So does one in which a task
was done, and one that brought a message before the server went away."""

MESSAGES, BURST = 10.0, 100.0
"""Messages a second that are read from a server, and how many at once."""

NO_USE = (UpdateRejected, TooLate, AlreadyDone, NotFound)
"""After these the server would refuse the same update again; whatever else a push ends with, the update is kept for another."""

Task = ProbeTask | Assignment


def _named(spec: RunSpec, task: Task) -> str:
    """What a task is called in the log. An evaluation's key is of the round that would come next.

    In a run whose method asks for no similarities, one before the first round can't be told from that round's probe.
    """
    number = task.key.round
    if isinstance(task, Assignment):
        return f"round {number + 1}, train"
    if number >= spec.rounds or (spec.similarity and not task.similarity):
        return f"after round {number}, evaluation" if number else "before round 1, evaluation"
    return f"round {number + 1}, probe"


class Work(Protocol):
    """What a device does with its weights and data; see `fp_client.work`. Raises errors of `common.errors`."""

    budget_bytes: int

    async def fingerprint(self, spec: RunSpec, progress: OnProgress) -> str:
        """Fingerprint of this device's weights of the run's model."""

    async def plan(self, spec: RunSpec) -> PlanReport:
        """Data counted and checked, capacities by the planner."""

    async def probe(self, spec: RunSpec, task: ProbeTask, adapter: tuple[AdapterFile, ...], progress: OnProgress) -> ProbeReport:
        """Run the probe."""

    async def train(
        self, spec: RunSpec, task: Assignment, adapter: tuple[AdapterFile, ...], out: Path, progress: OnProgress
    ) -> TrainResult:
        """Train; the update is written to `out`."""

    async def close(self) -> None:
        """End the worker process."""


class Agent:
    """Holds a session open and does what it brings, until stopped by cancellation."""

    def __init__(
        self, open_session: Callable[[], Awaitable[Session]], transfer: Transfer, work: Work, policy: Policy, cache: ObjectCache,
        runs: Runs, outbox: Outbox, backoff: Backoff, beat_seconds: float = 5.0,
    ) -> None:  # fmt: skip
        self._open, self._transfer, self._work = open_session, transfer, work
        self._policy, self._cache, self._runs, self._outbox = policy, cache, runs, outbox
        self._backoff, self._beat_seconds = backoff, beat_seconds
        self._messages = Bucket(MESSAGES, BURST)  # of all sessions: who ends each after a hundred messages gets no more
        self._guard, self._one = Guard(policy, runs.directory / ".asked.json"), asyncio.Lock()
        self._plans = Plans(work, self._guard, runs, outbox, self._one, self._tell, self._note, self.reconnect)
        self._session: Session | None = None
        self.link = Link(since=monotonic(), reason="the daemon has just started")
        self._task: asyncio.Task[None] | None = None
        self._again = False
        """Whether the task was sent again while its update was pushed: that may have been accepted, and found damaged since."""
        self._said: Task | None = None
        self._last_probe: tuple[ProbeTask, ProbeReport] | None = None
        self._progress = ("", 0, 0)
        self._heard = self._worked = self._again = False

    async def reconnect(self) -> None:
        """Open the session anew at once: the certificate was renewed, and a server ends what an older one opened when that one
        ends. A task under way goes on."""
        self._again = True
        if self._session is not None:
            await self._session.finish()

    async def replan(self) -> None:
        """What this device can hold has changed: the server asks whoever connects, before the next round. A task under way goes
        on."""
        await self._plans.forget_all()
        await self.reconnect()

    async def run(self) -> None:
        """Stay connected. Raises IdentityError, InUseError, ProtocolError (other schema), ConfigError; UnreachableError
        and whatever else keeps a session from being opened after bounded tries."""
        failures = 0
        try:
            while True:
                begin, self._heard, self._worked = monotonic(), False, False
                error = await self._one_session()
                if self._again:
                    self._again = False
                    continue
                away = isinstance(error, UnreachableError)
                if self._worked or (away and self._heard) or monotonic() - begin > SETTLED_SECONDS:
                    failures = 0
                failures += 1
                if failures >= self._backoff.attempts:
                    raise error
                delay = self._backoff.delay(failures - 1)
                log.warning("%s; try %d of %d in %.1f s", error, failures + 1, self._backoff.attempts, delay)
                await asyncio.sleep(delay)
        finally:
            await self._plans.close()
            await self._drop()
            await self._work.close()

    async def _one_session(self) -> FedPrunerError:
        """One session to its end; why it ended, when that is worth another try."""
        try:
            session = await self._open()
        except (IdentityError, InUseError, ProtocolError, ConfigError):
            raise  # time mends none of these
        except FedPrunerError as error:  # the server is away, full, in trouble with its disk, or just being replaced
            self.link = self.link.lost(str(error))
            return error
        self.link = self.link.opened(session.device)
        log.info("connected as %r (server %s)", session.device, session.server_version)
        self._session = session
        try:
            if self._again:  # asked for while this one was being opened
                await session.finish()
            async for said in session:
                self._heard = True
                await self._handle(said)
                if (wait := self._messages.take(monotonic())) > 0:  # not reading is what slows the sender down
                    await asyncio.sleep(wait)
            return UnreachableError("the server ended the session")
        except (IdentityError, InUseError):
            raise
        except FedPrunerError as error:
            return error
        finally:
            self._session, self.link = None, self.link.lost("the session has ended")
            await session.close()

    async def _handle(self, said: ServerSays) -> None:
        if isinstance(said, RunSpec):
            await self._plans.asked(said)
        elif isinstance(said, Cancel):
            log.info("%s: dropped (%s)", self._called(said.key), said.reason)
            if self._said is not None and self._said.key == said.key:
                await self._drop()
            self._outbox.drop_task(said.key)
        elif isinstance(said, RunEnded):
            log.info("run %s: %s", said.run, said.outcome)
            fault("device.run.ended")
            await self._plans.forget(said.run)
            if self._said is not None and self._said.key.run == said.run:
                await self._drop()
            for forget in (self._runs.forget, self._outbox.drop):
                try:
                    forget(said.run)
                except OSError as error:  # not worth the daemon: it is looked at again only if the run comes back
                    log.warning("run %s: can't delete %s: %s", said.run, error.filename, error.strerror)
        elif isinstance(said, Unreadable):
            await self._refuse(said)
        else:
            await self._begin(said)

    async def _refuse(self, said: Unreadable) -> None:
        if said.key is None:
            await self._tell(self._plans.refusal(said.run, "", said.error))
        else:
            log.error("run %s, round %d: the task can't be read: %s", said.run, said.key.round + 1, said.error)
            await self._tell(TaskFailed(said.key, type(said.error).__name__, str(said.error)[:WORDS]))

    async def _begin(self, said: Task) -> None:
        running = self._task is not None and not self._task.done()
        if running and self._said == said:
            log.info("%s: the running task was sent again; it goes on", self._called(said.key))
            self._again = self._progress[0] == "push"
            return
        if self._last_probe is not None and self._last_probe[0] == said:
            await self._tell(self._last_probe[1])
            return
        await self._drop()
        self._said, self._task = said, asyncio.create_task(self._do(said))

    def _called(self, key: TaskKey) -> str:
        """A task's name in the log: the running one's by what it is."""
        if self._said is not None and self._said.key == key:
            with suppress(FedPrunerError):
                return f"run {key.run}, {_named(self._runs.get(key.run), self._said)}"
        return f"run {key.run}, round {key.round + 1}, task"

    async def _drop(self) -> None:
        """Stop the task under way; its worker is killed."""
        task, self._task, self._said = self._task, None, None
        if task is not None:
            await cancel(task)

    async def _tell(self, value: DeviceSays) -> None:
        """Say it if a session is open; what is lost is asked for again by the server."""
        if self._session is not None:
            with suppress(FedPrunerError):
                await self._session.send(value)

    async def _do(self, said: Task) -> None:
        key, kind = said.key, "probe" if isinstance(said, ProbeTask) else "train"
        where = f"run {key.run}, round {key.round + 1}, {kind}"  # until the run is known
        self._progress = ("fetch", 0, 0)
        beat = asyncio.create_task(self._beat(key))
        try:
            async with self._one:
                try:
                    spec = self._runs.get(key.run)
                    where = f"run {key.run}, {_named(spec, said)}"
                    log.info("%s: begins", where)
                    fault("device.task.begin", kind)
                    if isinstance(said, ProbeTask):
                        await self._probe(spec, said)
                    else:
                        await self._train(spec, said)
                finally:  # from here on the same task, said again, is to be done again
                    if self._said is said:
                        self._said = None
                self._worked = True
                log.info("%s: done", where)
        except (TooLate, AlreadyDone) as error:
            log.warning("%s: the server has no use for it any more: %s", where, error)
            self._outbox.drop_task(key)
        except FedPrunerError as error:
            log.error("%s: failed: %s: %s", where, type(error).__name__, error)
            if isinstance(error, NO_USE):
                self._outbox.drop_task(key)
            await self._tell(TaskFailed(key, type(error).__name__, str(error)[:WORDS]))
        except Exception as error:
            log.exception("%s: failed", where)
            await self._tell(TaskFailed(key, WorkerError.__name__, f"unexpected {type(error).__name__}: {error}"))
        finally:
            await cancel(beat)

    async def _probe(self, spec: RunSpec, task: ProbeTask) -> None:
        self._guard.probe(spec, task, self._plans.report(spec.run))
        fault("device.task.allowed", "probe")
        same_weights(spec, await self._work.fingerprint(spec, self._note))
        if self._policy.tells(task):
            adapter = await self._fetch(task.adapter)
            fault("device.task.fetched", "probe")
            report = self._policy.redact(await self._work.probe(spec, task, adapter, self._note))
        else:
            report = ProbeReport.of_nothing(task.key)
        fault("device.task.done", "probe")
        self._last_probe = (task, report)
        await self._tell(report)

    async def _train(self, spec: RunSpec, task: Assignment) -> None:
        self._guard.assignment(spec, task, self._plans.report(spec.run))
        fault("device.task.allowed", "train")
        try:
            while True:
                self._again = False
                await self._push(task, await self._update(spec, task))
                if not self._again:
                    return
        except DigestError as error:
            if await asyncio.to_thread(self._outbox.find, task) is not None:
                raise  # the bytes here are those that were trained
            log.warning(
                "run %s, round %d: the update on this disk is damaged, training again: %s", spec.run, task.key.round + 1, error
            )
            await self._push(task, await self._update(spec, task))

    async def _update(self, spec: RunSpec, task: Assignment) -> UpdateReady:
        """The update that answers the assignment: one that was kept, or trained now."""
        ready = await asyncio.to_thread(self._outbox.find, task)
        if ready is not None:
            log.info("run %s, round %d: already trained; pushing the update that was kept", task.key.run, task.key.round + 1)
            return ready
        self._guard.another(spec, task)
        same_weights(spec, await self._work.fingerprint(spec, self._note))
        adapter = await self._fetch(task.adapter)
        fault("device.task.fetched", "train")
        out = self._outbox.blank(task.key.run)
        result = await self._work.train(spec, task, adapter, out, self._note)
        fault("device.task.done", "train")
        return await asyncio.to_thread(self._outbox.put, task, out, result.metrics)

    async def _push(self, task: Assignment, ready: UpdateReady) -> None:
        ready = replace(ready, metrics=self._policy.redact_metrics(ready.metrics))  # at the last moment: it may be an older one
        path, note = self._outbox.path(task.key.run), lambda done, total: self._note("push", done, total)
        sent = self._guard.sent(task.key)
        sent.size, sent.units = ready.ref.size, len(task.units)
        await self._transfer.push(ready, path, note, self._policy.check_upload, sent)

    async def _fetch(self, adapter: tuple[UnitObject, ...]) -> tuple[AdapterFile, ...]:
        total, done = sum(item.ref.size for item in adapter), 0
        if total > self._cache.limit:
            raise LimitError(f"the adapter has {total} bytes; client.toml allows {self._cache.limit} ([cache] max_size)")
        keep, files = frozenset(item.ref.digest for item in adapter), []
        for item in adapter:
            before = done
            path = await self._cache.get(
                item.ref,
                lambda ref, path, before=before: self._transfer.fetch(  # type: ignore[misc]
                    ref, path, lambda got, _: self._note("fetch", before + got, total)
                ),
                keep,
            )
            done += item.ref.size
            self._note("fetch", done, total)
            files.append(AdapterFile(item.layer, str(path)))
        return tuple(files)

    def _note(self, phase: str, done: int, total: int) -> None:
        self._progress = (phase, done, total)

    async def _beat(self, key: TaskKey) -> None:
        """Tell the progress: at once when it moves, at least every `beat_seconds` otherwise."""
        told, when = None, monotonic()
        while True:
            await asyncio.sleep(min(1.0, self._beat_seconds))
            if self._progress != told or monotonic() - when >= self._beat_seconds:
                told, when = self._progress, monotonic()
                await self._tell(Progress(key, *told))
