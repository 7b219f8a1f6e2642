"""The event log's hash chain: whatever was changed, flipped or removed is found and named, wherever it is."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3

import pytest

from common.errors import DamagedError
from fp_server import chain
from fp_server import events as e
from fp_server.config import ServerConfig
from fp_server.coordinator import Coordinator
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore

COUNT = 7


@pytest.fixture
def path(tmp_path):
    """A log of seven events of two runs."""
    database = Database(tmp_path / "log.sqlite")

    async def fill():
        for index in range(COUNT):
            await EventLog(database).append(e.RunPaused("one" if index % 2 else "two", f"reason {index}"), 0.1 * index)

    asyncio.run(fill())
    database.close()
    return tmp_path / "log.sqlite"


def edit(path, *statements):
    """Change the file behind the server's back."""
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def verdict(path, reading=False) -> str:
    """What `check` says; empty when all is well."""
    try:
        database = Database(path, reading=reading)
    except DamagedError as error:
        return str(error)
    try:
        EventLog(database).check()
    except DamagedError as error:
        return str(error)
    finally:
        database.close()
    return ""


def twin(path) -> str:
    """The hash of the last row, the obvious way."""
    found = "0" * 64
    for seq, run, at, kind, body in sqlite3.connect(path).execute("SELECT seq, run, time, kind, body FROM events ORDER BY seq"):
        found = hashlib.sha256("\n".join([found, str(seq), run, repr(at), kind, body]).encode()).hexdigest()
    return found


@pytest.mark.parametrize("reading", [False, True])
def test_a_whole_log_is_found_whole(path, reading):
    assert verdict(path, reading) == ""
    database = Database(path, reading=reading)
    assert EventLog(database).check() == chain.Head(COUNT, twin(path))
    database.close()


@pytest.mark.parametrize("seq", range(1, COUNT + 1))
@pytest.mark.parametrize(
    "change", ["run = 'three'", "time = time + 1e-9", "kind = 'RunResumed'", "body = replace(body, 'reason', 'reasom')"]
)
def test_a_changed_event_is_named(path, seq, change):
    edit(path, f"UPDATE events SET {change} WHERE seq = {seq}")
    assert f"event {seq} is not what was written" in verdict(path)
    assert f"event {seq} is not what was written" in verdict(path, reading=True)


@pytest.mark.parametrize("seq", range(1, COUNT + 1))
def test_a_missing_event_is_named_also_the_last_one(path, seq):
    edit(path, f"DELETE FROM events WHERE seq = {seq}")
    assert f"event {seq} is missing" in verdict(path)


def test_many_missing_at_the_end_and_all_of_them(path):
    edit(path, "DELETE FROM events WHERE seq > 4")
    assert "events 5 to 7 are missing" in verdict(path)
    edit(path, "DELETE FROM events")
    assert "events 1 to 7 are missing" in verdict(path)


def test_two_events_that_changed_places(path):
    edit(
        path,
        "UPDATE events SET seq = 100 WHERE seq = 3",
        "UPDATE events SET seq = 3 WHERE seq = 4",
        "UPDATE events SET seq = 4 WHERE seq = 100",
    )
    assert "event 3 is not what was written" in verdict(path)


def test_every_flipped_bit_of_an_events_row_is_found(path):
    """Each bit of the row's bytes in the file, one at a time: what is found may be the row, or SQLite's own structure."""
    whole = path.read_bytes()
    begin = whole.index(b'{"run":"one","reason":"reason 3"}') - 12
    end = whole.index(b"}", begin) + 1 + 64  # the hash lies behind the body
    for at in range(begin, end):
        for bit in (0, 3, 7):
            broken = bytearray(whole)
            broken[at] ^= 1 << bit
            path.write_bytes(broken)
            assert verdict(path, reading=True), (at, bit)
    path.write_bytes(whole)
    assert verdict(path, reading=True) == ""


def test_folding_a_damaged_log_is_refused_with_what_to_do(path, tmp_path):
    edit(path, "UPDATE events SET body = replace(body, 'reason 3', 'reason 8') WHERE seq = 4")
    database = Database(path)
    coordinator = Coordinator(ServerConfig(names=["x"]), EventLog(database), ObjectStore(tmp_path))
    try:
        with pytest.raises(DamagedError, match=r"event 4 is not what was written.*fp-server verify.*restore the last backup"):
            asyncio.run(coordinator.start())
        with pytest.raises(DamagedError, match="event 4 is not what was written"):
            list(coordinator.log.replay("one"))
        assert len(list(coordinator.log.replay("two"))) == 4, "these are not damaged"
        edit(path, "DELETE FROM events WHERE seq = 4")
        with pytest.raises(DamagedError, match="event 4 is missing"):
            list(coordinator.log.replay("two"))
    finally:
        database.close()


def test_a_log_of_an_older_version_is_chained_when_it_is_opened(path):
    edit(path, "ALTER TABLE events DROP COLUMN chain")
    assert verdict(path, reading=True) == "", "reading changes nothing, and there is nothing to check"
    assert "chain" not in {row[1] for row in sqlite3.connect(path).execute("PRAGMA table_info(events)")}
    assert verdict(path) == ""
    database = Database(path)
    asyncio.run(EventLog(database).append(e.RunPaused("one", "after")))
    assert EventLog(database).check() == chain.Head(COUNT + 1, twin(path))
    database.close()
    edit(path, "UPDATE events SET time = 5 WHERE seq = 2")
    assert "event 2 is not what was written" in verdict(path)


def test_what_an_older_version_appends_meanwhile_is_chained_at_the_next_opening(path):
    edit(path, "INSERT INTO events (run, time, kind, body) VALUES ('one', 9.0, 'RunResumed', '{\"run\": \"one\"}')")
    assert verdict(path, reading=True) == ""
    assert verdict(path) == ""
    assert sqlite3.connect(path).execute("SELECT chain FROM events WHERE seq = 8").fetchone() == (twin(path),)
    edit(path, "UPDATE events SET chain = '' WHERE seq = 5")
    assert "event 5 is not what was written" in verdict(path), "only at the end"
    assert "event 5 is not what was written" in verdict(path, reading=True)


def test_a_flipped_bit_in_an_index_is_found(path):
    """The fold finds a run's events by the index: one that is missing there would be left out without a word."""
    edit(
        path,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_schema SET sql = 'CREATE INDEX events_run ON events (run, time)' WHERE name = 'events_run'",
    )
    assert "events_run" in verdict(path, reading=True)
