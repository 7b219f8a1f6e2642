"""Anchored stitching: a submodel whose pruned gaps add what the full model adds there, for each token of the round.

At the start of a round the full model W_0 + ΔW runs forward once over the round's rows, one layer in memory at a time,
and for each gap what it adds to the residual stream is kept, token by token (in memory while it fits, then on disk). In
training a gap adds just that. So at the first step every kept unit sees exactly the states it sees in the full model,
and the loss is the full model's; only the gaps' share in the backward pass is left out. Weights are read once a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from common.types import LoraBlock, Part, TrainSpec, UnitId
from fp_client.batches import Batch, micro_batches
from fp_client.families import without_component
from fp_client.loader import UnitLoader
from fp_client.memory import StreamPlan
from fp_client.messages import OnProgress
from fp_client.spill import Spill
from fp_client.stream import FullModel
from fp_client.submodel import Submodel, load_submodel
from fp_client.units import gaps, keep

Row = tuple[int, int]
"""A micro-batch of the round: step, and place in the step."""


class Anchor(nn.Module):
    """Stands in a gap: adds the full model's change over it, for the micro-batch under way."""

    def __init__(self) -> None:
        super().__init__()
        self.change: torch.Tensor | None = None
        """(B, T, d), set before each micro-batch."""

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The residual stream (B, T, d) after the gap."""
        assert self.change is not None, "the change over the gap was not set"
        return hidden_states + self.change


class Anchored:
    """A `Trainer`: the submodel with anchored gaps."""

    def __init__(
        self,
        loader: UnitLoader,
        units: Sequence[UnitId],
        spec: TrainSpec,
        adapter: Mapping[int, Sequence[LoraBlock]],
        plan: StreamPlan,
        scratch: Path,
        checkpointing: bool = True,
        progress: OnProgress | None = None,
    ) -> None:
        """`adapter`: the broadcast ΔW of every layer. `plan.boundary_bytes`: of the changes, in memory.

        Raises ProtocolError for units or modules the model does not have; ModelError for a damaged checkpoint comes
        from `begin`, which loads.
        """
        self._loader, self._units, self._spec, self._adapter, self._plan = loader, tuple(units), spec, adapter, plan
        self._checkpointing, self._progress = checkpointing, progress
        self._kept = keep(units, loader.checkpoint.layers, spec.targets)
        self._anchors = {gap: Anchor() for gap in gaps(units, loader.checkpoint.layers)}
        self._starting = {gap.start for gap in self._anchors}
        self._ending = {gap.stop: gap for gap in self._anchors}
        self._changes = Spill(plan.boundary_bytes, scratch, loader.device)
        self._submodel: Submodel | None = None

    @property
    def submodel(self) -> Submodel:
        """The loaded submodel; `begin` loads it."""
        assert self._submodel is not None, "begin comes first"
        return self._submodel

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The LoRA factors to train."""
        return self.submodel.trainable

    @property
    def marks(self) -> int:
        """Progress of a step: its rows."""
        return self._spec.batch_size

    def begin(self, batches: Sequence[Batch], micro_batch: int) -> None:
        """One forward pass of the full model over the round's rows, then the submodel is loaded."""
        self._changes.close()
        parts = {
            (step, j): part for step, batch in enumerate(batches) for j, part in enumerate(micro_batches(batch, micro_batch))
        }
        layers = -(-max(self._ending, default=0) // 2)
        self._pass(parts, layers)
        if self._submodel is None:
            blocks = (block for layer in sorted(self._kept) for block in self._adapter.get(layer, ()))
            self._submodel = load_submodel(
                self._loader, self._units, self._spec, blocks, self._checkpointing,
                self._going_on(layers * len(parts)), self._anchors,
            )  # fmt: skip

    def _going_on(self, before: int) -> OnProgress | None:
        """Progress of the submodel, whose loading goes on counting where the pass over the full model ended."""
        if (progress := self._progress) is None:
            return None

        def told(phase: str, done: int, total: int) -> None:
            more = before if phase == "load" else 0
            progress(phase, done + more, total + more)

        return told

    @torch.no_grad()
    def _pass(self, parts: Mapping[Row, Batch], total: int) -> None:
        """The full model's first `total` layers over all rows. Nothing of it is left but the changes."""
        full = FullModel(self._loader, self._adapter, self._plan, head=False)
        try:
            self._flow(full, parts, total)
        finally:
            full.close()

    def _flow(self, full: FullModel, parts: Mapping[Row, Batch], total: int) -> None:
        for index in range(total):
            layer = full.layers.acquire(index, index + 1 if index + 1 < total else None)
            middle = 2 * index + 1
            halves = (Part.FFN, Part.ATTENTION) if middle in self._starting or middle in self._ending else (None,)
            for number, (key, part) in enumerate(parts.items()):
                if index == 0:
                    hidden = full.embedded(part)
                    self._edge(0, key, hidden)
                else:
                    hidden = self._changes.take(key)
                for pruned in halves:
                    with without_component(layer, self._loader.family, pruned) if pruned is not None else nullcontext():
                        hidden = full.run(layer, index, hidden)
                    if pruned is Part.FFN:
                        self._edge(middle, key, hidden)
                self._edge(2 * index + 2, key, hidden)
                if index + 1 < total:
                    self._changes.put(key, hidden)
                if self._progress is not None:
                    done = index * len(parts) + number + 1
                    self._progress("load", done, total * len(parts) + len(self._kept))

    def _edge(self, position: int, key: Row, hidden: torch.Tensor) -> None:
        """At a position on the residual stream of some rows: a gap may end here, and one may begin."""
        if (gap := self._ending.get(position)) is not None:
            self._changes.put((gap, *key), hidden - self._changes.take(("entered", *key)))
        if position in self._starting:
            self._changes.put(("entered", *key), hidden)

    def gradients(self, step: int, batch: Batch, micro_batch: int, counted: int) -> float:
        """Add the stitched submodel's gradient of the mean over `counted` response tokens; returns the summed loss."""

        def drop() -> None:
            for anchor in self._anchors.values():
                anchor.change = None

        def before(j: int) -> None:
            drop()  # the last micro-batch's changes, before this one's are read
            for gap, anchor in self._anchors.items():
                anchor.change = self._changes.get((gap, step, j))

        total = self.submodel.gradients(step, batch, micro_batch, counted, before)
        drop()
        return total

    def blocks(self) -> list[LoraBlock]:
        """The LoRA factors by global layer index and module, sorted."""
        return self.submodel.blocks()

    def close(self) -> None:
        """Give the submodel and the changes back."""
        self._submodel = None
        self._changes.close()
