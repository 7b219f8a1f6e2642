"""IALS: one unit of each group, the more important the likelier (paper §3.2, Eq. 3).

    I_l = 1 − s_l,   p_l = exp(I_l) / Σ_{j ∈ G_m} exp(I_j)   for l in G_m

s_l is the similarity of unit l's input and output: a unit that changes little matters little.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def probabilities(in_out: npt.NDArray[np.floating], groups: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """p_l of Eq. 3 for each group, in the order of its members; each sums to 1.

    `in_out`: (U,), s_l. Raises ValueError when it is not a finite vector, or a group is empty or names a unit beyond it.
    """
    s = np.asarray(in_out, dtype=np.float64)
    if s.ndim != 1:
        raise ValueError(f"the input-output similarities have shape {s.shape}: expected (U,)")
    if not np.isfinite(s).all():
        unit = int(np.flatnonzero(~np.isfinite(s))[0])
        raise ValueError(f"the input-output similarity of unit {unit + 1} is {s[unit]}: must be finite")
    out: list[tuple[float, ...]] = []
    for index, members in enumerate(groups):
        if not members or min(members) < 0 or max(members) >= len(s):
            raise ValueError(f"group {index + 1} is {tuple(members)}: expected units in 0..{len(s) - 1}, at least one")
        importance = 1.0 - s[list(members)]
        # Shifting by the maximum changes no ratio and keeps exp from overflowing.
        weights = np.exp(importance - importance.max())
        out.append(tuple((weights / weights.sum()).tolist()))
    return tuple(out)


def draw(groups: Sequence[Sequence[int]], probability: Sequence[Sequence[float]], rng: np.random.Generator) -> tuple[int, ...]:
    """One unit of each group, drawn with its probability; sorted, that is in model order."""
    drawn: list[int] = []
    for members, chances in zip(groups, probability, strict=True):
        edges = np.cumsum(chances)
        # Scaled by the last edge: rounding must leave no gap at the top.
        place = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
        drawn.append(members[min(place, len(members) - 1)])
    return tuple(sorted(drawn))
