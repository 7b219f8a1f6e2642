"""What a device can hold within its budget: units, micro-batch, checkpointing, and the smallest budget that would do.

From the model's config alone (`fp_client.memory` has the formulas). More units first, because they are what a
submodel is made of; then larger micro-batches; and activations are only kept instead of recomputed (checkpointing
off) where that costs no unit and no micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import BudgetError
from common.types import Capacity, Gradient, ProbeSpec, TrainSpec, UnitId
from fp_client.memory import (
    MIB,
    MICRO_ROWS,
    PASS_ROWS,
    Estimate,
    Kept,
    Rows,
    Setting,
    StreamPlan,
    probe_peak,
    train_peak,
    unit_bytes,
)
from fp_client.shapes import Shape, shape_of


@dataclass(frozen=True)
class Plan:
    """A device's plan. `peak_bytes` is the larger of training's and the probe's; `smallest_budget` holds one unit."""

    units: int
    micro_batch: int
    checkpointing: bool
    peak_bytes: int
    train: Estimate
    probe: Estimate
    probe_rows: Rows
    unit_bytes: tuple[int, ...]
    smallest_budget: int

    @property
    def capacity(self) -> Capacity:
        """The plan as a device announces it."""
        return Capacity(Gradient.SUBMODEL, self.units, self.micro_batch, self.checkpointing, self.peak_bytes)


def plan(
    config: Mapping[str, Any],
    setting: Setting,
    spec: TrainSpec,
    probe: ProbeSpec,
    broadcast_rank: int,
    budget_bytes: int,
    heldout_rows: int = 64,
) -> Plan:
    """The best plan within `budget_bytes` (0: no bound) for a model's config.json.

    `broadcast_rank`: the largest rank of ΔW that the server will send, in every unit and target.
    Raises BudgetError with the smallest budget that would do; ProtocolError for targets the model does not have.
    """
    shape = shape_of(config)
    adapter = shape.factors(spec.targets, broadcast_rank) * 4

    def training(units: int, micro: int, checkpointing: bool) -> Estimate:
        return train_peak(shape, setting, spec, broadcast_rank, Kept(units, micro, checkpointing))

    least_rows = Rows(1, probe.batch_size)
    least_probe = probe_peak(shape, setting, probe, heldout_rows, adapter, least_rows)
    least_train = training(1, 1, True)
    smallest = max(least_probe.peak, least_train.peak)
    if budget_bytes and smallest > budget_bytes:
        what = least_train if least_train.peak >= least_probe.peak else least_probe
        table = ", ".join(f"{name} {_mib(size)}" for name, size in what.rows if size)
        raise BudgetError(
            f"the budget of {_mib(budget_bytes)} holds no submodel: the smallest that would do is {_mib(smallest)} "
            f"({what.moment}: {table}); raise [budget], or use nf4, a shorter window or a smaller batch",
            smallest,
        )

    def fits(estimate: Estimate) -> bool:
        return not budget_bytes or estimate.peak <= budget_bytes

    units = max(count for count in range(1, shape.layers + 1) if fits(training(count, 1, True)))
    sizes = _micro_batches(spec.batch_size)
    micro = next(size for size in sizes if fits(training(units, size, True)))
    checkpointing = not fits(training(units, micro, False))
    train = training(units, micro, checkpointing)
    rows = probe_rows(shape, setting, probe, heldout_rows, adapter, budget_bytes)
    probed = probe_peak(shape, setting, probe, heldout_rows, adapter, rows)
    each = unit_bytes(shape, setting, spec, broadcast_rank)
    return Plan(units, micro, checkpointing, max(train.peak, probed.peak), train, probed, rows, (each,) * shape.layers, smallest)


@dataclass(frozen=True)
class TaskPlan:
    """How an assignment will be trained, and what it will take. `step_seconds` 0 where it was not predicted."""

    estimate: Estimate
    stream: StreamPlan
    step_seconds: float = 0.0

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
) -> TaskPlan:
    """How to train an assignment within `budget_bytes` (0: no bound), with the adapter that actually came.

    Raises BudgetError with what it would take.
    """
    kept = Kept(len(units), micro_batch, checkpointing)
    estimate = train_peak(shape, setting, spec, broadcast_rank, kept)
    if 0 < budget_bytes < estimate.peak:
        raise BudgetError(
            f"the assignment of {len(units)} units needs {estimate.peak >> 20} MiB, the budget is {budget_bytes >> 20} MiB; "
            "nothing was loaded",
            estimate.peak,
        )
    return TaskPlan(estimate, StreamPlan(ahead=True))


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


def _micro_batches(batch: int) -> list[int]:
    """Sizes that make fewer and fewer equal passes: 4, 2, 1 for a batch of 4."""
    return sorted({-(-batch // parts) for parts in range(1, batch + 1)}, reverse=True)


def _mib(size: int) -> str:
    return f"{-(-size // MIB)} MiB"
