"""k-means of few points, the same for the same generator whatever scipy is installed, without an empty group.

All starts are worked on side by side: of a few dozen points each, numpy's calls would take longer than what they compute.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.optimize

Float64 = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]

RESTARTS = 64
"""Independent k-means++ starts; the partition of least inertia wins."""
ITERATIONS = 100
"""Lloyd steps at most in one start; a few dozen points settle in about ten."""
ELEMENTS = 1 << 20
"""Of the differences of points and centres, in memory at once: so many starts at a time."""


def best_partition(points: Float64, k: int, rng: np.random.Generator, largest: int) -> Labels:
    """The labels 0..k−1 of least inertia over the starts, every label used, none by more than `largest`. `points`: (U, D)."""
    best: tuple[float, Labels] | None = None
    lacking: tuple[float, Labels] | None = None
    starts = _plus_plus(points, k, rng)
    at_once = max(1, ELEMENTS // (points.size * k))
    for begin in range(0, RESTARTS, at_once):
        for inertia, labels in zip(*_lloyd(points, starts[begin : begin + at_once], largest), strict=True):
            # The margin keeps rounding from choosing between two starts that found the same partition.
            if len(np.unique(labels)) == k:
                if best is None or inertia < best[0] * (1 - 1e-9):
                    best = inertia, labels
            elif lacking is None or inertia < lacking[0] * (1 - 1e-9):
                lacking = inertia, labels
    if best is not None:
        return best[1]
    assert lacking is not None
    return split_largest(points, lacking[1], k)


def _plus_plus(points: Float64, k: int, rng: np.random.Generator) -> Float64:
    """(R, k, D) by k-means++ (Arthur and Vassilvitskii 2007): each centre drawn in proportion to its squared distance."""
    draws = [(int(rng.integers(len(points))), rng.random(k - 1)) for _ in range(RESTARTS)]
    chosen = np.empty((RESTARTS, k), dtype=np.intp)
    chosen[:, 0] = [first for first, _ in draws]
    nearest = _to_one(points, chosen[:, 0])
    for index, thrown in enumerate(np.stack([throws for _, throws in draws], axis=1), start=1):
        edges = np.cumsum(nearest, axis=1)
        # With all points on a centre already, any will do; the empty group that follows is mended later.
        below = (edges <= (thrown * edges[:, -1])[:, None]).sum(axis=1)
        chosen[:, index] = np.minimum(below, len(points) - 1)
        nearest = np.minimum(nearest, _to_one(points, chosen[:, index]))
    return points[chosen]


def _to_one(points: Float64, chosen: Labels) -> Float64:
    """(R, U): every point's squared distance to one of them."""
    squared: Float64 = ((points - points[chosen][:, None, :]) ** 2).sum(axis=2)
    return squared


def _lloyd(points: Float64, centres: Float64, largest: int) -> tuple[list[float], Labels]:
    """Lloyd's iteration from given centres (R, k, D) until the labels stand still: every start's inertia, and labels (R, U)."""
    starts, k, width = centres.shape
    distances = _squared_distances(points, centres)
    labels = _assign(distances, largest)
    moving = np.arange(starts)
    for _ in range(ITERATIONS):
        if not len(moving):
            break
        flat = (labels[moving] + k * np.arange(len(moving))[:, None]).ravel()
        order = np.argsort(flat, kind="stable")
        used, begins, sizes = np.unique(flat[order], return_index=True, return_counts=True)
        middles = centres[moving].reshape(-1, width)
        middles[used] = np.add.reduceat(points[order % len(points)], begins, axis=0) / sizes[:, None]
        centres[moving] = middles.reshape(-1, k, width)
        distances[moving] = _squared_distances(points, centres[moving])
        moved = _assign(distances[moving], largest)
        going = (moved != labels[moving]).any(axis=1)
        labels[moving] = moved
        moving = moving[going]
    inertia = np.take_along_axis(distances, labels[:, :, None], axis=2)[:, :, 0].sum(axis=1)
    return inertia.tolist(), labels


def _assign(distances: Float64, largest: int) -> Labels:
    """Each point's centre: the nearest, or the choice of least sum when a centre takes at most `largest` points.

    `distances`: (R, U, k). The bounded form is k-means with size constraints (Bradley, Bennett and Demiriz 2000), solved as an
    assignment of points to `largest` seats at each centre.
    """
    labels: Labels = distances.argmin(axis=2)
    for index, nearest in enumerate(labels):
        if np.bincount(nearest).max() > largest:
            _, seats = scipy.optimize.linear_sum_assignment(np.repeat(distances[index], largest, axis=1))
            labels[index] = seats // largest
    return labels


def _squared_distances(points: Float64, centres: Float64) -> Float64:
    """(R, U, k)."""
    squared: Float64 = ((points[:, None, :] - centres[:, None, :, :]) ** 2).sum(axis=3)
    return squared


def split_largest(points: Float64, labels: Labels, k: int) -> Labels:
    """Fill unused labels: the largest group gives up the member farthest from its mean, until k are used."""
    labels = labels.copy()
    for unused in sorted(set(range(k)) - set(labels.tolist())):
        values, sizes = np.unique(labels, return_counts=True)
        members = np.flatnonzero(labels == values[sizes.argmax()])
        distances = ((points[members] - points[members].mean(axis=0)) ** 2).sum(axis=1)
        labels[members[distances.argmax()]] = unused
    return labels
