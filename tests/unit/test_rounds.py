"""The round's state machine, without sockets, disks or sleeps."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import AlreadyDone, NotFound, TooLate
from common.types import Capacity, Gradient, ModelManifest, ModuleShape, ObjectRef, PlanReport, TaskKey, UnitId, UpdateMetrics
from fp_server import commands as c
from fp_server import events as e
from fp_server.outliers import Score
from fp_server.rounds import RunMachine
from fp_server.roundstate import Phase, Stage
from fp_server.seeding import draw_devices, rng_for
from fp_server.status import loss_curve
from fp_server.work import parse_run

MANIFEST = ModelManifest("toy", "llama", 4, 8, 16, (ModuleShape("self_attn.q_proj", 8, 8),), "ab" * 32)


def toml(**run) -> str:
    values = {"name": "r", "rounds": 2, "min_devices": 2, "devices_per_round": 1.0, "max_attempts": 2} | run
    lines = [f"{k} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for k, v in values.items()]
    return "[run]\n" + "\n".join(lines) + '\n[model]\nname = "toy"\nmanifest = "x"\n'


def digest(*parts) -> ObjectRef:
    return ObjectRef(f"{abs(hash(parts)):064x}"[:64], 100)


class Shell:
    """What the coordinator does, without IO: records events and hands them in, answers what it is told to."""

    def __init__(self, extra: str = "", **run) -> None:
        self.machine = RunMachine(parse_run(toml(**run) + extra, "test"), MANIFEST)
        self.log: list[tuple[float, e.Event]] = []
        self.out: list[c.Command] = []
        self.now = 0.0

    def do(self, *happenings) -> list[c.Command]:
        pending, effects = list(happenings), []
        while pending:
            item = pending.pop(0)
            if isinstance(item, e.Event):
                self.log.append((self.now, item))
            for command in self.machine.handle(item, self.now):
                if isinstance(command, c.Record):
                    pending.insert(0, command.event)
                else:
                    effects.append(command)
        self.out += effects
        return effects

    @property
    def key(self) -> TaskKey:
        return self.machine.current.opened.key

    def stage(self, device: str) -> Stage:
        return self.machine.current.members[device].stage

    def join(self, *devices: str, units: int = 2) -> list[c.Command]:
        out = []
        for device in devices:
            out += self.do(c.Connected(device))
            out += self.do(plan(device, units))
        return out

    def probe(self, *devices: str) -> None:
        for device in devices:
            self.do(probed(self.key, device, self.machine.current.opened.evaluate))

    def assign(self, *devices: str) -> None:
        for device in devices:
            self.do(assigned(self.key, device))

    def accept(self, *devices: str) -> None:
        key = self.key
        for device in devices:
            self.do(accepted(key, device))

    def review(self, *outliers: str, reject: bool = True) -> list[c.Command]:
        return self.do(reviewed(self.key, *outliers, reject=reject))

    def commit(self) -> None:
        key = self.key
        self.review()
        self.do(committed(key))

    def whole_round(self, *devices: str) -> None:
        self.probe(*devices)
        self.assign(*devices)
        self.accept(*devices)
        self.commit()


def plan(device, units=2, samples=10):
    capacities = (Capacity(Gradient.SUBMODEL, units, 1, True, 5),) if units else ()
    refusal = "" if units else "too small"
    return e.PlanReceived("r", device, PlanReport("r", samples, "ab" * 32, capacities, (1,) * 4, 7, refusal), samples)


def probed(key, device, evaluate=False):
    n = 0 if evaluate else 4
    return e.ProbeReceived("r", key, device, np.eye(n, dtype=np.float32), np.ones(n, np.float32), 2.0, 10, 1, 1.0)


def assigned(key, device):
    groups = ((UnitId(0), UnitId(1)), (UnitId(2), UnitId(3)))
    return e.Assigned("r", key, device, (UnitId(0), UnitId(3)), groups, ((0.5, 0.5), (0.5, 0.5)), 0, 0, 1, True)


def accepted(key, device, salt=0):
    return e.UpdateAccepted("r", key, device, digest(device, salt), UpdateMetrics())


def reviewed(key, *outliers, reject=True):
    return e.UpdatesReviewed("r", key, {"a": Score(1, 0, 0.5, 1.0)}, dict.fromkeys(outliers, "it stands out"), reject)


def committed(key):
    unit = e.UnitCommit(0, digest("ledger", key), digest("broadcast", key), ("a", "b"), 0.0)
    return e.RoundCommitted("r", key, (unit,), (), {"a": 1, "b": 1}, 1, 1)


def dropped(key, device):
    return e.DeviceDropped("r", key, device, "WorkerError", "it broke")


def kinds(commands, device=None):
    return [type(x).__name__ for x in commands if device is None or getattr(x, "device", None) == device]


def opened(extra: str = "", **run) -> Shell:
    shell = Shell(extra, **run)
    shell.join("a", "b")
    return shell


def test_a_round_opens_when_enough_able_devices_have_answered():
    shell = Shell()
    assert kinds(shell.do(c.Connected("a"))) == ["SendPlanRequest"]
    shell.do(plan("a"))
    shell.do(c.Connected("b"))
    shell.do(plan("b", units=0))
    assert shell.machine.current is None and shell.machine.phase is Phase.GATHERING
    assert kinds(shell.do(c.Connected("c"))) == ["SendPlanRequest"]
    assert kinds(shell.do(plan("c"))) == ["SendProbe", "SendProbe"]
    event = shell.machine.current.opened
    assert event.roster == event.drawn == ("a", "c") and event.excluded == {"b": "too small"}


def test_a_round_that_could_not_have_enough_updates_waits_for_more_devices():
    """As after a restart, when devices come back one by one: nobody has to resume it."""
    shell = opened(min_updates=3)
    assert shell.machine.current is None and shell.machine.paused is None and shell.machine.phase is Phase.GATHERING
    shell.join("c")
    assert shell.machine.current.opened.drawn == ("a", "b", "c")


@pytest.mark.parametrize("updates", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("asked", [1.0, 0.5, 0.25, 0.1, 0.07, 1 / 3, 2, 3, 60])
def test_the_devices_a_round_needs_are_the_fewest_of_which_enough_are_drawn(asked, updates):
    config = Shell(min_updates=updates, devices_per_round=asked).machine.config
    enough = [n for n in range(2, 1000) if config.drawn(n) >= updates]  # the slow twin
    assert (config.needed == enough[0]) if enough else config.drawn(config.needed) < updates


def test_a_fraction_so_small_that_no_roster_has_enough():
    config = Shell(min_updates=2, devices_per_round=1e-300).machine.config
    assert config.drawn(config.needed) == 1


def test_the_draw_is_seeded_and_does_not_depend_on_who_came_first():
    names = [f"d{i}" for i in range(10)]
    draws = []
    for order in (names, names[::-1]):
        shell = Shell(min_devices=10, devices_per_round=0.3, seed=5)
        shell.join(*order)
        draws.append(shell.machine.current.opened.drawn)
    assert draws[0] == draws[1] == draw_devices(names, 3, rng_for(5, 0, "", "sample/0"))


def test_from_probe_to_commit_to_the_final_evaluation_and_the_end():
    shell = opened()
    for index in range(2):
        assert shell.key == TaskKey("r", index, 0)
        task = shell.machine.task("a")
        assert isinstance(task, c.SendProbe) and task.task.similarity and len(task.task.adapter) == min(index, 1)
        assert kinds(shell.do(probed(shell.key, "a"))) == ["Choose"]
        assert shell.stage("a") is Stage.CHOOSING and shell.machine.task("a") is None
        (sent,) = shell.do(assigned(shell.key, "a"))
        assert isinstance(sent, c.SendAssignment) and sent.assignment == shell.machine.assignment("a", shell.key)
        assert shell.machine.current.members["a"].probe.similarity.size == 0, "matrices are not kept for the whole run"
        shell.probe("b")
        shell.assign("b")
        shell.accept("a")
        assert kinds(shell.do(accepted(shell.key, "b"))) == ["Review"]
        assert shell.machine.phase is Phase.AGGREGATING
        assert kinds(shell.review()) == ["Aggregate"]
        assert shell.machine.phase is Phase.AGGREGATING
        shell.do(committed(shell.key))
    assert shell.machine.current.opened.evaluate and shell.machine.current.opened.drawn == ("a", "b")
    assert not shell.machine.task("a").task.similarity
    shell.probe("a")
    key = shell.key
    ended = shell.do(probed(key, "b", True))
    assert shell.machine.phase is Phase.FINISHED and kinds(ended) == ["SendEnded", "SendEnded"]
    assert shell.machine.history.total == 3


def closed(*devices: str, **run) -> Shell:
    """A round whose devices have all delivered."""
    shell = Shell(min_devices=len(devices), **run)
    shell.join(*devices)
    shell.probe(*devices)
    shell.assign(*devices)
    shell.accept(*devices)
    return shell


def test_an_outlier_is_left_out_by_an_event_and_its_reason_is_kept():
    shell = closed("a", "b", "c")
    assert kinds(shell.review("b")) == ["Aggregate"]
    members = shell.machine.current.members
    assert [m.counts for m in members.values()] == [True, False, True] and members["b"].outlier == "it stands out"
    assert members["b"].accepted is not None and members["b"].accepted.ref.digest in shell.machine.references()
    shell.do(committed(shell.key))
    (entry, _) = shell.machine.history.last
    assert entry.reviewed.outliers == {"b": "it stands out"}
    assert shell.machine.check_push("b", entry.opened.key, digest("b", 0)), "pushed again, it is a duplicate as any other"


def test_reported_is_not_left_out():
    shell = closed("a", "b", "c")
    assert kinds(shell.review("b", reject=False)) == ["Aggregate"]
    assert all(m.counts for m in shell.machine.current.members.values())


def test_a_round_with_too_few_updates_after_the_review_is_drawn_again():
    shell = closed("a", "b", "c", min_updates=3)
    key, before = shell.key, shell.machine.references()
    assert before
    out = shell.review("b")
    assert kinds(out) == ["SendProbe"] * 3 and shell.key == replace(key, attempt=1)
    assert shell.machine.failures == 1 and shell.machine.references() == frozenset()
    shell.probe("a", "b", "c")
    shell.assign("a", "b", "c")
    shell.accept("a", "b", "c")
    shell.review("b")
    assert shell.machine.paused is not None, "as often as run.max_attempts allows"


def test_a_round_that_lost_an_update_is_compared_again_when_it_closes_again():
    shell = closed("a", "b", "c")
    shell.review("b")
    shell.do(e.UpdatesLost("r", shell.key, {"c": "it is damaged"}))
    assert shell.machine.current.closed is None and shell.stage("c") is Stage.TRAINING
    assert kinds(shell.do(accepted(shell.key, "c", 1))) == ["Review"]
    assert all(m.counts for m in shell.machine.current.members.values()), "what was found is of other updates"
    assert kinds(shell.review("c")) == ["Aggregate"]
    assert [d for d, m in shell.machine.current.members.items() if m.counts] == ["a", "b"]


def test_without_the_rule_a_closed_round_is_aggregated_at_once():
    shell = Shell('[limits]\noutliers = "off"\n')
    shell.join("a", "b")
    shell.probe("a", "b")
    shell.assign("a", "b")
    shell.do(accepted(shell.key, "a"))
    assert kinds(shell.do(accepted(shell.key, "b"))) == ["Aggregate"]


def test_after_a_restart_the_review_is_asked_for_unless_it_was_durable():
    for done, expected in ((False, "Review"), (True, "Aggregate")):
        shell = closed("a", "b", "c")
        if done:
            shell.review("b")
        again = RunMachine(shell.machine.config, MANIFEST)
        for at, event in shell.log:
            again.handle(event, at)
        assert kinds(again.handle(c.Recovered(), 0.0)) == [expected]
        assert again.current.members["b"].counts is not done


def test_all_devices_evaluate_before_the_first_round_and_after_the_last():
    shell = Shell(rounds=1, evaluation="all", devices_per_round=2, min_devices=3)
    shell.join("a", "b", "c")
    first = shell.machine.current.opened
    assert first.evaluate and first.drawn == ("a", "b", "c") and not shell.machine.task("c").task.similarity
    shell.probe("a", "c")
    shell.do(dropped(shell.key, "b"))
    opened_ = shell.machine.current.opened
    assert not opened_.evaluate and opened_.key == TaskKey("r", 0, 1) and opened_.attempt == 1
    assert shell.machine.failures == 0 and len(opened_.drawn) == 2
    shell.whole_round(*opened_.drawn)
    last = shell.machine.current.opened
    assert last.evaluate and last.drawn == ("a", "b", "c"), "who dropped out at first may measure at last"
    shell.probe("a", "b", "c")
    assert shell.machine.phase is Phase.FINISHED
    assert [len(point.devices) for point in loss_curve(shell.machine)] == [2 + ("b" in opened_.drawn), 3]


def test_an_evaluation_is_no_attempt_at_the_first_round():
    shell = Shell(rounds=1, evaluation="all", devices_per_round=1.0, max_attempts=3)
    shell.join("a", "b")
    shell.probe("a", "b")
    for attempt in (1, 2, 3):
        assert not shell.machine.current.opened.evaluate and shell.machine.current.opened.attempt == attempt
        shell.do(dropped(shell.key, "a"), dropped(shell.key, "b"))
    assert shell.machine.phase is Phase.PAUSED and shell.machine.failures == 3


def test_every_device_is_counted_once_in_the_loss():
    """What the drawn devices measure again in the first round is in the evaluation of all already."""
    shell = Shell(rounds=1, evaluation="all", devices_per_round=1.0)
    shell.join("a", "b")
    event = probed(shell.key, "a", True)
    shell.do(replace(event, loss=1.0, tokens=10), replace(event, device="b", loss=2.0, tokens=30))
    assert loss_curve(shell.machine) == [(0, pytest.approx(1.75), 2, frozenset({"a", "b"}))]
    shell.probe("a", "b")
    assert loss_curve(shell.machine) == [(0, pytest.approx(1.75), 2, frozenset({"a", "b"}))]


def test_without_a_final_evaluation_the_last_commit_ends_the_run():
    shell = opened(rounds=1, final_evaluation=False)
    shell.whole_round("a", "b")
    assert shell.machine.phase is Phase.FINISHED


@pytest.mark.parametrize(
    ("quorum", "min_updates", "closes_at"), [(1.0, 1, 5), (0.5, 1, 3), (0.5, 4, 4), (0.2, 1, 1), (0.01, 5, 5), (0.6, 1, 3)]
)
def test_the_quorum_closes_the_round_but_never_with_fewer_than_min_updates(quorum, min_updates, closes_at):
    names = list("abcde")
    shell = Shell(min_devices=5, quorum=quorum, min_updates=min_updates)
    shell.join(*names)
    shell.probe(*names)
    shell.assign(*names)
    key = shell.key
    for index, name in enumerate(names[:closes_at], 1):
        assert shell.machine.current.closed is None
        out = shell.do(accepted(key, name))
        assert (shell.key != key or shell.machine.current.closed is not None) == (index == closes_at)
    assert {x.device for x in out if isinstance(x, c.SendCancel)} == set(names[closes_at:])


def test_a_quorum_of_seven_hundredths_of_a_hundred_is_seven():
    names = [f"d{i:03}" for i in range(100)]
    shell = Shell(min_devices=100, quorum=0.07)
    shell.join(*names)
    shell.probe(*names[:7])
    shell.assign(*names[:7])
    key = shell.key
    for name in names[:7]:
        shell.do(accepted(key, name))
    assert shell.machine.phase is Phase.AGGREGATING


@pytest.mark.parametrize("phase", ["verify", "fetch", "load", "probe", "fidelity"])
def test_silence_drops_a_device_and_progress_keeps_it(phase):
    shell = opened("[train]\nfidelity = true\n", progress_timeout_seconds=10.0, min_bytes_per_second=0)
    shell.machine.broadcast[0] = digest("adapter")  # of 100 bytes, to be fetched
    for now in range(1, 40, 4):
        shell.now = now
        shell.do(c.ProgressSeen("a", shell.key, phase, now, 100))
        shell.do(c.Tick())
    assert shell.stage("a") is Stage.PROBING and shell.stage("b") is Stage.DROPPED
    assert "no progress for 13 s while probing" in shell.machine.current.members["b"].dropped.message
    assert kinds(shell.out, "b")[-1] == "SendCancel"


@pytest.mark.parametrize(
    "signs", [[("train", 5), ("train", 5), ("train", 4)], [("a", 1), ("b", 2), ("c", 3)], [("train", 5), ("probe", 0)] * 2]
)
def test_signs_of_life_that_get_nowhere_are_no_progress(signs):
    shell = opened(progress_timeout_seconds=10.0)
    shell.do(c.ProgressSeen("a", shell.key, "train", 5, 100), c.ProgressSeen("a", shell.key, "probe", 0, 100))
    for phase, amount in signs:
        shell.now += 4
        shell.do(c.ProgressSeen("a", shell.key, phase, amount, 100), c.Tick())
    assert "no progress" in next(iter(shell.machine.history))[0].members["a"].dropped.message


def test_a_reconnected_device_may_begin_its_task_anew():
    shell = opened(progress_timeout_seconds=10.0)
    shell.do(c.ProgressSeen("a", shell.key, "probe", 50, 100))
    shell.do(c.Disconnected("a"), c.Connected("a"))
    shell.now = 9
    shell.do(c.ProgressSeen("a", shell.key, "probe", 1, 100), c.ProgressSeen("b", shell.key, "probe", 1, 100))
    shell.now = 15
    shell.do(c.Tick())
    assert shell.stage("a") is Stage.PROBING


def test_choosing_is_the_servers_time_and_costs_no_device_its_place():
    shell = opened(progress_timeout_seconds=10.0)
    shell.probe("a", "b")
    shell.now = 100
    shell.do(c.Tick())
    assert shell.stage("a") is Stage.CHOOSING


def test_the_hard_limit_closes_a_round_whatever_the_progress():
    shell = opened(progress_timeout_seconds=50.0, round_limit_seconds=100.0)
    shell.probe("a")
    shell.assign("a")
    shell.accept("a")
    for now in range(10, 120, 10):
        shell.now = now
        if shell.machine.current.closed is None:
            shell.do(c.ProgressSeen("b", shell.key, "probe", now, 110), c.Tick())
    assert shell.machine.phase is Phase.AGGREGATING and shell.machine.current.closed.reason == "the round's time limit"


def test_late_duplicate_and_foreign_events_change_nothing():
    shell = opened()
    first = shell.key
    shell.do(assigned(first, "a"))
    assert shell.stage("a") is Stage.PROBING, "nothing was chosen yet"
    shell.whole_round("a", "b")
    before = snapshot(shell.machine)
    late = [
        probed(first, "a"),
        assigned(first, "a"),
        accepted(first, "a", 9),
        dropped(first, "b"),
        c.ProgressSeen("a", first, "train", 1, 2),
    ]
    foreign = TaskKey("r", 7, 7)
    late += [probed(foreign, "a"), accepted(foreign, "a"), dropped(foreign, "a"), probed(shell.key, "z"), dropped(shell.key, "z")]
    assert shell.do(*late) == [] and snapshot(shell.machine) == before
    shell.probe("a", "a")
    shell.assign("a", "a")
    assert sum(isinstance(x, c.Choose) and x.key == shell.key for x in shell.out) == 1
    shell.accept("a", "a")
    shell.do(dropped(shell.key, "a"))
    assert shell.stage("a") is Stage.DONE


def test_pushes_are_known_late_foreign_or_done():
    shell = opened()
    key = shell.key
    with pytest.raises(NotFound, match="expects no update from 'a'"):
        shell.machine.check_push("a", key, digest("a", 0))
    shell.probe("a", "b")
    shell.assign("a", "b")
    assert shell.machine.check_push("a", key, digest("a", 0)) is False
    with pytest.raises(NotFound):
        shell.machine.check_push("z", key, digest("z", 0))
    with pytest.raises(TooLate, match="round 6"):
        shell.machine.check_push("a", TaskKey("r", 5, 0), digest("a", 0))
    shell.accept("a")
    assert shell.machine.check_push("a", key, digest("a", 0)) is True
    with pytest.raises(AlreadyDone):
        shell.machine.check_push("a", key, digest("a", 1))
    shell.do(dropped(key, "b"))
    with pytest.raises(TooLate):
        shell.machine.check_push("b", key, digest("b", 0))
    shell.commit()
    assert shell.machine.check_push("a", key, digest("a", 0)) is True, "a reply lost before the commit"


def test_only_the_current_tasks_objects_may_be_fetched():
    shell = opened()
    assert shell.machine.may_fetch("a") == frozenset()
    shell.whole_round("a", "b")
    wanted = {digest("broadcast", TaskKey("r", 0, 0)).digest}
    assert shell.machine.may_fetch("a") == wanted and shell.machine.may_fetch("z") == frozenset()
    shell.probe("a")
    assert shell.machine.may_fetch("a") == frozenset()
    shell.assign("a")
    assert shell.machine.may_fetch("a") == wanted


def test_a_failed_round_is_drawn_again_and_the_run_pauses_after_max_attempts():
    shell = opened()
    keys = []
    for _ in range(2):
        keys.append(shell.key)
        shell.do(dropped(shell.key, "a"))
        shell.do(dropped(keys[-1], "b"))
    assert shell.machine.phase is Phase.PAUSED and "round 1 failed 2 times" in shell.machine.paused
    shell.do(e.RunResumed("r"))
    keys.append(shell.key)
    assert keys == [TaskKey("r", 0, 0), TaskKey("r", 0, 1), TaskKey("r", 0, 2)], "no key ever names two pieces of work"
    shell.whole_round("a", "b")
    assert shell.key == TaskKey("r", 1, 0)


@pytest.mark.parametrize("phase", ["gathering", "probing", "training", "aggregating"])
def test_pause_lets_the_round_end_and_opens_none(phase):
    shell = Shell() if phase == "gathering" else opened()
    if phase in ("training", "aggregating"):
        shell.probe("a", "b")
        shell.assign("a", "b")
    if phase == "aggregating":
        shell.accept("a", "b")
    shell.do(e.RunPaused("r", "by hand"))
    if phase == "gathering":
        shell.join("a", "b")
    else:
        if phase == "probing":
            shell.probe("a", "b")
            shell.assign("a", "b")
        if phase != "aggregating":
            shell.accept("a", "b")
        shell.commit()
    assert shell.machine.current is None and shell.machine.phase is Phase.PAUSED
    assert shell.do(c.Tick()) == []
    shell.do(e.RunResumed("r"))
    assert shell.machine.phase is Phase.ROUND


@pytest.mark.parametrize("phase", ["gathering", "paused", "probing", "choosing", "training", "aggregating"])
def test_stop_ends_the_run_in_every_phase(phase):
    shell = Shell() if phase == "gathering" else opened()
    if phase == "paused":
        shell.do(e.RunPaused("r", "x"))
    if phase in ("choosing", "training", "aggregating"):
        shell.probe("a", "b")
    if phase in ("training", "aggregating"):
        shell.assign("a", "b")
    if phase == "aggregating":
        shell.accept("a", "b")
    out = shell.do(e.RunEnded("r", "stopped", "by hand"))
    assert shell.machine.phase is Phase.STOPPED and shell.machine.current is None
    assert kinds(out).count("SendEnded") == len(shell.machine.connected)
    assert shell.do(c.Tick(), c.Connected("z")) == []


def test_a_reconnect_sends_the_outstanding_task_again_and_asks_for_a_plan_when_it_is_done():
    shell = opened()
    assert kinds(shell.do(c.Disconnected("a"), c.Connected("a"))) == ["SendProbe"]
    shell.probe("a", "b")
    assert kinds(shell.do(c.Disconnected("a"), c.Connected("a"))) == [], "its units are being chosen"
    shell.do(c.Disconnected("b"))
    assert kinds(shell.do(assigned(shell.key, "b"))) == [], "sent when it is back"
    assert kinds(shell.do(c.Connected("b"))) == ["SendAssignment"]
    shell.assign("a")
    assert kinds(shell.do(c.Disconnected("a"), c.Connected("a"))) == ["SendAssignment"]
    assert kinds(shell.do(accepted(shell.key, "a"))) == ["SendPlanRequest"], "its budget may have changed meanwhile"
    shell.do(plan("a", units=1))
    shell.do(accepted(shell.key, "b"))
    shell.commit()
    assert shell.machine.current is None, "b has not said what it can hold since it reconnected"
    shell.do(plan("b", units=0))
    assert shell.machine.current is None, "and now it can't"
    shell.do(plan("b", units=3))
    assert shell.machine.capacity("a").units == 1 and shell.machine.capacity("b").units == 3
    assert shell.key.round == 1


def test_the_final_evaluation_waits_for_who_is_away_but_not_for_ever():
    for back in (True, False):
        shell = closed("a", "b", rounds=1, progress_timeout_seconds=10.0)
        shell.do(c.Disconnected("b"))
        shell.commit()
        assert shell.machine.current is None
        shell.now = 5
        if back:
            shell.join("b")
        else:
            shell.do(c.Tick())
            assert shell.machine.current is None
            shell.now = 11
            shell.do(c.Tick())
        assert shell.machine.current.opened.drawn == (("a", "b") if back else ("a",))


def test_the_final_evaluation_waits_for_nobody_who_was_revoked():
    for when in ("before", "meanwhile"):
        shell = closed("a", "b", rounds=1, progress_timeout_seconds=10.0)
        shell.do(c.Revoked("b") if when == "before" else c.Disconnected("b"))
        shell.commit()
        if when == "meanwhile":
            assert shell.machine.current is None
            shell.do(c.Revoked("b"))
        assert shell.machine.current.opened.drawn == ("a",)


def test_no_round_closes_with_the_update_of_a_revoked_device():
    """Also where its going could not be written at first, because the disk was full."""
    shell = opened()
    shell.probe("a", "b")
    shell.assign("a", "b")
    shell.accept("a")
    key, machine = shell.key, shell.machine
    (asked,) = machine.handle(c.Revoked("a"), 0.0)
    assert asked.event == e.DeviceDropped.by_revocation("r", key, "a") and asked.event.revoked
    (asked,) = machine.handle(accepted(key, "b"), 1.0)  # the last update: the round would be closed now
    assert isinstance(asked.event, e.DeviceDropped)
    shell.do(asked.event)
    assert machine.current.closed is not None
    assert {name: member.counts for name, member in machine.current.members.items()} == {"a": False, "b": True}


def test_a_round_that_is_opened_again_leaves_out_who_was_revoked_meanwhile():
    shell = closed("a", "b", "c")
    members = shell.machine.current.members
    shell.do(c.Revoked("a"))
    assert members["a"].counts, "the round is closed, and its update counts"
    shell.do(e.UpdatesLost("r", shell.key, {"c": "it is damaged"}))
    assert members["a"].dropped.revoked and not members["a"].counts
    shell.accept("c")
    assert shell.machine.current.closed is not None and members["b"].counts and members["c"].counts


def test_a_revoked_device_that_has_joined_again_is_waited_for():
    shell = closed("a", "b", rounds=1, progress_timeout_seconds=10.0)
    shell.do(c.Revoked("b"), c.Connected("b"), c.Disconnected("b"))
    shell.commit()
    assert shell.machine.current is None


def test_a_run_nobody_is_left_to_evaluate_ends():
    shell = closed("a", "b", rounds=1, progress_timeout_seconds=10.0)
    shell.do(c.Disconnected("a"), c.Disconnected("b"))
    shell.commit()
    shell.now = 11
    shell.do(c.Tick())
    assert shell.machine.phase is Phase.FINISHED and "no device was there" in shell.machine.ended.reason


# -- recovery ------------------------------------------------------------------------------------


def snapshot(machine: RunMachine):
    """Everything that must survive a restart (who is connected and who made progress when does not)."""

    def member(m):
        return (
            m.stage,
            m.assigned,
            m.accepted,
            m.dropped,
            m.outlier,
            None if m.probe is None else (m.probe.device, m.probe.similarity.shape),
        )

    def a_round(r):
        return r.opened, r.opened_at, r.closed, r.reviewed, {d: member(m) for d, m in r.members.items()}

    return copy.deepcopy(
        (
            machine.phase, machine.next_round, machine.attempt, machine.failures, machine.paused, machine.ended, machine.plans,
            machine.ledger, machine.broadcast, None if machine.current is None else a_round(machine.current),
            [(a_round(r), commit) for r, commit in machine.history],
        )
    )  # fmt: skip


def outstanding(machine: RunMachine):
    """What a server that never stopped is in the middle of."""
    current = machine.current
    if current is None:
        return set()
    work = {("Choose", d) for d, m in current.members.items() if m.stage is Stage.CHOOSING}
    if current.closed is None:
        return work
    return work | {("Review" if current.reviewed is None else "Aggregate", "")}


ACTIONS = "connect disconnect plan refuse probe assign accept drop commit tick later pause resume stop".split()  # noqa: SIM905


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from(ACTIONS), st.sampled_from("abc"), st.integers(0, 3)), min_size=5, max_size=120),
    st.sampled_from([0.3, 1.0]),
)
def test_folding_the_log_gives_the_same_state_and_recovery_asks_for_exactly_what_is_outstanding(script, quorum):
    shell = Shell(quorum=quorum, progress_timeout_seconds=10.0, round_limit_seconds=60.0)
    machine = shell.machine
    shell.join("a", "b")
    for action, device, salt in script:
        if machine.ended is not None:
            break
        current = machine.current
        key = current.opened.key if current is not None else TaskKey("r", salt, 0)
        match action:
            case "connect":
                shell.do(c.Connected(device))
            case "disconnect":
                shell.do(c.Disconnected(device))
            case "plan" | "refuse":
                shell.do(plan(device, 2 if action == "plan" else 0))
            case "probe":
                shell.do(probed(key, device, current is not None and current.opened.evaluate))
            case "assign":
                shell.do(assigned(key, device))
            case "accept":
                try:
                    if not machine.check_push(device, key, digest(device, salt)):
                        shell.do(accepted(key, device, salt))
                except (TooLate, NotFound, AlreadyDone):
                    pass
            case "drop":
                shell.do(dropped(key, device))
            case "commit":
                if machine.phase is Phase.AGGREGATING and current.reviewed is None:
                    delivered = [d for d, m in current.members.items() if m.accepted is not None]
                    shell.review(*delivered[: salt // 2], reject=salt != 3)
                elif machine.phase is Phase.AGGREGATING:
                    shell.do(committed(key))
            case "tick" | "later":
                shell.now += 1.0 if action == "tick" else 7.0 * salt
                shell.do(c.Tick())
            case "pause":
                if machine.paused is None:
                    shell.do(e.RunPaused("r", "x"))
            case "resume":
                if machine.paused is not None:
                    shell.do(e.RunResumed("r"))
            case "stop":
                if salt == 0:
                    shell.do(e.RunEnded("r", "stopped"))
    again = RunMachine(machine.config, MANIFEST)
    for at, event in shell.log:
        again.handle(event, at)
    assert snapshot(again) == snapshot(machine)
    commands = again.handle(c.Recovered(), shell.now)
    if again.ended is None:
        work = {
            (type(x).__name__, getattr(x, "device", "")) for x in commands if isinstance(x, c.Choose | c.Review | c.Aggregate)
        }
        assert work == outstanding(machine)
        for device in sorted(machine.connected):
            task = machine.task(device)
            sent = [x for x in again.handle(c.Connected(device), shell.now) if isinstance(x, c.SendProbe | c.SendAssignment)]
            assert sent == ([] if task is None else [task])


@pytest.mark.parametrize("begin", [-86_400.0, 70.0, 6_048_000.0], ids=["set back", "on", "set forward"])
def test_the_hard_limit_does_not_count_the_time_the_server_was_down_or_the_clock_was_set_by(begin):
    shell = opened(progress_timeout_seconds=1e6, round_limit_seconds=100.0)
    shell.now = 60.0
    shell.probe("a")
    again = RunMachine(shell.machine.config, MANIFEST)
    for at, event in shell.log:
        again.handle(event, at)
    left = 40.0  # of 100 seconds 60 had gone by at the last event
    for command in again.handle(c.Recovered(), begin):
        assert not isinstance(command, c.Record)
    assert not [x for x in again.handle(c.Tick(), begin + left - 1) if isinstance(x, c.Record)]
    ended = [x.event for x in again.handle(c.Tick(), begin + left + 1) if isinstance(x, c.Record)]
    assert [type(event) for event in ended] == [e.RoundClosed] and "time limit" in ended[0].reason


def test_the_hard_limit_holds_however_often_the_server_is_started_anew():
    """No event comes any more, and each time the server is up for 30 of 100 seconds."""
    shell = opened(progress_timeout_seconds=1e6, round_limit_seconds=100.0)
    at, elapsed, starts = 0.0, None, 0
    while True:
        again = RunMachine(shell.machine.config, MANIFEST)
        for when, event in shell.log:
            again.handle(event, when)
        at += 5000.0
        again.handle(c.Recovered(elapsed), at)
        at += 30.0
        starts += 1
        ended = [x.event for x in again.handle(c.Tick(), at) if isinstance(x, c.Record)]
        if ended:
            break
        elapsed = at - again.current.opened_at
    assert starts == 4 and "time limit" in ended[0].reason
