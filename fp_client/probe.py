"""The streamed probe: one batch through the FULL model, one unit in memory at a time (paper §3.1 steps 1–2).

The Hugging Face model's own forward runs; each decoder layer is wrapped to bring in its weights, pass all rows
through it a few at a time, and drop them. So weights are read once a pass, and what stays is the residual stream
of the rows and the Gram matrices. The same pass gives the full model's loss on the held-out rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import DataError
from common.types import FloatArray, LoraBlock, Part, ProbeSpec
from fp_client.adapter import attach_ledger
from fp_client.batches import Batch
from fp_client.families import backbone, logit_softcap, without_component
from fp_client.loader import UnitLoader
from fp_client.loss import response_positions, streamed_loss
from fp_client.messages import OnProgress
from fp_client.similarity import CkaAccumulator, sample_positions, split
from fp_client.template import IGNORE

NORM_ROWS = 1024
"""Token states normed at a time before the head."""


@dataclass(frozen=True)
class ProbeResult:
    """`similarity` (U, U) and `in_out` (U,), empty when not asked for; mean `loss` over `tokens` held-out response
    tokens, NaN when there are none."""

    similarity: FloatArray
    in_out: FloatArray
    loss: float
    tokens: int
    seconds: float


def stack_rows(batches: Sequence[Batch]) -> Batch:
    """Batches of different lengths as one right-padded batch (rows, T)."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def pad(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return nn.functional.pad(tensor, (0, longest - tensor.shape[1]), value=value)

    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    return {name: torch.cat([pad(batch[name], value) for batch in batches]) for name, value in fill.items()}


class _Streamed(nn.Module):
    """A decoder layer whose weights exist only while it runs."""

    def __init__(self, layer: nn.Module, index: int, run: _Run) -> None:
        super().__init__()
        self.layer, self.index, self.run = layer, index, run

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take all rows of the run through the layer, in place; what the family passes along is for one row and is
        broadcast. `hidden_states` (1, T, d) only stands for them and is returned as it came."""
        run, states = self.run, self.run.states
        if self.index == 0:
            run.see(states)
        run.loader.materialise(self.layer, self.index)
        attach_ledger(self.layer, self.index, run.adapter.get(self.index, ()), run.loader.device)
        # Components one after the other are the layer, bit for bit: each half adds to the residual stream alone.
        for pruned in (Part.FFN, Part.ATTENTION) if run.components else (None,):
            with without_component(self.layer, run.loader.family, pruned) if pruned is not None else nullcontext():
                for start in range(0, states.shape[0], run.micro_rows):
                    part = states[start : start + run.micro_rows]
                    part.copy_(self.layer(part, *args, **kwargs))
            if pruned is Part.FFN:
                run.see(states)
        run.loader.release(self.layer)
        run.see(states)
        run.step(self.index)
        return hidden_states


@dataclass
class _Run:
    """One pass of rows through the model, and what it leaves behind."""

    loader: UnitLoader
    adapter: Mapping[int, Sequence[LoraBlock]]
    micro_rows: int
    progress: OnProgress | None
    passes: int
    layers: int
    components: bool
    """Whether the units are components: the stream is then seen between a layer's attention and its feed-forward too."""
    done: int = 0
    cka: CkaAccumulator | None = None
    """Takes the states (n, d) at the sampled positions, from h_0 on."""
    where: torch.Tensor | None = None
    states: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """(rows, T, d): the residual stream of all rows of the pass."""

    def see(self, hidden: torch.Tensor) -> None:
        """Record a residual stream at the sampled positions."""
        if self.where is not None and self.cka is not None:
            self.cka.add(hidden[self.where[:, 0].to(hidden.device), self.where[:, 1].to(hidden.device)])

    def step(self, index: int) -> None:
        """Report one layer of one pass."""
        if self.progress is not None:
            self.progress("probe", self.done * self.layers + index + 1, self.passes * self.layers)


def probe(
    loader: UnitLoader,
    batch: Batch | None,
    heldout: Sequence[Batch],
    spec: ProbeSpec,
    adapter: Mapping[int, Sequence[LoraBlock]] | None = None,
    *,
    similarity: bool = True,
    micro_rows: int = 4,
    pass_rows: int = 64,
    progress: OnProgress | None = None,
) -> ProbeResult:
    """Similarities of the full model W_0 + ΔW on `batch`, and its mean response-token loss on `heldout`.

    `adapter`: broadcast ΔW by layer. `micro_rows`: rows inside a layer at once; `pass_rows`: rows whose residual
    streams are held at once (at least the batch's); both change memory and speed, not results beyond rounding.
    Raises DataError when there is nothing to measure.
    """
    if (similarity and batch is None) or (not similarity and not heldout):
        raise DataError("the probe has no rows to measure")
    begin = time.monotonic()
    first = [batch] if similarity and batch is not None else []
    passes = _plan_passes(first, heldout, max(pass_rows, 1))
    model = loader.model()
    layers = loader.layers(model)
    components = spec.part is not Part.LAYER
    run = _Run(loader, adapter or {}, max(micro_rows, 1), progress, len(passes), len(layers), components)
    for index in range(len(layers)):
        layers[index] = _Streamed(layers[index], index, run)
    stack = backbone(model, loader.family)
    norm = stack.get_submodule(loader.family.norm)
    setattr(stack, loader.family.norm, nn.Identity())  # normed below, only where a response is predicted
    if first:
        run.where = sample_positions(first[0]["attention_mask"], spec.positions, spec.sample, spec.seed)
        run.cka = CkaAccumulator(len(layers) * (2 if components else 1) + 1, len(run.where), spec.kernel, spec.sample)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for number, rows in enumerate(passes):
            skip = first[0]["input_ids"].shape[0] if number == 0 and first else 0
            summed, count = _pass(run, stack, norm, stack_rows(rows), skip, logit_softcap(model.config))
            total, tokens, run.done, run.where = total + summed, tokens + count, number + 1, None
    matrix, in_out = np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
    if run.cka is not None:
        matrix, in_out = split(run.cka.matrix())
    loss = total / tokens if tokens else float("nan")
    return ProbeResult(matrix, in_out, loss, tokens, time.monotonic() - begin)


def _plan_passes(first: Sequence[Batch], heldout: Sequence[Batch], pass_rows: int) -> list[list[Batch]]:
    """Rows dealt to passes: the probe batch whole in the first, held-out rows in the room that is left."""
    passes: list[list[Batch]] = [list(first)]
    room = pass_rows - sum(batch["input_ids"].shape[0] for batch in first)
    for batch in heldout:
        start, rows = 0, batch["input_ids"].shape[0]
        while start < rows:
            if room <= 0:
                passes.append([])
                room = pass_rows
            stop = min(rows, start + room)
            passes[-1].append({name: tensor[start:stop] for name, tensor in batch.items()})
            room -= stop - start
            start = stop
    return [one for one in passes if one]


def _pass(run: _Run, stack: nn.Module, norm: nn.Module, rows: Batch, skip: int, softcap: float | None) -> tuple[float, int]:
    """(summed loss, response tokens) of the rows after the first `skip`, which are the probe batch's."""
    device = run.loader.device
    run.states = stack.get_submodule(run.loader.family.embedding)(rows["input_ids"].to(device))
    # One row stands for all: padding is on the right and attention is causal, so no real token sees it and every row
    # has the same mask and positions. The family makes them once, for one row, whatever the number of rows is.
    stack(inputs_embeds=run.states[:1], use_cache=False)
    hidden, labels = response_positions(run.states[skip:], rows["labels"][skip:].to(device))
    run.states = torch.empty(0)
    if not labels.numel():
        return 0.0, 0
    for start in range(0, len(hidden), NORM_ROWS):
        hidden[start : start + NORM_ROWS] = norm(hidden[start : start + NORM_ROWS])
    losses = streamed_loss(hidden, labels, run.loader.head_chunks(), softcap)
    return float(losses.double().sum()), labels.numel()
