"""What devices report, checked and turned into events. Who reports comes from the session's certificate."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from common.errors import FedPrunerError, LimitError, ProtocolError
from common.types import PlanReport, ProbeReport, Progress, TaskFailed, TaskKey, UpdateReady
from fp_server import events as e
from fp_server.capacity import plan_problem
from fp_server.commands import PlanConfirmed, ProgressSeen
from fp_server.coordinator import Coordinator
from fp_server.validation import LARGEST

logger = logging.getLogger("fp_server")


WORDS = 2000
"""Characters of a reason that are kept: it may quote what a device has sent."""
LONGEST = 60.0
"""Seconds that another plan of a device waits for its turn; one that had to wait longer is not taken."""


async def plan_reported(coordinator: Coordinator, device: str, report: PlanReport) -> None:
    """A device said what it can hold."""
    event = _plan_event(coordinator, device, report)
    if event is None:
        return
    machine = coordinator.active
    before = machine.plans.get(device) if machine is not None else None
    if before is not None and event != before:  # another event in the run's log: nobody may fill it
        if (wait := coordinator.new_plans.take(device, time.monotonic(), LONGEST)) > LONGEST:
            problem = f"device {device} says too often that it can hold something else"
            coordinator.complaints.say(device, problem)
            if (session := coordinator.sessions.get(device)) is not None:  # it comes again after a while, with its newest plan
                session.close(LimitError(f"{problem}; try again in {wait:.0f} s"))
            return
        if wait:
            await asyncio.sleep(wait)
            event = _plan_event(coordinator, device, report)
    if event is None or (machine := coordinator.active) is None:
        return
    if event == machine.plans.get(device):  # nothing that a restart would have to know
        await coordinator.post(PlanConfirmed(device))
    else:
        await coordinator.insist(event)


def _plan_event(coordinator: Coordinator, device: str, report: PlanReport) -> e.PlanReceived | None:
    """A device's plan as it would be in the log; None when nobody asked for it."""
    machine = coordinator.active
    if machine is None or report.run != machine.name or not machine.awaits_plan(device):
        return None
    problem = report.refusal or plan_problem(report, machine.manifest, machine.units)
    if problem:  # a refusal is one, whatever else the report holds: that has not been checked
        report = replace(report, capacities=(), unit_bytes=(), refusal=problem)
    before = machine.plans.get(device)
    joined = before is not None and before.samples > 0
    most = min(coordinator.config.max_samples, machine.config.limits.max_samples or report.samples)
    samples = before.samples if before is not None and joined else min(report.samples, most)
    return e.PlanReceived(machine.name, device, report, samples)


async def unreadable(coordinator: Coordinator, device: str, plan: bool, error: ProtocolError) -> None:
    """A device sent what does not decode: as a plan it is a refusal, during a task it is out of the round."""
    coordinator.complaints.say(device, f"device {device}: {error}")
    machine = coordinator.active
    if machine is None:
        return
    if plan:
        await plan_reported(coordinator, device, PlanReport(machine.name, 0, "", (), (), 0, f"its plan can't be read: {error}"))
    elif machine.current is not None:
        await reject(coordinator, device, machine.current.opened.key, error)


def awaits_probe(coordinator: Coordinator, device: str, key: TaskKey) -> bool:
    """Whether such a probe is still to come. Asked before it is decoded: one that nobody waits for must cost no time."""
    if not _expected(coordinator, device, key):
        return False
    current = coordinator.active.current if coordinator.active is not None else None
    return current is not None and current.members[device].probe is None


async def probe_reported(coordinator: Coordinator, device: str, r: ProbeReport) -> None:
    """A device's probe came in. Raises ProtocolError when its matrix is not the model's."""
    machine = coordinator.active
    if machine is None or r.key.run != machine.name:
        return
    if not awaits_probe(coordinator, device, r.key):
        return
    units = len(machine.units) if machine.similarity else 0
    if text := _probe_problem(r, units):
        await coordinator.insist(e.DeviceDropped(machine.name, r.key, device, "ProtocolError", text))
        return
    await coordinator.insist(
        e.ProbeReceived(machine.name, r.key, device, r.similarity, r.in_out, r.loss, r.tokens, r.peak_bytes, r.seconds)
    )


async def progressed(coordinator: Coordinator, device: str, p: Progress) -> None:
    """A device got further."""
    await coordinator.post(ProgressSeen(device, p.key, p.phase, p.done, p.total))


async def task_failed(coordinator: Coordinator, device: str, failed: TaskFailed) -> None:
    """A device can't do its task: it is out of this round."""
    machine = coordinator.active
    if machine is not None and failed.key.run == machine.name:
        coordinator.complaints.say(device, f"device {device}: {failed.error}: {failed.message}")
        if _expected(coordinator, device, failed.key):
            await coordinator.insist(e.DeviceDropped(machine.name, failed.key, device, failed.error, failed.message))


def _expected(coordinator: Coordinator, device: str, key: TaskKey) -> bool:
    """Whether the current round still expects something of the device for `key`."""
    current = coordinator.active.current if coordinator.active is not None else None
    if current is None or current.opened.key != key or current.closed is not None:
        return False
    return device in current.members and not current.members[device].settled


async def reject(coordinator: Coordinator, device: str, key: TaskKey, error: FedPrunerError) -> None:
    """An update failed its checks: the device is out of this round."""
    if _expected(coordinator, device, key):
        why = str(error)[:WORDS]
        logger.warning("what %s sent for round %d is rejected: %s", device, key.round + 1, why)
        await coordinator.insist(e.DeviceDropped(key.run, key, device, type(error).__name__, why))


async def accept(coordinator: Coordinator, device: str, ready: UpdateReady) -> bool:
    """An update is stored and checked: count it. True when it was counted before. Raises TooLate."""

    async def work() -> bool:
        async with coordinator.lock:
            machine = coordinator.machine_for(ready.key.run)
            if machine.check_push(device, ready.key, ready.ref):
                return True
            with coordinator.keeper.held(ready.ref.digest):
                await coordinator.post_locked(e.UpdateAccepted(machine.name, ready.key, device, ready.ref, ready.metrics))
            return False

    return await coordinator.background.whole(work())


def _probe_problem(r: ProbeReport, units: int) -> str:
    if r.similarity.shape[0] != units:
        return f"the probe has {r.similarity.shape[0]} units, expected {units}"
    for name in ("loss", "tokens", "seconds"):  # means of them are shown, and JSON has no infinity
        if not abs(value := getattr(r, name)) <= LARGEST:
            return f"the probe's {name} is {value:.4g}, at most {LARGEST:.0e} counts"
    if not units:
        return ""
    low = min(float(r.similarity.min()), float(r.in_out.min()))
    high = max(float(r.similarity.max()), float(r.in_out.max()))
    if low < -0.01 or high > 1.01:
        return f"the probe's similarities lie between {low:.4g} and {high:.4g}; CKA lies between 0 and 1"
    if float(abs(r.similarity - r.similarity.T).max()) > 0.01:
        return "the probe's similarity matrix is not symmetric"
    return ""
