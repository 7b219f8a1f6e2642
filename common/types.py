"""The values both sides speak of. Frozen, free of IO, free of protobuf.

Layers are 0-based everywhere in code; `UnitId.label` and `UnitId.parse` are the one place that
converts to the 1-based names a person reads (``7``, ``7M``, ``7N`` as in the paper's tables).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""What a device, run or operator may be called (`fullmatch`): safe as a file name and in a certificate."""


class Part(StrEnum):
    """Which part of a decoder layer a unit is (paper §3.3)."""

    LAYER = "layer"
    ATTENTION = "attention"
    FFN = "ffn"


class Gradient(StrEnum):
    """How a device makes its gradient."""

    SUBMODEL = "submodel"
    STITCHED = "stitched"
    STREAMED = "streamed"
    AUTO = "auto"


class Start(StrEnum):
    """Where a round's LoRA starts: a new adapter on W_0 + ΔW, or the top-r part of ΔW."""

    FRESH = "fresh"
    GLOBAL = "global"


class Estimator(StrEnum):
    """Backpropagation, or forward passes only (zeroth order)."""

    BACKPROP = "backprop"
    FORWARD = "forward"


class Factors(StrEnum):
    """Which LoRA factors are trained or uploaded."""

    A = "A"
    B = "B"
    BOTH = "both"


class Kernel(StrEnum):
    """The CKA kernel (paper, Appendix A)."""

    LINEAR = "linear"
    RBF = "rbf"


class Positions(StrEnum):
    """Which token positions the CKA sees: sinks and padding dropped with unit-norm vectors, or all raw."""

    CLEAN = "clean"
    RAW = "raw"


class Quantization(StrEnum):
    """How a device keeps the base weights in memory."""

    NONE = "none"
    NF4 = "nf4"


_SUFFIX = {Part.LAYER: "", Part.ATTENTION: "M", Part.FFN: "N"}
_PART = {suffix: part for part, suffix in _SUFFIX.items()}


@dataclass(frozen=True, order=True)
class UnitId:
    """One prunable unit of the GLOBAL model: a decoder layer, or one component of it."""

    layer: int
    part: Part = Part.LAYER

    @property
    def label(self) -> str:
        """The 1-based name a person reads, as in the paper's tables."""
        return f"{self.layer + 1}{_SUFFIX[self.part]}"

    @staticmethod
    def parse(label: str) -> UnitId:
        """The inverse of `label`. Raises ValueError on anything else."""
        match = re.fullmatch(r"([1-9][0-9]{0,5})([MN]?)", label)
        if match is None:
            raise ValueError(f"not a unit: {label!r} (expected for example 7, 7M or 7N)")
        return UnitId(int(match[1]) - 1, _PART[match[2]])


def layer_units(layers: int) -> tuple[UnitId, ...]:
    """The units of layer mode, in model order."""
    return tuple(UnitId(index) for index in range(layers))


def component_units(layers: int) -> tuple[UnitId, ...]:
    """The units of component mode, in model order: 1M, 1N, 2M, 2N … (paper §3.3)."""
    return tuple(UnitId(index, part) for index in range(layers) for part in (Part.ATTENTION, Part.FFN))


def model_units(part: Part, layers: int) -> tuple[UnitId, ...]:
    """The units of a model: its layers, or its components when `part` is anything but LAYER."""
    return layer_units(layers) if part is Part.LAYER else component_units(layers)


_MODULES = {Part.ATTENTION: "self_attn.", Part.FFN: "mlp."}


def unit_modules(unit: UnitId, modules: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a layer's module names that belong to a unit: all of them, attention's or the feed-forward's."""
    prefix = _MODULES.get(unit.part, "")
    return tuple(name for name in modules if name.startswith(prefix))


@dataclass(frozen=True)
class LoraBlock:
    """One module's LoRA factors. `a`: (r, d_in), `b`: (d_out, r), fp32. ΔW = scale · b @ a."""

    layer: int
    module: str
    a: FloatArray
    b: FloatArray


@dataclass(frozen=True)
class ModuleShape:
    """One linear module of a decoder layer, for example ``self_attn.q_proj``."""

    name: str
    d_out: int
    d_in: int


@dataclass(frozen=True)
class ModelManifest:
    """What the server knows of a base model: shapes and fingerprint, never a weight.

    `modules` are the 2-D weights of one decoder layer (the same in every layer), sorted by name.
    """

    name: str
    family: str
    layers: int
    hidden: int
    vocab: int
    modules: tuple[ModuleShape, ...]
    fingerprint: str

    def module(self, name: str) -> ModuleShape | None:
        """The module of that name, or None."""
        return next((m for m in self.modules if m.name == name), None)


@dataclass(frozen=True)
class ProbeSpec:
    """What the probe measures (paper §3.1 step 1, Eq. 1 and 4)."""

    part: Part = Part.LAYER
    """LAYER probes whole layers; anything else probes components (2L units)."""
    positions: int = 512
    kernel: Kernel = Kernel.LINEAR
    sample: Positions = Positions.CLEAN
    batch_size: int = 4
    sequence_length: int = 512
    seed: int = 0


@dataclass(frozen=True)
class TrainSpec:
    """Everything a device must know to train, whatever the method on the server is."""

    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Module names inside a layer, for example ``self_attn.q_proj``; sorted."""
    seed: int
    dropout: float = 0.0
    gradient: Gradient = Gradient.SUBMODEL
    estimator: Estimator = Estimator.BACKPROP
    start: Start = Start.FRESH
    train: Factors = Factors.BOTH
    upload: Factors = Factors.BOTH
    fidelity: bool = False
    """Whether the device measures, before it trains, its gradient's cosine with the full model's."""


@dataclass(frozen=True)
class RunSpec:
    """What a run asks of its devices; a device plans its memory from it."""

    run: str
    model: str
    fingerprint: str
    method: str
    part: Part
    train: TrainSpec
    probe: ProbeSpec
    broadcast_rank: int
    rounds: int
    step_seconds: float = 0.0
    """The longest a training step may take; 0: no limit."""
    update_bytes: int = 0
    """The most bytes an update may have; 0: no limit."""
    similarity: bool = True
    """Whether probes are asked for the similarity matrix; without, for the held-out loss alone."""


@dataclass(frozen=True)
class Capacity:
    """What one gradient mode can hold on a device. Bytes are of the worker above its warmed footprint."""

    gradient: Gradient
    units: int
    micro_batch: int
    checkpointing: bool
    peak_bytes: int
    step_seconds: float = 0.0
    """Predicted seconds of a training step with that many units, with its share of what a round does once; 0 where it was not
    predicted."""


@dataclass(frozen=True)
class PlanReport:
    """A device's answer to a plan request. `capacities` empty means refused, and `refusal` says why."""

    run: str
    samples: int
    """|D_n|: training examples after the held-out split."""
    fingerprint: str
    capacities: tuple[Capacity, ...]
    unit_bytes: tuple[int, ...]
    """Bytes each unit of the model costs resident, in unit order."""
    smallest_budget: int
    refusal: str = ""
    budget_bytes: int = 0

    def capacity(self, gradient: Gradient) -> Capacity | None:
        """The capacity in that mode, or None when it can't be held."""
        return next((c for c in self.capacities if c.gradient == gradient), None)


@dataclass(frozen=True)
class ObjectRef:
    """A content-addressed object."""

    digest: str
    """sha256, 64 hex digits."""
    size: int


@dataclass(frozen=True)
class UnitObject:
    """The broadcast adapter of one layer."""

    layer: int
    ref: ObjectRef


@dataclass(frozen=True)
class TaskKey:
    """Which piece of work: stable across reconnects and restarts."""

    run: str
    round: int
    """0-based; a person reads it 1-based."""
    attempt: int


@dataclass(frozen=True)
class ProbeTask:
    """Measure the full model (W_0 + broadcast ΔW). `similarity` False asks for the loss only."""

    key: TaskKey
    spec: ProbeSpec
    adapter: tuple[UnitObject, ...]
    similarity: bool = True


@dataclass(frozen=True)
class ProbeReport:
    """A probe's result. `similarity`: (U, U) CKA between unit outputs; `in_out`: (U,) CKA of each unit's
    input with its output (s_l of Eq. 3); `loss`: full-model mean token loss on the held-out split."""

    key: TaskKey
    similarity: FloatArray
    in_out: FloatArray
    loss: float
    tokens: int
    peak_bytes: int
    seconds: float

    @classmethod
    def of_nothing(cls, key: TaskKey) -> Self:
        """Of a device that measured nothing, because it may tell nothing of it."""
        return cls(key, np.zeros((0, 0), np.float32), np.zeros(0, np.float32), 0.0, 0, 0, 0.0)


@dataclass(frozen=True)
class Assignment:
    """What one device does in one round (paper §3.1 step 4)."""

    key: TaskKey
    units: tuple[UnitId, ...]
    groups: tuple[tuple[UnitId, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]
    spec: TrainSpec
    adapter: tuple[UnitObject, ...]
    micro_batch: int
    checkpointing: bool
    redraws: int = 0
    reductions: int = 0


@dataclass(frozen=True)
class UpdateMetrics:
    """What a device says of its training; never used for weights or scaling."""

    loss_first: float | None = None
    loss_last: float | None = None
    """The submodel's loss on the first and the last step's rows; None: the device does not tell."""
    tokens_per_second: float = 0.0
    predicted_peak_bytes: int = 0
    measured_peak_bytes: int = 0
    seconds: float = 0.0
    predicted_step_seconds: float = 0.0
    step_seconds: float = 0.0
    """Median of the measured steps."""
    fidelity: float | None = None
    """Cosine between this device's LoRA gradient and the full model's on the first batch; None: not measured."""
    unit_fidelity: tuple[float, ...] = ()
    """The same of each assigned unit, in order."""


@dataclass(frozen=True)
class UpdateReady:
    """An update object the device wants to push for `key`."""

    key: TaskKey
    ref: ObjectRef
    metrics: UpdateMetrics = field(default_factory=UpdateMetrics)


@dataclass(frozen=True)
class Progress:
    """A sign of life from a task: `done` of `total` in `phase` (rows, layers or bytes); `total` 0: unknown."""

    key: TaskKey
    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class TaskFailed:
    """A task that the device could not do. `error` is a class name of `common.errors`."""

    key: TaskKey
    error: str
    message: str
