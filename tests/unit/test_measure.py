"""Measured peaks, and where models come from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ModelError, WorkerError
from fp_client import measure, models, tasks
from fp_client.pool import MALLOC

MIB = 1 << 20


def test_the_peak_is_what_was_held_and_not_what_is_left() -> None:
    with measure.Peak() as peak:
        first = np.ones(96 * MIB // 8)
        del first
        second = np.ones(32 * MIB // 8)
    assert second.nbytes == 32 * MIB
    assert 90 * MIB <= peak.host <= 112 * MIB
    assert peak.bytes == peak.host


def test_each_peak_starts_anew() -> None:
    with measure.Peak():
        held = np.ones(128 * MIB // 8)
        del held
    with measure.Peak() as small:
        held = np.ones(16 * MIB // 8)
    assert held.size and small.host <= 32 * MIB


def test_a_baseline_counts_what_was_there_before() -> None:
    baseline = measure.footprint()
    held = np.ones(64 * MIB // 8)
    with measure.Peak(baseline=baseline) as above:
        more = np.ones(16 * MIB // 8)
    assert held.size + more.size
    assert 72 * MIB <= above.host <= 96 * MIB


HOLES = """
from fp_client import measure
before = measure.heap_holes()
blocks = [bytearray(20_000) for _ in range(2000)]
held = measure.heap_holes()
last = blocks.pop()
del blocks
measure.trim()
print(before >> 20, held >> 20, measure.heap_holes() >> 20)
"""


def test_what_is_free_below_something_in_use_is_a_hole() -> None:
    environment = {**os.environ, **MALLOC, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", HOLES], env=environment, capture_output=True, text=True, check=True)
    before, held, holes = map(int, done.stdout.split())
    assert before <= held + 1 <= 10 and 35 <= holes <= 50


@pytest.mark.parametrize(("holes", "worn"), [(0, False), (16 << 20, False), (17 << 20, True)])
def test_a_worker_is_worn_by_holes_beyond_those_it_began_with(monkeypatch: pytest.MonkeyPatch, holes: int, worn: bool) -> None:
    one = object.__new__(tasks.Tasks)
    one._holes = 3 << 20
    monkeypatch.setattr(measure, "heap_holes", lambda: (3 << 20) + holes)
    assert one.worn is worn


def test_untouched_address_space_is_not_a_peak() -> None:
    with measure.Peak() as peak:
        reserved = np.empty(256 * MIB // 8)
    assert reserved.size and peak.host < 32 * MIB


def test_where_the_kernel_cannot_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_CLEAR", tmp_path / "missing" / "clear_refs")
    with pytest.raises(WorkerError, match="can't be written"), measure.Peak():
        pass
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "status")
    with pytest.raises(WorkerError, match="memory can only be measured on Linux"):
        measure.resident()


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert models.resolve(str(tmp_path), tmp_path / "cache") == tmp_path
    with pytest.raises(ModelError, match="no such model directory"):
        models.resolve(str(tmp_path / "nope"), tmp_path / "cache")


def test_a_hub_id_fetches_only_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert models.resolve("acme/tiny", tmp_path / "cache", "v1") == tmp_path
    assert asked["name"] == "acme/tiny" and asked["revision"] == "v1" and asked["cache_dir"] == tmp_path / "cache"
    from fnmatch import fnmatch

    def wanted(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])

    assert all(map(wanted, ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "model.safetensors.index.json")))
    assert not any(map(wanted, ("modeling_x.py", "tokenizer.py", "pytorch_model.bin", "model.bin", "consolidated.safetensors")))


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def fetch(name: str, **options: Any) -> str:
        raise OSError("We couldn't connect\nmore lines")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    with pytest.raises(ModelError, match=r"acme/tiny: can't be fetched from the hub: We couldn't connect\. It is no local"):
        models.resolve("acme/tiny", tmp_path)


def test_random_weights_are_a_whole_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "random_weights.py"
    subprocess.run(
        [sys.executable, str(script), "smollm2-135m", str(tmp_path / "m"), "--layers", "1"], check=True, capture_output=True
    )
    from common.checkpoint import Checkpoint

    checkpoint = Checkpoint(tmp_path / "m")
    assert checkpoint.tied and checkpoint.layers == 30 and len(checkpoint.modules()) == 7
    first = np.frombuffer(
        checkpoint.file("model.layers.0.mlp.up_proj.weight").bytes_of("model.layers.0.mlp.up_proj.weight"), np.uint16
    )
    assert np.unique(first).size > 1000
    hole = checkpoint.file("model.layers.29.mlp.up_proj.weight").bytes_of("model.layers.29.mlp.up_proj.weight")
    assert not any(hole)
