"""Of which code a result is: what has changed since does not count as tried."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("common", "fp_server", "fp_client", "proto", "tests/faults")
KINDS = {".py", ".proto", ".c"}


def digest(root: Path = ROOT, parts: Sequence[str] = PARTS) -> str:
    """The first 12 hex digits of a sha256 over all files of the product and of this runner, by name and content."""
    whole = hashlib.sha256()
    for part in parts:
        for path in sorted(path for path in (root / part).rglob("*") if path.suffix in KINDS):
            whole.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()[:12]


def commit(root: Path = ROOT, parts: Sequence[str] = PARTS) -> str:
    """The commit that is checked out, and whether these sources differ from it; empty without git."""
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "--", *parts], cwd=root, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
