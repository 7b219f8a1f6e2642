"""What a method is to the server: pure functions, state and a seeded generator in, values out.

A method decides which units a device gets and how much each holder counts. The rounds call it; the
devices never hear of it (they get an `Assignment`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fp_server.pruning.grouping import Eigenvectors, Groups


@dataclass(frozen=True)
class PlanInputs:
    """What is known of one device when its units are chosen."""

    similarity: npt.NDArray[np.floating]
    """(U, U): CKA between unit outputs (Eq. 1)."""
    in_out: npt.NDArray[np.floating]
    """(U,): s_l of Eq. 3."""
    capacity: int
    """How many units the device holds at most; more than U is taken as U."""
    unit_bytes: tuple[int, ...]
    """(U,): bytes each unit costs resident, as the device reported."""
    limit_bytes: int | None = None
    """Bytes the drawn units may cost together; None: `capacity` of any units fit."""
    eigenvectors: Eigenvectors = "k"
    upload_bytes: tuple[int, ...] = ()
    """(U,): bytes an update has of each unit; only needed with `upload_limit`."""
    upload_limit: int | None = None
    """Bytes the update of the drawn units may have; None: no limit."""

    def fits(self, units: Sequence[int]) -> bool:
        """Whether these units together are within both limits."""
        for sizes, limit in ((self.unit_bytes, self.limit_bytes), (self.upload_bytes, self.upload_limit)):
            if limit is not None and sum(sizes[unit] for unit in units) > limit:
                return False
        return True


@dataclass(frozen=True)
class Draw:
    """The units of one device and how they came about; units are 0-based indices in model order."""

    groups: Groups
    probabilities: tuple[tuple[float, ...], ...]
    units: tuple[int, ...]
    redraws: int
    """Draws repeated because the one before did not fit, over all group counts tried."""
    reductions: int
    """By how many the groups were reduced below the capacity."""


class Method(Protocol):
    """One federated fine-tuning method, server half."""

    @property
    def name(self) -> str:
        """What a run file calls it."""
        ...

    @property
    def probes(self) -> bool:
        """Whether `plan` needs the similarities of a fresh probe."""
        ...

    def plan(self, inputs: PlanInputs, rng: np.random.Generator) -> Draw:
        """Choose one device's units. Raises BudgetError when none fits, ValueError on malformed inputs."""
        ...

    def weights(self, samples: Mapping[str, int]) -> dict[str, float]:
        """How much each holder of a unit counts; sums to 1. `samples`: device -> |D_n|."""
        ...
