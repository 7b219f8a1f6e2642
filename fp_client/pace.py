"""How long a training step will take, from what a device measured of one layer. Torch-free.

A step's matrix products are linear in the rows, so a layer's times for a few rows give those of a step. Components share a
layer's time by their weights. `step_seconds` is what `UpdateMetrics.step_seconds` measures: one step, without what a
round does once before its first (`prepare_seconds`). What a device announces and a run limits is both, shared out over the
round's steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.types import Gradient, Part, Quantization, TrainSpec
from fp_client.memory import Held, Setting, StreamPlan, layer_bytes
from fp_client.memory_stream import spilled
from fp_client.shapes import Shape


@dataclass(frozen=True)
class Pace:
    """Seconds of one layer for `rows` rows of a typical length, measured warm."""

    rows: int
    forward: float
    backward: float
    """Recomputation and backward, without a gradient for any weight."""
    forward_lora: float
    backward_lora: float
    """The same with trainable LoRA."""
    read: float
    """Reading a layer's weights."""
    loss: float
    """The head's loss and its gradient, the head in memory."""
    head_read: float
    """Reading the whole head."""
    optimizer: float
    """AdamW on one layer's LoRA."""


def step_seconds(
    shape: Shape,
    setting: Setting,
    spec: TrainSpec,
    pace: Pace,
    held: Held,
    micro_batch: int,
    checkpointing: bool,
    plan: StreamPlan,
    low: int = 0,
    gaps: int = 0,
) -> float:
    """One step in the mode of `spec.gradient` (not AUTO). `low`: the lowest assigned layer; `gaps`: pruned runs (stitched).

    In memory: Σ kept (forward + backward) + loss + AdamW; without checkpointing the recomputation is saved. Streamed:
    Σ from `low` up, assigned or not, and reading twice what does not stay (hidden behind computing when read ahead), the
    head in blocks twice a micro-batch, and what is spilled, written and read once at the speed of reading a layer.
    """
    passes = spec.batch_size / pace.rows
    kept = sum(count * _share(shape, part) for part, count in held)
    update = kept * pace.optimizer
    if spec.gradient is not Gradient.STREAMED:
        backward = pace.backward_lora - (0.0 if checkpointing else pace.forward_lora)
        seconds = passes * (kept * (pace.forward_lora + backward) + pace.loss) + update
        return seconds + _moving(shape, setting, pace, spilled(shape, setting, spec, plan, low, gaps).changes / spec.steps)
    layers = shape.layers - low
    assigned = min(1.0, kept / layers)
    forward = passes * (pace.forward + assigned * (pace.forward_lora - pace.forward))
    backward = passes * (pace.backward + assigned * (pace.backward_lora - pace.backward))
    stay = min(plan.resident, layers)
    seconds = stay * (forward + backward) + (layers - stay) * sum(
        max(work, pace.read) if plan.ahead else work + pace.read for work in (forward, backward)
    )
    seconds += passes * pace.loss * (1.0 if plan.head else 1.5)
    seconds += 0.0 if plan.head else 2 * pace.head_read * -(-spec.batch_size // micro_batch)
    disk = spilled(shape, setting, spec, plan, low)
    return seconds + update + _moving(shape, setting, pace, 2 * disk.boundaries + disk.prefix / spec.steps)


def prepare_seconds(
    shape: Shape, setting: Setting, spec: TrainSpec, pace: Pace, plan: StreamPlan, low: int = 0, gaps: int = 0
) -> float:
    """What a round does once: the prefix below `low` (streamed), or the anchor pass over all layers (stitched). What of the
    rows' states is spilled is written once, and read and written again at every layer."""
    work = spec.steps * spec.batch_size / pace.rows * pace.forward
    count = {Gradient.STREAMED: low, Gradient.STITCHED: shape.layers if gaps else 0}.get(spec.gradient, 0)
    disk = spilled(shape, setting, spec, plan, low, gaps)
    moved = 2 * count * (disk.prefix + disk.flowing) + disk.changes
    return count * (max(work, pace.read) if plan.ahead else work + pace.read) + _moving(shape, setting, pace, moved)


def _share(shape: Shape, part: Part) -> float:
    """A component's share of its layer's time."""
    exact = Setting(Quantization.NONE)
    return layer_bytes(shape, exact, part) / layer_bytes(shape, exact)


def _moving(shape: Shape, setting: Setting, pace: Pace, size: float) -> float:
    """Bytes to or from disk, at the speed of reading a layer."""
    return size * pace.read / layer_bytes(shape, setting)
