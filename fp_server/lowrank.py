"""One module's ledger ΔW, as low-rank factors or dense, and its truncated singular value decomposition.

Nothing here forms the dense product of factors. All arithmetic is float64; what comes out is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from common.types import FloatArray

Float64 = npt.NDArray[np.float64]

NOISE = 1e-7
"""Singular values below this part of the largest are rounding of float32, not signal."""
STRIP = 1 << 17
"""Elements of a dense ledger converted to float64 at a time (1 MiB)."""


@dataclass(frozen=True)
class Factored:
    """ΔW = b @ a. `a`: (R, d_in), `b`: (d_out, R), float32; R = 0 is ΔW = 0."""

    a: FloatArray
    b: FloatArray

    @property
    def rank(self) -> int:
        """The number of columns of b; ΔW's own rank may be lower."""
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.b), self.a.shape[1]

    def first(self, rank: int) -> Factored:
        """The first `rank` components, or all when there are fewer."""
        return Factored(self.a[:rank], self.b[:, :rank])


@dataclass(frozen=True)
class Dense:
    """ΔW itself. `w`: (d_out, d_in), float32."""

    w: FloatArray

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.w.shape[0], self.w.shape[1]


Delta = Factored | Dense


def empty(d_out: int, d_in: int) -> Factored:
    """ΔW = 0."""
    return Factored(np.empty((0, d_in), np.float32), np.empty((d_out, 0), np.float32))


def recompress(delta: Delta, rank: int) -> tuple[Factored, float]:
    """The best approximation of ΔW of at most `rank`, and the part of its energy that this drops.

    With ΔW = U S Vᵀ the result is b = U·S, a = Vᵀ, components by falling singular value, the largest entry
    of each row of a positive: the first r components are the best approximation of rank r, so that a
    device which continues r of them slices. Fewer components come back when ΔW has fewer. Energy is the
    squared Frobenius norm; the part dropped is ‖ΔW − b·a‖² / ‖ΔW‖², 0 for ΔW = 0. Raises ValueError for rank < 1.
    """
    if rank < 1:
        raise ValueError(f"can't recompress to rank {rank}: at least 1")
    if isinstance(delta, Dense):
        return _leading(delta, rank)
    u, s, vt = _factored_svd(delta)
    return _pack(u, s, vt, rank), _tail(s, rank)


def split_top(delta: Delta, rank: int, broadcast_rank: int) -> tuple[Factored, Factored]:
    """What a device of LoRA rank `rank` continues and what it keeps frozen, of the broadcast part of ΔW.

    Together they are `recompress(delta, broadcast_rank)`, bit for bit; each may have fewer components than asked.
    """
    whole, _ = recompress(delta, broadcast_rank)
    return whole.first(rank), Factored(whole.a[rank:], whole.b[:, rank:])


def lossless(delta: Delta) -> Factored:
    """Factors of ΔW to float32 rounding, without the components that are nothing but rounding.

    Given factors come back as they are when none of them is redundant. For a dense ΔW this is a full
    decomposition: its result may be larger than ΔW.
    """
    if isinstance(delta, Factored):
        u, s, vt = _factored_svd(delta)
    else:
        u, s, vt = scipy.linalg.svd(delta.w.astype(np.float64), full_matrices=False, overwrite_a=True, check_finite=False)
    rank = _numerical_rank(s)
    if isinstance(delta, Factored) and rank == delta.rank:
        return delta
    return _pack(u, s, vt, rank)


def _numerical_rank(s: Float64) -> int:
    """The fewest components whose dropped tail is below float32 rounding of the whole, in Frobenius norm."""
    tails = np.sqrt(np.cumsum((s**2)[::-1])[::-1])  # tails[i] = norm of components i, i+1, …
    return int((tails > np.finfo(np.float32).eps * tails[0]).sum()) if len(s) and tails[0] > 0 else 0


def _factored_svd(delta: Factored) -> tuple[Float64, Float64, Float64]:
    """The thin SVD of b @ a from two QR decompositions and the SVD of a small (≤R, ≤R) matrix."""
    qb, rb = scipy.linalg.qr(delta.b.astype(np.float64), mode="economic", overwrite_a=True, check_finite=False)
    qa, ra = scipy.linalg.qr(delta.a.T.astype(np.float64), mode="economic", overwrite_a=True, check_finite=False)
    u, s, vt = scipy.linalg.svd(rb @ ra.T, full_matrices=False, overwrite_a=True, check_finite=False)
    return qb @ u, s, vt @ qa.T


def _pack(u: Float64, s: Float64, vt: Float64, rank: int) -> Factored:
    """Float32 factors of the first `rank` components that are more than noise, signs fixed."""
    kept = min(rank, int((s > NOISE * s[0]).sum()) if len(s) else 0)
    a = vt[:kept]
    signs = np.where(a[np.arange(kept), np.abs(a).argmax(axis=1)] < 0, -1.0, 1.0) if kept else np.ones(0)
    return Factored(
        np.ascontiguousarray(a * signs[:, None], dtype=np.float32),
        np.ascontiguousarray(u[:, :kept] * (s[:kept] * signs), dtype=np.float32),
    )


def _tail(s: Float64, rank: int) -> float:
    """Σ_{i ≥ rank} s_i² / Σ s_i²."""
    total = float((s**2).sum())
    return float((s[rank:] ** 2).sum()) / total if total > 0 else 0.0


def _strips(w: FloatArray) -> Iterator[tuple[slice, Float64]]:
    """Row strips of a matrix in float64."""
    step = max(1, STRIP // w.shape[1])
    for start in range(0, len(w), step):
        rows = slice(start, start + step)
        yield rows, w[rows].astype(np.float64)


def _leading(delta: Dense, rank: int) -> tuple[Factored, float]:
    """The leading components of a dense ΔW, from the eigenvectors of its smaller Gram matrix.

    Beside ΔW a few float64 matrices of min(d_out, d_in)² are held, and the components. Squaring costs half of
    float64's digits, which is still float32's: ΔW has no more.
    """
    w, (d_out, d_in) = delta.w, delta.shape
    tall = d_out > d_in
    small = min(d_out, d_in)
    rank = min(rank, small)
    gram = np.zeros((small, small))  # WᵀW when tall, else WWᵀ
    # Strips run along the longer side, so that each adds its own product to the whole Gram matrix.
    for _, strip in _strips(w if tall else w.T):
        gram += strip.T @ strip
    energy = float(np.trace(gram))
    if energy == 0.0:
        return empty(d_out, d_in), 0.0
    _, vectors = scipy.linalg.eigh(gram, subset_by_index=(small - rank, small - 1), overwrite_a=True, check_finite=False)
    del gram
    vectors = np.ascontiguousarray(vectors[:, ::-1])  # (small, rank), largest first
    # Projecting ΔW itself makes singular values and dropped energy exact for these vectors.
    projected = np.empty((max(d_out, d_in), rank))
    for rows, strip in _strips(w if tall else w.T):
        projected[rows] = strip @ vectors
    s = np.sqrt((projected**2).sum(axis=0))
    order = np.argsort(-s, kind="stable")
    s, vectors, projected = s[order], vectors[:, order], projected[:, order]
    unit = projected / np.where(s > 0, s, 1.0)
    packed = _pack(unit, s, vectors.T, rank) if tall else _pack(vectors, s, unit.T, rank)
    kept = float((s[: packed.rank] ** 2).sum())
    return packed, max(0.0, 1.0 - kept / energy)
