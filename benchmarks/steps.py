"""Seconds a training step takes in each gradient mode, paired: the modes take turns in one process, on the same batches.

    python benchmarks/steps.py [--dtype bfloat16] [--pairs 12]

Two ratios: a streamed step with all units against a step of the full model in memory with activation checkpointing, and
a stitched step with 8 of 30 layers against a plain submodel step with the same layers. The cache is warm: every mode has
done a step before the clock starts. Medians of the paired ratios; what a round does once (the streamed prefix, the anchor
pass of a stitched round) is not part of a step and is given apart. Beside each figure what a device would have predicted
from its pace, measured before (`fp_client.pacing`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.memory_probe import rows
from common.checkpoint import Checkpoint
from common.types import Gradient, Quantization, TrainSpec, UnitId
from fp_client.loader import UnitLoader
from fp_client.memory import Held, Setting, StreamPlan
from fp_client.pace import Pace, prepare_seconds, step_seconds
from fp_client.pacing import Typical, measure_pace
from fp_client.shapes import shape_of
from fp_client.trainers import open_trainer
from fp_client.units import gaps, keep

CHOSEN = (3, 8, 10, 15, 16, 19, 22, 27)
"""Eight layers as FDLO with even groups and IALS draw them on SmolLM2: eight gaps; every gap costs a stitched step a change."""


def paired(
    given: argparse.Namespace, loader: UnitLoader, spec: TrainSpec, sides: dict[str, tuple[list[UnitId], Gradient]]
) -> dict[str, Any]:
    """Each side's steps in turn; the first named is compared with the second."""
    batches = [rows(given.rows, given.length, loader.checkpoint.config["vocab_size"], seed) for seed in range(given.pairs + 1)]
    counted = given.rows * (given.length - given.length // 2)
    pace = measure_pace(loader, spec, 0, given.rows, Typical(given.length, given.length - given.length // 2))
    predicted: dict[str, tuple[float, float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    begin: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        trainers = {}
        for name, (units, mode) in sides.items():
            plan = StreamPlan(ahead=True, resident=given.resident)
            opened = open_trainer(loader, units, replace(spec, gradient=mode), {}, plan, ROOT / ".cache/spill")
            trainers[name] = stack.enter_context(opened)
            predicted[name] = foreseen(given, loader, replace(spec, gradient=mode, steps=given.pairs + 1), units, plan, pace)
            at = time.monotonic()
            trainers[name].begin(batches, given.rows)
            begin[name] = time.monotonic() - at
        optimizers = {name: torch.optim.AdamW(trainer.trainable, lr=1e-5) for name, trainer in trainers.items()}
        for step, batch in enumerate(batches):
            # Alternating who goes first: what one leaves in the caches serves the other as often as not.
            for name in sorted(trainers, reverse=bool(step % 2)):
                at = time.monotonic()
                trainers[name].gradients(step, batch, given.rows, counted)
                optimizers[name].step()
                optimizers[name].zero_grad(set_to_none=True)
                if step:
                    seconds[name].append(time.monotonic() - at)
    one, other = sides
    ratios = sorted(x / y for x, y in zip(seconds[one], seconds[other], strict=True))
    return {
        "sides": [one, other], "seconds": {name: round(statistics.median(found), 3) for name, found in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)],
        "predicted": {name: round(step, 3) for name, (step, _) in predicted.items()},
        "once_a_round": {name: round(value, 2) for name, value in begin.items()},
        "once_predicted": {name: round(once, 2) for name, (_, once) in predicted.items()}, "rounds_steps": len(batches),
    }  # fmt: skip


def foreseen(
    given: argparse.Namespace, loader: UnitLoader, spec: TrainSpec, units: list[UnitId], plan: StreamPlan, pace: Pace
) -> tuple[float, float]:
    """Predicted seconds of a step, and of what a round does once before."""
    shape, kept = shape_of(loader.checkpoint.config), keep(units, loader.checkpoint.layers, spec.targets)
    setting = Setting(Quantization.NONE, 2 if given.dtype == "bfloat16" else 4)
    low, between = min(kept), len(gaps(units, loader.checkpoint.layers))
    step = step_seconds(shape, setting, spec, pace, Held.of(kept), given.rows, True, plan, low, between)
    return step, prepare_seconds(shape, setting, spec, pace, plan, low, between)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resident", type=int, default=0, help="layers the stream keeps in memory")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    checkpoint = Checkpoint(given.model)
    modules = tuple(sorted(module.name for module in shape_of(checkpoint.config).modules))
    spec = TrainSpec(1, given.rows, given.length, 1e-5, 16, 32.0, modules, 0)
    loader = UnitLoader(checkpoint, "cpu", getattr(torch, given.dtype))
    everything, chosen = [UnitId(i) for i in range(checkpoint.layers)], [UnitId(i) for i in CHOSEN]
    for sides in (
        {"streamed, all units": (everything, Gradient.STREAMED), "in memory, checkpointed": (everything, Gradient.SUBMODEL)},
        {"stitched, 8 units": (chosen, Gradient.STITCHED), "submodel, 8 units": (chosen, Gradient.SUBMODEL)},
    ):
        print(json.dumps(paired(given, loader, spec, sides)), flush=True)


if __name__ == "__main__":
    main()
