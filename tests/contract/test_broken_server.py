"""A device and a server that trickles, says too much at once, names files it must not, or has no room."""

from __future__ import annotations

import asyncio

import pytest
from fake_server import FakeObjects
from test_agent import Device, against, probe_task
from test_rpc import data_of, with_server

from common.errors import LimitError, ProtocolError, UnreachableError
from common.pb import objects_pb2, session_pb2
from common.transport import serde
from fp_client import rpc_objects
from fp_client.rpc_objects import Transfer


def test_a_fetch_that_trickles_is_cut_and_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(rpc_objects, "STALL_SECONDS", 0.3)

    async def body(server, connection):
        ref = server.objects.put(data_of(200_000))
        with pytest.raises(UnreachableError, match=r"sent \d+ bytes of object"):
            await Transfer(connection).fetch(ref, tmp_path / "object")
        assert len(server.objects.offsets) == 4, "tried as often as an unreachable server"

    with_slow_server(tmp_path, body)


def with_slow_server(tmp_path, body):
    """`with_server`, its Fetch a trickle: ten bytes twenty times a second."""
    whole = FakeObjects.Fetch

    async def slow(self, request, context):
        async for chunk in whole(self, request, context):
            for at in range(0, len(chunk.data), 10):
                yield objects_pb2.Chunk(data=chunk.data[at : at + 10])
                await asyncio.sleep(0.05)

    patch = pytest.MonkeyPatch()
    patch.setattr(FakeObjects, "Fetch", slow)
    try:
        with_server(tmp_path, body)
    finally:
        patch.undo()


def test_a_message_larger_than_any_is_refused_and_the_daemon_comes_back(tmp_path):
    async def body(server, connection):
        session = await connection.open()
        huge = session_pb2.ServerMessage(cancel=session_pb2.Cancel(reason="x" * (5 << 20)))
        await server.sessions.tell.put(huge)
        with pytest.raises(UnreachableError, match="larger than max"):
            async for _ in session:
                pass
        await session.close()

    with_server(tmp_path, body)


@pytest.mark.parametrize("run", ["../victim", "..", "/etc/x", "a/b", "x" * 300, ""])
def test_the_end_of_a_run_whose_name_is_a_path_deletes_nothing(tmp_path, run):
    victim = tmp_path / "victim.json"
    victim.write_text("not the daemon's")

    async def body(server, connection):
        session = await connection.open()
        await server.sessions.tell.put(session_pb2.ServerMessage(ended=session_pb2.RunEnded(run=run, outcome="finished")))
        with pytest.raises(ProtocolError, match="is not a name"):
            async for _ in session:
                pass
        await session.close()

    with_server(tmp_path, body)
    assert victim.read_text() == "not the daemon's"


def test_two_objects_of_one_layer_are_refused():
    message = serde.probe_task_to_pb(probe_task())
    for _ in range(2):
        message.adapter.add(layer=3).ref.digest = "ab" * 32
    with pytest.raises(ProtocolError, match="two objects of one layer"):
        serde.probe_task_from_pb(message)


def test_a_server_that_has_no_room_is_asked_again(tmp_path):
    """LimitError is not a refusal: the daemon waits and comes back."""

    async def body(server):
        server.sessions.refuse = LimitError("2000 devices have a session already")
        async with Device(server, tmp_path) as device:
            await device.until(lambda: len(server.sessions.schemas) >= 2)
            assert not device.running.done()
            server.sessions.refuse = None
            await device.until(lambda: server.sessions.opened == 1)

    against(tmp_path, body)
