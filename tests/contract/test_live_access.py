"""A real server: renewal over the wire, and revocations and ends of certificates that cut whatever is under way."""

from __future__ import annotations

import asyncio
import socket
import ssl
from datetime import UTC, datetime

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from server_side import (
    MODULES,
    Device,
    Server,
    error_name,
    fetch,
    hello,
    read,
    ready_for,
    run_toml,
    write_identity,
)
from test_bad_access import first_answer, refused
from test_server_cli import cli

from common.pb import admin_pb2, admin_pb2_grpc, enroll_pb2, enroll_pb2_grpc, objects_pb2, objects_pb2_grpc, session_pb2_grpc
from common.token import JoinToken
from common.transport import serde, tls
from common.types import ModelManifest, ModuleShape
from fp_client.renewal import stay_valid
from fp_client.rpc import Connection
from fp_server.health import read_endpoint
from fp_server.operator import Operator

SOON = 20.0
"""Seconds within which a call must have ended; the server looks every second, the rest is for a busy machine."""
BRIEF = 6 / 86_400
"""Days: a certificate of six seconds."""


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """One server for the tests that start no run."""
    server = Server(tmp_path_factory.mktemp("live") / "server", ("alice", "bob"))
    for name in ("boss", "chief"):
        server.identity(name, "operator")
    server.start()
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log()


async def revoke(server, name):
    async with server.admin() as admin:
        return await admin.Revoke(admin_pb2.RevokeRequest(name=name), timeout=10)


def wanting(key, name="root"):
    """A CSR that asks for another identity, a CA and a server's usage."""
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"fedpruner://operator/{name}")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False)
    )
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


def is_a_devices(pem, name, key):
    certificate = x509.load_pem_x509_certificate(pem.encode())
    assert tls.identity_of(certificate) == ("device", name) and certificate.public_key() == key.public_key()
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature and not usage.key_cert_sign


@pytest.mark.parametrize("new_key", [False, True])
def test_a_device_renews_and_both_certificates_are_welcome(idle, tmp_path, new_key):
    """Whatever the CSR asks for: name, role and usages are those of the certificate that is shown."""

    async def body():
        key = tls.new_key() if new_key else tls.load_key(idle.devices / "alice" / "device.key")
        async with idle.channel("alice") as channel:
            stub = enroll_pb2_grpc.RenewalStub(channel)
            reply = await stub.Renew(enroll_pb2.RenewRequest(csr_pem=wanting(key)), timeout=10)
            assert (reply.name, reply.role) == ("alice", "device")
            is_a_devices(reply.certificate_pem, "alice", key)
            assert (await first_answer(channel, hello())).welcome.device == "alice"
        mine = write_identity(tmp_path, (idle.directory / "ca.pem").read_text(), reply.certificate_pem, key)
        async with grpc.aio.secure_channel(idle.address, tls.client_credentials(mine)) as channel:
            assert (await first_answer(channel, hello())).welcome.device == "alice"
            async with idle.admin() as admin:
                error = await refused(admin_pb2_grpc.AdminStub(channel).ListRuns(admin_pb2.ListRunsRequest(), timeout=10))
                assert "'alice' is a device; this needs the role operator" in error.details()
                await admin.ListRuns(admin_pb2.ListRunsRequest(), timeout=10)

    asyncio.run(body())


def test_enrollment_ignores_what_a_csr_asks_for(idle):
    """Over the wire: another name, the operator's role, a CA, a server's usages."""
    token, key = JoinToken.decode(Operator(idle.directory).token("dave", "device", 60).text), tls.new_key()

    async def body():
        roots = grpc.ssl_channel_credentials((idle.directory / "ca.pem").read_bytes())
        async with grpc.aio.secure_channel(token.enroll, roots) as channel:
            stub = enroll_pb2_grpc.EnrollmentStub(channel)
            wrong = enroll_pb2.EnrollRequest(secret=token.secret, csr_pem=wanting(key), role="operator")
            error = await refused(stub.Enroll(wrong, timeout=10))
            assert error_name(error) == "TokenError" and "for the role device: use it with `fp-client join`" in error.details()
            reply = await stub.Enroll(enroll_pb2.EnrollRequest(secret=token.secret, csr_pem=wanting(key)), timeout=10)
            assert (reply.name, reply.role) == ("dave", "device")
            is_a_devices(reply.certificate_pem, "dave", key)
            for csr, said in (("", "not a PEM CSR"), (wanting(key).replace("A", "B", 5), "not a PEM CSR")):
                error = await refused(stub.Enroll(enroll_pb2.EnrollRequest(secret=token.secret, csr_pem=csr), timeout=10))
                assert error_name(error) == "IdentityError" and said in error.details()

    asyncio.run(body())


def test_nobody_renews_for_another_and_the_enrollment_port_renews_nothing(idle):
    async def body():
        request = enroll_pb2.RenewRequest(csr_pem=wanting(tls.new_key(), "bob"))
        async with idle.channel("alice") as channel:
            reply = await enroll_pb2_grpc.RenewalStub(channel).Renew(request, timeout=10)
            assert reply.name == "alice"
            assert tls.identity_of(x509.load_pem_x509_certificate(reply.certificate_pem.encode())) == ("device", "alice")
        roots = grpc.ssl_channel_credentials((idle.directory / "ca.pem").read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{enroll_port(idle)}", roots) as channel:
            error = await refused(enroll_pb2_grpc.RenewalStub(channel).Renew(request, timeout=10))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(body())


def enroll_port(server):
    return read_endpoint(server.directory).enroll_port


def test_a_session_ends_with_its_certificate_also_when_the_device_is_silent(idle):
    """Expired in mid-session: the reason is said, and neither a call on the same connection nor a renewal gets through."""
    end = tls.check_validity(idle.identity("brief", days=BRIEF) / "device.pem").not_valid_after_utc

    async def body():
        async with idle.channel("brief") as channel:
            call = session_pb2_grpc.SessionsStub(channel).Open()
            await call.write(hello())
            assert (await read(call)).welcome.device == "brief"
            async with asyncio.timeout(BRIEF * 86_400 + SOON):
                error = await refused(read(call))
            assert datetime.now(UTC) >= end, "not before its time"
            assert error_name(error) == "IdentityError" and error.details().startswith(
                "the certificate of 'brief' has expired; join"
            )
            request = enroll_pb2.RenewRequest(csr_pem=tls.make_csr(tls.new_key(), "x"))
            error = await refused(enroll_pb2_grpc.RenewalStub(channel).Renew(request, timeout=10))
            assert error_name(error) == "IdentityError" and "'brief' has expired" in error.details()
        await idle.until(lambda seen: "brief" not in seen["connected"])

    asyncio.run(body())


def test_a_daemon_stays_welcome_when_its_first_certificate_ends(idle):
    """Device and server for real: renewed in time, and shown from the next session on; the first one ends, that one does not."""
    directory = idle.identity("faye", days=BRIEF)
    old = tls.check_validity(directory / "device.pem").serial_number

    async def body():
        renewed = asyncio.Event()

        async def tell():
            renewed.set()

        connection = Connection(directory, idle.address)
        first = await connection.open()
        watching = asyncio.create_task(stay_valid(connection, tell))
        await asyncio.wait_for(renewed.wait(), 30)
        assert tls.check_validity(directory / "device.pem").serial_number != old
        await first.finish()
        assert [said async for said in first] == []
        await first.close()
        second = await connection.open()
        listening = asyncio.create_task(anext(aiter(second)))
        await asyncio.wait([listening], timeout=BRIEF * 86_400 + 2)
        assert not listening.done(), "nothing ends it, long after the first certificate's end"
        assert "faye" in (await idle.status())["connected"] and not watching.done()
        watching.cancel()
        listening.cancel()
        await second.close()
        await connection.close()

    asyncio.run(body())


def test_a_revoked_device_can_not_renew_and_its_session_ends(idle):
    idle.identity("eve")

    async def body():
        async with idle.channel("eve") as channel:
            call = session_pb2_grpc.SessionsStub(channel).Open()
            await call.write(hello())
            await read(call)
            assert (await revoke(idle, "eve")).count == 1
            async with asyncio.timeout(SOON):
                error = await refused(read(call))
            assert error_name(error) == "IdentityError" and "certificate of 'eve' has been revoked" in error.details()
            request = enroll_pb2.RenewRequest(csr_pem=tls.make_csr(tls.new_key(), "x"))
            error = await refused(enroll_pb2_grpc.RenewalStub(channel).Renew(request, timeout=10))
            assert error_name(error) == "IdentityError" and "certificate of 'eve' has been revoked" in error.details()

    asyncio.run(body())


def test_an_operator_can_be_revoked_and_its_watch_ends(idle):
    async def body():
        async with idle.channel("boss") as channel, idle.channel("chief") as other:
            watch = admin_pb2_grpc.AdminStub(channel).WatchStatus(admin_pb2.StatusRequest())
            await watch.read()
            calm = admin_pb2_grpc.AdminStub(other).WatchStatus(admin_pb2.StatusRequest())
            await calm.read()
            assert (await revoke(idle, "boss")).count == 1
            async with asyncio.timeout(SOON):
                error = await refused(watch.read())
            assert error_name(error) == "IdentityError" and "certificate of 'boss' has been revoked" in error.details()
            error = await refused(admin_pb2_grpc.AdminStub(channel).Revoke(admin_pb2.RevokeRequest(name="alice"), timeout=10))
            assert error_name(error) == "IdentityError"
            assert not calm.done()
            calm.cancel()

    asyncio.run(body())


def test_the_last_operator_can_be_made_again_beside_the_running_server(tmp_path):
    server = Server(tmp_path / "server", ())
    server.start()
    at = ("--dir", server.directory)
    try:
        assert "revoked 1 certificate of operator" in cli("revoke", "operator", *at)
        said = cli("runs", *at, code=6)
        assert "certificate of 'operator' has been revoked" in said and "`fp-server operator --dir" in said
        assert "operator.pem: operator 'operator', valid until 20" in cli("operator", *at)
        assert "no runs yet" in cli("runs", *at)
        assert server.stop() == 0
        cli("operator", "--name", "second", *at)
        assert tls.identity_of(tls.check_validity(server.directory / "operator.pem")) == ("operator", "second")
        server.start()
        assert "no runs yet" in cli("runs", *at)
        assert "not a server directory" in cli("operator", "--dir", tmp_path / "none", code=2)
        assert "not a name" in cli("operator", "--name", "No Name", *at, code=2)
    finally:
        server.kill()


WIDE = tuple(ModuleShape(module.name, 1024, 1024) for module in MODULES)
BIG = ModelManifest("toy", "llama", 6, 1024, 64, WIDE, "ab" * 32)
"""Objects of more than a megabyte: more than gRPC takes in at once."""


def test_a_fetch_and_a_push_under_way_end_with_a_revocation(tmp_path):
    """alice has fetched half and pushed half when she is revoked; the round goes on with bob alone."""
    server = Server(tmp_path / "server")
    server.start()
    cut: list[grpc.aio.AioRpcError] = []
    attacks: list[asyncio.Task[None]] = []

    async def attack(assignment, data):
        async with server.channel("alice") as channel:
            stub = objects_pb2_grpc.ObjectsStub(channel)
            fetching = stub.Fetch(objects_pb2.FetchRequest(digest=assignment.adapter[0].ref.digest))
            await fetching.read()
            pushing = stub.Push()
            await pushing.write(objects_pb2.PushMessage(header=serde.ready_to_pb(ready_for(assignment.key, data), 0)))
            await pushing.write(objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=data[: 1 << 20])))
            await revoke(server, "alice")
            async with asyncio.timeout(SOON):
                cut.append(await refused(to_the_end(fetching)))
                cut.append(await refused(pushing))
            cut.append(await refused(fetch(channel, assignment.adapter[0].ref.digest)))
            cut.append(await refused(stub.Push()))

    async def make(assignment, device):
        data = device.honest(assignment)
        if assignment.key.round == 1:
            attacks.append(asyncio.create_task(attack(assignment, data)))
            await asyncio.Event().wait()  # until the end of the session cancels it
        return data

    async def body():
        run = await server.begin(run_toml(lora_rank=64, lora_broadcast_rank=256, final_evaluation=False), BIG)
        devices = [Device(server, name, manifest=BIG, chunk=1 << 20) for name in ("alice", "bob")]
        devices[0].make = make
        async with asyncio.timeout(60):
            results = await asyncio.gather(*(device.live() for device in devices), return_exceptions=True)
        assert error_name(results[0]) == "IdentityError" and results[1] is None
        await attacks[0]
        assert len(cut) == 4
        for error in cut:
            assert error_name(error) == "IdentityError" and "certificate of 'alice' has been revoked" in error.details()
        seen = await server.status(run)
        assert seen["state"] == "finished" and list(seen["history"][1]["weights"]) == ["bob"]

    try:
        asyncio.run(body())
    finally:
        server.kill()


async def to_the_end(call):
    while (await call.read()) is not grpc.aio.EOF:
        pass
    raise grpc.aio.AioRpcError(await call.code(), grpc.aio.Metadata(), await call.trailing_metadata(), await call.details())


def shown(server, port):
    """The certificate that the server shows to a new connection."""
    context = ssl.create_default_context(cafile=server.directory / "ca.pem")
    context.load_cert_chain(server.devices / "alice" / "device.pem", server.devices / "alice" / "device.key")
    with (
        socket.create_connection(("localhost", port), 10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as stream,
    ):
        return x509.load_der_x509_certificate(stream.getpeercert(True))


def test_the_servers_certificate_is_made_anew_without_a_restart(tmp_path):
    """For a new name, while a session and a watch go on; a pair that is not whole is not shown."""
    server = Server(tmp_path / "server")
    server.start()
    ports = (server.port, enroll_port(server))

    def names(port):
        found = shown(server, port).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return found.get_values_for_type(x509.DNSName)

    async def body():
        before = [(await asyncio.to_thread(shown, server, port)).serial_number for port in ports]
        assert before[0] == before[1]
        async with server.channel("alice") as channel, server.admin() as admin:
            call = session_pb2_grpc.SessionsStub(channel).Open()
            await call.write(hello())
            await read(call)
            watch = admin.WatchStatus(admin_pb2.StatusRequest())
            await watch.read()
            tls.write_private(server.directory / "server.pem", (server.directory / "ca.pem").read_bytes())
            assert (await asyncio.to_thread(shown, server, server.port)).serial_number == before[0]
            toml = server.directory / "server.toml"
            toml.write_text(toml.read_text().replace('"localhost"', '"moved.example"'))
            said = await asyncio.to_thread(cli, "certificate", "--dir", server.directory)
            assert "server.pem: for moved.example and this machine, valid until 20" in said
            for port in ports:
                assert await asyncio.to_thread(names, port) == ["moved.example", "localhost"]
            assert not call.done() and not watch.done()
            async with server.channel("bob") as other:  # seen over the watch that began before
                assert (await first_answer(other, hello())).welcome.device == "bob"
            override = [("grpc.ssl_target_name_override", "moved.example")]
            async with grpc.aio.secure_channel(server.address, server.credentials("bob"), override) as other:
                assert (await first_answer(other, hello())).welcome.device == "bob"
            call.cancel()
            watch.cancel()
        assert server.log().count("server.pem: renewed; shown from now on") == 1
        assert "server.pem: is not of server.key; make it anew with `fp-server certificate`; the one before" in server.log()

    try:
        asyncio.run(body())
    finally:
        server.kill()
