"""Fault points: the table and the calls agree, nothing happens unarmed, and each action does what it says, once."""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import faults
from common.faults import DISK, POINTS, VARIABLE, arm, fault

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def unarmed_again() -> Iterator[None]:
    yield
    arm({})


def plan(tmp_path: Path, *planned: dict, trace: Path | None = None) -> dict[str, str]:
    return {VARIABLE: json.dumps({"dir": str(tmp_path), "trace": str(trace or ""), "faults": list(planned)})}


def calls() -> list[tuple[str, ast.Call]]:
    """(file, call) of every `fault(…)` in the product."""
    found = []
    for package in ("common", "fp_server", "fp_client"):
        for path in (ROOT / package).rglob("*.py"):
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            named = [node for node in nodes if isinstance(node.func, ast.Name) and node.func.id == "fault"]
            found += [(f"{package}/{path.name}", node) for node in named]
    return found


def test_every_point_is_in_the_code_and_every_call_in_the_table() -> None:
    names = []
    for where, call in calls():
        assert isinstance(call.args[0], ast.Constant), f"{where}: a point's name is a literal"
        names.append(str(call.args[0].value))
        sides = {"fp_client": ("device", "worker"), "fp_server": ("server",), "common": ("common", "device")}
        assert names[-1].startswith(sides[where.partition("/")[0]]), f"{where}: {names[-1]}"
    assert set(names) == set(POINTS)
    assert set(POINTS) >= DISK
    assert all(text and not text.endswith(".") for text in POINTS.values())


def test_unarmed_it_is_a_look_at_none(tmp_path: Path) -> None:
    arm({})
    assert faults._armed is None
    fault("no such point, and nobody looks")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_point_or_deed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no fault point is called 'server\.nowhere'"):
        arm(plan(tmp_path, {"at": "server.nowhere", "do": "kill"}))
    arm(plan(tmp_path, {"at": "server.push.header", "do": "dance"}))
    with pytest.raises(ValueError, match="'dance': not kill"):
        fault("server.push.header")


def test_the_nth_hit_fails_once_and_never_again(tmp_path: Path) -> None:
    armed = plan(tmp_path, {"at": "server.object.synced", "hit": 2, "do": "fail:ENOSPC"})
    arm(armed)
    fault("server.object.synced")
    with pytest.raises(OSError) as failed:
        fault("server.object.synced")
    assert failed.value.errno == errno.ENOSPC
    fault("server.object.synced")
    arm(armed)  # a process that is started again
    for _ in range(3):
        fault("server.object.synced")


def test_a_point_says_which_of_its_kind(tmp_path: Path) -> None:
    arm(plan(tmp_path, {"at": "server.log.append.written/RoundClosed", "do": "fail:EIO"}))
    fault("server.log.append.written", "RoundOpened", sqlite3.OperationalError)
    with pytest.raises(sqlite3.OperationalError, match="Input/output error"):
        fault("server.log.append.written", "RoundClosed", sqlite3.OperationalError)


def test_what_is_passed_is_traced(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    arm(plan(tmp_path, trace=trace))
    fault("device.state.write", "runs")
    fault("device.push.acked")
    assert [line.split()[1:] for line in trace.read_text().splitlines()] == [
        [str(os.getpid()), "device.state.write/runs"], [str(os.getpid()), "device.push.acked"],
    ]  # fmt: skip


def test_a_delay_and_a_question(tmp_path: Path) -> None:
    (tmp_path / "fault-1.done").touch()
    arm(plan(tmp_path, {"at": "device.push.start", "do": "delay:0.2"}, {"at": "device.push.end", "do": "ask:cut"}))
    begin = time.monotonic()
    fault("device.push.start")
    assert time.monotonic() - begin >= 0.2
    fault("device.push.end")
    assert (tmp_path / "fault-1.asked").read_text() == "cut"


def test_a_kill_is_a_kill(tmp_path: Path) -> None:
    code = "import os\nfrom common.faults import arm, fault\narm(os.environ)\nfault('worker.start')\nprint('alive')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **plan(tmp_path, {"at": "worker.start", "do": "kill"})}
    for expected, said in ((-signal.SIGKILL, ""), (0, "alive\n")):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (expected, said)
    assert "this is a test: kill at worker.start" in done.stderr
