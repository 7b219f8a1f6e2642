"""The fastest way to train given units within a budget: what is recomputed, read again, or spilled. Torch-free.

What is fastest, in this order: larger micro-batches, a head that stays, the next layer read ahead, layers that stay, activations
that stay in memory. None of it changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from common.types import Gradient, TrainSpec
from fp_client.memory import Estimate, Held, Kept, Setting, StreamPlan, train_peak
from fp_client.memory_stream import Streamed, boundary_total, change_total, prefix_total, stitched_peak, streamed_peak
from fp_client.shapes import Shape

LEAST = StreamPlan(resident=0, ahead=False, head=False, boundary_bytes=0, prefix_bytes=0)
"""The stream that holds the least."""


_STEP = 1 << 16
"""How finely memory for activations is shared out, in bytes."""


@dataclass(frozen=True)
class Problem:
    """What does not change while a plan is looked for. `spec.gradient` is one of the three modes."""

    shape: Shape
    setting: Setting
    spec: TrainSpec
    broadcast_rank: int

    def peak(self, held: Held, micro_batch: int, checkpointing: bool, gaps: int, low: int, stream: StreamPlan) -> Estimate:
        """The worst moment of a round. `gaps`: pruned runs (stitched); `low`: the lowest assigned layer (streamed)."""
        shape, setting, spec, rank = self.shape, self.setting, self.spec, self.broadcast_rank
        if spec.gradient is Gradient.STREAMED:
            return streamed_peak(shape, setting, spec, rank, Streamed(held, low, micro_batch), stream)
        kept = Kept(held, micro_batch, checkpointing)
        if spec.gradient is Gradient.STITCHED:
            return stitched_peak(shape, setting, spec, rank, kept, gaps, stream)
        return train_peak(shape, setting, spec, rank, kept)

    def smallest(self, held: Held, micro_batch: int, gaps: int, low: int = 0) -> Estimate:
        """With everything given up for memory."""
        return self.peak(held, micro_batch, True, gaps, low, LEAST)


@dataclass(frozen=True)
class Fit:
    """A way to train that fits."""

    micro_batch: int
    checkpointing: bool
    stream: StreamPlan
    estimate: Estimate


def fit(
    problem: Problem,
    held: Held,
    gaps: int,
    low: int,
    micro: tuple[int, ...],
    budget: int,
    checkpointing: tuple[bool, ...] = (False, True),
) -> Fit | None:
    """The fastest within `budget` bytes (0: no bound), or None. `micro`: the micro-batches allowed, best first; `checkpointing`
    the same, the last of them taken unless an earlier one fits."""

    def estimate(rows: int, recompute: bool, stream: StreamPlan) -> Estimate:
        return problem.peak(held, rows, recompute, gaps, low, stream)

    def fits(one: Estimate) -> bool:
        return not budget or one.peak <= budget

    rows = next((rows for rows in micro if fits(estimate(rows, checkpointing[-1], LEAST))), None)
    if rows is None:
        return None
    mode = problem.spec.gradient
    if mode is Gradient.STREAMED:
        recompute = True
        stream = _streaming(problem, low, budget, lambda stream: estimate(rows, True, stream))
    else:
        recompute = next(choice for choice in checkpointing if fits(estimate(rows, choice, LEAST)))
        stream = LEAST
        if mode is Gradient.STITCHED:
            total = change_total(problem.shape, problem.setting, problem.spec, gaps)
            stream = _first(budget, lambda s: estimate(rows, recompute, s), stream, replace(stream, ahead=True))
            boundaries = partial(_boundaries, stream)
            stream = _filled(budget, lambda s: estimate(rows, recompute, s), boundaries, total)
    return Fit(rows, recompute, stream, estimate(rows, recompute, stream))


Peak = Callable[[StreamPlan], Estimate]


def _streaming(problem: Problem, low: int, budget: int, peak: Peak) -> StreamPlan:
    layers = problem.shape.layers - low
    stream = _first(budget, peak, LEAST, replace(LEAST, head=True))
    stream = _first(budget, peak, stream, replace(stream, ahead=True))
    stream = _first(budget, peak, stream, *(replace(stream, resident=count) for count in range(layers, 0, -1)))
    totals = [total(problem.shape, problem.setting, problem.spec, low) for total in (boundary_total, prefix_total)]
    stream = _filled(budget, peak, partial(_boundaries, stream), totals[0])
    return _filled(budget, peak, partial(_prefix, stream), totals[1])


def _boundaries(stream: StreamPlan, size: int) -> StreamPlan:
    return replace(stream, boundary_bytes=size)


def _prefix(stream: StreamPlan, size: int) -> StreamPlan:
    return replace(stream, prefix_bytes=size)


def _first(budget: int, peak: Peak, otherwise: StreamPlan, *better: StreamPlan) -> StreamPlan:
    """The first that fits."""
    return next((stream for stream in better if not budget or peak(stream).peak <= budget), otherwise)


def _filled(budget: int, peak: Peak, sized: Callable[[int], StreamPlan], total: int) -> StreamPlan:
    """As much of `total` bytes in memory as the budget leaves room for; −1 where all of it fits."""
    if not budget or peak(sized(-1)).peak <= budget:
        return sized(-1)
    low, high = 0, total
    while high - low > _STEP:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(sized(middle)).peak <= budget else (low, middle)
    return sized(low)
