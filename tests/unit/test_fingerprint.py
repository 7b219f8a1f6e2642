"""The fingerprint's note: a restart need not read all weights; without it nothing fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common import checkpoint
from common.checkpoint import Checkpoint, cached_fingerprint
from common.tensorfile import write_tensors


@pytest.fixture
def model(tmp_path):
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4, "vocab_size": 8, "tie_word_embeddings": True}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    weights = {
        "model.embed_tokens.weight": np.zeros((8, 4), np.float32), "model.norm.weight": np.ones(4, np.float32),
        "model.layers.0.self_attn.q_proj.weight": np.ones((4, 4), np.float32),
    }  # fmt: skip
    write_tensors(tmp_path / "model" / "model.safetensors", weights)
    return Checkpoint(tmp_path / "model")


def test_it_is_read_once(model, tmp_path, monkeypatch):
    first = cached_fingerprint(model, tmp_path / "cache")
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self, progress=None: pytest.fail("read again"))
    assert cached_fingerprint(model, tmp_path / "cache") == first


@pytest.mark.parametrize("where", ["write_text", "replace", "mkdir"])
def test_a_full_disk_costs_the_note_and_nothing_else(model, tmp_path, monkeypatch, where, caplog):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, where, full)
    assert cached_fingerprint(model, tmp_path / "cache") == model.fingerprint()
    assert "read again at the next start: No space left on device" in caplog.text
    assert checkpoint.logger.name == "common.checkpoint"
