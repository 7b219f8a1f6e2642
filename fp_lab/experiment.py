"""An experiment file: one federation's data and model, and the rows (methods, overrides) to compare on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from common.config import Section, load
from common.errors import ConfigError
from common.types import NAME, Quantization, Start
from fp_client.config import Bytes
from fp_server.config import RunConfig
from fp_server.work import parse_run

TABLES = ("run", "lora", "train", "probe", "pruning", "limits")
"""The tables of a run file that an experiment and its rows may set."""
OWN = {"run": ("name", "seed", "rounds", "min_devices", "final_evaluation"), "train": ("sequence_length",)}
"""Keys of those tables that the experiment decides itself."""
Table = dict[str, Any]
Attack = Literal["sign-flip", "scale", "nan"]


class DataSection(Section):
    """``[data]``: where the examples come from, and which device has which."""

    sources: list[str] = Field(default_factory=list)
    """.json or .jsonl files in Alpaca form, or `datasets` ids; ``--data`` takes their place."""
    devices: PositiveInt = 20
    rows_per_device: PositiveInt = 500
    fewest_rows: PositiveInt | None = None
    """What the first device has; the others have ever more of them, each by the same factor, the last one `rows_per_device`."""
    held_out: PositiveInt = 96
    """Rows no device has: the full model's loss on them is what rows are judged by."""
    partition: Literal["iid", "verb", "source"] = "iid"
    """``verb`` and ``source``: a device has its own mixture of instruction verbs or of sources, from Dirichlet(alpha)."""
    alpha: PositiveFloat = 0.3
    """Concentration of the mixtures; the smaller, the more devices differ."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the partition; it's the same for every row and seed."""


class Overrides(Section):
    """The tables of a run file."""

    run: Table = Field(default_factory=dict)
    lora: Table = Field(default_factory=dict)
    train: Table = Field(default_factory=dict)
    probe: Table = Field(default_factory=dict)
    pruning: Table = Field(default_factory=dict)
    limits: Table = Field(default_factory=dict)


class Row(Overrides):
    """``[[row]]``: one method or setting. Tables override the experiment's, key by key."""

    name: str
    seeds: list[int] | None = Field(None, min_length=1)
    rounds: PositiveInt | None = None
    units: PositiveInt | None = None
    """Whole layers every device can hold, whatever the planner says; at most the planner's own where a budget is given."""
    budget: Bytes = 0
    """Memory budget of every device, for the planner's k; 0: no bound."""
    attackers: int = Field(0, ge=0)
    """How many devices, the first ones, spoil every update they have trained."""
    attack: Attack = "sign-flip"
    """The update turned round, made larger, or with a value that is no number."""
    strength: PositiveFloat = 1.0
    """By how much "sign-flip" and "scale" multiply it."""

    @field_validator("name")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if NAME.fullmatch(value) is None or len(value) > 48:
            raise ValueError("must be lower-case letters, digits, '.', '_' or '-', at most 48")
        return value

    @property
    def attacked(self) -> str:
        """Who does what, for results; empty when all are honest."""
        return f"{self.attackers} {self.attack} {self.strength:g}" if self.attackers else ""


class Experiment(Overrides):
    """An experiment file. Its tables hold for all rows; paths are relative to the working directory."""

    name: str = Field(min_length=1)
    model: Path
    """A checkpoint directory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    quantization: Quantization = Quantization.NONE
    threads: PositiveInt = 1
    window: int = Field(192, ge=8)
    """Tokens of an example at most, in training, probe and evaluation; longer responses are left out."""
    seeds: list[int] = Field([0], min_length=1)
    rounds: PositiveInt = 12
    evaluate_every: PositiveInt = 1
    """Rounds between evaluations; the first state and the last are always evaluated."""
    data: DataSection = DataSection()
    row: list[Row] = Field(min_length=1)

    @model_validator(mode="after")
    def _rows_differ(self) -> Experiment:
        names = [row.name for row in self.row]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two rows are called {min(twice)!r}")
        return self

    def seeds_of(self, row: Row) -> list[int]:
        """The seeds a row runs with."""
        return row.seeds if row.seeds is not None else self.seeds

    def find(self, name: str) -> Row:
        """A row by name. Raises ConfigError."""
        for row in self.row:
            if row.name == name:
                return row
        raise ConfigError(f"no row {name!r} in experiment {self.name!r} (there are: {', '.join(r.name for r in self.row)})")


def load_experiment(path: Path, data: list[str] | None = None, model: Path | None = None) -> Experiment:
    """An experiment file, with the command line's data and model in place of its own.

    Raises ConfigError naming every wrong key, of every row's run file too.
    """
    experiment = load(path, Experiment)
    if data:
        experiment = experiment.model_copy(update={"data": experiment.data.model_copy(update={"sources": data})})
    if model is not None:
        experiment = experiment.model_copy(update={"model": model})
    for row in experiment.row:
        for seed in experiment.seeds_of(row):
            run_of(experiment, row, seed)
    return experiment


def run_of(experiment: Experiment, row: Row, seed: int) -> tuple[RunConfig, str]:
    """The run of a row with a seed, and its run file's text. Raises ConfigError."""
    tables: dict[str, Table] = {}
    for table in TABLES:
        tables[table] = {**getattr(experiment, table), **getattr(row, table)}
        if taken := [key for key in OWN.get(table, ()) if key in tables[table]]:
            raise ConfigError(f"row {row.name!r}: {table}.{taken[0]} is the experiment's own; see `rounds`, `seeds` and `window`")
    tables["run"] |= {
        "name": f"{row.name}-s{seed}", "seed": seed, "rounds": row.rounds or experiment.rounds,
        "min_devices": experiment.data.devices, "final_evaluation": False,
    }  # fmt: skip
    tables["train"]["sequence_length"] = experiment.window
    tables["limits"].setdefault("outliers", "off")  # a comparison of methods is of the methods alone, as it was before the rule
    tables["model"] = {"name": experiment.model.name or "model", "path": str(experiment.model)}
    toml = to_toml(tables)
    config = parse_run(toml, f"row {row.name!r}")
    if config.train.step_seconds:
        raise ConfigError(
            f"row {row.name!r}: train.step_seconds: the lab's devices share this machine and measure no pace, so the limit would "
            "bound nothing; leave it out, and name the row's `train.gradient` and `units`"
        )
    if row.attackers > experiment.data.devices:
        raise ConfigError(f"row {row.name!r}: attackers: {row.attackers}, and there are {experiment.data.devices} devices")
    if row.attackers and config.lora.start is Start.GLOBAL:
        raise ConfigError(
            f'row {row.name!r}: attackers: with lora.start = "global" an update turned round would need twice the rank'
        )
    return config, toml


def to_toml(tables: dict[str, Table]) -> str:
    """Tables of plain values as TOML: numbers, strings and lists of them are written as in JSON."""
    lines: list[str] = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines.extend(f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items())
    return "\n".join(lines) + "\n"
