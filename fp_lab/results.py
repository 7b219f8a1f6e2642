"""What a job has found: one JSON object a line and a round, appended and synced as it comes.

Line r is the state after round r (r = 0: before the first). `loss` is the full model's mean token loss on the held-out
rows, null where it was not evaluated. `seconds` are this process's: of a round that was interrupted, what came after.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import StorageError
from fp_server import events as e
from fp_server.objects import storage_error
from fp_server.rounds import RunMachine
from fp_server.roundstate import Member, Round

if TYPE_CHECKING:  # it imports torch, and whoever only reads results needs none
    from fp_lab.devices import Evaluation

Line = dict[str, Any]
MEASURED = frozenset(
    {"fast", "seconds", "probe_seconds", "train_seconds", "step_seconds", "predicted_step_seconds", "probe_peak", "train_peak"}
)
"""Keys whose values differ from run to run: times and memory."""


def read(path: Path) -> list[Line]:
    """The whole lines of a results file, none when there's no file; what a crash left of a last line is passed over."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        found = [json.loads(line) for line in lines]
    except ValueError as error:
        raise StorageError(f"{path}: is damaged: {error}") from None
    if [line["round"] for line in found] != list(range(len(found))):
        raise StorageError(f"{path}: is damaged: its lines are not rounds 0, 1, 2 …")
    return found


class Results:
    """A results file being written. `lines` is what it holds."""

    def __init__(self, path: Path) -> None:
        """Cuts off a last line that a crash left unfinished. Raises StorageError when the file is damaged."""
        self.path, self.lines = path, read(path)
        if path.exists():
            with path.open("r+b") as file:
                file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def append(self, line: Line) -> None:
        """Durable when this returns. Raises StorageError (disk full)."""
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(self.path, error) from None
        self.lines.append(line)


def line_of(
    machine: RunMachine, committed: int, evaluation: Evaluation | None, spent: dict[str, float], fast: bool = False
) -> Line:
    """The line of the state after `committed` rounds, which must be the machine's state. `spent`: seconds of the round's
    other parts; `fast`: they and the peaks are not those of a device's worker."""
    line: Line = {
        "round": committed,
        "loss": evaluation.loss if evaluation else None,
        "tokens": evaluation.tokens if evaluation else None,
        "seconds": {**spent, "evaluate": evaluation.seconds if evaluation else 0.0},
        "fast": fast,
        "ledger": _digest(machine),
    }
    for a_round, commit in reversed(list(machine.history)):
        if commit is not None and commit.key.round == committed - 1:
            line |= {
                "learning_rate": machine.config.learning_rate(commit.key.round), "attempt": commit.key.attempt,
                "bytes_up": commit.bytes_up, "bytes_down": commit.bytes_down, "devices": _devices(a_round),
                "energy_not_sent": max((unit.dropped for unit in commit.units), default=0.0),
            }  # fmt: skip
    return line


def _digest(machine: RunMachine) -> str:
    """One digest for the whole ledger: equal where runs agree to the bit."""
    text = "".join(f"{layer}:{ref.digest}\n" for layer, ref in sorted(machine.ledger.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _devices(a_round: Round) -> dict[str, Line]:
    found = {device: _device(member) for device, member in sorted(a_round.members.items())}
    if a_round.reviewed is not None:
        for device, score in a_round.reviewed.scores.items():
            found[device]["review"] = {**vars(score), "outlier": a_round.reviewed.outliers.get(device)}
    return found


def _device(member: Member) -> Line:
    found: Line = {}
    if member.assigned is not None:
        found |= {"units": [unit.label for unit in member.assigned.units], "gradient": member.assigned.gradient.value}
    if member.probe is not None:
        found |= _probe(member.probe)
    if member.accepted is not None:
        metrics = member.accepted.metrics
        found |= {
            "loss_first": metrics.loss_first, "loss_last": metrics.loss_last, "train_seconds": metrics.seconds,
            "step_seconds": metrics.step_seconds, "predicted_step_seconds": metrics.predicted_step_seconds,
            "predicted_peak": metrics.predicted_peak_bytes, "train_peak": metrics.measured_peak_bytes,
            "fidelity": metrics.fidelity, "unit_fidelity": list(metrics.unit_fidelity), "bytes_up": member.accepted.ref.size,
        }  # fmt: skip
    if member.dropped is not None:
        found["dropped"] = f"{member.dropped.error}: {member.dropped.message}"
    return found


def _probe(probe: e.ProbeReceived) -> Line:
    return {"probe_seconds": probe.seconds, "probe_peak": probe.peak_bytes}


def comparable(line: Line) -> Line:
    """A line without what is measured by clock or memory: the same for every run of a job."""
    return {
        key: {name: comparable(value) for name, value in found.items()} if key == "devices" else found
        for key, found in line.items()
        if key not in MEASURED
    }
