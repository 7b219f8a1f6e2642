"""Which of one round's updates point against the others, or moved far further (ours; no paper's).

D_n = (α/r)·B_n·A_n less what device n started with, a product a module. Devices hold different units, so everything is
compared over what two of them share, and combined over all of it:

- **Size.** ‖D_n‖ of a module against the median of the other devices' (same module, whichever layers they hold), and the root
  mean square of that over all modules: of honest updates a single module's varies more than the whole's.
- **Direction.** cos(D_n, D_m) of every module that n shares with a device m. LoRA's random A makes the cosines of honest
  devices small, but not negative; a device is out when its mean cosine with the others is negative beyond chance, they
  agree among themselves, and it disagrees at least a quarter as much, with most of them.

Every device has one voice, whatever its weight in Eq. 5. A device that shares modules with fewer than two others is never
found out by direction: of two that disagree, nobody can tell which one is wrong. At most a minority is ever rejected.

Pure: arrays in, findings out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr

from fp_server.products import Float64

LEVEL = 1e-3
"""How likely a mean cosine as negative as this may be by chance (one-sided t test over the shared modules)."""
SHARE = 0.25
"""A device must disagree with the others at least this part as strongly as they agree among themselves."""
CHANGES = 10
"""Changes of camp a device, at most."""


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
    whole: float | None = None
    """The root mean square of that over its modules."""


def judge(modules: Sequence[Shared], max_ratio: float, max_whole: float) -> tuple[dict[str, Score], dict[str, str]]:
    """Device -> score, with everybody counted; device -> why it is an outlier, in the order they were found.

    `max_ratio`: how many times the others' median a module may move, `max_whole`: all of them, root mean square. What moved
    too far is taken out first, the furthest first. Then whoever agrees least with the rest is put aside, as long as
    somebody's mean cosine is negative; and each of these is held against those that remained, so that several who turned
    their update round don't hide one another.
    """
    panel = _Panel(modules)
    scores = panel.scores()
    outliers: dict[str, str] = {}
    most = (len(panel.devices) - 1) // 2
    while len(outliers) < most and (found := panel.largest(max_ratio, max_whole)) is not None:
        outliers[panel.devices[found[0]]] = found[1]
        panel.active[found[0]] = False
    aside = panel.minority()
    panel.active[aside] = False
    for device in aside:
        if len(outliers) < most and (reason := panel.against(device)):
            outliers[panel.devices[device]] = reason
    return scores, outliers


class _Panel:
    """The devices of a round as arrays. A device that did nothing to a module has no direction there."""

    def __init__(self, modules: Sequence[Shared]) -> None:
        self.devices = sorted({device for module in modules for device in module.devices})
        self.names = [module.module for module in modules]
        count, place = len(self.devices), {device: index for index, device in enumerate(self.devices)}
        self.active: npt.NDArray[np.bool_] = np.ones(count, dtype=np.bool_)
        self.norms = np.full((len(modules), count), np.nan)
        self._cosines = np.zeros((len(modules), count, count))
        self._known = np.zeros((len(modules), count, count), dtype=np.bool_)
        for k, module in enumerate(modules):
            at = np.array([place[device] for device in module.devices])
            norms = np.sqrt(np.maximum(np.diag(module.inner), 0.0))
            self.norms[k, at] = norms
            moved = norms > 0
            at, norms, inner = at[moved], norms[moved], module.inner[np.ix_(moved, moved)]
            self._cosines[k][np.ix_(at, at)] = inner / norms[:, None] / norms
            self._known[k][np.ix_(at, at)] = True
        self._known &= ~np.eye(count, dtype=np.bool_)

    # -- size ------------------------------------------------------------------------------------

    def _ratios(self) -> Float64:
        """(K, n): each norm in (upper) medians of the others'; NaN where fewer than two others hold such a module."""
        ratios = np.full(self.norms.shape, np.nan)
        for name in sorted(set(self.names)):
            rows = [k for k, other in enumerate(self.names) if other == name]
            mine = self.norms[rows]
            typical = np.array([_median(mine[:, n]) if self.active[n] else np.nan for n in range(len(self.devices))])
            for n in range(len(self.devices)):
                others = np.delete(typical, n)
                others = others[~np.isnan(others)]
                # Of two in the middle the larger: who moves by nothing must not make an honest one look twice as large.
                if len(others) >= 2 and (middle := float(np.sort(others)[len(others) // 2])) > 0:
                    ratios[rows, n] = mine[:, n] / middle
        return ratios

    def largest(self, max_ratio: float, max_whole: float) -> tuple[int, str] | None:
        """The device whose update moved furthest beyond a bound, and what to say of it: a module's first, then the whole's."""
        known = np.where(self.active, self._ratios(), np.nan)
        ratios, wholes = np.nan_to_num(known, nan=0.0), np.nan_to_num(_wholes(known), nan=0.0)
        if not ratios.size:
            return None
        if float(ratios.max()) <= max_ratio:
            furthest = int(wholes.argmax())
            if float(wholes[furthest]) <= max_whole:
                return None
            return furthest, (
                f"its modules moved {wholes[furthest]:.1f} times as far as the other devices' do (root mean square, in medians), "
                f"at most {max_whole:g} counts"
            )
        k, n = np.unravel_index(int(ratios.argmax()), ratios.shape)
        reason = (
            f"a {self.names[k]} moved {ratios[k, n]:.1f} times as far as the other devices' do (median), "
            f"at most {max_ratio:g} counts"
        )
        return int(n), reason

    # -- direction -------------------------------------------------------------------------------

    def _agreements(self) -> Float64:
        """(K, n): every device's mean cosine with the other active holders of a module; NaN where there is none."""
        known = self._known & self.active
        counts = known.sum(axis=2)
        return np.where(counts > 0, np.where(known, self._cosines, 0.0).sum(axis=2) / np.maximum(counts, 1), np.nan)

    def _pairs(self) -> Float64:
        """(n, n): every device's mean cosine with an active one over the modules they share; NaN where they share none."""
        known = self._known & self.active
        counts = known.sum(axis=0)
        return np.where(counts > 0, np.where(known, self._cosines, 0.0).sum(axis=0) / np.maximum(counts, 1), np.nan)

    def _means(self) -> Float64:
        """(n,): every device's mean over its modules of `_agreements`; NaN when it shares none with an active one."""
        agreements = self._agreements()
        return np.array([float(each.mean()) if len(each := _known(column)) else np.nan for column in agreements.T])

    def minority(self) -> list[int]:
        """The smaller of two camps: those whose members agree most with each other and least across, summed over all modules.

        Everybody begins in one camp; who disagrees most with his own and agrees most with the other changes over, until nobody
        would. So two wrong ones don't make a right one look wrong. Of two camps of one size neither is the smaller.
        """
        sums = np.where(self._known, self._cosines, 0.0).sum(axis=0)
        camp = np.where(self.active, 1.0, 0.0)
        for _ in range(CHANGES * len(camp)):  # the sum of agreements grows with every change; this only bounds rounding
            pull = camp * (sums @ camp)
            if not len(pull) or float(pull.min()) >= 0:
                break
            camp[int(pull.argmin())] *= -1
        first, second = np.flatnonzero(camp > 0).tolist(), np.flatnonzero(camp < 0).tolist()
        return [] if len(first) == len(second) else min(first, second, key=len)

    def against(self, device: int) -> str:
        """Why a device that was put aside is an outlier to the active ones; empty when it is none."""
        each, pairs = _known(self._agreements()[:, device]), _known(self._pairs()[device])
        against = int((pairs < 0).sum())
        theirs = _median(np.where(self.active, self._means(), np.nan))
        if len(pairs) < 2 or 2 * against <= len(pairs) or _chance(each) >= LEVEL:
            return ""
        mine = float(each.mean())
        if not theirs > 0 or mine > -SHARE * theirs:
            return ""
        return (
            f"points against the others: mean cosine {mine:+.4f} over {len(each)} shared modules, negative with {against} of "
            f"{len(pairs)} devices, which have {theirs:+.4f} among themselves (median)"
        )

    def scores(self) -> dict[str, Score]:
        """Every device's, as things stand."""
        means, pairs, ratios = self._means(), self._pairs(), self._ratios()
        wholes = _wholes(ratios)
        found: dict[str, Score] = {}
        for n, device in enumerate(self.devices):
            mine, sizes = _known(pairs[n]), _known(ratios[:, n])
            agreement = float(means[n]) if len(mine) else None
            size, whole = (float(sizes.max()), float(wholes[n])) if len(sizes) else (None, None)
            found[device] = Score(len(mine), int((mine < 0).sum()), agreement, size, whole)
        return found


def _wholes(ratios: Float64) -> Float64:
    """(n,): the root mean square of each column of (K, n); NaN where it has no value."""
    counts = (~np.isnan(ratios)).sum(axis=0)
    return np.where(counts > 0, np.sqrt(np.nansum(ratios**2, axis=0) / np.maximum(counts, 1)), np.nan)


def _known(values: Float64) -> Float64:
    return values[~np.isnan(values)]


def _median(values: Float64) -> float:
    known = _known(values)
    return float(np.median(known)) if len(known) else float("nan")


def _chance(each: Float64) -> float:
    """How likely so low a mean is when the true one is 0; 1 with fewer than two values."""
    if len(each) < 2 or each.mean() >= 0:
        return 1.0
    error = float(each.std(ddof=1)) / len(each) ** 0.5
    return float(stdtr(len(each) - 1, float(each.mean()) / error)) if error > 0 else 0.0
