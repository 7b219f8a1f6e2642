"""The submodel against a whole model with its other layers taken out by hand; LoRA's start; what is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint import Checkpoint
from common.errors import ProtocolError
from common.types import Factors, LoraBlock, Part, Start, TrainSpec, UnitId
from fp_client.adapter import fresh_a, initial, split_broadcast
from fp_client.families import FAMILIES
from fp_client.loader import UnitLoader
from fp_client.submodel import Pruned, load_submodel
from tests.unit import tiny

SPEC = TrainSpec(
    steps=2, batch_size=3, sequence_length=24, learning_rate=1e-2, rank=3, alpha=6.0,
    targets=("mlp.down_proj", "self_attn.o_proj"), seed=5,
)  # fmt: skip
KEPT = (1, 2, 5)
UNITS = [UnitId(index) for index in KEPT]


def broadcast(layer: int, module: str, d_out: int, d_in: int, rank: int = 5) -> LoraBlock:
    """A ΔW with factors sorted by singular value, as the server sends them."""
    rng = np.random.default_rng(layer)
    u, s, v = np.linalg.svd(rng.normal(0, 0.3, (d_out, d_in)).astype(np.float32), full_matrices=False)
    return LoraBlock(layer, module, v[:rank], u[:, :rank] * s[:rank])


def twin_loss(model: Any, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean response loss of the whole model with the other layers made identities, padding mask passed."""
    for index, layer in enumerate(model.model.layers):
        if index not in KEPT:
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_gradient_equal_the_whole_model_with_layers_taken_out(family: str, checkpointing: bool, tmp_path: Path) -> None:
    directory, rows = tiny.make(family, tmp_path), tiny.batch()
    submodel = load_submodel(UnitLoader(Checkpoint(directory)), UNITS, SPEC, checkpointing=checkpointing)
    for parameter in submodel.trainable:  # B away from zero, so that A has a gradient
        parameter.data.add_(torch.full_like(parameter, 0.01))
    loss, count = submodel.loss(rows)
    (loss / count).backward()
    twin = tiny.whole(directory)
    factors = {}
    for block in submodel.blocks():
        a, b = (torch.from_numpy(x).requires_grad_() for x in (block.a, block.b))
        factors[block.layer, block.module] = (a, b)
        module = twin.model.layers[block.layer].get_submodule(block.module)
        module.forward = lambda x, m=module, a=a, b=b: torch.nn.functional.linear(x, m.weight + 2.0 * b @ a, m.bias)
    expected = twin_loss(twin, rows)
    expected.backward()
    assert float(loss.detach() / count) == pytest.approx(float(expected.detach()), abs=1e-5)
    for (index, name), (a, b) in factors.items():
        module = submodel.kept[index].get_submodule(name)
        torch.testing.assert_close(module.lora_A["device"].weight.grad, a.grad, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(module.lora_B["device"].weight.grad, b.grad, atol=1e-5, rtol=1e-3)


def test_only_kept_layers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = UnitLoader(Checkpoint(tiny.make("llama", tmp_path)))
    read: list[str] = []
    real = UnitLoader.tensor
    monkeypatch.setattr(UnitLoader, "tensor", lambda self, name: read.append(name) or real(self, name))  # type: ignore[func-returns-value]
    submodel = load_submodel(loader, UNITS, SPEC)
    layers = {int(name.split(".")[2]) for name in read if name.startswith("model.layers.")}
    assert layers == set(KEPT)
    kinds = [isinstance(layer, Pruned) for layer in submodel.model.model.layers]
    assert kinds == [index not in KEPT for index in range(tiny.LAYERS)]
    assert not list(Pruned().parameters())


@pytest.mark.parametrize("start", list(Start))
def test_start_is_the_broadcast_model_exactly(start: Start, tmp_path: Path) -> None:
    """Before the first step both starts compute W_0 + ΔW, and only LoRA is trained."""
    directory, rows = tiny.make("qwen3", tmp_path), tiny.batch()
    blocks = [broadcast(2, "mlp.down_proj", 48, 80), broadcast(5, "self_attn.o_proj", 48, 64, rank=2)]
    blocks += [broadcast(1, "self_attn.q_proj", 64, 48), broadcast(3, "mlp.down_proj", 48, 80)]  # no target; not kept
    submodel = load_submodel(UnitLoader(Checkpoint(directory)), UNITS, replace(SPEC, start=start), blocks)
    loss, count = submodel.loss(rows)
    twin = tiny.whole(directory)
    for block in blocks:
        twin.model.layers[block.layer].get_submodule(block.module).weight += torch.from_numpy(block.b @ block.a)
    assert float(loss.detach() / count) == pytest.approx(float(twin_loss(twin, rows)), abs=1e-5)
    required = {name for name, p in submodel.model.named_parameters() if p.requires_grad}
    assert len(required) == len(submodel.trainable) == 2 * len(KEPT) * len(SPEC.targets)
    assert all(".lora_" in name for name in required)
    assert all(p.dtype == torch.float32 for p in submodel.trainable)


def test_fresh_start_has_zero_b_and_freezes_all_of_the_ledger() -> None:
    block = broadcast(0, "mlp.down_proj", 10, 12)
    start = initial(SPEC, 0, "mlp.down_proj", 10, 12, block)
    assert start.frozen is block
    assert not start.trainable.b.any()
    assert np.abs(start.trainable.a).max() <= 1 / np.sqrt(12)


def test_global_start_is_the_top_part_and_the_rest_is_frozen() -> None:
    block = broadcast(0, "mlp.down_proj", 10, 12)
    start = initial(replace(SPEC, start=Start.GLOBAL), 0, "mlp.down_proj", 10, 12, block)
    top, rest = split_broadcast(block, SPEC.rank)
    np.testing.assert_allclose(SPEC.alpha / SPEC.rank * start.trainable.b @ start.trainable.a, top.b @ top.a, atol=1e-6)
    np.testing.assert_allclose(top.b @ top.a + rest.b @ rest.a, block.b @ block.a, atol=1e-6)
    assert start.frozen is not None
    assert start.frozen.a.shape == (2, 12)


def test_global_start_pads_a_short_broadcast_with_silent_directions() -> None:
    block = broadcast(0, "mlp.down_proj", 10, 12, rank=1)
    start = initial(replace(SPEC, start=Start.GLOBAL), 0, "mlp.down_proj", 10, 12, block)
    np.testing.assert_allclose(2.0 * start.trainable.b @ start.trainable.a, block.b @ block.a, atol=1e-6)
    assert start.trainable.a[1:].any()
    assert not start.trainable.b[:, 1:].any()


def test_a_module_starts_alike_whatever_else_is_kept() -> None:
    assert np.array_equal(fresh_a(1, 2, "m", 3, 9), fresh_a(1, 2, "m", 3, 9))
    drawn = [fresh_a(*key, 3, 9) for key in ((1, 2, "m"), (2, 2, "m"), (1, 3, "m"), (1, 2, "n"))]
    assert all(not np.array_equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize("factor", [Factors.A, Factors.B])
def test_one_factor_can_be_trained_alone(factor: Factors, tmp_path: Path) -> None:
    submodel = load_submodel(UnitLoader(Checkpoint(tiny.make("llama", tmp_path))), UNITS, replace(SPEC, train=factor))
    required = [name for name, p in submodel.model.named_parameters() if p.requires_grad]
    assert len(required) == len(KEPT) * len(SPEC.targets)
    assert all(f"lora_{factor.value}" in name for name in required)


def test_refusals(tmp_path: Path) -> None:
    loader = UnitLoader(Checkpoint(tiny.make("llama", tmp_path)))
    for units, message in (
        ([UnitId(6)], "unit 7: the model has 6 layers"),
        ([UnitId(1, Part.FFN), UnitId(1)], "each only once"),
        ([], "at least one unit"),
        ([UnitId(1), UnitId(1)], "each only once"),
    ):
        with pytest.raises(ProtocolError, match=message):
            load_submodel(loader, units, SPEC)
    with pytest.raises(ProtocolError, match=r"unit 2M: none of the run's targets is in it \(mlp.down_proj\)"):
        load_submodel(loader, [UnitId(1, Part.ATTENTION)], replace(SPEC, targets=("mlp.down_proj",)))
    with pytest.raises(ProtocolError, match=r"layer 2 .*no linear module 'mlp.gate' \(it has mlp.down_proj, "):
        load_submodel(loader, UNITS, replace(SPEC, targets=("mlp.gate",)))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_components_are_kept_alone(family: str, tmp_path: Path) -> None:
    """A layer that keeps one component: the other adds nothing, its weights are not read, LoRA is on the kept one alone."""
    directory, rows = tiny.make(family, tmp_path), tiny.batch()
    units = [UnitId(1, Part.FFN), UnitId(2, Part.ATTENTION), UnitId(4, Part.ATTENTION), UnitId(4, Part.FFN)]
    submodel = load_submodel(UnitLoader(Checkpoint(directory)), units, SPEC)
    loss, count = submodel.loss(rows)
    assert [(b.layer, b.module) for b in submodel.blocks()] == [
        (1, "mlp.down_proj"), (2, "self_attn.o_proj"), (4, "mlp.down_proj"), (4, "self_attn.o_proj"),
    ]  # fmt: skip
    assert all(not name.startswith("mlp") for name, _ in submodel.kept[2].named_parameters())
    twin = tiny.whole(directory)
    zero_attention = lambda hidden_states, *args, **kwargs: (torch.zeros_like(hidden_states), None)  # noqa: E731
    for index, layer in enumerate(twin.model.layers):
        if (index, Part.ATTENTION) not in {(u.layer, u.part) for u in units}:
            layer.self_attn.forward = zero_attention
        if (index, Part.FFN) not in {(u.layer, u.part) for u in units}:
            layer.mlp.forward = torch.zeros_like
    assert float(loss.detach() / count) == pytest.approx(tiny.full_loss(twin, rows), abs=1e-5)
