"""What a device can hold within its budget in each gradient mode, and how it trains an assignment. Torch-free.

From the model's config alone (`fp_client.memory`, `fp_client.memory_stream` have the formulas). More units first; then larger
micro-batches; then what only saves time, as far as it costs neither: `fp_client.fitting` decides that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.errors import BudgetError
from common.types import Capacity, Gradient, Part, ProbeSpec, TrainSpec, UnitId, model_units
from fp_client.draws import disk_of, least, most_gaps, once, seconds_of, worst_draws
from fp_client.fitting import Fit, Problem, fit
from fp_client.memory import (
    MIB,
    MICRO_ROWS,
    PASS_ROWS,
    Estimate,
    Held,
    Rows,
    Setting,
    StreamPlan,
    lora_bytes,
    probe_peak,
    unit_bytes,
)
from fp_client.memory_stream import spilled
from fp_client.pace import Pace
from fp_client.shapes import Shape, shape_of
from fp_client.units import gaps, keep

MODES = (Gradient.SUBMODEL, Gradient.STITCHED, Gradient.STREAMED)


@dataclass(frozen=True)
class ModePlan:
    """The best plan of one gradient mode. `units` counts components in component mode, two for each whole layer."""

    gradient: Gradient
    units: int
    micro_batch: int
    checkpointing: bool
    stream: StreamPlan
    train: Estimate
    peak_bytes: int
    """The larger of training's and the probe's."""
    disk_bytes: int = 0
    """Activations on disk at their fullest, below the cache directory."""
    step_seconds: float = 0.0
    """A step, with its share of `prepare_seconds`: what a run's limit is held against."""
    prepare_seconds: float = 0.0
    """Once a round, before the first step. Both 0 where the device's pace is not known."""

    @property
    def capacity(self) -> Capacity:
        """The plan as a device announces it."""
        return Capacity(
            self.gradient, self.units, self.micro_batch, self.checkpointing, self.peak_bytes, round(self.step_seconds, 4)
        )


@dataclass(frozen=True)
class Plan:
    """A device's plan: the modes that the run asks for and the budget holds. `smallest_budget` holds one unit in one of them."""

    modes: tuple[ModePlan, ...]
    probe: Estimate
    probe_rows: Rows
    unit_bytes: tuple[int, ...]
    smallest_budget: int
    smallest: tuple[tuple[Gradient, int], ...] = ()
    """The smallest budget of each mode asked for."""

    @property
    def capacities(self) -> tuple[Capacity, ...]:
        """As a device announces them."""
        return tuple(mode.capacity for mode in self.modes)

    def mode(self, gradient: Gradient) -> ModePlan | None:
        """The plan of one mode, or None where it does not fit."""
        return next((mode for mode in self.modes if mode.gradient is gradient), None)


def plan(
    config: Mapping[str, Any],
    setting: Setting,
    spec: TrainSpec,
    probe: ProbeSpec,
    broadcast_rank: int,
    budget_bytes: int,
    heldout_rows: int = 64,
    part: Part = Part.LAYER,
    limits: Limits | None = None,
    pace: Pace | None = None,
) -> Plan:
    """The best plans within `budget_bytes` (0: no bound) for a model's config.json, in the modes of `spec.gradient`.

    `broadcast_rank`: the largest rank of ΔW that the server will send, in every unit and target. `part`: what a unit is.
    `pace`: what the device measured; without it no step time is predicted, and `limits.step_seconds` bounds nothing.
    Raises BudgetError with the smallest budget that would do; ProtocolError for targets the model does not have.
    """
    shape, limits = shape_of(config), limits or Limits()
    adapter = shape.factors(spec.targets, broadcast_rank) * 4
    least_probe = probe_peak(shape, setting, probe, heldout_rows, adapter, Rows(1, probe.batch_size))
    wanted = [mode for mode in MODES if spec.gradient in (mode, Gradient.AUTO)]
    problems = {mode: Problem(shape, setting, replace(spec, gradient=mode), broadcast_rank) for mode in wanted}
    least_of = {mode: least(problem, worst_draws(problem, 1, part), 1) for mode, problem in problems.items()}
    smallest = tuple((mode, max(least_probe.peak, one.peak)) for mode, one in least_of.items())
    floor = min(size for _, size in smallest)
    if 0 < budget_bytes < floor:
        cheapest = min(least_of.values(), key=lambda one: one.peak)
        what = cheapest if cheapest.peak >= least_probe.peak else least_probe
        table = ", ".join(f"{name} {_mib(size)}" for name, size in what.rows if size)
        raise BudgetError(
            f"the budget of {_mib(budget_bytes)} is too small: the smallest that would do is {_mib(floor)} "
            f"({what.moment}: {table}); raise [budget], or use nf4, a shorter window or a smaller batch",
            floor,
        )
    rows = probe_rows(shape, setting, probe, heldout_rows, adapter, budget_bytes)
    probed = probe_peak(shape, setting, probe, heldout_rows, adapter, rows)
    held = [mode for mode, size in smallest if not budget_bytes or size <= budget_bytes]
    best = [_best(problems[mode], budget_bytes, part, limits, pace, probed.peak) for mode in held]
    modes = [mode for mode in best if not limits.disk_bytes or mode.disk_bytes <= limits.disk_bytes]
    if not modes:
        need = min(mode.disk_bytes for mode in best)
        raise BudgetError(
            f"within the budget of {_mib(budget_bytes)} one unit leaves {_mib(need)} of activations to the disk, cache.max_spill "
            f"allows {_mib(limits.disk_bytes)}; raise [budget] or cache.max_spill, or use smaller batches or fewer steps",
            floor,
        )
    each = {one: unit_bytes(shape, setting, spec, broadcast_rank, one) for one in Part}
    sizes = tuple(each[unit.part] for unit in model_units(part, shape.layers))
    return Plan(tuple(modes), probed, rows, sizes, floor, smallest)


@dataclass(frozen=True)
class Limits:
    """What a run allows a device besides memory (`RunSpec`), and what its owner does; 0: no limit."""

    update_bytes: int = 0
    step_seconds: float = 0.0
    """A step, with its share of what a round does once."""
    disk_bytes: int = 0
    """Activations on disk (`cache.max_spill`)."""


def _best(problem: Problem, budget_bytes: int, part: Part, limits: Limits, pace: Pace | None, probe_bytes: int) -> ModePlan:
    """The most units that memory and limits allow, and the fastest way to train them. One unit fits the memory.

    Where not even one unit is within `limits`' seconds or disk, one unit is planned: nothing is nearer to it.
    """
    shape, spec = problem.shape, problem.spec
    most = shape.layers
    if limits.update_bytes:
        most = max(1, min(most, limits.update_bytes // lora_bytes(shape, spec)))

    def planned(layers: int) -> _Planned | None:
        draws = worst_draws(problem, layers, part)
        rows = micro_batches(spec.batch_size)
        if budget_bytes:  # every draw's need counts, and fidelity's, and they grow with the micro-batch
            rows = tuple(micro for micro in rows if least(problem, draws, micro).peak <= budget_bytes)
        fits = [fit(problem, held, most_gaps(shape, held), 0, rows, budget_bytes) for held in draws]
        if not fits or any(one is None for one in fits):
            return None
        found, held = max(
            ((one, held) for one, held in zip(fits, draws, strict=True) if one is not None),
            key=lambda each: each[0].estimate.peak,
        )
        gaps = most_gaps(shape, held)
        seconds, prepare = seconds_of(problem, pace, held, found, 0, gaps)
        return _Planned(found, seconds + prepare / spec.steps, prepare, disk_of(problem, held, gaps, budget_bytes, found))

    def allowed(one: _Planned) -> bool:
        slow = limits.step_seconds and one.seconds > limits.step_seconds
        return not slow and not (limits.disk_bytes and one.disk > limits.disk_bytes)

    for layers in range(most, 0, -1):
        result = planned(layers)
        if result is not None and (layers == 1 or allowed(result)):
            break
    assert result is not None, "one unit fits the budget"
    found = result.fit
    return ModePlan(
        spec.gradient, layers * len(model_units(part, 1)), found.micro_batch, found.checkpointing, found.stream, found.estimate,
        max(found.estimate.peak, probe_bytes), result.disk, result.seconds, result.prepare,
    )  # fmt: skip


@dataclass(frozen=True)
class _Planned:
    fit: Fit
    seconds: float
    prepare: float
    disk: int


@dataclass(frozen=True)
class TaskPlan:
    """How an assignment will be trained, and what it will take. `step_seconds`, without what the round does once: 0 where it
    was not predicted."""

    estimate: Estimate
    stream: StreamPlan
    checkpointing: bool
    step_seconds: float = 0.0
    disk_bytes: int = 0
    """Activations on disk at their fullest."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.estimate.peak


def plan_task(
    shape: Shape,
    setting: Setting,
    spec: TrainSpec,
    broadcast_rank: int,
    units: Sequence[UnitId],
    micro_batch: int,
    checkpointing: bool,
    budget_bytes: int,
    pace: Pace | None = None,
) -> TaskPlan:
    """How to train an assignment within `budget_bytes` (0: no bound), with the adapter that actually came.

    Layers are recomputed where the assignment would keep their activations but the budget does not hold them.
    Raises BudgetError with what it would take; ProtocolError for units that the model does not have.
    """
    kept = keep(units, shape.layers, spec.targets)
    held, low, between = Held.of(kept), min(kept), len(gaps(units, shape.layers))
    problem = Problem(shape, setting, spec, broadcast_rank)
    found = fit(problem, held, between, low, (micro_batch,), budget_bytes, (checkpointing, True))
    estimate = problem.smallest(held, micro_batch, between, low) if found is None else found.estimate
    exact: Fit | None = None
    if spec.fidelity:
        exact = fit(once(problem), held, 0, low, (micro_batch,), budget_bytes)
        one = once(problem).smallest(held, micro_batch, 0, low) if exact is None else exact.estimate
        estimate = max(estimate, one, key=lambda each: each.peak)
    if found is None or (spec.fidelity and exact is None):
        raise BudgetError(
            f"the assignment of {len(units)} units needs {_mib(estimate.peak)} ({estimate.moment}), the budget is "
            f"{_mib(budget_bytes)}; nothing was loaded",
            estimate.peak,
        )
    seconds, _ = seconds_of(problem, pace, held, found, low, between)
    disk = spilled(shape, setting, spec, found.stream, low, between).most
    if exact is not None:
        disk = max(disk, spilled(shape, setting, once(problem).spec, exact.stream, low).most)
    return TaskPlan(estimate, found.stream, found.checkpointing, seconds, disk)


def probe_rows(
    shape: Shape,
    setting: Setting,
    probe: ProbeSpec,
    heldout_rows: int,
    adapter_bytes: int,
    budget_bytes: int,
    similarity: bool = True,
) -> Rows:
    """The most rows in a pass, then in a layer, that the budget allows; weights are read once a pass.

    Raises BudgetError when not even the smallest probe fits.
    """
    passes = [PASS_ROWS]
    while passes[-1] > probe.batch_size:
        passes.append(max(probe.batch_size, passes[-1] // 2))
    candidates = [Rows(micro, rows) for rows in passes for micro in range(min(MICRO_ROWS, probe.batch_size), 0, -1)]
    for rows in candidates:
        estimate = probe_peak(shape, setting, probe, heldout_rows, adapter_bytes, rows, similarity)
        if not budget_bytes or estimate.peak <= budget_bytes:
            return rows
    raise BudgetError(
        f"the budget of {_mib(budget_bytes)} can't hold the probe: the smallest that would do is {_mib(estimate.peak)}",
        estimate.peak,
    )


def micro_batches(batch: int) -> tuple[int, ...]:
    """Sizes that make fewer and fewer equal passes: 4, 2, 1 for a batch of 4."""
    return tuple(sorted({-(-batch // parts) for parts in range(1, batch + 1)}, reverse=True))


def _mib(size: int) -> str:
    return f"{-(-size // MIB)} MiB"
