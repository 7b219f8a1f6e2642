"""Stacking: ΔW of one module and its holders' LoRA into the next ΔW (paper Eq. 5).

⊕ of Eq. 5 stacks A by rows and B by columns. The weight w_n and LoRA's own scale α/r are folded into
B alone, so that  B_cat @ A_cat == Σ_n w_n (α_n / r_n) B_n A_n  whatever the ranks. Once the summed rank
reaches min(d_in, d_out) factors would be larger than the matrix, and the same sum is formed densely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import blas

from common.types import FloatArray, LoraBlock
from fp_server.lowrank import Delta, Dense, Factored

ENTRY = 1e15
"""The largest |x| of a device's A, B and (α/r)·B that is stacked. No honest one comes near, and nothing written can overflow:
a stacked B is at most this (w ≤ 1), a product in float64 at most rank · 10³⁰, and the ledger itself at most
`validation.REPRESENTABLE` a round in norm, which a million rounds don't take to float32's 3·10³⁸. Nor does anything vanish that
counts: what denormals lose of an entry of w·(α/r)·B is below 10⁻⁴⁵, and of the product this times as much."""
STRIP_ROWS = 64
"""Rows of a dense sum worked on at once: a strip stays in the cache while a holder's product is added to it."""


@dataclass(frozen=True)
class Holder:
    """One device that kept a module in this round: what it counts, and how to read its block."""

    device: str
    weight: float
    """w_n of Eq. 5, normalised over the holders."""
    scale: float
    """α_n / r_n, from the assignment."""
    rank: int
    """r_n, from the assignment; the block must have it."""
    read: Callable[[], LoraBlock]


@dataclass(frozen=True)
class _Term:
    """scale · b @ a, read only when its turn comes."""

    rank: int
    scale: float
    read: Callable[[], tuple[FloatArray, FloatArray]]


def too_large(factor: str, tensor: FloatArray, scale: float) -> str:
    """What is wrong with one factor ("A" or "B") of a device's update where an entry is above `ENTRY`, or not finite."""
    limit = ENTRY / max(1.0, scale) if factor == "B" else ENTRY
    with np.errstate(invalid="ignore"):  # of NaNs, which fail every comparison
        if max(-tensor.min(initial=0.0), tensor.max(initial=0.0)) <= limit:
            return ""
        place = tuple(np.argwhere(~(np.abs(tensor) <= limit))[0].tolist())
    if not np.isfinite(value := float(tensor[place])):
        return f"holds {value} at {list(place)}: every value must be finite"
    return f"holds {value:.4g} at {list(place)}, at most {limit:.4g} counts"


def update_fresh(delta: Delta, holders: Sequence[Holder]) -> Delta:
    """ΔW ← ΔW + Σ_n w_n (α_n/r_n) B_n A_n: each device trained a new LoRA on top of W_0 + ΔW.

    No holders: the very same `delta` comes back. Raises ValueError when the weights do not sum to 1, a device stands
    twice, or a block has another rank or shape than announced.
    """
    if not holders:
        return delta
    return _add(delta, [_term(holder, delta.shape) for holder in _ordered(holders)])


def update_global(delta: Delta, given: Factored, holders: Sequence[Holder]) -> Delta:
    """ΔW ← ΔW + Σ_n w_n ((α_n/r_n) B_n A_n − top_n): each device continued the top part of ΔW.

    `given`: the broadcast factors of this module, bit for bit what the devices received; top_n is their first r_n
    components (all of them when there are fewer). As Σ w_n = 1, this is the residual ΔW − top counted once, plus
    the continued parts. No holders: the very same `delta` comes back. Raises as `update_fresh`.
    """
    if not holders:
        return delta
    if given.shape != delta.shape:
        raise ValueError(f"the broadcast factors have shape {given.shape}, the ledger {delta.shape}")
    ordered = _ordered(holders)
    # Component i was given to the devices with r_n > i, so it is taken back with their summed weight.
    used = given.first(max(holder.rank for holder in ordered))
    shares = np.array([sum(h.weight for h in ordered if h.rank > i) for i in range(used.rank)])
    back = np.asarray(used.b * shares, dtype=np.float32)
    terms = [_term(holder, delta.shape) for holder in ordered]
    if used.rank:
        terms.insert(0, _Term(used.rank, -1.0, lambda: (back, used.a)))
    return _add(delta, terms)


def next_rank(rank: int | None, shape: tuple[int, int], ranks: Sequence[int], taken_back: int = 0) -> int | None:
    """The rank of the next ledger without computing it; None is dense.

    `rank`: of the ledger now (None when dense); `ranks`: of the holders; `taken_back`: components of the broadcast
    that `update_global` subtracts.
    """
    if rank is None:
        return None
    total = rank + sum(ranks) + taken_back
    return total if total < min(shape) else None


def _ordered(holders: Sequence[Holder]) -> list[Holder]:
    """By device id, checked."""
    ordered = sorted(holders, key=lambda holder: holder.device)
    if len({holder.device for holder in ordered}) != len(ordered):
        raise ValueError("a device stands twice among the holders of a module")
    if abs(sum(holder.weight for holder in ordered) - 1.0) > 1e-9:
        raise ValueError("the holders' weights do not sum to 1")
    return ordered


def _term(holder: Holder, shape: tuple[int, int]) -> _Term:
    def read() -> tuple[FloatArray, FloatArray]:
        block = holder.read()
        wanted = (shape[0], holder.rank), (holder.rank, shape[1])
        if (block.b.shape, block.a.shape) != wanted:
            raise ValueError(f"device {holder.device!r}: B {block.b.shape} and A {block.a.shape}, expected {wanted}")
        return block.b, block.a

    return _Term(holder.rank, holder.weight * holder.scale, read)


def _add(delta: Delta, terms: Sequence[_Term]) -> Delta:
    """ΔW + Σ terms, stacked or dense as the summed rank asks."""
    rank = next_rank(delta.rank if isinstance(delta, Factored) else None, delta.shape, [t.rank for t in terms])
    if rank is None or isinstance(delta, Dense):
        return _accumulated(delta, terms)
    return _stacked(delta, terms, rank)


def _stacked(delta: Factored, terms: Sequence[_Term], rank: int) -> Factored:
    """Factors side by side: A by rows, B by columns with the scale folded in."""
    d_out, d_in = delta.shape
    a, b = np.empty((rank, d_in), np.float32), np.empty((d_out, rank), np.float32)
    a[: delta.rank], b[:, : delta.rank] = delta.a, delta.b
    at = delta.rank
    for term in terms:
        b_n, a_n = term.read()
        a[at : at + term.rank] = a_n
        b[:, at : at + term.rank] = b_n.astype(np.float64) * term.scale
        at += term.rank
    return Factored(a, b)


def _accumulated(delta: Delta, terms: Sequence[_Term]) -> Dense:
    """The dense sum in float64, in the order of the terms, each read once.

    The accumulator is a list of row strips, each freed as soon as it is rounded: beside `delta` at most
    three times the dense float32 size is held (twice for float64, or one old and one new copy while rounding).
    """
    d_out, d_in = delta.shape
    starts = range(0, d_out, STRIP_ROWS)
    strips: list[npt.NDArray[np.float64]] = []
    if isinstance(delta, Dense):
        strips += [delta.w[start : start + STRIP_ROWS].astype(np.float64) for start in starts]
    else:
        strips += [np.zeros((min(STRIP_ROWS, d_out - start), d_in)) for start in starts]
        _add_product(strips, delta.b, delta.a, 1.0)
    for term in terms:
        b_n, a_n = term.read()
        _add_product(strips, b_n, a_n, term.scale)
        del b_n, a_n
    return Dense(_rounded(strips, d_in))


def _add_product(strips: Sequence[npt.NDArray[np.float64]], b: FloatArray, a: FloatArray, scale: float) -> None:
    """strips += scale · b @ a, in place."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    for index, strip in enumerate(strips):
        rows = b64[index * STRIP_ROWS : (index + 1) * STRIP_ROWS]
        # BLAS adds into c only when it is column-major: the transpose of a row-major strip is.
        added = blas.dgemm(scale, a64.T, rows.T, beta=1.0, c=strip.T, overwrite_c=1)
        assert np.shares_memory(added, strip)


def _rounded(strips: list[npt.NDArray[np.float64]], d_in: int) -> FloatArray:
    """The strips as one float32 matrix; `strips` is emptied on the way."""

    def drain() -> Iterator[FloatArray]:
        strips.reverse()
        while strips:
            yield strips.pop().astype(np.float32)

    return np.concatenate(list(drain()))
