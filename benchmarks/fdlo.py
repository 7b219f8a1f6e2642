"""FDLO on planted partitions: the adjusted Rand index with the paper's k eigenvectors and with k−1.

    python benchmarks/fdlo.py [seeds]

30 units in 12 contiguous blocks of random sizes; similarity 0.9 inside a block, 0.3 across, noise 0.03.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from fp_server.pruning.grouping import Eigenvectors, Groups, group

UNITS, K = 30, 12


def planted(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A similarity matrix and its units' true block."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, UNITS), K - 1, replace=False))
    labels = np.searchsorted(cuts, np.arange(UNITS), side="right")
    s = np.where(labels[:, None] == labels[None, :], 0.9, 0.3) + rng.normal(0, 0.03, (UNITS, UNITS))
    s = np.clip((s + s.T) / 2, 0.01, 1.0)
    np.fill_diagonal(s, 1.0)
    return s, labels


def adjusted_rand(truth: np.ndarray, groups: Groups) -> float:
    """Hubert and Arabie 1985."""
    table = np.array([np.bincount(truth[list(members)], minlength=K) for members in groups])

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    rows, columns, total = pairs(table.sum(axis=1)), pairs(table.sum(axis=0)), UNITS * (UNITS - 1) / 2
    expected = rows * columns / total
    return (pairs(table) - expected) / ((rows + columns) / 2 - expected)


def main() -> None:
    """Print the figures."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    print(f"{UNITS} units, {K} planted blocks, {seeds} seeds")
    choices: tuple[Eigenvectors, ...] = ("k-1", "k")
    for eigenvectors in choices:
        start = time.perf_counter()
        scores = []
        for seed in range(seeds):
            s, truth = planted(seed)
            scores.append(adjusted_rand(truth, group(s, K, np.random.default_rng(seed), eigenvectors)))
        seconds = (time.perf_counter() - start) / seeds
        exact = sum(score == 1.0 for score in scores)
        print(
            f"{eigenvectors:4} eigenvectors: ARI mean {np.mean(scores):.3f}, least {min(scores):.3f}, "
            f"exact in {exact}/{seeds}, {1000 * seconds:.1f} ms each"
        )


if __name__ == "__main__":
    main()
