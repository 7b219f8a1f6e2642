"""The operator's service, enrollment and renewal."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from common.checkpoint import dump_manifest, manifest_from_json
from common.errors import ConfigError, IdentityError, StorageError, UnreachableError
from common.pb import admin_pb2, admin_pb2_grpc, enroll_pb2, enroll_pb2_grpc, types_pb2
from common.transport import serde
from common.transport.tls import ROLES
from common.transport.wire import CHUNK, errors_to_status
from fp_server import audit, operations
from fp_server.access import Access, Context
from fp_server.audit import Actor, Row, address
from fp_server.coordinator import STOPPING, Coordinator
from fp_server.damage import ledger_path
from fp_server.identity import Revoked
from fp_server.roundstate import Entry
from fp_server.status import LAST, run_summary, status

logger = logging.getLogger("fp_server")

PAGE = 100
"""Rounds read from the log for one status."""


class Enrollment(enroll_pb2_grpc.EnrollmentServicer):
    """Tokens into certificates."""

    def __init__(self, access: Access, days: float) -> None:
        self._access, self._authority, self._days = access, access.authority, days

    async def GetCa(self, request: enroll_pb2.GetCaRequest, context: Context) -> enroll_pb2.GetCaReply:  # noqa: N802
        """The CA certificate; public."""
        return enroll_pb2.GetCaReply(ca_pem=self._authority.ca_pem)

    async def Enroll(self, request: enroll_pb2.EnrollRequest, context: Context) -> enroll_pb2.EnrollReply:  # noqa: N802
        """A certificate for a token."""
        async with errors_to_status(context):
            try:
                issued = await self._authority.enroll(
                    request.secret, request.csr_pem, self._days, request.role, address(context.peer())
                )
            except IdentityError as error:
                self._access.refused(context, "enroll", "Enroll", error)
                raise
            return enroll_pb2.EnrollReply(certificate_pem=issued.pem, name=issued.name, role=issued.role)
        raise AssertionError("unreachable")


class Renewal(enroll_pb2_grpc.RenewalServicer):
    """Certificates that end soon into new ones."""

    def __init__(self, access: Access, days: float) -> None:
        self._access, self._days = access, days

    async def Renew(self, request: enroll_pb2.RenewRequest, context: Context) -> enroll_pb2.EnrollReply:  # noqa: N802
        """Another certificate for the caller."""
        async with errors_to_status(context):
            peer = self._access.caller(context, "Renew", *ROLES)
            try:
                issued = await self._access.authority.renew(peer, request.csr_pem, self._days, address(context.peer()))
            except IdentityError as error:
                self._access.refused(context, "renew", "Renew", error, peer)
                raise
            return enroll_pb2.EnrollReply(certificate_pem=issued.pem, name=issued.name, role=issued.role)
        raise AssertionError("unreachable")


def audit_to_pb(row: Row) -> admin_pb2.AuditEntry:
    """An audit entry as a message."""
    who, what = row.entry.actor, row.entry
    return admin_pb2.AuditEntry(
        seq=row.seq, time=row.time, actor=who.name, role=who.role, serial=who.serial, address=who.address, action=what.action,
        object=what.object, outcome=what.outcome, hash=row.hash,
    )  # fmt: skip


class Admin(admin_pb2_grpc.AdminServicer):
    """The operator's service."""

    def __init__(self, coordinator: Coordinator, access: Access, enroll: str, server: str) -> None:
        self._coordinator, self._access, self._authority = coordinator, access, access.authority
        self._enroll, self._server = enroll, server
        self._summaries: dict[str, dict[str, Any]] = {}
        """A line for each ended run: it never changes."""

    async def StartRun(self, request: admin_pb2.StartRunRequest, context: Context) -> admin_pb2.StartRunReply:  # noqa: N802
        """Start a run."""
        async with errors_to_status(context):
            actor = self._operator(context, "StartRun")
            manifest = manifest_from_json(request.manifest, "manifest")
            run = await operations.start_run(self._coordinator, request.toml, manifest, actor)
            return admin_pb2.StartRunReply(run=run)
        raise AssertionError("unreachable")

    async def ControlRun(self, request: admin_pb2.ControlRunRequest, context: Context) -> admin_pb2.ControlRunReply:  # noqa: N802
        """Pause, resume or stop a run."""
        async with errors_to_status(context):
            actor = self._operator(context, "ControlRun")
            state = await operations.control(self._coordinator, request.run, request.action, actor)
            return admin_pb2.ControlRunReply(state=state)
        raise AssertionError("unreachable")

    async def ListRuns(self, request: admin_pb2.ListRunsRequest, context: Context) -> admin_pb2.ListRunsReply:  # noqa: N802
        """All runs, newest first."""
        async with errors_to_status(context):
            self._operator(context, "ListRuns")
            runs = [await self._summary(name) for name in reversed(self._coordinator.names)]
            return admin_pb2.ListRunsReply(json=json.dumps(runs))
        raise AssertionError("unreachable")

    async def _summary(self, name: str) -> dict[str, Any]:
        if (made := self._summaries.get(name)) is None:
            machine = await self._coordinator.look_up(name)
            made = run_summary(machine)
            if machine.ended is not None:
                self._summaries[name] = made
        return made

    def _operator(self, context: Context, what: str) -> Actor:
        return self._access.actor(context, self._access.caller(context, what, "operator"))

    async def _status(self, request: admin_pb2.StatusRequest, older: Sequence[Entry] | None = None) -> admin_pb2.Status:
        coordinator = self._coordinator
        machine = await coordinator.look_up(request.run) if request.run or coordinator.names else None
        connected = sorted(coordinator.sessions)
        made = status(machine, coordinator.problem, connected, request.last_rounds, request.first_round, older)
        return admin_pb2.Status(json=json.dumps(made))

    async def _older(self, request: admin_pb2.StatusRequest) -> list[Entry] | None:
        """The rounds asked for, from the log, where memory doesn't hold the first of them any more."""
        machine = await self._coordinator.look_up(request.run) if request.first_round and self._coordinator.names else None
        if machine is None or request.first_round > machine.history.first:
            return None
        index, count = request.first_round - 1, min(request.last_rounds or LAST, PAGE, machine.history.first)
        return await asyncio.to_thread(self._coordinator.past, machine.name, index, count)

    async def GetStatus(self, request: admin_pb2.StatusRequest, context: Context) -> admin_pb2.Status:  # noqa: N802
        """One run, now."""
        async with errors_to_status(context):
            self._operator(context, "GetStatus")
            return await self._status(request, await self._older(request))
        raise AssertionError("unreachable")

    async def WatchStatus(self, request: admin_pb2.StatusRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """The same, again whenever something changes (at most twice a second)."""
        async with errors_to_status(context), self._access.admitted(context, "WatchStatus", "operator"):
            last = b""
            while not self._coordinator.draining:
                now = await self._status(request)
                if (encoded := now.SerializeToString()) != last:
                    last = encoded
                    await context.write(now)
                async with self._coordinator.changed:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(5.0):
                            await self._coordinator.changed.wait()
                await asyncio.sleep(0.5)
            raise UnreachableError(STOPPING)

    async def CreateToken(self, request: admin_pb2.CreateTokenRequest, context: Context) -> admin_pb2.CreateTokenReply:  # noqa: N802
        """A one-time token."""
        async with errors_to_status(context):
            actor = self._operator(context, "CreateToken")
            if not 1 <= request.ttl_seconds <= 30 * 86_400:
                raise ConfigError("--ttl: between a second and 30 days")
            role = request.role or "device"
            warning = await self._authority.in_use(request.name, role)
            token = await self._authority.create_token(request.name, role, request.ttl_seconds, self._enroll, self._server, actor)
            return admin_pb2.CreateTokenReply(token=token.encode(), warning=warning)
        raise AssertionError("unreachable")

    async def Revoke(self, request: admin_pb2.RevokeRequest, context: Context) -> admin_pb2.RevokeReply:  # noqa: N802
        """Revoke every certificate of a name and end whatever it has under way."""
        async with errors_to_status(context):
            actor = self._operator(context, "Revoke")
            revoked = await self._coordinator.background.whole(self._revoke(request.name, actor, request.force))
            return admin_pb2.RevokeReply(count=revoked.certificates, tokens=revoked.tokens)
        raise AssertionError("unreachable")

    async def _revoke(self, name: str, actor: Actor, force: bool) -> Revoked:
        revoked = await self._authority.revoke(name, actor, force)
        self._access.look()
        await operations.kick(self._coordinator, name)
        return revoked

    async def ReadLedger(self, request: admin_pb2.LedgerRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """A run's ledger as it is now: the files are opened at once, so that a round that commits meanwhile changes nothing."""
        async with errors_to_status(context), self._access.admitted(context, "ReadLedger", "operator") as peer:
            actor = self._access.actor(context, peer)
            machine, store = await self._coordinator.look_up(request.run), self._coordinator.store
            entry = audit.Entry(actor, "read ledger", f"run {machine.name}")
            try:
                await asyncio.to_thread(self._coordinator.log.enter, lambda c: audit.append(c, entry))
            except StorageError as error:  # a full disk must not be in the way of saving the model
                logger.error("that %s read the ledger of %s is not in the audit trail: %s", actor.name, machine.name, error)
            ledger = sorted(machine.ledger.items())
            head = admin_pb2.LedgerHead(
                run=machine.name, model=machine.config.model.name, manifest=dump_manifest(machine.manifest),
                rounds=machine.history.committed,
                objects=[types_pb2.UnitObject(layer=layer, ref=serde.ref_to_pb(ref)) for layer, ref in ledger],
            )  # fmt: skip
            with contextlib.ExitStack() as opened:
                files = [
                    opened.enter_context(
                        (store.path(ref.digest) if store.has(ref.digest) else ledger_path(machine, store, layer)).open("rb")
                    )
                    for layer, ref in ledger
                ]
                for (layer, ref), file in zip(ledger, files, strict=True):
                    if (await asyncio.to_thread(hashlib.file_digest, file, "sha256")).hexdigest() != ref.digest:
                        await asyncio.to_thread(ledger_path, machine, store, layer)
                    file.seek(0)
                await context.write(admin_pb2.LedgerPart(head=head))
                for file in files:
                    while data := await asyncio.to_thread(file.read, CHUNK):
                        await context.write(admin_pb2.LedgerPart(data=data))

    async def ReadAudit(self, request: admin_pb2.AuditRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """The audit trail, page by page."""
        async with errors_to_status(context), self._access.admitted(context, "ReadAudit", "operator"):
            last = 0
            while rows := await self._authority.audited(last, request.since):
                for row in rows:
                    await context.write(audit_to_pb(row))
                last = rows[-1].seq
