"""Random units: the baseline that FDLO and IALS are measured against, as FedRA allots its layers.

Every set of as many units as the device holds is equally likely; nothing is measured for it. Weights are FedPruner's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fp_server.methods.base import REDRAWS, Draw, PlanInputs, sample_weights
from fp_server.pruning.grouping import group_count


@dataclass(frozen=True)
class RandomUnits:
    """Uniform draws without replacement. Stateless: all that varies comes in with the call."""

    name: str = "random"
    probes: bool = False

    def plan(self, inputs: PlanInputs, rng: np.random.Generator) -> Draw:
        """`inputs.capacity` units, uniformly; there are no groups, and the similarities are not looked at.

        A draw too large for the device is redrawn up to `REDRAWS` times, then it is one unit smaller: every set that
        fits is as likely as any other of its size. Raises BudgetError when not even one unit fits.
        """
        fitting = inputs.fitting()
        most = group_count(len(inputs.unit_bytes), inputs.capacity)
        redraws = 0
        for count in range(most, 0, -1):
            for attempt in range(REDRAWS + 1):
                redraws += attempt > 0
                drawn = tuple(sorted(rng.choice(len(inputs.unit_bytes), count, replace=False).tolist()))
                if inputs.fits(drawn):
                    return Draw((), (), drawn, redraws, most - count)
        return Draw((), (), (fitting[int(rng.integers(len(fitting)))],), redraws, most - 1)

    def weights(self, samples: Mapping[str, int]) -> dict[str, float]:
        """Eq. 5's shares of the samples."""
        return sample_weights(samples)
