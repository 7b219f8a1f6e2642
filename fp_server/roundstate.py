"""What a run's state machine holds of one round."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
    outlier: str = ""
    """Why its update was left out of the round after all; empty when it was not."""
    progress_at: float = 0.0
    """The time that its progress accounts for (`fp_server.progress`)."""
    moved_at: float = 0.0
    """When it last got any further."""
    progress: ProgressSeen | None = None
    """The last sign of life."""
    reached: dict[str, float] = field(default_factory=dict)
    """What each phase was worth so far, in seconds."""
    starts: int = 0
    """How often it came back to its task."""

    @property
    def settled(self) -> bool:
        """Whether nothing more is expected of it."""
        return self.stage in (Stage.DONE, Stage.DROPPED)

    @property
    def counts(self) -> bool:
        """Whether its update is stacked."""
        return self.accepted is not None and not self.outlier


@dataclass
class Round:
    """The current round."""

    opened: e.RoundOpened
    opened_at: float
    members: dict[str, Member] = field(default_factory=dict)
    closed: e.RoundClosed | None = None
    reviewed: e.UpdatesReviewed | None = None


KEPT = 20
"""Ended rounds a run keeps in memory: a server runs for months, and the log has them all."""

Entry = tuple[Round, e.RoundCommitted | None]
"""A round (an attempt at it) that is over, and what it became: None when nothing was aggregated."""


@dataclass(frozen=True)
class Loss:
    """The full model's held-out loss after some rounds."""

    total: float
    """Sum of the devices' losses, each times its tokens."""
    tokens: int
    measured_by: int
    """How many devices have measured it."""
    devices: frozenset[str] | None
    """Whose data it was measured on; None when that is too long ago to be kept."""


class History:
    """A run's ended rounds: the last `kept` of them whole, of all the others what later rounds and the loss curve need."""

    def __init__(self, kept: int = KEPT) -> None:
        self._last: deque[Entry] = deque(maxlen=kept)
        self._losses: dict[int, Loss] = {}
        self.total = 0
        """Rounds and attempts that have ended."""
        self.committed = 0
        self.trained: tuple[str, ...] = ()
        """The devices drawn for the last committed round."""

    def append(self, a_round: Round, commit: e.RoundCommitted | None) -> None:
        """A round is over."""
        self._last.append((a_round, commit))
        self.total += 1
        add_losses(self._losses, a_round)
        old = a_round.opened.key.round - KEPT
        if old > 0 and (point := self._losses.get(old)) is not None and point.devices is not None:
            self._losses[old] = replace(point, devices=None)  # a hundred names a round are gigabytes in a year
        if commit is not None:
            self.committed, self.trained = self.committed + 1, a_round.opened.drawn

    def __iter__(self) -> Iterator[Entry]:
        """The rounds that are kept whole, oldest first."""
        return iter(self._last)

    @property
    def first(self) -> int:
        """The 0-based index, among all, of the first that is kept whole."""
        return self.total - len(self._last)

    @property
    def last(self) -> Entry | None:
        """The newest, or None when there is none yet."""
        return self._last[-1] if self._last else None

    def since(self, index: int, count: int) -> list[Entry]:
        """At most `count` rounds from the 0-based `index` on, which must be at least `first`."""
        return list(self._last)[index - self.first :][:count]

    def losses(self) -> dict[int, Loss]:
        """Completed rounds -> what devices have measured then."""
        return dict(self._losses)


def add_losses(losses: dict[int, Loss], a_round: Round) -> None:
    """Add what a round's devices have measured of the full model's loss.

    An attempt at the same round starts from the same adapter, so its devices' figures belong to the same mean; who has
    been counted already (in an evaluation of all, or an attempt that failed) measured the same and isn't counted again.
    """
    at = a_round.opened.key.round
    so_far = losses.get(at, Loss(0.0, 0, 0, frozenset()))
    known = so_far.devices or frozenset()
    new = {
        device: member.probe
        for device, member in a_round.members.items()
        if member.probe is not None and member.probe.tokens > 0 and device not in known
    }
    if new:
        total = so_far.total + sum(probe.loss * probe.tokens for probe in new.values())
        tokens = so_far.tokens + sum(probe.tokens for probe in new.values())
        losses[at] = Loss(total, tokens, so_far.measured_by + len(new), known | new.keys())
