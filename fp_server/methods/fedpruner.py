"""FedPruner (24 August 2025), server half: FDLO grouping, IALS selection, sample-weighted stacking.

Algorithm 1, lines of the server: group the units by how alike they behave on the device's data (Eq. 2),
draw one of each group (Eq. 3), aggregate each unit over the devices that kept it (Eq. 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fp_server.methods.base import REDRAWS, Draw, PlanInputs, sample_weights
from fp_server.pruning.grouping import group, group_count
from fp_server.pruning.selection import draw, probabilities


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
        fitting = inputs.fitting()
        most = group_count(units, inputs.capacity)
        redraws = 0
        for k in range(most, 0, -1):
            groups = group(inputs.similarity, k, rng, inputs.eigenvectors, inputs.group_sizes)
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
        """w_n = |D_n| / Σ_{m ∈ S_l} |D_m| over the holders S_l of a unit (Eq. 5), in device-id order."""
        return sample_weights(samples)
