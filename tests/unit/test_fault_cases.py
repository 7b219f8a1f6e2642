"""The lists of cases leave out no point, random schedules are the same for the same seed, and a verdict is hard to get."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.faults import DISK, POINTS
from tests.faults import sources, twin
from tests.faults.__main__ import Played, sweep
from tests.faults.case import Case, Result
from tests.faults.cases import LASTING, LIVELY, SAMPLE, WRITING, point_cases, random_case, sample, storage_cases
from tests.faults.deeds import NOTHING, acted, flip, kills
from tests.faults.report import MARKS, recorded, report, table
from tests.faults.verdict import against, contradictions, history, judge, refusals

KINDS = {
    "server.log.append": "UpdateAccepted", "device.state": "runs", "server.object.synced": "update",
    "server.object.renamed": "ledger", "common.private": "device.pem",
}  # fmt: skip
PASSED = {
    point + next((f"/{which}" for begin, which in KINDS.items() if point.startswith(begin)), ""): 4
    for point in POINTS
    if not point.startswith("server.stop")
} | {message: 2 for message in LIVELY if message.endswith("/progress")}


def traced(points: dict[str, int]) -> dict[str, dict[str, int]]:
    """As a run writes it."""
    return {
        "server": {p: n for p, n in points.items() if p.startswith("server") and "export" not in p},
        "alpha": {p: n for p, n in points.items() if not p.startswith("server")},
        "beta": {p: n for p, n in points.items() if not p.startswith("server")},
        "export": {p: n for p, n in points.items() if "export" in p},
    }


TRACE = traced({point: times for point, times in PASSED.items() if not point.startswith(LIVELY)})
EVENTFUL = traced(PASSED)


def points_of(cases: list, kind: str) -> set[str]:
    return {case.name.removesuffix(kind).strip().partition("/")[0] for case in cases if case.name.endswith(kind)}


def test_every_point_is_killed_on_both_sides() -> None:
    cases = point_cases(TRACE, EVENTFUL)
    assert len({case.name for case in cases}) == len(cases)
    assert points_of(cases, "kill server") == set(POINTS)
    assert points_of(cases, "kill device") == {point for point in POINTS if "export" not in point}
    assert points_of(cases, "disk full") == DISK
    for case in cases:
        for faults in case.faults.values():
            for one in faults:
                assert one["at"].partition("/")[0] in POINTS and one.get("hit", 1) >= 1
                assert re.fullmatch(r"kill|fail:ENOSPC|ask:(kill|term):(server|alpha)|ask:flip:objects|delay:2\.5", one["do"])
    assert {case.name.partition(" ")[0] for case in cases if case.eventful} == {p for p in PASSED if p.startswith(LIVELY)}


def test_the_power_fails_at_every_point_in_two_ways() -> None:
    cases = storage_cases(TRACE, EVENTFUL)
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
    every = [one["do"] for seed in range(100) for faults in random_case(seed, TRACE).faults.values() for one in faults]
    assert sum(do.endswith(f":{LASTING}") for do in every) == 5
    more = [one["do"] for seed in range(200) for faults in random_case(seed, TRACE).faults.values() for one in faults]
    assert {do.split(":")[-1] for do in more if "jump" in do} >= {"3600", "-3600", "86400", "-86400"}
    assert any("fail" in one["do"] for seed in range(100) for one in random_case(seed, TRACE).faults.get("alpha", []))


def test_the_sample_is_of_cases_that_exist() -> None:
    assert [case.name for case in sample(TRACE, EVENTFUL)] == [*SAMPLE, "seed 000"]


def line(name: str, outcome: str = "identical", **more: object) -> dict:
    return {
        "name": name, "outcome": outcome, "why": "", "seconds": 60, "happened": [], "found": {}, "sources": sources.digest(),
        "commit": "abc", **more,
    }  # fmt: skip


def written(path: Path, *lines: dict) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_the_report_says_how_much_was_played_and_of_which_sources(tmp_path: Path) -> None:
    out = tmp_path / "doc.md"
    out.write_text(f"before\n{MARKS[0]}\nolder\n{MARKS[1]}\nafter")
    calm = {"ordinary": {"trace": TRACE}, "eventful": {"trace": EVENTFUL}}
    (tmp_path / "calm.json").write_text(json.dumps({"calm": calm}))
    written(
        tmp_path / "points.jsonl",
        line("server.push.stored kill server"),
        line("server.push.stored kill device", "failed", why="for it", happened=["this"]),
        line("server.gone kill device"),  # of a point there is no more
        line("server.push.header kill device", sources="other"),
    )
    happened = [
        "alpha: ask:net:delay:0.3:3 at worker.start#1", "flipped a bit of x", "server: kill at server.push.stored#1",
        f"server: ask:flip:outbox at server.push.stored#1{NOTHING}", "server: ask:net:halfopen:40 at server.push.stored#1",
    ]  # fmt: skip
    written(tmp_path / "random.jsonl", line("seed 000", happened=happened))
    assert report(tmp_path, out) == 0
    text, planned = out.read_text(), len(point_cases(TRACE, EVENTFUL))
    assert text.startswith("before\n") and text.endswith("after") and "older" not in text
    assert f"2 of {planned} cases in 2 minutes; 1 ended with the same bytes" in text and "1 failed." in text
    assert f"All are of sources {sources.digest()} (commit abc)." in text and "MIXED" not in text
    assert "| same bytes | FAILED |  |  |" in text and "- server.push.stored kill device (this): for it" in text
    for row in ("| net delay | 1 |  |", "| kill | 1 |  |", "| flip outbox | 0 | 1 |", f"| net halfopen for {LASTING} s | 1 |  |"):
        assert row in text
    assert f"none of its {len(storage_cases(TRACE, EVENTFUL))} cases has been played yet" in text
    assert report(tmp_path, out, older=True) == 0
    assert f"3 of {planned} cases" in out.read_text() and "MIXED: " in out.read_text()


def test_what_failed_before_fails_again_and_other_sources_count_as_not_played(tmp_path: Path, capsys) -> None:
    path = tmp_path / "points.jsonl"
    cases = [Case(name) for name in ("one", "two", "three")]
    played = object.__new__(Played)
    played.sources, done = sources.digest(), []

    def play(case: Case) -> Result:
        done.append(case.name)
        return Result(case.name, "identical", "", 1.0, [], 0, {}, played.sources, "abc")

    played.play = play
    written(path, line("one", "failed"), line("two"), line("three", "failed", sources="other"))
    assert sweep(cases, played, path, 60.0, False) == 1 and done == ["three"]
    assert "failed (played again with --again): one" in capsys.readouterr().out
    assert sweep(cases[1:], played, path, 60.0, False) == 0 and done == ["three"]
    written(path, line("three", "failed", sources="other"))
    assert sweep(cases, played, path, 60.0, True) == 1 and done == ["three", "one", "two"]
    assert [one["name"] for one in recorded(path, played.sources)] == ["one", "two"]


def attempt(number: int, try_: int = 0, stacked: tuple[str, ...] | None = ("alpha", "beta"), **change: object) -> dict:
    counted = dict.fromkeys(stacked or (), "digest")
    closed = "every drawn device has delivered or dropped out"
    return {
        "round": number, "attempt": try_, "drawn": ["alpha", "beta"], "excluded": {}, "assigned": {d: [3] for d in counted},
        "accepted": counted, "twice": [], "lost": {}, "dropped": {}, "left_out": {}, "aggregate": stacked is not None,
        "closed": closed if stacked else f"1 updates, 2 needed ({closed})", "stacked": sorted(stacked) if stacked else None,
        **change,
    }  # fmt: skip


CALM = {
    "state": "finished", "ledger": {"0": "a"}, "broadcast": {"0": "b"}, "adapter": "c", "weights": [{"alpha": 1, "beta": 2}],
    "damaged": [], "twin": [], "attempts": [attempt(0), attempt(1)],
}  # fmt: skip
OUT = {"alpha": ["StorageError", "the disk is full"]}
"""A device is out of an attempt."""
FAILED = attempt(0, 0, None, accepted={"beta": "digest"}, assigned={"alpha": [3]}, dropped=OUT)
"""An attempt that came to nothing for it."""


def found(**change: object) -> dict:
    return {**copy.deepcopy(CALM), **change}


@pytest.mark.parametrize(
    ("change", "outcome", "words"),
    [
        ({}, "identical", ""),
        ({"adapter": "other"}, "failed", "the same devices took part"),
        ({"weights": [{"alpha": 1}]}, "failed", "the same devices took part"),
        ({"state": "paused"}, "failed", "the run is paused"),
        ({"damaged": ["ab"]}, "failed", "missing or damaged"),
        ({"twin": ["the ledger is not the sum"]}, "failed", "not the sum"),
        ({"attempts": [attempt(0, twice=["alpha"]), attempt(1)]}, "failed", "counted twice"),
        # an accepted update is lost: one is stacked, both were accepted
        ({"attempts": [attempt(0, stacked=("beta",), accepted={"alpha": "x", "beta": "y"}), attempt(1)]}, "failed", "stacked ['"),
        ({"attempts": [attempt(0, stacked=None, aggregate=True), attempt(0, 1), attempt(1)]}, "failed", "neither stacked nor"),
        ({"attempts": [attempt(0)]}, "failed", "rounds committed: [1] of 2"),
        ({"attempts": [attempt(0), attempt(0, 1), attempt(1)]}, "failed", "rounds committed: [1, 1, 2]"),
        # the reason is of another device, or of another attempt
        (
            {"adapter": "other", "attempts": [attempt(0, 0, ("beta",), dropped={"beta": ["E", "x"]}), attempt(1)]},
            "failed", "round 1, attempt 1: alpha is missing, and the log gives no reason",
        ),
        (
            {"adapter": "other", "attempts": [attempt(0, 0, ("beta",)), attempt(1, dropped=OUT)]},
            "failed", "round 1, attempt 1: alpha is missing",
        ),
        ({"attempts": [attempt(0, 0, None), attempt(0, 1), attempt(1)]}, "failed", "no reason"),
        ({"adapter": "other", "attempts": [FAILED, attempt(0, 1), attempt(1)]}, "other", "alpha is out: the disk is full"),
        ({"adapter": "other", "attempts": [attempt(0, 0, ("beta",), closed="quorum"), attempt(1)]}, "other", ""),
    ],
)  # fmt: skip
def test_a_verdict(change: dict, outcome: str, words: str) -> None:
    said, why = judge(found(**change), CALM, ("alpha", "beta"), 2)
    assert said == outcome and words in why


def test_other_bytes_are_explained_by_a_run_with_the_same_history_alone() -> None:
    one = found(adapter="other", attempts=[FAILED, attempt(0, 1), attempt(1)])
    task = {"task": "0/0", "stage": "train", "error": "StorageError", "message": "the disk is full"}
    assert refusals(one) == {"alpha": [task]}
    assert against(one, copy.deepcopy(one))[0] == "explained"
    assert against(one, {**one, "adapter": "third"}) == (
        "failed", "other adapter than the reference run in which the same devices drop out"
    )  # fmt: skip
    assert against(one, CALM)[0] == "failed" and history(one) != history(CALM)


def test_cases_with_one_history_have_the_same_bytes() -> None:
    late = [FAILED, attempt(0, 1), attempt(1)]
    lines = [line("a", found=found()), line("b", "explained", found=found(adapter="x", attempts=late)), line("c", found=found())]
    assert contradictions(lines) == []
    lines.append(line("d", "explained", found=found(adapter="y", attempts=late)))
    assert contradictions(lines) == ["d and b have the same history and other bytes"]


def test_the_twin_adds_up_and_sees_a_lost_update() -> None:
    rng = np.random.default_rng(0)
    at, samples = (0, "m"), {"alpha": 1, "beta": 3}
    updates = {d: {at: rng.normal(size=(6, 2)) @ rng.normal(size=(2, 5))} for d in samples}
    first = twin.stack({}, updates, samples, 2.0, 2)
    assert np.allclose(first[at], 0.5 * updates["alpha"][at] + 1.5 * updates["beta"][at])
    again = twin.stack(first, {"beta": {at: twin.top(first[at], 2) / 2.0}}, samples, 2.0, 2)
    assert np.allclose(again[at], first[at])  # what a device gives back unchanged changes nothing
    lost = twin.stack({}, {"beta": updates["beta"]}, samples, 2.0, 2)
    assert twin.differ("ledger", first, first) == [] and "layer 1 m is" in twin.differ("ledger", lost, first)[0]
    assert twin.differ("ledger", {}, first) and twin.differ("ledger", first, {})


def test_the_twin_reads_factors_and_dense_matrices(tmp_path: Path) -> None:
    a, b = np.ones((1, 3), np.float32), np.full((2, 1), 2, np.float32)
    full = "base_model.model.model.layers.1.self_attn.q_proj"
    for names in (
        ("layers.1.self_attn.q_proj.lora_A", "layers.1.self_attn.q_proj.lora_B"),
        (f"{full}.lora_A.weight", f"{full}.lora_B.weight"),
    ):
        save_file({names[0]: a, names[1]: b}, tmp_path / "x.safetensors")
        assert np.array_equal(twin.products(tmp_path / "x.safetensors")[1, "self_attn.q_proj"], np.full((2, 3), 2.0))
    save_file({"layers.0.mlp.up_proj.delta": a}, tmp_path / "y.safetensors")
    assert np.array_equal(twin.products(tmp_path / "y.safetensors")[0, "mlp.up_proj"], a)


def test_a_deed_says_whether_it_acted(tmp_path: Path) -> None:
    assert flip(tmp_path, "objects") == [] and flip(tmp_path, "outbox") == []
    objects, outbox, kept = tmp_path / "server" / "objects" / "ab", tmp_path / "alpha" / "outbox", tmp_path / "kept"
    for path in (objects, outbox, kept):
        path.mkdir(parents=True)
    (outbox / "run.new.safetensors").write_bytes(b"being written")
    (objects / "ab1").write_bytes(b"ledger")
    (kept / "ab1.kind").write_text("ledger")
    assert flip(tmp_path, "objects") == [] and flip(tmp_path, "outbox") == []  # those nobody could make good
    (objects / "ab2").write_bytes(b"update")
    assert flip(tmp_path, "objects") == ["server/objects/ab/ab2"] and (objects / "ab2").read_bytes() != b"update"
    marks = tmp_path / "marks"
    (marks / "server").mkdir(parents=True)
    assert acted(marks, "server", 0, "kill") and not acted(marks, "server", 0, "ask:flip:objects")
    (marks / "server" / "fault-0.acted").touch()
    assert acted(marks, "server", 0, "ask:flip:objects") and acted(marks, "server", 0, "ask:mischief:server:late")
    (marks / "server" / "mischief").write_text("late")  # no message has come since
    assert not acted(marks, "server", 0, "ask:mischief:server:late")
    assert kills("alpha", "device.push.start", "kill") and kills("server", "server.push.header", "ask:kill:alpha")
    assert not kills("alpha", "worker.start", "kill") and not kills("alpha", "worker.start", "fail:ENOSPC")


def test_sources_change_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "a.py").write_text("1")
    before = sources.digest(tmp_path)
    (tmp_path / "common" / "a.txt").write_text("not code")
    assert sources.digest(tmp_path) == before
    (tmp_path / "common" / "a.py").write_text("2")
    assert sources.digest(tmp_path) != before


def test_a_row_counts_its_outcomes_and_the_document_has_a_place_for_them() -> None:
    rows = table({("server.push.stored", "kill server"): ["identical", "failed", "identical"]}, ("kill server",))
    assert rows[2:] == [
        "| `server.push.stored` | the update is in the store; it does not count yet | 2 × same bytes, 1 × FAILED |"
    ]
    text = (Path(__file__).resolve().parents[2] / "docs" / "reliability.md").read_text()
    assert all(text.count(mark) == 1 for mark in MARKS)
