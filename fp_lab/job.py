"""One row with one seed: a whole run of the server's state machine, with its devices in this process.

Every event is durable in the job's log before the machine sees it, and what is to be done next is read off the
machine. So after an interruption at any point the log is folded again and the job goes on; at most the one task that
was under way is done again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ConfigError, FedPrunerError, InUseError, StorageError
from common.types import Assignment, ModelManifest, PlanReport, ProbeTask
from fp_client.messages import OnProgress
from fp_lab.attacks import attackers, spoil
from fp_lab.devices import Fleet, JobDevices
from fp_lab.experiment import Experiment, Row, run_of
from fp_lab.partition import device_names
from fp_lab.results import Line, Results, line_of, read
from fp_server import events as e
from fp_server.capacity import plan_problem, refusal
from fp_server.commands import Connected, PlanConfirmed, Record, Recovered, Review, SendAssignment, SendProbe, Stimulus
from fp_server.config import RunConfig
from fp_server.decisions import after_close
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore
from fp_server.reviewing import review_round
from fp_server.rounds import RunMachine
from fp_server.roundstate import Stage
from fp_server.validation import check_metrics, check_update, starting_points
from fp_server.work import aggregate_round, choose_units, run_started, started_config

NOW = 0.0
"""The machine's clock stands still: devices take turns here, and none is dropped for waiting."""
LOCK_SECONDS = 1.0
"""How long a job that seems busy is tried again: whoever asks for its status holds the lock for a moment."""


class Stopped(Exception):
    """The person asked to stop; the job can be gone on with."""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a job's directory. Raises InUseError when another process does."""
    directory.mkdir(parents=True, exist_ok=True)
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InUseError(f"{directory}: another fp-lab is working on it") from None
                time.sleep(0.1)
        yield
    finally:
        os.close(fd)


def same_settings(started: RunConfig, now: RunConfig, directory: Path, row: str) -> None:
    """Raises ConfigError when a job was started with other settings than its row has now."""
    if started.model_dump(exclude={"model"}) != now.model_dump(exclude={"model"}):
        raise ConfigError(
            f"{directory}: was started with other settings than row {row!r} has now; give the row another name, or remove the "
            "directory"
        )


def same_attack(lines: list[Line], row: Row, directory: Path) -> None:
    """Raises ConfigError when a job's devices were attackers of another kind than its row has now."""
    if lines and lines[0].get("attack", "") != row.attacked:
        raise ConfigError(
            f"{directory}: was started with other attackers than row {row.name!r} has now; give the row another name"
        )


def check_ended(experiment: Experiment, row: Row, seed: int, directory: Path) -> None:
    """Raises ConfigError when a job that is done was run with other settings than its row has now."""
    config, _ = run_of(experiment, row, seed)
    same_attack(read(directory / "results.jsonl"), row, directory)
    database = Database(directory / "log.sqlite")
    try:
        _, started = next(EventLog(database).replay(config.run.name), (0.0, None))
    finally:
        database.close()
    if isinstance(started, e.RunStarted):
        same_settings(started_config(started, f"{directory}"), config, directory, row.name)


@dataclass
class Traffic:
    """Bytes of adapter objects that went to devices in the round under way. A device keeps what it had at its last turn."""

    held: dict[str, frozenset[str]] = field(default_factory=dict)
    bytes_down: int = 0

    def see(self, event: e.Event, machine: RunMachine) -> None:
        """Take in an event, folded or new."""
        if isinstance(event, e.ProbeReceived):
            objects = {unit.ref.digest: unit.ref.size for unit in machine.objects()}
            had = self.held.get(event.device, frozenset())
            self.bytes_down += sum(size for digest, size in objects.items() if digest not in had)
            self.held[event.device] = frozenset(objects)
        elif isinstance(event, e.RoundCommitted):
            self.bytes_down = 0


class Job:
    """A job of an experiment, in its own directory: ``log.sqlite``, ``objects/``, ``results.jsonl``."""

    def __init__(
        self,
        experiment: Experiment,
        row: Row,
        seed: int,
        directory: Path,
        fleet: Fleet,
        progress: OnProgress | None = None,
        fast: bool = False,
    ) -> None:
        """Folds the log there is, or starts the run; the caller holds the directory (`locked`).

        Raises ConfigError when the directory holds a run of another configuration or model, StorageError when it's damaged.
        """
        self.fast = fast
        self.experiment, self.row, self.seed, self.directory = experiment, row, seed, directory
        self.names = device_names(experiment.data.devices)
        self.attackers = attackers(row, self.names)
        self.store = ObjectStore(directory)
        self.store.clear_scratch()
        self.results = Results(directory / "results.jsonl")
        same_attack(self.results.lines, row, directory)
        self.devices = JobDevices(fleet, row, self.store, directory / "cache", progress or (lambda *_: None))
        self._spent = {"devices": 0.0, "aggregate": 0.0}
        self._traffic = Traffic()
        self._runner = asyncio.Runner()
        self._database = Database(directory / "log.sqlite")
        try:
            if row.units is not None and row.units > fleet.manifest.layers:
                raise ConfigError(f"row {row.name!r}: units: {row.units}, and the model has {fleet.manifest.layers} layers")
            self._log = EventLog(self._database)
            self.machine = self._open(fleet.manifest)
            fleet.planned(self.machine.spec, row)  # a budget that holds nothing is refused before anything is measured
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Wait for the log's writer."""
        self._runner.close()
        self._database.close()

    def _open(self, manifest: ModelManifest) -> RunMachine:
        config, toml = run_of(self.experiment, self.row, self.seed)
        config.check(manifest)
        machine: RunMachine | None = None
        for _, event in self._log.replay(config.run.name):
            if isinstance(event, e.RunStarted):
                machine = RunMachine(started_config(event, f"{self.directory}"), event.manifest)
            if machine is not None:
                self._traffic.see(event, machine)
                machine.handle(event, NOW)
        if machine is None:
            self._append(run_started(config, toml, manifest))
            machine = RunMachine(config, manifest)
        else:
            same_settings(machine.config, config, self.directory, self.row.name)
        if machine.manifest.fingerprint != manifest.fingerprint:
            raise ConfigError(f"{self.directory}: was started with other base weights; use another --out")
        self.store.sweep(machine.references(), ())
        return machine

    # -- going on --------------------------------------------------------------------------------

    def run(
        self, rounds: int | None = None, stop: Callable[[], None] = lambda: None, tell: Callable[[Line], None] | None = None
    ) -> None:
        """Go on to the end, or until `rounds` rounds are committed and evaluated. `stop` is called between steps and may raise.

        Raises ConfigError or what the devices said when the run can't go on.
        """
        self._post(Recovered())
        for device in self.names:
            self._post(Connected(device))
        if self.machine.paused is not None:
            self._post(e.RunResumed(self.machine.name))
        while True:
            stop()
            if line := self._report():
                if tell is not None:
                    tell(line)
            elif self.machine.ended is not None or (rounds is not None and self.machine.next_round >= rounds):
                return
            else:
                self._step()

    def _report(self) -> Line | None:
        """Write the line of the machine's state, once a round, before anything changes that state."""
        committed, wanted = self.machine.next_round, self.machine.config.run.rounds
        if len(self.results.lines) > committed:
            return None
        evaluation = None
        if committed % self.experiment.evaluate_every == 0 or committed == wanted:
            evaluation = self.devices.evaluate(self.machine.objects())
        line = line_of(self.machine, committed, evaluation, self._spent, self.fast)
        if self.row.attacked:
            line["attack"] = self.row.attacked
        self._spent = dict.fromkeys(self._spent, 0.0)
        self.results.append(line)
        return line

    def _step(self) -> None:
        """Do the next thing that the machine's state asks for; which one it is depends on that state alone."""
        machine, current = self.machine, self.machine.current
        for device in self.names:
            if machine.awaits_plan(device):
                self._post(self._plan(device))
                return
        if machine.paused is not None or current is None:
            self._stuck()
        elif current.closed is not None:
            next_ = after_close(machine, current)
            done: e.Event
            with self._timed("aggregate"):
                if isinstance(next_, Review):
                    done = review_round(machine, self.store, next_.key)
                else:
                    done = aggregate_round(machine, self.store, next_.key, self._traffic.bytes_down)
            self._post(done)
        else:
            device = next(device for device in sorted(current.members) if not current.members[device].settled)
            choosing = current.members[device].stage is Stage.CHOOSING
            with self._timed("devices"):
                event = self._turn(device, None if choosing else machine.task(device))
            self._post(event)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._spent[what] += time.monotonic() - begin

    def _stuck(self) -> None:
        """Raises ConfigError saying why nothing can be done."""
        machine = self.machine
        if machine.paused is not None:
            last = machine.history.last
            members = sorted(last[0].members.items()) if last else []
            said = [f"{device}: {member.dropped.message}" for device, member in members if member.dropped]
            raise ConfigError(f"run {machine.name!r} is paused: {machine.paused} ({'; '.join(said)})")
        unable = next((d for d in self.names if machine.capacity(d) is None), "")
        why = refusal(machine.plans[unable].report, machine.config.train.gradient) if unable else "no round can be opened"
        raise ConfigError(f"run {machine.name!r} can't go on: {unable} {why}".replace("  ", " "))

    def _plan(self, device: str) -> e.PlanReceived | PlanConfirmed:
        before = self.machine.plans.get(device)
        known = before.samples if before is not None else 0
        report: PlanReport = self.devices.plan(self.machine.spec, device, known)
        if problem := plan_problem(report, self.machine.manifest, self.machine.units):
            raise ConfigError(f"row {self.row.name!r}: {problem}")
        event = e.PlanReceived(self.machine.name, device, report, report.samples)
        return PlanConfirmed(device) if event == before else event

    def _turn(self, device: str, task: object) -> e.Event:
        """One device's next task, done; as in the daemons, an error puts the device out of the round."""
        machine, current = self.machine, self.machine.current
        assert current is not None
        key = current.opened.key
        try:
            if isinstance(task, SendProbe):
                return self._probe(device, task.task)
            if isinstance(task, SendAssignment):
                return self._train(device, task.assignment)
            return choose_units(machine, key, device)
        except StorageError:  # the lab's own disk, not the device's fault
            raise
        except FedPrunerError as error:
            return e.DeviceDropped(machine.name, key, device, type(error).__name__, str(error))

    def _probe(self, device: str, task: ProbeTask) -> e.ProbeReceived:
        r = self.devices.probe(device, task)
        return e.ProbeReceived(
            self.machine.name, r.key, device, r.similarity, r.in_out, r.loss, r.tokens, r.peak_bytes, r.seconds
        )

    def _train(self, device: str, assignment: Assignment) -> e.UpdateAccepted:
        out = self.store.scratch / f"{device}.safetensors"
        metrics = self.devices.train(device, assignment, out)
        if device in self.attackers:
            spoil(out, self.row)
        check_metrics(metrics, len(assignment.units))
        starts = starting_points(assignment.spec.start, assignment.adapter, self.store.path)
        check_update(out, assignment, self.machine.manifest, self.machine.config.limits.max_update_norm, starts)
        return e.UpdateAccepted(self.machine.name, assignment.key, device, self.store.adopt(out), metrics)

    # -- the log ---------------------------------------------------------------------------------

    def _append(self, event: e.Event) -> None:
        self._runner.run(self._log.append(event))

    def _post(self, happening: e.Event | Stimulus) -> None:
        """Commit and hand in an event, and those that follow from it. What else the machine asks for, its state says."""
        pending: deque[e.Event | Stimulus] = deque([happening])
        while pending:
            item = pending.popleft()
            if isinstance(item, e.Event):
                self._append(item)
                self._traffic.see(item, self.machine)
            before = self.machine.references()
            pending.extend(command.event for command in self.machine.handle(item, NOW) if isinstance(command, Record))
            if gone := before - self.machine.references():
                self.store.discard(gone, self.store.mark)
