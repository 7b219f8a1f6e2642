"""A run as a sans-IO state machine: `handle(happening, now) -> list[Command]`.

It knows nothing of sockets, disks, threads or clocks. Its state is the fold of the run's events plus what
is not kept (who is connected, who made progress when). Whatever it decides that can't be derived again
from the log is asked for as a `Record` command, and takes effect when that event is handed back.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.errors import AlreadyDone, NotFound, TooLate
from common.types import (
    Assignment,
    Capacity,
    Gradient,
    ModelManifest,
    ObjectRef,
    ProbeTask,
    TaskKey,
    UnitObject,
)
from fp_server import events as e
from fp_server.capacity import choose_capacity
from fp_server.commands import (
    Aggregate,
    Choose,
    Command,
    Connected,
    Disconnected,
    NotReceived,
    PlanConfirmed,
    ProgressSeen,
    Recovered,
    Send,
    SendAssignment,
    SendCancel,
    SendEnded,
    SendPlanRequest,
    SendProbe,
    Stimulus,
    Tick,
)
from fp_server.config import RunConfig
from fp_server.decisions import after_close, decide
from fp_server.progress import begin_anew, count
from fp_server.roundstate import History, Member, Phase, Round, Stage
from fp_server.seeding import rng_for


class RunMachine:
    """One run. `handle` is the only thing that changes it."""

    def __init__(self, config: RunConfig, manifest: ModelManifest, history: History | None = None) -> None:
        self.config, self.manifest = config, manifest
        self.name = config.run.name
        self.spec = config.run_spec(manifest)
        self.units = config.units(manifest.layers)
        """The model's units, in model order: what an index in a probe, a plan or a draw means."""
        self.connected: set[str] = set()
        self.stale: set[str] = set()
        """Devices that have connected since they last said what they can hold."""
        self.plans: dict[str, e.PlanReceived] = {}
        self.ledger: dict[int, ObjectRef] = {}
        self.broadcast: dict[int, ObjectRef] = {}
        self.next_round, self.attempt = 0, 0
        self.failures = 0
        """Failed attempts at the next round since the run was last resumed; `attempt` only ever grows within a round."""
        self.idle_since = 0.0
        self.current: Round | None = None
        self.evaluated: tuple[str, ...] = ()
        """The devices that measured the loss before the first round (`run.evaluation = "all"`)."""
        self.history = History() if history is None else history
        self.paused: str | None = None
        self.ended: e.RunEnded | None = None

    # -- what others ask -------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Where the run stands."""
        if self.ended is not None:
            return Phase(self.ended.outcome)
        if self.current is not None:
            return Phase.ROUND if self.current.closed is None else Phase.AGGREGATING
        return Phase.PAUSED if self.paused is not None else Phase.GATHERING

    def capacity(self, device: str) -> Capacity | None:
        """What a device can hold in the run's gradient mode, or in the one "auto" chooses; None: it has not said or can't."""
        plan, train = self.plans.get(device), self.config.train
        return None if plan is None else choose_capacity(plan.report, train.gradient, train.step_seconds)

    def awaits_plan(self, device: str) -> bool:
        """Whether the device was asked what it can hold; a plan nobody asked for changes nothing."""
        free = self.current is None or self.current.closed is not None or self._idle(device)
        return self.ended is None and free and (device in self.stale or device not in self.plans)

    @property
    def similarity(self) -> bool:
        """Whether the current round's probes measure similarities, or the loss alone."""
        return self.current is not None and not self.current.opened.evaluate and self.spec.similarity

    def objects(self) -> tuple[UnitObject, ...]:
        """The broadcast adapter, an object a layer, as the current round began with it."""
        return tuple(UnitObject(layer, ref) for layer, ref in sorted(self.broadcast.items()))

    def references(self) -> frozenset[str]:
        """The digests a restart would need: ledger, broadcast adapter, and the updates of the round under way."""
        members = self.current.members.values() if self.current is not None else ()
        updates = {member.accepted.ref.digest for member in members if member.accepted is not None}
        return frozenset(updates | {ref.digest for kept in (self.ledger, self.broadcast) for ref in kept.values()})

    def may_fetch(self, device: str) -> frozenset[str]:
        """The digests of the device's current task."""
        task = self.task(device)
        if isinstance(task, SendProbe):
            return frozenset(o.ref.digest for o in task.task.adapter)
        if isinstance(task, SendAssignment):
            return frozenset(o.ref.digest for o in task.assignment.adapter)
        return frozenset()

    def assignment(self, device: str, key: TaskKey) -> Assignment:
        """What a device was assigned for `key`. Raises TooLate or NotFound."""
        current = self.current
        if current is None or current.opened.key != key or current.closed is not None:
            raise TooLate(
                f"round {key.round + 1} of {key.run!r} (attempt {key.attempt + 1}) is closed; this update no longer counts"
            )
        member = current.members.get(device)
        if member is None or member.assigned is None or member.stage is Stage.DROPPED:
            raise NotFound(f"round {key.round + 1} of {key.run!r} expects no update from {device!r}")
        return self._assignment(device, member.assigned)

    def check_push(self, device: str, key: TaskKey, ref: ObjectRef) -> bool:
        """Whether this very update is accepted already. Raises TooLate, NotFound or AlreadyDone."""
        member = self._known(device, key)
        if member is not None and member.accepted is not None:
            if member.accepted.ref == ref:
                return True
            raise AlreadyDone(f"another update of {device!r} was accepted for round {key.round + 1} of {key.run!r}")
        self.assignment(device, key)
        return False

    def _known(self, device: str, key: TaskKey) -> Member | None:
        last = self.history.last
        for a_round in (last[0] if last else None, self.current):
            if a_round is not None and a_round.opened.key == key:
                return a_round.members.get(device)
        return None

    # -- what happens ----------------------------------------------------------------------------

    def handle(self, happening: e.Event | Stimulus, now: float) -> list[Command]:
        """Take in one event or stimulus at time `now` (seconds); returns what must be done, in order."""
        out: list[Command] = []
        match happening:
            case e.PlanReceived():
                self.plans[happening.device] = happening
                self.stale.discard(happening.device)
            case PlanConfirmed():
                self.stale.discard(happening.device)
            case e.RoundOpened():
                self._on_opened(happening, now, out)
            case e.ProbeReceived():
                self._on_probe(happening, now, out)
            case e.Assigned():
                if (member := self._member(happening.device, happening.key)) and member.stage is Stage.CHOOSING:
                    member.assigned, member.stage, member.progress_at = happening, Stage.TRAINING, now
                    member.reached.clear()
                    if member.probe is not None:  # the matrix has served; a long run must not keep them all
                        member.probe = replace(member.probe, similarity=np.empty((0, 0), np.float32))
                    self._send_task(happening.device, out)
            case e.UpdateAccepted():
                if (member := self._member(happening.device, happening.key)) and not member.settled:
                    member.accepted, member.stage = happening, Stage.DONE
                    self._ask(happening.device, out)
            case e.DeviceDropped():
                if (member := self._member(happening.device, happening.key)) and not member.settled:
                    member.dropped, member.stage = happening, Stage.DROPPED
                    self._cancel(happening.device, happening.key, happening.message, out)
                    self._ask(happening.device, out)
            case e.UpdatesLost():
                self._on_lost(happening, now, out)
            case e.RoundClosed():
                self._on_closed(happening, now, out)
            case e.UpdatesReviewed():
                self._on_reviewed(happening, out)
            case e.RoundCommitted():
                self._on_committed(happening, now)
            case e.RunPaused():
                self.paused = happening.reason
            case e.RunResumed():
                self.paused, self.failures = None, 0
            case e.RunEnded():
                self._on_ended(happening, out)
            case Connected():
                self.connected.add(happening.device)
                self.stale.add(happening.device)
                self._greet(happening.device, out)
            case Disconnected():
                self.connected.discard(happening.device)
            case ProgressSeen():
                self._on_progress(happening, now)
            case NotReceived():
                if (member := self._member(happening.device, happening.key)) is not None:
                    member.progress_at = now
            case Recovered():
                self._on_recovered(now, out)
            case Tick() | e.RunStarted():
                pass
        out.extend(decide(self, now))
        return out

    def _member(self, device: str, key: TaskKey) -> Member | None:
        if self.current is None or self.current.opened.key != key or self.current.closed is not None:
            return None
        return self.current.members.get(device)

    def _on_opened(self, event: e.RoundOpened, now: float, out: list[Command]) -> None:
        self.current = Round(event, now, {device: Member(progress_at=now) for device in event.drawn})
        for device in event.drawn:
            self._send_task(device, out)

    def _on_probe(self, event: e.ProbeReceived, now: float, out: list[Command]) -> None:
        member = self._member(event.device, event.key)
        if member is None or member.stage is not Stage.PROBING:
            return
        member.probe, member.progress_at = event, now
        if self.current is not None and self.current.opened.evaluate:
            member.stage = Stage.DONE
            self._ask(event.device, out)
        else:
            member.stage = Stage.CHOOSING
            out.append(Choose(event.key, event.device))

    def _on_closed(self, event: e.RoundClosed, now: float, out: list[Command]) -> None:
        assert self.current is not None
        self.current.closed, self.idle_since = event, now
        self.current.reviewed = None  # a round that was opened again is compared again
        for device, member in self.current.members.items():
            member.outlier = ""
            if not member.settled:
                self._cancel(device, event.key, event.reason, out)
                self._ask(device, out)
        if event.aggregate and not self.current.opened.evaluate:
            out.append(after_close(self, self.current))
            return
        self._give_up(self.current)

    def _on_reviewed(self, event: e.UpdatesReviewed, out: list[Command]) -> None:
        assert self.current is not None
        self.current.reviewed = event
        for device, reason in event.outliers.items() if event.reject else ():
            self.current.members[device].outlier = reason
        if sum(member.counts for member in self.current.members.values()) >= self.config.run.min_updates:
            out.append(Aggregate(event.key))
        else:
            self._give_up(self.current)

    def _give_up(self, current: Round) -> None:
        """A round ends without anything to aggregate."""
        self.history.append(current, None)
        if current.opened.evaluate and current.opened.key.round < self.config.run.rounds:
            self.evaluated, self.attempt = current.opened.drawn, self.attempt + 1
        elif current.opened.evaluate:
            self.next_round += 1
        else:
            self.attempt, self.failures = self.attempt + 1, self.failures + 1
        self.current = None

    def _on_lost(self, event: e.UpdatesLost, now: float, out: list[Command]) -> None:
        if self.current is None or self.current.opened.key != event.key:
            return
        closed, self.current.closed = self.current.closed, None
        for device, member in self.current.members.items():
            if closed is not None and not member.settled:  # these were told that the round is over
                member.dropped = e.DeviceDropped(self.name, event.key, device, TooLate.__name__, closed.reason)
                member.stage = Stage.DROPPED
            if device in event.lost and member.accepted is not None:
                member.accepted, member.stage, member.progress_at = None, Stage.TRAINING, now
                member.reached.clear()
                self._send_task(device, out)

    def _on_committed(self, event: e.RoundCommitted, now: float) -> None:
        assert self.current is not None
        for unit in event.units:
            self.ledger[unit.layer], self.broadcast[unit.layer] = unit.ledger, unit.broadcast
        self.history.append(self.current, event)
        self.current, self.idle_since = None, now
        self.next_round, self.attempt, self.failures = self.next_round + 1, 0, 0

    def _on_ended(self, event: e.RunEnded, out: list[Command]) -> None:
        if self.current is not None:
            for device, member in self.current.members.items():
                if not member.settled:
                    self._cancel(device, self.current.opened.key, f"the run {event.outcome}", out)
            self.history.append(self.current, None)
            self.current = None
        self.ended = event
        out.extend(SendEnded(device, self.name, event.outcome) for device in sorted(self.connected))

    def _on_progress(self, seen: ProgressSeen, now: float) -> None:
        member = self._member(seen.device, seen.key)
        if member is None:
            return
        count(self.config, member, seen, now, sum(ref.size for ref in self.broadcast.values()))

    def _on_recovered(self, now: float, out: list[Command]) -> None:
        self.idle_since = now
        if self.current is None:
            return
        for device, member in self.current.members.items():
            member.progress_at = now  # silence while the server was down is not the device's
            if member.stage is Stage.CHOOSING:
                out.append(Choose(self.current.opened.key, device))
        if self.current.closed is not None:
            out.append(after_close(self, self.current))

    # -- what is said to devices -----------------------------------------------------------------

    def task(self, device: str) -> Send | None:
        """What a device is expected to be doing, for a reconnect; None when nothing."""
        current = self.current
        if current is None or current.closed is not None or device not in current.members:
            return None
        member = current.members[device]
        if member.stage is Stage.PROBING:
            seed = int(rng_for(self.config.run.seed, current.opened.key.round, device, "probe").integers(2**62))
            task = ProbeTask(current.opened.key, self.config.probe_spec(seed), self.objects(), self.similarity)
            return SendProbe(device, task)
        if member.stage is Stage.TRAINING and member.assigned is not None:
            return SendAssignment(device, self._assignment(device, member.assigned))
        return None

    def _assignment(self, device: str, chosen: e.Assigned) -> Assignment:
        key = chosen.key
        seed = int(rng_for(self.config.run.seed, key.round, device, "train").integers(2**62))
        spec = replace(
            self.config.train_spec(self.manifest, self.config.learning_rate(key.round), seed), gradient=chosen.gradient
        )
        adapter = self.objects()
        if chosen.gradient is Gradient.SUBMODEL and not spec.fidelity:  # whatever else runs the full model needs all of ΔW
            kept = {unit.layer for unit in chosen.units}
            adapter = tuple(o for o in adapter if o.layer in kept)
        return Assignment(
            key, chosen.units, chosen.groups, chosen.probabilities, spec, adapter, chosen.micro_batch,
            chosen.checkpointing, chosen.redraws, chosen.reductions,
        )  # fmt: skip

    def _send_task(self, device: str, out: list[Command]) -> None:
        if device in self.connected and (task := self.task(device)) is not None:
            out.append(task)

    def _cancel(self, device: str, key: TaskKey, reason: str, out: list[Command]) -> None:
        if device in self.connected:
            out.append(SendCancel(device, key, reason))

    def _greet(self, device: str, out: list[Command]) -> None:
        if self.ended is not None:
            return
        if (task := self.task(device)) is not None:
            if self.current is not None:
                begin_anew(self.current.members[device])
            out.append(task)
        elif self.current is None or self.current.closed is not None or self._idle(device):
            # Asked at every connection: the budget may have changed while the device was away.
            out.append(SendPlanRequest(device, self.spec))

    def _idle(self, device: str) -> bool:
        """Whether the round expects nothing (more) of it, so that a new plan can't change what is being chosen for it."""
        member = self.current.members.get(device) if self.current is not None else None
        return member is None or member.settled

    def _ask(self, device: str, out: list[Command]) -> None:
        """Ask a device that reconnected during its task, now that it is free again."""
        if device in self.stale & self.connected and self.ended is None:
            out.append(SendPlanRequest(device, self.spec))
