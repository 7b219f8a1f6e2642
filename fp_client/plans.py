"""Plan requests: what this device can hold for a run, made one at a time beside the tasks, remembered, and told again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from common.errors import BudgetError, FedPrunerError, FingerprintError, PolicyError, StorageError, WorkerError
from common.types import PlanReport, RunSpec
from fp_client.guard import Guard
from fp_client.messages import OnProgress
from fp_client.state import Outbox, Runs

log = logging.getLogger(__name__)

AT_ONCE = 4
"""Plan requests that may wait for their answer: a server has one active run, and may change it."""
KEPT = 16
"""Reports that are remembered."""
PAUSES = (0.5, 3.0)
"""Seconds before a plan is tried again whose worker was killed, or for which the disk was full."""
AGAIN_SECONDS = 600.0
"""Until a plan is made once more that failed for all of these."""
WORDS = 500
"""The longest reason told to a server, in characters."""


class Planner(Protocol):
    """What a plan takes; see `fp_client.agent.Work`."""

    budget_bytes: int

    async def fingerprint(self, spec: RunSpec, progress: OnProgress) -> str:
        """Fingerprint of this device's weights of the run's model."""

    async def plan(self, spec: RunSpec) -> PlanReport:
        """Data counted and checked, capacities by the planner."""


class Plans:
    """Answers plan requests. `one`: held while the device works; `tell`: says it to the server."""

    def __init__(
        self, work: Planner, guard: Guard, runs: Runs, outbox: Outbox, one: asyncio.Lock,
        tell: Callable[[PlanReport], Awaitable[None]], note: OnProgress, reconnect: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        self._work, self._guard, self._runs, self._outbox = work, guard, runs, outbox
        self._one, self._tell, self._note, self._reconnect = one, tell, note, reconnect
        self._retrying: asyncio.Task[None] | None = None
        self._under_way: dict[RunSpec, asyncio.Task[None]] = {}
        self._reports: dict[str, tuple[RunSpec, PlanReport]] = {}

    def report(self, run: str) -> PlanReport | None:
        """What was told of a run, where it is remembered."""
        return self._reports[run][1] if run in self._reports else None

    async def asked(self, spec: RunSpec) -> None:
        """Answer a request: at once from memory, or when there is an answer."""
        known = self._reports.get(spec.run)
        if known is not None and known[0] == spec:  # |D_n| and budget are fixed when the device joins the run
            await self._tell(known[1])
        elif spec in self._under_way:
            return
        elif len(self._under_way) >= AT_ONCE:
            why = f"{len(self._under_way)} plan requests wait for their answer already; this device takes {AT_ONCE} at once"
            await self._tell(self.refusal(spec.run, "", PolicyError(why)))
        else:
            self._under_way[spec] = plan = asyncio.create_task(self._plan(spec))
            plan.add_done_callback(lambda _: self._under_way.pop(spec, None))

    async def forget(self, run: str) -> None:
        """The run is over."""
        for plan in [plan for spec, plan in self._under_way.items() if spec.run == run]:
            await cancel(plan)
        self._reports.pop(run, None)

    async def forget_all(self) -> None:
        """What this device can hold is another matter now; whoever asked before it was answered asks again."""
        await self.close()
        self._reports.clear()

    async def close(self) -> None:
        """Drop whatever is under way."""
        if self._retrying is not None:
            await cancel(self._retrying)
        for plan in list(self._under_way.values()):
            await cancel(plan)

    async def _plan(self, spec: RunSpec) -> None:
        said = ""
        try:
            self._guard.plan(spec)
            said = await self._fingerprint(spec)
            same_weights(spec, said)
            report = await self._lasting(spec)
            self._reports[spec.run] = (spec, report)
            while len(self._reports) > KEPT:
                del self._reports[next(iter(self._reports))]
            log.info("run %s: can take part: %s", spec.run, ", ".join(f"{c.gradient} {c.units} units" for c in report.capacities))
        except FedPrunerError as error:
            report = self.refusal(spec.run, said, error)
            if isinstance(error, (WorkerError, StorageError)) and (self._retrying is None or self._retrying.done()):
                self._retrying = asyncio.create_task(self._retry())
        except Exception as error:
            log.exception("run %s: the plan failed", spec.run)
            report = self.refusal(spec.run, said, WorkerError(f"unexpected {type(error).__name__}: {error}"))
        await self._tell(report)

    async def _retry(self) -> None:
        """The server asks whoever connects: what has failed for the moment must not keep the device out for weeks."""
        await asyncio.sleep(AGAIN_SECONDS)
        await self._reconnect()

    async def _fingerprint(self, spec: RunSpec) -> str:
        async with self._one:
            return await self._work.fingerprint(self._guard.policy.bounded(spec), self._note)

    async def _lasting(self, spec: RunSpec) -> PlanReport:
        """The plan, tried again when it failed for the moment: a refusal keeps the device out while its session lasts."""
        for pause in (*PAUSES, None):
            try:
                return await self._made(spec)
            except (WorkerError, StorageError) as error:
                if pause is None:
                    raise
                log.warning("run %s: the plan failed: %s; trying again in %.0f s", spec.run, error, pause)
                await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _made(self, spec: RunSpec) -> PlanReport:
        """What this device can hold for a run, which is remembered from here on."""
        policy, bounded = self._guard.policy, self._guard.policy.bounded(spec)
        async with self._one:
            report = policy.offered(await self._work.plan(bounded))
        policy.check_samples(report.samples)
        for run in await asyncio.to_thread(self._runs.remember, bounded):
            self._runs.forget(run)
            self._outbox.drop(run)
        return report

    def refusal(self, run: str, fingerprint: str, error: FedPrunerError) -> PlanReport:
        """Why this device can't take part."""
        log.warning("run %s: this device can't take part: %s", run, error)
        smallest = error.smallest if isinstance(error, BudgetError) else 0
        why = f"{type(error).__name__}: {error}"[:WORDS]
        return PlanReport(run, 0, fingerprint, (), (), smallest, why, self._work.budget_bytes)


def same_weights(spec: RunSpec, found: str) -> None:
    """Raises FingerprintError when this device has other base weights than the run."""
    if found != spec.fingerprint:
        raise FingerprintError(
            f"model {spec.model!r}: this device's base weights are {found[:16]}…, the run's are {spec.fingerprint[:16]}…; "
            "use the same checkpoint as the operator's"
        )


async def cancel(task: asyncio.Task[None]) -> None:
    """Cancel and wait; being cancelled ourselves meanwhile is passed on."""
    task.cancel()
    await asyncio.wait([task])
