"""A server whose disk is full while an update arrives."""

from __future__ import annotations

import asyncio
import resource

from server_side import MODULES, Device, Server, ready_for, run_toml

from common.types import ModelManifest, ModuleShape
from fp_client.rpc import Connection
from fp_client.rpc_objects import Transfer

LARGE = ModelManifest("toy", "llama", 6, 2048, 64, (ModuleShape(MODULES[0].name, 2048, 4096), MODULES[1]), "ab" * 32)
FULL = 2 << 20


def test_a_full_disk_is_shown_and_the_push_goes_on_when_there_is_room(server: Server, tmp_path):
    """No file of the server's process may grow beyond 2 MiB; the update has more."""
    process, seen = server.process.pid, []

    def room(limit):
        resource.prlimit(process, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    async def make(assignment, device):
        data = device.honest(assignment)
        assert len(data) > FULL
        await server.until(lambda s: s["current"]["devices"]["alice"]["stage"] == "done")
        ready, path = ready_for(assignment.key, data), tmp_path / "update"
        path.write_bytes(data)
        partial = server.directory / "partial" / "bob" / ready.ref.digest
        connection = Connection(server.devices / "bob", server.address)
        room(FULL)
        try:
            pushing = asyncio.create_task(Transfer(connection).push(ready, path))
            full = await server.until(lambda s: s["problem"])
            seen.append(full["problem"])
            assert full["state"] == "round" and partial.stat().st_size == FULL, "what arrived is kept"
            assert not pushing.done(), "the device waits for room"
            room(resource.RLIM_INFINITY)
            await pushing
        finally:
            room(resource.RLIM_INFINITY)
            await connection.close()
        await server.until(lambda s: not s["problem"])
        return data

    async def main():
        small, large = (Device(server, name, manifest=LARGE, chunk=1 << 20) for name in ("alice", "bob"))
        large.make = make
        async with asyncio.timeout(60):
            run = await server.begin(run_toml(lora_rank=64, rounds=1, final_evaluation=False), LARGE)
            await asyncio.gather(small.live(), large.live())
        return await server.status(run)

    status = asyncio.run(main())
    assert "the update of 'bob' can't be stored" in seen[0]
    (only,) = status["history"]
    assert status["state"] == "finished" and only["attempt"] == 1 and only["weights"] == {"alice": 40, "bob": 40}
