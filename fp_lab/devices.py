"""The simulated devices: one warmed worker's tasks, in this process, for all of them. They differ in their data alone."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from common.checkpoint import Checkpoint, cached_fingerprint
from common.errors import ModelError
from common.types import (
    Assignment,
    Capacity,
    ModelManifest,
    PlanReport,
    ProbeReport,
    ProbeSpec,
    ProbeTask,
    RunSpec,
    UnitObject,
    UpdateMetrics,
    model_units,
)
from fp_client import measure
from fp_client.adapter_files import AdapterFiles
from fp_client.batches import Dataset, heldout_batches
from fp_client.data import DataSource, Split, open_rows
from fp_client.memory import Setting
from fp_client.messages import AdapterFile, CheckArgs, OnProgress, ProbeArgs, TrainArgs, WorkerConfig
from fp_client.planner import Limits, Plan, plan
from fp_client.probe import probe
from fp_client.tasks import Tasks, check_finite, collecting
from fp_client.template import Encoded, encode
from fp_lab.experiment import Experiment, Row
from fp_server.objects import ObjectStore

EVALUATED_AT_ONCE = 16
"""Held-out rows in one pass of the evaluation, and padded to one length; they are ordered by length."""


class DeviceTasks(Tasks):
    """A warmed worker's tasks; `of` gives them for one device without warming up again."""

    def of(self, data: DataSource, cache: Path, budget_bytes: int, datasets: dict[int, Dataset]) -> Self:
        """The same worker with a device's data, cache directory and budget.

        The budget is planned for and measured; the process isn't limited to it, because the server's half lives in it too.
        """
        twin = copy.copy(self)
        twin.config = replace(self.config, data=data, cache=str(cache), budget_bytes=budget_bytes)
        twin._datasets = datasets
        twin.warmed_bytes = measure.footprint()  # what other tasks and the server's half have left behind isn't this task's
        return twin


@dataclass(frozen=True)
class Evaluation:
    """The full model's mean token loss on the experiment's held-out rows."""

    loss: float
    tokens: int
    seconds: float


class Fleet:
    """All devices of an experiment, for one row and seed after another."""

    def __init__(self, experiment: Experiment, directory: Path) -> None:
        """`directory`: the experiment's; quantized units are kept below it. Warms up, which takes some seconds.

        Raises ModelError, ConfigError and what else the worker's configuration deserves.
        """
        self.experiment, self.cache = experiment, directory / "cache"
        self.cache.mkdir(parents=True, exist_ok=True)
        checkpoint = Checkpoint(experiment.model)
        try:
            fingerprint = cached_fingerprint(checkpoint, self.cache)
            self.manifest: ModelManifest = checkpoint.manifest(experiment.model.name or "model", fingerprint)
            self._config = checkpoint.config
            self._setting = Setting.of(checkpoint, experiment.quantization, experiment.dtype, experiment.threads)
        finally:
            checkpoint.close()
        self._tasks = DeviceTasks(
            WorkerConfig(
                str(experiment.model), fingerprint, str(self.cache), DataSource(""), experiment.quantization,
                experiment.device, experiment.dtype, experiment.threads,
            )
        )  # fmt: skip
        self.tokenizer = self._tasks.tokenizer
        self._data: Path | None = None
        self._datasets: dict[str, dict[int, Dataset]] = {}
        self._held_out: Dataset | None = None

    def use(self, data: Path) -> None:
        """The directory `fp_lab.partition.prepare` has made."""
        self._data = data

    @property
    def data(self) -> Path:
        """Where the devices' files lie."""
        assert self._data is not None, "Fleet.use comes first"
        return self._data

    def tasks(self, device: str, cache: Path, budget_bytes: int) -> DeviceTasks:
        """A device's worker. `cache`: the job's, a directory a device; quantized units are shared by all."""
        mine = cache / device
        if not mine.exists():
            mine.mkdir(parents=True)
            (self.cache / "nf4").mkdir(exist_ok=True)
            (mine / "nf4").symlink_to((self.cache / "nf4").resolve())
        # One row of its own: the loss that counts is the experiment's own evaluation's.
        source = DataSource(str(self.data / f"{device}.jsonl"), heldout_max=1, on_long="drop")
        return self._tasks.of(source, mine, budget_bytes, self._datasets.setdefault(device, {}))

    def samples(self, device: str, window: int, cache: Path) -> int:
        """|D_n|."""
        return self.tasks(device, cache, 0).check(CheckArgs(window), lambda *_: None).samples

    def planned(self, spec: RunSpec, row: Row) -> Plan:
        """What a device's planner says. Raises BudgetError when the row's budget holds nothing."""
        return plan(
            self._config, self._setting, spec.train, spec.probe, spec.broadcast_rank, row.budget, 1, spec.part,
            Limits(spec.update_bytes, spec.step_seconds),
        )  # fmt: skip

    def evaluate(self, adapter: Mapping[int, Path], cache: Path, progress: OnProgress) -> Evaluation:
        """The full model with a broadcast adapter (a file a layer) on the held-out rows, by the probe's path."""
        begin = time.monotonic()
        rows = self._held()
        spec = ProbeSpec(batch_size=EVALUATED_AT_ONCE, sequence_length=self.experiment.window)
        tasks = self._tasks
        with contextlib.closing(Checkpoint(self.experiment.model)) as checkpoint:
            batches = list(heldout_batches(rows, EVALUATED_AT_ONCE, self.tokenizer))
            files = AdapterFiles([AdapterFile(layer, str(path)) for layer, path in sorted(adapter.items())])
            found = probe(
                tasks._loader(checkpoint), None, batches, spec, files, similarity=False, micro_rows=EVALUATED_AT_ONCE,
                pass_rows=EVALUATED_AT_ONCE, progress=collecting(progress),
            )  # fmt: skip
        tasks.forget()
        check_finite(found, "evaluation", self.experiment.dtype)
        return Evaluation(found.loss, found.tokens, time.monotonic() - begin)

    def _held(self) -> Dataset:
        if self._held_out is None:
            rows = open_rows(DataSource(str(self.data / "held-out.jsonl")))
            sizes = []
            for index in range(len(rows)):
                found = encode(rows.read(index), self.tokenizer, self.experiment.window)
                if not isinstance(found, Encoded):
                    raise ModelError(f"{rows.name}:{index + 1}: does not fit the window; was the tokenizer changed?")
                sizes.append(len(found.ids))
            order = sorted(range(len(rows)), key=lambda index: (sizes[index], index))
            self._held_out = Dataset(rows, Split((), tuple(order)), self.experiment.window)
        return self._held_out


class JobDevices:
    """The fleet as one job's round logic sees it: plan, probe, train. Files come from and go to the job's store."""

    def __init__(self, fleet: Fleet, row: Row, store: ObjectStore, cache: Path, progress: OnProgress) -> None:
        self._fleet, self._row, self._store, self._cache, self._progress = fleet, row, store, cache, progress
        self._planned: Plan | None = None

    def plan(self, spec: RunSpec, device: str, samples: int = 0) -> PlanReport:
        """A device's answer to a plan request; the row's `units` bounds what it says it can hold.

        `samples`: |D_n| where it's known already (the files don't change); 0 has it counted.
        """
        if self._planned is None:
            self._planned = self._fleet.planned(spec, self._row)
        planned = self._planned
        window = max(spec.train.sequence_length, spec.probe.sequence_length)
        return PlanReport(
            spec.run, samples or self._fleet.samples(device, window, self._cache), spec.fingerprint,
            self._capacities(planned, spec), planned.unit_bytes, planned.smallest_budget, "", self._row.budget,
        )  # fmt: skip

    def _capacities(self, planned: Plan, spec: RunSpec) -> tuple[Capacity, ...]:
        if self._row.units is None:
            return planned.capacities
        most = self._row.units * len(model_units(spec.part, 1))
        return tuple(replace(one, units=min(one.units, most)) for one in planned.capacities)

    def probe(self, device: str, task: ProbeTask) -> ProbeReport:
        """A device's probe of the full model."""
        tasks = self._tasks(device)
        try:
            return tasks.probe(ProbeArgs(task, self._files(task.adapter)), self._progress)
        finally:
            tasks.forget()

    def train(self, device: str, assignment: Assignment, out: Path) -> UpdateMetrics:
        """A device's training; its update is written to `out`."""
        tasks = self._tasks(device)
        try:
            return tasks.train(TrainArgs(assignment, self._files(assignment.adapter), str(out)), self._progress).metrics
        finally:
            tasks.forget()

    def evaluate(self, adapter: tuple[UnitObject, ...]) -> Evaluation:
        """The full model with this broadcast adapter on the held-out rows."""
        files = {unit.layer: self._store.path(unit.ref.digest) for unit in adapter}
        return self._fleet.evaluate(files, self._cache, self._progress)

    def _tasks(self, device: str) -> DeviceTasks:
        return self._fleet.tasks(device, self._cache, self._row.budget)

    def _files(self, adapter: tuple[UnitObject, ...]) -> tuple[AdapterFile, ...]:
        return tuple(AdapterFile(unit.layer, str(self._store.path(unit.ref.digest))) for unit in adapter)
