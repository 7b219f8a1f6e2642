"""A peer that trickles holds neither a round nor a place at the server."""

from __future__ import annotations

import asyncio
import time

import grpc.aio
import pytest
from server_side import Device, Server, error_name, ready_for, run_toml
from siege import Besieged
from test_collecting import LARGE

from common.pb import objects_pb2, objects_pb2_grpc
from common.transport import serde
from common.transport.wire import CHUNK
from fp_client.rpc import Connection
from fp_client.rpc_objects import Transfer

TIMEOUT = 6.0
"""Seconds without progress: above those that a server which stood still itself pardons (STALL_SECONDS)."""


def toml(**values) -> str:
    return run_toml(
        "global", lora_rank=64, lora_broadcast_rank=256, progress_timeout_seconds=TIMEOUT, final_evaluation=False, **values
    )


def ended_or_paused(status) -> bool:
    assert status["state"] != "paused", status
    return status["state"] == "finished"


@pytest.mark.parametrize(("size", "pause"), [(4096, 0.1), (0, 0.0)])
def test_a_trickling_sender_is_out_of_the_round_and_its_push_ends(server: Server, size, pause):
    """Bob's push brings 40 KB a second where 1 MB is the least, or nothing at all after its header."""

    async def main():
        ended: asyncio.Future[grpc.aio.AioRpcError] = asyncio.get_running_loop().create_future()
        pushing: list[asyncio.Task[None]] = []
        alice, bob = (Device(server, name, manifest=LARGE, units=2, chunk=CHUNK) for name in ("alice", "bob"))

        async def trickle(assignment, device):
            data = device.honest(assignment)
            ready = ready_for(assignment.key, data)

            async def pieces():
                yield objects_pb2.PushMessage(header=serde.ready_to_pb(ready, 0))
                if not size:
                    await asyncio.sleep(60)
                for begin in range(0, len(data), size):
                    await asyncio.sleep(pause)
                    yield objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=data[begin : begin + size]))

            async def push() -> None:  # whatever the server says in the session
                async with server.channel("bob") as channel:
                    try:
                        await objects_pb2_grpc.ObjectsStub(channel).Push(pieces(), timeout=60)
                    except grpc.aio.AioRpcError as error:
                        ended.set_result(error)

            pushing.append(asyncio.create_task(push()))
            await asyncio.Event().wait()  # and that was all it had to say

        bob.make = trickle
        run = await server.begin(toml(rounds=1, min_bytes_per_second=1e6), LARGE)
        living = asyncio.gather(alice.live(), bob.live())
        try:
            async with asyncio.timeout(60):
                status = await server.until(ended_or_paused, run=run)
                error = await ended
        finally:
            living.cancel()
            await asyncio.wait({living, *pushing})
        return status, error

    status, error = asyncio.run(main())
    (only,) = status["history"]
    assert only["committed"] and only["weights"] == {"alice": 40}
    said = only["devices"]["bob"]["message"]
    assert ("run.min_bytes_per_second" in said and "push" in said) if size else "no progress" in said
    assert error_name(error) in ("NotFound", "TooLate"), error


@pytest.mark.parametrize("pause", [60.0, 1.4], ids=["stops", "trickles"])
def test_who_does_not_read_what_it_fetches_loses_its_place(server: Server, pause):
    """Bob takes a piece of an adapter object and waits, or takes one now and then; the round goes on, and he never has all."""

    async def main():
        alice, bob = (Device(server, name, manifest=LARGE, units=2, chunk=CHUNK) for name in ("alice", "bob"))
        fetching: list[asyncio.Task[tuple[int, int]]] = []

        async def take_a_piece(ref) -> tuple[int, int]:
            async with server.channel("bob") as channel:
                call = objects_pb2_grpc.ObjectsStub(channel).Fetch(objects_pb2.FetchRequest(digest=ref.digest, offset=0))
                came, ends = len((await call.read()).data), time.monotonic() + TIMEOUT + 2  # more than a piece may take
                with pytest.raises(grpc.aio.AioRpcError):
                    while True:
                        await asyncio.sleep(min(pause, max(0.0, ends - time.monotonic())))
                        came += len((await call.read()).data)
            return came, ref.size

        async def second_round(assignment, device):
            if assignment.key.round == 0:
                return device.honest(assignment)
            fetching.append(asyncio.create_task(take_a_piece(assignment.adapter[0].ref)))
            return await asyncio.Event().wait()

        bob.make = second_round
        run = await server.begin(toml(rounds=2, min_bytes_per_second=1e6), LARGE)
        living = asyncio.gather(alice.live(), bob.live())
        try:
            async with asyncio.timeout(60):
                status = await server.until(ended_or_paused, run=run)
                came, size = await fetching[0]
        finally:
            living.cancel()
            await asyncio.wait({living, *fetching})
        return status, came, size

    status, came, size = asyncio.run(main())
    assert status["history"][1]["weights"] == {"alice": 40} and status["history"][1]["committed"]
    assert 0 < came < size


def test_who_waits_for_a_turn_longer_than_the_time_out_stays_in_the_round(tmp_path):
    """One update arrives at a time here, and alice's takes 9 s; bob, who may be without progress for 6 s, is let in after it."""
    server = Besieged(tmp_path / "server", ("alice", "bob"), pushes=1)
    server.start()

    async def main():
        alice, bob = (Device(server, name, manifest=LARGE, units=2, chunk=CHUNK) for name in ("alice", "bob"))
        under_way, turned_away = asyncio.Event(), []

        async def slowly(assignment, device):
            data = device.honest(assignment)
            step = -(-len(data) // 12)

            async def pieces():
                yield objects_pb2.PushMessage(header=serde.ready_to_pb(ready_for(assignment.key, data), 0))
                for begin in range(0, len(data), step):
                    yield objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=data[begin : begin + step]))
                    under_way.set()
                    await asyncio.sleep(0.75)

            async with server.channel("alice") as channel:
                await objects_pb2_grpc.ObjectsStub(channel).Push(pieces(), timeout=60)
            return data

        async def patiently(assignment, device):
            data = device.honest(assignment)
            path = tmp_path / "update"
            path.write_bytes(data)
            await under_way.wait()
            connection, began = Connection(server.devices / "bob", server.address), time.monotonic()
            try:
                await Transfer(connection).push(ready_for(assignment.key, data), path)
            finally:
                await connection.close()
                turned_away.append(time.monotonic() - began)
            return data

        alice.make, bob.make = slowly, patiently
        run = await server.begin(
            run_toml(lora_rank=64, rounds=1, final_evaluation=False, progress_timeout_seconds=6.0), LARGE
        )  # fmt: skip
        async with asyncio.timeout(60):
            await asyncio.gather(alice.live(), bob.live())
        return await server.status(run), turned_away[0]

    try:
        status, waited = asyncio.run(main())
        (only,) = status["history"]
        assert only["weights"] == {"alice": 40, "bob": 40} and only["attempt"] == 1, only
        assert waited > 7
    finally:
        server.kill()
