"""The shell around the state machine: what is in the log is in the machine, whatever breaks off."""

from __future__ import annotations

import asyncio

import pytest
from test_rounds import MANIFEST, plan, toml

from common.errors import StorageError
from common.types import PlanReport
from fp_server import commands as c
from fp_server import events as e
from fp_server.config import ServerConfig
from fp_server.coordinator import Coordinator, Session
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore
from fp_server.service import Bucket


@pytest.fixture
def database(tmp_path):
    one = Database(tmp_path / "log.sqlite")
    yield one
    one.close()


def with_coordinator(tmp_path, database, body, log=None):
    async def main():
        coordinator = Coordinator(ServerConfig(names=["x"]), log or EventLog(database), ObjectStore(tmp_path))
        await coordinator.start()
        try:
            await coordinator.start_run(toml(), MANIFEST)
            await body(coordinator)
        finally:
            await coordinator.stop()

    asyncio.run(main())


def report(device="a") -> PlanReport:
    return plan(device).report


class SlowLog(EventLog):
    """A log that can be made to fail, and whose commits take a moment."""

    full = False

    async def append(self, event, at=None):
        if self.full:
            raise StorageError("the disk is full")
        await super().append(event, at)
        await asyncio.sleep(0.05)


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
        waiting = asyncio.create_task(coordinator.plan_reported("a", report()))
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

        async def append(self, event, at=None):
            if not self.left:
                raise StorageError("the disk is full")
            self.left -= 1
            await super().append(event, at)

    log = OneMore(database)

    async def body(coordinator):
        for device in "ab":
            await coordinator.connect(Session(device))
        await coordinator.plan_reported("a", report())
        log.left = 1
        await coordinator.plan_reported("b", report())
        assert coordinator.active.current is None and set(coordinator.active.plans) == {"a", "b"}
        log.left = 10
        await coordinator.post(c.Tick())
        assert coordinator.active.current.opened.drawn == ("a", "b")

    with_coordinator(tmp_path, database, body, log)


def test_samples_are_fixed_at_joining_and_capped(tmp_path, database):
    async def body(coordinator):
        await coordinator.plan_reported("a", plan("a", samples=10**9).report)
        assert coordinator.active.plans["a"].samples == 1_000_000
        await coordinator.plan_reported("a", plan("a", samples=5).report)
        assert coordinator.active.plans["a"].samples == 1_000_000
        await coordinator.plan_reported("b", plan("b", samples=0).report)
        assert coordinator.active.capacity("b") is None

    with_coordinator(tmp_path, database, body)


def test_only_a_plan_that_was_asked_for_and_is_new_is_an_event(tmp_path, database):
    async def body(coordinator):
        def plans():
            return sum(isinstance(event, e.PlanReceived) for _, event in coordinator.log.replay("r"))

        await coordinator.connect(Session("a"))
        await coordinator.plan_reported("a", report())
        assert plans() == 1
        await coordinator.plan_reported("a", plan("a", units=1).report)
        assert plans() == 1 and coordinator.active.capacity("a").units == 2, "nobody asked"
        await coordinator.connect(Session("a"))
        assert coordinator.active.stale == {"a"}
        await coordinator.plan_reported("a", report())
        assert plans() == 1 and not coordinator.active.stale, "the same as before"
        await coordinator.connect(Session("a"))
        await coordinator.plan_reported("a", plan("a", units=1).report)
        assert plans() == 2 and coordinator.active.capacity("a").units == 1

    with_coordinator(tmp_path, database, body)


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
            await coordinator.plan_reported(device, report())
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
