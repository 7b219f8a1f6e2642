"""What the device's owner allows a server to ask, ``policy.toml``. An absent file means the defaults below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from common.config import Section, load
from common.errors import PolicyError
from common.types import (
    Assignment,
    Factors,
    Gradient,
    PlanReport,
    ProbeReport,
    ProbeTask,
    RunSpec,
    Start,
    TrainSpec,
    UnitObject,
    UpdateMetrics,
)
from fp_client.config import Bytes

FILE = "policy.toml"


class Policy(Section):
    """Limits the daemon holds its server to; every `check_*` raises PolicyError naming key, limit and request."""

    models: tuple[str, ...] | None = None
    """Models that may be trained; absent means every model in client.toml."""
    max_steps: int = Field(default=1000, ge=1)
    """Optimizer steps a round."""
    max_sequence_length: int = Field(default=4096, ge=1)
    max_batch: int = Field(default=64, ge=1)
    """Rows a step, or of the probe."""
    max_positions: int = Field(default=8192, ge=2)
    """Token positions of a probe's similarity matrix."""
    max_rank: int = Field(default=256, ge=1)
    """LoRA rank, of the training and of the broadcast."""
    max_learning_rate: float = Field(default=1.0, gt=0)
    max_rounds: int = Field(default=10_000, ge=1)
    max_rounds_back: int = Field(default=1000, ge=0)
    """How far a run may go back, as it does when its server is restored from an older backup."""
    max_tasks_a_day: int = Field(default=20_000, ge=1)
    """Plans, probes and trainings begun in 24 hours, of all runs together."""
    max_fetch: Bytes = 4 << 30
    """Bytes of adapter objects a task may need."""
    max_upload: Bytes = 4 << 30
    """Bytes of updates sent a round, those sent again included; fewer layers are offered where more would not fit."""
    min_samples: int = Field(default=1, ge=1)
    """With fewer training examples the device stays out: an update would say too much of each."""
    gradients: tuple[Gradient, ...] = tuple(Gradient)
    """Modes that may be asked for. A run with "auto" gets one of them: what is not allowed here is not offered to it."""
    starts: tuple[Start, ...] = tuple(Start)
    factors: tuple[Factors, ...] = tuple(Factors)
    """Which LoRA factors may be trained; both are uploaded."""
    targets: tuple[str, ...] | None = None
    """Modules LoRA may be put on, in full or by their last part; absent means all."""
    upload_similarity: bool = True
    upload_loss: bool = True
    """False: reports carry no held-out loss (0 of 0 tokens), and updates neither losses nor fidelity."""

    def check_plan(self, spec: RunSpec) -> None:
        """May this device take part in such a run?"""
        if self.models is not None and spec.model not in self.models:
            allowed = ", ".join(self.models) or "none"
            raise PolicyError(f"{FILE}: models: {spec.model[:80]!r} is not among the allowed ({allowed})")
        _at_most("max_rounds", self.max_rounds, "rounds", spec.rounds)
        _at_most("max_rank", self.max_rank, "a broadcast rank of", spec.broadcast_rank)
        _at_most("max_positions", self.max_positions, "token positions", spec.probe.positions)
        if spec.similarity and not self.upload_similarity:
            raise PolicyError(
                f"{FILE}: upload_similarity is false, and without its similarity matrix this device can't be given layers in any "
                "round of this run"
            )
        self._check_train(spec.train)
        self._check_shape(spec.probe.batch_size, spec.probe.sequence_length)

    def bounded(self, spec: RunSpec) -> RunSpec:
        """The run as this device plans for it: with an update no larger than may be sent."""
        return replace(spec, update_bytes=min(spec.update_bytes or self.max_upload, self.max_upload))

    def offered(self, report: PlanReport) -> PlanReport:
        """A plan's report without the gradient modes that are not allowed. Raises PolicyError when none is left."""
        capacities = tuple(one for one in report.capacities if one.gradient in self.gradients)
        if report.capacities and not capacities:
            held = ", ".join(one.gradient for one in report.capacities)
            raise PolicyError(
                f"{FILE}: gradients: the budget holds {held}, this device allows {', '.join(self.gradients) or 'none'}; "
                "raise [budget] or allow another mode"
            )
        return replace(report, capacities=capacities)

    def check_samples(self, samples: int) -> None:
        """Does the device have enough training examples not to give single ones away?"""
        if samples < self.min_samples:
            raise PolicyError(
                f"{FILE}: min_samples: this device has {samples} training examples, its policy wants {self.min_samples}"
            )

    def check_probe(self, spec: RunSpec, task: ProbeTask) -> None:
        """May this be measured?"""
        # A round that only measures comes once after the last that trains.
        last = task.key.round == spec.rounds and not task.similarity
        _at_most("max_rounds", self.max_rounds, "rounds", task.key.round + (0 if last else 1))
        self._check_shape(task.spec.batch_size, task.spec.sequence_length)
        _at_most("max_positions", self.max_positions, "token positions", task.spec.positions)
        self._check_fetch(task.adapter)
        if task.similarity and not self.upload_similarity:
            raise PolicyError(f"{FILE}: upload_similarity is false, and the server asks for the similarity matrix")

    def tells(self, task: ProbeTask) -> bool:
        """Whether anything is left to tell of such a probe; where nothing is, it need not be measured."""
        return task.similarity or self.upload_loss

    def redact(self, report: ProbeReport) -> ProbeReport:
        """A probe's report without what must not be told."""
        return report if self.upload_loss else replace(report, loss=0.0, tokens=0)

    def redact_metrics(self, metrics: UpdateMetrics) -> UpdateMetrics:
        """An update's metrics without what must not be told."""
        return metrics if self.upload_loss else replace(metrics, loss_first=None, loss_last=None, fidelity=None, unit_fidelity=())

    def check_assignment(self, task: Assignment) -> None:
        """May this be trained?"""
        _at_most("max_rounds", self.max_rounds, "rounds", task.key.round + 1)
        self._check_train(task.spec)
        self._check_fetch(task.adapter)

    def check_upload(self, size: int) -> None:
        """May so many bytes of a round's update have been sent?"""
        _at_most("max_upload", self.max_upload, "bytes of updates:", size)

    def _check_fetch(self, adapter: tuple[UnitObject, ...]) -> None:
        _at_most("max_fetch", self.max_fetch, "bytes of adapter objects:", sum(item.ref.size for item in adapter))

    def _check_train(self, spec: TrainSpec) -> None:
        _at_most("max_steps", self.max_steps, "steps", spec.steps)
        _at_most("max_rank", self.max_rank, "a LoRA rank of", spec.rank)
        self._check_shape(spec.batch_size, spec.sequence_length)
        # A device trains in one of the modes that it has offered: "auto" asks for any of them.
        if spec.gradient is not Gradient.AUTO or not set(self.gradients) - {Gradient.AUTO}:
            _among("gradients", [one for one in self.gradients if one is not Gradient.AUTO], spec.gradient)
        _among("starts", self.starts, spec.start)
        _among("factors", self.factors, spec.train)
        _at_most("max_learning_rate", self.max_learning_rate, "a learning rate of", spec.learning_rate)
        for target in spec.targets if self.targets is not None else ():
            if not {target, target.rpartition(".")[2]} & set(self.targets or ()):
                _among("targets", self.targets or (), target)

    def _check_shape(self, batch: int, sequence: int) -> None:
        _at_most("max_batch", self.max_batch, "rows", batch)
        _at_most("max_sequence_length", self.max_sequence_length, "tokens a row", sequence)


def _at_most(key: str, limit: float, what: str, asked: float) -> None:
    if asked > limit:
        raise PolicyError(f"{FILE}: {key}: the server asks for {what} {asked}, this device allows {limit}")


def _among(key: str, allowed: Sequence[str], asked: str) -> None:
    if asked not in allowed:
        raise PolicyError(f"{FILE}: {key}: the server asks for {asked[:80]!r}, this device allows {', '.join(allowed) or 'none'}")


def load_policy(directory: Path) -> Policy:
    """``policy.toml`` of a device directory, or the defaults. Raises ConfigError naming file and key."""
    return load(directory / FILE, Policy) if (directory / FILE).exists() else Policy()
