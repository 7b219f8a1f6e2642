"""What the streamed modes hold at their worst moment: the full model's gradient, and a stitched submodel. Torch-free.

As in `fp_client.memory`: bytes above the warmed footprint, one `Estimate` a moment, the formulas follow the code
(`fp_client.stream`, `fp_client.anchor`). R = rows of a round, B = rows of a step, L = layers, b = lowest assigned layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.types import Gradient, Part, TrainSpec, UnitId, unit_modules
from fp_client.memory import (
    EAGER,
    HEAD_ROWS,
    MIB,
    OVERHEAD_UNIT,
    Activations,
    Estimate,
    Held,
    Kept,
    Setting,
    StreamPlan,
    activations,
    batch_bytes,
    layer_bytes,
    ledger_bytes,
    logits_bytes,
    lora_bytes,
    quantizing,
    reading,
    train_peak,
    worst,
)
from fp_client.shapes import Shape

OVERHEAD_STREAM = 2 * MIB
"""Modules of all layers without weights, the reading thread, the heap between layers that come and go."""
LENGTHS = 8
"""Row lengths whose masks and positions are kept (`fp_client.stream.LENGTHS`)."""


@dataclass(frozen=True)
class Streamed:
    """What a streamed round trains. `low`: the lowest layer with an assigned unit; layers below it only run forward."""

    held: Held
    low: int
    micro_batch: int


def boundary_total(shape: Shape, setting: Setting, spec: TrainSpec, low: int) -> int:
    """Activations between forward and backward of a step: the input of each layer that is differentiated."""
    return (shape.layers - low) * _rows(shape, setting, spec, spec.batch_size)


def prefix_total(shape: Shape, setting: Setting, spec: TrainSpec, low: int) -> int:
    """The prefix's output for all rows of a round."""
    return _rows(shape, setting, spec, spec.steps * spec.batch_size) if low else 0


def change_total(shape: Shape, setting: Setting, spec: TrainSpec, gaps: int) -> int:
    """What a stitched round's anchor pass keeps at its fullest: each gap's change, the stream, and its state at a
    gap's start, for all rows of the round."""
    return (gaps + 2) * _rows(shape, setting, spec, spec.steps * spec.batch_size) if gaps else 0


def _rows(shape: Shape, setting: Setting, spec: TrainSpec, rows: int) -> int:
    """The residual stream of so many rows."""
    return rows * spec.sequence_length * shape.hidden * setting.itemsize


def _shelf(memory: int, total: int) -> int:
    """What a `Spill` holds in memory."""
    return total if memory < 0 else min(memory, total)


@dataclass(frozen=True)
class Spilled:
    """Bytes on disk. Streamed: `boundaries` of a step, `prefix` of a round. Stitched: `flowing`, the rows' states on their
    way through the anchor pass, and `changes`, what is left of it for the round's steps."""

    boundaries: int = 0
    prefix: int = 0
    flowing: int = 0
    changes: int = 0
    most: int = 0
    """At the fullest moment: what the file takes."""


def spilled(shape: Shape, setting: Setting, spec: TrainSpec, plan: StreamPlan, low: int = 0, gaps: int = 0) -> Spilled:
    """What of a round's activations `plan` leaves to the disk, in the mode of `spec.gradient` (a submodel: nothing)."""
    piece = _rows(shape, setting, spec, spec.batch_size)

    def beyond(memory: int, total: int) -> int:
        # A tensor is in memory or on disk as a whole: up to one of them finds no place in what is left of the memory.
        return 0 if memory < 0 or total <= memory else min(total, total - memory + piece)

    if spec.gradient is Gradient.STREAMED:
        boundaries = beyond(plan.boundary_bytes, boundary_total(shape, setting, spec, low))
        prefix = beyond(plan.prefix_bytes, prefix_total(shape, setting, spec, low))
        return Spilled(boundaries, prefix, most=boundaries + prefix)
    if spec.gradient is Gradient.STITCHED and gaps:
        memory, rows = plan.boundary_bytes, spec.steps * piece
        most = beyond(memory, change_total(shape, setting, spec, gaps))
        return Spilled(flowing=beyond(memory, rows), changes=beyond(memory, gaps * rows), most=most)
    return Spilled()


def _positions(shape: Shape, setting: Setting, spec: TrainSpec) -> int:
    """Cosines and sines, and the masks, for each of the lengths that are kept: where attention is materialised one of the
    compute dtype for windowed and one for whole attention, whatever the window; else one of bytes where it is windowed.

    Whole windows are the longest: a batch has no more lengths than rows.
    """
    t = spec.sequence_length
    masks = 2 * t * t * setting.itemsize if shape.family in EAGER else t * t if 0 < shape.window < t else 0
    one = 2 * t * shape.head_dim * setting.itemsize + masks
    return min(LENGTHS, spec.steps * spec.batch_size) * one


def streamed_peak(
    shape: Shape, setting: Setting, spec: TrainSpec, broadcast_rank: int, streamed: Streamed, plan: StreamPlan
) -> Estimate:
    """The worst moment of a streamed round. LoRA, gradients and AdamW's moments are the assigned units' alone."""
    s, low, top = setting.itemsize, streamed.low, shape.layers
    n = streamed.micro_batch * spec.sequence_length
    acts = [_act(shape, setting, spec, n, broadcast_rank, part) for part in streamed.held.kinds]
    boundary, flowing = acts[0].boundary, _rows(shape, setting, spec, spec.batch_size)
    layer, ledger = layer_bytes(shape, setting), ledger_bytes(shape, spec, broadcast_rank)
    lora = sum(count * lora_bytes(shape, spec, part) for part, count in streamed.held)
    head = ("head", shape.head * s if plan.head else 0)
    base = (
        ("LoRA", lora),
        ("batches", batch_bytes(spec)),
        ("overhead", setting.overhead + OVERHEAD_STREAM + streamed.held.layers * OVERHEAD_UNIT),
        ("positions", _positions(shape, setting, spec)),
    )
    trained = (head, *base, ("gradients", lora), ("optimizer", 2 * lora))
    prefix = ("prefix", _shelf(plan.prefix_bytes, prefix_total(shape, setting, spec, low)))
    coming = reading(shape, setting) if plan.ahead else 0
    read, made = max(reading(shape, setting), coming), quantizing(shape, setting)

    def weights(layers: int) -> tuple[tuple[str, int], tuple[str, int]]:
        return ("weights", layers * layer), ("ledger", layers * ledger)

    def shelf(layers: int) -> tuple[str, int]:
        return "boundaries", _shelf(plan.boundary_bytes, layers * flowing)

    resident = min(plan.resident, top - low)
    moments = [
        Estimate("loading", (head, *base, *weights(1), ("reading", read), ("start", 3 * lora_bytes(shape, spec)))),
        Estimate("quantizing", (*trained, prefix, shelf(top - low), ("flowing", flowing), ("quantizing", made))),
        Estimate(
            "loss",
            (
                *trained, prefix, *weights(max(1, resident)), shelf(top - low), ("flowing", flowing),
                *_loss(shape, setting, n, boundary, plan.head),
            ),
        ),
    ]  # fmt: skip
    if low:
        held = (head, *base, prefix, *weights(1 + plan.ahead), ("reading", read))
        moments.append(Estimate("prefix", (*held, ("layer", boundary + max(act.forward for act in acts)))))
    inner = max(max(act.recompute, act.backward) for act in acts)
    # The layers around the lowest resident one, where boundaries and layers in memory trade places.
    for index in {top - 1, *(max(low, top - resident - back) for back in range(4)), low} - {top}:
        forward, backward = (_in_memory(plan, resident, low, top, index, step) for step in (1, -1))
        moments += [
            Estimate("forward", (*trained, prefix, *weights(forward), shelf(index + 1 - low), ("flowing", flowing),
                                 ("reading", read), ("layer", max(act.forward for act in acts)))),
            Estimate("backward", (*trained, prefix, *weights(backward), shelf(index + 1 - low), ("flowing", flowing),
                                  ("reading", read), ("layer", boundary + inner))),
        ]  # fmt: skip
    return worst(moments)


def _act(shape: Shape, setting: Setting, spec: TrainSpec, tokens: int, broadcast_rank: int, part: Part) -> Activations:
    """All of a layer runs, but only the assigned part's LoRA keeps its inputs."""
    spec = replace(spec, targets=unit_modules(UnitId(0, part), spec.targets))
    return activations(shape, setting, spec, tokens, broadcast_rank > 0)


def _in_memory(plan: StreamPlan, resident: int, low: int, top: int, index: int, step: int) -> int:
    """Layers whose weights are there while layer `index` runs on the way up (`step` 1) or down (−1)."""
    following = index + step
    stays = range(top - resident, top)
    ahead = plan.ahead and low <= following < top and following not in stays
    return resident + (index not in stays) + ahead


def _loss(shape: Shape, setting: Setting, tokens: int, boundary: int, head: bool) -> tuple[tuple[str, int], ...]:
    """Final states, and logits of a chunk of positions or of a block of the vocabulary."""
    if head:
        return ("final states", 4 * boundary), ("logits", logits_bytes(setting, tokens, shape.vocab))
    rows = min(HEAD_ROWS, shape.vocab)
    block = rows * shape.hidden * setting.itemsize + reading(shape, setting)
    fp32 = 2 * tokens * shape.hidden * 4  # the gradient, and a chunk's share of it
    return ("final states", 4 * boundary + fp32), ("head block", block), ("logits", logits_bytes(setting, tokens, rows))


def stitched_peak(
    shape: Shape, setting: Setting, spec: TrainSpec, broadcast_rank: int, kept: Kept, gaps: int, plan: StreamPlan
) -> Estimate:
    """The worst moment of a stitched round: the full model's forward pass over all rows of the round, which leaves each
    gap's change behind, then the submodel's training with them."""
    n = kept.micro_batch * spec.sequence_length
    act = activations(shape, setting, spec, n, broadcast_rank > 0)
    passing = _shelf(plan.boundary_bytes, change_total(shape, setting, spec, gaps))
    changes = _rows(shape, setting, spec, gaps * spec.steps * spec.batch_size)
    kept_changes = _shelf(plan.boundary_bytes, changes)
    positions = ("positions", _positions(shape, setting, spec))
    base = (
        ("batches", batch_bytes(spec)),
        ("overhead", setting.overhead + OVERHEAD_STREAM),
        positions,
        ("changes", passing),
    )
    held = 1 + plan.ahead
    moments = []
    if gaps:
        moments = [
            Estimate("anchor: quantizing", (*base, ("quantizing", quantizing(shape, setting)))),
            Estimate(
                "anchor: forward",
                (
                    *base, ("weights", held * layer_bytes(shape, setting)),
                    ("ledger", held * ledger_bytes(shape, spec, broadcast_rank)),
                    ("reading", reading(shape, setting)), ("layer", 3 * act.boundary + act.forward),
                ),
            ),
        ]  # fmt: skip
    trained = train_peak(shape, setting, spec, broadcast_rank, kept)
    back = min(gaps * act.boundary, changes - kept_changes)
    rows = (*trained.rows, ("changes", kept_changes), ("read back", back), positions, ("stream", OVERHEAD_STREAM if gaps else 0))
    return worst((Estimate(trained.moment, rows), *moments))
