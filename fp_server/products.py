"""Norms and inner products of low-rank products B·A, from their factors; no product is formed.

⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), the sum over the entries of B₁ᵀB₂ times those of A₁A₂ᵀ. All arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

AT_ONCE = 16
"""Products whose factors are in memory at once, twice: memory does not grow with the number of devices."""


@dataclass(frozen=True)
class Product:
    """b @ a. `a`: (R, d_in), `b`: (d_out, R)."""

    a: npt.NDArray[np.floating[Any]]
    b: npt.NDArray[np.floating[Any]]


def moved(scale: float, trained: Product, start: Product) -> Product:
    """scale·B·A − start, float64, the factors side by side: its rank is the sum of both."""
    a = np.concatenate([trained.a, start.a], dtype=np.float64)
    return Product(a, np.concatenate([scale * trained.b.astype(np.float64), -start.b.astype(np.float64)], axis=1))


def norm(product: Product) -> float:
    """‖B·A‖ (Frobenius) = √tr((BᵀB)(AAᵀ))."""
    a, b = product.a.astype(np.float64), product.b.astype(np.float64)
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def inner_products(count: int, read: Callable[[int], Product]) -> Float64:
    """(n, n): ⟨Dᵢ, Dⱼ⟩ of n products of one shape and any ranks from 1 on. `read` gives one by its index, as often as asked."""
    found = np.zeros((count, count))
    blocks = [range(begin, min(begin + AT_ONCE, count)) for begin in range(0, count, AT_ONCE)]
    for i, rows in enumerate(blocks):
        left = _Stack([read(index) for index in rows])
        for columns in blocks[i:]:
            right = left if columns is rows else _Stack([read(index) for index in columns])
            entries = (left.b.T @ right.b) * (left.a @ right.a.T)
            sums = np.add.reduceat(np.add.reduceat(entries, left.begins, axis=0), right.begins, axis=1)
            found[rows.start : rows.stop, columns.start : columns.stop] = sums
            found[columns.start : columns.stop, rows.start : rows.stop] = sums.T
    return found


class _Stack:
    """Several products' factors side by side; `begins`: where each one's components begin."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.a: Float64 = np.concatenate([p.a for p in products], dtype=np.float64)
        self.b: Float64 = np.concatenate([p.b for p in products], axis=1, dtype=np.float64)
        self.begins = np.cumsum([0, *(len(p.a) for p in products[:-1])])
