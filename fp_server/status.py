"""What a run and its devices look like now, as plain JSON values (documented in docs/protocol.md).

Rounds and layers are 1-based here: this is what a person reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from common.types import UnitId
from fp_server import events as e
from fp_server.capacity import refusal
from fp_server.decisions import awaited
from fp_server.rounds import RunMachine
from fp_server.roundstate import KEPT, Entry, History, Member, Round, add_losses

LAST = 10
"""Entries of the history a status has when nobody asks for more."""
HISTORY_BYTES = 2 << 20
"""A status holds no more of the history than this, and always one entry: a message may have 4 MiB."""
POINTS = 1000
"""Of the loss curve in one status; all the rounds' figures come page by page."""


def run_summary(machine: RunMachine) -> dict[str, Any]:
    """One line of ``fp-server runs``."""
    return _summary(machine, loss_curve(machine))


def _summary(machine: RunMachine, curve: list[Point]) -> dict[str, Any]:
    losses = [point.loss for point in curve]
    same = len(curve) > 1 and curve[0].devices == curve[-1].devices
    return {
        "run": machine.name,
        "state": machine.phase.value,
        "method": machine.config.run.method,
        "model": machine.config.model.name,
        "rounds_done": machine.history.committed,
        "rounds": machine.config.run.rounds,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "loss_devices": [curve[0].measured_by, curve[-1].measured_by] if curve else [],
        "loss_same_devices": same,
    }


class Point(NamedTuple):
    """One point of the loss curve."""

    rounds_done: int
    loss: float
    measured_by: int
    """How many devices have measured it."""
    devices: frozenset[str] | None
    """Whose held-out data it was measured on; None of a round that is long over, but for the first."""


def loss_curve(machine: RunMachine) -> list[Point]:
    """The full model's held-out loss after so many rounds, weighted by the devices' held-out tokens.

    A round counts once every drawn device has reported or dropped out: a mean over whoever came first would mislead.
    """
    curve = machine.history.losses()
    if machine.current is not None and all(m.probe is not None or m.settled for m in machine.current.members.values()):
        add_losses(curve, machine.current)
    return [Point(index, found.total / found.tokens, found.measured_by, found.devices) for index, found in sorted(curve.items())]


def _thinned(curve: list[Point], shown: set[int]) -> list[Point]:
    """At most some `POINTS` of a long run's points: the first, the last, those of the rounds shown, and others evenly."""
    step = -(-len(curve) // POINTS)
    last = len(curve) - KEPT
    return [p for i, p in enumerate(curve) if i % step == 0 or i >= last or p.rounds_done in shown]


def status(
    machine: RunMachine | None,
    problem: str,
    connected: list[str],
    last: int = LAST,
    first: int = 0,
    older: Sequence[Entry] | None = None,
) -> dict[str, Any]:
    """Everything ``fp-server status`` shows: of the history the `last` entries that are kept whole, or that many from the
    1-based `first` on. `older`: the entries from `first` on, where the machine doesn't keep them any more."""
    if machine is None:
        return {"run": None, "state": "idle", "connected": connected, "problem": problem}
    current, curve = machine.current, loss_curve(machine)
    begin, history = _history(machine.history, last or LAST, first, older)
    return {
        **_summary(machine, curve),
        "paused": machine.paused,
        "problem": problem,
        "connected": connected,
        "devices": {device: _device(machine, device) for device in sorted(set(machine.plans) | set(connected))},
        "current": None if current is None else _round(current, None),
        "history": history,
        "history_first": begin + 1,
        "history_total": machine.history.total,
        "loss": [
            {
                "rounds_done": p.rounds_done,
                "loss": p.loss,
                "measured_by": p.measured_by,
                "devices": p.devices and sorted(p.devices),
            }
            for p in _thinned(curve, {entry["rounds_done"] for entry in history})
        ],
        "start": machine.config.lora.start.value,
        "gradient": machine.config.train.gradient.value,
        "min_devices": machine.config.run.min_devices,
        "needed_devices": machine.config.needed,
        "awaited_devices": awaited(machine),
        "min_holders": machine.config.limits.min_holders,
        "model_units": len(machine.units),
        "ledger_layers": [layer + 1 for layer in sorted(machine.ledger)],
    }


def _history(history: History, last: int, first: int, older: Sequence[Entry] | None) -> tuple[int, list[dict[str, Any]]]:
    """(0-based index of the first entry, entries): as many of those asked for as `HISTORY_BYTES` holds."""
    begin = min(first - 1, history.total) if first else max(history.first, history.total - last)
    asked = history.since(begin, last) if older is None else older[:last]
    made: list[dict[str, Any]] = []
    left = HISTORY_BYTES
    for a_round, commit in asked if first else reversed(asked):
        entry = _round(a_round, commit)
        left -= len(json.dumps(entry))
        if left < 0 and made:
            break
        made.append(entry)
    return (begin, made) if first else (history.total - len(made), made[::-1])


def _device(machine: RunMachine, device: str) -> dict[str, Any]:
    plan, capacity = machine.plans.get(device), machine.capacity(device)
    return {
        "connected": device in machine.connected,
        "revoked": device in machine.revoked,
        "samples": plan.samples if plan else None,
        "budget_bytes": plan.report.budget_bytes if plan else None,
        "units": capacity.units if capacity else 0,
        "gradient": capacity.gradient.value if capacity else None,
        "step_seconds": capacity.step_seconds or None if capacity else None,
        "refusal": _refusal(machine, device),
        "smallest_budget": plan.report.smallest_budget if plan else None,
    }


def _refusal(machine: RunMachine, device: str) -> str:
    """Why a device takes no part; empty when it can."""
    if (plan := machine.plans.get(device)) is None:
        return "has not answered yet"
    train = machine.config.train
    return "" if machine.capacity(device) else refusal(plan.report, train.gradient, train.step_seconds)


def _round(a_round: Round, commit: e.RoundCommitted | None) -> dict[str, Any]:
    opened = a_round.opened
    return {
        "round": opened.key.round + 1,
        "attempt": opened.attempt,
        "evaluation": opened.evaluate,
        "rounds_done": opened.key.round,
        "roster": list(opened.roster),
        "excluded": opened.excluded,
        "closed": a_round.closed.reason if a_round.closed else None,
        "committed": commit is not None,
        "bytes_up": commit.bytes_up if commit else None,
        "bytes_down": commit.bytes_down if commit else None,
        "changed_layers": [u.layer + 1 for u in commit.units] if commit else [],
        "held_back_layers": [layer + 1 for layer in commit.held_back] if commit else [],
        "held_back_units": [unit.label for unit in commit.held_back_units] if commit else [],
        "holders": _stacked(commit) if commit else {},
        "energy_dropped": {str(u.layer + 1): u.dropped for u in commit.units} if commit else {},
        "weights": commit.weights if commit else {},
        "devices": {device: _member(device, member, a_round.reviewed) for device, member in a_round.members.items()},
    }


def _stacked(commit: e.RoundCommitted) -> dict[str, list[str]]:
    """Unit name -> the devices whose updates of it were stacked."""
    out: dict[str, list[str]] = {}
    for changed in commit.units:
        if changed.parts:
            out |= {part.unit.label: list(part.holders) for part in changed.parts}
        else:
            out[UnitId(changed.layer).label] = list(changed.holders)
    return out


def _member(device: str, member: Member, reviewed: e.UpdatesReviewed | None) -> dict[str, Any]:
    out: dict[str, Any] = {"stage": member.stage.value}
    if member.progress is not None and not member.settled:
        out["progress"] = {"phase": member.progress.phase, "done": member.progress.amount, "total": member.progress.total}
    if member.probe is not None:
        out["loss"], out["loss_tokens"] = member.probe.loss, member.probe.tokens
        out["probe_peak_bytes"], out["probe_seconds"] = member.probe.peak_bytes, member.probe.seconds
    if member.assigned is not None:
        out["units"] = [u.label for u in member.assigned.units]
        out["groups"] = [[u.label for u in group] for group in member.assigned.groups]
        out["probabilities"] = [[round(p, 6) for p in group] for group in member.assigned.probabilities]
        out["gradient"] = member.assigned.gradient.value
        out["redraws"], out["reductions"] = member.assigned.redraws, member.assigned.reductions
    if member.accepted is not None:
        x = member.accepted.metrics
        out["update_bytes"] = member.accepted.ref.size
        out["loss_first"], out["loss_last"] = x.loss_first, x.loss_last
        out["tokens_per_second"], out["train_seconds"] = x.tokens_per_second, x.seconds
        out["predicted_peak_bytes"], out["measured_peak_bytes"] = x.predicted_peak_bytes, x.measured_peak_bytes
        out["predicted_step_seconds"], out["step_seconds"] = x.predicted_step_seconds or None, x.step_seconds or None
        out["fidelity"] = x.fidelity
        if member.assigned is not None and len(x.unit_fidelity) == len(member.assigned.units):
            out["unit_fidelity"] = {u.label: v for u, v in zip(member.assigned.units, x.unit_fidelity, strict=True)}
    if reviewed is not None and (score := reviewed.scores.get(device)) is not None:
        out["review"] = {**vars(score), "outlier": reviewed.outliers.get(device), "rejected": bool(member.outlier)}
    if member.dropped is not None:
        out["error"], out["message"] = member.dropped.error, member.dropped.message
        out["revoked"] = member.dropped.revoked
    return out
