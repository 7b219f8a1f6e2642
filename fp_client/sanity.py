"""What no honest server asks, whatever the device's owner allows: each refusal names the field and what came in it.

A run's spec must make sense by itself. A task must be of the run it names: the device planned its memory for that, so of all
the numbers in it only seeds, the learning rate and (for "auto") the gradient mode may be others than the plan's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from common.errors import ProtocolError
from common.types import (
    Assignment,
    Estimator,
    Factors,
    Gradient,
    Part,
    PlanReport,
    ProbeSpec,
    ProbeTask,
    RunSpec,
    TaskKey,
    TrainSpec,
    UnitId,
)

TARGETS = 64
"""More modules than a layer of any model has."""
LARGEST_ALPHA = 1e6
_MODULE = re.compile(r"[a-z][a-z0-9_]{0,63}(?:\.[a-z0-9_]{1,64}){0,4}")


def check_run(spec: RunSpec) -> None:
    """Could there be such a run? Raises ProtocolError."""
    _at_least("rounds", spec.rounds, 1)
    _at_least("broadcast_rank", spec.broadcast_rank, 1)
    _demand(spec.step_seconds >= 0, "step_seconds", spec.step_seconds, "it can't be negative")
    _check_train(spec.train)
    _check_probe(spec.probe)
    _demand((spec.part is Part.LAYER) == (spec.probe.part is Part.LAYER), "probe.part", spec.probe.part, "not the run's")


def _check_train(spec: TrainSpec) -> None:
    for name in ("steps", "batch_size", "rank"):
        _at_least(f"train.{name}", getattr(spec, name), 1)
    _at_least("train.sequence_length", spec.sequence_length, 2)
    _check_rate(spec.learning_rate)
    _demand(0 < spec.alpha <= LARGEST_ALPHA, "train.alpha", spec.alpha, f"it must be above 0 and at most {LARGEST_ALPHA:g}")
    _demand(0 <= spec.dropout < 1, "train.dropout", spec.dropout, "it must be from 0 on and below 1")
    _demand(1 <= len(spec.targets) <= TARGETS, "train.targets", f"{len(spec.targets)} modules", f"it must be 1 to {TARGETS}")
    for target in spec.targets:
        _demand(_MODULE.fullmatch(target) is not None, "train.targets", target, "not a module's name")
    _demand(list(spec.targets) == sorted(set(spec.targets)), "train.targets", spec.targets, "not sorted, or one is named twice")
    _demand(spec.estimator is Estimator.BACKPROP, "train.estimator", spec.estimator, "this client only knows backprop")
    _demand(spec.upload is Factors.BOTH, "train.upload", spec.upload, "this client uploads both factors or nothing")


def _check_rate(rate: float) -> None:
    _demand(math.isfinite(rate) and rate >= 0, "train.learning_rate", rate, "it can't be negative")


def _check_probe(spec: ProbeSpec) -> None:
    _at_least("probe.positions", spec.positions, 2)
    _at_least("probe.batch_size", spec.batch_size, 1)
    _at_least("probe.sequence_length", spec.sequence_length, 2)


def check_probe(spec: RunSpec, task: ProbeTask, report: PlanReport | None) -> None:
    """Is this a probe of that run? `report`: what the device said it can hold, where it is remembered. Raises ProtocolError."""
    _check_key(spec, task.key, evaluation=not task.similarity)
    _same("probe", replace(spec.probe, seed=task.spec.seed), task.spec)
    _demand(spec.similarity or not task.similarity, "similarity", True, "the run said it would not ask for it")
    _inside("adapter", [UnitId(item.layer) for item in task.adapter], report, spec.part is Part.LAYER)


def check_assignment(spec: RunSpec, task: Assignment, report: PlanReport | None) -> None:
    """Is this an assignment of that run? `report` as for `check_probe`. Raises ProtocolError."""
    _check_key(spec, task.key, evaluation=False)
    _check_rate(task.spec.learning_rate)
    asked = replace(spec.train, seed=task.spec.seed, learning_rate=task.spec.learning_rate)
    if spec.train.gradient is Gradient.AUTO:
        _demand(task.spec.gradient is not Gradient.AUTO, "train.gradient", "auto", "a task must name one mode")
        asked = replace(asked, gradient=task.spec.gradient)
    _same("train", asked, task.spec)
    _demand(task.micro_batch <= task.spec.batch_size, "micro_batch", task.micro_batch, f"a batch has {task.spec.batch_size} rows")
    _check_units(spec, task, report)
    _inside("adapter", [UnitId(item.layer) for item in task.adapter], report, spec.part is Part.LAYER)


def _check_units(spec: RunSpec, task: Assignment, report: PlanReport | None) -> None:
    whole = spec.part is Part.LAYER
    kind = "the run's units are " + ("layers" if whole else "components")
    for unit in task.units:
        _demand((unit.part is Part.LAYER) == whole, "units", unit.label, kind)
    if len(task.groups) != len(task.probabilities):
        raise ProtocolError(f"groups: {len(task.groups)} groups and {len(task.probabilities)} probability vectors")
    for group, probabilities in zip(task.groups, task.probabilities, strict=True):
        _demand(len(group) == len(probabilities), "groups", f"{len(group)} units", f"with {len(probabilities)} probabilities")
        _demand(all(0 <= p <= 1.000001 for p in probabilities), "groups", "a probability", "it must be from 0 to 1")
    grouped = [unit for group in task.groups for unit in group]
    _demand(len(grouped) == len(set(grouped)), "groups", f"{len(grouped)} units", "one is in two groups")
    _inside("units", task.units, report, whole)
    _inside("groups", grouped, report, whole)
    if report is None:
        return
    capacity = report.capacity(task.spec.gradient)
    _demand(capacity is not None, "train.gradient", task.spec.gradient, "this device did not offer that mode")
    if capacity is not None:
        _demand(len(task.units) <= capacity.units, "units", len(task.units), f"this device said it can hold {capacity.units}")


def _inside(field: str, units: Sequence[UnitId], report: PlanReport | None, whole: bool) -> None:
    if report is None:  # the worker looks at the model itself
        return
    layers = len(report.unit_bytes) // (1 if whole else 2)
    for unit in units:
        _demand(unit.layer < layers, field, unit.label, f"the model has {layers} layers")


def _check_key(spec: RunSpec, key: TaskKey, evaluation: bool) -> None:
    last = spec.rounds + (1 if evaluation else 0)  # a round that only measures comes once after the last that trains
    _demand(key.round < last, "round", key.round + 1, f"the run has {spec.rounds}")


def _same(what: str, planned: object, asked: object) -> None:
    for name, value in vars(planned).items():
        if (other := getattr(asked, name)) != value:
            raise ProtocolError(f"{what}.{name}: the task asks for {str(other)[:80]}, its run for {str(value)[:80]}")


def _at_least(field: str, value: int, least: int) -> None:
    _demand(value >= least, field, value, f"it must be at least {least}")


def _demand(holds: bool, field: str, value: object, why: str) -> None:
    if not holds:
        said = str(value) if isinstance(value, int | float) else repr(str(value)[:80])
        raise ProtocolError(f"{field}: the server asks for {said}; {why}")
