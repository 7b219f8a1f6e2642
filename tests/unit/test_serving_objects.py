"""What fetches and pushes cost the server, and whose time it is while they wait: the service itself, with calls made by hand."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import threading
import time

import grpc.aio
import pytest
from test_coordinator import both_assigned, both_drawn, database  # noqa: F401
from test_pace_of_devices import training
from test_rounds import MANIFEST, toml

from common.bucket import Buckets
from common.errors import LimitError, StorageError
from common.pb import objects_pb2
from common.transport import serde
from common.types import ObjectRef, UpdateMetrics, UpdateReady
from fp_server import commands as c
from fp_server import events as e
from fp_server import keeping, transfer
from fp_server.config import ServerConfig
from fp_server.coordinator import Coordinator
from fp_server.limits import FETCHES, ServerLimits
from fp_server.log import EventLog
from fp_server.objects import Arrival, ObjectStore
from fp_server.operations import start_run
from fp_server.transfer import Objects
from tests.contract.calls import Call, Open

DATA = bytes(range(200))
REF = ObjectRef(hashlib.sha256(DATA).hexdigest(), len(DATA))


def with_objects(tmp_path, database, body, limits=None, **run):  # noqa: F811
    """A coordinator whose first round begins with an adapter object; its objects' service, and the round's key."""

    async def main():
        config = ServerConfig(names=["x"], limits=ServerLimits(disk_reserve_bytes=0, **(limits or {})))
        coordinator = Coordinator(config, EventLog(database), ObjectStore(tmp_path))
        await coordinator.start()
        try:
            await start_run(coordinator, toml(**run), MANIFEST)
            (coordinator.store.scratch / "adapter").write_bytes(DATA)
            coordinator.active.broadcast[0] = coordinator.store.adopt(coordinator.store.scratch / "adapter")
            await body(Objects(coordinator, Open()), coordinator, await both_drawn(coordinator))
        finally:
            await coordinator.stop()

    asyncio.run(main())


async def ask(method, *given) -> str:
    """Call; the call's error, if any."""
    with contextlib.suppress(grpc.aio.AbortError):
        await method(*given)
    return given[-1].error


async def fetched(objects, offset) -> tuple[bytes, str]:
    call = Call()
    error = await ask(objects.Fetch, objects_pb2.FetchRequest(digest=REF.digest, offset=offset), call)
    return b"".join(message.data for message in call.sent), error


def counted(monkeypatch, owner, name) -> list:
    """Calls of a method, as they come."""
    calls, whole = [], getattr(owner, name)

    def counting(*given):
        calls.append(given)
        return whole(*given)

    monkeypatch.setattr(owner, name, counting)
    return calls


# -- what is read ---------------------------------------------------------------------------------


def test_a_fetch_of_nothing_reads_nothing(tmp_path, database, monkeypatch):  # noqa: F811
    async def body(objects, coordinator, key):
        read = counted(monkeypatch, coordinator.store, "checked")
        for _ in range(3):
            assert await fetched(objects, len(DATA)) == (b"", "")
            assert "there is no byte 201" in (await fetched(objects, len(DATA) + 1))[1]
        assert read == []

    with_objects(tmp_path, database, body)


def test_an_object_is_read_once_in_a_while_and_again_when_it_was_touched(tmp_path, database, monkeypatch):  # noqa: F811
    async def body(objects, coordinator, key):
        read, path = counted(monkeypatch, coordinator.store, "checked"), coordinator.store.path(REF.digest)
        for _ in range(3):
            assert await fetched(objects, len(DATA) - 1) == (DATA[-1:], "")
        assert len(read) == 1
        await coordinator.keeper.readable(REF.digest)  # for whom no device checks it
        assert len(read) == 2
        before = path.stat()
        await asyncio.sleep(0.02)
        path.chmod(0o644)
        path.write_bytes(DATA)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert await fetched(objects, 0) == (DATA, "") and len(read) == 3
        monkeypatch.setattr(keeping, "RECENT", 0.0)
        assert await fetched(objects, 0) == (DATA, "") and len(read) == 4

    with_objects(tmp_path, database, body)


def test_an_object_that_is_damaged_after_it_was_sent_is_not_sent_again(tmp_path, database, monkeypatch):  # noqa: F811
    async def body(objects, coordinator, key):
        path = coordinator.store.path(REF.digest)
        assert await fetched(objects, 0) == (DATA, "")
        monkeypatch.setattr(
            keeping.damage, "for_devices", lambda machine, store, digest: store.path(digest)
        )  # there is no ledger
        await asyncio.sleep(0.02)
        path.chmod(0o644)
        path.write_bytes(DATA[:-1] + b"x")
        sent, error = await fetched(objects, 0)
        assert sent == b"" and "NotFound" in error and (tmp_path / "quarantine" / REF.digest).exists()

    with_objects(tmp_path, database, body)


def header(key, offset=0, size=REF.size):
    ready = UpdateReady(key, ObjectRef(REF.digest, size), UpdateMetrics())
    return objects_pb2.PushMessage(header=serde.ready_to_pb(ready, offset))


async def pushed(objects, *says, device="a") -> str:
    call = Call(device, says)
    return await ask(objects.Push, None, call)


def test_a_push_from_the_wrong_byte_is_refused_before_anything_is_read(tmp_path, database, monkeypatch):  # noqa: F811
    async def body(objects, coordinator, key):
        await both_assigned(coordinator, key)
        chunk = objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=DATA[:150]))
        assert "ended at byte 150 of 200" in await pushed(objects, header(key), chunk, grpc.aio.EOF)
        opened = counted(monkeypatch, Arrival, "open")
        for offset in (0, 149, 151):
            error = await pushed(objects, header(key, offset), grpc.aio.EOF)
            assert f"OffsetError: the push begins at byte {offset}, expected 150; ask Offset first" in error
        assert opened == []
        assert "ended at byte 150 of 200" in await pushed(objects, header(key, 150), grpc.aio.EOF)
        assert len(opened) == 1

    with_objects(tmp_path, database, body)


def test_a_push_whose_file_went_with_its_round_is_late_and_no_trouble_of_the_disk(tmp_path, database, monkeypatch):  # noqa: F811
    async def body(objects, coordinator, key):
        await both_assigned(coordinator, key)
        noted, gone = counted(monkeypatch, coordinator, "note"), StorageError("partial/a: No such file or directory")
        assert "StorageError" in await pushed(objects, header(key), gone)
        assert [what for what, *_ in noted] == ["objects"]

        class Closing(Call):
            async def read(self):
                if len(self._says) == 1:
                    await coordinator.insist(e.DeviceDropped(key.run, key, "a", "TooLate", "over"))
                return await super().read()

        error = await ask(objects.Push, None, Closing("a", [header(key), gone]))
        assert error.startswith("NotFound: round 1 of 'r' expects no update from 'a'")
        assert [what for what, *_ in noted if what == "objects"] == ["objects"]

    with_objects(tmp_path, database, body)


# -- whose time it is -----------------------------------------------------------------------------


def pardons(monkeypatch, coordinator) -> list[str]:
    """The devices whose time it was not, as they come."""
    devices, whole = [], coordinator.post

    async def post(happening, also=None):
        if isinstance(happening, c.NotReceived):
            devices.append(happening.device)
        await whole(happening, also)

    monkeypatch.setattr(coordinator, "post", post)
    return devices


async def asked(objects, device, key) -> None:
    request = objects_pb2.OffsetRequest(key=serde.key_to_pb(key), ref=serde.ref_to_pb(REF))
    assert await ask(objects.Offset, request, Call(device)) == ""


def test_waiting_for_room_that_others_take_is_not_the_devices_time(tmp_path, database, monkeypatch):  # noqa: F811
    async def body(objects, coordinator, key):
        await both_assigned(coordinator, key)
        seen, other = pardons(monkeypatch, coordinator), coordinator.store.partial / "other"
        other.mkdir()
        (other / "part").write_bytes(b"x" * 400)
        for _ in range(5):
            assert "LimitError: updates on their way in" in await pushed(objects, header(key))
        assert seen == ["a"], "once a second is enough"
        seen.clear()
        error = await pushed(objects, header(key, size=501), device="b")  # the others are not in its way
        assert "LimitError" in error and seen == []
        (other / "part").unlink()
        assert "ended at byte 0" in await pushed(objects, header(key), grpc.aio.EOF) and seen == []

    with_objects(tmp_path, database, body, {"arrival_bytes": 500})


def test_a_limit_the_device_itself_exceeds_is_no_excuse(tmp_path, database, monkeypatch):  # noqa: F811
    async def body(objects, coordinator, key):
        await both_assigned(coordinator, key)
        seen = pardons(monkeypatch, coordinator)
        error = await pushed(objects, header(key), LimitError("a message of 2000000 bytes"))  # what the gate's decoder raises
        assert "a message of 2000000 bytes" in error and seen == []

    with_objects(tmp_path, database, body)


def test_waiting_for_a_turn_is_not_the_devices_time(tmp_path, database, monkeypatch):  # noqa: F811
    """A device asks for its offset before each push; the gate lets in one at a time here, and that is b's."""

    async def body(objects, coordinator, key):
        await both_assigned(coordinator, key)
        seen = pardons(monkeypatch, coordinator)
        await asked(objects, "a", key)
        assert seen == []
        call = Call("b", [header(key)])
        pushing = asyncio.create_task(ask(objects.Push, None, call))
        await call.reading.wait()
        await asked(objects, "b", key)
        assert seen == [], "its own push is not in its way"
        for _ in range(5):
            await asked(objects, "a", key)
        assert seen == ["a"], "once a second is enough"
        pushing.cancel()
        await asyncio.wait({pushing})
        monkeypatch.setattr(objects._waits, "allow", lambda key, now: True)
        await asked(objects, "a", key)
        assert seen == ["a"], "there is a turn to be had now"

    with_objects(tmp_path, database, body, {"pushes": 1})


def test_no_waiting_lasts_longer_than_the_round_may():
    shell = training(round_limit_seconds=3600.0)
    while shell.machine.current is not None and shell.machine.current.closed is None and shell.now < 9000:
        shell.now += 100
        shell.do(c.NotReceived("a", shell.key), c.Tick())
    assert shell.now == 3700


# -- who does not stop -----------------------------------------------------------------------------


def test_who_fetches_the_adapter_again_and_again_is_refused_until_the_next_round(tmp_path, database, monkeypatch):  # noqa: F811
    async def body(objects, coordinator, key):
        async def fetch(device="a"):
            call = Call(device)
            error = await ask(objects.Fetch, objects_pb2.FetchRequest(digest=REF.digest, offset=0), call)
            return error, sum(len(message.data) for message in call.sent)

        monkeypatch.setattr(coordinator.active, "may_fetch", lambda device: {REF.digest})
        for _ in range(FETCHES):
            assert await fetch() == ("", len(DATA))
        error, came = await fetch()
        assert "LimitError: device 'a' has fetched" in error and came == 0
        assert await fetch("b") == ("", len(DATA)), "the others are not in its way"
        current = coordinator.active.current
        later = dataclasses.replace(current.opened, key=dataclasses.replace(key, attempt=key.attempt + 1))
        monkeypatch.setattr(current, "opened", later)
        assert await fetch() == ("", len(DATA))

    with_objects(tmp_path, database, body)


def test_who_cuts_one_fetch_after_the_other_has_the_object_read_once(tmp_path, database, monkeypatch):  # noqa: F811
    async def body(objects, coordinator, key):
        read, go, checked = [], threading.Event(), coordinator.store.checked

        def slowly(digest):
            read.append(digest)
            assert go.wait(10)
            return checked(digest)

        monkeypatch.setattr(coordinator.store, "checked", slowly)
        for _ in range(5):
            asking = asyncio.create_task(fetched(objects, 0))
            await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.wait({asking})
        asking = asyncio.create_task(fetched(objects, 0))
        await asyncio.sleep(0.05)
        go.set()
        assert await asking == (DATA, "") and read == [REF.digest]

    with_objects(tmp_path, database, body)


def test_a_push_that_is_cut_while_it_is_checked_counts_once_and_the_next_waits_for_it(tmp_path, database, monkeypatch):  # noqa: F811
    """A thread can't be stopped: another check beside it would take the server's memory, and meet a file on its way."""

    async def body(objects, coordinator, key):
        await both_assigned(coordinator, key)
        checks, go = [], threading.Event()

        def slowly(path, *rest):
            checks.append(path)
            assert go.wait(10)

        monkeypatch.setattr(transfer, "check_update", slowly)
        monkeypatch.setattr(transfer, "TELL_SECONDS", 0.02)
        monkeypatch.setattr(objects._waits, "allow", lambda device, now: True)
        seen = pardons(monkeypatch, coordinator)
        chunk = objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=DATA))
        cut = [asyncio.create_task(pushed(objects, header(key), chunk, grpc.aio.EOF))]
        while not checks:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for _ in range(4):
            cut[-1].cancel()
            cut.append(asyncio.create_task(pushed(objects, header(key, len(DATA)), grpc.aio.EOF)))
            await asyncio.sleep(0.05)
        assert len(checks) == 1 and seen.count("a") > 3, "the server's time, not the device's"
        go.set()
        assert await cut[-1] == "" and coordinator.active.current.members["a"].accepted.ref == REF
        assert len(checks) == 1 and objects._unfinished._work == {}

    with_objects(tmp_path, database, body)


def test_pieces_of_a_byte_are_read_no_faster_than_so_many_a_second(tmp_path, database, monkeypatch):  # noqa: F811
    async def body(objects, coordinator, key):
        await both_assigned(coordinator, key)
        objects._small = Buckets(50.0, 10.0)
        monkeypatch.setattr(transfer, "SMALL_PIECE", 20)
        pieces = [objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=DATA[n : n + 1])) for n in range(50)]
        begin = time.monotonic()
        for n in range(0, 50, 10):  # a device's, however many pushes it sends them in
            await pushed(objects, header(key, n), *pieces[n : n + 10], grpc.aio.EOF)
        assert time.monotonic() - begin > 0.7, "40 of them at 50 a second"
        objects._small = Buckets(0.001, 1.0)
        larger = [objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=DATA[n : n + 30])) for n in range(50, 200, 30)]
        async with asyncio.timeout(30):
            assert "UpdateRejected" in await pushed(objects, header(key, 50), *larger, grpc.aio.EOF), "it has come whole"

    with_objects(tmp_path, database, body)


def test_asking_for_an_offset_touches_nothing(tmp_path, database):  # noqa: F811
    """Not what another digest has brought either: that may be under inspection."""

    async def body(objects, coordinator, key):
        await both_assigned(coordinator, key)
        folder = coordinator.store.partial / "a"
        folder.mkdir()
        (folder / ("1" * 64)).write_bytes(b"arrived")
        await asked(objects, "a", key)
        assert [path.read_bytes() for path in folder.iterdir()] == [b"arrived"]

    with_objects(tmp_path, database, body)


# -- who does not read ----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 1000.0])
def test_who_does_not_read_what_it_fetches_is_cut_whatever_the_rate(tmp_path, database, monkeypatch, rate):  # noqa: F811
    class Deaf(Call):
        async def write(self, message) -> None:
            await self.cut.wait()
            raise grpc.aio.AbortError

    async def body(objects, coordinator, key):
        call, loop = Deaf(), asyncio.get_running_loop()
        ports = []

        def hang_up(address, port=None) -> None:
            ports.append(port)
            loop.call_soon_threadsafe(call.cut.set)

        monkeypatch.setattr(transfer, "hang_up", hang_up)
        objects.port = 7443
        async with asyncio.timeout(5):
            await ask(objects.Fetch, objects_pb2.FetchRequest(digest=REF.digest, offset=0), call)
        assert call.cut.is_set() and ports == [7443], "a device may have one port of its own for both of the server's"

    with_objects(tmp_path, database, body, progress_timeout_seconds=0.5, min_bytes_per_second=rate)


def test_without_a_rate_any_progress_holds_a_fetchs_place(tmp_path, database, monkeypatch):  # noqa: F811
    """Each piece is read within the time-out, all of them together are not."""

    class Slow(Call):
        async def write(self, message) -> None:
            await asyncio.sleep(1.0)
            await super().write(message)

    async def body(objects, coordinator, key):
        monkeypatch.setattr(transfer, "CHUNK", 50)
        monkeypatch.setattr(transfer, "hang_up", lambda address, port=None: pytest.fail("it was cut"))
        monkeypatch.setattr(coordinator.active, "may_fetch", lambda device: {REF.digest})  # however long it takes
        call = Slow()
        assert await ask(objects.Fetch, objects_pb2.FetchRequest(digest=REF.digest, offset=0), call) == ""
        assert b"".join(message.data for message in call.sent) == DATA

    with_objects(tmp_path, database, body, progress_timeout_seconds=3.0, min_bytes_per_second=0.0)
