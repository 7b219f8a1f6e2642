"""200 MiB over mTLS under the default message limit, cut at a random offset, resumed without sending anything twice."""

from __future__ import annotations

import asyncio
import os
import random

import grpc
import grpc.aio
import numpy as np
import pytest
from server_side import Device, ready_for, run_toml

from common.blocks import key
from common.pb import objects_pb2, objects_pb2_grpc
from common.tensorfile import write_tensors
from common.transport import serde, wire
from common.types import ModelManifest, ModuleShape

MIB = 1 << 20
WIDE = ModelManifest("wide", "llama", 2, 25_600, 64, (ModuleShape("mlp.up_proj", 25_600, 25_600),), "cd" * 32)
TOML = run_toml(rounds=1, min_devices=1, final_evaluation=False, lora_rank=1024)
"""One layer at rank 1024: two factors of 100 MiB each."""


def test_200_mib_cut_at_a_random_offset_go_on_from_there(server):
    seed = int(os.environ.get("FEDPRUNER_SEED", random.randrange(1 << 32)))
    cut_after = random.Random(seed).randrange(20, 180)
    print(f"cut after {cut_after} MiB; again with FEDPRUNER_SEED={seed}")
    sent = [0, 0]
    stored = []

    async def pieces(ready, data, offset, messages, nth):
        yield objects_pb2.PushMessage(header=serde.ready_to_pb(ready, offset))
        for begin in range(offset, min(len(data), offset + messages * wire.CHUNK), wire.CHUNK):
            piece = data[begin : begin + wire.CHUNK]
            sent[nth] += len(piece)
            yield objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=piece))
        if nth == 0:
            await asyncio.sleep(3600)  # the line is cut while the server waits for more

    async def make(assignment, device):
        shapes = {"A": (1024, 25_600), "B": (25_600, 1024)}
        layer = assignment.units[0].layer
        path = server.directory / "update"
        write_tensors(path, {key(layer, "mlp.up_proj", f): np.full(shape, 1e-3, np.float32) for f, shape in shapes.items()})
        data = path.read_bytes()
        assert len(data) >= 200 * MIB
        ready = ready_for(assignment.key, data)
        async with server.channel("alice") as channel:
            stub = objects_pb2_grpc.ObjectsStub(channel)
            call = stub.Push(pieces(ready, data, 0, cut_after, 0))
            partial = server.directory / "partial" / "alice" / ready.ref.digest
            async with asyncio.timeout(120):
                while not partial.exists() or partial.stat().st_size < (cut_after - 10) * MIB:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        async with server.channel("alice") as channel:
            stub = objects_pb2_grpc.ObjectsStub(channel)
            request = objects_pb2.OffsetRequest(key=serde.key_to_pb(ready.key), ref=serde.ref_to_pb(ready.ref))
            while True:  # what was on its way may still come in while the server notices
                offset = (await stub.Offset(request, timeout=20)).offset
                try:
                    reply = await stub.Push(pieces(ready, data, offset, 1 << 20, 1), timeout=300)
                    break
                except grpc.aio.AioRpcError as error:
                    assert "ask Offset first" in error.details() or error.code() is grpc.StatusCode.INTERNAL, error
                    sent[1] = 0
            assert not reply.duplicate
            stored.extend([offset, len(data)])
            assert await device.push(channel, ready, data) is True
        return data

    alice = Device(server, "alice", units=1, manifest=WIDE, make=make)

    async def body():
        run = await server.begin(TOML, WIDE)
        living = asyncio.create_task(alice.live())
        async with asyncio.timeout(300):
            while not stored:
                if living.done():
                    living.result()
                await asyncio.sleep(0.01)
            await server.until(
                lambda s: s["current"] is None or s["current"]["devices"]["alice"]["stage"] == "done", 300, run=run
            )  # fmt: skip
        living.cancel()  # the aggregation of such a layer is another test's matter
        await asyncio.wait({living})

    asyncio.run(body())
    offset, size = stored
    assert offset >= (cut_after - 10) * MIB and sent[1] == size - offset, "nothing that had arrived was sent again"
    assert sent[0] <= cut_after * MIB
