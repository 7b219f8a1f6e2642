"""The demo's own parts: its processes end with it, and its report says what happened."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def fleet_module(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo_fleet")


@pytest.fixture
def view(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo_view")


@pytest.fixture
def fleet(fleet_module, tmp_path):
    said: list[str] = []
    fleet = fleet_module.Fleet(tmp_path / "logs", said.append)
    fleet.said = said
    yield fleet
    fleet.stop()


def _until(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def test_a_command_is_shown_and_gives_its_output(fleet):
    assert fleet.command("python", "-c", "print(input() + '!')", stdin="hello\n") == "hello!\n"
    assert fleet.said == ["python -c print(input() + '!')"]


def test_a_failed_command_says_what_it_said(fleet, fleet_module):
    with pytest.raises(fleet_module.DemoError, match=r"exit 3.*\n.*no such thing"):
        fleet.command("python", "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)")
    with pytest.raises(fleet_module.DemoError, match="make install"):
        fleet.command("fp-nothing")


def test_an_ended_daemon_is_noticed_with_its_last_words(fleet, fleet_module, tmp_path):
    fleet.daemon("short", "python", "-c", "print('my last words'); raise SystemExit(9)")
    with pytest.raises(fleet_module.DemoError, match=r"short ended \(exit 9\)[\s\S]*my last words"):
        fleet.wait_for(tmp_path / "never", "the file", seconds=30)


def test_follow_gives_lines_and_fails_with_the_command(fleet, fleet_module):
    script = "import sys; print('one'); print('two'); print('why', file=sys.stderr); sys.exit(4)"
    lines = []
    with pytest.raises(fleet_module.DemoError, match=r"exit 4[\s\S]*why"):
        for line in fleet.follow("python", "-c", script):
            lines.append(line)  # noqa: PERF402  a failure comes after the lines
    assert [line for line in lines if line is not None] == ["one\n", "two\n"]


def test_stop_ends_daemons_and_workers_of_a_session_of_their_own(fleet, fleet_module, tmp_path, monkeypatch):
    """A worker that ignores SIGTERM and has left its daemon's session is gone too."""
    monkeypatch.setattr(fleet_module, "GRACE_SECONDS", 1.0)
    marker = tmp_path / "worker"
    worker = (
        "import os, pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "p = pathlib.Path(sys.argv[1]); t = p.with_suffix('.tmp'); t.write_text(str(os.getpid())); t.rename(p); time.sleep(600)"
    )
    daemon = (
        "import subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]], start_new_session=True); time.sleep(600)"
    )
    fleet.daemon("daemon", "python", "-c", daemon, worker, str(marker))
    _until(marker)
    pid = int(marker.read_text())
    try:
        assert psutil.pid_exists(pid)
        fleet.stop()
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)


def test_ranges(view):
    assert view.ranges(["1", "2", "3", "7", "10", "9"]) == "1-3 7 9-10"
    assert view.ranges([]) == ""


def _status(full: list[float | None], first: float = 9.0, last: float = 8.0) -> dict:
    """Three rounds' worth of what `fp-server status --json` gives; None: a device has not reported that loss."""
    devices = {"big": 400 << 20, "small": 250 << 20}

    def member(index: int, trained: bool) -> dict:
        out: dict = {"stage": "done"}
        if full[index] is not None:
            out |= {"loss": full[index], "loss_tokens": 10, "probe_peak_bytes": 47 << 20}
        if trained:
            out |= {
                "units": ["1", "2", "3", "30"], "groups": [["1"], ["2"], ["4", "3"], ["29", "30"]], "update_bytes": 3 << 20,
                "predicted_peak_bytes": 300 << 20, "measured_peak_bytes": 290 << 20, "loss_first": first, "loss_last": last,
            }  # fmt: skip
        return out

    rounds = [
        {
            "round": index + 1, "rounds_done": index, "attempt": 1, "evaluation": index == 3, "committed": index < 3,
            "bytes_up": 6 << 20, "bytes_down": 0, "changed_layers": [1, 2, 3, 30],
            "devices": {name: member(index, index < 3) for name in devices},
        }
        for index in range(4)
    ]  # fmt: skip
    return {
        "run": "demo", "state": "finished", "rounds": 3, "current": None, "history": rounds,
        "loss": [
            {"rounds_done": index, "loss": 1.0 if loss is None else loss, "devices": sorted(devices)}
            for index, loss in enumerate(full)
        ],
        "devices": {name: {"budget_bytes": budget, "connected": True, "units": 4} for name, budget in devices.items()},
    }  # fmt: skip


def _text(view, status: dict, width: int = 100) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(view.report(status))
    return captured.get()


@pytest.mark.parametrize("width", [80, 100])
def test_the_report_has_every_figure_of_a_round(view, width):
    status = _status([3.1, 3.2, 3.3, 3.4], 10.25, 10.0)
    entry = status["history"][0]
    entry["devices"]["big"] |= {"units": [str(i) for i in range(1, 31, 2)], "update_bytes": 123 << 20}
    text = _text(view, status, width)
    assert max(map(len, text.splitlines())) <= width
    assert "Round 1  full-model held-out loss before it 3.1000 (2 devices)" in text
    heads = ["device", "groups", "one", "a", "group", *["MiB"] * 4, "loss"]
    assert heads in [line.split() for line in text.splitlines()] and "up budget predicted measured training" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("small"))
    assert row == ["small", "4", "1-3", "30", "3.0", "250", "300", "290", "10.25", "→", "10.00"]
    assert "123    400       300      290 10.25 → 10.00" in text
    assert "1  │  2  │  3-4  │  29-30" in text


@pytest.mark.parametrize(
    ("full", "first", "last", "words"),
    [
        ([3.1, 3.2, 3.3, 3.4], 9.0, 8.0, ["from 9.00 at the first step to 8.00", "got worse: 3.1000 → 3.4000 (+0.3000)"]),
        ([3.1, 3.1, 3.1, 3.0], 8.0, 9.0, ["from 8.00 at the first step to 9.00", "improved: 3.1000 → 3.0000 (-0.1000)"]),
        ([3.1, 3.1, 3.1, 3.101], 8.0, 8.0, ["from 8.00 at the first step to 8.00", "hardly moved: 3.1000 → 3.1010"]),
        ([3.1, 3.1, 3.1, None], 9.0, 8.0, ["not measured by the same devices"]),
    ],
)
def test_the_verdict_says_what_the_figures_say(view, full, first, last, words):
    text = " ".join(_text(view, _status(full, first, last)).split())
    for some in words:
        assert some in text
    assert view.learned(_status(full, first, last)) == ("improved" in text)
    assert "not measured" not in text or None in full


def test_a_loss_that_not_every_device_reported_is_not_shown(view):
    found = view.losses(_status([3.1, None, 3.3, 3.4]))
    assert {index: measured.loss for index, measured in found.items()} == {0: 3.1, 2: 3.3, 3: 3.4}


def test_other_devices_at_the_end_are_no_comparison(view):
    status = _status([3.1, 3.1, 3.1, 3.0])
    status["loss"][-1]["devices"] = ["big"]
    assert "not measured by the same devices" in " ".join(_text(view, status).split()) and not view.learned(status)


def test_plain_lines_are_said_once(view, capsys):
    lines = view.Lines(Console(width=100, force_terminal=False))
    status = _status([3.1, 3.2, 3.3, 3.4])
    status |= {"state": "round", "current": {**status["history"][0], "evaluation": False}}
    lines.update(None, 0.0)
    for seconds in (1.0, 2.0):
        lines.update(status, seconds)
    assert capsys.readouterr().out.split("\n") == [
        "    1 s  server    round 1 of 3",
        "    1 s  big       done",
        "    1 s  small     done",
        "",
    ]


def test_plain_lines_do_not_stay_silent(view, capsys):
    lines = view.Lines(Console(width=100, force_terminal=False))
    status = _status([3.1, 3.2, 3.3, 3.4])
    current = {**status["history"][0], "evaluation": False}
    current["devices"] = {
        **current["devices"], "small": {"stage": "training", "progress": {"phase": "train", "done": 3, "total": 12}},
    }  # fmt: skip
    status |= {"state": "round", "current": current}
    for seconds in (1.0, 9.0, 17.0, 25.0, 33.0):
        lines.update(status, seconds)
    assert capsys.readouterr().out.split("\n")[3:] == [
        "   17 s  server    so far: small 25 %",
        "   33 s  server    so far: small 25 %",
        "",
    ]


def test_the_last_frame_says_that_everybody_is_done(view):
    """By then a device may be gone from the status, or no longer connected."""
    status = _status([3.1, 3.2, 3.3, 3.4])
    status["devices"]["small"]["connected"] = False
    console = Console(width=80, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(view.live(status, {"big": "400MiB", "small": "250MiB", "gone": "1GiB"}, 12.0))
    assert [line.split() for line in captured.get().splitlines() if "MiB" in line or "GiB" in line] == [
        ["big", "400MiB", "done"], ["small", "250MiB", "done"], ["gone", "1GiB", "done"],
    ]  # fmt: skip
