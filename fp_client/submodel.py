"""A device's submodel (paper §3.1 step 4): the drawn units of the model, the others replaced by nothing at all,
or, stitched, by an anchor that adds what the full model adds over the whole gap (`anchor`).

Kept layers stay at their original index, so that each keeps the attention pattern, the rotary choice and the
position in the stack that the family gives that index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.types import LoraBlock, Part, TrainSpec, UnitId
from fp_client.adapter import attach_ledger, by_layer, extract, initial, inject, linear, residual
from fp_client.batches import Batch, micro_batches
from fp_client.families import backbone, logit_softcap, prune_component
from fp_client.loader import RowEmbedding, UnitLoader
from fp_client.loss import chunked_loss, response_positions
from fp_client.messages import OnProgress
from fp_client.units import Gap, Kept, keep


class Pruned(nn.Module):
    """A pruned decoder layer: the identity on the residual stream, without a parameter (paper §3.1)."""

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The residual stream (B, T, d), untouched."""
        return hidden_states


class Stitched(nn.Module):
    """A place in the stack with the anchors of the gaps that end before it or begin after it."""

    def __init__(self, before: nn.Module | None, layer: nn.Module, after: nn.Module | None) -> None:
        super().__init__()
        self.before, self.layer, self.after = before, layer, after

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The residual stream (B, T, d) through the gap before, the layer, and the gap after it."""
        if self.before is not None:
            hidden_states = self.before(hidden_states)
        hidden_states = self.layer(hidden_states, *args, **kwargs)
        return hidden_states if self.after is None else self.after(hidden_states)


@dataclass
class Submodel:
    """Kept units with LoRA on them, embedding by rows and a resident head."""

    model: Any
    """The Hugging Face model; its forward is the family's own."""
    kept: dict[int, nn.Module]
    """Layer index -> module."""
    targets: dict[int, tuple[str, ...]]
    """Layer index -> the modules that LoRA is on."""
    head: torch.Tensor
    """(V, d) in the compute dtype."""
    softcap: float | None
    spec: TrainSpec
    trainable: list[nn.Parameter]
    device: torch.device
    backbone_name: str
    progress: OnProgress | None = None

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """(summed response-token loss, fp32 scalar with gradient; number of response tokens).

        The padding mask is not passed on: padding is on the right and attention is causal, so no real token sees it,
        and the mask of every row need not be held.
        """
        ids, labels = (batch[name].to(self.device) for name in ("input_ids", "labels"))
        states = self.model.get_submodule(self.backbone_name)(input_ids=ids, use_cache=False).last_hidden_state
        hidden, targets = response_positions(states, labels)
        return chunked_loss(hidden, self.head, targets, self.softcap), targets.numel()

    @property
    def marks(self) -> int:
        """Progress of a step: its rows."""
        return self.spec.batch_size

    def passed(self, step: int, rows: int) -> None:
        """Report that so many rows of a step are done."""
        if self.progress is not None:
            self.progress("train", step * self.marks + min(rows, self.marks), self.spec.steps * self.marks)

    def begin(self, batches: Sequence[Batch], micro_batch: int) -> None:
        """Nothing to prepare: what a step needs is in memory."""

    def gradients(
        self, step: int, batch: Batch, micro_batch: int, counted: int, before: Callable[[int], None] = lambda j: None
    ) -> float:
        """Add the gradient of the mean over `counted` response tokens to the LoRA factors; returns the summed loss.

        `before`: called with the place of each micro-batch in the step, before it runs.
        """
        total, rows = 0.0, 0
        for j, part in enumerate(micro_batches(batch, micro_batch)):
            before(j)
            loss, found = self.loss(part)
            if found:
                (loss / counted).backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            del loss
            self.passed(step, rows := rows + len(part["labels"]))
        return total

    def blocks(self) -> list[LoraBlock]:
        """The LoRA factors by global layer index and module, sorted."""
        return [block for index in sorted(self.kept) for block in extract(self.kept[index], index, self.targets[index])]


def load_submodel(
    loader: UnitLoader,
    units: Sequence[UnitId],
    spec: TrainSpec,
    adapter: Iterable[LoraBlock] = (),
    checkpointing: bool = True,
    progress: OnProgress | None = None,
    anchors: Mapping[Gap, nn.Module] | None = None,
) -> Submodel:
    """Load the drawn units, and only their tensors, with ΔW frozen on them and trainable LoRA on the targets.

    `adapter`: the broadcast ΔW blocks (those of other units are ignored). `anchors`: what stands in each gap
    (`units.gaps`); without them a gap is an identity. Raises ProtocolError for units or modules that this model does
    not have, ModelError for a damaged checkpoint.
    """
    model = loader.model()
    layers = loader.layers(model)
    assigned = keep(units, len(layers), spec.targets)
    stitches = {gap.start: anchor for gap, anchor in (anchors or {}).items()}
    ledger = by_layer(adapter)
    trainable: list[nn.Parameter] = []
    kept: dict[int, nn.Module] = {}
    for index in range(len(layers)):
        layer: nn.Module = Pruned()
        if index in assigned:
            layer = kept[index] = layers[index]
            prune(layer, loader, assigned[index])
            loader.materialise(layer, index)
            trainable += adapt(layer, index, assigned[index], spec, ledger.get(index, []), loader.device)
            if checkpointing:
                _checkpoint(layer)
            if progress is not None:
                progress("load", len(kept), len(assigned))
        before, after = stitches.get(2 * index), stitches.get(2 * index + 1)
        layers[index] = layer if before is None and after is None else Stitched(before, layer, after)
    head = loader.head()
    embedding = backbone(model, loader.family).get_submodule(loader.family.embedding)
    if loader.checkpoint.tied and isinstance(embedding, RowEmbedding):
        embedding.resident = head
    softcap = logit_softcap(model.config)
    targets = {index: here.targets for index, here in assigned.items()}
    return Submodel(model, kept, targets, head, softcap, spec, trainable, loader.device, loader.family.backbone, progress)


def _checkpoint(layer: Any) -> None:
    # What the model-wide switch of transformers sets on each of its layers, non-reentrant (its input needs no gradient).
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def prune(layer: nn.Module, loader: UnitLoader, kept: Kept) -> None:
    """Take out of a kept layer the component that was not drawn."""
    for part in (Part.ATTENTION, Part.FFN):
        if part not in kept.parts:
            prune_component(layer, loader.family, part)


def adapt(
    layer: nn.Module, index: int, kept: Kept, spec: TrainSpec, ledger: Sequence[LoraBlock], device: torch.device
) -> list[nn.Parameter]:
    """ΔW and trainable LoRA on one materialised layer; returns the parameters to train. Blocks of a component that the
    layer no longer has are ignored."""
    present = [block for block in ledger if kept.has(block.module)]
    starts = starting(layer, index, kept, spec, present)
    attach_ledger(layer, index, frozen(kept, spec, present), device)
    return inject(layer, spec, starts, device)


def starting(layer: nn.Module, index: int, kept: Kept, spec: TrainSpec, ledger: Sequence[LoraBlock]) -> list[LoraBlock]:
    """Where the trainable factors of a layer begin."""
    broadcast = {block.module: block for block in ledger}
    out = []
    for module in kept.targets:
        target = linear(layer, index, module)
        out.append(initial(spec, index, module, target.out_features, target.in_features, broadcast.get(module)).trainable)
    return out


def frozen(kept: Kept | None, spec: TrainSpec, ledger: Sequence[LoraBlock]) -> list[LoraBlock]:
    """What of a layer's broadcast stays frozen: all of it, but for the part that `global` goes on training."""
    targets = kept.targets if kept is not None else ()
    return [residual(spec, block) if block.module in targets else block for block in ledger]
