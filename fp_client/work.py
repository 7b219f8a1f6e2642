"""A device's own weights and data put to work: the daemon's side of the worker process. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import threading
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from common.checkpoint import Checkpoint, cached_fingerprint
from common.errors import FedPrunerError, ProtocolError, UpdateRejected, WorkerError
from common.types import Assignment, PlanReport, ProbeReport, ProbeTask, RunSpec
from fp_client import models
from fp_client.adapter_files import AdapterFiles
from fp_client.config import ClientConfig, ModelSection, cache_dir, need_data, need_model
from fp_client.data import DataSource, count_examples
from fp_client.memory import Setting
from fp_client.messages import (
    AdapterFile,
    CheckArgs,
    CheckResult,
    FidelityArgs,
    FidelityResult,
    OnProgress,
    PaceArgs,
    ProbeArgs,
    TrainArgs,
    TrainResult,
    WorkerConfig,
)
from fp_client.pace import Pace
from fp_client.planner import Limits, Plan, plan
from fp_client.pool import Worker

log = logging.getLogger(__name__)

KEPT = 16
"""Plans, and paces, that are remembered."""

K = TypeVar("K")
V = TypeVar("V")


def resolve_device(wanted: str) -> str:
    """``cpu`` or ``cuda``, without importing torch: CUDA where there is a GPU and a torch built for it."""
    if wanted != "auto":
        return wanted
    try:
        built_for_cpu = metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        built_for_cpu = True
    return "cuda" if Path("/dev/nvidiactl").exists() and not built_for_cpu else "cpu"


def budget_of(config: ClientConfig, device: str) -> int:
    """The budget the planner and the worker's cap go by: VRAM on CUDA, main memory on CPU; 0 for no bound."""
    if device == "cuda":
        return config.budget.device
    limits = [limit for limit in (config.budget.host, config.budget.device) if limit]
    return min(limits, default=0)


def data_source(config: ClientConfig, directory: Path) -> DataSource:
    """The device's data. Raises ConfigError when none is configured."""
    section = need_data(config, directory)
    return DataSource(section.source, section.split, section.held_out, section.max_held_out, section.on_long)


def setting_of(config: ClientConfig, section: ModelSection, checkpoint: Checkpoint) -> Setting:
    """How this device computes with a model, as the planner wants it."""
    return Setting.of(checkpoint, section.quantization, config.dtype, config.threads)


def _remember(known: dict[K, V], key: K, value: V) -> None:
    """Put it last, and forget what has stood there longest: a server may ask about ever other runs."""
    known.pop(key, None)
    known[key] = value
    while len(known) > KEPT:
        del known[next(iter(known))]


def _pace_key(spec: RunSpec) -> tuple[Any, ...]:
    """What a device's pace depends on, besides its own settings."""
    train = spec.train
    return spec.model, train.batch_size, train.sequence_length, train.rank, train.targets, spec.broadcast_rank


def check_ranks(adapter: tuple[AdapterFile, ...], most: int) -> None:
    """Raises ProtocolError when the broadcast adapter has a larger rank than its run announced, ModelError when it is damaged."""
    files = AdapterFiles(adapter)
    for layer in files:
        try:
            rank = files.rank((layer,))
        except UpdateRejected as error:
            raise ProtocolError(f"adapter of layer {layer + 1}: {error}") from None
        if rank > most:
            raise ProtocolError(f"adapter of layer {layer + 1}: has rank {rank}, its run announced at most {most}")


class LocalWork:
    """`Work` of a device directory: resolves models, counts data, plans, and runs tasks in a worker process."""

    def __init__(self, config: ClientConfig, directory: Path) -> None:
        self.config, self.directory = config, directory
        self.device = resolve_device(config.device)
        self.budget_bytes = budget_of(config, self.device)
        self.cache = cache_dir(config, directory)
        self._worker: Worker | None = None
        self._plans: dict[RunSpec, Plan] = {}
        self._paces: dict[tuple[Any, ...], Pace] = {}
        self._reading = asyncio.Lock()

    def rebudget(self, config: ClientConfig) -> bool:
        """Take up another configuration's budget and bound on disk; whether they are others. Runs are planned anew, and a task
        that begins from now on has a worker of its own."""
        cache = self.config.cache.model_copy(update={"max_spill": config.cache.max_spill})
        changed = self.config.model_copy(update={"budget": config.budget, "cache": cache})
        if changed == self.config:
            return False
        self.config, self.budget_bytes = changed, budget_of(changed, self.device)
        self._plans.clear()
        return True

    async def close(self) -> None:
        """End the worker process."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.close()

    def open_model(self, name: str) -> tuple[ModelSection, Checkpoint]:
        """A configured model's checkpoint, fetched from the hub when it is a hub id. Blocking."""
        section = need_model(self.config, name, self.directory)
        return section, Checkpoint(models.resolve(section.source, self.cache / "hub"))

    async def fingerprint(self, spec: RunSpec, progress: OnProgress) -> str:
        """Fingerprint of this device's weights; read once, then remembered by the files' stamp."""
        stopped = threading.Event()

        def told(done: int, total: int) -> None:
            if stopped.is_set():  # a thread can't be cancelled, and reading a large model takes minutes
                raise WorkerError("the daemon is stopping")
            progress("verify", done, total)

        def read() -> str:
            _, checkpoint = self.open_model(spec.model)
            try:
                return cached_fingerprint(checkpoint, self.cache, told)
            finally:
                checkpoint.close()

        try:
            return await asyncio.to_thread(read)
        finally:
            stopped.set()

    async def plan(self, spec: RunSpec) -> PlanReport:
        """Data counted with the tokenizer, and what the budget holds. Raises BudgetError with the smallest that would do."""
        first = await self._planned(spec)  # a budget too small is refused before a worker starts
        worker = await self.worker(spec)
        window = max(spec.train.sequence_length, spec.probe.sequence_length)
        check = await worker.run("check", CheckArgs(window), CheckResult)
        if check.dropped:
            log.warning("run %s: %d examples are left out: their responses don't fit %d tokens", spec.run, check.dropped, window)
        planned = await self._remembered(spec, first)
        return PlanReport(
            spec.run, check.samples, spec.fingerprint, planned.capacities, planned.unit_bytes, planned.smallest_budget,
            "", self.budget_bytes,
        )  # fmt: skip

    def planned(self, spec: RunSpec, pace: Pace | None = None) -> Plan:
        """What the budget holds of a run's model. Raises BudgetError with the smallest that would do. Blocking."""
        _, heldout = count_examples(data_source(self.config, self.directory))
        section, checkpoint = self.open_model(spec.model)
        try:
            setting = setting_of(self.config, section, checkpoint)
            return plan(
                checkpoint.config, setting, spec.train, spec.probe, spec.broadcast_rank, self.budget_bytes, heldout, spec.part,
                Limits(spec.update_bytes, spec.step_seconds, self.config.cache.max_spill), pace,
            )  # fmt: skip
        finally:
            checkpoint.close()

    async def _planned(self, spec: RunSpec, pace: Pace | None = None) -> Plan:
        """`planned` in a thread, one at a time: it holds the whole data set, and goes on when who waits for it is cancelled."""
        await self._reading.acquire()

        def ended(thread: asyncio.Future[Plan]) -> None:
            self._reading.release()
            if not thread.cancelled():
                thread.exception()  # looked at: where nobody waits any more it is no news

        try:
            thread = asyncio.get_running_loop().run_in_executor(None, self.planned, spec, pace)
        except BaseException:
            self._reading.release()
            raise
        thread.add_done_callback(ended)
        return await asyncio.shield(thread)

    async def probe(self, spec: RunSpec, task: ProbeTask, adapter: tuple[AdapterFile, ...], progress: OnProgress) -> ProbeReport:
        """Run the probe in the worker."""
        await asyncio.to_thread(check_ranks, adapter, spec.broadcast_rank)
        worker = await self.worker(spec)
        planned = self._plans.get(spec)
        if planned is None:  # without a pace: a probe's memory doesn't depend on it
            planned = await self._planned(spec)
        return await worker.run("probe", ProbeArgs(task, adapter), ProbeReport, progress, planned.probe.peak)

    async def train(
        self, spec: RunSpec, task: Assignment, adapter: tuple[AdapterFile, ...], out: Path, progress: OnProgress
    ) -> TrainResult:
        """Train in the worker; the update is written to `out`."""
        await asyncio.to_thread(check_ranks, adapter, spec.broadcast_rank)
        worker, planned = await self.worker(spec), await self._remembered(spec)
        mode = planned.mode(task.spec.gradient)
        args = TrainArgs(task, adapter, str(out), self._paces.get(_pace_key(spec)))
        return await worker.run("train", args, TrainResult, progress, mode.peak_bytes if mode is not None else 0)

    async def fidelity(self, spec: RunSpec, args: FidelityArgs, progress: OnProgress) -> FidelityResult:
        """Measure each mode's gradient in the worker."""
        worker = await self.worker(spec)
        return await worker.run("fidelity", args, FidelityResult, progress)

    async def _remembered(self, spec: RunSpec, first: Plan | None = None) -> Plan:
        """The run's plan; made again after a restart. `first`: the plan without a pace, where it is known."""
        if spec not in self._plans:
            planned = first if first is not None else await self._planned(spec)
            pace = await self.pace(spec, planned)
            _remember(self._plans, spec, planned if pace is None else await self._planned(spec, pace))
        return self._plans[spec]

    async def pace(self, spec: RunSpec, first: Plan | None = None) -> Pace | None:
        """This device's pace, measured once. None where it can't be: it is only for predicting, so no task fails of it, and
        what is wrong with weights or data is for the task itself to report. `first`: as for `_remembered`.

        Raises BudgetError where nothing fits.
        """
        key = _pace_key(spec)
        if (pace := self._paces.get(key)) is None:
            planned = first if first is not None else await self._planned(spec)
            rows = min(mode.micro_batch for mode in planned.modes)
            try:
                worker = await self.worker(spec)
                pace = await worker.run("pace", PaceArgs(spec.train, spec.broadcast_rank, rows), Pace)
            except FedPrunerError as error:
                log.warning("run %s: step times are not predicted: %s", spec.run, error)
                return None
        _remember(self._paces, key, pace)  # also one that was known: it outlives the plans that are made with it
        return pace

    async def worker(self, spec: RunSpec) -> Worker:
        """The warm worker for a run's model; another model's is ended first."""
        section, checkpoint = await asyncio.to_thread(self.open_model, spec.model)
        checkpoint.close()
        wanted = WorkerConfig(
            str(checkpoint.directory), spec.fingerprint, str(self.cache), data_source(self.config, self.directory),
            section.quantization, self.device, self.config.dtype, self.config.threads, self.budget_bytes,
        )  # fmt: skip
        if self._worker is None or self._worker.config != wanted:
            await self.close()
            self._worker = Worker(wanted, self.config.worker_idle_seconds)
        return self._worker
