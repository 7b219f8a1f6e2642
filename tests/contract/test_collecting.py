"""What a run needs no more is removed, and never from under somebody who is reading it."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest
from server_side import MODULES, Device, Server, error_name, run_toml

from common.pb import admin_pb2, objects_pb2, objects_pb2_grpc
from common.transport.wire import CHUNK
from common.types import ModelManifest, ModuleShape
from fp_server.verify import verify

LARGE = ModelManifest("toy", "llama", 2, 4096, 64, (ModuleShape(MODULES[0].name, 4096, 8192), MODULES[1]), "ab" * 32)
"""An adapter object of 6 MiB: many chunks, more than fit the line's buffers."""


def test_a_fetch_under_way_ends_as_too_late_when_its_round_is_over_and_the_object_removed(server: Server):
    """In round 2 alice begins to fetch an object, slowly; rounds 2 and 3 are committed; then she reads on."""
    held: list[str] = []

    async def main():
        alice, bob = (Device(server, name, manifest=LARGE, units=2, chunk=CHUNK) for name in ("alice", "bob"))
        half = asyncio.Event()

        async def begin() -> None:
            half.set()

        async def second() -> None:
            alice.hooks["assigned"] = begin

        alice.hooks["assigned"] = second
        toml = run_toml("global", rounds=3, lora_rank=64, lora_broadcast_rank=256, final_evaluation=False)
        run = await server.begin(toml, LARGE)
        stop = asyncio.Event()

        async def slow_reader() -> None:
            await half.wait()
            item = alice.assignments[-1].adapter[0] if alice.assignments[-1].adapter else None
            while item is None:  # the second assignment is being taken in
                await asyncio.sleep(0.01)
                item = alice.assignments[-1].adapter[0] if alice.assignments[-1].adapter else None
            async with server.channel("alice") as channel:
                stub = objects_pb2_grpc.ObjectsStub(channel)
                call = stub.Fetch(objects_pb2.FetchRequest(digest=item.ref.digest, offset=0))
                data = (await call.read()).data
                stop.set()
                path = server.directory / "objects" / item.ref.digest[:2] / item.ref.digest
                assert path.exists() and item.ref.size > 4 * CHUNK
                while path.exists():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    while chunk := await call.read():
                        data += chunk.data
                assert error_name(ended.value) == "TooLate" and len(data) < item.ref.size
                held.append(item.ref.digest)

        async def wait_for_the_reader(assignment, device):
            if assignment.key.round == 1:
                await stop.wait()
            return device.honest(assignment)

        alice.make = bob.make = wait_for_the_reader
        async with asyncio.timeout(90):
            reading = asyncio.create_task(slow_reader())
            await asyncio.gather(alice.live(), bob.live())
            await reading
        async with server.admin() as admin:  # and the ledger is whole
            async for _ in admin.ReadLedger(admin_pb2.LedgerRequest(run=run)):
                pass
        return await server.status(run)

    status = asyncio.run(main())
    assert status["state"] == "finished" and len(held) == 1
    found = verify(server.directory)
    assert not found.damaged and found.orphans == {} and found.leftovers == {}, "and nothing is left"
