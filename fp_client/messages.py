"""What the daemon and its worker process say to each other: one JSON object a line. Torch-free.

Daemon to worker, first ``{"config": WorkerConfig}``, then tasks ``{"task": name, "args": {…}}``, one at a
time. Worker to daemon: ``{"ready": {…}}`` once, then for each task any number of
``{"progress": [phase, done, total]}`` and one ``{"result": {…}, "worn": bool}`` or ``{"error": class, "message": text}``.
A worn worker asks to be ended: the next task gets a fresh one.
End of the worker's input means that the daemon is gone, and ends the worker at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common.types import Assignment, Gradient, ProbeTask, Quantization, TrainSpec, UnitId, UpdateMetrics
from fp_client.data import DataSource
from fp_client.pace import Pace

OnProgress = Callable[[str, int, int], None]
"""A sign of life from a task: phase, done, total."""


@dataclass(frozen=True)
class WorkerConfig:
    """Everything that stays the same from task to task."""

    model: str
    """The model's directory (see `fp_client.models.resolve` for hub ids)."""
    fingerprint: str
    """The base weights' fingerprint: the key of the quantized units on disk."""
    cache: str
    """A directory of the device's own, for quantized units."""
    data: DataSource
    quantization: Quantization = Quantization.NONE
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    dtype: str = "float32"
    """Compute dtype: ``float32``, ``bfloat16`` (CUDA and recent CPUs)."""
    threads: int = 1
    budget_bytes: int = 0
    """What a task may hold above the warmed footprint; 0 for no bound."""


@dataclass(frozen=True)
class Ready:
    """The worker has started: `warmed_bytes` of main memory held before any task."""

    pid: int
    warmed_bytes: int
    device: str


@dataclass(frozen=True)
class AdapterFile:
    """The broadcast adapter of one layer, as a file the daemon has fetched and checked."""

    layer: int
    path: str


@dataclass(frozen=True)
class CheckArgs:
    """Task ``check``: is the data usable with this window?"""

    window: int


@dataclass(frozen=True)
class CheckResult:
    """Rows to train on (|D_n|), rows held out, and rows left out as too long."""

    samples: int
    heldout: int
    dropped: int


@dataclass(frozen=True)
class PaceArgs:
    """Task ``pace``: how fast is this device? Its result is a `fp_client.pace.Pace`."""

    spec: TrainSpec
    broadcast_rank: int
    rows: int
    """Rows inside a layer at once."""


@dataclass(frozen=True)
class ProbeArgs:
    """Task ``probe``; its result is a `ProbeReport`."""

    task: ProbeTask
    adapter: tuple[AdapterFile, ...]


@dataclass(frozen=True)
class FidelityArgs:
    """Task ``fidelity``: the gradients of these units on one training batch, in each of the modes."""

    spec: TrainSpec
    units: tuple[UnitId, ...]
    modes: tuple[Gradient, ...]


@dataclass(frozen=True)
class ModeFidelity:
    """One mode's cosine with the full model's gradient: over all, and of each unit in order; `loss` is the mean
    response-token loss that the mode sees. `refused`: why the budget holds no such gradient; then the rest is nothing."""

    mode: Gradient
    overall: float = 0.0
    units: tuple[float, ...] = ()
    loss: float = 0.0
    refused: str = ""


@dataclass(frozen=True)
class FidelityResult:
    """What task ``fidelity`` found; `loss` is the full model's."""

    modes: tuple[ModeFidelity, ...]
    loss: float


@dataclass(frozen=True)
class TrainArgs:
    """Task ``train``: the update goes to the file `out`; the result is a `TrainResult`."""

    assignment: Assignment
    adapter: tuple[AdapterFile, ...]
    out: str
    pace: Pace | None = None
    """What `pace` has measured on this device, for the predicted step time."""


@dataclass(frozen=True)
class TrainResult:
    """What was trained, and what it cost."""

    metrics: UpdateMetrics
