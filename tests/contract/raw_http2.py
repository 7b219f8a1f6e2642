"""A peer that breaks the rules: TLS and HTTP/2 frames by hand, for what no gRPC library would send."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1

_opened: list[socket.socket] = []


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _integer(value: int, bits: int) -> bytes:
    most = (1 << bits) - 1
    if value < most:
        return bytes((value,))
    out, value = bytearray((most,)), value - most
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes((*out, value))


def header(name: str, value: str) -> bytes:
    """One header, literal and never indexed (RFC 7541, section 6.2.2)."""
    raw, text = name.encode(), value.encode()
    return b"\0" + _integer(len(raw), 7) + raw + _integer(len(text), 7) + text


def call_headers(path: str, extra: tuple[tuple[str, str], ...] = ()) -> bytes:
    """The header block of a gRPC call."""
    fields = (
        (":method", "POST"), (":scheme", "https"), (":path", path), (":authority", "localhost"),
        ("te", "trailers"), ("content-type", "application/grpc"), *extra,
    )  # fmt: skip
    return b"".join(header(name, value) for name, value in fields)


def message(body: bytes) -> bytes:
    """A gRPC message, uncompressed."""
    return struct.pack(">BI", 0, len(body)) + body


def connect(port: int, timeout: float = 10.0) -> socket.socket:
    """A plain TCP connection, without delays of its own."""
    raw = socket.create_connection(("127.0.0.1", port), timeout)
    _opened.append(raw)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return raw


def tls_connect(port: int, identity: Path, timeout: float = 10.0) -> ssl.SSLSocket:
    """A connection after its TLS handshake, with the certificate of a device's directory."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(identity / "ca.pem")
    if (identity / "device.pem").exists():
        context.load_cert_chain(identity / "device.pem", identity / "device.key")
    stream = context.wrap_socket(connect(port, timeout), server_hostname="localhost")
    _opened.append(stream)
    return stream


def close_all() -> None:
    """Close whatever was opened here."""
    while _opened:
        _opened.pop().close()


def http2_connect(port: int, identity: Path, timeout: float = 10.0) -> ssl.SSLSocket:
    """A connection that has said its preface and its (empty) settings."""
    stream = tls_connect(port, identity, timeout)
    stream.sendall(PREFACE + frame(SETTINGS, 0, 0))
    return stream


def send_headers(stream: socket.socket, block: bytes, number: int = 1) -> None:
    """A header block in as many frames as it needs."""
    pieces = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
    for n, piece in enumerate(pieces):
        flags = END_HEADERS if n == len(pieces) - 1 else 0
        stream.sendall(frame(CONTINUATION if n else HEADERS, flags, number, piece))


class Frames:
    """The frames that arrive on a connection."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream, self._buffer = stream, b""

    def next(self) -> tuple[int, int, int, bytes] | None:
        """(kind, flags, stream, payload), or None when the peer has hung up."""
        while len(self._buffer) < 9 or len(self._buffer) < 9 + int.from_bytes(self._buffer[:3], "big"):
            try:
                got = self._stream.recv(65536)
            except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
                got = b""
            if not got:
                return None
            self._buffer += got
        length = int.from_bytes(self._buffer[:3], "big")
        kind, flags = self._buffer[3], self._buffer[4]
        number = int.from_bytes(self._buffer[5:9], "big") & 0x7FFFFFFF
        payload, self._buffer = self._buffer[9 : 9 + length], self._buffer[9 + length :]
        return kind, flags, number, payload


def seconds_until_closed(stream: socket.socket, limit: float) -> float:
    """How long the server keeps a connection on which nothing more is said; fails after `limit` seconds."""
    begin = time.monotonic()
    stream.settimeout(limit)
    try:
        while stream.recv(65536):
            pass
    except TimeoutError:
        raise AssertionError(f"still open after {limit:.0f} s") from None
    except OSError:
        pass
    return time.monotonic() - begin
