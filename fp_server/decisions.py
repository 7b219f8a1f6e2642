"""What a run does next, when state and time allow it: open a round, drop a device, close, pause, end.

Pure functions of the machine and the time; whatever they decide is asked for as a `Record`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from common.types import TaskKey
from fp_server import events as e
from fp_server.capacity import refusal
from fp_server.commands import Aggregate, Command, Record, Review
from fp_server.config import Evaluation
from fp_server.progress import late
from fp_server.roundstate import Phase, Round, Stage
from fp_server.seeding import draw_devices, rng_for

if TYPE_CHECKING:
    from fp_server.rounds import RunMachine


def decide(machine: RunMachine, now: float) -> list[Command]:
    """The next decision that state and time allow; at most one, the next follows when it is handed back."""
    if machine.ended is not None:
        return []
    if machine.current is not None:
        return _advance_round(machine, machine.current, now)
    run = machine.config.run
    if machine.next_round > run.rounds or (machine.next_round == run.rounds and not run.final_evaluation):
        return [Record(e.RunEnded(machine.name, "finished"))]
    if machine.paused is not None:
        return []
    if machine.failures >= run.max_attempts:
        reason = f"round {machine.next_round + 1} failed {machine.failures} times; see the devices' errors, then resume"
        return [Record(e.RunPaused(machine.name, reason))]
    able = _able(machine)
    if machine.next_round == run.rounds:
        return _open_evaluation(machine, able, now)
    if run.evaluation is Evaluation.ALL and machine.next_round == 0 and not machine.evaluated and len(able) >= run.min_devices:
        key = TaskKey(machine.name, 0, machine.attempt)
        return [Record(e.RoundOpened(machine.name, key, tuple(able), tuple(able), _excluded(machine, able), True, 0))]
    return _open(machine, able)


def _able(machine: RunMachine) -> list[str]:
    return sorted(d for d in machine.connected - machine.stale if machine.capacity(d) is not None)


def awaited(machine: RunMachine) -> list[str]:
    """The last round's devices that the final evaluation waits for; none when it is not about to begin."""
    run = machine.config.run
    if machine.phase is not Phase.GATHERING or machine.next_round != run.rounds or not run.final_evaluation:
        return []
    said = machine.connected - machine.stale  # one that is there and not able has no place in the run any more
    return [d for d in machine.evaluated or machine.history.trained if d not in said and d not in machine.revoked]


def after_close(machine: RunMachine, current: Round) -> Review | Aggregate:
    """What a closed round whose updates count needs next."""
    key = current.opened.key
    return Aggregate(key) if machine.config.limits.outliers == "off" or current.reviewed is not None else Review(key)


def _open_evaluation(machine: RunMachine, able: list[str], now: float) -> list[Command]:
    """The last round's devices, or all, report the loss once more; those that are away get the progress timeout to return."""
    run, key = machine.config.run, TaskKey(machine.name, machine.next_round, machine.attempt)
    last = machine.evaluated or machine.history.trained
    waited = now - machine.idle_since > run.progress_timeout_seconds
    if awaited(machine) and not waited:
        return []
    drawn = tuple(d for d in last if d in able and run.evaluation is Evaluation.DRAWN) or tuple(able)
    if not drawn:
        return [Record(e.RunEnded(machine.name, "finished", "no device was there for the final evaluation"))]
    return [Record(e.RoundOpened(machine.name, key, tuple(able), drawn, {}, True, 0))]


def _open(machine: RunMachine, able: list[str]) -> list[Command]:
    run, key = machine.config.run, TaskKey(machine.name, machine.next_round, machine.attempt)
    if len(able) < machine.config.needed:
        return []  # others may come, or come back: `status` says how many are waited for
    drawn = draw_devices(able, machine.config.drawn(len(able)), rng_for(run.seed, key.round, "", f"sample/{key.attempt}"))
    failed = key.attempt - bool(machine.evaluated and key.round == 0)  # the evaluation before it was no attempt
    return [Record(e.RoundOpened(machine.name, key, tuple(able), drawn, _excluded(machine, able), failed=failed))]


def _excluded(machine: RunMachine, able: list[str]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for device in sorted(set(machine.plans) | machine.connected):
        if device in able:
            continue
        plan = machine.plans.get(device)
        if plan is None or device in machine.stale:
            reasons[device] = "has not answered the plan request"
        elif machine.capacity(device) is None:
            reasons[device] = refusal(plan.report, machine.config.train.gradient, machine.config.train.step_seconds)
        else:
            reasons[device] = "not connected"
    return reasons


def _advance_round(machine: RunMachine, current: Round, now: float) -> list[Command]:
    run, key = machine.config.run, current.opened.key
    if current.closed is not None:
        return []
    for device in sorted(machine.revoked):  # first, so that no round is closed with its update
        if (leaving := machine.leaving(device)) is not None:
            return [Record(leaving)]
    for device, member in current.members.items():
        if not member.settled and member.stage is not Stage.CHOOSING and (text := late(machine.config, member, now)):
            return [Record(e.DeviceDropped(machine.name, key, device, "UnreachableError", text))]
    delivered = sum(member.stage is Stage.DONE for member in current.members.values())
    open_ = sum(not member.settled for member in current.members.values())
    overdue = now - current.opened_at > run.round_limit_seconds
    wanted = len(current.members)
    if not current.opened.evaluate:  # 1e-9: 0.07 of 100 is 7, not the 8 that rounding up 7.000000000000001 gives
        wanted = min(wanted, max(math.ceil(wanted * run.quorum - 1e-9), run.min_updates))
    if open_ and delivered < wanted and not overdue:
        return []
    if current.opened.evaluate:
        return [Record(e.RoundClosed(machine.name, key, False, "evaluated"))]
    enough = delivered >= run.min_updates
    reason = "the round's time limit" if overdue else ("quorum" if open_ else "every drawn device has delivered or dropped out")
    if not enough:
        reason = f"{delivered} updates, {run.min_updates} needed ({reason})"
    return [Record(e.RoundClosed(machine.name, key, enough, reason))]
