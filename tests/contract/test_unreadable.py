"""Answers whose bytes are no message: `grpc.aio` hands over None for them. Every client of ours says so, and no daemon ends."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest
from fake_ca import KEY_KIND, NAMES, VERSION, FakeCa
from fake_server import FakeEnrollment, FakeObjects, FakeRenewal, FakeSessions, serving
from test_agent import Device, against, assignment, probe_task
from test_join import QUICK
from test_rpc import update, with_server

from common.errors import FedPrunerError, IdentityError, ProtocolError
from common.pb import admin_pb2
from common.transport import tls
from common.types import ObjectRef, UnitObject
from fp_client import renewal
from fp_client.commands_doctor import Doctor
from fp_client.config import ClientConfig
from fp_client.enroll import join
from fp_client.rpc import Connection
from fp_client.rpc_objects import Transfer
from fp_server import health
from fp_server.operator import FILE, Operator

GARBAGE = b"\xff\xff\xff"


async def garbage(self, request, context):
    return GARBAGE


async def piece_of_garbage(self, request, context):
    yield GARBAGE


def test_a_daemon_survives_messages_that_can_not_be_read(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.until(lambda: server.sessions.opened == 1)
            for count in (2, 3):
                await server.sessions.tell.put(GARBAGE)
                await device.until(lambda wanted=count: server.sessions.opened == wanted)
            await device.joins()
            assert not device.running.done()

    against(tmp_path, body)


def test_a_session_names_what_could_not_be_read_and_from_whom(tmp_path):
    async def body(server, connection):
        session = await connection.open()
        await server.sessions.tell.put(GARBAGE)
        with pytest.raises(ProtocolError, match=f"{server.address}: the server's message can't be read"):
            async for _ in session:
                pass
        await session.close()

    with_server(tmp_path, body)


def test_a_welcome_that_can_not_be_read_is_waited_out(tmp_path, monkeypatch):
    whole, asked = FakeSessions.Open, []

    async def first_garbage(self, requests, context):
        asked.append(1)
        if len(asked) <= 2:
            yield GARBAGE
            return
        async for message in whole(self, requests, context):
            yield message

    monkeypatch.setattr(FakeSessions, "Open", first_garbage)

    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            assert len(asked) == 3 and not device.running.done()

    against(tmp_path, body)


@pytest.mark.parametrize(("method", "what"), [("Offset", "answer about an update's offset"), ("Push", "answer to a push")])
def test_a_push_names_the_answer_that_could_not_be_read(tmp_path, monkeypatch, method, what):
    monkeypatch.setattr(FakeObjects, method, garbage)

    async def body(server, connection):
        with pytest.raises(ProtocolError, match=f"{server.address}: the server's {what} can't be read"):
            await Transfer(connection).push(*update(tmp_path, 5000))

    with_server(tmp_path, body)


def test_a_task_whose_object_can_not_be_read_fails_and_the_daemon_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeObjects, "Fetch", piece_of_garbage)
    monkeypatch.setattr(FakeObjects, "Offset", garbage)

    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            await device.hears("probe", probe_task((UnitObject(1, ObjectRef("ab" * 32, 100)),)))
            failed = await server.sessions.next("failed")
            assert failed.error == "ProtocolError" and "piece of object abababababab can't be read" in failed.message
            await device.hears("assignment", assignment())
            failed = await server.sessions.next("failed")
            assert failed.error == "ProtocolError" and "offset can't be read" in failed.message
            assert not device.running.done()

    against(tmp_path, body)


@pytest.mark.parametrize(("method", "what"), [("GetCa", "CA certificate"), ("Enroll", "certificate")])
def test_joining_names_what_could_not_be_read(tmp_path, monkeypatch, method, what):
    monkeypatch.setattr(FakeEnrollment, method, garbage)

    async def main():
        async with serving() as server:
            with pytest.raises(ProtocolError, match=f"localhost:{server.enroll_port}: the server's {what} can't be read"):
                await join(server.token(), tmp_path / "d", QUICK)
        assert not (tmp_path / "d" / "device.pem").exists()

    asyncio.run(main())


def test_a_ca_no_library_would_make_is_refused(tmp_path):
    """Whoever answers at the enrollment port is not known yet."""

    async def main():
        real = FakeCa.make()
        shown = SimpleNamespace(pem=real.altered(real.pem, *VERSION))
        async with serving(real, shown_ca=shown) as server:
            with pytest.raises(IdentityError, match="the server's CA certificate: is of version 7, which is unknown"):
                await join(server.token(), tmp_path / "d", QUICK)

    asyncio.run(main())


CASES = [
    (VERSION, ProtocolError, r"no certificate of its CA \(InvalidVersion\)"),
    (KEY_KIND, ProtocolError, r"no certificate of its CA \(UnsupportedAlgorithm\)"),
    (NAMES, IdentityError, r"the certificate's extensions can't be read \(DuplicateExtension\)"),
]


@pytest.mark.parametrize(("alter", "kind", "said"), CASES)
def test_a_certificate_no_library_would_make_is_not_kept(tmp_path, alter, kind, said):
    async def main():
        async with serving() as server:
            ca, honest = server.ca, server.ca.device
            server.ca.join(tmp_path / "joined")
            before = (tmp_path / "joined" / "device.pem").read_bytes()
            ca.device = lambda *args, **extra: ca.altered(honest(*args, **extra), *alter)
            with pytest.raises(kind, match=said):
                await join(server.token(), tmp_path / "new", QUICK)
            assert not (tmp_path / "new" / "device.pem").exists()
            connection = Connection(tmp_path / "joined", server.address, QUICK)
            with pytest.raises(kind, match=said):
                await renewal.renew(connection)
            await connection.close()
            assert (tmp_path / "joined" / "device.pem").read_bytes() == before

    asyncio.run(main())


def test_a_certificate_for_another_role_is_not_kept(tmp_path):
    async def main():
        async with serving() as server:
            honest = server.ca.device
            server.ca.device = lambda name, key: honest(name, key, role="operator")
            with pytest.raises(ProtocolError, match="certificate is for operator/alice, asked was a device's"):
                await join(server.token(), tmp_path / "d", QUICK)
        assert not (tmp_path / "d" / "device.pem").exists()

    asyncio.run(main())


def test_a_renewal_that_can_not_be_read_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeRenewal, "Renew", garbage)

    async def body(server):
        connection = Connection(tmp_path, server.address, QUICK)
        with pytest.raises(ProtocolError, match="renewal: the server's certificate can't be read"):
            await renewal.renew(connection)
        await connection.close()

    against(tmp_path, body)


@contextlib.contextmanager
def answering(ca, answer, stream=False):
    """A server that answers every call with these bytes; its port."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            if stream:
                return grpc.unary_stream_rpc_method_handler(lambda request, context: iter(answer))
            return grpc.unary_unary_rpc_method_handler(lambda request, context: answer)

    certificate, key = ca.server()
    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handler()])
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(key, certificate)], ca.pem, True))
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def an_operator(ca, directory, port):
    key = tls.new_key()
    directory.mkdir(exist_ok=True)
    (directory / FILE).write_text(f'server = "localhost:{port}"\n')
    (directory / "ca.pem").write_bytes(ca.pem)
    tls.write_private(directory / "operator.key", tls.key_pem(key))
    (directory / "operator.pem").write_bytes(ca.device("op", key.public_key(), "operator"))
    return Operator(directory)


def watched(operator):
    async def first():
        return await anext(operator.watch(""))

    return asyncio.run(first())


CALLS = {
    "start": (lambda o, at: o.control("run", "pause"), False),
    "runs": (lambda o, at: o.runs(), False),
    "status": (lambda o, at: o.status(""), False),
    "token": (lambda o, at: o.token("a", "device", 60), False),
    "revoke": (lambda o, at: o.revoke("a"), False),
    "audit": (lambda o, at: o.audit(), True),
    "ledger": (lambda o, at: o.ledger("", at), True),
    "watch": (lambda o, at: watched(o), True),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_is_told_what_could_not_be_read(tmp_path, name):
    ca, (call, stream) = FakeCa.make(), CALLS[name]
    with answering(ca, [GARBAGE] if stream else GARBAGE, stream) as port:
        operator = an_operator(ca, tmp_path, port)
        with pytest.raises(ProtocolError, match=f"localhost:{port}: the server's .* can't be read"):
            call(operator, tmp_path)


STATUS = '{"run": "r", "state": "training", "history": [], "history_first": 9, "history_total": 9}'
WORDS = [
    ("runs", "{", "no JSON"), ("runs", "[" * 100_000, "no JSON"), ("runs", "{}", "no list of"), ("runs", "[1]", "no list of"),
    ("status", "[]", "lacks something"), ("status", '{"run": "r", "state": "x"}', "lacks something"),
    ("status", STATUS, "0 entries of the history came"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "said"), WORDS)
def test_an_operator_is_told_of_json_that_is_none_or_something_else(tmp_path, name, text, said):
    ca = FakeCa.make()
    kind = admin_pb2.ListRunsReply if name == "runs" else admin_pb2.Status
    with answering(ca, kind(json=text).SerializeToString()) as port:
        operator = an_operator(ca, tmp_path, port)
        with pytest.raises(ProtocolError, match=said):
            operator.runs() if name == "runs" else operator.status("", 20)


@pytest.mark.parametrize(("parts", "said"), [([], "ended the ledger"), ([b""], "not a model manifest")])
def test_a_ledger_that_ends_too_soon(tmp_path, parts, said):
    ca = FakeCa.make()
    with answering(ca, parts, stream=True) as port, pytest.raises(FedPrunerError, match=said):
        an_operator(ca, tmp_path, port).ledger("", tmp_path)


@pytest.mark.parametrize(("answer", "said"), [(GARBAGE, "deserializing"), (b"\x08\x63", "state 99, which has no name")])
def test_a_health_check_says_what_it_can_not_read(tmp_path, answer, said):
    """The server's own check waits in a blocking call, where gRPC makes an error of it."""
    ca = FakeCa.make()
    with answering(ca, answer) as port:
        an_operator(ca, tmp_path, port)
        with pytest.raises(FedPrunerError, match=said):
            health._ask(f"localhost:{port}", tls.client_credentials(tmp_path, "operator"), 5.0)
        ca.join(tmp_path / "device")
        doctor = Doctor(tmp_path / "device", 0, True)
        doctor.config = ClientConfig(server=f"localhost:{port}")
        if answer == GARBAGE:
            with pytest.raises(ProtocolError, match="the server's health can't be read"):
                asyncio.run(doctor._server())
        else:
            assert said in asyncio.run(doctor._server())
