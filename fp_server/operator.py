"""The operator's side of the admin service, for the command line beside the server."""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from common import config as configuration
from common.checkpoint import dump_manifest
from common.errors import UnreachableError
from common.pb import admin_pb2, admin_pb2_grpc
from common.transport.tls import client_credentials
from common.transport.wire import CHANNEL_OPTIONS, from_rpc_error, options
from common.types import ModelManifest
from fp_server.app import host_port, read_endpoint
from fp_server.config import ServerConfig

TIMEOUT = 20.0
"""Seconds an operator's call may take."""
STATUS = 64 << 20
"""Bytes a status may have."""

EVERYWHERE = ("0.0.0.0", "::", "[::]")
"""Listening on all addresses, localhost among them."""

T = TypeVar("T")


@functools.cache
def _runner() -> asyncio.Runner:
    """One event loop for all calls of a process: gRPC's poller logs errors for loops that are closed between calls."""
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


class Operator:
    """One operator connection to the server of a data directory."""

    def __init__(self, directory: Path) -> None:
        """Raises IdentityError when the directory has no valid operator certificate."""
        self._directory = directory
        port, listen = read_endpoint(directory).port, configuration.load(directory / "server.toml", ServerConfig).listen
        self.address = host_port("localhost" if listen in EVERYWHERE else listen, port)
        # The certificate always names localhost; the address that is listened on need not be in it.
        # A status of a thousand devices is larger than gRPC's default limit; the server is the operator's own.
        self._options = options(CHANNEL_OPTIONS, ssl_target_name_override="localhost", max_receive_message_length=STATUS)
        self._credentials = client_credentials(directory, "operator")

    def _run(self, call: Callable[[admin_pb2_grpc.AdminAsyncStub], Awaitable[T]]) -> T:
        async def go() -> T:
            async with grpc.aio.secure_channel(self.address, self._credentials, self._options) as channel:
                try:
                    return await call(admin_pb2_grpc.AdminStub(channel))
                except grpc.aio.AioRpcError as error:
                    raise self._explain(error) from None

        return _runner().run(go())

    def _explain(self, error: grpc.aio.AioRpcError) -> Exception:
        ours = from_rpc_error(error, self.address)
        if isinstance(ours, UnreachableError):
            return UnreachableError(f"{ours}; is `fp-server run --dir {self._directory}` running?")
        return ours

    def start(self, toml: str, manifest: ModelManifest) -> str:
        """Start a run; returns its name."""
        request = admin_pb2.StartRunRequest(toml=toml, manifest=dump_manifest(manifest))
        return self._run(lambda stub: stub.StartRun(request, timeout=TIMEOUT)).run

    def control(self, run: str, action: str) -> str:
        """Pause, resume or stop; returns the run's state."""
        request = admin_pb2.ControlRunRequest(run=run, action=action)
        return self._run(lambda stub: stub.ControlRun(request, timeout=TIMEOUT)).state

    def runs(self) -> list[dict[str, Any]]:
        """All runs, newest first."""
        reply = self._run(lambda stub: stub.ListRuns(admin_pb2.ListRunsRequest(), timeout=TIMEOUT))
        return list(json.loads(reply.json))

    def _page(self, run: str, first: int, last: int) -> dict[str, Any]:
        request = admin_pb2.StatusRequest(run=run, first_round=first, last_rounds=last)
        return dict(json.loads(self._run(lambda stub: stub.GetStatus(request, timeout=TIMEOUT)).json))

    def status(self, run: str, last: int = 0) -> dict[str, Any]:
        """One run, now, with the `last` entries of its history (0: the usual ten), in as many calls as they need."""
        made = self._page(run, 0, last)
        if made["run"] is None:
            return made
        wanted = max(1, made["history_total"] - last + 1) if last else made["history_first"]
        pages: list[dict[str, Any]] = []
        while (at := wanted + len(pages)) < made["history_first"]:
            # An entry never changes once it is in the history, and a run keeps its name: pages of different moments fit.
            page = self._page(made["run"], at, made["history_first"] - at)
            pages += page["history"]
        made["history"], made["history_first"] = pages + made["history"], wanted
        return made

    def token(self, name: str, role: str, ttl: int) -> str:
        """A one-time join token."""
        request = admin_pb2.CreateTokenRequest(name=name, role=role, ttl_seconds=ttl)
        return self._run(lambda stub: stub.CreateToken(request, timeout=TIMEOUT)).token

    def revoke(self, name: str) -> int:
        """Revoke a name's certificates; returns how many."""
        return self._run(lambda stub: stub.Revoke(admin_pb2.RevokeRequest(name=name), timeout=TIMEOUT)).count

    async def watch(self, run: str, last: int = 0) -> AsyncIterator[dict[str, Any]]:
        """A status whenever something changes, with as many of the `last` entries as one message holds."""
        request = admin_pb2.StatusRequest(run=run, last_rounds=last)
        async with grpc.aio.secure_channel(self.address, self._credentials, self._options) as channel:
            try:
                async for message in admin_pb2_grpc.AdminStub(channel).WatchStatus(request):
                    yield dict(json.loads(message.json))
            except grpc.aio.AioRpcError as error:
                raise self._explain(error) from None
