"""SIGTERM: what is being written is finished, who is connected is told, and the process ends within its grace, with 0."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time

import grpc
import pytest
from server_side import Server, hello, read

from common.errors import ConfigError, UnreachableError
from common.pb import admin_pb2, session_pb2_grpc
from fp_server import health


def signalled(server: Server) -> float:
    """SIGTERM; seconds until the server has ended with 0."""
    begin = time.monotonic()
    assert server.stop() == 0, server.log()
    return time.monotonic() - begin


def test_watchers_and_sessions_are_told_and_do_not_hold_the_server_up(server: Server) -> None:
    """Waiting for them, it would take the whole grace of 8 seconds."""

    async def body() -> tuple[float, list[str]]:
        said = []
        async with server.channel("alice") as channel, server.admin() as admin, asyncio.timeout(60):
            session = session_pb2_grpc.SessionsStub(channel).Open()
            await session.write(hello())
            await read(session)
            watch = admin.WatchStatus(admin_pb2.StatusRequest())
            await watch.read()
            took = await asyncio.to_thread(signalled, server)
            for call in (session, watch):
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    while await call.read() is not grpc.aio.EOF:
                        pass
                    raise grpc.aio.AioRpcError(await call.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), await call.details())
                said.append(ended.value.details())
        return took, said

    took, said = asyncio.run(body())
    assert said == ["the server is stopping; try again later"] * 2
    assert "stopping: what is being received or aggregated has 7 s" in server.log() and "stopped" in server.log()
    assert took < 7, "the grace was waited for, and nothing was under way"


def test_a_session_that_never_says_hello_costs_no_more_than_the_grace(tmp_path) -> None:
    server = Server(tmp_path / "server")
    with (server.directory / "server.toml").open("a") as file:
        file.write("grace_seconds = 3\n")
    server.start()

    async def body() -> None:
        async with server.channel("alice") as channel, asyncio.timeout(60):
            call = session_pb2_grpc.SessionsStub(channel).Open()
            await asyncio.sleep(0.5)
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.process.wait) == 0
            assert time.monotonic() - begin < 3 + 5, "much longer than the grace, even on a busy machine"
            call.cancel()

    asyncio.run(body())
    assert "Traceback" not in server.log(), server.log()


@pytest.mark.parametrize("program", ["fp_server", "fp_client"])
def test_sigterm_before_anything_is_under_way_ends_with_0_too(tmp_path, program: str) -> None:
    """As process 1 of a container, without a handler it would not even be delivered."""
    code = (
        f"import os, signal, {program}.cli as c; c.leave_on_sigterm(); os.kill(os.getpid(), signal.SIGTERM); raise SystemExit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_thread_that_computes_on_does_not_keep_the_process(tmp_path) -> None:
    code = (
        "import logging, threading, time; from common.ending import end_within\n"
        "logging.basicConfig(); end_within(0.3); threading.Thread(target=time.sleep, args=(600,)).start()"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "it is taken up again at the next start" in done.stderr


def test_health_tells_a_server_that_serves_from_one_that_does_not(server: Server) -> None:
    at = health.check(server.directory)
    assert at.port == server.port and at.host == "127.0.0.1"
    done = subprocess.run(
        [sys.executable, "-m", "fp_server.health", server.directory], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and done.stdout == f"serving on port {at.port} (enrollment on {at.enroll_port})\n"
    assert server.stop() == 0
    with pytest.raises(UnreachableError, match=f"127.0.0.1:{at.port}: can't be reached"):
        health.check(server.directory)
    done = subprocess.run(
        [sys.executable, "-m", "fp_server.health", server.directory], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and done.stdout.startswith("unhealthy: ") and "Traceback" not in done.stderr


def test_health_of_a_directory_where_no_server_has_run(tmp_path) -> None:
    with pytest.raises(ConfigError, match="fp-server run --dir"):
        health.check(tmp_path)
