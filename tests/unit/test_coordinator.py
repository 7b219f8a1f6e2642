"""The shell around the state machine: what is in the log is in the machine, whatever breaks off."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time

import numpy as np
import pytest
from test_rounds import MANIFEST, plan, probed, toml

from common.bucket import Bucket, Buckets
from common.errors import StorageError
from common.tensorfile import write_tensors
from common.transport import tls
from common.types import PlanReport, ProbeReport, UpdateMetrics
from fp_server import commands as c
from fp_server import events as e
from fp_server import memory, work
from fp_server.certificates import create_authority
from fp_server.config import ServerConfig
from fp_server.coordinator import Coordinator
from fp_server.identity import Authority
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore
from fp_server.operations import kick, start_run
from fp_server.reports import plan_reported, probe_reported
from fp_server.sessions import Session
from fp_server.validation import expected_shapes


@pytest.fixture
def database(tmp_path):
    one = Database(tmp_path / "log.sqlite")
    yield one
    one.close()


def with_coordinator(tmp_path, database, body, log=None, store=None):
    async def main():
        coordinator = Coordinator(ServerConfig(names=["x"]), log or EventLog(database), store or ObjectStore(tmp_path))
        await coordinator.start()
        try:
            await start_run(coordinator, toml(), MANIFEST)
            await body(coordinator)
        finally:
            await coordinator.stop()

    asyncio.run(main())


def report(device="a") -> PlanReport:
    return plan(device).report


class SlowLog(EventLog):
    """A log that can be made to fail, and whose commits take a moment."""

    full = False

    async def append(self, event, at=None, also=None):
        if self.full:
            raise StorageError("the disk is full")
        await super().append(event, at, also)
        await asyncio.sleep(0.05)

    async def touch(self):
        if self.full:
            raise StorageError("the disk is full")
        await super().touch()


async def both_drawn(coordinator):
    """Devices a and b have come and said what they can hold, which opens the round; its key."""
    for device in "ab":
        await coordinator.connect(Session(device))
        await plan_reported(coordinator, device, report(device))
    return coordinator.active.current.opened.key


async def both_assigned(coordinator, key):
    """Devices a and b have reported their probes, and units are chosen for them."""
    for device in "ab":
        await coordinator.post(probed(key, device))
        async with asyncio.timeout(10):
            while coordinator.active.current.members[device].assigned is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def both_delivered(coordinator):
    """A round of devices a and b, to the last of its updates; the key."""
    machine, key, store = coordinator.active, await both_drawn(coordinator), coordinator.store
    await both_assigned(coordinator, key)
    for device in "ab":
        path = store.scratch / device
        shapes = expected_shapes(machine.assignment(device, key), MANIFEST)
        write_tensors(path, {name: np.full(shape, 1.0 + ord(device), np.float32) for name, shape in shapes.items()})
        await coordinator.post(e.UpdateAccepted("r", key, device, store.adopt(path), UpdateMetrics()))
    return key


def test_a_caller_that_breaks_off_leaves_log_and_machine_the_same(tmp_path, database):
    async def body(coordinator):
        calling = asyncio.create_task(coordinator.post(e.RunPaused("r", "x")))
        await asyncio.sleep(0.02)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await coordinator.post(c.Tick())  # waits its turn
        assert [type(event).__name__ for _, event in coordinator.log.replay("r")] == ["RunStarted", "RunPaused"]
        assert coordinator.active.paused == "x" and coordinator.fold("r").paused == "x"

    with_coordinator(tmp_path, database, body, SlowLog(database))


def test_a_full_disk_holds_a_report_until_there_is_room_and_says_so(tmp_path, database):
    log = SlowLog(database)

    async def body(coordinator):
        log.full = True
        with pytest.raises(StorageError):
            await coordinator.post(e.RunPaused("r", "x"))
        assert coordinator.active.paused is None
        waiting = asyncio.create_task(plan_reported(coordinator, "a", report()))
        await asyncio.sleep(0.7)  # a look at the clock in between must not hide the problem
        assert coordinator.problem == "the disk is full" and not waiting.done()
        log.full = False
        await waiting
        assert coordinator.problem == "" and "a" in coordinator.active.plans

    with_coordinator(tmp_path, database, body, log)


def test_what_follows_from_an_event_may_fail_without_taking_it_back(tmp_path, database):
    """The second plan opens the round; the disk is full just then: the plan counts, the round opens at a later tick."""

    class OneMore(EventLog):
        left = 10**6

        async def append(self, event, at=None, also=None):
            if not self.left:
                raise StorageError("the disk is full")
            self.left -= 1
            await super().append(event, at, also)

    log = OneMore(database)

    async def body(coordinator):
        for device in "ab":
            await coordinator.connect(Session(device))
        await plan_reported(coordinator, "a", report())
        log.left = 1
        await plan_reported(coordinator, "b", report())
        assert coordinator.active.current is None and set(coordinator.active.plans) == {"a", "b"}
        log.left = 10
        await coordinator.post(c.Tick())
        assert coordinator.active.current.opened.drawn == ("a", "b")

    with_coordinator(tmp_path, database, body, log)


def test_samples_are_fixed_at_joining_and_capped(tmp_path, database):
    async def body(coordinator):
        await plan_reported(coordinator, "a", plan("a", samples=10**9).report)
        assert coordinator.active.plans["a"].samples == 1_000_000
        await plan_reported(coordinator, "a", plan("a", samples=5).report)
        assert coordinator.active.plans["a"].samples == 1_000_000
        await plan_reported(coordinator, "b", plan("b", samples=0).report)
        assert coordinator.active.capacity("b") is None

    with_coordinator(tmp_path, database, body)


def test_only_a_plan_that_was_asked_for_and_is_new_is_an_event(tmp_path, database):
    async def body(coordinator):
        def plans():
            return sum(isinstance(event, e.PlanReceived) for _, event in coordinator.log.replay("r"))

        await coordinator.connect(Session("a"))
        await plan_reported(coordinator, "a", report())
        assert plans() == 1
        await plan_reported(coordinator, "a", plan("a", units=1).report)
        assert plans() == 1 and coordinator.active.capacity("a").units == 2, "nobody asked"
        await coordinator.connect(Session("a"))
        assert coordinator.active.stale == {"a"}
        await plan_reported(coordinator, "a", report())
        assert plans() == 1 and not coordinator.active.stale, "the same as before"
        await coordinator.connect(Session("a"))
        await plan_reported(coordinator, "a", plan("a", units=1).report)
        assert plans() == 2 and coordinator.active.capacity("a").units == 1

    with_coordinator(tmp_path, database, body)


def test_a_refusal_counts_whatever_else_the_plan_holds(tmp_path, database):
    async def body(coordinator):
        await coordinator.connect(Session("a"))
        await plan_reported(coordinator, "a", dataclasses.replace(report(), refusal="my policy says no"))
        assert coordinator.active.capacity("a") is None
        assert coordinator.active.plans["a"].report.refusal == "my policy says no"

    with_coordinator(tmp_path, database, body)


def test_objects_nothing_refers_to_are_removed_and_a_crash_before_it_is_made_good(tmp_path, database):
    """Round 1's ledger goes when round 2 is durable; a kill between the commit and the removal leaves it to the next start."""
    store = ObjectStore(tmp_path)

    def put(*parts):
        source = store.scratch / "x"
        source.write_text(repr(parts))
        return store.adopt(source)

    def stored():
        return {path.name for path in (tmp_path / "objects").glob("??/*")}

    async def whole_round(coordinator):
        key = coordinator.active.current.opened.key
        await both_assigned(coordinator, key)
        for device in "ab":
            await coordinator.post(e.UpdateAccepted("r", key, device, put("update", device, key), UpdateMetrics()))
        made = e.UnitCommit(0, put("ledger", key), put("broadcast", key), ("a", "b"), 0.0)
        await coordinator.post(e.RoundCommitted("r", key, (made,), (), {"a": 1, "b": 1}, 1, 1))
        return {made.ledger.digest, made.broadcast.digest}

    async def first(coordinator):
        coordinator._aggregate = lambda machine, command: asyncio.sleep(0)
        for device in "ab":
            await coordinator.connect(Session(device))
            await plan_reported(coordinator, device, report())
        made = await whole_round(coordinator)
        async with asyncio.timeout(10):  # a thread removes
            while stored() != made:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        store.discard = lambda digests, mark: None  # killed between the commit and the removal
        wanted.update(await whole_round(coordinator))
        await asyncio.sleep(0.2)
        assert wanted < stored() and len(stored()) == 6

    wanted: set[str] = set()
    with_coordinator(tmp_path, database, first, store=store)
    (tmp_path / "partial" / "a").mkdir()
    (tmp_path / "partial" / "a" / "half").write_text("half")

    async def second():
        coordinator = Coordinator(ServerConfig(names=["x"]), EventLog(database), ObjectStore(tmp_path))
        await coordinator.start()
        await coordinator.stop()

    asyncio.run(second())
    assert stored() == wanted and not list((tmp_path / "partial" / "a").iterdir())


def test_a_run_stopped_while_it_is_aggregated_leaves_nothing_behind(tmp_path, database, monkeypatch):
    """Stopped between the first layer and the second: the stacking goes on undisturbed, and what it made goes."""
    store, begun, stopped = ObjectStore(tmp_path), threading.Event(), threading.Event()
    aggregate = work.aggregate_layer

    def slow(*args, **kwargs):
        begun.set()
        assert stopped.wait(10)
        return aggregate(*args, **kwargs)

    monkeypatch.setattr(work, "aggregate_layer", slow)

    async def body(coordinator):
        machine = coordinator.active
        await both_delivered(coordinator)
        assert await asyncio.to_thread(begun.wait, 10)
        await coordinator.post(e.RunEnded("r", "stopped", "by hand"))
        stopped.set()
        async with asyncio.timeout(10):
            while len(coordinator.background.tasks) > 2:  # the clock's and the collector's go on  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert machine.ended is not None and machine.ledger == {} and coordinator.problem == ""

    with_coordinator(tmp_path, database, body, store=store)
    assert not list((tmp_path / "objects").glob("??/*")) and not list(store.scratch.iterdir())


def test_the_heap_is_given_back_after_a_round(tmp_path, database, monkeypatch):
    rounds_done = []
    monkeypatch.setattr(memory, "give_back", lambda: rounds_done.append(coordinators[0].active.history.committed))
    coordinators = []

    async def body(coordinator):
        coordinators.append(coordinator)
        await both_delivered(coordinator)
        async with asyncio.timeout(10):
            while not rounds_done:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    with_coordinator(tmp_path, database, body)
    assert rounds_done == [1]


def test_an_object_that_was_adopted_again_is_not_removed(tmp_path):
    store = ObjectStore(tmp_path)
    (store.scratch / "x").write_text("x")
    ref = store.adopt(store.scratch / "x")
    mark = store.mark
    (store.scratch / "x").write_text("x")
    store.adopt(store.scratch / "x")
    store.discard([ref.digest], mark)
    assert store.has(ref.digest)
    store.discard([ref.digest], store.mark)
    assert not store.has(ref.digest)


def test_the_bucket_lets_a_burst_through_and_then_a_rate():
    bucket = Bucket(10.0, 50.0)
    assert [bucket.take(1000.0) for _ in range(50)] == [0.0] * 50
    assert bucket.take(1000.0) == pytest.approx(0.1)
    assert bucket.take(1000.1) == pytest.approx(0.1)
    assert bucket.take(2000.0) == 0.0


def test_a_restart_takes_the_run_up_again(tmp_path, database):
    async def first(coordinator):
        for device in "ab":
            await coordinator.connect(Session(device))
            await plan_reported(coordinator, device, report())
        assert coordinator.active.current is not None

    with_coordinator(tmp_path, database, first)

    async def second():
        coordinator = Coordinator(ServerConfig(names=["x"]), EventLog(database), ObjectStore(tmp_path))
        await coordinator.start()
        try:
            session = Session("a")
            await coordinator.connect(session)
            assert isinstance(session.outbox.get_nowait(), c.SendProbe) and coordinator.active.connected == {"a"}
        finally:
            await coordinator.stop()

    asyncio.run(second())


def test_an_object_may_be_there_a_moment_before_what_refers_to_it(tmp_path):
    """A look while the server works leaves what was adopted just now, also when the wall clock has jumped."""
    store = ObjectStore(tmp_path)

    def put(text: str) -> str:
        (store.scratch / "x").write_text(text)
        return store.adopt(store.scratch / "x").digest

    old = put("old")
    wanted = put("wanted")
    again = ObjectStore(tmp_path)  # what an earlier process has adopted
    store = again
    new = put("new")
    os.utime(again.path(new), (0, 0))
    assert again.sweep({wanted}, (), time.monotonic() - 60.0) == 1
    assert not again.has(old) and again.has(new) and again.has(wanted)
    put("new")
    assert again.sweep({wanted}, (), time.monotonic() - 60.0) == 0
    assert again.sweep({wanted}, ()) == 1 and not again.has(new)


def test_what_has_come_in_part_goes_when_it_can_not_count_any_more(tmp_path, database):
    """Of a device that was dropped, and of all when the round is closed; not of one that still pushes."""

    async def body(coordinator):
        def half(device):
            (tmp_path / "partial" / device).mkdir(exist_ok=True)
            (tmp_path / "partial" / device / "half").write_text("half")

        def there():
            return sorted(path.parent.name for path in (tmp_path / "partial").glob("*/half"))

        async def until(wanted):
            async with asyncio.timeout(10):
                while there() != wanted:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

        for device in "ab":
            await coordinator.connect(Session(device))
            await plan_reported(coordinator, device, report())
        key = coordinator.active.current.opened.key
        await both_assigned(coordinator, key)
        for device in ("a", "b", "gone"):
            half(device)
        await coordinator.post(e.DeviceDropped("r", key, "a", "UnreachableError", "no progress"))
        await until(["b"])
        await coordinator.post(e.RunEnded("r", "stopped", "by hand"))
        await until([])

    with_coordinator(tmp_path, database, body)


def test_what_was_adopted_too_late_goes_at_once(tmp_path, database):
    async def body(coordinator):
        store = coordinator.store
        (store.scratch / "x").write_text("x")
        digest = store.adopt(store.scratch / "x").digest
        coordinator.keeper.let_go(digest)
        async with asyncio.timeout(10):
            while store.has(digest):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    with_coordinator(tmp_path, database, body)


def test_the_time_of_a_full_disk_counts_against_nobody(tmp_path, database):
    """Devices have delivered, and their reports can't be written for longer than the progress timeout: they stay in the round."""
    log, now = SlowLog(database), [1000.0]

    async def body(coordinator):
        coordinator.clock = lambda: now[0]
        key = await both_drawn(coordinator)
        log.full = True
        waiting = [asyncio.create_task(coordinator.insist(probed(key, device))) for device in "ab"]
        await asyncio.sleep(0.1)
        for _ in range(6):  # an hour, in which nobody can be heard
            now[0] += 600.0
            await coordinator.post(c.Tick())
        now[0] += 600.0
        log.full = False
        await coordinator.post(c.Tick())  # the clock comes before the report
        await asyncio.gather(*waiting)
        assert coordinator.active.current.opened.key == key
        assert not any(isinstance(event, e.DeviceDropped) for _, event in coordinator.log.replay("r"))
        now[0] += 599.0
        await coordinator.post(c.Tick())
        assert coordinator.active.current.opened.key == key

    with_coordinator(tmp_path, database, body, log)


def test_time_in_which_the_server_stood_still_is_nobodys(tmp_path, database, caplog):
    """Frozen for an hour, or waiting so long for its disk: what was said meanwhile is heard after a look at the clock."""
    log, now = SlowLog(database), [1000.0]

    async def body(coordinator):
        coordinator.clock = lambda: now[0]
        key = await both_drawn(coordinator)
        await coordinator.post(c.Tick())
        now[0] += 3600.0
        await coordinator.post(c.Tick())
        await coordinator.insist(probed(key, "a"))
        assert "the server stood still for 3600 s; that time is not the devices', within the round's limit" in caplog.messages
        assert not any(isinstance(event, e.DeviceDropped) for _, event in coordinator.log.replay("r"))
        for _ in range(301):  # silence while the server is well is a device's own
            now[0] += 2.0
            await coordinator.post(c.Tick())
        assert {event.device for _, event in coordinator.log.replay("r") if isinstance(event, e.DeviceDropped)} == {"b"}

    with_coordinator(tmp_path, database, body, log)


def test_time_without_a_run_is_no_stall(tmp_path, database, caplog):
    now = [1000.0]

    async def body(coordinator):
        coordinator.clock = lambda: now[0]
        await coordinator.post(c.Tick())
        await coordinator.post(e.RunEnded("r", "stopped", "x"))
        for _ in range(3):
            now[0] += 4.0
            await coordinator.post(c.Tick())
        await start_run(coordinator, toml(name="s"), MANIFEST)
        await coordinator.post(c.Tick())
        assert coordinator.active is not None and "stood still" not in caplog.text

    with_coordinator(tmp_path, database, body)


def test_a_moment_of_a_full_disk_does_not_keep_who_is_silent(tmp_path, database):
    """The one thing to be written is that a device is out, and it met a full disk: when there is room the next look writes it."""
    log, now = SlowLog(database), [1000.0]

    async def body(coordinator):
        coordinator.clock = lambda: now[0]
        await both_drawn(coordinator)
        for _ in range(150):  # not at once: a clock that nobody looks at for long is the server's own silence
            now[0] += 4.0
            await coordinator.post(c.Tick())
        now[0] += 1.0
        log.full = True
        await coordinator.post(c.Tick())
        await coordinator.look_at_log()
        assert coordinator.problem == "the disk is full"
        log.full = False
        await coordinator.look_at_log()
        assert coordinator.problem == ""
        await coordinator.post(c.Tick())
        out = [event.device for _, event in coordinator.log.replay("r") if isinstance(event, e.DeviceDropped)]
        assert out == ["a", "b"]

    with_coordinator(tmp_path, database, body, log)


def test_a_revoked_device_is_not_drawn_for_the_round_that_its_going_opens(tmp_path, database):
    async def body(coordinator):
        key = await both_drawn(coordinator)
        await coordinator.post(e.DeviceDropped("r", key, "b", "WorkerError", "x"))
        await kick(coordinator, "a")  # no update is left to come: the round is given up, and another one would be opened
        opened = [event for _, event in coordinator.log.replay("r") if isinstance(event, e.RoundOpened)]
        assert all("a" not in event.drawn for event in opened[1:])
        assert "a" not in coordinator.active.connected and "b" in coordinator.active.connected

    with_coordinator(tmp_path, database, body)


def test_a_revoked_device_takes_its_update_out_of_the_open_round(tmp_path, database):
    store = ObjectStore(tmp_path)

    async def body(coordinator):
        key = await both_drawn(coordinator)
        await both_assigned(coordinator, key)
        (store.scratch / "x").write_text("an update")
        ref = store.adopt(store.scratch / "x")
        await coordinator.post(e.UpdateAccepted("r", key, "a", ref, UpdateMetrics()))
        assert coordinator.active.current.members["a"].counts
        await kick(coordinator, "a")
        await kick(coordinator, "a")  # twice is once
        assert coordinator.active.revoked == {"a"}
        member = coordinator.active.current.members["a"]
        assert not member.counts and member.dropped.error == "IdentityError"
        async with asyncio.timeout(10):
            while store.has(ref.digest):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert coordinator.fold("r").current.members["a"].dropped == member.dropped
        assert sum(isinstance(event, e.DeviceDropped) for _, event in coordinator.log.replay("r")) == 1

    with_coordinator(tmp_path, database, body, store=store)


def test_a_device_revoked_as_its_round_closes_is_not_said_to_be_out_of_it(tmp_path, database):
    """Its update counts: the round closes while the revocation waits for its turn."""

    async def body(coordinator):
        key = await both_drawn(coordinator)
        await both_assigned(coordinator, key)
        async with coordinator.lock:
            revoking = asyncio.create_task(kick(coordinator, "a"))
            await asyncio.sleep(0.05)
            await coordinator.post_locked(e.RoundClosed("r", key, True, "by hand"))
        await revoking
        assert not [event for _, event in coordinator.log.replay("r") if isinstance(event, e.DeviceDropped)]

    with_coordinator(tmp_path, database, body)


def test_a_session_that_ends_before_its_revocation_has_its_turn_is_a_revoked_devices(tmp_path, database):
    async def body(coordinator):
        await both_drawn(coordinator)
        session = coordinator.sessions["a"]
        async with coordinator.lock:
            revoking = asyncio.create_task(kick(coordinator, "a"))
            await asyncio.sleep(0.05)
            leaving = asyncio.create_task(coordinator.disconnect(session))
            await asyncio.sleep(0.05)
            assert "a" not in coordinator.sessions and not revoking.done()
        await asyncio.gather(revoking, leaving)
        assert coordinator.active.revoked == {"a"} and "a" not in coordinator.active.connected

    with_coordinator(tmp_path, database, body)


@pytest.mark.parametrize("figure", ["loss", "tokens", "seconds"])
def test_a_probe_that_can_not_have_been_measured_costs_its_round(tmp_path, database, figure):
    """Status shows means of them, and JSON has no infinity."""

    async def body(coordinator):
        key = await both_drawn(coordinator)
        given = probed(key, "a")
        report = ProbeReport(key, given.similarity, given.in_out, given.loss, given.tokens, given.peak_bytes, given.seconds)
        await probe_reported(coordinator, "a", dataclasses.replace(report, **{figure: 10**13}))
        await probe_reported(coordinator, "b", report)
        members = coordinator.active.current.members
        assert f"the probe's {figure} is 1e+13" in members["a"].dropped.message and members["b"].dropped is None

    with_coordinator(tmp_path, database, body)


def test_another_device_can_not_fill_the_log_with_plans(tmp_path, database):
    async def body(coordinator):
        coordinator.new_plans = Buckets(1 / 1000, 5)
        await coordinator.connect(session := Session("a"))
        for n in range(40):
            coordinator.active.stale.add("a")  # it has come again
            await plan_reported(coordinator, "a", dataclasses.replace(report(), refusal=f"no {n}"))
        kept = [event for _, event in coordinator.log.replay("r") if isinstance(event, e.PlanReceived)]
        assert len(kept) == 1 + 5
        assert "says too often" in session.reason  # and it comes again, later
        await plan_reported(coordinator, "b", report("b"))
        coordinator.active.stale.add("b")
        assert "b" in coordinator.active.plans

    with_coordinator(tmp_path, database, body)


def test_the_loop_does_not_wait_for_the_note_of_a_rounds_time(tmp_path, database):
    async def body(coordinator):
        noted = []
        coordinator._elapsed.note = lambda *given: noted.append(threading.current_thread())
        await both_drawn(coordinator)
        async with asyncio.timeout(10):
            while not noted:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert threading.main_thread() not in noted

    with_coordinator(tmp_path, database, body)


class OpenLog(EventLog):
    """A log in which no round closes: the server is killed before."""

    async def append(self, event, at=None, also=None):
        if isinstance(event, e.RoundClosed):
            raise StorageError("killed")
        await super().append(event, at, also)


async def enrolled(authority, name, days=30):
    token = await authority.create_token(name, "device", 60.0, "h:1", "h:2")
    await authority.enroll(token.secret, tls.make_csr(tls.new_key(), name), days)


def restarted(tmp_path, database, body, later=0.0):
    """`body` with the server that is started anew, `later`; the events of the run from then on."""

    async def main():
        log = EventLog(database)
        known = len(list(log.replay("r")))
        coordinator = Coordinator(ServerConfig(names=["x"]), log, ObjectStore(tmp_path), lambda: time.time() + later)
        await coordinator.start()
        try:
            await body(coordinator)
        finally:
            await coordinator.stop()
        return [event for _, event in list(log.replay("r"))[known:]]

    return asyncio.run(main())


def test_a_kill_in_the_middle_of_a_revocation_lets_no_update_count(tmp_path, database):
    """The revocation is in the books, and the server was killed before the device left the round: it leaves at the start, before
    the round, which is complete, is closed."""
    create_authority(tmp_path, ["localhost"])
    authority = Authority(tmp_path, database)

    async def revoked(coordinator):
        for device in "ab":
            await enrolled(authority, device)
        await both_delivered(coordinator)
        await authority.revoke("a")

    async def committed(coordinator):
        async with asyncio.timeout(10):
            while not coordinator.active.history.committed:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        ((entry, _),) = coordinator.active.history
        assert {name: member.counts for name, member in entry.members.items()} == {"a": False, "b": True}

    with_coordinator(tmp_path, database, revoked, OpenLog(database))
    events = restarted(tmp_path, database, committed)
    assert [type(event) for event in events[:2]] == [e.DeviceDropped, e.RoundClosed] and events[0].device == "a"


def test_who_leaves_at_the_start_leaves_in_the_same_words(tmp_path, database):
    create_authority(tmp_path, ["localhost"])
    authority = Authority(tmp_path, database)

    async def revoked(coordinator):
        for device in "ab":
            await enrolled(authority, device)
        await both_drawn(coordinator)
        await authority.revoke("a")

    with_coordinator(tmp_path, database, revoked)
    started, live, *_ = restarted(tmp_path, database, lambda coordinator: kick(coordinator, "b"))
    assert (started.device, live.device, live.revoked) == ("a", "b", True)
    assert dataclasses.replace(started, device="b", message=started.message.replace("'a'", "'b'")) == live


@pytest.mark.parametrize("standing", ["unknown", "joined again", "ended", "revoked"])
def test_only_who_is_revoked_leaves_a_round_at_the_start(tmp_path, database, standing):
    """And nobody else is late: the time that the server was down is not the round's."""
    create_authority(tmp_path, ["localhost"])
    authority = Authority(tmp_path, database)

    async def body(coordinator):
        if standing != "unknown":
            await enrolled(authority, "a", 0 if standing == "ended" else 30)
        await both_drawn(coordinator)
        if standing in ("joined again", "revoked"):
            await authority.revoke("a")
        if standing == "joined again":
            await enrolled(authority, "a")

    async def ticks(coordinator):
        await coordinator.post(c.Tick())

    with_coordinator(tmp_path, database, body)
    events = restarted(tmp_path, database, ticks, later=86_400.0)
    assert [(type(event), event.device) for event in events] == ([(e.DeviceDropped, "a")] if standing == "revoked" else [])


def test_a_closed_round_keeps_the_update_of_who_is_revoked_then(tmp_path, database):
    """As it does where the server was not killed."""
    create_authority(tmp_path, ["localhost"])
    authority = Authority(tmp_path, database)

    async def revoked(coordinator):
        await enrolled(authority, "a")
        key = await both_drawn(coordinator)
        coordinator.draining = True  # it is not aggregated before the kill
        await coordinator.post(e.RoundClosed("r", key, True, "full"))
        await authority.revoke("a")

    async def nothing(coordinator):
        assert coordinator.active.current.members["a"].dropped is None
        assert coordinator.active.revoked == {"a"}, "nobody waits for it"

    with_coordinator(tmp_path, database, revoked)
    restarted(tmp_path, database, nothing)
