"""FDLO: which units behave alike (paper §3.2, Eq. 2).

    D = diag(S·1),  Lap = D − S,  Lap v = λ v
    F = the eigenvectors of the k smallest non-zero eigenvalues, row i = unit i
    {G_1 … G_k} = k-means(F, k)

k-means is our own few lines (`fp_server.pruning.kmeans`): the partition must be the same for the same seed whatever scipy
is installed, and never have an empty group. Even groups (ours) bound their size: on real models Eq. 2 tends
to cut single units off and leave one large group, of which a single unit is ever drawn.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg

from fp_server.pruning.kmeans import best_partition

Eigenvectors = Literal["k", "k-1"]
GroupSizes = Literal["free", "even"]
Groups = tuple[tuple[int, ...], ...]
Float64 = npt.NDArray[np.float64]


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
    labels = best_partition(points, k, rng, -(-units // k) if sizes == "even" else units)
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
