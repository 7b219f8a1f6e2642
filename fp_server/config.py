"""The server's two files: ``server.toml`` of a data directory, and a run file."""

from __future__ import annotations

import ipaddress
import math
import re
from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from common.config import Section
from common.errors import ConfigError
from common.types import (
    NAME,
    Factors,
    Gradient,
    Kernel,
    ModelManifest,
    Part,
    Positions,
    ProbeSpec,
    RunSpec,
    Start,
    TrainSpec,
    UnitId,
    model_units,
    unit_modules,
)
from fp_server.limits import ServerLimits
from fp_server.methods import METHODS

LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
"""A part of a host name between dots."""
COMPONENTS = Part.ATTENTION
"""What `RunSpec.part` and `ProbeSpec.part` hold in component mode: anything but LAYER means components there."""


class ServerConfig(Section):
    """``server.toml``, written by ``fp-server init``."""

    names: list[str] = Field(min_length=1)
    """Host names and addresses the certificate carries; the first one goes into join tokens."""
    listen: str = "0.0.0.0"
    """Address to listen on."""
    port: int = Field(7443, ge=0, le=65535)
    """The main port (mTLS): sessions, objects, operators, health."""
    enroll_port: int = Field(7444, ge=0, le=65535)
    """The enrollment port (server-authenticated TLS)."""
    certificate_days: PositiveInt = 90
    """How long device and operator certificates are valid."""
    max_samples: PositiveInt = 1_000_000
    """Cap on |D_n|, so that no device buys weight by claiming samples; a run's own may be lower."""
    max_update_norm: PositiveFloat | None = None
    """Cap on every run's ``limits.max_update_norm``."""
    grace_seconds: float = Field(8.0, ge=1)
    """The server ends so soon after SIGTERM; pushes and an aggregation under way may use all but the last second of it."""
    limits: ServerLimits = ServerLimits()
    """What peers may make large or slow."""

    @field_validator("names")
    @classmethod
    def _hosts(cls, value: list[str]) -> list[str]:
        for name in value:
            try:
                ipaddress.ip_address(name)
            except ValueError:
                if len(name) > 253 or not all(LABEL.fullmatch(label) for label in name.split(".")):
                    raise ValueError(f"{name!r} is no host name or address (no scheme, no port, no spaces)") from None
        return value

    @model_validator(mode="after")
    def _two_ports(self) -> Self:
        if self.port == self.enroll_port != 0:
            raise ValueError(f"port and enroll_port are both {self.port}; they must differ")
        return self


class Evaluation(StrEnum):
    """``run.evaluation``: whose held-out data the first and the last loss of a run are measured on."""

    DRAWN = "drawn"
    """The devices drawn for the first round, and those drawn for the last: cheap, but other devices with other data."""
    ALL = "all"
    """Every able device before the first round and after the last: the two compare like with like."""


class RunSection(Section):
    """``[run]``."""

    name: str
    method: str = "fedpruner"
    rounds: int = Field(ge=1, le=1_000_000)
    seed: int = Field(0, ge=0, lt=2**32)
    min_devices: PositiveInt = 2
    """A round opens when this many able devices are connected."""
    devices_per_round: float = Field(0.1, gt=0)
    """A fraction of the roster up to 1.0 (0.1: the paper's), or a whole number from 2 on."""
    quorum: float = Field(1.0, gt=0, le=1)
    """The round closes when this fraction of the drawn devices has delivered."""
    min_updates: PositiveInt = 1
    """Fewer accepted updates than this: the round is drawn again."""
    max_attempts: PositiveInt = 3
    """The run pauses when a round has failed this often."""
    progress_timeout_seconds: PositiveFloat = 600.0
    """A device that makes no progress for this long, or falls so far behind the minimum rate, is out of the round."""
    min_bytes_per_second: float = Field(1024.0, ge=0)
    """The least a device must fetch or push; 0: any progress counts."""
    min_steps_per_hour: float = Field(0.0, ge=0)
    """The least it must train; 0: so many that the task is done within `round_limit_seconds`."""
    round_limit_seconds: PositiveFloat = 86_400.0
    """No round lasts longer than this."""
    final_evaluation: bool = True
    """Whether the loss is measured once more at the end."""
    evaluation: Evaluation = Evaluation.DRAWN
    """Who measures the full model's held-out loss besides the devices drawn for a round."""

    @field_validator("name")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if NAME.fullmatch(value) is None:
            raise ValueError("must be lower-case letters, digits, '.', '_' or '-', at most 63")
        return value

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"no such method (there are: {', '.join(sorted(METHODS))})")
        return value

    @field_validator("devices_per_round", mode="before")
    @classmethod
    def _not_one(cls, value: object) -> object:
        if type(value) is int and value == 1:
            raise ValueError("1 may mean one device or all: write 1.0 for all of them, or a fraction such as 0.1")
        return value

    @field_validator("devices_per_round")
    @classmethod
    def _fraction_or_count(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("must be a fraction up to 1.0 or a whole number")
        return value


class ModelSection(Section):
    """``[model]``: the name devices know it by, and where the server learns its shapes and fingerprint."""

    name: str = Field(min_length=1, max_length=200)
    path: Path | None = None
    """A checkpoint directory on the machine that runs ``fp-server start``."""
    manifest: Path | None = None
    """Instead: a manifest made by ``fp-client manifest`` where the weights are."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.manifest is None):
            raise ValueError("give either path (a checkpoint directory) or manifest (made by `fp-client manifest`)")
        return self


class LoraSection(Section):
    """``[lora]``."""

    rank: int = Field(16, ge=1, le=1024)
    alpha: PositiveFloat = 32.0
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all"] | list[str] = "all"
    """"all" linear modules of a layer, or names such as "q_proj"."""
    start: Start = Start.FRESH
    broadcast_rank: int = Field(64, ge=1, le=4096)
    """Largest rank a module of the broadcast adapter has."""
    train: Factors = Factors.BOTH

    @field_validator("targets")
    @classmethod
    def _some(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError('name at least one module, or "all"')
        return value

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.start is Start.FRESH and self.train is Factors.A:
            raise ValueError('train = "A" with start = "fresh" changes nothing: B stays 0; use start = "global" or train = "B"')
        return self


class TrainSection(Section):
    """``[train]``."""

    gradient: Gradient = Gradient.AUTO
    step_seconds: float = Field(0.0, ge=0)
    """The longest a training step may take; devices plan for it, and "auto" chooses by it. 0: no limit."""
    fidelity: bool = False
    """Whether devices measure their gradient's cosine with the full model's before they train."""
    steps: int = Field(10, ge=1, lt=2**31)
    batch_size: int = Field(16, ge=1, lt=2**31)
    sequence_length: int = Field(512, ge=8, lt=2**31)
    learning_rate: PositiveFloat = 1e-4
    final_learning_rate: float = Field(5e-6, ge=0)


class ProbeSection(Section):
    """``[probe]``."""

    positions: int = Field(512, ge=8, le=8192)
    kernel: Kernel = Kernel.LINEAR
    sample: Positions = Positions.CLEAN
    batch_size: int = Field(4, ge=1, lt=2**31)


class PruningSection(Section):
    """``[pruning]``."""

    units: Literal["layer", "component"] = "layer"
    """Whole layers, or attention and feed-forward apart (FedPruner+, paper §3.3)."""
    eigenvectors: Literal["k", "k-1"] = "k"
    group_sizes: Literal["free", "even"] = "even"
    """Even: no group has more than ⌈U/k⌉ units (ours; docs/adr/0010). Free: the paper's."""

    @property
    def part(self) -> Part:
        """How specs say it: `COMPONENTS` for component mode."""
        return Part.LAYER if self.units == "layer" else COMPONENTS


class LimitSection(Section):
    """``[limits]``."""

    min_holders: PositiveInt = 1
    """A unit with fewer holders in a round keeps what it had (docs/algorithm.md, privacy)."""
    max_update_norm: PositiveFloat | None = None
    """Largest Frobenius norm a module's (α/r)·B·A may have, less what the device started with; none by default."""
    max_samples: PositiveInt | None = None
    """Cap on |D_n| in this run, beside the server's."""
    outliers: Literal["off", "report", "reject"] = "reject"
    """Whether a round's updates are compared with each other, and what stands out is told of, or left out."""
    max_norm_ratio: float = Field(5.0, gt=1)
    """How many times as far as the other devices' (median) a module of an update may have moved, by that comparison."""
    max_update_ratio: float = Field(2.5, gt=1)
    """The same of all its modules: the root mean square."""
    update_bytes: int = Field(0, ge=0, lt=2**63)
    """The most bytes of tensors an update may have; 0: no limit."""


class RunConfig(Section):
    """A run file."""

    run: RunSection
    model: ModelSection
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    probe: ProbeSection = ProbeSection()
    pruning: PruningSection = PruningSection()
    limits: LimitSection = LimitSection()

    def targets(self, manifest: ModelManifest) -> tuple[str, ...]:
        """The full names of the adapted modules, sorted. Raises ConfigError for a name that is in no layer."""
        if self.lora.targets == "all":
            return tuple(m.name for m in manifest.modules)
        chosen: set[str] = set()
        for target in self.lora.targets:
            found = {m.name for m in manifest.modules if m.name == target or m.name.endswith("." + target)}
            if not found:
                known = ", ".join(m.name for m in manifest.modules)
                raise ConfigError(f"lora.targets: the model has no module {target!r} (it has: {known})")
            chosen |= found
        return tuple(sorted(chosen))

    def units(self, layers: int) -> tuple[UnitId, ...]:
        """The units of a model of so many layers, in model order: what FDLO groups and a device's capacity counts."""
        return model_units(self.pruning.part, layers)

    def check(self, manifest: ModelManifest) -> None:
        """What a new run must be able to do, on this model. Raises ConfigError; runs that are there already are not asked."""
        if self.drawn(self.needed) < self.run.min_updates:
            raise ConfigError(
                f"run.min_updates: {self.run.min_updates} updates can't come of {self.run.devices_per_round:g} devices a round "
                "(run.devices_per_round)"
            )
        targets = self.targets(manifest)
        for unit in self.units(1):
            if not unit_modules(unit, targets):
                known = ", ".join(unit_modules(unit, tuple(m.name for m in manifest.modules)))
                raise ConfigError(
                    f'lora.targets: with pruning.units = "component" a device may get {unit.part} parts alone, '
                    f"and none of their modules is named (there are: {known or 'none'})"
                )
        if self.units_by_update(manifest) == 0:
            layer = self.upload_bytes(UnitId(0), manifest)
            raise ConfigError(f"limits.update_bytes: {self.limits.update_bytes} holds no layer: one takes {layer} bytes")

    def upload_bytes(self, unit: UnitId, manifest: ModelManifest) -> int:
        """Bytes of the tensors that an update has of one unit."""
        sizes = {m.name: m.d_in + m.d_out for m in manifest.modules}
        return 4 * self.lora.rank * sum(sizes[name] for name in unit_modules(unit, self.targets(manifest)))

    def units_by_update(self, manifest: ModelManifest) -> int | None:
        """How many units `limits.update_bytes` allows, two for each whole layer in component mode; None: no limit."""
        if not self.limits.update_bytes:
            return None
        return self.limits.update_bytes // self.upload_bytes(UnitId(0), manifest) * len(self.units(1))

    def learning_rate(self, round_index: int) -> float:
        """Cosine over the rounds, constant within one (paper, Appendix E). `round_index` is 0-based."""
        last = self.run.rounds - 1
        share = round_index / last if last else 0.0
        low, high = self.train.final_learning_rate, self.train.learning_rate
        return low + (high - low) * 0.5 * (1 + math.cos(math.pi * share))

    def drawn(self, roster: int) -> int:
        """How many of a roster's devices take part in a round."""
        asked = self.run.devices_per_round
        count = round(asked * roster) if asked <= 1 else int(asked)
        return max(1, min(roster, count))

    @property
    def needed(self) -> int:
        """The smallest roster a round opens with: `min_devices`, and of which so many are drawn that `min_updates` may come."""
        run = self.run
        if self.drawn(run.min_devices) >= run.min_updates:
            return run.min_devices
        share = min(1.0, run.devices_per_round)  # above 1.0 it is a number of devices
        least = math.floor(min(1e18, (run.min_updates - 0.5) / share))
        roster = max(run.min_devices, least)
        while self.drawn(roster) < run.min_updates and roster < least + 3:
            roster += 1
        return roster

    def train_spec(self, manifest: ModelManifest, learning_rate: float, seed: int) -> TrainSpec:
        """What a device trains by."""
        return TrainSpec(
            steps=self.train.steps, batch_size=self.train.batch_size, sequence_length=self.train.sequence_length,
            learning_rate=learning_rate, rank=self.lora.rank, alpha=self.lora.alpha, targets=self.targets(manifest),
            seed=seed, dropout=self.lora.dropout, gradient=self.train.gradient, start=self.lora.start,
            train=self.lora.train, fidelity=self.train.fidelity,
        )  # fmt: skip

    def probe_spec(self, seed: int) -> ProbeSpec:
        """What a device measures."""
        return ProbeSpec(
            part=self.pruning.part, positions=self.probe.positions, kernel=self.probe.kernel, sample=self.probe.sample,
            batch_size=self.probe.batch_size, sequence_length=self.train.sequence_length, seed=seed,
        )  # fmt: skip

    def run_spec(self, manifest: ModelManifest) -> RunSpec:
        """What devices plan their memory from."""
        return RunSpec(
            run=self.run.name, model=self.model.name, fingerprint=manifest.fingerprint, method=self.run.method,
            part=self.pruning.part, train=self.train_spec(manifest, self.train.learning_rate, 0),
            probe=self.probe_spec(0), broadcast_rank=self.lora.broadcast_rank, rounds=self.run.rounds,
            step_seconds=self.train.step_seconds, update_bytes=self.limits.update_bytes,
            similarity=METHODS[self.run.method].probes,
        )  # fmt: skip
