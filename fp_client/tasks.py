"""What a worker can do: check the data, probe, train. One instance a process; what a task loads goes with the task."""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.blocks import write_blocks
from common.checkpoint import Checkpoint
from common.codec import from_json
from common.errors import BudgetError, ModelError, ProtocolError, StorageError, WorkerError
from common.faults import fault
from common.types import Assignment, Gradient, ProbeReport, TaskKey, UpdateMetrics
from fp_client import batches as data
from fp_client import measure, memory, planner
from fp_client.adapter_files import AdapterFiles
from fp_client.fidelity import Fidelity, fidelity, gradients
from fp_client.loader import UnitLoader
from fp_client.messages import (
    CheckArgs,
    CheckResult,
    FidelityArgs,
    FidelityResult,
    ModeFidelity,
    OnProgress,
    PaceArgs,
    ProbeArgs,
    TrainArgs,
    TrainResult,
    WorkerConfig,
)
from fp_client.pace import Pace
from fp_client.pacing import Typical, measure_pace
from fp_client.probe import ProbeResult, probe
from fp_client.shapes import shape_of
from fp_client.template import IGNORE
from fp_client.train import Trainer, check_spec, train
from fp_client.trainers import open_trainer, signs_of_life
from fp_client.warmup import warm_up

LOOKED_AT = 4
"""Steps whose rows say what a typical one is."""
WORN = 16 << 20
"""More holes than this in a worker's heap, and the next task gets a fresh worker."""
SLACK = 128 << 20
"""Address space a task may reserve above its budget: thread stacks and libraries loaded late are never touched whole."""


def collecting(progress: OnProgress) -> OnProgress:
    """Collects garbage after each unit: a 4-bit weight and its module refer to each other, so a dropped unit stays
    in memory until the collector runs."""

    def collect(phase: str, done: int, total: int) -> None:
        gc.collect()
        progress(phase, done, total)

    return collect


def load_tokenizer(directory: str) -> Any:
    """The model's own tokenizer; never remote code. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory}: its tokenizer can't be loaded: {str(error)[:300]}") from None
    tokenizer.model_max_length = 1 << 30  # windows are the run's to set; no warning about long texts
    return tokenizer


def check_finite(found: ProbeResult, where: str, dtype: str) -> None:
    """Raises ModelError when the probe came out as NaN or infinite: such a report must not be sent."""
    bad = [
        what
        for what, values in (("similarity", found.similarity), ("input-output similarity", found.in_out))
        if not np.isfinite(values).all()
    ]
    if found.tokens and not math.isfinite(found.loss):
        bad.insert(0, f"held-out loss ({found.loss})")
    if bad:
        raise ModelError(
            f"{where}: the full model's {' and '.join(bad)} is not finite: its weights or the broadcast adapter hold NaN, "
            f"infinite or too large values for {dtype}"
        )


class Tasks:
    """The tasks of one worker, all with the same model, data and budget."""

    def __init__(self, config: WorkerConfig) -> None:
        """Pins threads, warms up, takes the footprint. Raises what the configuration deserves."""
        self.config = config
        torch.set_num_threads(config.threads)
        if config.device.startswith("cuda") and not torch.cuda.is_available():
            raise WorkerError(f'device {config.device!r}: this machine has no CUDA device that torch can use; set device = "cpu"')
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.tokenizer = load_tokenizer(config.model)  # tens of megabytes: part of the warmed worker
        self._datasets: dict[int, data.Dataset] = {}
        warm_up(config.device, self.dtype, config.quantization)
        gc.collect()
        gc.freeze()  # what the libraries hold for good need not be searched at every collection
        self.warmed_bytes = measure.footprint()
        self._holes = measure.heap_holes()
        self._cap()

    def _cap(self) -> None:
        # A task that would exceed the budget fails and says so, before other processes have to pay for it.
        budget = self.config.budget_bytes
        if budget and self.config.device.startswith("cuda"):
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))
        elif budget:
            measure.limit(budget + SLACK)

    def run(self, task: str, args: Any, progress: OnProgress) -> Any:
        """Do a task by name. Raises ProtocolError when there is no such task or the arguments don't fit it."""
        kinds: dict[str, tuple[type[Any], Callable[[Any, OnProgress], Any]]] = {
            "check": (CheckArgs, self.check),
            "pace": (PaceArgs, self.pace),
            "probe": (ProbeArgs, self.probe),
            "train": (TrainArgs, self.train),
            "fidelity": (FidelityArgs, self.fidelity),
        }
        if task not in kinds:
            raise ProtocolError(f"unknown task {task!r} (known: {', '.join(kinds)})")
        kind, work = kinds[task]
        try:
            decoded = from_json(kind, args)
        except ValueError as error:
            raise ProtocolError(f"task {task!r}: {error}") from None
        try:
            return work(decoded, progress)
        finally:
            self.forget()

    @property
    def worn(self) -> bool:
        """Whether earlier tasks have left the heap so that later ones would take more than is planned for them."""
        return measure.heap_holes() > self._holes + WORN

    def forget(self) -> None:
        """Give back what a task has left behind."""
        measure.trim()
        if self.config.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def check(self, args: CheckArgs, progress: OnProgress) -> CheckResult:
        """Is the data usable with this window? Raises DataError."""
        found = self._dataset(args.window)
        return CheckResult(len(found.split.train), len(found.split.heldout), found.dropped)

    def pace(self, args: PaceArgs, progress: OnProgress) -> Pace:
        """How fast one layer runs for typical rows of this device's data."""
        spec = replace(args.spec, steps=LOOKED_AT)
        drawn = data.train_batches(self._dataset(spec.sequence_length), spec, self.tokenizer)
        parts = [part["labels"] for batch in drawn for part in data.micro_batches(batch, args.rows)]
        count = LOOKED_AT * spec.batch_size
        tokens = sum(part.numel() for part in parts) // count
        response = sum(int((part[:, 1:] != IGNORE).sum()) for part in parts) // count
        with self._checkpoint() as checkpoint:
            typical = Typical(max(2, tokens), max(1, response))
            return measure_pace(self._loader(checkpoint), spec, args.broadcast_rank, args.rows, typical)

    def probe(self, args: ProbeArgs, progress: OnProgress) -> ProbeReport:
        """The full model's similarities and held-out loss, one unit in memory at a time."""
        spec, begin = args.task.spec, time.monotonic()
        rows = self._dataset(spec.sequence_length)
        with measure.Peak(self.config.device, self.warmed_bytes) as peak, self._checkpoint() as checkpoint:
            batch = data.probe_batch(rows, spec, self.tokenizer) if args.task.similarity else None
            held = list(data.heldout_batches(rows, spec.batch_size, self.tokenizer))
            adapter = AdapterFiles(args.adapter)
            chosen = planner.probe_rows(
                shape_of(checkpoint.config), self._setting(checkpoint), spec, len(rows.split.heldout), adapter.layer_bytes,
                self.config.budget_bytes, args.task.similarity,
            )  # fmt: skip
            found = probe(
                self._loader(checkpoint), batch, held, spec, adapter, similarity=args.task.similarity,
                micro_rows=chosen.micro_rows, pass_rows=chosen.pass_rows, progress=collecting(progress),
            )  # fmt: skip
        seconds = time.monotonic() - begin
        check_finite(found, f"run {args.task.key.run}, round {args.task.key.round + 1}", self.config.dtype)
        return ProbeReport(
            args.task.key, found.similarity, found.in_out, found.loss if found.tokens else 0.0, found.tokens, peak.bytes, seconds
        )

    def train(self, args: TrainArgs, progress: OnProgress) -> TrainResult:
        """Train the assigned submodel and write its update to `args.out`."""
        assignment, spec = args.assignment, args.assignment.spec
        check_spec(spec)
        rows = self._dataset(spec.sequence_length)
        with measure.Peak(self.config.device, self.warmed_bytes) as peak, self._checkpoint() as checkpoint:
            adapter = AdapterFiles(args.adapter)
            predicted = self._predicted(checkpoint, assignment, adapter, args.pace)
            self._room(predicted.disk_bytes)
            batches = list(data.train_batches(rows, spec, self.tokenizer))
            measured = self._fidelity(checkpoint, assignment, adapter, batches[0], progress) if spec.fidelity else None
            with self._trainer(checkpoint, assignment, adapter, predicted, progress) as trainer:
                found = train(trainer, batches, spec, assignment.micro_batch, progress)
            fault("worker.update.write")
            write_blocks(Path(args.out), found.blocks)
            fault("worker.update.written")
        metrics = UpdateMetrics(
            found.loss_first, found.loss_last, found.tokens_per_second, predicted.peak, peak.bytes, found.seconds,
            predicted.step_seconds, found.step_seconds,
            measured.overall if measured is not None else None, measured.units if measured is not None else (),
        )  # fmt: skip
        return TrainResult(metrics)

    def _predicted(
        self, checkpoint: Checkpoint, assignment: Assignment, adapter: AdapterFiles, pace: Pace | None = None
    ) -> planner.TaskPlan:
        """What the assignment will take. Raises BudgetError before anything is loaded."""
        whole = assignment.spec.gradient is not Gradient.SUBMODEL or assignment.spec.fidelity
        layers = range(checkpoint.layers) if whole else {unit.layer for unit in assignment.units}
        return planner.plan_task(
            shape_of(checkpoint.config), self._setting(checkpoint), assignment.spec, adapter.rank(layers), assignment.units,
            assignment.micro_batch, assignment.checkpointing, self.config.budget_bytes, pace,
        )  # fmt: skip

    def _room(self, size: int) -> None:
        """Raises StorageError, before anything is loaded, when the disk has less room than activations will take."""
        cache = Path(self.config.cache)
        cache.mkdir(parents=True, exist_ok=True)
        if size and (free := shutil.disk_usage(cache).free) < size:
            raise StorageError(
                f"{cache}: {size >> 20} MiB of activations will be spilled here, and {free >> 20} MiB are free: make room, raise "
                "[budget], or bound them with cache.max_spill; nothing was loaded"
            )

    def _trainer(
        self,
        checkpoint: Checkpoint,
        assignment: Assignment,
        adapter: AdapterFiles,
        predicted: planner.TaskPlan,
        progress: OnProgress,
    ) -> contextlib.AbstractContextManager[Trainer]:
        return open_trainer(
            self._loader(checkpoint), assignment.units, assignment.spec, adapter, predicted.stream,
            Path(self.config.cache) / "spill", predicted.checkpointing, progress,
        )  # fmt: skip

    def _gradient(
        self,
        checkpoint: Checkpoint,
        assignment: Assignment,
        mode: Gradient,
        adapter: AdapterFiles,
        batch: data.Batch,
        progress: OnProgress,
    ) -> tuple[list[torch.Tensor], float]:
        """(LoRA gradient, mean loss) of the assigned units on one batch in a mode; nothing of it stays loaded.

        As many rows at a time as the budget holds, at most the assignment's. Raises BudgetError when it holds not even one.
        """
        # Planned as `planner.once` does: the anchors or prefix of one batch, not of a round.
        spec = replace(assignment.spec, gradient=mode, dropout=0.0, steps=1, fidelity=False)
        sizes = [micro for micro in planner.micro_batches(spec.batch_size) if micro <= assignment.micro_batch]
        for micro in sizes:
            this = replace(assignment, spec=spec, micro_batch=micro)
            try:
                predicted = self._predicted(checkpoint, this, adapter)
                break
            except BudgetError:
                if micro == sizes[-1]:
                    raise
        with self._trainer(checkpoint, this, adapter, predicted, progress) as trainer:
            found = gradients(trainer, batch, this.micro_batch)
        del trainer  # while it is bound no collector finds its 4-bit weights, and the next model comes beside them
        self.forget()
        return found

    def _fidelity(
        self, checkpoint: Checkpoint, assignment: Assignment, adapter: AdapterFiles, batch: data.Batch, progress: OnProgress
    ) -> Fidelity | None:
        """The assignment's gradient against the full model's on one batch, one after the other. None for a streamed one: that
        is what the others are compared with."""
        if assignment.spec.gradient is Gradient.STREAMED:
            return None
        signs = signs_of_life(progress, "fidelity")
        full, _ = self._gradient(checkpoint, assignment, Gradient.STREAMED, adapter, batch, signs)
        mine, _ = self._gradient(checkpoint, assignment, assignment.spec.gradient, adapter, batch, signs)
        return fidelity(mine, full, assignment.units, checkpoint.layers, assignment.spec)

    def fidelity(self, args: FidelityArgs, progress: OnProgress) -> FidelityResult:
        """Each mode's gradient against the full model's, on the first training batch, without an adapter."""
        spec = args.spec
        batch = next(iter(data.train_batches(self._dataset(spec.sequence_length), spec, self.tokenizer)))
        assignment = Assignment(TaskKey("local", 0, 0), args.units, (), (), spec, (), spec.batch_size, True)
        adapter = AdapterFiles(())
        with self._checkpoint() as checkpoint:
            signs = signs_of_life(progress, "fidelity")
            full, loss = self._gradient(checkpoint, assignment, Gradient.STREAMED, adapter, batch, signs)
            progress("probe", 1, len(args.modes) + 1)
            rows = []
            for done, mode in enumerate(args.modes):
                try:
                    mine, seen = self._gradient(checkpoint, assignment, mode, adapter, batch, signs)
                except BudgetError as error:
                    rows.append(ModeFidelity(mode, refused=str(error)))
                else:
                    found = fidelity(mine, full, args.units, checkpoint.layers, spec)
                    rows.append(ModeFidelity(mode, found.overall, found.units, seen))
                progress("probe", done + 2, len(args.modes) + 1)
        return FidelityResult(tuple(rows), loss)

    @contextlib.contextmanager
    def _checkpoint(self) -> Iterator[Checkpoint]:
        checkpoint = Checkpoint(Path(self.config.model))
        try:
            yield checkpoint
        finally:
            checkpoint.close()

    def _loader(self, checkpoint: Checkpoint) -> UnitLoader:
        store = Path(self.config.cache) / "nf4"
        return UnitLoader(checkpoint, self.config.device, self.dtype, self.config.quantization, store, self.config.fingerprint)

    def _setting(self, checkpoint: Checkpoint) -> memory.Setting:
        return memory.Setting.of(checkpoint, self.config.quantization, self.config.dtype, self.config.threads)

    def _dataset(self, window: int) -> data.Dataset:
        if window not in self._datasets:
            self._datasets[window] = data.load_dataset(self.config.data, self.tokenizer, window)
        return self._datasets[window]
