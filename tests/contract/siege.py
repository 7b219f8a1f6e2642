"""A real server under attack: its waits shortened, its memory and descriptors watched, two honest devices at work meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from server_side import Device, Server, error_name, run_toml, whole_run

from common.pb import admin_pb2

WAITS = {"HANDSHAKE_SECONDS": 2.0, "HELLO_SECONDS": 2.0, "IDLE_SECONDS": 2.0, "WRITE_SECONDS": 2.0, "WAIT_SECONDS": 2.0}
"""The limits' names and what they are here; the limits themselves are as installed."""
KEEPALIVE = {
    "grpc.keepalive_time_ms": 1000, "grpc.http2.ping_timeout_ms": 3000, "grpc.http2.min_ping_interval_without_data_ms": 100,
}  # fmt: skip
SLACK = 64 << 20
"""Bytes the server may hold more than before an attack: what an allocator keeps."""


class Besieged(Server):
    """A server whose process has short waits. `limits` go into ``[limits]`` of its server.toml."""

    def __init__(self, directory: Path, devices: tuple[str, ...] = ("alice", "bob", "mallory"), **limits: int) -> None:
        super().__init__(directory, devices)
        self._runs = itertools.count(1)
        with (directory / "server.toml").open("a") as out:
            out.write("[limits]\n" + "".join(f"{name} = {value}\n" for name, value in limits.items()))

    def command(self) -> list[str]:
        code = (
            "import os; os.environ['GRPC_VERBOSITY'] = 'NONE'\n"
            f"import fp_server.limits as n; vars(n).update({WAITS!r})\n"
            "from common.transport import wire\n"
            f"wire.SERVER_OPTIONS[:] = [(k, {KEEPALIVE!r}.get(k, v)) for k, v in wire.SERVER_OPTIONS]\n"
            "from fp_server.cli import main; main()"
        )
        return [sys.executable, "-c", code, "run", "--dir", str(self.directory)]

    def start(self) -> None:
        (self.directory / "endpoint.json").unlink(missing_ok=True)
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, env={**os.environ, "PYTHONWARNINGS": "error"})
        deadline = time.monotonic() + 60
        while not (self.directory / "endpoint.json").exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def held(self) -> tuple[int, int]:
        """(resident bytes, open descriptors) now."""
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE"), len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    async def round(self) -> dict[str, Any]:
        """A whole run of one round with alice and bob."""
        with contextlib.suppress(grpc.aio.AioRpcError):  # what an earlier test that failed has left
            async with self.admin() as admin:
                await admin.ControlRun(admin_pb2.ControlRunRequest(action="stop"), timeout=20)
        toml = run_toml(name=f"run-{next(self._runs)}", rounds=1, final_evaluation=False)
        status = await whole_run(self, [Device(self, "alice"), Device(self, "bob")], toml, 60)
        assert status["state"] == "finished" and status["history"][-1]["weights"] == {"alice": 40, "bob": 40}
        return status

    @contextlib.asynccontextmanager
    async def besieged(self, slack: int = SLACK) -> AsyncIterator[None]:
        """While the attack inside goes on, alice and bob finish a round; afterwards the server holds what it held before."""
        before, said = self.held(), len(self.log())
        working = asyncio.create_task(self.round())
        try:
            yield
            await working
        finally:
            working.cancel()
        await self.recovered(before, slack)
        assert not (trace := self.log()[said:].partition("Traceback")[2]), trace[:4000]  # what this attack has left there

    async def recovered(self, before: tuple[int, int], slack: int = SLACK) -> None:
        """Wait until memory and descriptors are back where they were."""
        for _ in range(600):
            now = self.held()
            if now[0] <= before[0] + slack and now[1] <= before[1] + 2:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"bytes and descriptors were {before}, and stay at {now}")


async def unhidden(call: Callable[[], Awaitable[Any]]) -> Any:
    """The call's answer or error. A write that meets an early answer hides it (INTERNAL, without our details): asked again."""
    for _ in range(20):
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.INTERNAL or error_name(error):
                raise
    raise AssertionError("every answer was hidden")


async def refused(call: Callable[[], Awaitable[Any]], name: str, said: str) -> grpc.aio.AioRpcError:
    """The call fails with the error of that name and text."""
    try:
        await unhidden(call)
    except grpc.aio.AioRpcError as error:
        assert (error_name(error) or error.code().name) == name and said in (error.details() or ""), error
        return error
    raise AssertionError(f"was not refused; {name} {said!r} was expected")


async def in_thread(work: Callable[..., Any], *args: Any) -> Any:
    """Run a blocking attack beside the event loop."""
    return await asyncio.to_thread(work, *args)
