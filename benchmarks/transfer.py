"""Server memory while it receives many large updates at once, with the product's default settings.

A real `fp-server` process; every device pushes its own 200 MiB update over mTLS at the same time, in processes of
their own. Printed: growth of the server's VmHWM, and the throughput. Exits 1 when it grows by 64 MiB or more.

    python benchmarks/transfer.py [devices] [MiB]
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "contract"))

from server_side import Device, Server, run_toml

from common.files import digest_file
from common.pb import objects_pb2, objects_pb2_grpc
from common.tensorfile import write_tensors
from common.transport import serde, tls, wire
from common.types import Assignment, ModelManifest, ModuleShape, ObjectRef, UpdateReady
from fp_server.validation import expected_shapes

LIMIT = 64 << 20
RANK = 64
MANIFEST = ModelManifest(
    "7b-shaped", "llama", 32, 4096, 32_000,
    tuple(
        ModuleShape(name, d_out, d_in)
        for name, d_out, d_in in (
            ("mlp.down_proj", 4096, 11_008), ("mlp.gate_proj", 11_008, 4096), ("mlp.up_proj", 11_008, 4096),
            ("self_attn.k_proj", 4096, 4096), ("self_attn.o_proj", 4096, 4096), ("self_attn.q_proj", 4096, 4096),
            ("self_attn.v_proj", 4096, 4096),
        )
    ),
    "cd" * 32,
)  # fmt: skip
"""LLaMA2-7B's shapes: a layer's update has 19 MiB at rank 64."""


def reference(path: Path) -> ObjectRef:
    """Digest and size of a file."""
    return ObjectRef(digest_file(path), path.stat().st_size)


def pusher(address: str, identity: Path, key_: Any, path: Path, go: Any, out: Any) -> None:
    """One device's process: push the file when told to."""

    async def push() -> None:
        ref = reference(path)

        async def pieces() -> AsyncIterator[objects_pb2.PushMessage]:
            yield objects_pb2.PushMessage(header=serde.ready_to_pb(UpdateReady(key_, ref), 0))
            with path.open("rb") as file:
                while piece := file.read(wire.CHUNK):
                    yield objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=piece))

        credentials = tls.client_credentials(identity)
        async with grpc.aio.secure_channel(address, credentials, wire.options(wire.CHANNEL_OPTIONS)) as channel:
            await channel.channel_ready()
            go.wait()
            begin = time.monotonic()
            await objects_pb2_grpc.ObjectsStub(channel).Push(pieces(), timeout=500)
            out.put((begin, time.monotonic()))

    asyncio.run(push())


def main() -> int:
    """Run it."""
    count, mib = (int(argument) for argument in (sys.argv[1:] + ["8", "200"][len(sys.argv) - 1 :]))
    layers = max(1, math.ceil(mib * 2**20 / sum(4 * RANK * (m.d_out + m.d_in) for m in MANIFEST.modules)))
    names = tuple(f"device-{n}" for n in range(count))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory) / "server", names)
        server.start()
        go, out = context.Event(), context.Queue()
        assigned: dict[str, Assignment] = {}

        async def wait(assignment: Assignment, device: Device) -> bytes:
            assigned[device.name] = assignment
            await asyncio.sleep(3600)
            return b""

        async def measure() -> int:
            toml = run_toml(rounds=1, min_devices=count, final_evaluation=False, lora_rank=RANK)
            await server.begin(toml, MANIFEST)
            living = [asyncio.create_task(Device(server, n, units=layers, manifest=MANIFEST, make=wait).live()) for n in names]
            while len(assigned) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            processes = []
            for name in names:
                path = Path(directory) / name
                shapes = expected_shapes(assigned[name], MANIFEST)
                write_tensors(path, {key_: np.full(shape, 1e-4, np.float32) for key_, shape in shapes.items()})
                size = path.stat().st_size
                processes.append(
                    context.Process(
                        target=pusher, args=(server.address, server.devices / name, assigned[name].key, path, go, out)
                    )
                )
                processes[-1].start()
            await asyncio.sleep(6 + count)
            before = server.peak()
            go.set()
            # Growth while receiving: measured until the last byte has arrived, before the checks of the last one end.
            store = server.directory / "partial"
            arrived = 0
            while arrived < count * size:
                arrived = sum(p.stat().st_size for p in store.glob("*/*")) + sum(
                    p.stat().st_size for p in (server.directory / "objects").glob("*/*") if p.stat().st_size == size
                )
                await asyncio.sleep(0.02)
            receiving = server.peak() - before
            done = [await asyncio.to_thread(out.get) for _ in names]
            checked = server.peak() - before
            for task in living:
                task.cancel()
            await asyncio.wait(living)
            for process in processes:
                process.join()
            seconds = max(end for _, end in done) - min(begin for begin, _ in done)
            print(f"{count} pushes of {size / 2**20:.0f} MiB at once: server VmHWM {before / 2**20:.1f} MiB before,")
            print(f"  +{receiving / 2**20:.1f} MiB while receiving, +{checked / 2**20:.1f} MiB with the updates' checks")
            print(f"  {count * size / 2**20 / seconds:.0f} MiB/s in all, {seconds:.1f} s until the last was durable and counted")
            return max(receiving, checked)

        try:
            grown = asyncio.run(measure())
        finally:
            server.kill()
    return 1 if grown >= LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
