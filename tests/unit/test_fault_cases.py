"""The lists of cases leave out no point, and random schedules are the same for the same seed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.faults import DISK, POINTS
from tests.faults.cases import SAMPLE, WRITING, point_cases, random_case, sample, storage_cases
from tests.faults.report import MARKS, table
from tests.faults.verdict import judge

KINDS = {"server.log.append": "UpdateAccepted", "device.state": "runs"}
PASSED = {
    point + next((f"/{which}" for begin, which in KINDS.items() if point.startswith(begin)), ""): 4
    for point in POINTS
    if not point.startswith("server.stop")
}
TRACE = {
    "server": {p: n for p, n in PASSED.items() if p.startswith("server") and "export" not in p},
    "alpha": {p: n for p, n in PASSED.items() if not p.startswith("server")},
    "beta": {p: n for p, n in PASSED.items() if not p.startswith("server")},
    "export": {p: n for p, n in PASSED.items() if "export" in p},
}


def points_of(cases: list, kind: str) -> set[str]:
    return {case.name.removesuffix(kind).strip().partition("/")[0] for case in cases if case.name.endswith(kind)}


def test_every_point_is_killed_on_both_sides() -> None:
    cases = point_cases(TRACE)
    assert len({case.name for case in cases}) == len(cases)
    assert points_of(cases, "kill server") == set(POINTS)
    assert points_of(cases, "kill device") == {point for point in POINTS if "export" not in point}
    assert points_of(cases, "disk full") == DISK
    for case in cases:
        for faults in case.faults.values():
            for one in faults:
                assert one["at"].partition("/")[0] in POINTS and one.get("hit", 1) >= 1
                assert re.fullmatch(r"kill|fail:ENOSPC|ask:(kill|term):(server|alpha)", one["do"])


def test_the_power_fails_at_every_point_in_two_ways() -> None:
    cases = storage_cases(TRACE)
    passed = {point for point in POINTS if "server.stop" not in point}
    assert points_of(cases, "power fails, nothing unsynced is left") == passed
    assert points_of(cases, "power fails, some of it is left") == {point for point in passed if point.startswith(WRITING)}


def test_a_seed_gives_the_same_schedule() -> None:
    schedules = [random_case(seed, TRACE) for seed in range(50)]
    assert schedules == [random_case(seed, TRACE) for seed in range(50)]
    assert all(sum(len(faults) for faults in case.faults.values()) == 3 for case in schedules)
    deeds = {
        one["do"].split(":")[1 if "ask" in one["do"] else 0] for c in schedules for faults in c.faults.values() for one in faults
    }
    assert deeds == {"kill", "net", "freeze", "delay", "jump", "mischief", "flip", "fail"}


def test_the_sample_is_of_cases_that_exist() -> None:
    assert [case.name for case in sample(TRACE)] == [*SAMPLE, "seed 000"]


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, "identical"),
        ({"adapter": "other"}, "failed"),
        ({"adapter": "other", "reasons": ["alpha is out of round 1: disk full"]}, "explained"),
        ({"state": "paused", "reasons": ["paused: why"]}, "failed"),
        ({"damaged": ["ab"]}, "failed"),
        ({"accepted": {"0/0/alpha": 2}}, "failed"),
        ({"weights": [{"alpha": 1}]}, "failed"),
    ],
)
def test_a_verdict(change: dict, outcome: str) -> None:
    calm = {
        "state": "finished", "ledger": {"0": "a"}, "broadcast": {"0": "b"}, "adapter": "c", "weights": [{"alpha": 1, "beta": 2}],
        "accepted": {"0/0/alpha": 1}, "damaged": [], "reasons": [],
    }  # fmt: skip
    assert judge({**calm, **change}, calm)[0] == outcome


def test_a_row_counts_its_outcomes_and_the_document_has_a_place_for_them() -> None:
    rows = table({("server.push.stored", "kill server"): ["identical", "failed", "identical"]}, ("kill server",))
    assert rows[2:] == [
        "| `server.push.stored` | the update is in the store; it does not count yet | 2 × same bytes, 1 × FAILED |"
    ]
    text = (Path(__file__).resolve().parents[2] / "docs" / "reliability.md").read_text()
    assert all(text.count(mark) == 1 for mark in MARKS)
