"""A few cases of `make faults`, `faults-random` and `faults-storage`: whole federations, killed, cut and without power."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import shadow
from tests.faults.cases import SAMPLE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(1200)  # a minute on an idle machine, and CI's is not
def test_a_sample_of_the_fault_points(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "sample", "--dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    lines = [json.loads(line) for line in (tmp_path / "sample.jsonl").read_text().splitlines()]
    names = {line["name"] for line in lines}
    expected = {name for name in SAMPLE if "power" not in name or shadow.compiler()}
    assert names > expected and all(line["happened"] for line in lines if line["name"] in expected)
