"""What is known of a run: the fold of its events, and what others may ask of it. Nothing here changes anything."""

from __future__ import annotations

from dataclasses import replace

from common.errors import AlreadyDone, NotFound, TooLate
from common.types import Assignment, Capacity, Gradient, ModelManifest, ObjectRef, ProbeTask, TaskKey, UnitObject
from fp_server import events as e
from fp_server.capacity import choose_capacity
from fp_server.commands import Send, SendAssignment, SendProbe
from fp_server.config import RunConfig
from fp_server.roundstate import History, Member, Phase, Round, Stage
from fp_server.seeding import rng_for


class RunState:
    """One run, as its events so far make it."""

    def __init__(self, config: RunConfig, manifest: ModelManifest, history: History | None = None) -> None:
        self.config, self.manifest = config, manifest
        self.name = config.run.name
        self.spec = config.run_spec(manifest)
        self.units = config.units(manifest.layers)
        """The model's units, in model order: what an index in a probe, a plan or a draw means."""
        self.connected: set[str] = set()
        self.stale: set[str] = set()
        """Devices that have connected since they last said what they can hold."""
        self.revoked: set[str] = set()
        """Devices that were revoked and have not come back with a new certificate."""
        self.plans: dict[str, e.PlanReceived] = {}
        self.ledger: dict[int, ObjectRef] = {}
        self.broadcast: dict[int, ObjectRef] = {}
        self.next_round, self.attempt = 0, 0
        self.failures = 0
        """Failed attempts at the next round since the run was last resumed; `attempt` only ever grows within a round."""
        self.idle_since = 0.0
        self.told_at = 0.0
        """When its last event was."""
        self.current: Round | None = None
        self.evaluated: tuple[str, ...] = ()
        """The devices that measured the loss before the first round (`run.evaluation = "all"`)."""
        self.history = History() if history is None else history
        self.paused: str | None = None
        self.ended: e.RunEnded | None = None

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

    def leaving(self, device: str) -> e.DeviceDropped | None:
        """The event with which a revoked device leaves the open round; None when it is in none, or out of it already."""
        current = self.current
        if current is None or current.closed is not None:
            return None
        member = current.members.get(device)
        if member is None or member.stage is Stage.DROPPED:
            return None
        return e.DeviceDropped.by_revocation(self.name, current.opened.key, device)

    def awaits_plan(self, device: str) -> bool:
        """Whether the device was asked what it can hold; a plan nobody asked for changes nothing."""
        free = self.current is None or self.current.closed is not None or self.idle(device)
        return self.ended is None and free and (device in self.stale or device not in self.plans)

    @property
    def similarity(self) -> bool:
        """Whether the current round's probes measure similarities, or the loss alone."""
        return self.current is not None and not self.current.opened.evaluate and self.spec.similarity

    def objects(self) -> tuple[UnitObject, ...]:
        """The broadcast adapter, an object a layer, as the current round began with it."""
        return tuple(UnitObject(layer, ref) for layer, ref in sorted(self.broadcast.items()))

    def uses(self) -> dict[str, list[str]]:
        """Digest -> what each object is, for a person, that a restart would need: ledger, broadcast adapter, and the updates
        of the round under way."""
        found: dict[str, list[str]] = {}
        for name, kept in (("ledger", self.ledger), ("adapter object", self.broadcast)):
            for layer, ref in sorted(kept.items()):
                found.setdefault(ref.digest, []).append(f"{name} of layer {layer + 1} of run {self.name}")
        if self.current is not None:
            which = f"round {self.current.opened.key.round + 1} of run {self.name}"
            for device, member in sorted(self.current.members.items()):
                if member.accepted is not None:
                    found.setdefault(member.accepted.ref.digest, []).append(f"update of {device} for {which}")
        return found

    def references(self) -> frozenset[str]:
        """The digests that a restart would need."""
        return frozenset(self.uses())

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

    def idle(self, device: str) -> bool:
        """Whether the round expects nothing (more) of it, so that a new plan can't change what is being chosen for it."""
        member = self.current.members.get(device) if self.current is not None else None
        return member is None or member.settled
