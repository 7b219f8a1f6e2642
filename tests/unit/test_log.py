"""The event log: durable before it says so, whole after a failure, replayed in order page by page."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import textwrap

import pytest

from common.errors import StorageError
from fp_server import events as e
from fp_server.log import Database, EventLog


@pytest.fixture
def database(tmp_path):
    one = Database(tmp_path / "log.sqlite")
    yield one
    one.close()


def test_events_come_back_in_order_with_their_times_over_many_pages_and_runs(database):
    log = EventLog(database)

    async def body():
        for index in range(1203):
            await log.append(e.RunPaused("one" if index % 2 else "two", f"{index}"), float(index))

    asyncio.run(body())
    got = list(log.replay("one"))
    assert [(at, int(event.reason)) for at, event in got] == [(float(i), i) for i in range(1, 1203, 2)]
    assert log.runs() == [] and list(log.replay("none")) == []


def test_every_commit_is_synced(database):
    assert database.run(lambda c: c.execute("PRAGMA synchronous").fetchone()[0]) == 2
    assert database.run(lambda c: c.execute("PRAGMA journal_mode").fetchone()[0]) == "wal"


def test_what_append_acknowledged_survives_kill_9(tmp_path):
    """The process says a number only after its append returned, and is killed in the middle of it."""
    script = textwrap.dedent(
        f"""
        import asyncio, os, pathlib
        from fp_server import events as e
        from fp_server.log import Database, EventLog
        async def main():
            log = EventLog(Database(pathlib.Path({str(tmp_path / "log.sqlite")!r})))
            for index in range(1000):
                await log.append(e.RunPaused("r", str(index)))
                os.write(1, b"%d\\n" % index)
        asyncio.run(main())
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    said = [process.stdout.readline() for _ in range(20)]
    process.kill()
    said += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    last = int(said[-1])
    database = Database(tmp_path / "log.sqlite")
    try:
        kept = [int(event.reason) for _, event in EventLog(database).replay("r")]
    finally:
        database.close()
    assert kept[: last + 1] == list(range(last + 1)) and len(kept) - (last + 1) in (0, 1)


def test_a_full_disk_is_a_storage_error_and_the_next_append_works(database, tmp_path):
    log = EventLog(database)
    asyncio.run(log.append(e.RunPaused("r", "before")))
    pages = database.run(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
    database.run(lambda c: c.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    with pytest.raises(StorageError, match=r"full.*nothing was lost"):
        asyncio.run(log.append(e.RunPaused("r", "x" * 100_000)))
    assert [event.reason for _, event in log.replay("r")] == ["before"]
    database.run(lambda c: c.execute("PRAGMA max_page_count = 100000").fetchone())
    asyncio.run(log.append(e.RunPaused("r", "after")))
    assert [event.reason for _, event in log.replay("r")] == ["before", "after"]


def test_a_failed_transaction_leaves_nothing_behind(database):
    def work(c: sqlite3.Connection) -> None:
        c.execute("INSERT INTO events (run, time, kind, body) VALUES ('r', 0, 'RunResumed', '{\"run\": \"r\"}')")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        database.run(work)
    assert list(EventLog(database).replay("r")) == []


def test_a_file_that_is_no_log_is_named(tmp_path):
    (tmp_path / "log.sqlite").write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(StorageError, match=r"log\.sqlite: file is not a database"):
        Database(tmp_path / "log.sqlite")
    with pytest.raises(StorageError, match="unable to open"):
        Database(tmp_path / "none" / "log.sqlite")


def test_an_event_of_another_version_is_a_storage_error(tmp_path, database):
    database.run(lambda c: c.execute("INSERT INTO events (run, time, kind, body) VALUES ('r', 0, 'Unheard', '{}')").rowcount)
    again = Database(tmp_path / "log.sqlite")  # chains what an older version has written
    try:
        with pytest.raises(StorageError, match="'Unheard' event this version can't read"):
            list(EventLog(again).replay("r"))
    finally:
        again.close()
