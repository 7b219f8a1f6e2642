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

from common.errors import BudgetError
from fp_server.pruning.grouping import Eigenvectors, Groups, GroupSizes

REDRAWS = 32
"""How often a draw that does not fit is repeated before one unit fewer is drawn."""


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
    group_sizes: GroupSizes = "free"

    def fits(self, units: Sequence[int]) -> bool:
        """Whether these units together are within both limits."""
        for sizes, limit in ((self.unit_bytes, self.limit_bytes), (self.upload_bytes, self.upload_limit)):
            if limit is not None and sum(sizes[unit] for unit in units) > limit:
                return False
        return True

    def fitting(self) -> list[int]:
        """The units that fit alone. Raises BudgetError, naming the smallest, when none does."""
        found = [unit for unit in range(len(self.unit_bytes)) if self.fits((unit,))]
        if not found:
            smallest = min(self.unit_bytes)
            raise BudgetError(f"no unit fits in {self.limit_bytes} bytes: the smallest takes {smallest}", smallest)
        return found


def sample_weights(samples: Mapping[str, int]) -> dict[str, float]:
    """w_n = |D_n| / Σ_{m ∈ S_l} |D_m| over the holders S_l of a unit (Eq. 5), in device-id order.

    Raises ValueError when a holder has no samples. No holders: no weights.
    """
    for device, count in samples.items():
        if count < 1:
            raise ValueError(f"device {device!r} has {count} samples: a holder needs at least 1")
    total = sum(samples.values())
    return {device: samples[device] / total for device in sorted(samples)}


@dataclass(frozen=True)
class Draw:
    """The units of one device and how they came about; units are 0-based indices in model order."""

    groups: Groups
    """Empty for a method that forms none."""
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
