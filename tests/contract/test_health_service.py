"""The health service of both ports: it answers, and nobody who asks can stay, or keep the server from stopping."""

from __future__ import annotations

import asyncio
import signal
import time

import grpc
import grpc.aio
import pytest
import raw_http2 as h
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_side import hello, read

from common.pb import session_pb2_grpc
from common.transport import tls
from fp_server.health import read_endpoint

WATCH = "/grpc.health.v1.Health/Watch"
UNIMPLEMENTED = b"grpc-status\x0212"
"""The trailer, as HPACK has it."""
SOON = 20.0
"""Seconds that nothing here needs, on a busy machine either."""


def stubs(server, stack):
    """The health service of the main port, to a device and to an operator, and of the enrollment port, to anyone."""
    anyone = grpc.ssl_channel_credentials((server.directory / "ca.pem").read_bytes())
    enroll = f"localhost:{read_endpoint(server.directory).enroll_port}"
    for address, credentials in (
        (server.address, server.credentials("alice")),
        (server.address, tls.client_credentials(server.directory, "operator")),
        (enroll, anyone),
    ):
        channel = grpc.aio.secure_channel(address, credentials)
        stack.append(channel)
        yield health_pb2_grpc.HealthStub(channel)


async def code(call):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code()


def test_it_is_asked_and_not_watched(server):
    async def body():
        channels = []
        for stub in stubs(server, channels):
            reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=SOON)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            unknown = health_pb2.HealthCheckRequest(service="fedpruner.v1.Sessions")
            assert await code(stub.Check(unknown, timeout=SOON)) is grpc.StatusCode.NOT_FOUND
            for name in ("", "fedpruner.v1.Sessions"):
                watch = stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=SOON)
                assert await code(watch.read()) is grpc.StatusCode.UNIMPLEMENTED
        for channel in channels:
            await channel.close()

    asyncio.run(body())
    assert server.stop() == 0
    assert "Traceback" not in server.log() and "rror" not in server.log(), server.log()


def watch_and_read_nothing(port, identity):
    """A connection on whose calls the server may send no byte of data, and what it sends instead: (connection, its frames)."""
    stream = h.tls_connect(port, identity)
    stream.sendall(h.PREFACE + h.frame(h.SETTINGS, 0, 0, b"\0\4\0\0\0\0") + h.frame(h.SETTINGS, h.ACK, 0))
    stream.sendall(h.frame(h.HEADERS, h.END_HEADERS, 1, h.call_headers(WATCH)))
    stream.sendall(h.frame(h.DATA, h.END_STREAM, 1, h.message(b"")))
    stream.settimeout(SOON)
    return stream, h.Frames(stream)


def ended_with(frames):
    """The headers of stream 1, up to its end."""
    seen = b""
    while (got := frames.next()) is not None:
        kind, flags, number, payload = got
        if number == 1 and kind == h.HEADERS:
            seen += payload
            if flags & h.END_STREAM:
                break
    return seen


def answer_pings(stream, frames):
    """Until the server hangs up: it asks once before it does."""
    while (got := frames.next()) is not None:
        if got[:2] == (h.PING, 0):
            stream.sendall(h.frame(h.PING, h.ACK, 0, got[3]))


def test_who_reads_nothing_does_not_keep_the_server_from_draining(server):
    """With a window of 0 bytes, and on the enrollment port without a certificate."""

    async def body():
        at = read_endpoint(server.directory)
        raw = [
            await asyncio.to_thread(watch_and_read_nothing, port, identity)
            for port, identity in ((at.enroll_port, server.directory), (at.port, server.devices / "bob"))
            for _ in range(3)
        ]
        async with server.channel("alice") as channel, asyncio.timeout(60):
            session = session_pb2_grpc.SessionsStub(channel).Open()
            await session.write(hello())
            await read(session)
            for _, frames in raw:
                assert UNIMPLEMENTED in await asyncio.to_thread(ended_with, frames)
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            answering = [asyncio.create_task(asyncio.to_thread(answer_pings, *one)) for one in raw]
            assert await session.code() is grpc.StatusCode.UNAVAILABLE
            assert await session.details() == "the server is stopping; try again later"
            assert await asyncio.to_thread(server.process.wait, 30) == 0
            took = time.monotonic() - begin
            await asyncio.wait(answering)
        return took

    try:
        took = asyncio.run(body())
    finally:
        h.close_all()
    log = server.log()
    assert took < 7.5 and "stopped" in log and "was left after" not in log and "Traceback" not in log, (took, log)
