"""What a run's state machine holds of one round."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from fp_server import events as e
from fp_server.commands import ProgressSeen

PHASES = frozenset({"verify", "fetch", "load", "probe", "fidelity", "train", "push"})
"""The phases a device may report progress in (docs/protocol.md)."""


class Stage(StrEnum):
    """Where a drawn device stands in the round."""

    PROBING = "probing"
    CHOOSING = "choosing"
    TRAINING = "training"
    DONE = "done"
    DROPPED = "dropped"


class Phase(StrEnum):
    """Where the run stands."""

    GATHERING = "gathering"
    ROUND = "round"
    AGGREGATING = "aggregating"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass
class Member:
    """One drawn device in the current round."""

    stage: Stage = Stage.PROBING
    probe: e.ProbeReceived | None = None
    assigned: e.Assigned | None = None
    accepted: e.UpdateAccepted | None = None
    dropped: e.DeviceDropped | None = None
    progress_at: float = 0.0
    progress: ProgressSeen | None = None
    """The last sign of life."""
    reached: dict[str, int] = field(default_factory=dict)
    """The most that was seen of each phase."""

    @property
    def settled(self) -> bool:
        """Whether nothing more is expected of it."""
        return self.stage in (Stage.DONE, Stage.DROPPED)


@dataclass
class Round:
    """The current round."""

    opened: e.RoundOpened
    opened_at: float
    members: dict[str, Member] = field(default_factory=dict)
    closed: e.RoundClosed | None = None
