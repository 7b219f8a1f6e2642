"""A device's submodel (paper §3.1 step 4): the drawn layers of the model, the others replaced by nothing at all.

Kept layers stay at their original index, so that each keeps the attention pattern, the rotary choice and the
position in the stack that the family gives that index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.errors import ProtocolError
from common.types import LoraBlock, Part, TrainSpec, UnitId
from fp_client.adapter import attach_ledger, by_layer, extract, initial, inject, linear
from fp_client.families import backbone, logit_softcap
from fp_client.loader import RowEmbedding, UnitLoader
from fp_client.loss import chunked_loss, response_positions

Batch = dict[str, torch.Tensor]
"""input_ids, attention_mask, labels: (B, T) int64, right-padded."""


class Pruned(nn.Module):
    """A pruned decoder layer: the identity on the residual stream, without a parameter (paper §3.1).

    The place where a surrogate for the gap would stand.
    """

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The residual stream (B, T, d), untouched."""
        return hidden_states


@dataclass
class Submodel:
    """Kept layers with LoRA on them, embedding by rows and a resident head."""

    model: Any
    """The Hugging Face model; its forward is the family's own."""
    kept: dict[int, nn.Module]
    """Layer index -> module."""
    head: torch.Tensor
    """(V, d) in the compute dtype."""
    softcap: float | None
    spec: TrainSpec
    trainable: list[nn.Parameter]
    device: torch.device
    backbone_name: str

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """(summed response-token loss, fp32 scalar with gradient; number of response tokens).

        The padding mask is not passed on: padding is on the right and attention is causal, so no real token sees it,
        and the mask of every row need not be held.
        """
        ids, labels = (batch[name].to(self.device) for name in ("input_ids", "labels"))
        states = self.model.get_submodule(self.backbone_name)(input_ids=ids, use_cache=False).last_hidden_state
        hidden, targets = response_positions(states, labels)
        return chunked_loss(hidden, self.head, targets, self.softcap), targets.numel()

    def blocks(self) -> list[LoraBlock]:
        """The LoRA factors by global layer index and module, sorted."""
        return [block for index in sorted(self.kept) for block in extract(self.kept[index], index, self.spec.targets)]


def load_submodel(
    loader: UnitLoader,
    units: Sequence[UnitId],
    spec: TrainSpec,
    adapter: Iterable[LoraBlock] = (),
    checkpointing: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Submodel:
    """Load the drawn units, and only their tensors, with ΔW frozen on them and trainable LoRA on the targets.

    `adapter`: the broadcast ΔW blocks (those of other layers are ignored). Raises ProtocolError for units that are not
    layers of this model or modules it does not have, ModelError for a damaged checkpoint.
    """
    indices = [unit.layer for unit in units]
    model = loader.model()
    layers = loader.layers(model)
    for unit in units:
        if unit.part is not Part.LAYER:
            raise ProtocolError(f"unit {unit.label}: this client prunes whole layers, not components")
        if not 0 <= unit.layer < len(layers):
            raise ProtocolError(f"unit {unit.label}: the model has {len(layers)} layers")
    if not indices or len(set(indices)) != len(indices):
        raise ProtocolError("an assignment must list at least one unit, and each only once")
    ledger = by_layer(adapter)
    trainable: list[nn.Parameter] = []
    kept: dict[int, nn.Module] = {}
    for index in range(len(layers)):
        if index not in indices:
            layers[index] = Pruned()
            continue
        layer = kept[index] = layers[index]
        loader.materialise(layer, index)
        trainable += _adapt(layer, index, spec, ledger.get(index, []), loader.device)
        if progress is not None:
            progress("load", len(kept), len(indices))
    if checkpointing:
        for layer in kept.values():
            _checkpoint(layer)
    head = loader.head()
    embedding = backbone(model, loader.family).get_submodule(loader.family.embedding)
    if loader.checkpoint.tied and isinstance(embedding, RowEmbedding):
        embedding.resident = head
    softcap = logit_softcap(model.config)
    return Submodel(model, kept, head, softcap, spec, trainable, loader.device, loader.family.backbone)


def _checkpoint(layer: Any) -> None:
    # What the model-wide switch of transformers sets on each of its layers, non-reentrant (its input needs no gradient).
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _adapt(
    layer: nn.Module, index: int, spec: TrainSpec, ledger: Sequence[LoraBlock], device: torch.device
) -> list[nn.Parameter]:
    broadcast = {block.module: block for block in ledger}
    frozen = [block for block in ledger if block.module not in spec.targets]
    starts = []
    for module in sorted(spec.targets):
        target = linear(layer, index, module)
        start = initial(spec, index, module, target.out_features, target.in_features, broadcast.get(module))
        starts.append(start.trainable)
        if start.frozen is not None:
            frozen.append(start.frozen)
    attach_ledger(layer, index, frozen, device)
    return inject(layer, spec, starts, device)
