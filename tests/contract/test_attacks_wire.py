"""Attacks through gRPC: calls, messages and names by someone with a certificate, or with none at the enrollment port."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
import pytest
from fake_ca import FakeCa
from server_side import MANIFEST, Device, blocks_of, error_name, fetch, hello, read, ready_for, run_toml, whole_run
from siege import Besieged, refused, unhidden

from common.checkpoint import dump_manifest
from common.pb import (
    admin_pb2,
    admin_pb2_grpc,
    enroll_pb2,
    enroll_pb2_grpc,
    objects_pb2,
    objects_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from common.tensorfile import write_tensors
from common.transport import serde, tls, wire
from common.types import TaskKey
from fp_server.health import read_endpoint

NAMES = {
    "path": "../../etc/passwd",
    "absolute": "/etc/passwd",
    "nul": "a\0b",
    "look-alike": "аlice",  # Cyrillic а
    "right to left": "a\u202eb",
    "long": "a" * 300,
    "empty": "",
    "dots": "..",
    "upper case": "ALICE",
    "line": "a\n2026-01-01 00:00:00,000 I device alice connected",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    names = tuple(f"eve-{n}" for n in range(len(NAMES)))
    # trudy's sessions are used up by one test; mallory's are for the others.
    one = Besieged(tmp_path_factory.mktemp("siege") / "server", ("alice", "bob", "mallory", "trudy", *names))
    one.start()
    asyncio.run(one.round())
    yield one
    assert one.stop() == 0
    assert "Traceback" not in one.log()


@contextlib.asynccontextmanager
async def session(server, name):
    """(channel, call) of a device that has been welcomed."""
    async with server.channel(name) as channel:
        call = session_pb2_grpc.SessionsStub(channel).Open()
        await call.write(hello())
        await read(call)
        yield channel, call
        call.cancel()


def under(server: Besieged, attack: Callable[[], Awaitable[None]]) -> None:
    async def body() -> None:
        async with server.besieged():
            await attack()

    asyncio.run(body())


# -- too large ------------------------------------------------------------------------------------


def test_messages_larger_than_their_method_takes(server):
    async def attack():
        async with session(server, "mallory") as (channel, _):
            objects = objects_pb2_grpc.ObjectsStub(channel)
            await refused(
                lambda: fetch(channel, "x" * 70_000), "LimitError", "a message of 70004 bytes; Fetch takes 65536 at most"
            )
            key = serde.key_to_pb(TaskKey("toy-run", 0, 0))

            async def push(size):
                call = objects.Push(timeout=20)
                header = objects_pb2.PushHeader(key=key, ref=serde.ref_to_pb(ready_for(TaskKey("r", 0, 0), b"x").ref))
                await call.write(objects_pb2.PushMessage(header=header))
                await call.write(objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=b"x" * size)))
                await call

            # The header is of no run: the chunk after it is not even looked at.
            await refused(lambda: push(1 << 20), "NotFound", "is not active here")

            async def large_header():
                header = objects_pb2.PushHeader(metrics=objects_pb2.UpdateMetrics(unit_fidelity=[1.0] * 150_000))
                call = objects.Push(timeout=20)
                await call.write(objects_pb2.PushMessage(header=header))
                await call

            await refused(large_header, "LimitError", "Push takes 1114112 at most")
            huge = session_pb2.DeviceMessage(plan=session_pb2.PlanReport(run="toy-run", refusal="x" * (3 << 20)))

            async def say():
                call = session_pb2_grpc.SessionsStub(channel).Open(timeout=20)
                await call.write(hello())
                await read(call)
                await call.write(huge)
                while True:
                    await read(call)

            await refused(say, "RESOURCE_EXHAUSTED", "larger than max")

    under(server, attack)


@pytest.mark.parametrize(
    "metadata",
    [[("x-large", "v" * 20_000)], [("x-large", "v" * 100_000)], [(f"x-{n}", "v" * 90) for n in range(300)]],
    ids=["20 kB", "100 kB", "many small ones"],
)
def test_headers_that_are_too_large_for_a_call(server, metadata):
    async def attack():
        async with server.channel("mallory") as channel:
            objects = objects_pb2_grpc.ObjectsStub(channel)

            def call(metadata):
                return lambda: objects.Offset(objects_pb2.OffsetRequest(), metadata=metadata, timeout=10)

            await refused(call(metadata), "RESOURCE_EXHAUSTED", "received metadata size exceeds hard limit")
            await refused(call([("x-large", "v" * 7000)]), "ProtocolError", "key.run")

    under(server, attack)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_message_that_unpacks_to_a_thousand_times_its_size(server, compression):
    """It is refused packed: nothing is compressed here."""

    async def attack():
        async with grpc.aio.secure_channel(server.address, server.credentials("mallory")) as channel:
            request = objects_pb2.OffsetRequest()
            request.key.run = "x" * (64 << 20)
            call = objects_pb2_grpc.ObjectsStub(channel).Offset
            before = server.held()[0]
            await refused(lambda: call(request, timeout=10, compression=compression), "UNIMPLEMENTED", "is disabled")
            assert server.held()[0] - before < 48 << 20, "an honest round goes on beside it"

    under(server, attack)


def test_a_reply_that_unpacks_to_a_thousand_times_its_size(tmp_path):
    """A hostile server's: our clients' options refuse it packed, too."""
    ca = FakeCa.make()
    ca.join(tmp_path)

    class Packed(objects_pb2_grpc.ObjectsServicer):
        async def Fetch(self, request, context):  # noqa: N802
            context.set_compression(grpc.Compression.Gzip)
            yield objects_pb2.Chunk(data=b"\0" * (1 << 20))

    async def body():
        certificate, key = ca.server()
        other = grpc.aio.server()
        objects_pb2_grpc.add_ObjectsServicer_to_server(Packed(), other)
        port = other.add_secure_port("localhost:0", grpc.ssl_server_credentials([(key, certificate)], ca.pem, True))
        await other.start()
        try:
            for options, taken in (([], True), (wire.options(wire.CHANNEL_OPTIONS), False)):
                async with grpc.aio.secure_channel(f"localhost:{port}", tls.client_credentials(tmp_path), options) as channel:
                    if taken:
                        assert len(await fetch(channel, "x")) == 1 << 20, "it is packed indeed, and others unpack it"
                        continue
                    with pytest.raises(grpc.aio.AioRpcError, match="Compression algorithm 'gzip' is disabled"):
                        await fetch(channel, "x")
        finally:
            await other.stop(0)

    asyncio.run(body())


def test_run_files_and_manifests_that_are_too_large(server):
    """Of the operator's own: an error that says so, and not a run."""

    async def attack():
        async with server.admin() as admin:

            def start(toml, manifest):
                return lambda: admin.StartRun(admin_pb2.StartRunRequest(toml=toml, manifest=manifest), timeout=20)

            manifest = dump_manifest(MANIFEST)
            await refused(start(run_toml(name="x") + "\n#" + "x" * 70_000, manifest), "ConfigError", "at most 65536 are read")
            await refused(start(run_toml(name="x"), "[" * 200_000), "ModelError", "not a model manifest")
            await refused(start(run_toml(name="x"), "x" * (1 << 20) + "x"), "ModelError", "a manifest of 1048577 characters")
            await refused(start(run_toml(name="x"), "x" * (1_300_000)), "LimitError", "StartRun takes")
            many = manifest.replace('"layers": 6', '"layers": 5000')
            await refused(start(run_toml(name="x"), many), "ModelError", "layers, modules or sizes no model has")

    under(server, attack)


def test_what_is_no_protobuf_gets_an_error_and_no_trace(server):
    async def attack():
        async with session(server, "mallory") as (channel, _):
            for method in ("Objects/Fetch", "Objects/Offset"):
                call = channel.unary_unary(f"/fedpruner.v1.{method}", lambda raw: raw, lambda raw: raw)
                await refused(lambda call=call: call(b"\xff" * 50, timeout=10), "ProtocolError", "can't be decoded")
            await refused(
                lambda: channel.unary_unary("/fedpruner.v1.Objects/Delete", lambda raw: raw, lambda raw: raw)(b"", timeout=10),
                "UNIMPLEMENTED", "no such method",
            )  # fmt: skip
            stream = channel.stream_stream("/fedpruner.v1.Sessions/Open", lambda raw: raw, lambda raw: raw)

            async def say():
                call = stream(timeout=10)
                await call.write(hello().SerializeToString())
                assert await call.read() is not grpc.aio.EOF
                await call.write(b"\xff" * 50)
                while await call.read() is not grpc.aio.EOF:
                    pass
                raise grpc.aio.AioRpcError(
                    await call.code(), grpc.aio.Metadata(), await call.trailing_metadata(), await call.details()
                )

            await refused(say, "ProtocolError", "a message to Open can't be decoded")

    under(server, attack)


# -- too many -------------------------------------------------------------------------------------


def test_an_identity_that_opens_sessions_for_ever(server: Besieged) -> None:
    """Two daemons with one identity throw each other out; not as often as they like."""

    async def attack() -> None:
        async with server.channel("trudy") as channel:

            async def open_one() -> None:
                call = session_pb2_grpc.SessionsStub(channel).Open(timeout=20)
                await call.write(hello())
                await read(call)
                await call.done_writing()
                while await call.read() is not grpc.aio.EOF:  # to its very end: else it counts among those under way
                    pass
                assert await call.code() is grpc.StatusCode.OK

            async def open_sixty() -> None:
                for _ in range(60):
                    await open_one()

            await refused(open_sixty, "LimitError", "device 'trudy' opens sessions too often (one in 2 s)")

    under(server, attack)


def test_more_sessions_than_the_server_has_room_for(tmp_path):
    """Four may be open. Those who are in stay in, and finish their round."""
    others = tuple(f"mallory-{n}" for n in range(6))
    server = Besieged(tmp_path / "server", ("alice", "bob", *others), sessions=4)
    server.start()

    async def body():
        welcome = asyncio.Event()

        async def wait():
            await welcome.wait()

        devices = [Device(server, "alice", hooks={"planned": wait}), Device(server, "bob", hooks={"planned": wait})]
        running = asyncio.create_task(whole_run(server, devices, run_toml(rounds=1, final_evaluation=False, min_devices=2)))
        await server.until(lambda s: {"alice", "bob"} <= set(s["connected"]))
        async with contextlib.AsyncExitStack() as stack:
            for name in others[:2]:
                await stack.enter_async_context(session(server, name))
            for name in others[2:]:
                said = "4 devices have a session already, and server.toml allows no more (limits.sessions)"
                await refused(lambda name=name: session(server, name).__aenter__(), "LimitError", said)
            welcome.set()
            status = await running
        assert status["history"][0]["weights"] == {"alice": 40, "bob": 40}

    try:
        asyncio.run(body())
        assert "Traceback" not in server.log()
    finally:
        server.kill()


def test_a_flood_of_calls_is_slowed_down_then_refused_then_cut(server):
    async def attack():
        names = set()
        async with server.channel("mallory") as channel:
            objects = objects_pb2_grpc.ObjectsStub(channel)
            request = objects_pb2.OffsetRequest(key=serde.key_to_pb(TaskKey("none", 0, 0)))
            request.ref.digest = "0" * 64
            begin = time.monotonic()
            while time.monotonic() - begin < 20 and "UNAVAILABLE" not in names:
                calls = [objects.Offset(request, timeout=10) for _ in range(60)]
                for answer in await asyncio.gather(*calls, return_exceptions=True):
                    assert isinstance(answer, grpc.aio.AioRpcError)
                    names.add(error_name(answer) or answer.code().name)
        assert {"NotFound", "LimitError", "UNAVAILABLE"} <= names, names

    under(server, attack)
    assert "has 16 calls under way already" in server.log()


def test_a_caller_of_what_it_may_not_is_cut_in_the_end(server):
    """Refusals cost the server, too."""

    async def attack():
        codes = []
        async with server.channel("mallory") as channel:
            admin = admin_pb2_grpc.AdminStub(channel)
            for _ in range(200):
                try:
                    await admin.ListRuns(admin_pb2.ListRunsRequest(), timeout=10)
                except grpc.aio.AioRpcError as error:
                    codes.append(error.code())
        assert codes[0] is grpc.StatusCode.PERMISSION_DENIED and grpc.StatusCode.UNAVAILABLE in codes

    under(server, attack)


def test_more_connections_of_one_device_than_it_needs(server):
    """With the ninth the one longest unused is cut: whoever comes back from a cut line is let in."""

    async def attack():
        async with contextlib.AsyncExitStack() as stack:
            options = wire.options(wire.CHANNEL_OPTIONS, use_local_subchannel_pool=1)
            for n in range(20):
                channel = grpc.aio.secure_channel(server.address, server.credentials("mallory"), [*options, ("n", n)])
                await stack.enter_async_context(channel)
                await refused(lambda channel=channel: fetch(channel, "0" * 64), "NotFound", "not part of this device")
            for _ in range(100):
                if len(connections := [c for c in _connections(server) if c]) <= 8 + 6:
                    break
                await asyncio.sleep(0.2)
            assert len(connections) <= 8 + 6, "mallory's eight, and those of alice, bob and the operator"

    under(server, attack)


def _connections(server):
    import psutil

    found = psutil.Process(server.process.pid).net_connections("tcp")
    return [c.raddr for c in found if c.laddr.port == server.port and c.status == "ESTABLISHED"]


def test_tens_of_thousands_of_small_messages(server):
    """They are read at ten a second: what waits, waits on the device's side, once HTTP/2's window is full (3,800 of them)."""

    async def attack():
        async with session(server, "mallory") as (_, call):
            progress = session_pb2.Progress(key=serde.key_to_pb(TaskKey("r", 0, 0)), phase="train")
            sent = 0
            with pytest.raises(TimeoutError):
                while sent < 10_000:
                    async with asyncio.timeout(2):
                        await call.write(session_pb2.DeviceMessage(progress=progress))
                    sent += 1
            assert sent > 50, "as many as are read at once"

    under(server, attack)


# -- where it must not be -------------------------------------------------------------------------


def test_what_is_another_devices_is_not_to_be_had(server, tmp_path):
    """Mallory knows bob's task and update to the last bit."""
    seen = []

    async def make(assignment, device):
        data, key = device.honest(assignment), assignment.key
        ready = ready_for(key, data)
        async with server.channel("mallory") as channel:
            objects = objects_pb2_grpc.ObjectsStub(channel)
            request = objects_pb2.OffsetRequest(key=serde.key_to_pb(key), ref=serde.ref_to_pb(ready.ref))
            await refused(lambda: objects.Offset(request, timeout=10), "NotFound", "expects no update from 'mallory'")

            async def push():
                call = objects.Push(timeout=10)
                await call.write(objects_pb2.PushMessage(header=serde.ready_to_pb(ready, 0)))
                await call

            await refused(push, "NotFound", "expects no update from 'mallory'")
            for item in assignment.adapter:
                await refused(
                    lambda item=item: fetch(channel, item.ref.digest), "NotFound", "not part of this device's current task"
                )
        seen.append(len(assignment.adapter))
        return data

    async def body():
        toml = run_toml(name="others", rounds=2)
        status = await whole_run(server, [Device(server, "alice"), Device(server, "bob", make=make)], toml, 60)
        assert [entry["weights"] for entry in status["history"][:2]] == [{"alice": 40, "bob": 40}] * 2

    asyncio.run(body())
    assert len(seen) == 2 and seen[1] > 0
    assert not (server.directory / "partial" / "mallory").exists()


def test_a_replayed_push_counts_once(server):
    """Every message of bob's push of round 1, again in round 2 and once the run is over."""
    kept = []

    async def replay(said):
        ready, data = kept[0]
        async with server.channel("bob") as channel:

            async def push():
                call = objects_pb2_grpc.ObjectsStub(channel).Push(timeout=10)
                await call.write(objects_pb2.PushMessage(header=serde.ready_to_pb(ready, 0)))
                await call.write(objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=data)))
                await call.done_writing()
                return (await call).duplicate

            if said is None:
                assert await unhidden(push) is True
            else:
                await refused(push, *said)

    async def make(assignment, device):
        data = device.honest(assignment)
        if assignment.key.round == 1:  # the round before: known, and not counted again
            await replay(None)
        if assignment.key.round == 2:
            await replay(("TooLate", "no longer counts"))
        if not kept:
            kept.append((ready_for(assignment.key, data), data))
        return data

    async def body():
        toml = run_toml(name="replayed", rounds=3, final_evaluation=False)
        status = await whole_run(server, [Device(server, "alice"), Device(server, "bob", make=make)], toml, 60)
        assert [entry["weights"] for entry in status["history"]] == [{"alice": 40, "bob": 40}] * 3
        await replay(("NotFound", "is not active here"))

    asyncio.run(body())


@pytest.mark.parametrize("kind", NAMES)
def test_names_that_are_paths_or_tricks(server, kind):
    """As run, digest, device, in every message that has one. Nothing is made of them but an error, in one line."""
    name = NAMES[kind]

    def tree():
        return sorted(p for p in server.directory.parent.rglob("*") if "server.log" not in p.name and "log.sqlite" not in p.name)

    async def attack():
        before = tree()
        async with session(server, f"eve-{list(NAMES).index(kind)}") as (channel, call):
            objects = objects_pb2_grpc.ObjectsStub(channel)
            await refused(lambda: fetch(channel, name), "NotFound", "not part of this device's current task")
            request = objects_pb2.OffsetRequest()
            request.key.run, request.ref.digest = name, "0" * 64
            await refused(lambda: objects.Offset(request, timeout=10), "ProtocolError", "key.run")
            request.key.run, request.ref.digest = "toy-run", name
            await refused(lambda: objects.Offset(request, timeout=10), "ProtocolError", "ref.digest")
            for message in (
                session_pb2.DeviceMessage(failed=session_pb2.TaskFailed(error=name, message=name)),
                session_pb2.DeviceMessage(plan=session_pb2.PlanReport(run=name, refusal=name, fingerprint=name)),
            ):
                if message.WhichOneof("body") == "failed":
                    message.failed.key.run = name
                await call.write(message)
        async with server.admin() as admin:
            if name:
                await refused(lambda: admin.GetStatus(admin_pb2.StatusRequest(run=name), timeout=10), "NotFound", "no run")
            await refused(
                lambda: admin.CreateToken(admin_pb2.CreateTokenRequest(name=name, ttl_seconds=60), timeout=10),
                "ConfigError", "not a name",
            )  # fmt: skip
            toml = run_toml().replace('"toy-run"', _toml(name))
            request = admin_pb2.StartRunRequest(toml=toml, manifest=dump_manifest(MANIFEST))
            await refused(lambda: admin.StartRun(request, timeout=10), "ConfigError", "run.name")
        assert tree() == before

    asyncio.run(attack())
    assert server.process.poll() is None
    assert all(line[:4].isdigit() for line in server.log().splitlines()), "no device writes lines of its own"
    assert "\n2026-01-01" not in server.log()


def _toml(text):
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08X}" for c in text) + '"'


@pytest.mark.parametrize("kind", NAMES)
def test_tensor_names_that_are_paths_or_tricks(server, kind):
    """In an update: it is refused by the name of the tensor."""
    name = NAMES[kind]

    def make(assignment, device):
        if assignment.key.attempt:
            return device.honest(assignment)
        tensors = {f"layers.0.{name}.lora_A": blocks_of(assignment, "bob")[0].a, name or "x": blocks_of(assignment, "bob")[0].b}
        path = server.devices / "bob" / "made.safetensors"
        write_tensors(path, tensors)
        return path.read_bytes()

    async def body():
        bob = Device(server, "bob", make=make)
        toml = run_toml(name=f"tensor-{list(NAMES).index(kind)}", rounds=1, final_evaluation=False)
        status = await whole_run(server, [Device(server, "alice"), bob], toml, 60)
        assert status["history"][0]["weights"] == {"alice": 40}
        (error,) = bob.errors
        assert "INVALID_ARGUMENT" in error and "was not assigned to this device" in error

    asyncio.run(body())


# -- disk -----------------------------------------------------------------------------------------


def test_updates_in_part_have_a_quota_and_the_log_has_room(tmp_path):
    """6,000 bytes for all arrivals hold no second update while the first lies there."""
    server = Besieged(tmp_path / "server", ("alice", "bob"), arrival_bytes=6000)
    server.start()
    said, gone = [], asyncio.Event()

    async def make(assignment, device):
        data = device.honest(assignment)
        if assignment.key.round:
            return data
        assert len(data) < 6000 < len(data) + 5000
        left = server.directory / "partial" / "mallory"
        left.mkdir()
        (left / ("0" * 64)).write_bytes(b"x" * 5000)  # what another one has left in part
        async with server.channel("bob") as channel:
            try:
                await unhidden(lambda: device.push(channel, ready_for(assignment.key, data), data))
            except grpc.aio.AioRpcError as error:
                said.append(f"{error_name(error)}: {error.details()}")
        (left / ("0" * 64)).unlink()
        gone.set()
        return data

    async def wait(assignment, device):
        await gone.wait()
        return device.honest(assignment)

    async def body():
        devices = [Device(server, "alice", make=wait), Device(server, "bob", make=make)]
        status = await whole_run(server, devices, run_toml(), 60)
        assert status["history"][0]["weights"] == {"alice": 40, "bob": 40}

    try:
        asyncio.run(body())
        assert said and said[0].startswith("LimitError: updates on their way in would take") and "6000" in said[0]
        assert "Traceback" not in server.log()
    finally:
        server.kill()


def test_the_last_of_the_disk_is_the_logs(tmp_path):
    server = Besieged(tmp_path / "server", ("alice", "bob"), disk_reserve_bytes=1 << 60)
    server.start()

    async def body():
        alice = Device(server, "alice")
        run = asyncio.create_task(whole_run(server, [alice, Device(server, "bob")], run_toml(), 60))
        seen = await server.until(lambda s: s["problem"])
        assert "can't be stored" in seen["problem"] and "limits.disk_reserve_bytes" in seen["problem"]
        assert seen["state"] == "round", "the round goes on, and may be delivered to when there is space"
        async with server.admin() as admin:
            await admin.ControlRun(admin_pb2.ControlRunRequest(action="stop"), timeout=10)
        await run
        assert alice.errors

    try:
        asyncio.run(body())
        assert "Traceback" not in server.log()
    finally:
        server.kill()


# -- enrollment -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def enrollment(server):
    credentials = grpc.ssl_channel_credentials((server.directory / "ca.pem").read_bytes())
    async with grpc.aio.secure_channel(f"localhost:{read_endpoint(server.directory).enroll_port}", credentials) as channel:
        yield enroll_pb2_grpc.EnrollmentStub(channel)


def test_a_flood_of_guesses_at_the_enrollment_port(server):
    """Each is refused, then all of that address are; a device with a session notices nothing. Later a real token gets in."""

    async def attack():
        names = []
        async with enrollment(server) as stub:
            huge = enroll_pb2.EnrollRequest(secret="x", csr_pem="y" * 70_000)
            await refused(lambda: stub.Enroll(huge, timeout=10), "RESOURCE_EXHAUSTED", "larger than max")
            request = enroll_pb2.EnrollRequest(secret="x" * 43, csr_pem=tls.make_csr(tls.new_key(), "x"))
            for _ in range(150):
                try:
                    await stub.Enroll(request, timeout=10)
                except grpc.aio.AioRpcError as error:
                    names.append(error_name(error) or error.code().name)
            assert names[0] == "TokenError" and "LimitError" in names, names
        async with server.admin() as admin:
            request = admin_pb2.CreateTokenRequest(name="carol", ttl_seconds=60)
            token = (await admin.CreateToken(request, timeout=10)).token
        from common.token import JoinToken

        request = enroll_pb2.EnrollRequest(secret=JoinToken.decode(token).secret, csr_pem=tls.make_csr(tls.new_key(), "x"))
        for _ in range(100):
            async with enrollment(server) as stub:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    assert (await stub.Enroll(request, timeout=10)).name == "carol"
                    return
            await asyncio.sleep(0.2)
        raise AssertionError("nobody can join any more")

    under(server, attack)


@contextlib.asynccontextmanager
async def from_address(server, address):
    """A local port whose connections reach the enrollment port from another address than 127.0.0.1."""
    to, tasks, writers = read_endpoint(server.directory).enroll_port, set(), []

    async def pump(reader, writer):
        writers.append(writer)
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def forward(reader, writer):
        onward = await asyncio.open_connection("127.0.0.1", to, local_addr=(address, 0))
        tasks.update(asyncio.create_task(pump(*pair)) for pair in ((reader, onward[1]), (onward[0], writer)))

    forwarder = await asyncio.start_server(forward, "127.0.0.1", 0)
    credentials = grpc.ssl_channel_credentials((server.directory / "ca.pem").read_bytes())
    try:
        port = forwarder.sockets[0].getsockname()[1]
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            yield enroll_pb2_grpc.EnrollmentStub(channel)
    finally:
        forwarder.close()
        await asyncio.gather(*tasks)  # the channel is closed, and so both ends are
        for writer in writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def test_a_flood_from_one_address_keeps_no_other_from_joining(tmp_path):
    """All addresses together may have 20 at once here; the flood's own share is 10, and it asks for many times that."""
    server = Besieged(tmp_path / "server", (), enroll_per_second=2, enroll_per_second_each=1)
    server.start()

    async def body():
        request, names = enroll_pb2.EnrollRequest(secret="x" * 43, csr_pem=tls.make_csr(tls.new_key(), "x")), []
        async with enrollment(server) as stub, from_address(server, "127.0.0.2") as other:
            for _ in range(4):
                calls = [stub.Enroll(request, timeout=10) for _ in range(16)]
                answers = await asyncio.gather(*calls, return_exceptions=True)
                names += [error_name(answer) or answer.code().name for answer in answers]
            assert "TokenError" in names and "LimitError" in names, names
            await refused(lambda: other.Enroll(request, timeout=10), "TokenError", "token")

    try:
        asyncio.run(body())
    finally:
        server.kill()


def test_tokens_that_wait_to_be_used_are_bounded(tmp_path):
    server = Besieged(tmp_path / "server", (), tokens=3)
    server.start()

    async def body():
        async with server.admin() as admin:

            def make(n, ttl=60):
                return admin.CreateToken(admin_pb2.CreateTokenRequest(name=f"d-{n}", ttl_seconds=ttl), timeout=10)

            begin = time.monotonic()
            await make(0, 4)
            for n in range(1, 3):
                await make(n)
            await refused(lambda: make(3), "LimitError", "3 tokens wait to be used already")
            await asyncio.sleep(max(0.0, begin + 4.5 - time.monotonic()))  # the first has ended
            await make(3)
            await refused(lambda: make(4), "LimitError", "limits.tokens")

    try:
        asyncio.run(body())
    finally:
        server.kill()
