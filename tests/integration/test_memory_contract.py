"""The planner's contract, sampled: settings of `make bench-planner`, each measured in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


SETTINGS = (
    "smollm2-135m none 300 MiB 4×128",
    "smollm2-135m nf4 250 MiB 4×128",
    "smollm2-135m none 150 MiB 4×128 streamed",
    "smollm2-135m none 220 MiB 4×128 stitched",
)


@pytest.mark.parametrize("setting", SETTINGS)
def test_never_less_than_measured_and_little_more(setting: str, tmp_path: Path) -> None:
    results = tmp_path / "planner.jsonl"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/planner.py", "--only", setting, "--results", results, "--redo"],
        capture_output=True, text=True, cwd=ROOT, timeout=280, check=False,
    )  # fmt: skip
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert found, done.stdout + done.stderr
    for result in found:
        predicted, measured = result["predicted"], result["measured"]
        assert measured <= predicted <= measured + max(0.15 * measured, 48 << 20), result
    assert done.returncode == 0, done.stdout
