"""The lists of cases leave out no point, and random schedules are the same for the same seed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from common.faults import DISK, POINTS
from tests.faults.cases import SAMPLE, WRITING, point_cases, random_case, sample, storage_cases
from tests.faults.report import MARKS, report, table
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


def test_the_report_says_how_much_was_played(tmp_path: Path) -> None:
    out = tmp_path / "doc.md"
    out.write_text(f"before\n{MARKS[0]}\nolder\n{MARKS[1]}\nafter")
    (tmp_path / "calm.json").write_text(json.dumps({"trace": TRACE}))
    lines = [
        {"name": "server.push.stored kill server", "outcome": "identical", "why": "", "seconds": 60, "happened": []},
        {"name": "server.push.stored kill device", "outcome": "failed", "why": "for it", "seconds": 60, "happened": ["this"]},
    ]
    (tmp_path / "points.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    happened = ["alpha: ask:net:delay:0.3:3 at worker.start#1", "flipped a bit of x", "server: kill at server.push.stored#1"]
    (tmp_path / "random.jsonl").write_text(json.dumps({**lines[0], "name": "seed 000", "happened": happened}) + "\n")
    assert report(tmp_path, out) == 0
    text = out.read_text()
    assert text.startswith("before\n") and text.endswith("after") and "older" not in text
    assert f"2 of {len(point_cases(TRACE))} cases in 2 minutes; 1 ended with the same bytes" in text and "1 failed." in text
    assert "| same bytes | FAILED |  |  |" in text and "- server.push.stored kill device (this): for it" in text
    for row in ("| net delay | 1 |", "| a bit was flipped | 1 |", "| kill | 1 |"):
        assert row in text
    assert f"none of its {len(storage_cases(TRACE))} cases has been played yet" in text


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
