"""What the warm-up of a worker leaves behind."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest
import torch

from common.types import Quantization
from fp_client.warmup import warm_up


def test_what_a_killed_warm_up_left_goes_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, beside, other = (tmp_path / name for name in ("fedpruner-warm-left", "fedpruner-warm-beside", "other"))
    link = tmp_path / "fedpruner-warm-link"
    for one in (left, beside, other):
        one.mkdir()
        (one / "model.safetensors").write_bytes(b"weights")
    link.symlink_to(other)
    long_ago = time.time() - 2 * 3600
    for one in (left, other, link):
        os.utime(one, (long_ago, long_ago), follow_symlinks=False)
    warm_up("cpu", torch.float32, Quantization.NONE)
    assert set(tmp_path.iterdir()) == {beside, other, link}
    assert (other / "model.safetensors").exists()
