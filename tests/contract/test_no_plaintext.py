"""Nothing speaks without TLS, and nothing can be configured to (docs/adr/0011)."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from pathlib import Path

import grpc
import grpc.aio
import pytest
from fake_ca import FakeCa
from fake_server import serving
from server_side import Server
from test_bad_access import refused

from common import config as configuration
from common.errors import ConfigError, UnreachableError
from common.pb import admin_pb2, admin_pb2_grpc, enroll_pb2, enroll_pb2_grpc
from fp_client.config import load_config
from fp_client.policy import load_policy
from fp_client.rpc import Connection
from fp_server.config import ServerConfig
from fp_server.health import read_endpoint
from fp_server.operator import OperatorConfig

ROOT = Path(__file__).parents[2]
INSECURE = re.compile(
    r"insecure|LocalConnection|local_(server|channel)_credentials|alts_|CERT_NONE|check_hostname|_create_unverified"
)


def test_no_code_has_a_way_around_tls():
    found = []
    for package in ("common", "fp_server", "fp_client", "fp_lab", "examples"):
        for path in (ROOT / package).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if INSECURE.search(line) and "/pb/" not in str(path):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize("key", ["tls", "mtls", "insecure", "plaintext", "verify", "ca", "authentication"])
def test_no_file_has_a_key_for_it(tmp_path, key):
    line = f"{key} = false\n"
    with pytest.raises(ConfigError, match=f"{key}: unknown key"):
        configuration.parse('names = ["localhost"]\n' + line, ServerConfig, "server.toml")
    with pytest.raises(ConfigError, match=f"{key}: unknown key"):
        configuration.parse('server = "localhost:1"\n' + line, OperatorConfig, "operator.toml")
    (tmp_path / "client.toml").write_text('server = "localhost:1"\n' + line)
    with pytest.raises(ConfigError, match=f"{key}: unknown key"):
        load_config(tmp_path)
    (tmp_path / "policy.toml").write_text(line)
    with pytest.raises(ConfigError, match=f"{key}: unknown key"):
        load_policy(tmp_path)


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("plain") / "server")
    server.start()
    yield server
    assert server.stop() == 0


def test_a_server_says_nothing_in_plaintext(idle):
    """HTTP/2 and HTTP/1 without TLS, on both ports, on loopback."""
    ports = (idle.port, read_endpoint(idle.directory).enroll_port)
    for port in ports:
        for said in (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        ):
            with socket.create_connection(("localhost", port), 10) as raw:
                raw.sendall(said)
                answer = b""
                try:
                    while piece := raw.recv(4096):
                        answer += piece
                except ConnectionResetError:
                    pass
            assert not answer or answer[0] == 0x15, answer  # nothing, or a TLS alert

    async def body():
        for port in ports:
            async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
                for call in (
                    admin_pb2_grpc.AdminStub(channel).ListRuns(admin_pb2.ListRunsRequest(), timeout=5),
                    enroll_pb2_grpc.EnrollmentStub(channel).GetCa(enroll_pb2.GetCaRequest(), timeout=5),
                ):
                    error = await refused(call)
                    assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        assert (await idle.status())["connected"] == []

    asyncio.run(body())


def test_a_device_says_nothing_to_a_server_without_tls(tmp_path):
    """A server that speaks plain HTTP/2 gets a TLS hello and nothing else."""
    heard = []

    async def body():
        async def plain(reader, writer):
            writer.write(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")  # HTTP/2 settings
            heard.append(await reader.read(65536))
            writer.close()

        FakeCa.make().join(tmp_path)
        server = await asyncio.start_server(plain, "localhost", 0)
        async with server:
            connection = Connection(tmp_path, f"localhost:{server.sockets[0].getsockname()[1]}")
            with pytest.raises(Exception, match=r"can't be reached|handshake"):
                await connection.open()
            await connection.close()

    asyncio.run(body())
    assert heard and all(said[:1] == b"\x16" for said in heard if said)


def test_a_server_whose_certificate_is_not_of_the_devices_ca_is_told_nothing(tmp_path):
    async def body():
        async with serving() as server:
            FakeCa.make().join(tmp_path)
            connection = Connection(tmp_path, server.address)
            for _ in range(2):
                with pytest.raises(Exception, match=r"can't be reached|can't be verified") as caught:
                    await connection.open()
                assert isinstance(caught.value, UnreachableError), "whoever this is, the server may be there later"
            assert "the server's certificate can't be verified" in str(caught.value)
            assert server.sessions.schemas == []
            await connection.close()

    asyncio.run(body())


def test_environment_variables_of_grpc_do_not_change_whom_a_device_trusts(tmp_path, monkeypatch):
    """GRPC_DEFAULT_SSL_ROOTS_FILE_PATH is for channels without roots of their own."""

    async def body():
        async with serving() as server:
            (tmp_path / "roots.pem").write_bytes(server.ca.pem)
            monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(tmp_path / "roots.pem"))
            FakeCa.make().join(tmp_path)
            connection = Connection(tmp_path, server.address)
            with pytest.raises(Exception, match="can't be verified"):
                await connection.open()
            assert server.sessions.schemas == []
            await connection.close()

    asyncio.run(body())


def test_the_configuration_that_init_writes_has_no_such_key(idle):
    text = (idle.directory / "server.toml").read_text()
    assert set(re.findall(r"(?m)^(\w+) =", text)) == {"names", "listen", "port", "enroll_port"}
    assert json.dumps("localhost") in text
