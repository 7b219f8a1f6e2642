"""The audit trail: in the transaction of what it records, chained, only added to, and not to be flooded."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace

import pytest

from common.errors import StorageError
from common.transport.tls import Peer
from fp_server import audit
from fp_server import events as e
from fp_server.audit import Actor, Entry, Refusals
from fp_server.log import Database, EventLog

ALICE = Actor("alice", "operator", "ab12", "10.0.0.5:4242")


@pytest.fixture
def database(tmp_path):
    one = Database(tmp_path / "log.sqlite")
    yield one
    one.close()


def enter(database, *entries, at=None):
    database.run(lambda c: [audit.append(c, entry, at) for entry in entries])


def entries(database):
    return [row.entry for row in audit.read(database)]


def tamper(database, *statements):
    """What somebody with the file in hand can do."""

    def work(c: sqlite3.Connection) -> None:
        c.execute("DROP TRIGGER audit_no_update")
        c.execute("DROP TRIGGER audit_no_delete")
        for statement in statements:
            c.execute(statement)

    database.run(work)


def test_entries_come_back_page_by_page_and_the_chain_holds(database):
    made = [Entry(ALICE, "token", f"device d-{number}") for number in range(audit.PAGE * 2 + 3)]
    enter(database, *made)
    assert entries(database) == made
    last = audit.verify(audit.read(database))
    assert last is not None and last.seq == len(made)
    assert audit.verify([]) is None


def test_entries_of_a_time(database):
    for at in (100.0, 200.0, 300.0):
        enter(database, Entry(ALICE, "token", f"at {at}"), at=at)
    assert [row.time for row in audit.read(database, 200.0)] == [200.0, 300.0]


@pytest.mark.parametrize(
    ("statement", "number"),
    [
        ("UPDATE audit SET actor = 'bob' WHERE seq = 3", 3),
        ("UPDATE audit SET time = time + 1 WHERE seq = 1", 1),
        ("UPDATE audit SET outcome = 'ok' WHERE seq = 5", 5),
        ("UPDATE audit SET hash = (SELECT hash FROM audit WHERE seq = 2) WHERE seq = 4", 4),
        ("DELETE FROM audit WHERE seq = 2", 2),
        ("DELETE FROM audit WHERE seq = 1", 1),
    ],
)
def test_a_change_is_found_where_it_was_made(database, statement, number):
    enter(database, *(Entry(ALICE, "revoke", f"d-{n}", "refused: no") for n in range(6)))
    tamper(database, statement)
    with pytest.raises(StorageError, match=f"audit entry {number} does not follow from the one before"):
        audit.verify(audit.read(database))


def test_what_is_cut_off_at_the_end_is_found_by_a_head_noted_before(database):
    enter(database, *(Entry(ALICE, "revoke", f"d-{n}") for n in range(6)))
    noted = audit.verify(audit.read(database))
    enter(database, Entry(ALICE, "stop", "run r"))
    assert audit.verify(audit.read(database), noted.hash).seq == 7
    tamper(database, "DELETE FROM audit WHERE seq > 5")
    assert audit.verify(audit.read(database)).seq == 5
    with pytest.raises(StorageError, match=f"no audit entry has the hash {noted.hash[:16]}"):
        audit.verify(audit.read(database), noted.hash)


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'bob'", "DELETE FROM audit"])
def test_the_trail_can_only_be_added_to(database, statement):
    enter(database, Entry(ALICE, "token", "device d"))
    with pytest.raises(StorageError, match="the audit trail can only be added to"):
        database.run(lambda c: c.execute(statement))
    assert entries(database) == [Entry(ALICE, "token", "device d")]


def test_an_event_and_its_entry_are_one_transaction(database):
    log = EventLog(database)

    def broken(c: sqlite3.Connection) -> None:
        audit.append(c, Entry(ALICE, "pause", "run r"))
        raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(StorageError, match="disk I/O error"):
        asyncio.run(log.append(e.RunPaused("r", "why"), also=broken))
    assert entries(database) == [] and list(log.replay("r")) == []
    asyncio.run(log.append(e.RunPaused("r", "why"), also=lambda c: audit.append(c, Entry(ALICE, "pause", "run r"))))
    assert len(entries(database)) == 1 and len(list(log.replay("r"))) == 1


def test_two_processes_add_to_one_chain(database):
    """`fp-server operator` writes beside a running server."""
    other = Database(database.path)
    try:
        for number in range(10):
            enter(database if number % 2 else other, Entry(ALICE, "issue", str(number)))
    finally:
        other.close()
    assert audit.verify(audit.read(database)).seq == 10


def test_where_a_call_came_from():
    assert audit.address("ipv4:10.0.0.5:4242") == "10.0.0.5:4242"
    assert audit.address("ipv6:%5B::1%5D:4242") == "[::1]:4242"
    assert audit.address("unix:") == "unix:"
    assert Actor.of(Peer("operator", "alice", "ab12"), "10.0.0.5:4242") == ALICE


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused(name="alice", host="10.0.0.5", why="revoked", port=1):
    return Entry(Actor(name, "device", "ab", f"{host}:{port}"), "call", "Open", f"refused: {why}")


def test_like_refusals_are_one_entry_an_hour_with_their_number(database):
    clock = Clock()
    refusals = Refusals(database, clock)
    for port in range(500):
        refusals.note(refused(port=port))
    refusals.note(refused(why="expired"))
    asyncio.run(refusals.flush())
    assert entries(database) == [refused(port=0), refused(why="expired")]
    clock.now += refusals.WINDOW
    asyncio.run(refusals.flush())
    assert entries(database)[2:] == [replace(refused(port=0), outcome="refused: revoked (499 more times within an hour)")]
    refusals.note(refused(port=7))
    asyncio.run(refusals.flush())
    assert entries(database)[3:] == [refused(port=7)]


def test_a_flood_of_different_refusals_can_not_fill_the_disk(database):
    """A million attempts from as many addresses in a day: some hundreds of entries, the rest counted."""
    clock, many = Clock(), 1_000_000
    refusals = Refusals(database, clock)

    async def flood():
        for number in range(many):
            refusals.note(refused("", f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", "no identity"))
            clock.now += 86_400 / many
            if number % 20_000 == 0:
                await refusals.flush()

    asyncio.run(flood())
    asyncio.run(refusals.flush())
    found = entries(database)
    assert 100 < len(found) < refusals.BURST + 2 + 1440
    assert len(refusals._seen) <= refusals.KNOWN and len(refusals._pending) <= 1
    counted = [int(entry.object.split()[0]) for entry in found if "other attempts" in entry.object]
    single = [entry for entry in found if "other attempts" not in entry.object]
    assert counted and sum(counted) + len(single) + refusals._dropped == many


def test_what_can_not_be_written_now_is_written_later(database, monkeypatch):
    refusals = Refusals(database, Clock())
    refusals.note(refused())

    async def full(work):
        raise StorageError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(database, "transact", full)
        with pytest.raises(StorageError):
            asyncio.run(refusals.flush())
    asyncio.run(refusals.flush())
    assert entries(database) == [refused()]


def test_long_words_are_cut(database):
    enter(database, Entry(ALICE, "call", "x" * 5000, "refused: " + "y" * 5000))
    assert [len(text) for entry in entries(database) for text in (entry.object, entry.outcome)] == [audit.TEXT] * 2
    assert audit.verify(audit.read(database)).seq == 1
