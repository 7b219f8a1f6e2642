"""Fixtures: the tiny model with a tokenizer, the real weights, and a federation that is always cleaned up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.federation import Federation, write_tokenizer
from tests.unit import tiny

REAL = Path(__file__).resolve().parents[2] / ".cache/models/SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random llama of 24 layers with a byte-level tokenizer; budgets of some 100 MB hold some of its layers."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 24}
    directory = tiny.make("llama", tmp_path_factory.mktemp("model"), **sizes)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct; `make model` writes it."""
    if not (REAL / "model.safetensors").exists():
        pytest.fail(f"{REAL} is missing; run `make model`")
    return REAL


@pytest.fixture
def federate(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    """Make federations; their processes are killed at the end."""
    made: list[Federation] = []

    def make(model: Path, model_name: str = "tiny", name: str = "f") -> Federation:
        root = tmp_path / name
        root.mkdir()
        made.append(Federation(root, model, model_name))
        return made[-1]

    yield make
    for federation in made:
        federation.close()
