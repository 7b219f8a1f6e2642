"""Norms and inner products of low-rank products B·A, from their factors; no product is formed.

⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), the sum over the entries of B₁ᵀB₂ times those of A₁A₂ᵀ. All arithmetic is float64.

Factors are reduced first, so that A has orthonormal rows. From factors as they come, the same formula squares their condition:
two columns that cancel to a part in 10⁸ (one float32 ulp) leave nothing of a norm, though the product is there. Reduced, what
cancels has cancelled within B, and the error is a few eps of Σ‖b_k‖‖a_k‖ (`Product.spread`), which is bounded at the push.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

Float64 = npt.NDArray[np.float64]

AT_ONCE = 16
"""Products whose factors are in memory at once, twice: memory does not grow with the number of devices."""


@dataclass(frozen=True)
class Product:
    """b @ a. `a`: (R, d_in), `b`: (d_out, R)."""

    a: npt.NDArray[np.floating[Any]]
    b: npt.NDArray[np.floating[Any]]

    @property
    def spread(self) -> float:
        """Σ‖b_k‖‖a_k‖ over the components: at least ‖B·A‖; what rounding, in whatever precision, is a part of."""
        a = np.einsum("kj,kj->k", self.a, self.a, dtype=np.float64)
        b = np.einsum("ik,ik->k", self.b, self.b, dtype=np.float64)
        return float(np.sqrt(b) @ np.sqrt(a))


@dataclass(frozen=True)
class Reduced(Product):
    """The same product with orthonormal rows in `a`, float64; at most d_in components."""

    @property
    def norm(self) -> float:
        """‖B·A‖ (Frobenius), which is ‖B‖."""
        return float(np.linalg.norm(self.b))


def reduced(product: Product) -> Reduced:
    """With A = RᵀQᵀ (QR of Aᵀ), B·A = (B·Rᵀ)·Qᵀ."""
    q, r = scipy.linalg.qr(product.a.T.astype(np.float64), mode="economic", overwrite_a=True, check_finite=False)
    return Reduced(q.T, product.b.astype(np.float64) @ r.T)


def moved(scale: float, trained: Product, start: Product) -> Reduced:
    """scale·B·A − start: the factors side by side, reduced."""
    a = np.concatenate([trained.a, start.a], dtype=np.float64)
    return reduced(Product(a, np.concatenate([scale * trained.b.astype(np.float64), -start.b.astype(np.float64)], axis=1)))


def inner_products(count: int, read: Callable[[int], Reduced]) -> Float64:
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

    def __init__(self, products: Sequence[Reduced]) -> None:
        self.a: Float64 = np.concatenate([p.a for p in products], dtype=np.float64)
        self.b: Float64 = np.concatenate([p.b for p in products], axis=1, dtype=np.float64)
        self.begins = np.cumsum([0, *(len(p.a) for p in products[:-1])])
