"""Session and object transfer against a real mTLS server that cuts, corrupts and refuses."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta

import pytest
from fake_ca import FakeCa
from fake_server import serving

from common.errors import (
    DigestError,
    IdentityError,
    OffsetError,
    ProtocolError,
    StorageError,
    TooLate,
    UnreachableError,
    UpdateRejected,
)
from common.files import digest_file
from common.pb import session_pb2
from common.transport import serde, wire
from common.types import ObjectRef, Progress, TaskKey, UpdateMetrics, UpdateReady
from fp_client.cache import ObjectCache
from fp_client.rpc import Connection, Session, _reason
from fp_client.rpc_objects import AGAIN, MAX_OBJECT, Sent, Transfer, _pieces
from fp_client.says import Cancel, RunEnded

QUICK = wire.Backoff(first=0.01, longest=0.02, attempts=4)
KEY = TaskKey("r", 0, 0)


def data_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def with_server(tmp_path, body, name="alice"):
    async def main():
        async with serving() as server:
            server.ca.join(tmp_path, name)
            connection = Connection(tmp_path, server.address, QUICK)
            try:
                await body(server, connection)
            finally:
                await connection.close()

    asyncio.run(main())


def test_session_says_its_schema_and_hears_what_the_server_says(tmp_path):
    async def body(server, connection):
        session = await connection.open()
        assert session.device == "alice" and server.sessions.schemas == [serde.schema()]
        key = serde.key_to_pb(KEY)
        await server.sessions.tell.put(session_pb2.ServerMessage(cancel=session_pb2.Cancel(key=key, reason="late")))
        await server.sessions.tell.put(session_pb2.ServerMessage(ended=session_pb2.RunEnded(run="r", outcome="finished")))
        await session.send(Progress(KEY, "train", 1, 5))
        assert (await server.sessions.next("progress")).done == 1
        await server.sessions.tell.put(None)
        assert [said async for said in session] == [Cancel(KEY, "late"), RunEnded("r", "finished")]
        await session.close()

    with_server(tmp_path, body)


def test_a_sender_that_is_cancelled_in_mid_write_does_not_take_the_session_with_it(tmp_path):
    """As when the server's answer to a failed task overtakes the end of the write that told it."""

    async def body(server, connection):
        session = await connection.open()
        for done in range(20):
            sending = asyncio.create_task(session.send(Progress(KEY, "train", done, 20)))
            for _ in range(done % 4):
                await asyncio.sleep(0)
            sending.cancel()
            await asyncio.wait([sending])
        await session.send(Progress(KEY, "train", 20, 20))
        while (await server.sessions.next("progress")).done != 20:
            pass
        await server.sessions.tell.put(session_pb2.ServerMessage(ended=session_pb2.RunEnded(run="r", outcome="finished")))
        await server.sessions.tell.put(None)
        assert [said async for said in session] == [RunEnded("r", "finished")]
        await session.close()

    with_server(tmp_path, body)


def test_a_stream_that_was_cancelled_is_an_unreachable_server_and_not_our_own_end(tmp_path):
    async def body(server, connection):
        session = await connection.open()
        asyncio.get_running_loop().call_later(0.1, session._call.cancel)
        with pytest.raises(UnreachableError, match="cancelled"):
            async for _ in session:
                pass
        with pytest.raises(UnreachableError):
            await session.send(Progress(KEY, "train", 1, 5))
        reading = asyncio.create_task(anext((await connection.open()).__aiter__()))
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await session.close()

    with_server(tmp_path, body)


def test_an_unexpected_message_is_a_protocol_error(tmp_path):
    async def body(server, connection):
        session = await connection.open()
        await server.sessions.tell.put(session_pb2.ServerMessage())
        with pytest.raises(ProtocolError, match="unexpected message"):
            async for _ in session:
                pass
        await session.close()

    with_server(tmp_path, body)


def test_another_schema_is_refused_with_the_servers_words(tmp_path):
    async def body(server, connection):
        server.sessions.refuse = ProtocolError("this device speaks schema A, the server B")
        with pytest.raises(ProtocolError, match="schema A, the server B"):
            await connection.open()

    with_server(tmp_path, body)


def test_a_revoked_certificate(tmp_path):
    async def body(server, connection):
        server.sessions.refuse = IdentityError("certificate of 'alice' was revoked")
        with pytest.raises(IdentityError, match="revoked"):
            await connection.open()

    with_server(tmp_path, body)


async def _refused(connection) -> IdentityError:
    """What repeated tries end with: a refusal is only believed the second time."""
    with pytest.raises(UnreachableError):
        await connection.open()
    with pytest.raises(IdentityError) as caught:
        await connection.open()
    return caught.value


def test_a_certificate_of_another_ca_is_told_from_a_server_that_is_down(tmp_path):
    async def main():
        async with serving() as server:
            FakeCa.make().join(tmp_path)
            (tmp_path / "ca.pem").write_bytes(server.ca.pem)
            connection = Connection(tmp_path, server.address, QUICK)
            assert "refuses this device's certificate" in str(await _refused(connection))
            await connection.close()

    asyncio.run(main())


def test_a_server_of_another_ca(tmp_path):
    async def main():
        async with serving() as server:
            FakeCa.make().join(tmp_path)
            connection = Connection(tmp_path, server.address, QUICK)
            for _ in range(3):  # it may be anyone who answers for a while: no reason for a daemon to end
                with pytest.raises(UnreachableError, match="can't be verified"):
                    await connection.open()
            await connection.close()

    asyncio.run(main())


def test_a_server_that_is_down_is_unreachable_however_often(tmp_path):
    async def main():
        FakeCa.make().join(tmp_path)
        connection = Connection(tmp_path, "localhost:1", QUICK)
        for _ in range(3):
            with pytest.raises(UnreachableError, match="localhost:1"):
                await connection.open()
        await connection.close()

    asyncio.run(main())


@pytest.mark.parametrize("missing", ["ca.pem", "device.pem", "device.key"])
def test_a_missing_file_is_named(tmp_path, missing):
    FakeCa.make().join(tmp_path)
    (tmp_path / missing).unlink()

    async def main():
        Connection(tmp_path, "localhost:1")

    with pytest.raises(IdentityError, match=missing):
        asyncio.run(main())


def test_an_expired_certificate_is_named_with_its_date(tmp_path):
    FakeCa.make().join(tmp_path, valid=(timedelta(days=-2), timedelta(days=-1)))

    async def main():
        Connection(tmp_path, "localhost:1")

    with pytest.raises(IdentityError, match=r"expired on .* join again"):
        asyncio.run(main())


@pytest.mark.parametrize("seed", range(3))
def test_fetch_goes_on_from_the_byte_that_arrived_last(tmp_path, seed):
    async def body(server, connection):
        data = data_of(5 * wire.CHUNK + 17, seed)
        ref = server.objects.put(data)
        cuts = sorted(random.Random(seed).sample(range(1, len(data)), 3))
        server.objects.cuts = list(cuts)
        target = tmp_path / "object"
        await Transfer(connection).fetch(ref, target)
        assert target.read_bytes() == data
        assert server.objects.offsets == [0, *cuts]

    with_server(tmp_path, body)


def test_fetch_gives_up_after_bounded_tries(tmp_path):
    async def body(server, connection):
        ref = server.objects.put(data_of(1000))
        server.objects.cuts = [0] * 100
        with pytest.raises(UnreachableError):
            await Transfer(connection).fetch(ref, tmp_path / "object")
        assert len(server.objects.offsets) == QUICK.attempts

    with_server(tmp_path, body)


def test_fetched_bytes_must_be_the_ones_announced(tmp_path):
    async def body(server, connection):
        data = data_of(3000)
        ref = server.objects.put(data)
        server.objects.objects[ref.digest] = data[:-1] + b"?"
        with pytest.raises(DigestError, match="have digest"):
            await Transfer(connection).fetch(ref, tmp_path / "object")
        server.objects.objects[ref.digest] = data + b"more"
        with pytest.raises(DigestError, match="more than the 3000 bytes"):
            await Transfer(connection).fetch(ref, tmp_path / "object")
        assert not (tmp_path / "object").exists() and not (tmp_path / "object.part").exists()

    with_server(tmp_path, body)


def test_a_damaged_partial_file_costs_one_more_fetch(tmp_path):
    async def body(server, connection):
        data = data_of(3000)
        ref = server.objects.put(data)
        (tmp_path / "object.part").write_bytes(b"x" * 100)
        await Transfer(connection).fetch(ref, tmp_path / "object")
        assert (tmp_path / "object").read_bytes() == data and server.objects.offsets == [100, 0]

    with_server(tmp_path, body)


def test_an_absurd_size_is_refused_before_anything_is_fetched(tmp_path):
    async def body(server, connection):
        with pytest.raises(ProtocolError, match="more than any adapter object"):
            await Transfer(connection).fetch(ObjectRef("0" * 64, MAX_OBJECT + 1), tmp_path / "object")
        assert server.objects.offsets == []

    with_server(tmp_path, body)


def update(tmp_path, size: int) -> tuple[UpdateReady, object]:
    path = tmp_path / "update"
    path.write_bytes(data_of(size))
    return UpdateReady(KEY, ObjectRef(digest_file(path), size), UpdateMetrics(2.0, 1.0)), path


def test_a_piece_under_way_when_its_stream_breaks_has_been_sent(tmp_path):
    """gRPC ends the generator where it stands: nothing after the `yield` runs."""

    async def main():
        ready, path = update(tmp_path, 2 * wire.CHUNK)
        told = []
        pieces = _pieces(ready, 5, path, lambda done, total: told.append(done), [])
        assert (await anext(pieces)).HasField("header") and told == []
        assert (await anext(pieces)).HasField("chunk")
        await pieces.aclose()
        return told

    assert asyncio.run(main()) == [5 + wire.CHUNK]


def test_what_is_sent_again_counts_also_when_a_stream_breaks_in_its_only_piece(tmp_path):
    async def body(server, connection):
        ready, path = update(tmp_path, 3000)
        server.objects.cuts, sent = [1, 2], Sent()
        assert await Transfer(connection).push(ready, path, sent=sent) is False
        assert sent.bytes == 3000 + 2999 + 2998

    with_server(tmp_path, body)


@pytest.mark.parametrize("seed", range(3))
def test_push_resends_nothing_that_arrived(tmp_path, seed):
    async def body(server, connection):
        ready, path = update(tmp_path, 6 * wire.CHUNK + 5)
        cuts = sorted(random.Random(seed).sample(range(1, ready.ref.size), 3))
        server.objects.cuts = list(cuts)
        told = []
        assert await Transfer(connection).push(ready, path, lambda done, total: told.append((done, total))) is False
        assert server.objects.accepted[ready.ref.digest] == path.read_bytes()
        assert server.objects.offsets == [0, *cuts]
        # A cut loses at most the chunk in which it happened; all else is received once.
        assert ready.ref.size <= server.objects.bytes_in < ready.ref.size + len(cuts) * wire.CHUNK
        assert told[-1] == (ready.ref.size, ready.ref.size)

    with_server(tmp_path, body)


def test_a_push_whose_reply_was_lost_is_not_sent_again(tmp_path):
    async def body(server, connection):
        ready, path = update(tmp_path, 3000)
        server.objects.lose_replies = 1
        assert await Transfer(connection).push(ready, path) is True
        assert server.objects.bytes_in == 3000 and server.objects.pushes == 1

    with_server(tmp_path, body)


def test_push_gives_up_after_bounded_tries(tmp_path):
    async def body(server, connection):
        ready, path = update(tmp_path, 3000)
        server.objects.cuts = [1] * 100
        with pytest.raises(UnreachableError):
            await Transfer(connection).push(ready, path)
        assert server.objects.pushes == QUICK.attempts

    with_server(tmp_path, body)


@pytest.mark.parametrize(("there", "said"), [(None, "No such file"), ("/", "Is a directory"), ("/proc/self/mem", "Input/output")])
def test_an_update_that_can_not_be_read_here_is_said_and_not_waited_for(tmp_path, there, said):
    async def body(server, connection):
        ready, path = update(tmp_path, 3000)
        path.unlink()
        if there:
            path.symlink_to(there)
        with pytest.raises(StorageError, match=f"{path}: the update can't be read: {said}.*; look at this device's disk"):
            await Transfer(connection).push(ready, path)
        assert server.objects.pushes <= 1 and not server.objects.accepted

    with_server(tmp_path, body)


def test_a_push_that_is_cancelled_ends_as_cancelled_also_when_its_update_can_not_be_read(tmp_path):
    async def body(server, connection):
        ready, path = update(tmp_path, 3000)

        def gone(done, total):
            task.cancel()
            raise OSError(errno.EIO, "the disk is gone")

        task = asyncio.create_task(Transfer(connection).push(ready, path, gone))
        with pytest.raises(asyncio.CancelledError):
            await task

    with_server(tmp_path, body)


def test_what_else_goes_wrong_while_a_push_is_read_is_raised_as_it_is(tmp_path):
    async def body(server, connection):
        def broken(done, total):
            raise ValueError("boom")

        with pytest.raises(ValueError, match="boom"):
            await Transfer(connection).push(*update(tmp_path, 3000), broken)

    with_server(tmp_path, body)


@pytest.mark.parametrize("kind", [OffsetError, DigestError, StorageError])
def test_a_push_asks_again_when_that_mends_it(tmp_path, kind):
    async def body(server, connection):
        ready, path = update(tmp_path, 2 * wire.CHUNK + 5)
        server.objects.push_errors = [kind("once")] * 3
        assert await Transfer(connection).push(ready, path) is False
        assert server.objects.pushes == 4 and server.objects.accepted[ready.ref.digest] == path.read_bytes()

    with_server(tmp_path, body)


@pytest.mark.parametrize(("kind", "pushes"), [(OffsetError, AGAIN + 1), (StorageError, QUICK.attempts), (UpdateRejected, 1)])
def test_a_push_asks_again_only_so_often(tmp_path, kind, pushes):
    async def body(server, connection):
        server.objects.push_errors = [kind("for ever")] * 100
        with pytest.raises(kind, match="for ever"):
            await Transfer(connection).push(*update(tmp_path, 10))
        assert server.objects.pushes == pushes

    with_server(tmp_path, body)


def test_a_refused_push_is_logged_at_growing_intervals(tmp_path, caplog):
    async def body(server, connection):
        connection.backoff = replace(QUICK, attempts=50)
        server.objects.push_errors = [StorageError("the disk\nis full")] * 19
        ready, path = update(tmp_path, 10)
        with caplog.at_level(logging.WARNING):
            await Transfer(connection).push(ready, path)
        what = f"run {ready.key.run}, round {ready.key.round + 1}, update: the server refuses for now: the disk is full"
        assert [message.partition(" in ")[0] for message in caplog.messages if "refuses for now" in message] == [
            f"{what}; try {number} of 50" for number in (2, 3, 5, 9, 17)
        ]

    with_server(tmp_path, body)


@pytest.mark.parametrize(
    ("details", "said"),
    [
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv6:%5B::1%5D:7443: "
            "Failed to connect to remote host: Connection refused",
            "connection refused",
        ),
        ("failed to connect to all addresses; last error: INTERNAL: ipv4:1.2.3.4:1: A: b: C", "a: b: C"),
        (
            "errors resolving no.example:7443: [field:hostname lookup error:address lookup failed for no.example:7443: "
            "Domain name not found]",
            "domain name not found",
        ),
        ("Socket closed [1]", "Socket closed [1]"),
    ],
)
def test_why_a_server_is_away_is_said_in_the_systems_words(details, said):
    assert _reason(details) == said


def test_a_fetch_waits_for_the_servers_disk_but_not_for_its_own(tmp_path):
    async def body(server, connection):
        data = data_of(3000)
        ref = server.objects.put(data)
        server.objects.fetch_errors = [StorageError("the server's disk is full")] * (QUICK.attempts - 1)
        await Transfer(connection).fetch(ref, tmp_path / "object")
        assert (tmp_path / "object").read_bytes() == data
        fetches = len(server.objects.offsets)
        assert fetches == QUICK.attempts
        with pytest.raises(StorageError, match="can't be written"):
            await Transfer(connection).fetch(ref, tmp_path / "missing" / "other")
        assert len(server.objects.offsets) == fetches
        server.objects.fetch_errors = [StorageError("for ever")] * 100
        with pytest.raises(StorageError, match="for ever"):
            await Transfer(connection).fetch(ref, tmp_path / "third")
        assert len(server.objects.offsets) == fetches + QUICK.attempts

    with_server(tmp_path, body)


def test_a_late_push_is_told_so(tmp_path):
    async def body(server, connection):
        ready, path = update(tmp_path, 3000)
        server.objects.error = TooLate("round 1 is closed")
        with pytest.raises(TooLate, match="round 1 is closed"):
            await Transfer(connection).push(ready, path)

    with_server(tmp_path, body)


def test_cache_fetches_once_refetches_what_is_damaged_and_stays_bounded(tmp_path):
    async def body(server, connection):
        fetch = Transfer(connection).fetch
        cache = ObjectCache(tmp_path / "cache", 2500)
        refs = [server.objects.put(data_of(1000, seed)) for seed in range(3)]
        path = await cache.get(refs[0], fetch)
        await cache.get(refs[0], fetch)
        assert len(server.objects.offsets) == 1
        path.write_bytes(b"?" * 1000)
        assert (await cache.get(refs[0], fetch)).read_bytes() == data_of(1000, 0)
        assert len(server.objects.offsets) == 2
        await cache.get(refs[1], fetch)
        await cache.get(refs[2], fetch)
        assert sum(p.stat().st_size for p in cache.directory.iterdir()) <= 2500
        assert cache.holds(refs[1]) and cache.holds(refs[2]) and not cache.holds(refs[0])

    with_server(tmp_path, body)


def test_a_message_that_was_begun_is_written_whole_whatever_becomes_of_its_sender():
    """gRPC ends a stream when a write to it is cancelled: a dropped task would take the session with it."""

    async def main():
        gate, written = asyncio.Event(), []

        class Call:
            async def write(self, message):
                await gate.wait()
                written.append(message.progress.done)

            async def done_writing(self):
                pass

        session = Session(Call(), AsyncExitStack(), "alice", "test", "h:1", None)
        first = asyncio.create_task(session.send(Progress(KEY, "train", 1, 3)))
        second = asyncio.create_task(session.send(Progress(KEY, "train", 2, 3)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled() and written == []
        gate.set()
        await second
        assert written == [1, 2]
        await session.close()

    asyncio.run(main())
