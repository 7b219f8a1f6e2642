"""Time-outs are of progress above a minimum rate: who trickles is out as surely as who is silent, and who is slow may stay."""

from __future__ import annotations

import pytest
from test_rounds import Shell, accepted, assigned, digest, opened

from common.types import ObjectRef
from fp_server import commands as c
from fp_server.progress import STARTS
from fp_server.roundstate import Stage

STEPS = "[train]\nsteps = 10\n"


def training(extra: str = STEPS, **run) -> Shell:
    """Device a trains; b has delivered."""
    shell = opened(extra, **{"progress_timeout_seconds": 600.0, "round_limit_seconds": 1e9, **run})
    shell.probe("a", "b")
    shell.do(assigned(shell.key, "a"), assigned(shell.key, "b"))
    shell.do(accepted(shell.key, "b"))
    return shell


def keep_on(shell: Shell, phase: str, every: float, amount: float, total: int, until: float, measured: bool = False) -> float:
    """`amount` more every so many seconds; when the device was dropped, 0 when it was not by `until`."""
    begin, done = shell.now, 0.0
    while shell.now < until:
        shell.now += every
        done += amount
        shell.do(c.ProgressSeen("a", shell.key, phase, int(done), total, measured), c.Tick())
        if shell.machine.current.closed is not None:
            return shell.now - begin
    return 0.0


@pytest.mark.parametrize(("steps_an_hour", "lasts"), [(2.0, True), (1.01, True), (0.5, False), (0.01, False)])
def test_training_below_the_minimum_of_steps_ends(steps_an_hour, lasts):
    """Ten steps of 100 marks each, at a pace above or below `min_steps_per_hour` = 1."""
    shell = training(min_steps_per_hour=1.0)
    at = keep_on(shell, "train", 60.0, steps_an_hour * 100 / 60, 1000, 0.9 * 3600 * 10 / steps_an_hour)
    assert (at == 0.0) is lasts
    if not lasts:
        member = shell.machine.current.members["a"]
        assert member.stage is Stage.DROPPED
        assert ("run.min_steps_per_hour" if steps_an_hour > 0.1 else "no progress") in member.dropped.message
        # It falls behind by 1 - pace every second.
        assert at == pytest.approx(600 / (1 - steps_an_hour), abs=200)


def test_without_a_minimum_of_steps_the_task_must_be_done_within_the_rounds_limit():
    for hours, lasts in ((20.0, True), (40.0, False)):
        shell = training(round_limit_seconds=86_400.0)
        at = keep_on(shell, "train", 60.0, 1000 / (hours * 60), 1000, 19.0 * 3600)
        assert (at == 0.0) is lasts


@pytest.mark.parametrize(("speed", "lasts"), [(2000, True), (1100, True), (500, False), (1, False)])
def test_a_push_below_the_minimum_of_bytes_ends(speed, lasts):
    shell = training()
    at = keep_on(shell, "push", 10.0, speed * 10, 10**9, 20_000.0, measured=True)
    assert (at == 0.0) is lasts
    if not lasts:
        assert "run.min_bytes_per_second" in shell.machine.current.members["a"].dropped.message


def test_what_a_device_says_of_its_push_does_not_count():
    shell = training()
    assert keep_on(shell, "push", 10.0, 10**6, 10**9, 20_000.0) == pytest.approx(610, abs=20)


def test_a_pause_shorter_than_the_time_out_is_forgiven_and_caught_up():
    shell = training()
    done = 0
    for pause in (500, 100, 500, 100, 590) * 5:
        shell.now += pause
        done += 1200 * pause
        shell.do(c.ProgressSeen("a", shell.key, "push", done, 10**12, measured=True), c.Tick())
    assert shell.stage("a") is Stage.TRAINING


@pytest.mark.parametrize("phase", ["verify", "load", "probe", "train", "fetch"])
def test_whatever_a_device_claims_a_phase_can_not_last_for_ever(phase):
    """Counts that grow without end, totals that grow with them, and totals nobody knows."""
    for total in (lambda n: 10**6, lambda n: n, lambda n: 0, lambda n: 10**6 - n):
        shell = training(round_limit_seconds=86_400.0)
        shell.machine.broadcast[0] = ObjectRef("0" * 64, 10**6)
        for count in range(1, 2000):
            shell.now += 300
            shell.do(c.ProgressSeen("a", shell.key, phase, count, total(count)), c.Tick())
            if shell.machine.current.closed is not None:
                break
        assert shell.now <= 86_400 + 700


def test_a_comparison_of_gradients_has_no_known_end_where_the_run_asks_for_one():
    for extra, lasts in ((STEPS + "fidelity = true\n", True), (STEPS, False)):
        shell = training(extra)
        assert (keep_on(shell, "fidelity", 300.0, 1, 0, 10_000.0) == 0.0) is lasts


def test_coming_back_again_and_again_is_no_progress():
    shell = training()
    for _ in range(100):
        shell.now += 500
        shell.do(c.Disconnected("a"), c.Connected("a"))
        shell.do(c.ProgressSeen("a", shell.key, "load", 1, 100), c.Tick())
        if shell.machine.current.closed is not None:
            break
    assert shell.now <= 500 * (STARTS + 4)


def test_time_in_which_the_servers_disk_is_full_is_not_the_devices():
    shell = training()
    for _ in range(10):
        shell.now += 500
        shell.do(c.NotReceived("a", shell.key), c.Tick())
    assert shell.stage("a") is Stage.TRAINING
    shell.now += 601
    shell.do(c.Tick())
    assert shell.machine.current.members["a"].stage is Stage.DROPPED


def test_zero_asks_for_any_progress():
    shell = training(min_bytes_per_second=0)
    shell.machine.broadcast[0] = digest("adapter")
    assert keep_on(shell, "push", 590.0, 1, 10**9, 60_000.0, measured=True) == 0.0
