"""k-means of all starts side by side against one start after another, one centre after another: the same to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from fp_server.pruning import kmeans
from fp_server.pruning.kmeans import ITERATIONS, RESTARTS, best_partition, split_largest


def twin(points: np.ndarray, k: int, rng: np.random.Generator, largest: int) -> np.ndarray:
    best: tuple[float, np.ndarray] | None = None
    lacking: tuple[float, np.ndarray] | None = None
    for _ in range(RESTARTS):
        inertia, labels = one_start(points, first_centres(points, k, rng), largest)
        if len(set(labels.tolist())) == k:
            if best is None or inertia < best[0] * (1 - 1e-9):
                best = inertia, labels
        elif lacking is None or inertia < lacking[0] * (1 - 1e-9):
            lacking = inertia, labels
    return best[1] if best is not None else split_largest(points, lacking[1], k)  # type: ignore[index]


def first_centres(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    centres = [points[rng.integers(len(points))]]
    nearest = ((points - centres[0]) ** 2).sum(axis=1)
    for _ in range(k - 1):
        edges = np.cumsum(nearest)
        chosen = min(int(np.searchsorted(edges, rng.random() * edges[-1], side="right")), len(points) - 1)
        centres.append(points[chosen])
        nearest = np.minimum(nearest, ((points - points[chosen]) ** 2).sum(axis=1))
    return np.stack(centres)


def one_start(points: np.ndarray, centres: np.ndarray, largest: int) -> tuple[float, np.ndarray]:
    def distances() -> np.ndarray:
        return np.stack([((points - centre) ** 2).sum(axis=1) for centre in centres], axis=1)

    labels = nearest(distances(), largest)
    for _ in range(ITERATIONS):
        for label in set(labels.tolist()):
            centres[label] = points[labels == label].mean(axis=0)
        if np.array_equal(moved := nearest(distances(), largest), labels):
            break
        labels = moved
    return float(distances()[np.arange(len(points)), labels].sum()), labels


def nearest(distances: np.ndarray, largest: int) -> np.ndarray:
    free = distances.argmin(axis=1)
    if max(free.tolist().count(label) for label in range(distances.shape[1])) <= largest:
        return free
    return scipy.optimize.linear_sum_assignment(np.repeat(distances, largest, axis=1))[1] // largest


@pytest.mark.parametrize("elements", [1, 3000, 1 << 20])
def test_all_starts_side_by_side_are_one_after_another(elements, monkeypatch):
    """Points at random, on a grid (which ties), and on top of each other; groups of any size, and of like size."""
    monkeypatch.setattr(kmeans, "ELEMENTS", elements)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(2, 26))
        points = rng.standard_normal((count, int(rng.integers(1, 10))))
        if seed % 3:
            points = np.round(points) if seed % 3 == 1 else points[rng.integers(0, max(1, count // 3), count)]
        k = int(rng.integers(1, count + 1))
        for largest in (count, -(-count // k)):
            one, other = np.random.default_rng(seed), np.random.default_rng(seed)
            assert best_partition(points, k, one, largest).tolist() == twin(points, k, other, largest).tolist(), (seed, largest)
            assert one.random() == other.random(), "and has drawn as much"
