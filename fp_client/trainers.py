"""The trainer of each gradient mode: submodel, stitched, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.errors import ProtocolError
from common.types import Gradient, LoraBlock, TrainSpec, UnitId
from fp_client.anchor import Anchored
from fp_client.loader import UnitLoader
from fp_client.memory import StreamPlan
from fp_client.messages import OnProgress
from fp_client.stream import Streamed
from fp_client.submodel import load_submodel
from fp_client.train import Trainer
from fp_client.units import keep


def signs_of_life(progress: OnProgress, phase: str) -> OnProgress:
    """Reports whatever it is told as one phase with a count that only grows; a total of 0: nobody knows it."""
    count = 0

    def told(_phase: str, _done: int, _total: int) -> None:
        nonlocal count
        count += 1
        progress(phase, count, 0)

    return told


@contextmanager
def open_trainer(
    loader: UnitLoader,
    units: Sequence[UnitId],
    spec: TrainSpec,
    adapter: Mapping[int, Sequence[LoraBlock]],
    plan: StreamPlan,
    scratch: Path,
    checkpointing: bool = True,
    progress: OnProgress | None = None,
) -> Iterator[Trainer]:
    """What makes the gradient that `spec.gradient` asks for; everything it holds is given back at the end.

    `adapter`: the broadcast ΔW by layer; a submodel needs its own layers' alone. `plan`: what a stream keeps in memory;
    `scratch`: where it spills. Raises as `load_submodel` does.
    """
    if spec.gradient is Gradient.STREAMED:
        streamed = Streamed(loader, units, spec, adapter, plan, scratch, progress)
        try:
            yield streamed
        finally:
            streamed.close()
    elif spec.gradient is Gradient.STITCHED:
        anchored = Anchored(loader, units, spec, adapter, plan, scratch, checkpointing, progress)
        try:
            yield anchored
        finally:
            anchored.close()
    elif spec.gradient is Gradient.SUBMODEL:
        held = keep(units, loader.checkpoint.layers, spec.targets)
        blocks = (block for layer in adapter if layer in held for block in adapter[layer])
        yield load_submodel(loader, units, spec, blocks, checkpointing, progress)
    else:
        raise ProtocolError(f"gradient mode {spec.gradient.value!r} must be resolved by the server before a device trains")
