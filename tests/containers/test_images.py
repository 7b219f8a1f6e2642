"""What is in the images, layer by layer, and what is not: no secret, no data, nothing unpinned, no root, and little of it."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pytest

from tests.containers.fleet import CLIENT, ROOT, SERVER, call, docker

BASE = "python:3.11-slim"
MOST_ABOVE_BASE = 300_000_000
"""Bytes the server may add to its base."""
TEXT = 5 << 20
"""Larger files are libraries; only their names are looked at."""

BUNDLES = re.compile(r"(^|/)(certifi/cacert\.pem|grpc/_cython/_credentials/roots\.pem|pip/_vendor/certifi/cacert\.pem)$")
"""Public lists of authorities that come with packages."""
NAMES = re.compile(
    r"\.(key|p12|pfx|jks|pem|crt|sqlite|safetensors|gguf|jsonl)$|(^|/)(\.netrc|\.pypirc|\.git-credentials|id_(rsa|ecdsa|ed25519)|\.env)$"
    r"|(^|/)(client|server|policy)\.toml$|(^|/)tests?/(unit|contract|integration|containers|faults)(/|$)"
)
"""Files that would be somebody's identity, data, weights or configuration."""
CONTENTS = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{60}"  # a key, not a library's mention of one
    rb"|fp1\.[A-Za-z0-9_=-]{60}"  # a join token
    rb"|(?m:^\s*(?:extra-)?index-url\s*=\s*https?://[^/\s:@]+:[^/\s@]+@)"  # an index with a password
)
MENTIONS = (b"PRIVATE KEY", b"fp1.", b"index-url")
"""No content matches without one of them, and they are found far faster."""
SETTINGS = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL", re.IGNORECASE)


def findings(layers: Iterator[tuple[str, IO[bytes]]]) -> list[str]:
    """What should not be in these layers, a line each."""
    found = []
    for layer, stream in layers:
        with tarfile.open(fileobj=stream) as files:
            for member in files:
                name = str(PurePosixPath("/") / member.name)
                if NAMES.search(name) and not BUNDLES.search(name):
                    found.append(f"{layer}: {name}")
                if member.isfile() and member.size <= TEXT:
                    content = files.extractfile(member)
                    assert content is not None
                    data = content.read()
                    if any(word in data for word in MENTIONS) and (bad := CONTENTS.search(data)) is not None:
                        found.append(f"{layer}: {name} holds {bad[0][:24]!r}…")
    return found


def own_layers(archive: tarfile.TarFile, base: int) -> Iterator[tuple[str, IO[bytes]]]:
    """The layers of a saved image above the `base` first ones."""
    manifest = archive.extractfile("manifest.json")
    assert manifest is not None
    for layer in json.load(manifest)[0]["Layers"][base:]:
        stream = archive.extractfile(layer)
        assert stream is not None
        yield layer[:12], stream


def inspect(image: str) -> dict[str, Any]:
    return dict(json.loads(docker("image", "inspect", image))[0])


def inside(image: str, *command: str) -> str:
    """What a command prints in a container of the image that may do nothing."""
    options = ("--rm", "--read-only", "--cap-drop", "ALL", "--network", "none", "--entrypoint", command[0])
    return docker("run", *options, image, *command[1:])


@pytest.mark.parametrize("image", [SERVER, CLIENT])
def test_no_secret_and_no_data_in_any_layer(image: str, tmp_path: Path) -> None:
    """The base's own layers are not ours to judge."""
    base = inspect(BASE)["RootFS"]["Layers"]
    assert inspect(image)["RootFS"]["Layers"][: len(base)] == base
    saved = tmp_path / "image.tar"
    try:
        call("docker", "save", "-o", saved, image)
        with tarfile.open(saved) as archive:
            assert findings(own_layers(archive, len(base))) == []
    finally:
        saved.unlink(missing_ok=True)


PLANTED = {
    "data/ca.key": b"",
    "opt/x/device.pem": b"",
    "device/client.toml": b"",
    "opt/x/tests/unit/data.jsonl": b"",
    "models/model.safetensors": b"",
    "etc/pip.conf": b"[global]\nindex-url = https://me:hunter2@pypi.example.org/simple\n",
    "opt/x/notes.txt": b"-----BEGIN EC PRIVATE KEY-----\n" + b"MHcCAQEEIBkg" * 8,
    "tmp/log": b"join with fp1." + b"eyJlbnJvbGwi" * 8,
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_of_them_would_be_found(name: str) -> None:
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as files:
        for path, content in {name: PLANTED[name], "opt/certifi/cacert.pem": b"-----BEGIN CERTIFICATE-----"}.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            files.addfile(member, io.BytesIO(content))
    layer.seek(0)
    assert [line.split()[1] for line in findings(iter([("layer", layer)]))] == [f"/{name}"]


@pytest.mark.parametrize("image", [SERVER, CLIENT])
def test_it_runs_as_nobody_in_particular(image: str) -> None:
    config = inspect(image)["Config"]
    assert config["User"] == "10001:10001" and inside(image, "id", "-u") == "10001"
    assert config["StopSignal"] == "SIGTERM" and config["Healthcheck"]["Test"][0] == "CMD" and len(config["Volumes"]) == 1
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert not [setting for setting in config["Env"] if SETTINGS.search(setting.partition("=")[0])]
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert not CONTENTS.search(history.encode()) and "://" not in history.replace("https://download.pytorch.org/whl/cpu", "")


PACKAGES = "from importlib import metadata\nfor one in metadata.distributions(): print(one.metadata['Name'], one.version)"


@pytest.mark.parametrize("image", [SERVER, CLIENT])
def test_every_package_is_pinned(image: str) -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    installed = dict(line.split() for line in inside(image, "python", "-c", PACKAGES).splitlines())
    del installed["fedpruner"]
    wrong = {
        name: version for name, version in installed.items() if pins.get(name.lower().replace("_", "-")) != version.split("+")[0]
    }
    assert installed and not wrong


def test_the_server_is_small_and_has_no_torch() -> None:
    above = inspect(SERVER)["Size"] - inspect(BASE)["Size"]
    print(
        f"server: {above / 1e6:.0f} MB over its base, device (CPU): {(inspect(CLIENT)['Size'] - inspect(BASE)['Size']) / 1e6:.0f}"
    )
    assert 0 < above < MOST_ABOVE_BASE
    installed = inside(SERVER, "python", "-c", PACKAGES).lower()
    assert "numpy" in installed and not re.search(r"^(torch|transformers|peft|bitsandbytes|datasets) ", installed, re.MULTILINE)
