"""FDLO: which units behave alike (paper §3.2, Eq. 2).

    D = diag(S·1),  Lap = D − S,  Lap v = λ v
    F = the eigenvectors of the k smallest non-zero eigenvalues, row i = unit i
    {G_1 … G_k} = k-means(F, k)

k-means is our own few lines: the partition must be the same for the same seed whatever scipy is
installed, and never have an empty group. Even groups (ours) bound their size: on real models Eq. 2 tends
to cut single units off and leave one large group, of which a single unit is ever drawn.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.optimize

Eigenvectors = Literal["k", "k-1"]
GroupSizes = Literal["free", "even"]
Groups = tuple[tuple[int, ...], ...]
Float64 = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]

RESTARTS = 64
"""Independent k-means++ starts; the partition of least inertia wins."""
ITERATIONS = 100
"""Lloyd steps at most in one start; a few dozen points settle in about ten."""


def group_count(units: int, capacity: int) -> int:
    """k: how many groups `units` units are put in for a device that holds `capacity` of them.

    Raises ValueError when either is below 1.
    """
    if units < 1 or capacity < 1:
        raise ValueError(f"can't group {units} units for a device that holds {capacity}: both must be at least 1")
    return min(units, capacity)


def group(
    similarity: npt.NDArray[np.floating],
    k: int,
    rng: np.random.Generator,
    eigenvectors: Eigenvectors = "k",
    sizes: GroupSizes = "free",
) -> Groups:
    """Put the units in k groups that behave alike (Eq. 2).

    `similarity`: (U, U), symmetrised here. `eigenvectors`: the paper's k, or k−1 (which is what separates
    k planted groups, as the constant vector is the k-th). `sizes`: "free" is the paper's; "even" lets no
    group have more than ⌈U/k⌉ units. Returns k disjoint, non-empty groups of 0-based
    units that cover all U, each sorted, ordered by smallest member; the same for the same generator state.
    Raises ValueError when the matrix is not square or not finite, or k is outside 1..U.
    """
    s = _checked(similarity)
    units = len(s)
    if not 1 <= k <= units:
        raise ValueError(f"can't make {k} groups of {units} units: k must lie in 1..{units}")
    if eigenvectors not in ("k", "k-1"):
        raise ValueError(f"eigenvectors is {eigenvectors!r}: expected 'k' or 'k-1'")
    if sizes not in ("free", "even"):
        raise ValueError(f"sizes is {sizes!r}: expected 'free' or 'even'")
    if k == 1:
        return (tuple(range(units)),)
    if k == units:
        return tuple((unit,) for unit in range(units))
    points = spectral_points(s, k if eigenvectors == "k" else k - 1)
    labels = _best_partition(points, k, rng, -(-units // k) if sizes == "even" else units)
    members = [tuple(np.flatnonzero(labels == label).tolist()) for label in range(k)]
    return tuple(sorted(members))


def spectral_points(similarity: Float64, count: int) -> Float64:
    """F of Eq. 2: (U, count), the eigenvectors of the `count` smallest non-zero eigenvalues.

    Only the constant vector counts as zero. It is moved to the far end of the spectrum instead of being
    looked for: a similarity matrix of several blocks has more zero eigenvalues, and those vectors are kept.
    """
    units = len(similarity)
    laplacian = np.diag(similarity.sum(axis=1)) - similarity
    # Lap·1 = 0 exactly, so adding a multiple of 1·1ᵀ changes no other eigenvector.
    beyond = 2.0 * float(np.abs(laplacian).sum(axis=1).max()) + 1.0
    laplacian += beyond / units
    _, vectors = scipy.linalg.eigh(laplacian, subset_by_index=(0, count - 1))
    return _fixed_signs(np.asarray(vectors, dtype=np.float64))


def _checked(similarity: npt.NDArray[np.floating]) -> Float64:
    s = np.asarray(similarity, dtype=np.float64)
    if s.ndim != 2 or s.shape[0] != s.shape[1] or s.shape[0] == 0:
        raise ValueError(f"the similarity matrix has shape {s.shape}: expected (U, U)")
    if not np.isfinite(s).all():
        row, column = np.argwhere(~np.isfinite(s))[0].tolist()
        raise ValueError(f"the similarity of units {row + 1} and {column + 1} is {s[row, column]}: must be finite")
    return (s + s.T) / 2.0


def _fixed_signs(vectors: Float64) -> Float64:
    """Each column with its largest entry positive: LAPACK is free to choose the sign."""
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    return vectors * signs


def _best_partition(points: Float64, k: int, rng: np.random.Generator, largest: int) -> Labels:
    """The labels 0..k−1 of least inertia over the restarts, every label used, none by more than `largest`."""
    best: tuple[float, Labels] | None = None
    lacking: tuple[float, Labels] | None = None
    for _ in range(RESTARTS):
        inertia, labels = _lloyd(points, _plus_plus(points, k, rng), largest)
        if len(np.unique(labels)) == k:
            # The margin keeps rounding from choosing between two starts that found the same partition.
            if best is None or inertia < best[0] * (1 - 1e-9):
                best = inertia, labels
        elif lacking is None or inertia < lacking[0] * (1 - 1e-9):
            lacking = inertia, labels
    if best is not None:
        return best[1]
    assert lacking is not None
    return split_largest(points, lacking[1], k)


def _plus_plus(points: Float64, k: int, rng: np.random.Generator) -> Float64:
    """k-means++ (Arthur and Vassilvitskii 2007): each centre drawn in proportion to its squared distance."""
    centres = [points[rng.integers(len(points))]]
    nearest = ((points - centres[0]) ** 2).sum(axis=1)
    for _ in range(k - 1):
        edges = np.cumsum(nearest)
        # With all points on a centre already, any will do; the empty group that follows is mended later.
        chosen = min(int(np.searchsorted(edges, rng.random() * edges[-1], side="right")), len(points) - 1)
        centres.append(points[chosen])
        nearest = np.minimum(nearest, ((points - points[chosen]) ** 2).sum(axis=1))
    return np.stack(centres)


def _lloyd(points: Float64, centres: Float64, largest: int) -> tuple[float, Labels]:
    """Lloyd's iteration from given centres until the labels stand still. Returns (inertia, labels)."""
    distances = _squared_distances(points, centres)
    labels = _assign(distances, largest)
    for _ in range(ITERATIONS):
        order = np.argsort(labels, kind="stable")
        used, begins, sizes = np.unique(labels[order], return_index=True, return_counts=True)
        centres[used] = np.add.reduceat(points[order], begins, axis=0) / sizes[:, None]
        distances = _squared_distances(points, centres)
        moved = _assign(distances, largest)
        if np.array_equal(moved, labels):
            break
        labels = moved
    return float(distances[np.arange(len(points)), labels].sum()), labels


def _assign(distances: Float64, largest: int) -> Labels:
    """Each point's centre: the nearest, or the choice of least sum when a centre takes at most `largest` points.

    `distances`: (U, k). The bounded form is k-means with size constraints (Bradley, Bennett and Demiriz 2000), solved as an
    assignment of points to `largest` seats at each centre.
    """
    nearest: Labels = distances.argmin(axis=1)
    if np.bincount(nearest).max() <= largest:
        return nearest
    _, seats = scipy.optimize.linear_sum_assignment(np.repeat(distances, largest, axis=1))
    return np.asarray(seats // largest, dtype=np.intp)


def _squared_distances(points: Float64, centres: Float64) -> Float64:
    """(U, k)."""
    squared: Float64 = ((points[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)
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
