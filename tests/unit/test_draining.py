"""A coordinator that is about to stop begins nothing, finishes what it can in time, and leaves the rest to the next start."""

from __future__ import annotations

import asyncio
import threading

import pytest
from test_coordinator import report, with_coordinator
from test_rounds import probed

from common.errors import UnreachableError
from fp_server import commands as c
from fp_server import coordinator as module
from fp_server import events as e
from fp_server.coordinator import STOPPING, Coordinator
from fp_server.log import Database
from fp_server.reports import plan_reported
from fp_server.sessions import Session


@pytest.fixture
def database(tmp_path):
    one = Database(tmp_path / "log.sqlite")
    yield one
    one.close()


async def join(coordinator: Coordinator, *devices: str) -> list[Session]:
    sessions = [Session(device) for device in devices]
    for session in sessions:
        await coordinator.connect(session)
        await plan_reported(coordinator, session.device, report(session.device))
    return sessions


def test_devices_are_told_and_none_is_let_in_and_no_round_opens(tmp_path, database):
    async def body(coordinator):
        (session,) = await join(coordinator, "a")
        await coordinator.connect(Session("b"))
        await coordinator.drain()
        said = session.outbox.get_nowait()
        while not isinstance(said, UnreachableError):  # it had been asked for its plan
            said = session.outbox.get_nowait()
        assert str(said) == session.reason == STOPPING
        with pytest.raises(UnreachableError, match="stopping"):
            await coordinator.connect(Session("c"))
        await plan_reported(coordinator, "b", report("b"))  # it was on its way: it counts, and would have opened the round
        await coordinator.post(c.Tick())
        assert set(coordinator.active.plans) == {"a", "b"} and coordinator.active.current is None

    with_coordinator(tmp_path, database, body)


def test_what_is_begun_is_finished_in_time_and_nothing_follows_from_it(tmp_path, database, monkeypatch):
    """Of two choices one is under way; the other would be the next to begin."""
    go, begun = threading.Event(), threading.Event()
    choose = module.choose_units

    def slow(*arguments):
        begun.set()
        go.wait(30)
        return choose(*arguments)

    monkeypatch.setattr(module, "choose_units", slow)
    stages = {}

    async def body(coordinator):
        await join(coordinator, "a", "b")
        key = coordinator.active.current.opened.key
        await coordinator.post(probed(key, "a"))
        await asyncio.to_thread(begun.wait, 20)
        await coordinator.drain()
        await coordinator.post(probed(key, "b"))
        threading.Timer(0.3, go.set).start()
        await coordinator.stop(20.0)
        stages.update({device: member.stage for device, member in coordinator.active.current.members.items()})
        folded = coordinator.fold("r")
        assert {device: member.stage for device, member in folded.current.members.items()} == stages

    with_coordinator(tmp_path, database, body)
    assert stages == {"a": "training", "b": "choosing"}


def test_what_is_not_done_in_time_is_left_and_said(tmp_path, database, monkeypatch, caplog):
    go, begun = threading.Event(), threading.Event()

    def stuck(*_):
        begun.set()
        go.wait(30)
        raise module.TooLate("never mind")

    monkeypatch.setattr(module, "choose_units", stuck)

    async def body(coordinator):
        await join(coordinator, "a", "b")
        key = coordinator.active.current.opened.key
        await coordinator.post(probed(key, "a"))
        await asyncio.to_thread(begun.wait, 20)
        await coordinator.stop(0.2)
        assert coordinator.fold("r").current.members["a"].stage == "choosing"

    with_coordinator(tmp_path, database, body)
    go.set()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "what is being chosen or aggregated is not done; it is begun again at the next start"
    ]


def test_an_aggregation_that_keeps_failing_does_not_hold_a_stop_up(tmp_path, database, monkeypatch):
    """It waits for disk space, ever longer."""
    failed = threading.Event()

    def full(*_):
        failed.set()
        raise module.StorageError("the disk is full")

    monkeypatch.setattr(module, "aggregate_round", full)

    async def body(coordinator):
        await join(coordinator, "a", "b")
        key = coordinator.active.current.opened.key
        coordinator._do(coordinator.active, c.Aggregate(key))
        await asyncio.to_thread(failed.wait, 20)
        await coordinator.stop(5.0)
        assert coordinator.active.current is not None and not isinstance(coordinator.active.ended, e.RunEnded)

    with_coordinator(tmp_path, database, body)
