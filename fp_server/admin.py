"""The operator's service, and enrollment."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence

from common.checkpoint import manifest_from_json
from common.errors import ConfigError, UnreachableError
from common.pb import admin_pb2, admin_pb2_grpc, enroll_pb2, enroll_pb2_grpc
from common.transport.wire import errors_to_status
from fp_server import operations
from fp_server.coordinator import STOPPING, Coordinator
from fp_server.identity import Authority
from fp_server.roundstate import Entry
from fp_server.service import Context, caller
from fp_server.status import LAST, run_summary, status

PAGE = 100
"""Rounds read from the log for one status."""


class Enrollment(enroll_pb2_grpc.EnrollmentServicer):
    """Tokens into certificates."""

    def __init__(self, authority: Authority, days: float) -> None:
        self._authority, self._days = authority, days

    async def GetCa(self, request: enroll_pb2.GetCaRequest, context: Context) -> enroll_pb2.GetCaReply:  # noqa: N802
        """The CA certificate; public."""
        return enroll_pb2.GetCaReply(ca_pem=self._authority.ca_pem)

    async def Enroll(self, request: enroll_pb2.EnrollRequest, context: Context) -> enroll_pb2.EnrollReply:  # noqa: N802
        """A certificate for a token."""
        async with errors_to_status(context):
            pem, name, role = await self._authority.enroll(request.secret, request.csr_pem, self._days)
            return enroll_pb2.EnrollReply(certificate_pem=pem, name=name, role=role)
        raise AssertionError("unreachable")


class Admin(admin_pb2_grpc.AdminServicer):
    """The operator's service."""

    def __init__(self, coordinator: Coordinator, authority: Authority, enroll: str, server: str) -> None:
        self._coordinator, self._authority = coordinator, authority
        self._enroll, self._server = enroll, server

    async def StartRun(self, request: admin_pb2.StartRunRequest, context: Context) -> admin_pb2.StartRunReply:  # noqa: N802
        """Start a run."""
        async with errors_to_status(context):
            caller(context, self._authority, "operator")
            run = await operations.start_run(self._coordinator, request.toml, manifest_from_json(request.manifest, "manifest"))
            return admin_pb2.StartRunReply(run=run)
        raise AssertionError("unreachable")

    async def ControlRun(self, request: admin_pb2.ControlRunRequest, context: Context) -> admin_pb2.ControlRunReply:  # noqa: N802
        """Pause, resume or stop a run."""
        async with errors_to_status(context):
            caller(context, self._authority, "operator")
            return admin_pb2.ControlRunReply(state=await operations.control(self._coordinator, request.run, request.action))
        raise AssertionError("unreachable")

    async def ListRuns(self, request: admin_pb2.ListRunsRequest, context: Context) -> admin_pb2.ListRunsReply:  # noqa: N802
        """All runs, newest first."""
        async with errors_to_status(context):
            caller(context, self._authority, "operator")
            runs = [run_summary(self._coordinator.run(name)) for name in reversed(self._coordinator.names)]
            return admin_pb2.ListRunsReply(json=json.dumps(runs))
        raise AssertionError("unreachable")

    def _status(self, request: admin_pb2.StatusRequest, older: Sequence[Entry] | None = None) -> admin_pb2.Status:
        coordinator = self._coordinator
        machine = coordinator.run(request.run) if request.run or coordinator.names else None
        connected = sorted(coordinator.sessions)
        made = status(machine, coordinator.problem, connected, request.last_rounds, request.first_round, older)
        return admin_pb2.Status(json=json.dumps(made))

    async def _older(self, request: admin_pb2.StatusRequest) -> list[Entry] | None:
        """The rounds asked for, from the log, where memory doesn't hold the first of them any more."""
        machine = self._coordinator.run(request.run) if request.first_round and self._coordinator.names else None
        if machine is None or request.first_round > machine.history.first:
            return None
        index, count = request.first_round - 1, min(request.last_rounds or LAST, PAGE, machine.history.first)
        return await asyncio.to_thread(self._coordinator.past, machine.name, index, count)

    async def GetStatus(self, request: admin_pb2.StatusRequest, context: Context) -> admin_pb2.Status:  # noqa: N802
        """One run, now."""
        async with errors_to_status(context):
            caller(context, self._authority, "operator")
            return self._status(request, await self._older(request))
        raise AssertionError("unreachable")

    async def WatchStatus(self, request: admin_pb2.StatusRequest, context: Context) -> AsyncIterator[admin_pb2.Status]:  # noqa: N802
        """The same, again whenever something changes (at most twice a second)."""
        async with errors_to_status(context):
            peer = caller(context, self._authority, "operator")
            last = b""
            while not self._coordinator.draining:
                self._authority.check(peer, "operator")
                now = self._status(request)
                if (encoded := now.SerializeToString()) != last:
                    last = encoded
                    yield now
                async with self._coordinator.changed:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._coordinator.changed.wait(), 5.0)
                await asyncio.sleep(0.5)
            raise UnreachableError(STOPPING)

    async def CreateToken(self, request: admin_pb2.CreateTokenRequest, context: Context) -> admin_pb2.CreateTokenReply:  # noqa: N802
        """A one-time token."""
        async with errors_to_status(context):
            caller(context, self._authority, "operator")
            if not 1 <= request.ttl_seconds <= 30 * 86_400:
                raise ConfigError("--ttl: between a second and 30 days")
            token = await self._authority.create_token(
                request.name, request.role or "device", request.ttl_seconds, self._enroll, self._server
            )
            return admin_pb2.CreateTokenReply(token=token.encode())
        raise AssertionError("unreachable")

    async def Revoke(self, request: admin_pb2.RevokeRequest, context: Context) -> admin_pb2.RevokeReply:  # noqa: N802
        """Revoke every certificate of a name and hang up its session."""
        async with errors_to_status(context):
            caller(context, self._authority, "operator")
            count = await self._authority.revoke(request.name)
            await operations.kick(self._coordinator, request.name)
            return admin_pb2.RevokeReply(count=count)
        raise AssertionError("unreachable")
