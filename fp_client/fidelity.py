"""How faithful a device's gradient is: its cosine with the full model's over the same units and batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.types import Factors, TrainSpec, UnitId, unit_modules
from fp_client.batches import Batch
from fp_client.template import IGNORE
from fp_client.train import Trainer
from fp_client.units import keep


@dataclass(frozen=True)
class Fidelity:
    """Cosines in [−1, 1]: over all LoRA factors, and over each assigned unit's, in the order of the assignment."""

    overall: float
    units: tuple[float, ...]


def gradients(trainer: Trainer, batch: Batch, micro_batch: int) -> tuple[list[torch.Tensor], float]:
    """The LoRA gradient of the mean response-token loss on one batch, a tensor a factor, by layer, module, A before B;
    and that loss."""
    counted = int((batch["labels"][:, 1:] != IGNORE).sum())
    trainer.begin([batch], micro_batch)
    loss = trainer.gradients(0, batch, micro_batch, counted) / counted
    out = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in trainer.trainable]
    for parameter in trainer.trainable:
        parameter.grad = None
    return out, loss


def fidelity(
    mine: Sequence[torch.Tensor], full: Sequence[torch.Tensor], units: Sequence[UnitId], layers: int, spec: TrainSpec
) -> Fidelity:
    """Compare two gradients made by `gradients` for the same units. A gradient of zero has cosine 0 with any."""
    factors = 2 if spec.train is Factors.BOTH else 1
    names = [
        (layer, module)
        for layer, kept in keep(units, layers, spec.targets).items()
        for module in kept.targets
        for _ in range(factors)
    ]
    sums: dict[UnitId | None, list[float]] = {}
    for (layer, module), one, other in zip(names, mine, full, strict=True):
        a, b = one.double(), other.double()
        parts = (float((a * b).sum()), float((a * a).sum()), float((b * b).sum()))
        here = next(unit for unit in units if unit.layer == layer and unit_modules(unit, (module,)))
        for key in (None, here):
            sums[key] = [x + y for x, y in zip(sums.get(key, [0.0, 0.0, 0.0]), parts, strict=True)]
    return Fidelity(_cosine(*sums[None]), tuple(_cosine(*sums[unit]) for unit in units))


def _cosine(dot: float, one: float, other: float) -> float:
    return dot / math.sqrt(one * other) if one > 0 and other > 0 else 0.0
