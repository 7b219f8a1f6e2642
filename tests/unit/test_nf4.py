"""The quantized store: bitsandbytes' own numbers, made once, repaired when damaged."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from common.checkpoint import Checkpoint
from common.errors import StorageError
from common.types import ProbeSpec, Quantization
from fp_client import nf4
from fp_client.loader import UnitLoader
from fp_client.nf4 import Nf4Store
from fp_client.probe import probe
from tests.unit import tiny

FINGERPRINT = "ab" * 32


def store_loader(checkpoint: Checkpoint, tmp_path: Path, dtype: torch.dtype = torch.float32) -> UnitLoader:
    return UnitLoader(checkpoint, "cpu", dtype, Quantization.NF4, tmp_path / "store", FINGERPRINT)


def quantize_whole(model: Any) -> Any:
    """The twin: bitsandbytes quantizes each whole matrix; the model then holds what comes back."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                packed, state = bitsandbytes.functional.quantize_4bit(
                    module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=False
                )
                module.weight.data = bitsandbytes.functional.dequantize_4bit(packed, state).to(module.weight.dtype)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("chunk", [nf4.CHUNK, 64])
def test_probe_equals_bitsandbytes_on_whole_matrices(
    family: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "CHUNK", chunk)
    checkpoint, rows = Checkpoint(tiny.make(family, tmp_path)), tiny.batch()
    found = probe(store_loader(checkpoint, tmp_path), rows, [rows], ProbeSpec())
    twin = tiny.whole(checkpoint.directory)
    plain = tiny.full_loss(twin, rows)
    assert found.loss == pytest.approx(tiny.full_loss(quantize_whole(twin), rows), abs=1e-5)
    assert abs(found.loss - plain) > 1e-4


def test_a_unit_is_quantized_once_and_read_back_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, rows = Checkpoint(tiny.make("llama", tmp_path)), tiny.batch()
    first = probe(store_loader(checkpoint, tmp_path), rows, [rows], ProbeSpec())

    def refuse(*args: object) -> None:
        raise AssertionError("quantized twice")

    monkeypatch.setattr(Nf4Store, "build", refuse)
    assert probe(store_loader(checkpoint, tmp_path), rows, [rows], ProbeSpec()).loss == first.loss


def one_entry(checkpoint: Checkpoint, tmp_path: Path) -> tuple[Nf4Store, Path, list[str]]:
    store = Nf4Store(tmp_path / "store", checkpoint, FINGERPRINT)
    modules = [module.name for module in checkpoint.modules()]
    store.open(0, modules).close()
    return store, store.path(0), modules


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other modules"])
def test_a_damaged_entry_is_made_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint(tiny.make("llama", tmp_path))
    _, path, modules = one_entry(checkpoint, tmp_path)
    good = path.read_bytes()
    if damage == "flip":
        path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    elif damage == "truncate":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(good.replace(b"mlp.up_proj.packed", b"mlp.xp_proj.packed"))
    with caplog.at_level(logging.WARNING):
        Nf4Store(tmp_path / "store", checkpoint, FINGERPRINT).open(0, modules).close()
    assert "quantized layer 1 is damaged" in caplog.text
    assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def test_another_base_has_another_entry(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.make("llama", tmp_path))
    _, path, _ = one_entry(checkpoint, tmp_path)
    assert Nf4Store(tmp_path / "store", checkpoint, "cd" * 32).path(0) != path


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny.make("llama", tmp_path))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nf4.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        one_entry(checkpoint, tmp_path)
    assert not list((tmp_path / "store").rglob("layer-*"))


def test_what_a_kill_left_of_a_layer_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.make("llama", tmp_path))
    path = Nf4Store(tmp_path / "store", checkpoint, FINGERPRINT).path(0)
    path.parent.mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as alive:
        stays = {path.with_suffix(f".{alive.pid}.tmp"), path.with_name(f"layer-00001.{os.getpid()}.tmp")}
        reused = path.with_suffix(f".{os.getppid()}.tmp")
        goes = {reused, *(path.with_suffix(f".{pid}.tmp") for pid in (dead.pid, os.getpid(), 10**30, "x"))}
        begun = path.with_suffix(f".{2**22 + 1}.tmp")  # of a process that has no pid here: another container's
        for one in stays | goes | {begun}:
            one.write_bytes(b"half a layer")
        for seconds, those in ((120, goes), (7200, {reused})):
            for one in those:
                os.utime(one, (time.time() - seconds, time.time() - seconds))
        stays.add(begun)
        one_entry(checkpoint, tmp_path)
        assert set(path.parent.iterdir()) == {path} | stays


def test_stored_bits_are_about_four_and_a_half_a_weight(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.make("llama", tmp_path))
    _, path, _ = one_entry(checkpoint, tmp_path)
    weights = sum(m.d_out * m.d_in for m in checkpoint.modules())
    assert 4.5 <= 8 * path.stat().st_size / weights < 6.0  # headers weigh in on a tiny layer


def test_modules_stay_in_train_mode_and_are_not_repacked(tmp_path: Path) -> None:
    loader = store_loader(Checkpoint(tiny.make("llama", tmp_path)), tmp_path)
    layer = loader.layers(loader.model())[0]
    loader.materialise(layer, 0)
    linears = [m for m in layer.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linears) == 7
    assert all(m.training for m in linears)
    before = [m.weight.data.clone() for m in linears]
    with torch.no_grad():
        for module in linears:
            module(torch.randn(2, module.in_features))
    assert all(torch.equal(x, m.weight.data) for x, m in zip(before, linears, strict=True))


def test_nf4_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a store directory"):
        UnitLoader(Checkpoint(tiny.make("llama", tmp_path)), quantization=Quantization.NF4)
