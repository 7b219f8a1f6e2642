"""Fill wheelhouse/ with every wheel the images need, so that they can be built without an index: `make wheelhouse`.

torch comes from where pip here finds it, or, where that would be a CUDA build of several gigabytes, from torch's own index of
CPU builds. The rest is fetched inside the base image, whose Python and platform the wheels are for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "wheelhouse"
BASE = os.environ.get("BASE", "python:3.11-slim")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD = ["setuptools>=77"]
"""What building the project itself takes (pyproject.toml, [build-system])."""


def pip(*arguments: str) -> str:
    """Run this Python's pip; returns what it prints."""
    return subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def in_base(*command: str) -> str:
    """Run a command inside the base image as this user, with the checkout at /src and the wheels at /wheelhouse."""
    mounts = ["-v", f"{ROOT}:/src:ro", "-v", f"{WHEELS}:/wheelhouse"]
    user = ["--user", f"{os.getuid()}:{os.getgid()}", "-e", "HOME=/tmp"]
    return subprocess.run(
        ["docker", "run", "--rm", *mounts, *user, BASE, *command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def torch(python: str) -> None:
    """The pinned torch, a CPU build."""
    if list(WHEELS.glob(f"torch-{_pinned('torch')}*.whl")):
        return
    for old in WHEELS.glob("torch-*.whl"):
        old.unlink()
    wanted = ["--no-deps", "--only-binary=:all:", "--python-version", python, "-c", str(ROOT / "constraints.txt"), "torch"]
    with tempfile.TemporaryDirectory() as target:
        told = pip("install", "-q", "--dry-run", "--ignore-installed", "--target", target, "--report", "-", *wanted)
    requires = json.loads(told)["install"][0]["metadata"].get("requires_dist", [])
    cuda = any(line.startswith(("nvidia", "cuda", "triton")) for line in requires)
    pip("download", "-q", "-d", str(WHEELS), *(["--index-url", CPU_INDEX] if cuda else []), *wanted)


def _pinned(name: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))


def main() -> None:
    """torch first: everything else is resolved with it."""
    python = in_base("python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    torch(python)
    wanted = in_base("python", "/src/deploy/requirements.py", "/src/pyproject.toml", "client").split("\n")
    in_base(
        "python", "-m", "pip", "download", "-q", "--no-cache-dir", "--only-binary=:all:", "-d", "/wheelhouse",
        "--find-links", "/wheelhouse", "-c", "/src/constraints.txt", *filter(None, wanted), *BUILD,
    )  # fmt: skip
    wheels = sorted(WHEELS.glob("*.whl"))
    print(f"{WHEELS}: {len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
