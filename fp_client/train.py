"""A round's local training: a new AdamW, a fixed number of steps, LoRA only (paper §3.1, Appendix E)."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from common.errors import DataError, ProtocolError
from common.types import Estimator, Factors, Gradient, LoraBlock, TrainSpec
from fp_client.batches import Batch, micro_batches
from fp_client.messages import OnProgress
from fp_client.template import IGNORE

__all__ = ["TrainResult", "Trainer", "check_spec", "micro_batches", "train"]


@dataclass(frozen=True)
class TrainResult:
    """`blocks` carry global layer indices. The losses are mean response-token losses of the first and last step."""

    blocks: list[LoraBlock]
    loss_first: float
    loss_last: float
    tokens_per_second: float
    """Input tokens, padding left out."""
    seconds: float
    step_seconds: float = 0.0
    """Median of the steps."""


class Trainer(Protocol):
    """What makes the gradient: a submodel in memory (`submodel`), or the full model as a stream (`stream`)."""

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The LoRA factors to train; there once `begin` has returned."""

    @property
    def marks(self) -> int:
        """How many marks of progress a step has: rows of a submodel, layers passed forward and back as a stream."""

    def begin(self, batches: Sequence[Batch], micro_batch: int) -> None:
        """Prepare what stays the same for all steps of the round."""

    def gradients(self, step: int, batch: Batch, micro_batch: int, counted: int) -> float:
        """Add the gradient of the mean over `counted` response tokens to the LoRA factors; returns the summed loss.

        Marks of progress within the step are reported from here: on a slow device a step takes long.
        """

    def blocks(self) -> list[LoraBlock]:
        """The LoRA factors by global layer index and module, sorted."""


def check_spec(spec: TrainSpec) -> None:
    """Raises ProtocolError naming what this client does not do, before anything is loaded."""
    if spec.gradient is Gradient.AUTO:
        raise ProtocolError("gradient mode 'auto' must be resolved by the server before a device trains")
    if spec.estimator is not Estimator.BACKPROP:
        raise ProtocolError(f"estimator {spec.estimator.value!r} is not supported by this client (only 'backprop')")
    if spec.upload is not Factors.BOTH:
        raise ProtocolError(f"upload of factor {spec.upload.value!r} alone is not supported by this client (only 'both')")
    if spec.rank < 1 or spec.steps < 1 or not spec.targets or not math.isfinite(spec.alpha / spec.rank):
        raise ProtocolError("a training specification needs a positive rank, at least one step and at least one target module")


def train(
    trainer: Trainer,
    batches: Iterable[Batch],
    spec: TrainSpec,
    micro_batch: int,
    progress: OnProgress | None = None,
) -> TrainResult:
    """`spec.steps` AdamW steps (weight decay 0, constant learning rate) on the trainer's LoRA.

    The loss of a step is the mean over the batch's response tokens; micro-batches are weighted by their tokens, so the
    result does not depend on their size beyond rounding. Raises DataError when a batch has no response token, or the
    batches run out, or loss or adapter come out as NaN or infinite.
    """
    check_spec(spec)
    torch.manual_seed(spec.seed)  # only a LoRA dropout draws from it
    losses: list[float] = []
    seconds: list[float] = []
    tokens, begin = 0, time.monotonic()
    given, counts = _checked(batches, spec)
    trainer.begin(given, micro_batch)
    optimizer = torch.optim.AdamW(trainer.trainable, lr=spec.learning_rate, weight_decay=0.0)
    for step, (batch, counted) in enumerate(zip(given, counts, strict=True)):
        at = time.monotonic()
        mean = trainer.gradients(step, batch, micro_batch, counted) / counted
        if not math.isfinite(mean):
            raise DataError(f"step {step + 1}: the loss is {mean}; lower the learning rate")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(mean)
        tokens += int(batch["attention_mask"].sum())
        seconds.append(time.monotonic() - at)
        if progress is not None:
            progress("train", (step + 1) * trainer.marks, spec.steps * trainer.marks)
    whole = time.monotonic() - begin
    blocks = trainer.blocks()
    for block in blocks:
        if not (np.isfinite(block.a).all() and np.isfinite(block.b).all()):
            raise DataError(
                f"layer {block.layer + 1}, {block.module}: its adapter holds NaN or infinite values after {spec.steps} steps; "
                "lower the learning rate"
            )
    return TrainResult(blocks, losses[0], losses[-1], tokens / max(whole, 1e-9), whole, statistics.median(seconds))


def _checked(batches: Iterable[Batch], spec: TrainSpec) -> tuple[list[Batch], list[int]]:
    """The round's batches, and the response tokens of each."""
    given = list(itertools.islice(batches, spec.steps))
    if len(given) < spec.steps:
        raise DataError(f"the training data gave only {len(given)} batches, the round asks for {spec.steps} steps")
    counts = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in given]
    for step, counted in enumerate(counts):
        if counted == 0:
            raise DataError(f"step {step + 1}: the batch has no response token to learn from")
    return given, counts
