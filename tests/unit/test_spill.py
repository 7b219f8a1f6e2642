"""The shelf between two visits of a layer."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import Checkpoint
from common.errors import StorageError
from common.types import Gradient
from fp_client.loader import UnitLoader
from fp_client.memory import Setting, StreamPlan
from fp_client.memory_stream import spilled
from fp_client.shapes import shape_of
from fp_client.spill import Spill
from fp_client.train import train
from fp_client.trainers import open_trainer
from fp_client.units import gaps
from tests.unit import tiny
from tests.unit.test_stream import LAYER_UNITS, spec_of


def test_the_file_begins_anew_when_nothing_is_in_it(tmp_path: Path) -> None:
    """Rows have another length each step: without it the file would grow by a step's activations every step."""
    with Spill(0, tmp_path) as shelf:
        largest = 0
        for step in range(8):
            rows = [torch.full((2, 50 + 7 * step - 3 * j, 4), float(10 * step + j)) for j in range(4)]
            for j, row in enumerate(rows):
                shelf.put(j, row)
            largest = max(largest, sum(4 * row.numel() for row in rows))
            assert shelf.spilled <= largest
            for j in (2, 0, 3, 1):
                assert torch.equal(shelf.take(j), rows[j])
        assert shelf.spilled == 0


def test_a_place_serves_again_while_others_are_taken(tmp_path: Path) -> None:
    with Spill(0, tmp_path) as shelf:
        for key in range(3):
            shelf.put(key, torch.full((10,), float(key)))
        shelf.take(1)
        shelf.put("new", torch.full((10,), 7.0))
        assert shelf.spilled == 3 * 40
        assert [float(shelf.get(key)[0]) for key in (0, 2, "new")] == [0.0, 2.0, 7.0]


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(number: int):
        def call(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        return call

    with Spill(0, tmp_path) as shelf:
        shelf.put("kept", torch.ones(10))
        with monkeypatch.context() as broken:
            broken.setattr(os, "pwrite", failing(errno.ENOSPC))
            with pytest.raises(StorageError, match=f"{tmp_path}: activations can't be spilled: the disk is full"):
                shelf.put("new", torch.ones(10))
            broken.setattr(os, "preadv", failing(errno.EIO))
            with pytest.raises(StorageError, match="activations can't be read back: Input/output error"):
                shelf.get("kept")
        assert torch.equal(shelf.take("kept"), torch.ones(10)), "what was there before is still there"


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    with Spill(0, tmp_path) as shelf:
        shelf.put("kept", torch.ones(10))
        assert shelf._file is not None
        os.truncate(shelf._file, 12)
        with pytest.raises(StorageError, match="cut short"):
            shelf.get("kept")


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with Spill(0, tmp_path / "file" / "spill") as shelf, pytest.raises(StorageError, match="activations can't be spilled"):
        shelf.put("new", torch.ones(10))


@pytest.mark.parametrize("memory", [0, 20_000, -1])
@pytest.mark.parametrize("gradient", [Gradient.STREAMED, Gradient.STITCHED])
def test_the_planner_knows_what_a_round_spills(
    gradient: Gradient, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole windows: nothing in memory, and the plan's figure is the streamed file's largest size to the byte."""
    directory = tiny.make("llama", tmp_path)
    spec = spec_of(directory, gradient=gradient, batch_size=4, sequence_length=16)
    fullest: dict[int, int] = {}
    put = Spill.put

    def watched(self: Spill, key: Any, tensor: torch.Tensor) -> None:
        put(self, key, tensor)
        fullest[id(self)] = max(fullest.get(id(self), 0), self.spilled)

    monkeypatch.setattr(Spill, "put", watched)
    plan = StreamPlan(boundary_bytes=memory, prefix_bytes=memory)
    loader = UnitLoader(Checkpoint(directory))
    rows = {name: torch.randint(3, 300, (4, 16)) for name in ("input_ids", "labels")}
    batch = {**rows, "attention_mask": torch.ones(4, 16, dtype=torch.long)}
    with open_trainer(loader, LAYER_UNITS, spec, {}, plan, tmp_path / "spill") as trainer:
        train(trainer, [batch] * spec.steps, spec, 2)
    shape, setting = shape_of(loader.checkpoint.config), Setting()
    low, between = min(unit.layer for unit in LAYER_UNITS), len(gaps(LAYER_UNITS, shape.layers))
    most, found = spilled(shape, setting, spec, plan, low, between).most, sum(fullest.values())
    batch_states = 4 * 16 * 48 * 4
    # A tensor that finds no place in the rest of the memory goes to disk as a whole; stitched, one round's states are spare.
    spare = 2 * batch_states * (memory > 0) + spec.steps * batch_states * (gradient is Gradient.STITCHED)
    assert found <= most <= found + spare * (memory >= 0) and (found > 0) == (memory >= 0)
