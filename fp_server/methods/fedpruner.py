"""FedPruner (24 August 2025), server half: FDLO grouping, IALS selection, sample-weighted stacking.

Algorithm 1, lines of the server: group the units by how alike they behave on the device's data (Eq. 2),
draw one of each group (Eq. 3), aggregate each unit over the devices that kept it (Eq. 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import BudgetError
from fp_server.methods.base import Draw, PlanInputs
from fp_server.pruning.grouping import group, group_count
from fp_server.pruning.selection import draw, probabilities

REDRAWS = 32
"""How often a draw that does not fit is repeated before the groups are reduced by one."""


@dataclass(frozen=True)
class FedPruner:
    """The paper's method. Stateless: all that varies comes in with the call."""

    name: str = "fedpruner"
    probes: bool = True

    def plan(self, inputs: PlanInputs, rng: np.random.Generator) -> Draw:
        """FDLO, then IALS; a draw too large for the device is redrawn, then the groups are reduced.

        When even the draws of a single unit keep missing those that fit, the likeliest that fits is taken.
        Raises BudgetError (with the smallest unit's bytes) when not even one unit fits; ValueError when
        the shapes of the inputs disagree.
        """
        units = len(inputs.unit_bytes)
        if inputs.similarity.shape != (units, units) or inputs.in_out.shape != (units,):
            raise ValueError(
                f"similarity {inputs.similarity.shape}, input-output similarity {inputs.in_out.shape} "
                f"and {units} unit sizes do not describe the same units"
            )
        fitting = [unit for unit in range(units) if inputs.fits((unit,))]
        if not fitting:
            smallest = min(inputs.unit_bytes)
            raise BudgetError(f"no unit fits in {inputs.limit_bytes} bytes: the smallest takes {smallest}", smallest)
        most = group_count(units, inputs.capacity)
        redraws = 0
        for k in range(most, 0, -1):
            groups = group(inputs.similarity, k, rng, inputs.eigenvectors)
            chances = probabilities(inputs.in_out, groups)
            for attempt in range(REDRAWS + 1):
                redraws += attempt > 0
                drawn = draw(groups, chances, rng)
                if inputs.fits(drawn):
                    return Draw(groups, chances, drawn, redraws, most - k)
        # One group of everything and 33 draws missed every unit that fits: take the likeliest that does.
        likeliest = max(fitting, key=lambda unit: (chances[0][groups[0].index(unit)], -unit))
        return Draw(groups, chances, (likeliest,), redraws, most - 1)

    def weights(self, samples: Mapping[str, int]) -> dict[str, float]:
        """w_n = |D_n| / Σ_{m ∈ S_l} |D_m| over the holders S_l of a unit (Eq. 5), in device-id order.

        Raises ValueError when a holder has no samples. No holders: no weights.
        """
        for device, count in samples.items():
            if count < 1:
                raise ValueError(f"device {device!r} has {count} samples: a holder needs at least 1")
        total = sum(samples.values())
        return {device: samples[device] / total for device in sorted(samples)}
