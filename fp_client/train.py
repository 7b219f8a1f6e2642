"""A round's local training: a new AdamW, a fixed number of steps, LoRA only (paper §3.1, Appendix E)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import DataError, ProtocolError
from common.types import Estimator, Factors, Gradient, LoraBlock, TrainSpec
from fp_client.submodel import Batch, Submodel
from fp_client.template import IGNORE


@dataclass(frozen=True)
class TrainResult:
    """`blocks` carry global layer indices. The losses are mean response-token losses of the first and last step."""

    blocks: list[LoraBlock]
    loss_first: float
    loss_last: float
    tokens_per_second: float
    """Input tokens, padding left out."""
    seconds: float


def check_spec(spec: TrainSpec) -> None:
    """Raises ProtocolError naming what this client does not do, before anything is loaded."""
    if spec.gradient is not Gradient.SUBMODEL:
        raise ProtocolError(f"gradient mode {spec.gradient.value!r} is not supported by this client (only 'submodel')")
    if spec.estimator is not Estimator.BACKPROP:
        raise ProtocolError(f"estimator {spec.estimator.value!r} is not supported by this client (only 'backprop')")
    if spec.upload is not Factors.BOTH:
        raise ProtocolError(f"upload of factor {spec.upload.value!r} alone is not supported by this client (only 'both')")
    if spec.rank < 1 or spec.steps < 1 or not spec.targets or not math.isfinite(spec.alpha / spec.rank):
        raise ProtocolError("a training specification needs a positive rank, at least one step and at least one target module")


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in pieces of at most `size` rows, each cut to its longest row."""
    rows = batch["input_ids"].shape[0]
    for start in range(0, rows, size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items()}
        longest = max(1, int(part["attention_mask"].sum(dim=1).max()))
        yield {name: tensor[:, :longest] for name, tensor in part.items()}


def train(
    submodel: Submodel,
    batches: Iterable[Batch],
    spec: TrainSpec,
    micro_batch: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> TrainResult:
    """`spec.steps` AdamW steps (weight decay 0, constant learning rate) on the submodel's LoRA.

    The loss of a step is the mean over the batch's response tokens; micro-batches are weighted by their tokens, so the
    result does not depend on their size beyond rounding. Raises DataError when a batch has no response token, or the
    batches run out, or loss or adapter come out as NaN or infinite.
    """
    check_spec(spec)
    torch.manual_seed(spec.seed)  # only a LoRA dropout draws from it
    optimizer = torch.optim.AdamW(submodel.trainable, lr=spec.learning_rate, weight_decay=0.0)
    losses: list[float] = []
    tokens, begin = 0, time.monotonic()
    source = iter(batches)
    for step in range(spec.steps):
        batch = next(source, None)
        if batch is None:
            raise DataError(f"the training data gave only {step} batches, the round asks for {spec.steps} steps")
        counted = int((batch["labels"][:, 1:] != IGNORE).sum())
        if counted == 0:
            raise DataError(f"step {step + 1}: the batch has no response token to learn from")
        total = 0.0
        for part in micro_batches(batch, micro_batch):
            loss, found = submodel.loss(part)
            if found:
                (loss / counted).backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            del loss
        mean = total / counted
        if not math.isfinite(mean):
            raise DataError(f"step {step + 1}: the loss is {mean}; lower the learning rate")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(mean)
        tokens += int(batch["attention_mask"].sum())
        if progress is not None:
            progress("train", step + 1, spec.steps)
    seconds = time.monotonic() - begin
    blocks = submodel.blocks()
    for block in blocks:
        if not (np.isfinite(block.a).all() and np.isfinite(block.b).all()):
            raise DataError(
                f"layer {block.layer + 1}, {block.module}: its adapter holds NaN or infinite values after {spec.steps} steps; "
                "lower the learning rate"
            )
    return TrainResult(blocks, losses[0], losses[-1], tokens / max(seconds, 1e-9), seconds)
