"""Buckets, quotas, descriptors and log lines: what bounds a peer, without a peer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys

import pytest

from common.bucket import Bucket, Buckets
from common.errors import BY_NAME, LimitError, StorageError
from common.logs import OneLine
from fp_server.commands import SendEnded
from fp_server.hangup import address_of, hang_up
from fp_server.limits import OUTBOX, Complaints, ServerLimits
from fp_server.quota import Quota
from fp_server.sessions import Session


def test_who_would_wait_too_long_is_not_counted():
    bucket = Bucket(2.0, 4.0)
    assert [bucket.take(10.0, 1.0) for _ in range(6)] == [0.0, 0.0, 0.0, 0.0, 0.5, 1.0]
    assert [bucket.take(10.0, 1.0) for _ in range(100)] == [1.5] * 100, "refusals are no debt"
    assert bucket.take(10.5, 1.0) == 1.0


def test_buckets_of_strangers_are_bounded():
    buckets = Buckets(1.0, 1.0, most=10)
    for n in range(1000):
        assert buckets.allow(f"stranger-{n}", 5.0)
    assert len(buckets) == 10
    assert not buckets.allow("stranger-999", 5.0), "the last ones are remembered"


def test_complaints_are_few_and_say_how_many_were_left_out(caplog):
    now = [0.0]
    complaints = Complaints(lambda: now[0])
    with caplog.at_level(logging.WARNING, "fp_server"):
        for _ in range(1000):
            complaints.say("mallory", "mallory calls too often")
        now[0] = 100.0
        complaints.say("mallory", "mallory calls too often")
        for n in range(1000):
            complaints.say(f"mallory-{n}", "and others")
    said = [record.getMessage() for record in caplog.records]
    assert said[:4] == ["mallory calls too often"] * 3 + ["mallory calls too often (997 more such lines were left out)"]
    assert len(said) < 30


def test_a_log_line_is_one_line():
    record = logging.LogRecord("x", logging.INFO, "x", 1, "device %s", ("a\n2026-01-01 I device b connected\x1b[31m ключ",), None)
    assert OneLine("%(message)s").format(record) == "device a\\n2026-01-01 I device b connected\\x1b[31m ключ"


def test_a_device_that_leaves_messages_unread_is_hung_up():
    async def body():
        session = Session("alice")
        for _ in range(1000):
            session.say(SendEnded("alice", "r", "stopped"))
        assert session.outbox.qsize() == OUTBOX + 1 and f"{OUTBOX} messages unread" in session.reason

    asyncio.run(body())


def test_the_quota_counts_what_is_there_and_what_was_announced(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "part").write_bytes(b"x" * 400)
    quota = Quota(tmp_path, ServerLimits(arrival_bytes=1000, disk_reserve_bytes=0))

    async def body():
        async with quota.held("alice", 500):
            with pytest.raises(LimitError, match=r"take 1101 bytes, and server.toml allows 1000 bytes \(limits.arrival_bytes\)"):
                async with quota.held("bob", 201):
                    pass
            async with quota.held("bob", 100), quota.held("old", 400):
                pass
        async with quota.held("bob", 600):
            pass

    asyncio.run(body())


def test_the_last_of_the_disk_is_kept(tmp_path):
    quota = Quota(tmp_path, ServerLimits(arrival_bytes=1 << 62, disk_reserve_bytes=1 << 60))

    async def body():
        async with quota.held("alice", 1):
            pass

    with pytest.raises(StorageError, match=r"the server keeps 1099511627776\.0 MiB for its log"):
        asyncio.run(body())


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:443", ("192.0.2.1", 443)),
        ("ipv6:%5B2001:db8::1%5D:443", ("2001:db8::1", 443)),
        ("ipv6:[::ffff:192.0.2.1]:443", ("192.0.2.1", 443)),
        ("unix:/tmp/x", None),
        ("", None),
    ],
)
def test_a_peer_as_grpc_names_it(peer, address):
    assert address_of(peer) == address


def test_a_connection_can_be_cut_by_its_peer():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        with socket.create_connection(listening.getsockname()) as client, listening.accept()[0]:
            assert hang_up(client.getsockname())
            assert client.recv(1) == b""
        assert not hang_up(("192.0.2.1", 1))


def test_only_the_connection_to_the_port_that_is_meant_is_cut():
    """One port of the peer's may be that of two connections, to different ports here."""
    with contextlib.ExitStack() as stack:
        sides = []
        for _ in range(2):
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            client.bind(sides[0][1].getsockname() if sides else ("127.0.0.1", 0))
            client.connect(listening.getsockname())
            stack.enter_context(listening.accept()[0])
            sides.append((listening.getsockname()[1], client))
        (first, one), (second, other) = sides
        assert one.getsockname() == other.getsockname() and first != second
        assert not hang_up(one.getsockname(), 1)
        assert hang_up(other.getsockname(), second)
        assert other.recv(1) == b""
        one.setblocking(False)
        with pytest.raises(BlockingIOError):
            one.recv(1)


def test_of_two_connections_from_one_port_to_one_port_none_is_left():
    """To two addresses of this machine: gRPC does not say which of them it means."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
        clients = []
        for host in ("127.0.0.1", "127.0.0.2"):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(clients[0].getsockname() if clients else ("127.0.0.1", 0))
            client.connect((host, listening.getsockname()[1]))
            stack.enter_context(listening.accept()[0])
            clients.append(client)
        assert hang_up(clients[0].getsockname(), listening.getsockname()[1])
        assert [client.recv(1) for client in clients] == [b"", b""]


def test_the_limit_of_open_files_is_raised_and_said():
    code = (
        "import logging, resource; logging.basicConfig(level=logging.INFO)\n"
        "from fp_server.limits import ServerLimits, raise_descriptors\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1000))\n"
        "print(raise_descriptors(ServerLimits()), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["296", "1000"]
    assert "up to 1000 open files: room for 296 connections and 296 devices at a time" in done.stderr
    assert "limits.connections is 4096, and the limit of open files (1000) leaves room for 296" in done.stderr


def test_the_error_is_in_the_tree():
    assert BY_NAME["LimitError"].exit_code == 14 and LimitError.status == "RESOURCE_EXHAUSTED"
