"""Anchored stitching: at the first step the gaps give exactly the full model's states, and nothing else is changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import Checkpoint
from common.errors import ModelError
from common.types import Gradient, Part, Start, TrainSpec, UnitId, component_units, layer_units, unit_modules
from fp_client.anchor import Anchored
from fp_client.families import FAMILIES, prune_component
from fp_client.fidelity import fidelity, gradients
from fp_client.loader import UnitLoader
from fp_client.memory import StreamPlan
from fp_client.stream import Streamed
from fp_client.submodel import load_submodel
from fp_client.train import train
from fp_client.trainers import open_trainer
from fp_client.units import Gap, gaps
from tests.unit import tiny
from tests.unit.test_stream import COMPONENT_UNITS, LAYER_UNITS, beneath, everywhere, failing_at, readers, shake, spec_of


def anchored(directory: Path, scratch: Path, units: tuple[UnitId, ...], spec: TrainSpec, **plan: Any) -> Anchored:
    return Anchored(UnitLoader(Checkpoint(directory)), units, spec, {}, StreamPlan(**plan), scratch)


@pytest.mark.parametrize("units", [LAYER_UNITS, COMPONENT_UNITS], ids=["layers", "components"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_loss_is_the_full_models(family: str, units: tuple[UnitId, ...], tmp_path: Path) -> None:
    directory = tiny.make(family, tmp_path)
    batches = [tiny.batch(3, seed=0), tiny.batch(4, seed=1)]
    trainer = anchored(directory, tmp_path / "spill", units, spec_of(directory), boundary_bytes=4000, ahead=True)
    trainer.begin(batches, 2)
    model = tiny.whole(directory)
    for step, rows in enumerate(batches):
        counted = int((rows["labels"][:, 1:] != -100).sum())
        assert trainer.gradients(step, rows, 2, counted) / counted == pytest.approx(tiny.full_loss(model, rows), abs=1e-5)
    trainer.close()


@pytest.mark.parametrize("adapted", [None, *Start], ids=["first round", *Start])
@pytest.mark.parametrize("units", [LAYER_UNITS, COMPONENT_UNITS], ids=["layers", "components"])
def test_the_gradient_is_that_of_constant_changes_in_the_gaps(
    units: tuple[UnitId, ...], adapted: Start | None, tmp_path: Path
) -> None:
    """The slow twin: the whole model, with each pruned component's addition to the stream held constant."""
    directory, rows = tiny.make("llama", tmp_path), tiny.batch()
    spec = spec_of(directory, start=adapted or Start.FRESH)
    adapter = everywhere(directory) if adapted else {}
    loader = UnitLoader(Checkpoint(directory))
    trainer = Anchored(loader, units, spec, adapter, StreamPlan(), tmp_path / "spill")
    trainer.begin([rows], 3)
    model = beneath(directory, adapter, trainer.blocks(), spec.alpha / spec.rank)
    counted = int((rows["labels"][:, 1:] != -100).sum())
    trainer.gradients(0, rows, 3, counted)
    kept = {(unit.layer, part) for unit in units for part in _parts(unit)}
    for index, layer in enumerate(model.model.layers):
        for name, part in (("self_attn", Part.ATTENTION), ("mlp", Part.FFN)):
            if (index, part) not in kept:
                module = getattr(layer, name)
                forward = module.forward
                module.forward = lambda *a, f=forward, **k: _detached(f(*a, **k))
    factors = {}
    for block in trainer.blocks():
        a, b = (torch.from_numpy(x).clone().requires_grad_() for x in (block.a, block.b))
        factors[block.layer, block.module] = (a, b)
        module = model.model.layers[block.layer].get_submodule(block.module)
        module.forward = lambda x, m=module, a=a, b=b: torch.nn.functional.linear(x, m.weight + 2.0 * b @ a, m.bias)
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten()).backward()
    mine = dict(zip(sorted(factors), zip(trainer.trainable[::2], trainer.trainable[1::2], strict=True), strict=True))
    for name, pair in factors.items():
        for ours, its in zip(mine[name], pair, strict=True):
            assert ours.grad is not None and its.grad is not None
            torch.testing.assert_close(ours.grad, its.grad, atol=1e-6, rtol=1e-3)
    assert any(a.grad.any() for a, _ in factors.values()) == (adapted is Start.GLOBAL), "else A's would be untested"


def _parts(unit: UnitId) -> tuple[Part, ...]:
    return (Part.ATTENTION, Part.FFN) if unit.part is Part.LAYER else (unit.part,)


def _detached(out: Any) -> Any:
    return tuple(x.detach() if x is not None else None for x in out) if isinstance(out, tuple) else out.detach()


def test_spilling_and_reading_ahead_change_no_bit(tmp_path: Path) -> None:
    directory = tiny.make("llama", tmp_path)
    spec, batches = spec_of(directory), [tiny.batch(4, seed=seed) for seed in range(2)]
    found = []
    for index, plan in enumerate(({}, {"boundary_bytes": 0, "ahead": True}, {"boundary_bytes": 30_000})):
        trainer = anchored(directory, tmp_path / str(index), LAYER_UNITS, spec, **plan)
        found.append(train(trainer, batches, spec, 2))
        trainer.close()
    for other in found[1:]:
        assert other.loss_last == found[0].loss_last
        assert all(x.b.tobytes() == y.b.tobytes() for x, y in zip(found[0].blocks, other.blocks, strict=True))


def test_fidelity_of_the_modes(tmp_path: Path) -> None:
    """Against the whole model in memory: streamed is its gradient; stitched is nearer to it than the plain submodel's."""
    directory, rows = tiny.make("llama", tmp_path), tiny.batch(6)
    spec, found = spec_of(directory), {}
    for mode in (Gradient.STREAMED, Gradient.STITCHED, Gradient.SUBMODEL):
        loader = UnitLoader(Checkpoint(directory))
        with open_trainer(loader, LAYER_UNITS, replace(spec, gradient=mode), {}, StreamPlan(), tmp_path / "spill") as trainer:
            found[mode], _ = gradients(trainer, rows, 2)
    everything = load_submodel(UnitLoader(Checkpoint(directory)), [UnitId(i) for i in range(tiny.LAYERS)], spec)
    each = 2 * len(spec.targets)
    tensors, _ = gradients(everything, rows, 2)
    full = [tensor for unit in LAYER_UNITS for tensor in tensors[unit.layer * each : (unit.layer + 1) * each]]
    scores = {mode: fidelity(one, full, LAYER_UNITS, tiny.LAYERS, spec) for mode, one in found.items()}
    assert scores[Gradient.STREAMED].overall == pytest.approx(1.0, abs=1e-6)
    assert 1.0 > scores[Gradient.STITCHED].overall > scores[Gradient.SUBMODEL].overall
    assert len(scores[Gradient.STITCHED].units) == len(LAYER_UNITS)
    dots = sum(float((x.double() * y.double()).sum()) for x, y in zip(found[Gradient.SUBMODEL], full, strict=True))
    norms = [sum(float((x.double() ** 2).sum()) for x in one) ** 0.5 for one in (found[Gradient.SUBMODEL], full)]
    assert scores[Gradient.SUBMODEL].overall == pytest.approx(dots / norms[0] / norms[1])


@pytest.mark.parametrize("units", [LAYER_UNITS, COMPONENT_UNITS], ids=["layers", "components"])
def test_each_units_cosine_is_its_own(tmp_path: Path, units: tuple[UnitId, ...]) -> None:
    """Against cosines by hand, from the names of the blocks: no two units have the same."""
    directory, rows = tiny.make("llama", tmp_path), tiny.batch(6)
    spec, made = spec_of(directory), {}
    for mode in (Gradient.STITCHED, Gradient.STREAMED):
        loader = UnitLoader(Checkpoint(directory))
        with open_trainer(loader, units, replace(spec, gradient=mode), {}, StreamPlan(), tmp_path / "spill") as trainer:
            found, _ = gradients(trainer, rows, 6)
            names = [(block.layer, block.module) for block in trainer.blocks() for _ in "AB"]
            made[mode] = found, list(zip(names, found, strict=True))
    by_hand = []
    for unit in units:
        mine, full = (
            torch.cat([
                tensor.double().flatten()
                for (layer, module), tensor in named
                if layer == unit.layer and unit_modules(unit, (module,))
            ])
            for _, named in made.values()
        )  # fmt: skip
        by_hand.append(float(mine @ full / mine.norm() / full.norm()))
    scores = fidelity(made[Gradient.STITCHED][0], made[Gradient.STREAMED][0], units, tiny.LAYERS, spec)
    assert scores.units == pytest.approx(by_hand, abs=1e-9)
    assert len({round(value, 6) for value in by_hand}) == len(units), "else an order could be any"


def test_gaps() -> None:
    assert gaps(LAYER_UNITS, 6) == (Gap(0, 2), Gap(6, 8), Gap(10, 12))
    assert gaps(COMPONENT_UNITS, 6) == (Gap(0, 3), Gap(4, 6), Gap(7, 8), Gap(10, 12))
    assert gaps(layer_units(6), 6) == gaps(component_units(6), 6) == ()


def test_all_units_and_no_gap_is_the_full_model(tmp_path: Path) -> None:
    directory, rows = tiny.make("llama", tmp_path), tiny.batch()
    trainer = anchored(directory, tmp_path / "spill", layer_units(tiny.LAYERS), spec_of(directory))
    trainer.begin([rows], 2)
    whole = Streamed(UnitLoader(Checkpoint(directory)), layer_units(tiny.LAYERS), spec_of(directory), {}, StreamPlan(), tmp_path)
    counted = int((rows["labels"][:, 1:] != -100).sum())
    losses = []
    for each in (trainer, whole):
        shake(each)
        losses.append(each.gradients(0, rows, 2, counted))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for mine, its in zip(trainer.trainable, whole.trainable, strict=True):
        assert mine.grad is not None and its.grad is not None and its.grad.norm() > 0
        assert (mine.grad - its.grad).norm() <= 1e-5 * its.grad.norm()


def test_an_error_in_the_pass_leaves_no_thread(tmp_path: Path) -> None:
    directory, rows = tiny.make("llama", tmp_path), tiny.batch()
    loader = UnitLoader(Checkpoint(directory))
    trainer = Anchored(loader, LAYER_UNITS, spec_of(directory), {}, StreamPlan(ahead=True), tmp_path / "spill")
    failing_at(loader, 2)
    with pytest.raises(ModelError, match="layer 3 is damaged") as caught:  # its traceback keeps the pass alive
        trainer.begin([rows], 2)
    assert readers() == [] and caught.tb is not None


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_pruned_component_is_an_identity_without_parameters(family: str, tmp_path: Path) -> None:
    directory = tiny.make(family, tmp_path)
    layer = tiny.whole(directory).model.layers[1]
    names = {name for name, _ in layer.named_parameters()}
    for part in (Part.ATTENTION, Part.FFN):
        prune_component(layer, FAMILIES[family], part)
    assert names and not list(layer.parameters())
    states = torch.randn(2, 5, 48)
    out = layer(states, position_embeddings=None, attention_mask=None)
    assert torch.equal(out, states)
