"""Fixtures: an engine that answers, the images, models that containers can read, and fleets that are always cleaned up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.checkpoint import Checkpoint, dump_manifest
from tests.containers.fleet import CLIENT, ROOT, SERVER, Fleet, call
from tests.integration.federation import write_tokenizer
from tests.unit import tiny

REAL = ROOT / ".cache/models/SmolLM2-135M-Instruct"


@pytest.fixture(scope="session", autouse=True)
def images() -> None:
    """`make images` has built them from this checkout."""
    missing = [image for image in (SERVER, CLIENT) if call("docker", "image", "inspect", image, check=False).returncode]
    if missing:
        pytest.fail(f"{', '.join(missing)}: no such image, or no Docker engine answers; use `make test-containers`")


def readable(directory: Path) -> Path:
    """For the containers' user too."""
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return directory


def write_manifest(directory: Path, name: str) -> Path:
    """The manifest of a model, beside its directory."""
    checkpoint = Checkpoint(directory)
    try:
        manifest = checkpoint.manifest(name, checkpoint.fingerprint(lambda *_: None))
    finally:
        checkpoint.close()
    path = directory.parent / f"{name}.json"
    path.write_text(dump_manifest(manifest))
    return readable(path)


@pytest.fixture(scope="session")
def tiny_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/tiny.json beside models/tiny: a small random llama with a byte-level tokenizer."""
    models = tmp_path_factory.mktemp("tiny") / "models"
    models.mkdir()
    made = tiny.make("llama", models).rename(models / "tiny")
    write_tokenizer(made)
    readable(models)
    return write_manifest(made, "tiny")


@pytest.fixture(scope="session")
def real_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/smollm2-135m.json beside models/smollm2-135m; `make model` writes the weights."""
    if not (REAL / "model.safetensors").exists():
        pytest.fail(f"{REAL} is missing; run `make model`")
    models = tmp_path_factory.mktemp("real") / "models"
    readable(Path(shutil.copytree(REAL, models / "smollm2-135m")))
    return write_manifest(models / "smollm2-135m", "smollm2-135m")


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Fleet]]:
    """Make fleets; their containers, volumes and networks are removed at the end."""
    made: list[Fleet] = []

    def make(name: str, manifest: Path, budgets: dict[str, str], **options: int) -> Fleet:
        made.append(Fleet(tmp_path_factory.mktemp("fleet") / name, manifest.parent, manifest.stem, budgets, **options))
        return made[-1]

    yield make
    for fleet in made:
        fleet.down()
