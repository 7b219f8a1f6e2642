"""The same code on CUDA: probe, all three gradients, an NF4 training step, the memory cap. Run where a GPU is: pytest -m gpu."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint import Checkpoint
from common.types import Gradient, ProbeSpec, Quantization, TrainSpec, UnitId
from fp_client.loader import UnitLoader
from fp_client.measure import Peak
from fp_client.memory import StreamPlan
from fp_client.probe import probe
from fp_client.submodel import load_submodel
from fp_client.train import train
from fp_client.trainers import open_trainer
from tests.unit import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
SPEC = TrainSpec(8, 3, 24, 1e-3, 4, 8.0, ("mlp.down_proj", "self_attn.q_proj"), 0)
UNITS = [UnitId(index) for index in (1, 3, 5)]


def loader(directory: Path, quantization: Quantization, dtype: torch.dtype, device: str = "cuda") -> UnitLoader:
    return UnitLoader(Checkpoint(directory), device, dtype, quantization, directory.parent / "store", "f" * 64)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
@pytest.mark.parametrize("quantization", list(Quantization))
def test_probe_equals_the_cpu(family: str, quantization: Quantization, tmp_path: Path) -> None:
    directory, rows = tiny.make(family, tmp_path, **WIDE), tiny.batch()
    found = [
        probe(loader(directory, quantization, torch.float32, device), rows, [rows], ProbeSpec()) for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(found[1].similarity, found[0].similarity, atol=1e-3)
    np.testing.assert_allclose(found[1].in_out, found[0].in_out, atol=1e-3)
    assert found[1].loss == pytest.approx(found[0].loss, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nf4_training_lowers_the_loss(dtype: torch.dtype, tmp_path: Path) -> None:
    submodel = load_submodel(loader(tiny.make("llama", tmp_path, **WIDE), Quantization.NF4, dtype), UNITS, SPEC)
    assert all(p.is_cuda and p.dtype == torch.float32 for p in submodel.trainable)
    result = train(submodel, [tiny.batch()] * SPEC.steps, SPEC, 2)
    assert result.loss_last < result.loss_first
    assert all(np.isfinite(block.a).all() and np.isfinite(block.b).all() for block in result.blocks)


@pytest.mark.parametrize("gradient", [Gradient.SUBMODEL, Gradient.STITCHED, Gradient.STREAMED])
def test_training_equals_the_cpus(gradient: Gradient, tmp_path: Path) -> None:
    """Spilling, reading ahead and the prefix kept from step to step, too."""
    directory, spec = tiny.make("llama", tmp_path, **WIDE), replace(SPEC, steps=3, gradient=gradient)
    found = []
    for device in ("cpu", "cuda"):
        plan = StreamPlan(boundary_bytes=4000, ahead=True, head=True)
        made = loader(directory, Quantization.NONE, torch.float32, device)
        with open_trainer(made, UNITS, spec, {}, plan, tmp_path / device) as trainer:
            found.append(train(trainer, [tiny.batch()] * spec.steps, spec, 2))
    assert found[1].loss_last == pytest.approx(found[0].loss_last, abs=1e-3)
    for one, other in zip(found[0].blocks, found[1].blocks, strict=True):
        np.testing.assert_allclose(other.a, one.a, atol=1e-3)
        np.testing.assert_allclose(other.b, one.b, atol=1e-3)


def test_streaming_holds_about_one_unit(tmp_path: Path) -> None:
    directory = tiny.make("llama", tmp_path, num_hidden_layers=24, **WIDE)
    checkpoint, spec = Checkpoint(directory), replace(SPEC, steps=2, gradient=Gradient.STREAMED)
    whole = sum(checkpoint.info(name).size for name in checkpoint.names)
    made = loader(directory, Quantization.NONE, torch.float32)
    units = [UnitId(index) for index in range(24)]
    with Peak("cuda") as peak, open_trainer(made, units, spec, {}, StreamPlan(), tmp_path / "spill") as trainer:
        train(trainer, [tiny.batch()] * spec.steps, spec, 1)
    assert 0 < peak.bytes < whole / 2


def test_probe_holds_about_one_unit(tmp_path: Path) -> None:
    directory = tiny.make("llama", tmp_path, num_hidden_layers=24, **WIDE)
    checkpoint = Checkpoint(directory)
    whole = sum(checkpoint.info(name).size for name in checkpoint.names)
    with Peak("cuda") as peak:
        probe(loader(directory, Quantization.NONE, torch.float32), tiny.batch(), [], ProbeSpec(positions=32))
    assert 0 < peak.bytes < whole / 3


@pytest.fixture
def small_cap() -> Iterator[int]:
    torch.cuda.empty_cache()
    budget = 96 << 20  # a layer is 8.5 MiB, all 24 are 204; cuBLAS alone may take 32 for its workspace
    torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.get_device_properties(0).total_memory)
    yield budget
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_memory_cap_lets_the_probe_through_and_stops_what_exceeds_it(small_cap: int, tmp_path: Path) -> None:
    directory = tiny.make("llama", tmp_path, num_hidden_layers=24, **WIDE)
    with Peak("cuda") as peak:
        probe(loader(directory, Quantization.NONE, torch.float32), tiny.batch(), [], ProbeSpec(positions=32))
    assert peak.bytes <= small_cap
    with pytest.raises(torch.cuda.OutOfMemoryError):
        load_submodel(loader(directory, Quantization.NONE, torch.float32), [UnitId(i) for i in range(24)], SPEC)
