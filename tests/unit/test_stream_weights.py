"""Streamed gradients on real weights: SmolLM2 against the whole model by transformers, in layer and component mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.checkpoint import Checkpoint
from common.types import Part, TrainSpec, UnitId
from fp_client.loader import UnitLoader
from fp_client.memory import StreamPlan
from fp_client.stream import Streamed
from fp_client.submodel import load_submodel
from fp_client.train import train
from tests.unit import tiny
from tests.unit.test_stream import shake, spec_of, twin

SMOLLM2 = Path(__file__).parents[2] / ".cache/models/SmolLM2-135M-Instruct"
pytestmark = pytest.mark.weights

LAYERS = tuple(UnitId(index) for index in (3, 14, 28))
COMPONENTS = (
    UnitId(5, Part.FFN),
    UnitId(6, Part.ATTENTION),
    UnitId(20, Part.ATTENTION),
    UnitId(20, Part.FFN),
    UnitId(29, Part.FFN),
)


@pytest.fixture(autouse=True)
def real_weights() -> None:
    """A test that needs the weights fails without them: skipped, it would prove nothing."""
    if not (SMOLLM2 / "model.safetensors").exists():
        pytest.fail(f"{SMOLLM2} is missing; run `make model`")


def smollm2_spec() -> TrainSpec:
    return replace(spec_of(SMOLLM2), rank=8, alpha=16.0, learning_rate=1e-3)


@pytest.mark.parametrize("units", [LAYERS, COMPONENTS], ids=["layers", "components"])
def test_the_gradient_is_the_whole_models(units: tuple[UnitId, ...], tmp_path: Path) -> None:
    spec, rows = smollm2_spec(), tiny.batch(2, 40, vocabulary=49152)
    plan = StreamPlan(ahead=True, boundary_bytes=1 << 20, head=units is LAYERS)
    trainer = Streamed(UnitLoader(Checkpoint(SMOLLM2)), units, spec, {}, plan, tmp_path)
    shake(trainer)
    counted = int((rows["labels"][:, 1:] != -100).sum())
    trainer.begin([rows], 1)
    loss = trainer.gradients(0, rows, 1, counted) / counted
    expected, factors = twin(tiny.whole(SMOLLM2), trainer.blocks(), spec.alpha / spec.rank, rows)
    assert loss == pytest.approx(expected, rel=1e-5)
    found = dict(zip(sorted(factors), zip(trainer.trainable[::2], trainer.trainable[1::2], strict=True), strict=True))
    for name, (a, b) in factors.items():
        for mine, its in zip(found[name], (a, b), strict=True):
            assert mine.grad is not None and its.grad.norm() > 0
            assert (mine.grad - its.grad).norm() <= 1e-4 * its.grad.norm(), name
    trainer.close()


def test_a_round_with_all_units_is_plain_lora_training(tmp_path: Path) -> None:
    spec = replace(smollm2_spec(), steps=2)
    everything = tuple(UnitId(index) for index in range(30))
    batches = [tiny.batch(2, 24, seed=seed, vocabulary=49152) for seed in range(2)]
    loader = UnitLoader(Checkpoint(SMOLLM2))
    trainer = Streamed(loader, everything, spec, {}, StreamPlan(), tmp_path)
    # The same micro-batches: AdamW makes a whole step of a gradient's last bits where it is next to nothing.
    one = train(trainer, batches, spec, 2)
    trainer.close()
    other = train(load_submodel(loader, everything, spec), batches, spec, 2)
    assert one.loss_last == pytest.approx(other.loss_last, abs=1e-4)
    for mine, its in zip(one.blocks, other.blocks, strict=True):
        assert abs(mine.a - its.a).max() <= 1e-4 and abs(mine.b - its.b).max() <= 1e-4, (mine.layer, mine.module)
