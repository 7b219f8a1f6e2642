"""What a device said it can hold, read for the choice of its units."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.types import Capacity, Gradient, ModelManifest, Part, PlanReport, UnitId

FIDELITY = (Gradient.STREAMED, Gradient.STITCHED, Gradient.SUBMODEL)
"""The modes, the one whose gradient is nearest the full model's first."""


LONGEST = 1e9
"""Seconds: some thirty years. What a device says takes longer is no time."""


def choose_capacity(report: PlanReport, gradient: Gradient, step_seconds: float) -> Capacity | None:
    """The capacity a device trains by: the run's mode, or for AUTO the choice among those it can hold.

    A fixed mode whose predicted step is longer than `step_seconds` (0: no limit) even with one unit is not taken. AUTO
    takes the best fidelity whose predicted step is within it, among those with at least half as many units as any other
    within it (a submodel counts there when it is the whole model): a device plans fewer units to be within the limit, and the
    full model's gradient for one unit is worth less than a near one for eight. When none is within it, the fastest; a mode
    without a prediction counts as the slowest, and of equals the cheaper one is taken.
    None: it can't.
    """
    held = {c.gradient: c for c in report.capacities if c.units > 0}
    if gradient is not Gradient.AUTO:
        found = held.get(gradient)
        return None if found is None or _late(found, step_seconds) else found
    modes = [held[mode] for mode in FIDELITY if mode in held]
    within = [c for c in modes if not step_seconds or 0 < c.step_seconds <= step_seconds]
    if within or not modes:
        # A submodel's units count only when it is the whole model: else its gradient has little to do with the full one's.
        near = [c.units for c in within if c.gradient is not Gradient.SUBMODEL or c.units == len(report.unit_bytes)]
        most = max(near, default=0) if step_seconds else 0
        return next((c for c in within if 2 * c.units >= most), None)
    return min(reversed(modes), key=lambda c: c.step_seconds or math.inf)


def _late(capacity: Capacity, step_seconds: float) -> bool:
    """Whether a device's own prediction of a step is over the run's limit."""
    return bool(step_seconds) and capacity.step_seconds > step_seconds


def refusal(report: PlanReport, gradient: Gradient, step_seconds: float = 0.0) -> str:
    """Why a device has no capacity in the run's mode, for a person."""
    if report.refusal:
        return report.refusal
    late = report.capacity(gradient)
    if late is not None and late.units > 0 and _late(late, step_seconds):
        return (
            f"expects {late.step_seconds:.3g} s of a {gradient.value} step even with one unit, the run allows {step_seconds:.3g} "
            '(train.step_seconds); allow more, or use gradient = "auto"'
        )
    if held := [c.gradient.value for c in report.capacities if c.units > 0]:
        return f'can\'t train with gradient = "{gradient}" (it can with: {", ".join(held)})'
    return "can't hold the smallest submodel"


def byte_limit(report: PlanReport, capacity: Capacity, units: Sequence[UnitId]) -> int:
    """Bytes that the units drawn for a device may cost together, by its own bytes per unit.

    Layers: what `capacity.units` of the largest cost, so that any draw of as many fits. Components: what
    `capacity.units // 2` of the largest whole layers cost. As the feed-forward part is the larger one, a draw with
    more of those than attention parts does not fit; FedPruner+ draws again then.
    """
    if all(unit.part is Part.LAYER for unit in units):
        return sum(sorted(report.unit_bytes, reverse=True)[: capacity.units])
    layers: dict[int, int] = {}
    for unit, size in zip(units, report.unit_bytes, strict=True):
        layers[unit.layer] = layers.get(unit.layer, 0) + size
    return capacity.units // 2 * max(layers.values())


def plan_problem(report: PlanReport, manifest: ModelManifest, units: Sequence[UnitId]) -> str:
    """Why a device's plan can't be used with this model and these units; empty when it can."""
    components = len(units) > manifest.layers
    if report.fingerprint != manifest.fingerprint:
        ours, theirs = manifest.fingerprint[:16], report.fingerprint[:16]
        return f"the device's base weights have fingerprint {theirs}…, the run's {ours}…"
    if len(report.unit_bytes) != len(units):
        kind = "components" if components else "layers"
        return f"the plan has {len(report.unit_bytes)} units, the model {len(units)} {kind}"
    if any(c.units > len(units) or c.micro_batch < 1 for c in report.capacities):
        return "the plan has a capacity of more units than the model, or a micro-batch of 0"
    modes = [c.gradient for c in report.capacities]
    if Gradient.AUTO in modes or len(set(modes)) < len(modes):
        return "the plan has two capacities of one gradient mode, or one of 'auto'"
    if any(not 0 <= c.step_seconds <= LONGEST for c in report.capacities):
        return f"the plan has a negative step time, or one above {LONGEST:.0e} seconds"
    if components and any(c.units % 2 for c in report.capacities):
        return "the plan has a capacity of an odd number of components; a whole layer counts as two"
    return "" if report.samples > 0 else "the device has no training examples"
