"""The operator's service from both sides: what the server makes of any request, and an operator of any reply."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import shutil
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from server_side import MANIFEST, run_toml

from common.checkpoint import dump_manifest
from common.errors import ModelError, ProtocolError
from common.pb import admin_pb2, enroll_pb2, types_pb2
from common.transport import tls
from fp_server import audit, views
from fp_server import operator as client
from fp_server.admin import Admin, Enrollment, Renewal
from fp_server.config import ServerConfig
from fp_server.coordinator import Coordinator
from fp_server.objects import ObjectStore
from fuzz.base import Target, as_seeds, message_of, next_message, shared_memory
from fuzz.session import SMALL, Alarm, Inline, MemoryLog
from fuzz.source import Source, changed
from fuzz.texts import authority

# -- the server's side ----------------------------------------------------------------------------

PEER = tls.Peer("operator", "alice", "ab12")
ACTOR = audit.Actor("alice", "operator", "ab12", "fuzz")
CSR = tls.make_csr(tls.new_key(), "x")
REQUESTS: tuple[tuple[str, list[Any]], ...] = (
    ("StartRun", [admin_pb2.StartRunRequest(toml=run_toml(lora_targets=["self_attn.q_proj"]), manifest=dump_manifest(SMALL))]),
    ("ControlRun", [admin_pb2.ControlRunRequest(run="toy-run", action=a) for a in ("pause", "resume", "stop")]),
    ("ListRuns", [admin_pb2.ListRunsRequest()]),
    ("GetStatus", [admin_pb2.StatusRequest(run="toy-run", last_rounds=5, first_round=1), admin_pb2.StatusRequest()]),
    ("CreateToken", [admin_pb2.CreateTokenRequest(name="bob", role="device", ttl_seconds=60)]),
    ("Revoke", [admin_pb2.RevokeRequest(name="bob", force=True)]),
    ("ReadLedger", [admin_pb2.LedgerRequest(run="toy-run")]),
    ("ReadAudit", [admin_pb2.AuditRequest(since=4e9)]),
    ("Enroll", [enroll_pb2.EnrollRequest(secret="s", csr_pem=CSR, role="device")]),
    ("Renew", [enroll_pb2.RenewRequest(csr_pem=CSR)]),
)


class _Refused(Exception):
    """The call was aborted with an error of ours, as `wire.abort` does."""


class _Context:
    async def abort(self, code: Any, details: str, trailing: Any) -> None:
        raise _Refused(details)

    async def write(self, message: Any) -> None:
        message.SerializeToString()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


class _Access:
    """Lets everyone in: who may call what is not what is looked at here."""

    def __init__(self) -> None:
        self.authority = authority()[0]

    def caller(self, context: Any, what: str, *roles: str) -> tls.Peer:
        return PEER

    def actor(self, context: Any, peer: tls.Peer) -> audit.Actor:
        return ACTOR

    def refused(self, *args: Any) -> None:
        pass

    @contextlib.asynccontextmanager
    async def admitted(self, *args: Any) -> AsyncIterator[tls.Peer]:
        yield PEER

    def look(self) -> None:
        pass


class _Log(MemoryLog):
    def enter(self, also: Any) -> None:
        """Entries of the audit trail that go with no event are not looked at."""


async def _requests(source: Source, directory: Path) -> None:
    coordinator = Coordinator(ServerConfig(names=["x"]), _Log(), ObjectStore(directory), lambda: 1000.0)  # type: ignore[arg-type]
    coordinator.background.thread = Inline()
    access: Any = _Access()
    admin, context = Admin(coordinator, access, "h:1", "h:2"), _Context()
    others = {"Enroll": Enrollment(access, 1.0), "Renew": Renewal(access, 1.0)}
    await coordinator.start()
    try:
        for _ in range(8):
            if not source.left:
                break
            name, seeds = source.of(REQUESTS)
            # What doesn't decode never gets so far: `gate` ends its call.
            if (request := next_message(seeds, source)) is not None:
                with contextlib.suppress(_Refused):
                    reply = await getattr(others.get(name, admin), name)(request, context)
                    if reply is not None:
                        reply.SerializeToString()
    finally:
        await coordinator.stop()


def requests(data: bytes) -> None:
    """Up to eight requests, one after the other: each is answered, or refused by an error of ours."""
    directory, alarm = shared_memory("fuzz-admin-"), Alarm()
    logger = logging.getLogger("fp_server")
    logger.addHandler(alarm)
    try:
        authority()[1].run_until_complete(_requests(Source(data), directory))
    finally:
        logger.removeHandler(alarm)
        shutil.rmtree(directory)
    assert not alarm.found, alarm.found


def request_seeds() -> list[bytes]:
    valid = [bytes((n, 0, k)) for n, (_, seeds) in enumerate(REQUESTS) for k in range(len(seeds))]
    changed = [bytes((n, 1, 8, 1, k, 0, 0, 3, 1, 2, 3, 4)) for n, (_, seeds) in enumerate(REQUESTS) for k in range(len(seeds))]
    return [b"".join(valid), *(valid[0] + valid[n] + one for n, one in enumerate(changed))]


# -- the operator's side --------------------------------------------------------------------------

MEMBER = {
    "stage": "done", "progress": {"phase": "train", "done": 1, "total": 2}, "units": ["1", "2M", "3"], "gradient": "streamed",
    "update_bytes": 9, "loss_first": 3.0, "loss_last": 2.5, "predicted_peak_bytes": 1, "measured_peak_bytes": 2,
    "predicted_step_seconds": 0.5, "step_seconds": 0.25, "fidelity": 0.5, "unit_fidelity": {"1": 0.1, "2M": 0.2},
    "review": {"outlier": "points away", "rejected": True}, "message": "",
}  # fmt: skip
ROUND = {
    "round": 1, "attempt": 2, "evaluation": False, "rounds_done": 0, "closed": "why", "committed": False, "bytes_up": 5,
    "bytes_down": 6, "devices": {"alice": MEMBER, "bob": {"stage": "dropped", "message": "it broke", "revoked": True}},
}  # fmt: skip
SUMMARY = {
    "run": "toy-run", "state": "round", "method": "fedpruner", "model": "toy", "rounds_done": 1, "rounds": 2, "loss_first": 3.0,
    "loss_last": 2.0, "loss_devices": [1, 2], "loss_same_devices": False,
}  # fmt: skip
DEVICE = {"connected": True, "samples": 5, "budget_bytes": 1 << 30, "units": 2, "gradient": "streamed", "refusal": ""}
GONE = {**DEVICE, "connected": False, "revoked": True}
STATUS = {
    **SUMMARY, "paused": "why", "problem": "disk", "connected": ["alice"], "devices": {"alice": DEVICE, "bob": GONE},
    "current": {**ROUND, "closed": None}, "history": [ROUND, {**ROUND, "evaluation": True}], "history_first": 2,
    "history_total": 3,
    "loss": [{"rounds_done": 0, "loss": 3.0, "devices": ["alice"]}], "start": "fresh", "gradient": "auto", "min_devices": 2,
    "model_units": 6,
}  # fmt: skip
IDLE = {"run": None, "state": "idle", "connected": [], "problem": ""}
AUDIT = [admin_pb2.AuditEntry(seq=1, time=1.7e9, actor="alice", role="operator", action="start", object="run r", outcome="ok")]
LEDGER = b"a layer"
HEAD = admin_pb2.LedgerPart(
    head=admin_pb2.LedgerHead(
        run="r", model="toy", manifest=dump_manifest(MANIFEST), rounds=1,
        objects=[types_pb2.UnitObject(
            layer=2, ref=types_pb2.ObjectRef(digest=hashlib.sha256(LEDGER).hexdigest(), size=len(LEDGER))
        )],
    )
)  # fmt: skip
PARTS = [HEAD, admin_pb2.LedgerPart(data=LEDGER)]


def _json(seeds: list[Any], data: bytes) -> str:
    """An even first byte: the rest as it is. An odd one: a valid value, changed."""
    if not data or data[0] % 2 == 0:
        return data[1:].decode(errors="replace")
    source = Source(data[1:])
    value = source.of(seeds)
    for _ in range(source.below(4)):
        value = changed(value, source)
    return json.dumps(value)


def _show(thing: Any) -> None:
    Console(file=io.StringIO(), width=100, markup=False).print(thing)


class _Paged(client.Operator):
    """Pages of a history, each from the next bytes."""

    def __init__(self, source: Source) -> None:
        self._source, self.address = source, "fuzz"

    def _page(self, run: str, first: int, last: int) -> dict[str, Any]:
        return _status(self._source.bytes(60))


def _status(data: bytes) -> dict[str, Any]:
    if data[:1] == b"\xff":  # a message that doesn't decode, or is another
        return client.status_of(message_of(admin_pb2.Status, [admin_pb2.Status(json=json.dumps(STATUS))], data[1:]), "fuzz")
    return client.status_of(admin_pb2.Status(json=_json([STATUS, IDLE], data)), "fuzz")


def replies(data: bytes) -> None:
    """What an operator reads and is shown: statuses, pages of a history, lists of runs, the audit trail."""
    kind, rest = (data[0] % 4, data[1:]) if data else (0, b"")
    try:
        match kind:
            case 0:
                made = _status(rest)
                views.brief(made)
                _show(views.status_view(made))
            case 1:
                _Paged(Source(rest)).status("toy-run", 20)
            case 2:
                runs = client.runs_of(admin_pb2.ListRunsReply(json=_json([[SUMMARY], []], rest)), "fuzz")
                _show(views.runs_table(runs))
            case 3:
                row = client.row_of(message_of(admin_pb2.AuditEntry, AUDIT, rest), "fuzz")
                json.dumps(views.audit_json(row))
                _show(views.audit_table([row]))
    except ProtocolError:
        pass


def reply_seeds() -> list[bytes]:
    whole = [b"\0\0" + json.dumps(one).encode() for one in (STATUS, IDLE)]
    kinds = [bytes((n, 1, k, 0)) for n in (0, 2) for k in range(2)]
    pages = [b"\1" + bytes((4, 1, 0, 0, 0)) * 3, b"\0\xff\1\0"]
    return [*whole, *kinds, *pages, b"\2\0" + json.dumps([SUMMARY]).encode(), *(b"\3" + one for one in as_seeds(AUDIT))]


async def _ledger(source: Source, directory: Path) -> None:
    async def parts() -> AsyncIterator[Any]:
        while source.left:
            yield next_message(PARTS, source)

    try:
        found = await client.fetch_ledger(parts(), directory, "fuzz")
    except (ProtocolError, ModelError):
        return
    assert all(path.parent == directory and path.exists() for path in found.layers.values())


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def ledger(data: bytes) -> None:
    """A ledger as an operator fetches it: only files of its own, with the bytes that were announced."""
    directory = shared_memory("fuzz-ledger-")
    try:
        _loop().run_until_complete(_ledger(Source(data), directory))
    finally:
        shutil.rmtree(directory)


LEDGERS = [bytes((0, 0, 0, 1)), bytes((0, 0, 1, 3, 0, 255, 255)), bytes((1, 9, 1, 0, 1, 0, 1, 1, 2, 3, 4))]
TARGETS: dict[str, Target] = {
    "admin request": Target(requests, request_seeds, 800),
    "operator's reply": Target(replies, reply_seeds),
    "ledger reply": Target(ledger, lambda: LEDGERS, 800),
}
