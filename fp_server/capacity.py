"""What a device said it can hold, read for the choice of its units."""

from __future__ import annotations

from collections.abc import Sequence

from common.types import Capacity, ModelManifest, Part, PlanReport, UnitId


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
    if components and any(c.units % 2 for c in report.capacities):
        return "the plan has a capacity of an odd number of components; a whole layer counts as two"
    return "" if report.samples > 0 else "the device has no training examples"
