"""Who may do what: certificates, roles, digests, schemas, sessions."""

from __future__ import annotations

import asyncio
import shutil
from datetime import timedelta

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from fake_ca import FakeCa
from server_side import (
    Device,
    Server,
    error_name,
    fetch,
    hello,
    plan_report,
    read,
    ready_for,
    run_toml,
    whole_run,
    write_identity,
)
from siege import unhidden

from common.errors import UnreachableError
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
from common.transport import serde, tls
from common.types import TaskKey
from fp_client.rpc import Connection, diagnose
from fp_server.identity import Authority
from fp_server.log import Database, EventLog


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """One server for the tests that start no run."""
    server = Server(tmp_path_factory.mktemp("idle") / "server", ("alice", "bob", "carol"))
    server.identity("boss", "operator")
    server.start()
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log()


async def refused(call) -> grpc.aio.AioRpcError:
    """The refusal of an awaitable, or of what a function makes, which can be made again."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (unhidden(call) if callable(call) else call)
    return caught.value


async def first_answer(channel, *messages):
    call = session_pb2_grpc.SessionsStub(channel).Open(timeout=10)
    for message in messages:
        await call.write(message)
    await call.done_writing()
    return await read(call)


def test_no_certificate(idle):
    async def body():
        ca = (idle.directory / "ca.pem").read_bytes()
        async with grpc.aio.secure_channel(idle.address, grpc.ssl_channel_credentials(ca)) as channel:
            error = await refused(admin_pb2_grpc.AdminStub(channel).ListRuns(admin_pb2.ListRunsRequest(), timeout=10))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            error = await refused(lambda: first_answer(channel, hello()))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert (await idle.status())["state"] == "idle"

    asyncio.run(body())


def test_a_certificate_of_a_rogue_ca(idle, tmp_path):
    async def body():
        rogue = FakeCa.make()
        rogue.join(tmp_path, "alice")
        (tmp_path / "ca.pem").write_bytes((idle.directory / "ca.pem").read_bytes())
        credentials = tls.client_credentials(tmp_path)
        async with grpc.aio.secure_channel(idle.address, credentials) as channel:
            error = await refused(lambda: first_answer(channel, hello()))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert (await idle.status())["connected"] == []

    asyncio.run(body())


def test_an_expired_certificate(idle, tmp_path):
    """Signed by the right CA, five days ago, for a day."""
    ca = x509.load_pem_x509_certificate((idle.directory / "ca.pem").read_bytes())
    FakeCa(tls.load_key(idle.directory / "ca.key"), ca).join(tmp_path, "alice", valid=(timedelta(days=-5), timedelta(days=-4)))
    parts = [(tmp_path / name).read_bytes() for name in ("ca.pem", "device.key", "device.pem")]
    assert parts[0] == (idle.directory / "ca.pem").read_bytes()

    async def body():
        async with grpc.aio.secure_channel(idle.address, grpc.ssl_channel_credentials(*parts)) as channel:
            error = await refused(lambda: first_answer(channel, hello()))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert (await idle.status())["connected"] == []

    asyncio.run(body())


def of_the_servers_ca(server) -> FakeCa:
    """What somebody with the server's own CA key could make."""
    ca = x509.load_pem_x509_certificate((server.directory / "ca.pem").read_bytes())
    return FakeCa(tls.load_key(server.directory / "ca.key"), ca)


def uri(*texts: str) -> list[x509.GeneralName]:
    return [x509.UniformResourceIdentifier(text) for text in texts]


CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (uri("fedpruner://device/alice", "fedpruner://operator/boss"), "carries 2 identities; it must be one"),
        (uri("fedpruner://device/alice", "fedpruner://device/alice"), "carries 2 identities; it must be one"),
        (uri("fedpruner://device/"), "'fedpruner://device/', which is no identity (fedpruner://<role>/<name>)"),
        (uri("fedpruner://device/../../etc"), "which is no identity"),
        (uri("fedpruner://device/Alice"), "which is no identity"),
        (uri("fedpruner://king/alice"), "which is no identity"),
        (uri("fedpruner://operator"), "which is no identity"),
        (uri("fedpruner://device/alice/operator"), "which is no identity"),
        (uri("FEDPRUNER://device/alice"), "carries no FedPruner identity"),
        (uri("spiffe://device/alice"), "carries no FedPruner identity"),
        ([x509.DNSName("localhost")], "carries no FedPruner identity"),
    ],
)
def test_a_certificate_with_another_or_no_identity(idle, tmp_path, names, said):
    """Signed by the right CA, for the right usage; nothing is guessed from what it carries instead."""
    key = tls.new_key()
    pem = of_the_servers_ca(idle).issue(key.public_key(), names, CLIENT)
    mine = write_identity(tmp_path, (idle.directory / "ca.pem").read_text(), pem.decode(), key)

    async def body():
        async with grpc.aio.secure_channel(idle.address, tls.client_credentials(mine)) as channel:
            renew = enroll_pb2.RenewRequest(csr_pem=tls.make_csr(key, "alice"))
            for call in (
                lambda: first_answer(channel, hello()),
                lambda: admin_pb2_grpc.AdminStub(channel).ListRuns(admin_pb2.ListRunsRequest(), timeout=10),
                lambda: fetch(channel, "0" * 64),
                lambda: enroll_pb2_grpc.RenewalStub(channel).Renew(renew, timeout=10),
            ):
                error = await refused(call)
                assert (error_name(error), error.code()) == ("IdentityError", grpc.StatusCode.PERMISSION_DENIED)
                assert said in error.details()
        assert (await idle.status())["connected"] == []

    asyncio.run(body())


@pytest.mark.parametrize("kind", ["a device's identity for a server's usage", "the server's own certificate"])
def test_a_certificate_for_another_usage(idle, tmp_path, kind):
    """Signed by the right CA, and refused in the handshake: it is not one to call with."""
    if kind.startswith("the server"):
        key, pem = tls.load_key(idle.directory / "server.key"), (idle.directory / "server.pem").read_bytes()
    else:
        key = tls.new_key()
        pem = of_the_servers_ca(idle).issue(key.public_key(), uri("fedpruner://device/alice"), SERVER)
    mine = write_identity(tmp_path, (idle.directory / "ca.pem").read_text(), pem.decode(), key)

    async def body():
        async with grpc.aio.secure_channel(idle.address, tls.client_credentials(mine)) as channel:
            error = await refused(lambda: first_answer(channel, hello()))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            error = await refused(admin_pb2_grpc.AdminStub(channel).ListRuns(admin_pb2.ListRunsRequest(), timeout=10))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        verdict = await asyncio.to_thread(diagnose, mine, idle.address)
        assert verdict is not None and "the server refuses this device's certificate" in str(verdict)

    asyncio.run(body())


def test_a_device_does_not_take_another_device_for_a_server(idle, tmp_path):
    """Its certificate is of the right CA; usage and names are not a server's."""
    rogue = idle.devices / "bob"
    pair = ((rogue / "device.key").read_bytes(), (rogue / "device.pem").read_bytes())

    async def body():
        server = grpc.aio.server()
        port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair]))
        await server.start()
        try:
            connection = Connection(idle.devices / "alice", f"localhost:{port}")
            for _ in range(2):  # it is not the server, which may be there later
                with pytest.raises(UnreachableError, match="the server's certificate can't be verified"):
                    await connection.open()
            await connection.close()
        finally:
            await server.stop(0)

    asyncio.run(body())


def methods(*modules) -> list[str]:
    """Every method of every service in these, by its path: none that is added can be forgotten."""
    services = [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
    return [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]


ADMIN, OF_DEVICES = methods(admin_pb2), methods(session_pb2, objects_pb2)


def test_there_are_methods_to_ask_for():
    assert len(ADMIN) >= 9 and {"ReadLedger", "ReadAudit"} <= {path.rpartition("/")[2] for path in ADMIN}
    assert len(OF_DEVICES) >= 4


@pytest.mark.parametrize(
    ("name", "path", "said"),
    [("alice", path, "'alice' is a device; this needs the role operator") for path in ADMIN]
    + [("boss", path, "'boss' is an operator; this needs the role device") for path in OF_DEVICES],
)
def test_roles_are_kept_apart(idle, name, path, said):
    """Each method with an empty message, which any of them can decode."""

    async def body():
        async with idle.channel(name) as channel:

            async def call():
                stream = channel.stream_stream(path, lambda raw: raw, lambda raw: raw)(timeout=10)
                await stream.write(b"")
                await stream.done_writing()
                await read(stream)

            error = await refused(call)
            assert (error_name(error), error.code()) == ("IdentityError", grpc.StatusCode.PERMISSION_DENIED)
            assert said in error.details()

    asyncio.run(body())


def test_another_schema_is_refused_saying_both(idle):
    async def body():
        async with idle.channel("alice") as channel:
            error = await refused(lambda: first_answer(channel, hello("f" * 64)))
            assert (error_name(error), error.code()) == ("ProtocolError", grpc.StatusCode.FAILED_PRECONDITION)
            assert "f" * 16 in error.details() and serde.schema()[:16] in error.details() and "version test" in error.details()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([session_pb2.DeviceMessage()], "must begin with Hello"),
        ([session_pb2.DeviceMessage(failed=session_pb2.TaskFailed())], "must begin with Hello"),
        ([], "must begin with Hello"),
        ([hello(), hello()], "unexpected message hello"),
        ([hello(), session_pb2.DeviceMessage()], "unexpected message (empty)"),
    ],
)
def test_what_has_no_place_in_a_session_ends_it_with_a_reason(idle, messages, said):
    async def body():
        async with idle.channel("bob") as channel:

            async def to_the_end():
                call = session_pb2_grpc.SessionsStub(channel).Open(timeout=10)
                for message in messages:
                    await call.write(message)
                await call.done_writing()
                while True:
                    await read(call)

            error = await refused(to_the_end)
            assert error_name(error) == "ProtocolError" and said in error.details()
        await idle.until(lambda s: "bob" not in s["connected"])

    asyncio.run(body())


def test_an_oversize_message_ends_the_session_and_nothing_else(idle):
    async def body():
        async with idle.channel("carol") as channel, idle.channel("alice") as other:
            calm = session_pb2_grpc.SessionsStub(other).Open(timeout=20)
            await calm.write(hello())
            await read(calm)
            call = session_pb2_grpc.SessionsStub(channel).Open(timeout=20)
            await call.write(hello())
            await read(call)
            report = session_pb2.PlanReport(run="toy-run", refusal="x" * (5 << 20))

            async def flood():
                await call.write(session_pb2.DeviceMessage(plan=report))
                await read(call)

            error = await refused(flood())
            assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)
            seen = await idle.until(lambda s: "carol" not in s["connected"])
            assert "alice" in seen["connected"]
            calm.cancel()

    asyncio.run(body())


def test_a_second_session_of_the_same_device_ends_the_first(idle):
    async def body():
        async with idle.channel("alice") as one, idle.channel("alice") as two:
            first = session_pb2_grpc.SessionsStub(one).Open(timeout=20)
            await first.write(hello())
            await read(first)
            second = session_pb2_grpc.SessionsStub(two).Open(timeout=20)
            await second.write(hello())
            await read(second)
            error = await refused(read(first))
            assert error_name(error) == "InUseError" and "another session of 'alice'" in error.details()
            assert (await idle.status())["connected"] == ["alice"]
            second.cancel()
        await idle.until(lambda s: s["connected"] == [])

    asyncio.run(body())


def test_nothing_can_be_fetched_without_a_task(idle):
    async def body():
        async with idle.channel("alice") as channel:
            for digest in ("0" * 64, "", "../../server.key", "ab"):
                error = await refused(fetch(channel, digest))
                assert (error_name(error), error.code()) == ("NotFound", grpc.StatusCode.NOT_FOUND)
            request = objects_pb2.OffsetRequest(key=serde.key_to_pb(TaskKey("none", 0, 0)))
            request.ref.digest = "0" * 64
            error = await refused(objects_pb2_grpc.ObjectsStub(channel).Offset(request, timeout=10))
            assert error_name(error) == "NotFound" and "'none' is not active" in error.details()

    asyncio.run(body())


def test_only_the_digests_of_the_own_task_can_be_fetched(server):
    """In round 2 alice may fetch what her task names, and not a ledger, an update or an offset beyond the end."""
    checked = []

    async def make(assignment, device):
        if assignment.key.round == 0:
            return device.honest(assignment)
        mine = {o.ref.digest for o in assignment.adapter}
        store = {p.name for p in (server.directory / "objects").glob("*/*")}
        assert mine <= store and store - mine
        async with server.channel("alice") as channel:
            for digest in sorted(store - mine):
                error = await refused(fetch(channel, digest))
                assert error_name(error) == "NotFound" and "not part of this device's current task" in error.details()
            for item in assignment.adapter:
                whole = await fetch(channel, item.ref.digest)
                assert len(whole) == item.ref.size
                assert await fetch(channel, item.ref.digest, 10) == whole[10:]
                assert await fetch(channel, item.ref.digest, item.ref.size) == b""
                error = await refused(fetch(channel, item.ref.digest, 1 << 63))
                assert error_name(error) == "ProtocolError" and "there is no byte" in error.details()
        checked.append(len(mine))
        return device.honest(assignment)

    status = asyncio.run(whole_run(server, [Device(server, "alice", make=make), Device(server, "bob")], run_toml()))
    assert checked and checked[0] > 0 and status["state"] == "finished"


def test_a_device_that_is_not_in_the_round_can_not_push_for_one_that_is(tmp_path):
    """Who pushes is the certificate's name, whatever key the header has."""
    server = Server(tmp_path / "server", ("alice", "bob", "mallory"))
    server.start()
    said = []

    async def make(assignment, device):
        data = device.honest(assignment)
        async with server.channel("mallory") as channel:
            error = await refused(Device(server, "mallory").push(channel, ready_for(assignment.key, data), data))
            said.append((error_name(error), error.details()))
            stub = objects_pb2_grpc.ObjectsStub(channel)
            call = stub.Push(iter([objects_pb2.PushMessage(header=serde.ready_to_pb(ready_for(assignment.key, data), 0))]))
            error = await refused(call)
            said.append((error_name(error), error.details()))
        return data

    try:
        devices = [Device(server, "alice", make=make), Device(server, "bob")]
        status = asyncio.run(whole_run(server, devices, run_toml(rounds=1, final_evaluation=False)))
        assert said == [("NotFound", "round 1 of 'toy-run' expects no update from 'mallory'")] * 2
        assert list(status["history"][0]["weights"]) == ["alice", "bob"]
    finally:
        server.kill()


def test_other_base_weights_are_refused_saying_both_fingerprints(server):
    async def said(run, change, units=3):
        async with server.channel("alice") as channel:
            call = session_pb2_grpc.SessionsStub(channel).Open(timeout=20)
            await call.write(hello())
            await read(call)
            assert (await read(call)).WhichOneof("body") == "plan"
            report = serde.plan_report_to_pb(plan_report(run, units=units))
            before = (await server.status())["devices"]["alice"]["refusal"]
            change(report)
            await call.write(session_pb2.DeviceMessage(plan=report))
            seen = await server.until(lambda s: s["devices"]["alice"]["refusal"] != before)
            call.cancel()
            return seen["devices"]["alice"]

    async def body():
        run = await server.begin(run_toml())
        alice = await said(run, lambda report: setattr(report, "fingerprint", "cd" * 32))
        assert "cdcdcdcdcdcdcdcd" in alice["refusal"] and "abababababababab" in alice["refusal"] and alice["units"] == 0
        alice = await said(run, lambda report: report.unit_bytes.__delitem__(slice(2, None)))
        assert alice["refusal"] == "the plan has 2 units, the model 6 layers"
        assert "capacity of more units" in (await said(run, lambda report: None, 7))["refusal"]

    asyncio.run(body())


def test_a_probe_that_is_not_the_models_costs_the_round_and_not_the_session(server):
    """Wrong size first; in the next round values no similarity has."""

    async def body():
        run = await server.begin(run_toml(min_devices=1, devices_per_round=1.0))
        async with server.channel("alice") as channel:
            call = session_pb2_grpc.SessionsStub(channel).Open(timeout=30)
            await call.write(hello())
            await read(call)
            await read(call)
            await call.write(session_pb2.DeviceMessage(plan=serde.plan_report_to_pb(plan_report(run))))
            probe = (await read(call)).probe
            bad = session_pb2.ProbeReport(key=probe.key, units=1, similarity=[1.0], in_out=[0.5], loss=1.0, tokens=1)
            await call.write(session_pb2.DeviceMessage(probe=bad))
            cancel = (await read(call)).cancel
            assert cancel.reason == "the probe has 1 units, expected 6"
            probe = (await read(call)).probe
            assert probe.key.attempt == 1
            bad = session_pb2.ProbeReport(key=probe.key, units=6, similarity=[-5.0] * 36, in_out=[9.0] * 6, loss=1.0, tokens=1)
            await call.write(session_pb2.DeviceMessage(probe=bad))
            cancel = (await read(call)).cancel
            assert cancel.key == probe.key and cancel.reason
            seen = await server.until(lambda s: s["state"] == "paused")
            assert seen["paused"] == "round 1 failed 2 times; see the devices' errors, then resume"
            call.cancel()

    asyncio.run(body())
    assert server.process.poll() is None


@pytest.mark.parametrize(
    ("field", "values", "said"),
    [
        ("loss", float("nan"), "probe.loss: nan is not finite"),
        ("seconds", float("inf"), "probe.seconds: inf is not finite"),
        ("similarity", [float("nan")] * 36, "probe.similarity: has NaN or infinite values"),
        ("in_out", [0.5] * 5, "probe.similarity: 36 values and 5 in_out for 6 units"),
    ],
)
def test_a_probe_that_does_not_decode_costs_the_round_and_not_the_session(server, field, values, said):
    async def body():
        run = await server.begin(run_toml(min_devices=1, devices_per_round=1.0))
        async with server.channel("alice") as channel:
            call = session_pb2_grpc.SessionsStub(channel).Open(timeout=30)
            await call.write(hello())
            await read(call)
            await read(call)
            garbled = serde.plan_report_to_pb(plan_report(run))
            garbled.capacities[0].gradient = "sideways"
            await call.write(session_pb2.DeviceMessage(plan=garbled))
            refused_plan = await server.until(lambda s: s["devices"]["alice"]["refusal"].startswith("its plan can't be read"))
            assert "'sideways'" in refused_plan["devices"]["alice"]["refusal"] and refused_plan["connected"] == ["alice"]
            call.cancel()
            call = session_pb2_grpc.SessionsStub(channel).Open(timeout=30)
            await call.write(hello())
            await read(call)
            await read(call)
            await call.write(session_pb2.DeviceMessage(plan=serde.plan_report_to_pb(plan_report(run))))
            probe = (await read(call)).probe
            bad = session_pb2.ProbeReport(
                key=probe.key, units=6, similarity=[1.0] * 36, in_out=[0.5] * 6, loss=1.0, tokens=1, seconds=1.0
            )
            if isinstance(values, list):
                del getattr(bad, field)[:]
                getattr(bad, field).extend(values)
            else:
                setattr(bad, field, values)
            await call.write(session_pb2.DeviceMessage(probe=bad))
            assert (await read(call)).cancel.reason == said
            assert (await read(call)).probe.key.attempt == 1, "the same session gets the next attempt's task"
            seen = await server.status(run)
            left = {"stage": "dropped", "error": "ProtocolError", "message": said, "revoked": False}
            assert seen["history"][0]["devices"]["alice"] == left
            call.cancel()

    asyncio.run(body())
    assert server.process.poll() is None


def test_many_messages_at_once_slow_their_sender_down_and_nobody_else(server):
    """Two hundred plans nobody asked for are no two hundred events, and the server answers others meanwhile."""

    async def body():
        run = await server.begin(run_toml())
        async with server.channel("alice") as channel:
            call = session_pb2_grpc.SessionsStub(channel).Open(timeout=60)
            await call.write(hello())
            await read(call)
            await read(call)
            for samples in range(40, 240):
                await call.write(session_pb2.DeviceMessage(plan=serde.plan_report_to_pb(plan_report(run, samples=samples))))
            seen = await server.until(lambda s: s["devices"].get("alice", {}).get("samples") is not None)
            assert seen["devices"]["alice"]["samples"] == 40 and seen["connected"] == ["alice"]
            call.cancel()

    asyncio.run(body())
    server.kill()
    database = Database(server.directory / "log.sqlite")
    try:
        kinds = [type(event).__name__ for _, event in EventLog(database).replay("toy-run")]
        assert kinds == ["RunStarted", "PlanReceived"]
    finally:
        database.close()
        server.start()


@pytest.mark.parametrize("evaluated", [False, True])
def test_revoking_in_mid_session_ends_it_and_the_round_goes_on(server, evaluated):
    """The final evaluation waits for nobody who was revoked, which would take `progress_timeout_seconds`: ten minutes."""

    async def body():
        alice, bob = Device(server, "alice"), Device(server, "bob")

        async def revoke():
            async with server.admin() as admin:
                assert (await admin.Revoke(admin_pb2.RevokeRequest(name="bob"), timeout=10)).count == 1

        bob.hooks["probed"] = revoke
        run = await server.begin(run_toml(rounds=1, final_evaluation=evaluated))
        async with asyncio.timeout(30):
            results = await asyncio.gather(alice.live(), bob.live(), return_exceptions=True)
        assert results[0] is None
        assert error_name(results[1]) == "IdentityError" and "certificate of 'bob' has been revoked" in results[1].details()
        seen = await server.status(run)
        assert seen["state"] == "finished" and seen["history"][0]["weights"] == {"alice": 40}
        assert "revoked" in seen["history"][0]["devices"]["bob"]["message"]
        async with server.channel("bob") as channel:
            error = await refused(lambda: first_answer(channel, hello()))
            assert error_name(error) == "IdentityError"

    asyncio.run(body())


def test_a_revoked_name_can_join_again_with_a_new_token(tmp_path):
    server = Server(tmp_path / "server")
    database = Database(server.directory / "log.sqlite")
    try:
        authority = Authority(server.directory, database)
        assert asyncio.run(authority.revoke("alice")) == (1, 0)
    finally:
        database.close()
    old = tmp_path / "old"
    shutil.copytree(server.devices / "alice", old)
    server.identity("alice")
    server.start()

    async def body():
        async with server.channel("alice") as channel:
            assert (await first_answer(channel, hello())).welcome.device == "alice"
        async with grpc.aio.secure_channel(server.address, tls.client_credentials(old)) as channel:
            assert error_name(await refused(lambda: first_answer(channel, hello()))) == "IdentityError"

    try:
        asyncio.run(body())
    finally:
        server.kill()
