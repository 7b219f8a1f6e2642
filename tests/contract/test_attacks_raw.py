"""Attacks below gRPC: connections, TLS, HTTP/2 frames. Others work on meanwhile, and the server lets go of everything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections import Counter

import pytest
import raw_http2 as h
from server_side import Device, run_toml, whole_run
from siege import SLACK, Besieged, in_thread

from common.pb import session_pb2
from common.transport import serde

OPEN = "/fedpruner.v1.Sessions/Open"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
"""A call that is answered, and one that is not served."""
HELLO = session_pb2.DeviceMessage(hello=session_pb2.Hello(schema=serde.schema(), version="raw")).SerializeToString()
SOON = 30.0
"""Seconds within which the server (its waits are 2 s here) must have hung up."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    names = tuple(f"mallory-{n}" for n in range(40))
    one = Besieged(tmp_path_factory.mktemp("siege") / "server", ("alice", "bob", "mallory", *names), connections=120)
    one.attackers = iter(names)
    one.start()
    asyncio.run(one.round())  # what is loaded and allocated once
    yield one
    assert one.stop() == 0
    assert "Traceback" not in one.log()


def under(server, attack, slack=SLACK):
    async def body():
        async with server.besieged(slack):
            try:
                await in_thread(attack, server.port, server.devices / next(server.attackers))
            finally:
                h.close_all()

    asyncio.run(body())


def opened(port, identity, hello=True, settings=b""):
    """A connection with a session on stream 1."""
    stream = h.tls_connect(port, identity)
    stream.sendall(h.PREFACE + h.frame(h.SETTINGS, 0, 0, settings) + h.frame(h.HEADERS, h.END_HEADERS, 1, h.call_headers(OPEN)))
    if hello:
        stream.sendall(h.frame(h.DATA, 0, 1, h.message(HELLO)))
    return stream


@pytest.mark.parametrize(
    "begin",
    [
        lambda port, identity: h.connect(port),
        h.tls_connect,
        lambda port, identity: _after(h.tls_connect(port, identity), h.PREFACE),
        h.http2_connect,
    ],
    ids=["no TLS", "no HTTP/2", "no settings", "no call"],
)
def test_silence_is_not_waited_for(server, begin):
    def attack(port, identity):
        many = [begin(port, identity) for _ in range(30)]
        assert max(h.seconds_until_closed(one, SOON) for one in many) < SOON

    under(server, attack)


def _after(stream, data):
    stream.sendall(data)
    return stream


@pytest.mark.parametrize(
    "send",
    [
        lambda port, identity: _after(h.connect(port), os.urandom(4000)),
        lambda port, identity: _after(h.connect(port), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        lambda port, identity: _after(h.tls_connect(port, identity), os.urandom(4000)),
        lambda port, identity: _after(h.tls_connect(port, identity), h.PREFACE + os.urandom(4000)),
        lambda port, identity: _after(h.http2_connect(port, identity), h.frame(h.DATA, 0, 99, b"x" * 100)),
        lambda port, identity: _after(h.http2_connect(port, identity), h.frame(h.HEADERS, h.END_HEADERS, 1, b"\xff" * 200)),
        lambda port, identity: _after(h.http2_connect(port, identity), h.frame(h.HEADERS, 0, 1, h.call_headers(OPEN))),
    ],
    ids=["before TLS", "HTTP/1", "after TLS", "after the preface", "data of no call", "headers that are none", "half a header"],
)
def test_garbage_costs_its_connection(server, send):
    def attack(port, identity):
        for one in [send(port, identity) for _ in range(20)]:
            h.seconds_until_closed(one, SOON)

    under(server, attack)


def test_more_connections_than_there_may_be(server):
    """The limit is 120. Whoever has a connection works on; once the flood is over anyone gets one again."""

    def flood(port, identity):
        many, most = [], 0
        for _ in range(400):
            with contextlib.suppress(OSError):
                many.append(h.connect(port))
            most = max(most, server.held()[1])
        assert most < 120 + 60
        h.close_all()
        for _ in range(50):
            with contextlib.suppress(OSError):
                h.tls_connect(port, identity).close()
                return
            time.sleep(0.1)
        raise AssertionError("nobody gets in any more")

    async def body():
        before = server.held()

        async def meanwhile():
            await in_thread(flood, server.port, server.devices / "mallory")

        devices = [Device(server, "alice"), Device(server, "bob", hooks={"assigned": meanwhile})]
        status = await whole_run(server, devices, run_toml(name="flooded", rounds=1, final_evaluation=False), 60)
        assert status["history"][-1]["weights"] == {"alice": 40, "bob": 40}
        h.close_all()
        await server.recovered(before)

    asyncio.run(body())


def test_a_session_whose_hello_trickles(server):
    """A byte now and then is not a Hello in time."""

    def attack(port, identity):
        stream = opened(port, identity, hello=False)
        begin, body = time.monotonic(), h.message(HELLO)
        with contextlib.suppress(OSError):
            for at in range(len(body)):
                stream.sendall(h.frame(h.DATA, 0, 1, body[at : at + 1]))
                time.sleep(0.1)
                if time.monotonic() - begin > 3:
                    break
        _waited_in_vain(stream, "no Hello within 2 s")

    under(server, attack)


def test_a_call_whose_request_never_comes(server):
    def attack(port, identity):
        stream = h.http2_connect(port, identity)
        stream.sendall(h.frame(h.HEADERS, h.END_HEADERS, 1, h.call_headers("/fedpruner.v1.Objects/Fetch")))
        stream.sendall(h.frame(h.DATA, 0, 1, b"\0\0\x10\0\0" + b"x" * 100))
        _waited_in_vain(stream, "the request did not come within 2 s")
        stream = h.http2_connect(port, identity)
        stream.sendall(h.frame(h.HEADERS, h.END_HEADERS, 1, h.call_headers("/fedpruner.v1.Objects/Push")))
        _waited_in_vain(stream, "no header within 2 s")

    under(server, attack)


def _waited_in_vain(stream, text):
    """It is refused as one that may try again: an honest device may be frozen, or its link may stall."""
    said = _status(stream)
    assert text in said and "UnreachableError" in said, said


def _status(stream, frames=None):
    """The text of the trailers on stream 1 (HPACK: they are literals)."""
    frames = frames or h.Frames(stream)
    stream.settimeout(SOON)
    seen = b""
    while (got := frames.next()) is not None:
        kind, flags, number, payload = got
        if kind == h.HEADERS:
            seen += payload
        if number == 1 and flags & h.END_STREAM and kind in (h.DATA, h.HEADERS):
            break
    return seen.decode(errors="replace").replace("%20", " ")


def test_a_device_that_reads_nothing_is_hung_up(server):
    """With a window of 0 bytes not even the welcome gets through."""

    def attack(port, identity):
        stream = opened(port, identity, settings=b"\0\4\0\0\0\0")
        assert h.seconds_until_closed(stream, SOON) < SOON

    under(server, attack)
    assert "has read nothing for 2 s; its connection is cut" in server.log()


def test_devices_that_reset_what_is_being_written_to_them(server):
    """It breaks off when the server may be about to cut it: a call that ended, with no traceback in the operator's log."""

    def attack(port, identity):
        many = [opened(port, server.devices / f"mallory-{n}", settings=b"\0\4\0\0\0\0") for n in range(12)]
        time.sleep(1.7)
        for stream in many:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends a reset
            stream.close()
            time.sleep(0.03)

    under(server, attack)


def test_a_frozen_device_is_found_out(server):
    """A session whose peer answers no ping any more, as of a machine that was switched off."""

    def attack(port, identity):
        stream = opened(port, identity)
        stream.settimeout(SOON)
        assert h.seconds_until_closed(stream, SOON) < SOON

    under(server, attack)
    asyncio.run(server.until(lambda s: not s["connected"], 20))


def flood(stream, made, seconds=2.0, most=400_000):
    """Send the same thing for a while, reading nothing; how often it was sent before the server hung up or read no more."""
    stream.settimeout(1.0)
    begin, count = time.monotonic(), 0
    with contextlib.suppress(OSError):
        while time.monotonic() - begin < seconds and count < most:
            stream.sendall(made(count))
            count += 1
    return count


def calls(path, n):
    """Ten whole calls, the `n`th ten of a connection."""
    return b"".join(
        h.frame(h.HEADERS, h.END_HEADERS, 2 * k + 3, h.call_headers(path))
        + h.frame(h.DATA, h.END_STREAM, 2 * k + 3, h.message(b""))
        for k in range(10 * n, 10 * n + 10)
    )


FLOODS = {
    "pings": lambda n: h.frame(h.PING, 0, 0, b"\0" * 8) * 10,
    "settings": lambda n: h.frame(h.SETTINGS, 0, 0) * 10,
    "empty data": lambda n: h.frame(h.DATA, 0, 1) * 10,
    "windows": lambda n: h.frame(h.WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * 10,
    "resets": lambda n: b"".join(
        h.frame(h.HEADERS, h.END_HEADERS, 2 * k + 3, h.call_headers(OPEN)) + h.frame(h.RST_STREAM, 0, 2 * k + 3, b"\0\0\0\x08")
        for k in range(10 * n, 10 * n + 10)
    ),
    "calls": lambda n: calls(CHECK, n),
    "watches": lambda n: calls(WATCH, n),
    "no such method": lambda n: b"".join(
        h.frame(h.HEADERS, h.END_HEADERS | h.END_STREAM, 2 * k + 3, h.call_headers(f"/x/{k}")) for k in range(10 * n, 10 * n + 10)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_of_frames_slows_nobody_else(server, kind):
    def attack(port, identity):
        stream = opened(port, identity)
        assert flood(stream, FLOODS[kind]) > 0
        stream.close()

    under(server, attack)


OFFSET = "/fedpruner.v1.Objects/Offset"
EXHAUSTED = "grpc-status\x018"
"""The trailer of RESOURCE_EXHAUSTED, as HPACK has it."""


@pytest.mark.parametrize("acknowledged", [True, False])
@pytest.mark.parametrize(
    "fields",
    [[("x-large", "v" * 20_000)], [("x-large", "v" * 100_000)], [(f"x-{n}", "v" * 90) for n in range(300)]],
    ids=["20 kB", "100 kB", "many small ones"],
)
def test_a_call_with_too_many_headers_is_refused(server, fields, acknowledged):
    """gRPC knows its limit once the peer has acknowledged the server's settings; of one that does not, the gate does."""

    def attack(port, identity):
        stream = h.http2_connect(port, identity)
        frames = h.Frames(stream)
        if acknowledged:
            while frames.next()[:2] != (h.SETTINGS, 0):
                pass
            stream.sendall(h.frame(h.SETTINGS, h.ACK, 0))
        h.send_headers(stream, h.call_headers(OFFSET, tuple(fields)))
        with contextlib.suppress(OSError):  # it may be refused by then
            stream.sendall(h.frame(h.DATA, h.END_STREAM, 1, h.message(b"")))
        said = _status(stream, frames)
        assert EXHAUSTED in said and ("metadata size exceeds" in said or "a call has 16384 at most" in said)
        if acknowledged:
            assert "exceeds hard limit" in said
        elif "16384 at most" in said:
            assert h.seconds_until_closed(stream, SOON) < SOON, "and such a peer is hung up"

    under(server, attack)


def test_calls_with_16_megabytes_of_headers_each_are_not_piled_up(server):
    """As much as gRPC takes of a peer that acknowledges nothing: 60 calls were 900 MB."""

    def attack(port, identity):
        stream = h.http2_connect(port, identity)
        stream.settimeout(5)
        block = h.call_headers(OFFSET) + h.header("x-large", "v" * 15_000_000)
        peak = before = server.held()[0]
        with contextlib.suppress(OSError):
            for number in range(1, 121, 2):
                h.send_headers(stream, block, number)
                peak = max(peak, server.held()[0])
            raise AssertionError("it was never hung up")
        assert peak - before < 320 << 20, f"{(peak - before) >> 20} MiB"

    under(server, attack, 2 * SLACK)  # an allocator keeps some of these blocks of 15 MB


def test_settings_that_are_never_acknowledged(server):
    """It answers pings and has a call under way, and is hung up for this alone."""

    def attack(port, identity):
        stream = opened(port, identity)
        frames, begin = h.Frames(stream), time.monotonic()
        stream.settimeout(SOON)
        while (got := frames.next()) is not None:
            if got[:2] == (h.PING, 0):
                with contextlib.suppress(OSError):
                    stream.sendall(h.frame(h.PING, h.ACK, 0, got[3]))
        assert time.monotonic() - begin < SOON

    under(server, attack)


@pytest.mark.parametrize("small", [False, True], ids=["one large header", "many small ones"])
def test_headers_without_end(server, small):
    """220 MB of headers in one call: what is over the limit is read and dropped."""
    fields = tuple((f"x-{n}", "v" * 90) for n in range(1000)) if small else (("x-large", "v" * 100_000),)

    def attack(port, identity):
        stream = h.http2_connect(port, identity)
        first, more = h.call_headers("/fedpruner.v1.Objects/Offset"), b"".join(h.header(*field) for field in fields)
        pieces = [more[at : at + 16_000] for at in range(0, len(more), 16_000)]
        peak = before = server.held()[0]
        with contextlib.suppress(OSError):
            stream.settimeout(3)
            stream.sendall(h.frame(h.HEADERS, 0, 1, first))
            for _ in range(2400):
                for piece in pieces:
                    stream.sendall(h.frame(h.CONTINUATION, 0, 1, piece))
                peak = max(peak, server.held()[0])
        stream.close()
        assert peak - before < 128 << 20, f"the headers were kept: {(peak - before) >> 20} MiB"

    under(server, attack)


def test_many_calls_of_one_connection_are_refused_by_http2(server):
    """32 at a time; most of the others are reset before the server has looked at them."""

    def attack(port, identity):
        stream = h.http2_connect(port, identity)
        for n in range(200):
            stream.sendall(h.frame(h.HEADERS, h.END_HEADERS, 2 * n + 1, h.call_headers(OPEN)))
        frames, kinds = h.Frames(stream), Counter()
        stream.settimeout(SOON)
        while kinds[h.RST_STREAM] < 100 and (got := frames.next()) is not None:
            kinds[got[0]] += 1
        assert kinds[h.RST_STREAM] >= 100

    under(server, attack)
