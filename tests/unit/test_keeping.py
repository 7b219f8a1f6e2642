"""What is collected, and what must not be: objects whose event is late, whatever it is late for."""

from __future__ import annotations

import asyncio
import threading

import pytest
from test_coordinator import SlowLog, database, with_coordinator  # noqa: F401

from fp_server import keeping


def put(store, text):
    """An object that nothing refers to."""
    (store.scratch / text).write_text(text)
    return store.adopt(store.scratch / text).digest


@pytest.fixture
def often(monkeypatch):
    """A look every tenth of a second, for what is as old as that."""
    monkeypatch.setattr(keeping, "COLLECT", 0.1)


async def gone(store, digest):
    async with asyncio.timeout(10):
        while store.has(digest):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def test_what_nothing_refers_to_is_collected(tmp_path, database, often):  # noqa: F811
    async def body(coordinator):
        await gone(coordinator.store, put(coordinator.store, "x"))

    with_coordinator(tmp_path, database, body)


def test_an_object_that_came_to_be_wanted_while_the_look_waited_for_its_thread_stays(tmp_path, database, often):  # noqa: F811
    """The heavy thread is busy for longer than an object must be old; the object is adopted and referred to meanwhile."""

    async def body(coordinator):
        store, free = coordinator.store, threading.Event()
        busy = asyncio.create_task(coordinator.background.heavy(free.wait))
        await asyncio.sleep(0.3)  # a look has taken down what is wanted, and waits
        wanted = put(store, "new")
        coordinator.keeper.kept |= {wanted}
        await asyncio.sleep(0.3)
        free.set()
        await busy
        await gone(store, put(store, "unwanted"))  # a later look
        assert store.has(wanted)

    with_coordinator(tmp_path, database, body)


def test_an_update_stays_however_late_its_event_is(tmp_path, database, often):  # noqa: F811
    async def body(coordinator):
        store, keeper = coordinator.store, coordinator.keeper
        digest = put(store, "update")
        with keeper.held(digest):
            with keeper.held(digest):  # two devices sent the same
                pass
            await gone(store, put(store, "other"))
            assert store.has(digest)
        await gone(store, digest)

    with_coordinator(tmp_path, database, body)


def test_nothing_is_collected_while_an_aggregation_has_no_event_yet(tmp_path, database, often):  # noqa: F811
    async def body(coordinator):
        store, keeper = coordinator.store, coordinator.keeper
        with keeper.making():
            made = put(store, "ledger")
            with keeper.making():
                pass
            await asyncio.sleep(0.5)
            assert store.has(made)
        await gone(store, made)

    with_coordinator(tmp_path, database, body)
