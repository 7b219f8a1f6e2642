"""What a status holds, and what a person sees of it."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from test_rounds import MANIFEST, Shell, assigned, closed, committed, dropped, opened, probed

from common.types import Capacity, Gradient, ObjectRef, PlanReport, UpdateMetrics
from fp_server import commands as c
from fp_server import events as e
from fp_server.audit import Actor, Entry, Row
from fp_server.outliers import Score
from fp_server.status import loss_curve, run_summary, status
from fp_server.views import audit_lines, audit_table, brief, runs_table, size, status_view


def shown(thing, width: int = 220) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


def whole(machine, problem="", connected=("a", "b")):
    made = status(machine, problem, list(connected))
    return json.loads(json.dumps(made, allow_nan=False))


def test_sizes():
    assert [size(n) for n in (None, 0, 1023, 1024, 1.5 * 2**20, 2**30, 5 * 2**40)] == [
        "–", "0 B", "1023 B", "1.0 KiB", "1.5 MiB", "1.00 GiB", "5120.00 GiB",
    ]  # fmt: skip


def test_no_run():
    assert status(None, "x", ["a"]) == {"run": None, "state": "idle", "connected": ["a"], "problem": "x"}
    assert "devices connected: a" in shown(status_view(status(None, "", ["a"])))
    assert "no runs yet" in shown(runs_table([]))
    assert "`fp-server start RUN.toml --dir d`" in shown(runs_table([], " --dir d"))


def test_a_round_under_way():
    shell = opened()
    shell.do(c.ProgressSeen("a", shell.key, "probe", 3, 30))
    shell.probe("b")
    shell.assign("b")
    made = whole(shell.machine)
    assert made["state"] == "round" and made["current"]["round"] == 1 and made["current"]["closed"] is None
    assert made["current"]["devices"]["a"] == {"stage": "probing", "progress": {"phase": "probe", "done": 3, "total": 30}}
    b = made["current"]["devices"]["b"]
    assert b["units"] == ["1", "4"] and b["groups"] == [["1", "2"], ["3", "4"]] and b["probabilities"] == [[0.5, 0.5]] * 2
    assert made["devices"]["a"] == {
        "connected": True, "revoked": False, "samples": 10, "budget_bytes": 0, "units": 2, "refusal": "", "smallest_budget": 7,
        "gradient": "submodel", "step_seconds": None,
    }  # fmt: skip
    text = shown(status_view(made))
    assert "probing (probe 10 %)" in text and "r  round  fedpruner on toy, 0 of 2 rounds" in text


def test_a_whole_run_and_what_went_wrong_in_it():
    shell = opened()
    key = shell.key
    shell.probe("a", "b")
    shell.assign("a", "b")
    shell.do(dropped(key, "b"))
    shell.accept("a")
    made = whole(shell.machine, "the disk is full [sic]")
    assert made["state"] == "aggregating" and "problem: the disk is full [sic]" in shown(status_view(made))
    shell.commit()
    shell.do(e.RunPaused("r", "by hand"))
    made = whole(shell.machine, connected=("a",))
    assert made["paused"] == "by hand" and made["ledger_layers"] == [1] and made["rounds_done"] == 1
    first = made["history"][0]
    assert first["changed_layers"] == [1] and first["energy_dropped"] == {"1": 0.0} and first["committed"]
    assert first["devices"]["b"]["error"] == "WorkerError" and first["devices"]["b"]["message"] == "it broke"
    text = shown(status_view(made))
    assert "paused: by hand" in text and "it broke" in text and "100 B" in text
    table = shown(runs_table([run_summary(shell.machine)]))
    assert "1 of 2" in table and "2.0000" in table and "→" not in table, "measured once"


def test_the_loss_curve_is_weighted_by_tokens_and_has_the_final_evaluation():
    shell = opened(rounds=1)
    key = shell.key
    for device, loss, tokens in (("a", 3.0, 10), ("b", 1.0, 30)):
        event = probed(key, device)
        shell.do(e.ProbeReceived("r", key, device, event.similarity, event.in_out, loss, tokens, 1, 1.0))
    shell.assign("a", "b")
    shell.accept("a", "b")
    shell.do(committed(key))
    shell.probe("a")
    both = frozenset({"a", "b"})
    assert loss_curve(shell.machine) == [(0, pytest.approx(1.5), 2, both)], "b has not reported yet"
    shell.probe("b")
    assert loss_curve(shell.machine) == [(0, pytest.approx(1.5), 2, both), (1, pytest.approx(2.0), 2, both)]
    assert "final evaluation  2 devices, full-model held-out loss 2.0000" in shown(status_view(whole(shell.machine)))


def test_devices_that_have_not_answered_or_cannot():
    shell = Shell()
    shell.join("a", units=0)
    shell.do(c.Connected("z"))
    made = whole(shell.machine, connected=("a", "z"))
    assert made["devices"]["a"]["refusal"] == "too small" and made["devices"]["z"]["refusal"] == "has not answered yet"
    text = shown(status_view(made))
    assert "too small" in text and "has not answered yet" in text and MANIFEST.layers == 4


@pytest.mark.parametrize("words", ["no such directory [/data/models]", "raise [budget]", "red \x1b[31m\x9b and\nmore"])
def test_the_words_of_a_device_are_shown_and_not_obeyed(words):
    """Square brackets are no markup, and control characters don't reach the terminal."""
    shell = opened()
    shell.do(e.DeviceDropped("r", shell.key, "a", "DataError", words))
    made = whole(shell.machine, problem=words)
    made["paused"] = made["current"]["closed"] = words
    del made["current"]["devices"]["b"]
    made["devices"]["b"]["refusal"] = words
    text = shown(status_view(made))
    told = "".join(c if c.isprintable() else " " for c in words)
    assert text.count(told) == 6, text  # problem, paused, two devices, the round, a's outcome in it
    assert text.replace("\n", "").isprintable()
    assert told in shown(runs_table([run_summary(shell.machine) | {"model": words}]))


def test_what_a_device_says_of_its_gradient_is_shown_within_80_columns():
    shell = Shell('[train]\ngradient = "auto"\n')
    for device in ("laptop-north", "phone"):
        streamed = Capacity(Gradient.STREAMED, 2, 1, True, 5, 3.5)
        report = PlanReport("r", 1000, "ab" * 32, (streamed,), (1,) * 4, 7, "", 300 << 20)
        shell.do(c.Connected(device), e.PlanReceived("r", device, report, 1000))
    key = shell.key
    metrics = UpdateMetrics(12.31, 9.87, 99.0, 310 << 20, 305 << 20, 60.0, 3.5, 3.25, 0.4125, (0.25, 0.5))
    for device in ("laptop-north", "phone"):
        shell.probe(device)
        shell.do(dataclasses.replace(assigned(key, device), gradient=Gradient.STREAMED))
    waiting = shown(status_view(whole(shell.machine)), 80)
    assert "2 streamed" in waiting and "gradient auto" in waiting
    shell.do(e.UpdateAccepted("r", key, "laptop-north", ObjectRef("ab" * 32, 5 << 20), metrics))
    shell.do(e.UpdateAccepted("r", key, "phone", ObjectRef("ab" * 32, 5 << 20), UpdateMetrics(unit_fidelity=(0.5,))))
    shell.commit()
    made = whole(shell.machine)
    made["current"] = None
    member, other = (made["history"][0]["devices"][name] for name in ("laptop-north", "phone"))
    assert (member["gradient"], member["predicted_step_seconds"], member["step_seconds"]) == ("streamed", 3.5, 3.25)
    assert member["fidelity"] == 0.4125 and member["unit_fidelity"] == {"1": 0.25, "4": 0.5}
    assert other["step_seconds"] is other["fidelity"] is None and "unit_fidelity" not in other, "not one value a unit"
    text = shown(status_view(made), 80)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "laptop-north 1 4 5.0 MiB 305 MiB (310 MiB) 12.31 → 9.87" in lines, text
    assert "laptop-north streamed 3.25 s (3.50 s) 0.412 (units 0.250 to 0.500)" in lines and "phone streamed – exact" in lines, (
        text
    )


def test_a_cosine_nobody_has_measured_has_no_column():
    shell = opened()
    shell.probe("a", "b")
    shell.assign("a", "b")
    shell.do(e.UpdateAccepted("r", shell.key, "a", ObjectRef("ab" * 32, 100), UpdateMetrics(step_seconds=3.25)))
    text = shown(status_view(whole(shell.machine)))
    assert "3.25 s" in text and "cosine" not in text
    shell.do(e.UpdateAccepted("r", shell.key, "b", ObjectRef("ab" * 32, 100), UpdateMetrics(step_seconds=3.25, fidelity=0.5)))
    text = shown(status_view(whole(shell.machine)))
    assert "cosine with the full model's" in text and "0.500" in text


@pytest.mark.parametrize(("units", "of"), [("layer", 4), ("component", 8)])
def test_units_are_said_to_be_of_so_many(units, of):
    shell = Shell(f'[pruning]\nunits = "{units}"\n')
    shell.join("a")
    made = whole(shell.machine)
    assert made["model_units"] == of and f"units of {of}" in shown(status_view(made))


def test_every_key_is_in_the_protocols_table():
    """Of a run with updates that were trained, compared, stacked, and of one that was not."""
    shell = opened()
    shell.do(c.ProgressSeen("a", shell.key, "probe", 3, 30))
    early = whole(shell.machine)
    shell.probe("a", "b")
    shell.assign("a", "b")
    metrics = UpdateMetrics(fidelity=0.5, unit_fidelity=(0.5, 0.5))
    shell.do(e.UpdateAccepted("r", shell.key, "a", ObjectRef("ab" * 32, 100), metrics), dropped(shell.key, "b"))
    shell.do(e.UpdatesReviewed("r", shell.key, {"a": Score(2, 2, -0.25, 1.5)}, {}, True))
    shell.commit()
    late = whole(shell.machine)
    entry = late["history"][0]
    keys = {*early, *late, *late["devices"]["a"], *late["loss"][0], *entry, *entry["devices"]["a"]["review"]}
    keys |= {key for made in (early["current"], entry) for member in made["devices"].values() for key in member}
    keys |= set(early["current"]["devices"]["a"]["progress"])
    table = (Path(__file__).parents[2] / "docs/protocol.md").read_text().split("## Status JSON")[1]
    told = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`]*)`", table))))
    assert {"min_devices", "update_bytes", "agreement", "phase"} <= keys and keys - told == set()


def test_how_updates_compare_is_told_and_what_is_left_out_is_shown():
    for reject, words in ((True, "left out: it points elsewhere"), (False, "stands out: it points elsewhere")):
        shell = closed("a", "b")
        scores = {"a": Score(2, 2, -0.25, 1.5, 1.25), "b": Score(2, 1, 0.125, None)}
        shell.do(e.UpdatesReviewed("r", shell.key, scores, {"a": "it points elsewhere"}, reject))
        members = whole(shell.machine)["current"]["devices"]
        assert members["a"]["review"] == {
            "others": 2, "against": 2, "agreement": -0.25, "size": 1.5, "whole": 1.25,
            "outlier": "it points elsewhere", "rejected": reject,
        }  # fmt: skip
        assert members["b"]["review"]["outlier"] is None and not members["b"]["review"]["rejected"]
        text = " ".join(shown(status_view(whole(shell.machine))).split())
        assert words in text and text.count("out:") == 1


def test_a_gathering_run_says_what_it_waits_for_and_a_line_says_where_a_run_stands():
    shell = Shell()
    report = PlanReport("r", 10, "ab" * 32, (Capacity(Gradient.SUBMODEL, 2, 1, True, 5),), (1,) * 4, 7)
    shell.do(c.Connected("a"), e.PlanReceived("r", "a", report, 10))
    made = whole(shell.machine, connected=("a",))
    text = shown(status_view(made))
    assert "waits for 2 able devices (run.min_devices); 1 is here" in text and "ready" in text
    text = shown(status_view(whole(Shell(min_updates=3, devices_per_round=0.25).machine)))
    assert "waits for 11 able devices (of fewer not run.min_updates would be drawn); 0 are here" in text
    assert brief(made) == "r: gathering, 0 of 2 rounds"
    shell.do(c.Connected("b"), e.PlanReceived("r", "b", report, 10))
    shell.probe("a", "b")
    said = brief(whole(shell.machine))
    assert said.startswith("r: round, 0 of 2 rounds, full-model held-out loss 2.0000; round 1: a choosing, b "), said
    assert brief(status(None, "", [])) == "no run yet"


def test_in_a_pipe_one_sees_how_far_a_device_is():
    shell = opened()
    shell.do(c.ProgressSeen("a", shell.key, "probing", 3, 8))
    made = whole(shell.machine)
    assert "a probing (probing 37 %), b probing" in brief(made, progress=True), brief(made, progress=True)
    assert "a probing, b probing" in brief(made)


def test_what_the_final_evaluation_waits_for_is_said():
    shell = closed("a", "b", rounds=1)
    shell.do(c.Disconnected("b"))
    shell.commit()
    made = whole(shell.machine)
    assert made["state"] == "gathering" and made["awaited_devices"] == ["b"]
    text = shown(status_view(made))
    assert "the final evaluation waits for b" in text and "able devices" not in text
    assert whole(opened().machine)["awaited_devices"] == []


def test_a_reason_is_below_the_rounds_table_which_fits_80_columns():
    shell = opened()
    gone = "the certificate of 'b' has been revoked; ask the operator for a new token"
    shell.do(e.DeviceDropped("r", shell.key, "b", "IdentityError", gone, True))
    shell.do(e.DeviceDropped("r", shell.key, "a", "WorkerError", "it broke"))
    shell.do(c.Disconnected("b"))
    lines = [line.rstrip() for line in shown(status_view(whole(shell.machine, connected=("a",))), 80).splitlines()]
    assert f"b: {gone}" in lines and "a: it broke" in lines, lines
    rows = [line.split() for line in lines if line.startswith((" a ", " b "))]
    assert [row[-1] for row in rows[:2]] == ["dropped", "revoked"], lines  # the next attempt follows


def test_a_device_that_is_away_has_another_mark_and_a_revoked_one_says_so():
    shell = opened()
    shell.do(c.Disconnected("b"))
    shell.do(c.Revoked("b"))
    rows = [
        line for line in shown(status_view(whole(shell.machine, connected=("a",)))).splitlines() if "●" in line or "○" in line
    ]
    assert "●" in rows[0] and " a " in rows[0] and "○" in rows[1] and rows[1].rstrip(" │").endswith("revoked")


def test_an_audit_entry_is_a_line_for_a_pipe_and_nothing_of_it_is_cut_in_a_table():
    who = Actor("operator", "operator", "ab12", "192.168.100.200:54321")
    there = "/srv/" + "backups/" * 12 + "b.tar"
    rows = [
        Row(1, 1.0, Entry(who, "token", "device phone-17, valid for 86400 s")),
        Row(2, 2.0, Entry(Actor("x", address="[2001:db8::1]:77"), "backup", f"to\n{there}", "failed: full")),
    ]
    first, second = audit_lines(rows)
    assert first.split("\t")[1:] == ["operator operator", "token", "device phone-17, valid for 24 h", "ok", who.address]
    assert second.split("\t")[3] == f"to {there}"
    text = shown(audit_table(rows), 80)
    assert "…" not in text and "54321" not in text and "]:77" not in text and "192.168.100.200" in shown(audit_table(rows))
    assert "nothing in the audit trail" in shown(audit_table([]))
