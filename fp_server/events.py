"""What happened, as it is kept for ever. A run's state is the fold of its events.

Choices that depend on the clock, on who was connected or on a measurement are events, so that folding
the log again gives the same state. Heartbeats and transfer progress are not events.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from common.errors import StorageError
from common.types import FloatArray, Gradient, ModelManifest, ObjectRef, PlanReport, TaskKey, UnitId, UpdateMetrics
from fp_server.outliers import Score


def _pack(array: FloatArray) -> dict[str, Any]:
    return {"shape": list(array.shape), "f32": base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()}


def _unpack(value: dict[str, Any]) -> FloatArray:
    return np.frombuffer(base64.b64decode(value["f32"]), "<f4").reshape(value["shape"]).astype(np.float32)


@dataclass(frozen=True)
class RunStarted:
    """An operator started a run."""

    run: str
    toml: str
    manifest: ModelManifest
    config: str = ""
    """What the file meant then, every default written out, as JSON: another version's defaults don't change a run that is
    under way. Empty in logs of version 0.1 (`work.started_config`)."""


@dataclass(frozen=True)
class PlanReceived:
    """A device said what it can hold; |D_n| is fixed here, capped by the operator."""

    run: str
    device: str
    report: PlanReport
    samples: int


@dataclass(frozen=True)
class RoundOpened:
    """The roster was frozen and devices were drawn. `excluded`: device -> reason."""

    run: str
    key: TaskKey
    roster: tuple[str, ...]
    drawn: tuple[str, ...]
    excluded: dict[str, str] = field(default_factory=dict)
    evaluate: bool = False
    """True: the devices only report the loss, before the first round or after the last."""
    failed: int = -1
    """How many attempts at the round came to nothing before; -1 in logs of version 0.1, where the key says it."""

    @property
    def attempt(self) -> int:
        """The how-manieth attempt at the round this is, from 1."""
        return (self.key.attempt if self.failed < 0 else self.failed) + 1


@dataclass(frozen=True)
class ProbeReceived:
    """A device's probe of the full model."""

    run: str
    key: TaskKey
    device: str
    similarity: FloatArray
    in_out: FloatArray
    loss: float
    tokens: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Assigned:
    """FDLO and IALS chose a device's submodel."""

    run: str
    key: TaskKey
    device: str
    units: tuple[UnitId, ...]
    groups: tuple[tuple[UnitId, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]
    redraws: int
    reductions: int
    micro_batch: int
    checkpointing: bool
    gradient: Gradient = Gradient.SUBMODEL
    """The mode this device trains in; never AUTO."""


@dataclass(frozen=True)
class UpdateAccepted:
    """An update is stored and valid; it will never be lost or counted twice."""

    run: str
    key: TaskKey
    device: str
    ref: ObjectRef
    metrics: UpdateMetrics


@dataclass(frozen=True)
class UpdatesLost:
    """Accepted updates of the round under way are damaged on the server's disk: they count no more and are asked for again.

    `lost`: device -> what is wrong. A round that was closed is open again for these devices alone.
    """

    run: str
    key: TaskKey
    lost: dict[str, str]


@dataclass(frozen=True)
class DeviceDropped:
    """A device is out of this round, and why."""

    run: str
    key: TaskKey
    device: str
    error: str
    message: str
    revoked: bool = False
    """Its certificate was revoked: it is out of the round even when its update had been accepted."""

    @classmethod
    def by_revocation(cls, run: str, key: TaskKey, device: str) -> DeviceDropped:
        """It is out because it was revoked."""
        return cls(run, key, device, "IdentityError", revoked_text(device), True)


def revoked_text(name: str) -> str:
    """What whoever shows a revoked certificate is told, and the log of the round that its device leaves."""
    return f"the certificate of {name!r} has been revoked; ask the operator for a new token"


@dataclass(frozen=True)
class RoundClosed:
    """No more updates count. `aggregate` False: too few came, the round is drawn again or the run pauses."""

    run: str
    key: TaskKey
    aggregate: bool
    reason: str


@dataclass(frozen=True)
class UpdatesReviewed:
    """A closed round's updates were compared with each other (`outliers.py`)."""

    run: str
    key: TaskKey
    scores: dict[str, Score]
    outliers: dict[str, str]
    """Device -> why its update stands out."""
    reject: bool
    """Whether the outliers' updates are left out of the round."""


@dataclass(frozen=True)
class UnitHolders:
    """S_l of Eq. 5: the devices whose updates of a unit were stacked, in device-id order."""

    unit: UnitId
    holders: tuple[str, ...]


@dataclass(frozen=True)
class UnitCommit:
    """What one layer of the ledger became. `dropped`: energy fraction the broadcast leaves out."""

    layer: int
    ledger: ObjectRef
    broadcast: ObjectRef
    holders: tuple[str, ...]
    """The devices whose update of the layer, or of a component of it, was stacked."""
    dropped: float
    parts: tuple[UnitHolders, ...] = ()
    """In component mode: the holders of each stacked component. Empty: every holder trained the whole layer."""


@dataclass(frozen=True)
class RoundCommitted:
    """The round's updates are in the ledger. Layers not named keep their objects, byte for byte."""

    run: str
    key: TaskKey
    units: tuple[UnitCommit, ...]
    held_back: tuple[int, ...]
    """Layers none of whose updates were used, as no unit of theirs had `min_holders` holders."""
    weights: dict[str, int]
    """Device -> |D_n| as used for Eq. 5."""
    bytes_up: int
    bytes_down: int
    held_back_units: tuple[UnitId, ...] = ()
    """In component mode: the components with fewer holders than `min_holders`, also where the layer's other one was used."""


@dataclass(frozen=True)
class RunPaused:
    """No new round is opened until it is resumed."""

    run: str
    reason: str


@dataclass(frozen=True)
class RunResumed:
    """Goes on."""

    run: str


@dataclass(frozen=True)
class RunEnded:
    """`outcome`: finished or stopped."""

    run: str
    outcome: str
    reason: str = ""


Event = (
    RunStarted | PlanReceived | RoundOpened | ProbeReceived | Assigned | UpdateAccepted | UpdatesLost | DeviceDropped
    | RoundClosed | UpdatesReviewed | RoundCommitted | RunPaused | RunResumed | RunEnded
)  # fmt: skip

_KINDS: dict[str, TypeAdapter[Any]] = {
    kind.__name__: TypeAdapter(kind)
    for kind in (
        RunStarted, PlanReceived, RoundOpened, Assigned, UpdateAccepted, UpdatesLost, DeviceDropped,
        RoundClosed, UpdatesReviewed, RoundCommitted, RunPaused, RunResumed, RunEnded,
    )
}  # fmt: skip


def _probe_json(event: ProbeReceived) -> str:
    body = dict(event.__dict__)
    body["key"] = event.key.__dict__
    body["similarity"], body["in_out"] = _pack(event.similarity), _pack(event.in_out)
    return json.dumps(body)


def encode(event: Event) -> tuple[str, str]:
    """(kind, JSON body)."""
    if isinstance(event, ProbeReceived):
        return "ProbeReceived", _probe_json(event)
    kind = type(event).__name__
    return kind, _KINDS[kind].dump_json(event).decode()


def decode(kind: str, body: str) -> Event:
    """The inverse of `encode`. Raises StorageError on a kind or body this version does not know."""
    try:
        if kind == "ProbeReceived":
            raw = json.loads(body)
            raw["key"] = TaskKey(**raw["key"])
            raw["similarity"], raw["in_out"] = _unpack(raw["similarity"]), _unpack(raw["in_out"])
            return ProbeReceived(**raw)
        event: Event = _KINDS[kind].validate_json(body)
        return event
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise StorageError(f"the event log has a {kind!r} event this version can't read: {error}") from None
