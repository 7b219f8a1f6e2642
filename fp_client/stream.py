"""The full model's gradient, one unit in memory at a time: streamed training.

Forward, layer by layer over all micro-batches, keeping each layer's input; then backward in reverse, each layer run
again from its input, with gradients for the assigned units' LoRA alone. A layer's weights are read twice a step, whatever
the number of micro-batches; a head that is not resident is read twice a micro-batch, because the states of all of them
together would be a higher peak. Below the lowest assigned layer nothing is differentiated: that prefix does not change
within a round, so its output is made once, for all of the round's rows. The gradient is the full model's, exactly: what a
checkpointed step with everything in memory computes, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.types import LoraBlock, TrainSpec, UnitId
from fp_client.adapter import attach_ledger, extract, inject, seed_of
from fp_client.batches import Batch, micro_batches
from fp_client.families import backbone, logit_softcap
from fp_client.loader import UnitLoader
from fp_client.loss import chunked_loss, head_loss, response_positions
from fp_client.memory import StreamPlan
from fp_client.messages import OnProgress
from fp_client.spill import Spill
from fp_client.submodel import frozen, starting
from fp_client.units import keep

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a family passes to one of its layers besides the residual stream."""
LENGTHS = 8
"""Row lengths whose masks and positions are kept; others are made again when they are needed."""


class _Recorder(nn.Module):
    """Stands where a layer stood, and notes what the family's own forward passes to it."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The residual stream, untouched."""
        self.calls.append((args, kwargs))
        return hidden_states


class Layers:
    """The model's layers, with the weights of a few of them in memory at a time."""

    def __init__(
        self,
        loader: UnitLoader,
        layers: Sequence[nn.Module],
        blocks: Callable[[int], Sequence[LoraBlock]],
        plan: StreamPlan,
    ) -> None:
        """`blocks`: a layer's frozen ΔW."""
        self._loader, self._layers, self._blocks = loader, layers, blocks
        self._resident = frozenset(range(len(layers) - plan.resident, len(layers)))
        self._held: set[int] = set()
        self._pool = ThreadPoolExecutor(1, "read-ahead") if plan.ahead else None
        self._coming: tuple[int, Future[bool]] | None = None

    def acquire(self, index: int, following: int | None = None) -> nn.Module:
        """A layer with its weights. `following`: the layer that will be asked for next."""
        if self._coming is not None:
            coming, future = self._coming
            self._coming = None
            try:
                if future.result():
                    self._held.add(coming)
            except BaseException:
                self._loader.release(self._layers[coming])
                raise
        for other in self._held - self._resident - {index}:
            self._loader.release(self._layers[other])
            self._held.discard(other)
        if index not in self._held:
            self._fill(index)
            self._held.add(index)
        if self._pool is not None and following is not None and following not in self._held:
            self._coming = (following, self._pool.submit(self._read_ahead, following))
        return self._layers[index]

    def _read_ahead(self, index: int) -> bool:
        # What must first be quantized waits: that takes more room than reading.
        if not self._loader.ready(index):
            return False
        self._fill(index)
        return True

    def _fill(self, index: int) -> None:
        layer = self._layers[index]
        self._loader.materialise(layer, index)
        attach_ledger(layer, index, self._blocks(index), self._loader.device)

    def close(self) -> None:
        """Give all weights back."""
        if self._coming is not None:
            self._held.add(self._coming[0])
            self._coming[1].exception()
            self._coming = None
        if self._pool is not None:
            self._pool.shutdown()
        for index in list(self._held):
            self._loader.release(self._layers[index])
        self._held.clear()


class FullModel:
    """The whole model W_0 + ΔW without its weights: a family's forward, layer by layer."""

    def __init__(
        self,
        loader: UnitLoader,
        adapter: Mapping[int, Sequence[LoraBlock]],
        plan: StreamPlan,
        head: bool = True,
        blocks: Callable[[int], Sequence[LoraBlock]] | None = None,
    ) -> None:
        """`adapter`: the broadcast ΔW of every layer. `head`: whether the loss will be asked for. `blocks`:
        what of a layer's ΔW is frozen (default: all of it)."""
        self.loader = loader
        self.model = loader.model()
        self.softcap = logit_softcap(self.model.config)
        slots = loader.layers(self.model)
        self.count = len(slots)
        self.modules = [slots[index] for index in range(self.count)]
        self._calls: list[Call] = []
        for index in range(self.count):
            slots[index] = _Recorder(self._calls)
        self._stack = backbone(self.model, loader.family)
        self._embedding: Any = self._stack.get_submodule(loader.family.embedding)
        self.norm = self._stack.get_submodule(loader.family.norm)
        setattr(self._stack, loader.family.norm, nn.Identity())
        self.head = loader.head() if head and plan.head else None
        if self.head is not None and loader.checkpoint.tied:
            self._embedding.resident = self.head
        self._by_length: dict[int, list[Call]] = {}
        self.layers = Layers(loader, self.modules, blocks or (lambda index: list(adapter.get(index, ()))), plan)

    def embedded(self, part: Batch) -> torch.Tensor:
        """h_0 (B, T, d) of a micro-batch."""
        out: torch.Tensor = self._embedding(part["input_ids"].to(self.loader.device))
        return out

    def run(self, layer: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The residual stream (B, T, d) through one materialised layer."""
        args, kwargs = self._context(hidden.shape[1])[index]
        out: torch.Tensor = layer(hidden, *args, **kwargs)
        return out

    def _context(self, length: int) -> list[Call]:
        """What the family passes to each layer for rows of `length` tokens; made for one row, it serves all
        (padding is on the right and attention is causal, so every row has the same mask and positions)."""
        if length not in self._by_length:
            width, dtype = int(self.model.config.hidden_size), self.loader.dtype
            self._calls.clear()
            with torch.no_grad():
                self._stack(
                    inputs_embeds=torch.zeros((1, length, width), dtype=dtype, device=self.loader.device), use_cache=False
                )
            while len(self._by_length) >= LENGTHS:
                del self._by_length[next(iter(self._by_length))]
            self._by_length[length] = list(self._calls)
            self._calls.clear()
        return self._by_length[length]

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(summed response-token loss, response tokens) of a final residual stream (B, T, d)."""
        states, targets = response_positions(hidden, labels.to(self.loader.device))
        normed = self.norm(states)
        if self.head is not None:
            return chunked_loss(normed, self.head, targets, self.softcap), targets.numel()
        return head_loss(normed, targets, self.loader.head_chunks, self.softcap), targets.numel()

    def close(self) -> None:
        """Give the weights back."""
        self.layers.close()


class Streamed:
    """A `Trainer` that streams the full model; see the module's words."""

    def __init__(
        self,
        loader: UnitLoader,
        units: Sequence[UnitId],
        spec: TrainSpec,
        adapter: Mapping[int, Sequence[LoraBlock]],
        plan: StreamPlan,
        scratch: Path,
        progress: OnProgress | None = None,
    ) -> None:
        """`adapter`: the broadcast ΔW of every layer. `scratch`: where activations are spilled.

        Raises ProtocolError for units or modules the model does not have, ModelError for a damaged checkpoint.
        """
        self.loader, self.spec, self.progress = loader, spec, progress
        self.assigned = keep(units, loader.checkpoint.layers, spec.targets)
        self.low = min(self.assigned)
        self.full = FullModel(
            loader, adapter, plan, blocks=lambda index: frozen(self.assigned.get(index), spec, list(adapter.get(index, ())))
        )
        self.trainable: list[nn.Parameter] = []
        self._prefix = Spill(plan.prefix_bytes, scratch, loader.device)
        self._boundaries = Spill(plan.boundary_bytes, scratch, loader.device)
        for number, (index, kept) in enumerate(self.assigned.items()):
            layer = self.full.modules[index]
            loader.materialise(layer, index)
            present = list(adapter.get(index, ()))
            self.trainable += inject(layer, spec, starting(layer, index, kept, spec, present), loader.device)
            loader.release(layer)
            self._loaded(number + 1)

    @property
    def marks(self) -> int:
        """Progress of a step: the layers it passes, forward and back."""
        return 2 * (self.full.count - self.low)

    def _loaded(self, done: int) -> None:
        # One count for LoRA and prefix: what is reported must only grow.
        if self.progress is not None:
            self.progress("load", done, len(self.assigned) + self.low * self.spec.steps)

    def _passed(self, step: int, done: int) -> None:
        if self.progress is not None:
            self.progress("train", step * self.marks + done, self.spec.steps * self.marks)

    @contextmanager
    def _same_noise(self, *where: int) -> Iterator[None]:
        """Dropout draws the same in forward and recomputation: its seed is the place in the round."""
        if not self.spec.dropout:
            yield
            return
        with torch.random.fork_rng(devices=[self.loader.device] if self.loader.device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.spec.seed, *where))
            yield

    # -- a round -------------------------------------------------------------------------------------

    def begin(self, batches: Sequence[Batch], micro_batch: int) -> None:
        """Take all rows of the round through the layers below the lowest assigned one, once."""
        if self.low == 0:
            return
        done = len(self.assigned)
        with torch.no_grad():
            for index in range(self.low):
                layer = self.full.layers.acquire(index, index + 1)
                for step, batch in enumerate(batches):
                    for j, part in enumerate(micro_batches(batch, micro_batch)):
                        before = self.full.embedded(part) if index == 0 else self._prefix.take((step, j))
                        self._prefix.put((step, j), self.full.run(layer, index, before))
                    done += 1
                    self._loaded(done)

    def gradients(self, step: int, batch: Batch, micro_batch: int, counted: int) -> float:
        """Add the full model's gradient of the mean over `counted` response tokens; returns the summed loss."""
        parts = list(micro_batches(batch, micro_batch))
        with torch.no_grad():
            flowing = [self.full.embedded(part) if self.low == 0 else self._prefix.get((step, j)) for j, part in enumerate(parts)]
            for index in range(self.low, self.full.count):
                layer = self.full.layers.acquire(index, index + 1 if index + 1 < self.full.count else None)
                for j in range(len(parts)):
                    self._boundaries.put((index, j), flowing[j])
                    with self._same_noise(step, j, index):
                        flowing[j] = self.full.run(layer, index, flowing[j])
                self._passed(step, index + 1 - self.low)
        total, back = self._losses(flowing, parts, counted)
        del flowing
        for index in range(self.full.count - 1, self.low - 1, -1):
            # The lowest layer of the backward pass is the first of the next forward pass: it simply stays.
            layer = self.full.layers.acquire(index, index - 1 if index > self.low else None)
            for j, signal in enumerate(back):
                before = self._boundaries.take((index, j))
                if signal is None:
                    continue
                before = before.detach().requires_grad_(index > self.low)
                with self._same_noise(step, j, index):
                    after = self.full.run(layer, index, before)
                torch.autograd.backward(after, signal)
                back[j] = before.grad
                del after, signal, before
            self._passed(step, self.marks - (index - self.low))
        return total

    def _losses(self, final: list[torch.Tensor], parts: Sequence[Batch], counted: int) -> tuple[float, list[torch.Tensor | None]]:
        """(summed loss, its gradient in each micro-batch's final residual stream); None for one without a response.

        A stream is dropped from `final` as soon as it has served.
        """
        total = 0.0
        back: list[torch.Tensor | None] = []
        for j, part in enumerate(parts):
            leaf = final[j].detach().requires_grad_(True)
            final[j] = torch.empty(0)
            loss, found = self.full.loss(leaf, part["labels"])
            if not found:
                back.append(None)
                continue
            (loss / counted).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            back.append(leaf.grad)
            del leaf, loss
        return total, back

    def blocks(self) -> list[LoraBlock]:
        """The LoRA factors by global layer index and module, sorted."""
        return [
            block for index, kept in self.assigned.items() for block in extract(self.full.modules[index], index, kept.targets)
        ]

    def close(self) -> None:
        """Give weights and activations back."""
        self.full.close()
        self._prefix.close()
        self._boundaries.close()
