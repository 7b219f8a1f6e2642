"""A device is heard from within a step, while it prepares, and while it measures its gradient: counts that only grow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.checkpoint import Checkpoint
from common.types import Gradient
from fp_client.fidelity import gradients
from fp_client.loader import UnitLoader
from fp_client.memory import StreamPlan
from fp_client.train import train
from fp_client.trainers import open_trainer, signs_of_life
from tests.unit import tiny
from tests.unit.test_stream import LAYER_UNITS, spec_of

Seen = list[tuple[str, int, int]]


def told(mode: Gradient, directory: Path, scratch: Path) -> Seen:
    seen: Seen = []
    spec = spec_of(directory, gradient=mode)
    batches = [tiny.batch(3, seed=seed) for seed in range(spec.steps)]

    def progress(*event: object) -> None:
        seen.append(event)  # type: ignore[arg-type]

    with open_trainer(UnitLoader(Checkpoint(directory)), LAYER_UNITS, spec, {}, StreamPlan(), scratch, progress=progress) as it:
        train(it, batches, spec, 2, progress)
    return seen


def grows(seen: Seen, phase: str) -> tuple[list[int], set[int]]:
    """The phase's counts as they came, and its totals; they never went back."""
    counts = [done for name, done, _ in seen if name == phase]
    assert counts == sorted(counts)
    return counts, {total for name, _, total in seen if name == phase}


# Of 6 layers 2, 3 and 5 are assigned (1-based), in 2 steps of 3 rows, 2 rows at a time.
@pytest.mark.parametrize(
    ("mode", "train_total", "marks", "load_total"),
    [
        (Gradient.STREAMED, 2 * 10, 20, 3 + 2),  # a step passes the 5 layers from the lowest assigned one, twice
        (Gradient.STITCHED, 2 * 3, 4, 6 * 4 + 3),  # 4 micro-batches through 6 layers, then the submodel's 3
        (Gradient.SUBMODEL, 2 * 3, 4, 3),
    ],
)
def test_every_mode_counts_on(mode: Gradient, train_total: int, marks: int, load_total: int, tmp_path: Path) -> None:
    seen = told(mode, tiny.make("llama", tmp_path), tmp_path / "spill")
    counts, totals = grows(seen, "train")
    assert totals == {train_total} and len(set(counts)) == marks and counts[-1] == train_total
    counts, totals = grows(seen, "load")
    assert totals == {load_total} and counts == list(range(1, load_total + 1))


def test_measuring_a_gradient_is_heard(tmp_path: Path) -> None:
    directory, rows, seen = tiny.make("llama", tmp_path), tiny.batch(3), Seen()
    signs = signs_of_life(lambda *event: seen.append(event), "fidelity")
    for mode in (Gradient.STREAMED, Gradient.SUBMODEL):
        spec = replace(spec_of(directory, steps=1), gradient=mode)
        loader = UnitLoader(Checkpoint(directory))
        with open_trainer(loader, LAYER_UNITS, spec, {}, StreamPlan(), tmp_path / "spill", progress=signs) as trainer:
            gradients(trainer, rows, 2)
    assert seen == [("fidelity", count, 0) for count in range(1, len(seen) + 1)] and len(seen) > 10
