"""Streamed gradients against the whole model in memory, and the choices that must not change them."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import Checkpoint
from common.errors import ModelError
from common.types import LoraBlock, Part, Quantization, Start, TrainSpec, UnitId, model_units
from fp_client.families import FAMILIES
from fp_client.loader import UnitLoader
from fp_client.memory import StreamPlan
from fp_client.shapes import shape_of
from fp_client.stream import Streamed
from fp_client.submodel import load_submodel
from fp_client.train import train
from tests.unit import tiny
from tests.unit.test_submodel import broadcast

LAYER_UNITS = (UnitId(1), UnitId(2), UnitId(4))
Broadcast = dict[int, list[LoraBlock]]
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


def beneath(directory: Path, adapter: Broadcast, started: list[LoraBlock], scale: float) -> Any:
    """The whole model by transformers with the frozen part of ΔW in its weights: all of it but what the LoRA begins with."""
    model = tiny.whole(directory)
    for sign, blocks in ((1.0, [block for layer in adapter.values() for block in layer]), (-scale, started)):
        for block in blocks:
            weight = model.model.layers[block.layer].get_submodule(block.module).weight
            weight.data += sign * torch.from_numpy(block.b @ block.a)
    return model


def twin(model: Any, blocks: list[LoraBlock], scale: float, rows: dict[str, torch.Tensor]) -> tuple[float, dict[Any, Any]]:
    """The whole model by transformers with the same LoRA written out by hand; autograd all the way."""
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
    expected, factors = twin(tiny.whole(directory), trainer.blocks(), spec.alpha / spec.rank, rows)
    assert loss == pytest.approx(expected, abs=1e-5)
    same_gradients(trainer, factors)


def same_gradients(trainer: Any, factors: dict[Any, Any]) -> None:
    found = dict(zip(sorted(factors), zip(trainer.trainable[::2], trainer.trainable[1::2], strict=True), strict=True))
    for name, (a, b) in factors.items():
        for mine, its in zip(found[name], (a, b), strict=True):
            assert mine.grad is not None and its.grad.norm() > 0
            assert (mine.grad - its.grad).norm() <= 1e-4 * its.grad.norm(), name


@pytest.mark.parametrize("units", [LAYER_UNITS, COMPONENT_UNITS], ids=["layers", "components"])
@pytest.mark.parametrize("start", list(Start))
def test_the_gradient_is_the_whole_models_with_an_adapter(start: Start, units: tuple[UnitId, ...], tmp_path: Path) -> None:
    """From the second round on the model is W_0 + ΔW."""
    directory, rows = tiny.make("llama", tmp_path), tiny.batch()
    spec, adapter = spec_of(directory, start=start), everywhere(directory)
    trainer = streamed(directory, tmp_path, units, spec, adapter=adapter)
    model = beneath(directory, adapter, trainer.blocks(), spec.alpha / spec.rank)
    shake(trainer)
    loss, _ = gradient(trainer, rows)
    expected, factors = twin(model, trainer.blocks(), spec.alpha / spec.rank, rows)
    assert loss == pytest.approx(expected, abs=1e-5)
    same_gradients(trainer, factors)


def everywhere(directory: Path) -> Broadcast:
    """A ΔW on every linear module."""
    shapes = shape_of(Checkpoint(directory).config).modules
    return {layer: [broadcast(layer, m.name, m.d_out, m.d_in) for m in shapes] for layer in range(tiny.LAYERS)}


@pytest.mark.parametrize(
    "changes",
    [{"resident": 2}, {"ahead": True}, {"ahead": True, "resident": 6}, {"boundary_bytes": 0}, {"boundary_bytes": 20_000}],
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


def failing_at(loader: UnitLoader, damaged: int) -> None:
    """The loader can't read that layer."""
    materialise = loader.materialise

    def read(layer: Any, index: int) -> None:
        if index == damaged:
            raise ModelError(f"layer {index + 1} is damaged")
        materialise(layer, index)

    loader.materialise = read  # type: ignore[method-assign]


def readers() -> list[str]:
    """The threads that read ahead."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_an_error_while_reading_ahead_reaches_the_caller(tmp_path: Path) -> None:
    directory, rows = tiny.make("llama", tmp_path), tiny.batch()
    trainer = streamed(directory, tmp_path / "spill", LAYER_UNITS, spec_of(directory), ahead=True)
    failing_at(trainer.loader, 3)
    trainer.begin([rows], 2)
    assert readers()
    with pytest.raises(ModelError, match="layer 4 is damaged"):
        trainer.gradients(0, rows, 2, 5)
    trainer.close()
    assert readers() == []
    assert all(parameter.is_meta for name, parameter in trainer.full.modules[3].named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("units", [LAYER_UNITS, COMPONENT_UNITS], ids=["layers", "components"])
@pytest.mark.parametrize("start", list(Start))
def test_the_broadcast_adapter_is_part_of_the_model(start: Start, units: tuple[UnitId, ...], tmp_path: Path) -> None:
    directory, rows = tiny.make("llama", tmp_path), tiny.batch()
    spec = spec_of(directory, start=start)
    blocks = everywhere(directory)
    trainer = streamed(directory, tmp_path, units, spec, adapter=blocks)
    loss, _ = gradient(trainer, rows)
    trained = {(block.layer, block.module): block for block in trainer.blocks()}
    model = tiny.whole(directory)
    scale = spec.alpha / spec.rank
    for layer, found in blocks.items():
        for block in found:
            # Whatever is trained begins as a part of ΔW or as nothing: the model is W_0 + ΔW either way.
            model.model.layers[layer].get_submodule(block.module).weight += torch.from_numpy(block.b @ block.a)
    assert loss == pytest.approx(tiny.full_loss(model, rows), abs=1e-5)
    top = trained[units[-1].layer, "mlp.down_proj"]
    if start is Start.GLOBAL:
        given = next(b for b in blocks[units[-1].layer] if b.module == "mlp.down_proj")
        torch.testing.assert_close(torch.from_numpy(scale * top.b @ top.a), torch.from_numpy(given.b[:, :3] @ given.a[:3]))
    else:
        assert not top.b.any()


def test_quantized_units_give_the_gradient_of_the_quantized_model_in_memory(tmp_path: Path) -> None:
    directory, rows = tiny.make("llama", tmp_path, hidden_size=64, intermediate_size=128), tiny.batch()
    spec = spec_of(directory)
    loader = UnitLoader(Checkpoint(directory), "cpu", torch.float32, Quantization.NF4, tmp_path / "nf4", "0" * 64)
    everything = tuple(UnitId(index) for index in range(tiny.LAYERS))
    trainers = [
        Streamed(loader, everything, spec, {}, StreamPlan(ahead=True), tmp_path / "spill"),
        load_submodel(loader, everything, spec),
    ]
    found = []
    for trainer in trainers:
        shake(trainer)
        found.append(gradient(trainer, rows))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_a_quantized_layer_is_made_again_by_the_main_thread_alone(harm: str, tmp_path: Path) -> None:
    """Quantizing beside a running layer would take more room than was planned."""
    directory, rows = tiny.make("llama", tmp_path, hidden_size=64, intermediate_size=128), tiny.batch()
    found, made = [], []
    for harmed in (False, True):
        loader = UnitLoader(Checkpoint(directory), "cpu", torch.float32, Quantization.NF4, tmp_path / "nf4", "0" * 64)
        assert loader.store is not None
        trainer = Streamed(loader, LAYER_UNITS, spec_of(directory), {}, StreamPlan(ahead=True), tmp_path / "spill")
        if harmed:
            path = loader.store.path(3)
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.unlink() if harm == "missing" else path.write_bytes(data)
            build = loader.store.build
            loader.store.build = lambda *what, build=build: (made.append(threading.current_thread()), build(*what))  # type: ignore
        shake(trainer)
        found.append(gradient(trainer, rows))
        trainer.close()
    assert made == [threading.main_thread()] and found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("part", [Part.LAYER, Part.FFN], ids=["layers", "components"])
def test_a_round_with_all_units_is_plain_lora_training(part: Part, tmp_path: Path) -> None:
    directory = tiny.make("qwen3", tmp_path)
    spec = spec_of(directory, steps=4)
    everything = model_units(part, tiny.LAYERS)
    batches = [tiny.batch(seed=seed) for seed in range(4)]
    one = train(streamed(directory, tmp_path, everything, spec), batches, spec, 2)
    layers = model_units(Part.LAYER, tiny.LAYERS)
    # The same micro-batches: AdamW makes a whole step of a gradient's last bits where it is next to nothing.
    other = train(load_submodel(UnitLoader(Checkpoint(directory)), layers, spec), batches, spec, 2)
    assert one.loss_last == pytest.approx(other.loss_last, abs=1e-4)
    for mine, its in zip(one.blocks, other.blocks, strict=True):
        assert (mine.layer, mine.module) == (its.layer, its.module)
        assert abs(mine.b - its.b).max() <= 1e-4 and abs(mine.a - its.a).max() <= 1e-4


def test_the_prefix_is_made_once_and_the_same(tmp_path: Path) -> None:
    """Steps after the first must not see a prefix of other rows, and the layers below are read once a round."""
    directory = tiny.make("llama", tmp_path)
    spec = spec_of(directory, steps=3)
    batches = [tiny.batch(4, seed=seed) for seed in range(3)]
    trainer = streamed(directory, tmp_path, LAYER_UNITS, spec)
    read: list[int] = []
    fill = trainer.full.layers._fill
    trainer.full.layers._fill = lambda index: (read.append(index), fill(index))[1]  # type: ignore[method-assign, func-returns-value]
    trainer.begin(batches, 2)
    assert read == [0]
    for step, rows in enumerate(batches):
        counted = int((rows["labels"][:, 1:] != -100).sum())
        total = trainer.gradients(step, rows, 2, counted)
        assert total / counted == pytest.approx(tiny.full_loss(tiny.whole(directory), rows), abs=1e-5)
    assert read.count(0) == 1
    # Top and bottom of the trunk are read once a step: the last one forward is the first one back.
    assert [read.count(index) for index in range(1, 6)] == [4, 6, 6, 6, 3]


def test_dropout_is_the_same_in_forward_and_recomputation(tmp_path: Path) -> None:
    """The gradient with dropout is that of the very function the forward pass computed: finite differences agree."""
    directory, rows = tiny.make("llama", tmp_path), tiny.batch()
    spec = spec_of(directory, dropout=0.5)
    trainer = streamed(directory, tmp_path, LAYER_UNITS, spec)
    shake(trainer)
    counted = int((rows["labels"][:, 1:] != -100).sum())
    trainer.begin([rows, rows], 2)
    first = trainer.gradients(0, rows, 2, counted)
    assert trainer.gradients(0, rows, 2, counted) == first  # the same place in the round draws the same
    assert trainer.gradients(1, rows, 2, counted) != first
    for parameter in trainer.trainable:
        parameter.grad = None
    trainer.gradients(0, rows, 2, counted)
    parameter = max(trainer.trainable, key=lambda p: float(p.grad.norm()) if p.grad is not None else 0.0)
    assert parameter.grad is not None
    direction, slope, step = parameter.grad / parameter.grad.norm(), float(parameter.grad.norm()), 1e-2
    sides = []
    for sign in (1, -1):
        parameter.data.add_(direction, alpha=sign * step)
        sides.append(trainer.gradients(0, rows, 2, counted) / counted)
        parameter.data.add_(direction, alpha=-sign * step)
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=0.02)
