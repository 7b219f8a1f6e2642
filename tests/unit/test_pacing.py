"""What a device measures of its pace: nothing that only a first or a disturbed run takes."""

from __future__ import annotations

import pytest
import torch

from fp_client import pacing


@pytest.mark.parametrize(
    ("takes", "found", "runs"),
    [
        ([9.0, 2.0, 3.0, 1.0], 2.0, 3),  # the first run compiles and reads; long ones are made twice more
        ([0.1, 0.09, 0.5, 0.08], 0.09, 3),
        ([0.01, 0.02, 0.03, 0.02, 0.02, 0.02, 0.001], 0.02, 6),
    ],
)
def test_the_least_of_the_runs_after_the_first(
    monkeypatch: pytest.MonkeyPatch, takes: list[float], found: float, runs: int
) -> None:
    clock, made = [0.0], []

    def work() -> None:
        clock[0] += takes[len(made)]
        made.append(1)

    monkeypatch.setattr(pacing.time, "perf_counter", lambda: clock[0])
    assert pacing._seconds(work, torch.device("cpu")) == pytest.approx(found)
    assert len(made) == runs
