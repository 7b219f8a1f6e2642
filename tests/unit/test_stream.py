"""Streamed gradients against the whole model in memory, and the choices that must not change them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import Checkpoint
from common.types import LoraBlock, ModuleShape, Part, Quantization, Start, TrainSpec, UnitId
from fp_client.families import FAMILIES
from fp_client.loader import UnitLoader
from fp_client.shapes import shape_of
from fp_client.stream import Streamed, StreamPlan
from fp_client.submodel import load_submodel
from fp_client.train import train
from tests.unit import tiny
from tests.unit.test_submodel import broadcast

LAYER_UNITS = (UnitId(1), UnitId(2), UnitId(4))
COMPONENT_UNITS = (UnitId(1, Part.FFN), UnitId(3, Part.ATTENTION), UnitId(4, Part.ATTENTION), UnitId(4, Part.FFN))


def spec_of(directory: Path, **changes: Any) -> TrainSpec:
    modules = tuple(module.name for module in shape_of(Checkpoint(directory).config).modules)
    return replace(TrainSpec(2, 3, 24, 1e-2, 3, 6.0, modules, 5), **changes)


def streamed(directory: Path, scratch: Path, units: tuple[UnitId, ...], spec: TrainSpec, **changes: Any) -> Streamed:
    loader = UnitLoader(Checkpoint(directory), dtype=changes.pop("dtype", torch.float32))
    adapter = changes.pop("adapter", {})
    return Streamed(loader, units, spec, adapter, StreamPlan(**changes), scratch)


def shake(trainer: Any) -> None:
    """A and B away from where they start: with B = 0, A has no gradient."""
    generator = torch.Generator().manual_seed(3)
    for parameter in trainer.trainable:
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def gradient(trainer: Any, rows: dict[str, torch.Tensor], micro: int = 2) -> tuple[float, list[torch.Tensor]]:
    counted = int((rows["labels"][:, 1:] != -100).sum())
    trainer.begin([rows], micro)
    total = trainer.gradients(0, rows, micro, counted)
    return total / counted, [parameter.grad for parameter in trainer.trainable]


def twin(directory: Path, blocks: list[LoraBlock], scale: float, rows: dict[str, torch.Tensor]) -> tuple[float, dict[Any, Any]]:
    """The whole model by transformers with the same LoRA written out by hand; autograd all the way."""
    model = tiny.whole(directory)
    factors = {}
    for block in blocks:
        a, b = (torch.from_numpy(x).clone().requires_grad_() for x in (block.a, block.b))
        factors[block.layer, block.module] = (a, b)
        module = model.model.layers[block.layer].get_submodule(block.module)
        module.forward = lambda x, m=module, a=a, b=b: torch.nn.functional.linear(x, m.weight + scale * b @ a, m.bias)
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten())
    loss.backward()
    return float(loss.detach()), factors


@pytest.mark.parametrize("units", [LAYER_UNITS, COMPONENT_UNITS], ids=["layers", "components"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_gradient_is_the_whole_models(family: str, units: tuple[UnitId, ...], tmp_path: Path) -> None:
    directory, rows = tiny.make(family, tmp_path), tiny.batch()
    spec = spec_of(directory)
    trainer = streamed(directory, tmp_path, units, spec, boundary_bytes=3000, head=family != "llama")
    shake(trainer)
    loss, _ = gradient(trainer, rows)
    expected, factors = twin(directory, trainer.blocks(), spec.alpha / spec.rank, rows)
    assert loss == pytest.approx(expected, abs=1e-5)
    found = dict(zip(sorted(factors), zip(trainer.trainable[::2], trainer.trainable[1::2], strict=True), strict=True))
    for name, (a, b) in factors.items():
        for mine, its in zip(found[name], (a, b), strict=True):
            assert mine.grad is not None and its.grad.norm() > 0
            assert (mine.grad - its.grad).norm() <= 1e-4 * its.grad.norm(), name


@pytest.mark.parametrize(
    "changes", [{"resident": 2}, {"ahead": True}, {"ahead": True, "resident": 6}, {"boundary_bytes": 0}, {"boundary_bytes": 20_000}]
)
def test_what_stays_in_memory_changes_no_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    directory, rows = tiny.make("llama", tmp_path), tiny.batch()
    results = []
    for index, choice in enumerate(({}, changes)):
        trainer = streamed(directory, tmp_path / str(index), LAYER_UNITS, spec_of(directory), **choice)
        shake(trainer)
        results.append(gradient(trainer, rows))
        trainer.close()
    assert results[0][0] == results[1][0]
    assert all(torch.equal(one, other) for one, other in zip(results[0][1], results[1][1], strict=True))
