"""What `diagnose` makes of a server that closes connections: refused, or merely away?"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp_client.rpc import diagnose
from fp_server.app import initialise

SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a CA, a server's certificate, and the operator's as if it were a device's."""
    directory = tmp_path_factory.mktemp("d") / "server"
    initialise(directory, ["localhost"], "127.0.0.1", 0, 0)
    for suffix in ("pem", "key"):
        (directory / f"device.{suffix}").write_bytes((directory / f"operator.{suffix}").read_bytes())
    return directory


@contextlib.contextmanager
def behaving(directory: Path, script: list[str]) -> Iterator[tuple[str, list[str]]]:
    """A TLS server that treats one connection after the other as the script says, and is gone after the last."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(directory / "server.pem", directory / "server.key")
    listener, done = socket.create_server(("127.0.0.1", 0)), []

    def serve() -> None:
        with listener:
            for act in script:
                raw, _ = listener.accept()
                with contextlib.suppress(OSError), raw:
                    if act == "alert":
                        raw.sendall(bytes.fromhex("15030300020228"))  # handshake_failure, as anybody may say it
                    elif act != "cut in the handshake":
                        with context.wrap_socket(raw, server_side=True) as stream:
                            if act == "accept":
                                stream.sendall(SETTINGS)
                            elif act == "reset":
                                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    else:
                        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                done.append(act)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"localhost:{listener.getsockname()[1]}", done
    finally:
        thread.join(5)


@pytest.mark.parametrize(
    ("script", "refused"),
    [
        (["close"], False),  # killed after the handshake: nobody listens a moment later
        (["close", "close"], False),
        (["reset"], False),
        (["close", "accept"], False),  # killed, and started again
        (["cut in the handshake"], False),  # a forwarder whose server is away
        (["accept"], False),
        (["alert"], False),
        (["close", "close", "close"], True),
        (["reset", "close", "close"], True),
    ],
)
def test_only_who_refuses_every_time_refuses(identities: Path, script: list[str], refused: bool) -> None:
    with behaving(identities, script) as (address, done):
        verdict = diagnose(identities, address, pauses=(0.05, 0.05))
    assert done == script
    assert (verdict is not None) == refused
    if verdict is not None:
        assert "refuses this device's certificate" in str(verdict)


def test_a_forwarder_that_stays_without_its_server_is_waited_for(identities: Path) -> None:
    with behaving(identities, ["cut in the handshake"] * 3) as (address, done):
        assert [diagnose(identities, address, pauses=(0.05, 0.05)) for _ in range(3)] == [None] * 3
    assert len(done) == 3
