"""What flows in and out of the round's state machine beside events.

`Stimulus`: what happens without being kept (the clock, connections, progress). `Command`: what the shell
must do. A `Record` asks to commit an event and hand it back before anything else.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.types import Assignment, ProbeTask, RunSpec, TaskKey
from fp_server.events import Event


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Connected:
    """A device opened a session."""

    device: str


@dataclass(frozen=True)
class Disconnected:
    """A device's session ended."""

    device: str


@dataclass(frozen=True)
class Revoked:
    """A device's certificates were revoked: nobody waits for it, until it has connected with a new one."""

    device: str


@dataclass(frozen=True)
class ProgressSeen:
    """A device got further: `amount` grows within a phase (steps, units or bytes). `measured`: not by its own word."""

    device: str
    key: TaskKey
    phase: str
    amount: int
    total: int
    measured: bool = False


@dataclass(frozen=True)
class NotReceived:
    """A device wants to push or fetch, and the server's disk, room or turns can't take it: the time is not the device's."""

    device: str
    key: TaskKey


@dataclass(frozen=True)
class PlanConfirmed:
    """A device that was asked again can hold what it could before."""

    device: str


@dataclass(frozen=True)
class Recovered:
    """The log has been folded again: say what is outstanding."""

    elapsed: float | None = None
    """Seconds that the round under way had lasted, where that is known better than from its last event."""


Stimulus = Tick | Connected | Disconnected | Revoked | ProgressSeen | NotReceived | PlanConfirmed | Recovered


@dataclass(frozen=True)
class Record:
    """Commit this event, then hand it back."""

    event: Event


@dataclass(frozen=True)
class SendPlanRequest:
    """Ask a device what it can hold."""

    device: str
    spec: RunSpec


@dataclass(frozen=True)
class SendProbe:
    """Ask a device to probe."""

    device: str
    task: ProbeTask


@dataclass(frozen=True)
class SendAssignment:
    """Ask a device to train."""

    device: str
    assignment: Assignment


@dataclass(frozen=True)
class SendCancel:
    """Tell a device that a task no longer counts."""

    device: str
    key: TaskKey
    reason: str


@dataclass(frozen=True)
class SendEnded:
    """Tell a device that the run is over."""

    device: str
    run: str
    outcome: str


@dataclass(frozen=True)
class Choose:
    """Choose a device's units (FDLO, IALS) from its probe; answered by an `Assigned` or `DeviceDropped` event."""

    key: TaskKey
    device: str


@dataclass(frozen=True)
class Review:
    """Compare a closed round's updates with each other; answered by an `UpdatesReviewed` event."""

    key: TaskKey


@dataclass(frozen=True)
class Aggregate:
    """Stack a closed round's updates into the ledger; answered by a `RoundCommitted` event."""

    key: TaskKey


Send = SendPlanRequest | SendProbe | SendAssignment | SendCancel | SendEnded
Command = Record | Send | Choose | Review | Aggregate
