"""Every bad push gets its own error, and the server and the run go on."""

from __future__ import annotations

import asyncio
import json
import struct
from dataclasses import replace
from functools import partial

import grpc
import grpc.aio
import numpy as np
import pytest
from server_side import Device, blocks_of, digest_of, error_name, ready_for, run_toml, whole_run
from siege import unhidden

from common.blocks import key, write_blocks
from common.pb import objects_pb2, objects_pb2_grpc
from common.tensorfile import write_tensors
from common.transport import serde
from common.types import LoraBlock, TaskKey
from fp_client import rpc_objects
from fp_client.rpc import Connection
from fp_client.rpc_objects import Transfer


def bytes_of(device, blocks):
    path = device.server.devices / device.name / "made.safetensors"
    write_blocks(path, blocks)
    return path.read_bytes()


def changed(change):
    """An update whose first block is replaced by `change(block)`."""

    def make(assignment, device):
        first, *rest = blocks_of(assignment, device.name)
        return bytes_of(device, [change(first), *rest])

    return make


def poisoned(value):
    def change(block):
        b = block.b.copy()
        b[1, 0] = value
        return replace(block, b=b)

    return change


def unassigned(assignment, device):
    missing = next(n for n in range(6) if n not in {u.layer for u in assignment.units})
    extra = LoraBlock(missing, "self_attn.q_proj", np.zeros((2, 16), np.float32), np.zeros((16, 2), np.float32))
    return bytes_of(device, [*blocks_of(assignment, device.name), extra])


def wrong_dtype(assignment, device):
    data = device.honest(assignment)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    first = key(assignment.units[0].layer, "mlp.down_proj", "A")
    header[first]["dtype"] = "I32"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (length - len(text))
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def missing_tensor(assignment, device):
    first, *rest = blocks_of(assignment, device.name)
    path = device.server.devices / device.name / "made.safetensors"
    tensors = {key(first.layer, first.module, "A"): first.a}
    for block in rest:
        tensors[key(block.layer, block.module, "A")], tensors[key(block.layer, block.module, "B")] = block.a, block.b
    write_tensors(path, tensors)
    return path.read_bytes()


REJECTED = {
    "unassigned": (unassigned, "was not assigned"),
    "shape": (changed(lambda b: replace(b, a=b.a[:1], b=b.b[:, :1])), "has shape (1, 24), expected (2, 24)"),
    "dtype": (wrong_dtype, "is I32, expected F32"),
    "nan": (changed(poisoned(np.nan)), "holds nan at [1, 0]"),
    "inf": (changed(poisoned(-np.inf)), "holds -inf at [1, 0]"),
    "missing": (missing_tensor, "is missing"),
    "norm": (changed(lambda b: replace(b, b=b.b * 1e4)), "norm is"),
    "truncated file": (lambda a, d: d.honest(a)[:-8], "truncated or corrupt"),
    "huge header": (lambda a, d: struct.pack("<Q", 1 << 60) + b"x" * 100, "truncated or corrupt"),
    "empty": (lambda a, d: b"", "shorter than a header"),
}


def test_each_bad_update_is_refused_by_the_name_of_its_tensor_and_the_run_goes_on(server):
    """One run, a round a case: bob pushes rubbish in each and an honest update at the end."""
    cases = list(REJECTED.items())
    heard = {}

    def make(assignment, device):
        if assignment.key.round == len(cases):
            return device.honest(assignment)
        return cases[assignment.key.round][1][0](assignment, device)

    async def main():
        alice, bob = Device(server, "alice"), Device(server, "bob", make=make)
        status = await whole_run(server, [alice, bob], run_toml(rounds=len(cases) + 1, limits_max_update_norm=100.0), 90)
        heard["errors"] = bob.errors
        return status

    status = asyncio.run(main())
    assert status["state"] == "finished" and status["rounds_done"] == len(cases) + 1
    assert len(heard["errors"]) == len(cases)
    for (name, (_, message)), error, entry in zip(cases, heard["errors"], status["history"], strict=False):
        assert error.startswith("INVALID_ARGUMENT") and message in error, (name, error)
        bob = entry["devices"]["bob"]
        assert bob["stage"] == "dropped" and bob["error"] == "UpdateRejected" and message in bob["message"], name
        assert entry["weights"] == {"alice": 40}, "the others' updates count"
        if name not in ("truncated file", "huge header", "empty"):
            assert "tensor 'layers." in error, error
    assert status["history"][len(cases)]["weights"] == {"alice": 40, "bob": 40}
    assert not list((server.directory / "partial" / "bob").iterdir()), "rejected bytes are not kept"


async def push(channel, header, chunks):
    async def pieces():
        yield objects_pb2.PushMessage(header=header)
        for chunk in chunks:
            yield objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=chunk))

    return await objects_pb2_grpc.ObjectsStub(channel).Push(pieces(), timeout=20)


async def refusal(call) -> tuple[str, grpc.StatusCode, str]:
    """(error class, status, message)."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await unhidden(call)
    return error_name(caught.value), caught.value.code(), caught.value.details()


def test_transfers_that_are_not_what_they_announce(server):
    """Before its honest update, bob breaks the transfer itself in every way; none costs him the round."""
    done = []

    async def make(assignment, device):
        if assignment.key.round:
            return device.honest(assignment)
        data = device.honest(assignment)
        ready = ready_for(assignment.key, data)
        stub_key = serde.key_to_pb(assignment.key)
        async with server.channel("bob") as channel:
            stub = objects_pb2_grpc.ObjectsStub(channel)
            # the digest of other bytes
            name, code, said = await refusal(
                lambda: push(channel, serde.ready_to_pb(ready_for(assignment.key, data, "0" * 64), 0), [data])
            )
            assert (name, code) == ("DigestError", grpc.StatusCode.DATA_LOSS) and "000000" in said
            # cut short: what came is kept
            name, _, said = await refusal(lambda: push(channel, serde.ready_to_pb(ready, 0), [data[:700]]))
            assert name == "DigestError" and f"ended at byte 700 of {len(data)}" in said
            offset = await stub.Offset(objects_pb2.OffsetRequest(key=stub_key, ref=serde.ref_to_pb(ready.ref)), timeout=20)
            assert (offset.offset, offset.accepted) == (700, False)
            # from a place the server is not at
            name, code, said = await refusal(lambda: push(channel, serde.ready_to_pb(ready, 600), [data[600:]]))
            assert (name, code) == ("OffsetError", grpc.StatusCode.ABORTED) and "begins at byte 600, expected 700" in said
            # more than announced
            short = ready_for(assignment.key, data, size=len(data) - 100)
            name, _, said = await refusal(lambda: push(channel, serde.ready_to_pb(short, 700), [data[700:]]))
            assert name == "DigestError" and "holds more than" in said
            # no header, header twice, nothing
            name, _, said = await refusal(
                lambda: push_raw(channel, [objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=b"x"))])
            )
            assert name == "ProtocolError" and "begin with its header" in said
            name, _, said = await refusal(lambda: push_raw(channel, []))
            assert name == "ProtocolError"
            header = objects_pb2.PushMessage(header=serde.ready_to_pb(ready, 700))
            name, _, said = await refusal(lambda: push_raw(channel, [header, header]))
            assert name == "ProtocolError" and "chunks only" in said
            # names that are none
            bad = serde.ready_to_pb(ready, 0)
            bad.ref.digest = "../../etc/passwd"
            name, _, said = await refusal(lambda: push(channel, bad, [data]))
            assert name == "ProtocolError" and "ref.digest" in said
            bad = serde.ready_to_pb(ready, 0)
            bad.metrics.loss_last = float("nan")
            name, _, said = await refusal(lambda: push(channel, bad, [data]))
            assert name == "ProtocolError" and "metrics.loss_last" in said
            # another run, another round
            other = ready_for(TaskKey("other-run", 0, 0), data)
            name, code, said = await refusal(lambda: push(channel, serde.ready_to_pb(other, 0), [data]))
            assert (name, code) == ("NotFound", grpc.StatusCode.NOT_FOUND) and "other-run" in said
            other = ready_for(TaskKey("toy-run", 5, 0), data)
            name, _, said = await refusal(lambda: push(channel, serde.ready_to_pb(other, 0), [data]))
            assert name == "TooLate" and "round 6" in said
        done.append(True)
        return data

    async def main():
        return await whole_run(server, [Device(server, "alice"), Device(server, "bob", make=make)], run_toml())

    status = asyncio.run(main())
    assert done and status["state"] == "finished"
    assert status["history"][0]["weights"] == {"alice": 40, "bob": 40}


async def push_raw(channel, messages):
    async def pieces():
        for message in messages:
            yield message

    return await objects_pb2_grpc.ObjectsStub(channel).Push(pieces(), timeout=20)


def test_an_announcement_larger_than_the_assignment_needs_is_refused_before_a_byte(server):
    async def make(assignment, device):
        if assignment.key.round:
            return device.honest(assignment)
        data = device.honest(assignment)
        async with server.channel("bob") as channel:
            header = serde.ready_to_pb(ready_for(assignment.key, data, size=1 << 40), 0)
            name, _, said = await refusal(lambda: push(channel, header, []))
            assert name == "ProtocolError" and f"announces {1 << 40} bytes" in said
        return data

    async def main():
        return await whole_run(server, [Device(server, "alice"), Device(server, "bob", make=make)], run_toml())

    status = asyncio.run(main())
    assert status["state"] == "finished"
    assert "announces" in status["history"][0]["devices"]["bob"]["message"]


def test_twice_the_same_is_a_duplicate_and_twice_different_already_exists(server):
    checked = asyncio.Event()

    async def twice():
        key_, data = bob.last_update
        async with server.channel("bob") as channel:
            assert await bob.push(channel, ready_for(key_, data), data) is True
            reply = await push(channel, serde.ready_to_pb(ready_for(key_, data), 0), [])
            assert reply.duplicate
            name, code, said = await refusal(
                lambda: push(channel, serde.ready_to_pb(ready_for(key_, data + b"x"), 0), [data + b"x"])
            )
            assert (name, code) == ("AlreadyDone", grpc.StatusCode.ALREADY_EXISTS) and "'bob'" in said
        checked.set()

    async def slow(assignment, device):
        await checked.wait()
        return device.honest(assignment)

    alice, bob = Device(server, "alice", make=slow), Device(server, "bob", hooks={"accepted": twice})
    status = asyncio.run(whole_run(server, [alice, bob], run_toml()))
    assert checked.is_set() and status["state"] == "finished"
    assert status["history"][0]["weights"] == {"alice": 40, "bob": 40}


def test_a_push_after_the_round_closed_is_too_late(server):
    """Quorum 0.5: alice delivers, bob trains too long and pushes although his task was cancelled."""
    said = []

    async def for_ever(assignment, device):
        await asyncio.sleep(3600)
        return b""

    async def main():
        bob, alice = Device(server, "bob", make=for_ever), Device(server, "alice")

        async def late():
            data = b"x" * 100
            async with server.channel("bob") as channel:
                said.append(
                    await refusal(lambda: push(channel, serde.ready_to_pb(ready_for(TaskKey("toy-run", 0, 0), data), 0), [data]))
                )

        bob.hooks["cancelled"] = late
        return await whole_run(server, [alice, bob], run_toml(quorum=0.5, min_updates=1))

    status = asyncio.run(main())
    assert status["state"] == "finished" and status["history"][0]["closed"] == "quorum"
    ((name, code, text),) = said
    assert (name, code) == ("TooLate", grpc.StatusCode.FAILED_PRECONDITION) and "no longer counts" in text
    assert status["history"][0]["weights"] == {"alice": 40}


def test_a_resumed_push_outlives_what_its_half_open_predecessor_still_sends(server, tmp_path, monkeypatch):
    """Between Offset and Push the older stream appends: the device asks again, and nothing that arrived is sent twice."""
    offsets, first_bytes = [], []

    async def make(assignment, device):
        data = device.honest(assignment)
        if assignment.key.round:
            return data
        path = tmp_path / "update"
        path.write_bytes(data)
        ready = ready_for(assignment.key, data)
        arrived = server.directory / "partial" / "bob" / ready.ref.digest

        async def stored(size):
            async with asyncio.timeout(10):
                while not arrived.exists() or arrived.stat().st_size < size:  # noqa: ASYNC110  another process makes it
                    await asyncio.sleep(0.02)

        async with server.channel("bob") as channel:
            older = objects_pb2_grpc.ObjectsStub(channel).Push(timeout=20)
            await older.write(objects_pb2.PushMessage(header=serde.ready_to_pb(ready, 0)))
            await older.write(objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=data[:500])))
            await stored(500)
            connection = Connection(server.devices / "bob", server.address)
            transfer = Transfer(connection)
            real = objects_pb2_grpc.ObjectsStub

            async def offset(channel, request, timeout):
                reply = await real(channel).Offset(request, timeout=timeout)
                offsets.append(reply.offset)
                if len(offsets) == 1:
                    await older.write(objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=data[500:800])))
                    await stored(800)
                return reply

            def stub(channel):
                made = real(channel)
                made.Offset = partial(offset, channel)
                return made

            monkeypatch.setattr(rpc_objects.objects_pb2_grpc, "ObjectsStub", stub)
            try:
                duplicate = await transfer.push(ready, path, lambda done, total: first_bytes.append(done))
            finally:
                monkeypatch.undo()
                await connection.close()
            assert not duplicate
        return data

    async def main():
        return await whole_run(server, [Device(server, "alice"), Device(server, "bob", make=make)], run_toml())

    status = asyncio.run(main())
    assert offsets == [500, 800], "asked again once, and told what the older stream had brought"
    assert status["state"] == "finished" and status["history"][0]["weights"] == {"alice": 40, "bob": 40}


def test_a_second_push_of_the_same_device_takes_the_first_ones_place(server):
    """A half-open stream must not keep the device from pushing again, nor mix its bytes in."""
    heard = []

    async def make(assignment, device):
        data = device.honest(assignment)
        if assignment.key.round:
            return data
        ready = ready_for(assignment.key, data)
        async with server.channel("bob") as channel:
            call = objects_pb2_grpc.ObjectsStub(channel).Push(timeout=20)
            await call.write(objects_pb2.PushMessage(header=serde.ready_to_pb(ready, 0)))
            await call.write(objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=data[:500])))
            arrived = server.directory / "partial" / "bob" / ready.ref.digest
            async with asyncio.timeout(10):
                while not (arrived.exists() and arrived.stat().st_size == 500):  # noqa: ASYNC110  another process makes it
                    await asyncio.sleep(0.02)
            assert await device.push(channel, ready, data) is False
            async with asyncio.timeout(10):
                heard.append(await call.code())
        assert digest_of(data) == ready.ref.digest
        return data

    async def main():
        return await whole_run(server, [Device(server, "alice"), Device(server, "bob", make=make)], run_toml())

    status = asyncio.run(main())
    assert status["state"] == "finished" and status["history"][0]["weights"] == {"alice": 40, "bob": 40}
    assert heard and heard[0] is not grpc.StatusCode.OK
