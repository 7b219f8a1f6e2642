"""Which of one round's updates point against the others, or moved far further (ours; no paper's).

D_n = (α/r)·B_n·A_n less what device n started with, a product a module. Devices hold different units, so everything is
compared over what two of them share, and combined over all of it:

- **Size.** ‖D_n‖ of a module against the median of the other devices' (same module, whichever layers they hold).
- **Direction.** cos(D_n, D_m) of every module that n shares with a device m. LoRA's random A makes the cosines of honest
  devices small, but not negative; a device is out when its mean cosine with the others is negative beyond chance, the
  others agree among themselves, and it disagrees at least half as much as they agree, with most of them.

Every device has one voice, whatever its weight in Eq. 5. A device that shares modules with fewer than two others is never
found out by direction: of two that disagree, nobody can tell which one is wrong. At most a minority is ever rejected.

Pure: arrays in, findings out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr

from fp_server.products import Float64

LEVEL = 1e-3
"""How likely a mean cosine as negative as this may be by chance (one-sided t test over the shared modules)."""
SHARE = 0.5
"""A device must disagree with the others at least this much as strongly as they agree among themselves."""


@dataclass(frozen=True)
class Shared:
    """One module of one layer, and what its holders did to it."""

    module: str
    """Its name without the layer."""
    devices: tuple[str, ...]
    """The holders, sorted."""
    inner: Float64
    """(n, n): ⟨D_i, D_j⟩."""


@dataclass(frozen=True)
class Score:
    """How one device's update compares with those of the others."""

    others: int
    """Devices it shares a module with."""
    against: int
    """Those of them whose mean cosine with it is negative."""
    agreement: float | None
    """Mean cosine with them over all shared modules; None when it shares none."""
    size: float | None
    """Its largest ‖D‖ of a module, in medians of the other devices'; None with fewer than two others."""


def judge(modules: Sequence[Shared], max_ratio: float) -> tuple[dict[str, Score], dict[str, str]]:
    """Device -> score, with everybody counted; device -> why it is an outlier, in the order they were found.

    `max_ratio`: how many times the others' median a module may move. The largest is taken out first, then the one most
    against the others, the rest compared anew each time.
    """
    panel = _Panel(modules)
    scores = panel.scores()
    outliers: dict[str, str] = {}
    most = (len(panel.devices) - 1) // 2
    looks: tuple[Callable[[], tuple[int, str] | None], ...] = (partial(panel.largest, max_ratio), panel.most_against)
    for look in looks:
        while len(outliers) < most and (found := look()) is not None:
            device, reason = found
            outliers[panel.devices[device]] = reason
            panel.active[device] = False
    return scores, outliers


class _Panel:
    """The devices of a round as arrays; NaN where a device does not hold a module, or did nothing to it."""

    def __init__(self, modules: Sequence[Shared]) -> None:
        self.devices = sorted({device for module in modules for device in module.devices})
        self.names = [module.module for module in modules]
        count, place = len(self.devices), {device: index for index, device in enumerate(self.devices)}
        self.active: npt.NDArray[np.bool_] = np.ones(count, dtype=np.bool_)
        self.norms = np.full((len(modules), count), np.nan)
        self.cosines = np.full((len(modules), count, count), np.nan)
        for k, module in enumerate(modules):
            at = np.array([place[device] for device in module.devices])
            norms = np.sqrt(np.maximum(np.diag(module.inner), 0.0))
            self.norms[k, at] = norms
            moved = norms > 0
            at, norms, inner = at[moved], norms[moved], module.inner[np.ix_(moved, moved)]
            self.cosines[k][np.ix_(at, at)] = inner / norms[:, None] / norms
        diagonal = np.arange(count)
        self.cosines[:, diagonal, diagonal] = np.nan

    # -- size ------------------------------------------------------------------------------------

    def _ratios(self) -> Float64:
        """(K, n): each norm in medians of the others'; NaN where fewer than two others hold such a module."""
        ratios = np.full(self.norms.shape, np.nan)
        for name in sorted(set(self.names)):
            rows = [k for k, other in enumerate(self.names) if other == name]
            mine = self.norms[rows]
            typical = np.array([_median(mine[:, n]) if self.active[n] else np.nan for n in range(len(self.devices))])
            for n in range(len(self.devices)):
                others = np.delete(typical, n)
                others = others[~np.isnan(others)]
                if len(others) >= 2 and (middle := float(np.median(others))) > 0:
                    ratios[rows, n] = mine[:, n] / middle
        return ratios

    def largest(self, max_ratio: float) -> tuple[int, str] | None:
        """The device whose update moved furthest beyond the bound, and what to say of it."""
        ratios = np.where(self.active, np.nan_to_num(self._ratios(), nan=0.0), 0.0)
        if not ratios.size or float(ratios.max()) <= max_ratio:
            return None
        k, n = np.unravel_index(int(ratios.argmax()), ratios.shape)
        reason = (
            f"a {self.names[k]} moved {ratios[k, n]:.1f} times as far as the other devices' do (median), "
            f"at most {max_ratio:g} counts"
        )
        return int(n), reason

    # -- direction -------------------------------------------------------------------------------

    def _agreements(self, active: npt.NDArray[np.bool_]) -> Float64:
        """(K, n): mean cosine with the other active holders of a module; NaN where there is none."""
        cosines = np.where(active[:, None] & active, self.cosines, np.nan)
        known = ~np.isnan(cosines)
        counts = known.sum(axis=2)
        sums = np.where(known, cosines, 0.0).sum(axis=2)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    def _pairs(self) -> Float64:
        """(n, n): mean cosine of two active devices over the modules they share; NaN where they share none."""
        cosines = np.where(self.active[:, None] & self.active, self.cosines, np.nan)
        known = ~np.isnan(cosines)
        counts = known.sum(axis=0)
        return np.where(counts > 0, np.where(known, cosines, 0.0).sum(axis=0) / np.maximum(counts, 1), np.nan)

    def most_against(self) -> tuple[int, str] | None:
        """The device that agrees least with the others, if it is out by every test, and what to say of it."""
        agreements, pairs = self._agreements(self.active), self._pairs()
        worst: tuple[float, int, str] | None = None
        for n in np.flatnonzero(self.active).tolist():
            each = agreements[:, n][~np.isnan(agreements[:, n])]
            others = int((~np.isnan(pairs[n])).sum())
            against = int((pairs[n] < 0).sum())
            if others < 2 or 2 * against <= others or _chance(each) >= LEVEL:
                continue
            mine, theirs = float(each.mean()), self._without(n)
            if theirs <= 0 or mine > -SHARE * theirs or (worst is not None and worst[0] <= mine):
                continue
            reason = (
                f"points against the others: mean cosine {mine:+.4f} over {len(each)} shared modules, negative with {against} of "
                f"{others} devices, which have {theirs:+.4f} among themselves (median)"
            )
            worst = (mine, n, reason)
        return None if worst is None else worst[1:]

    def _without(self, left_out: int) -> float:
        """The median of the other devices' mean cosines among themselves; -1 when they share nothing."""
        active = self.active.copy()
        active[left_out] = False
        agreements = self._agreements(active)
        means = [float(each.mean()) for n in np.flatnonzero(active) if len(each := agreements[:, n][~np.isnan(agreements[:, n])])]
        return float(np.median(means)) if means else -1.0

    def scores(self) -> dict[str, Score]:
        """Every device's, as things stand."""
        agreements, pairs, ratios = self._agreements(self.active), self._pairs(), self._ratios()
        found: dict[str, Score] = {}
        for n, device in enumerate(self.devices):
            each, sizes = (rows[:, n][~np.isnan(rows[:, n])] for rows in (agreements, ratios))
            found[device] = Score(
                int((~np.isnan(pairs[n])).sum()), int((pairs[n] < 0).sum()), float(each.mean()) if len(each) else None,
                float(sizes.max()) if len(sizes) else None,
            )  # fmt: skip
        return found


def _median(values: Float64) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _chance(each: Float64) -> float:
    """How likely so low a mean is when the true one is 0; 1 with fewer than two values."""
    if len(each) < 2 or each.mean() >= 0:
        return 1.0
    error = float(each.std(ddof=1)) / len(each) ** 0.5
    return float(stdtr(len(each) - 1, float(each.mean()) / error)) if error > 0 else 0.0
