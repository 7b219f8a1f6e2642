"""The device's pace, measured: one layer forward, backward and read, and the head's loss. Takes some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from common.types import LoraBlock, TrainSpec
from fp_client.adapter import attach_ledger, inject
from fp_client.loader import HEAD_ROWS, UnitLoader
from fp_client.loss import chunked_loss
from fp_client.memory import StreamPlan
from fp_client.pace import Pace
from fp_client.stream import FullModel
from fp_client.submodel import starting
from fp_client.tensors import read_rows
from fp_client.units import Kept

TOKENS = 1024
"""Tokens that are measured at most, but for a single row; a step's time grows with its rows."""
ENOUGH = 0.4
"""Seconds after which a measurement is not repeated, once it was made twice."""


@dataclass(frozen=True)
class Typical:
    """A typical row of the device's data, padded as in its micro-batch."""

    tokens: int
    response: int
    """Tokens that carry a loss."""


def measure_pace(loader: UnitLoader, spec: TrainSpec, broadcast_rank: int, rows: int, typical: Typical) -> Pace:
    """Run the model's middle layer on random states (`rows`, tokens, d), without and with LoRA, with a ΔW of `broadcast_rank`.

    Holds what a streamed step holds at its least: one layer, its LoRA, one block of the head.
    Raises ModelError for damaged weights, ProtocolError for targets the model does not have.
    """
    rows = max(1, min(rows, TOKENS // typical.tokens))
    full = FullModel(loader, {}, StreamPlan(head=False))
    index = full.count // 2
    layer, kept = full.modules[index], Kept(frozenset(), spec.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = int(full.model.config.hidden_size)
        states = torch.randn((rows, typical.tokens, width), device=loader.device).to(loader.dtype)

        def fill() -> None:
            loader.release(layer)
            loader.materialise(layer, index)

        def forward() -> None:
            with torch.no_grad():
                full.run(layer, index, states)

        def backward() -> None:
            out = full.run(layer, index, states.detach().requires_grad_())
            torch.autograd.backward(out, states)

        fill()
        read = _seconds(fill, loader.device)
        attach_ledger(layer, index, _random_ledger(loader, spec, index, broadcast_rank), loader.device)
        plain = _seconds(forward, loader.device), _seconds(backward, loader.device)
        trainable = inject(layer, spec, starting(layer, index, kept, spec, []), loader.device)
        lora = _seconds(forward, loader.device), _seconds(backward, loader.device)
        optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)
        update = _seconds(optimizer.step, loader.device)
        loader.release(layer)
        del trainable, optimizer
        head_read, loss = _head(loader, full, rows * typical.response)
    full.close()
    return Pace(rows, *plain, *lora, read, loss, head_read, update)


def _head(loader: UnitLoader, full: FullModel, responses: int) -> tuple[float, float]:
    """(seconds to read the whole head, seconds of the loss), from one block of the vocabulary."""
    vocabulary, width = loader.checkpoint.info(loader.head_name).shape
    block = min(HEAD_ROWS, vocabulary)

    def get() -> torch.Tensor:
        return read_rows(loader.checkpoint, loader.head_name, 0, block, loader.device, loader.dtype)

    head = get()
    del head
    begin = time.perf_counter()
    head = get()
    read = time.perf_counter() - begin
    states = torch.randn((responses, width), device=loader.device).to(loader.dtype).requires_grad_()
    labels = torch.randint(block, (responses,), device=loader.device)

    def loss() -> None:
        chunked_loss(states, head, labels, full.softcap).backward()  # type: ignore[no-untyped-call]

    return read * vocabulary / block, _seconds(loss, loader.device) * vocabulary / block


def _random_ledger(loader: UnitLoader, spec: TrainSpec, index: int, rank: int) -> list[LoraBlock]:
    """A ΔW of this rank on the targets; none for rank 0."""
    generator = np.random.default_rng(0)
    out = []
    for name in spec.targets if rank else ():
        d_out, d_in = loader.checkpoint.info(f"model.layers.{index}.{name}.weight").shape
        a, b = (generator.standard_normal(shape, np.float32) * np.float32(0.01) for shape in ((rank, d_in), (d_out, rank)))
        out.append(LoraBlock(index, name, a, b))
    return out


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Least seconds of a few runs, at least two, after a first one that does not count: what is compiled or read for the
    first time, or another process, makes a run longer and never shorter."""
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < ENOUGH and len(taken) < 6):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])
