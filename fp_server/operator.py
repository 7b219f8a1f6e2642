"""The operator's side of the admin service: for the command line beside the server, and for one on another machine."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grpc
import grpc.aio

from common import config as configuration
from common.checkpoint import dump_manifest, manifest_from_json
from common.config import Section
from common.errors import ConfigError, DigestError, FedPrunerError, IdentityError, ProtocolError, UnreachableError
from common.pb import admin_pb2, admin_pb2_grpc
from common.transport import enroll, serde, tls
from common.transport.replies import readable
from common.transport.wire import CHANNEL_OPTIONS, from_rpc_error, options, split_address
from common.types import ModelManifest, UnitObject
from fp_server.audit import Actor, Entry, Row
from fp_server.health import host_port, read_endpoint

logger = logging.getLogger("fp_server")

ROLE = "operator"
FILE = "operator.toml"
"""In an operator's directory: where the server is."""
TIMEOUT = 20.0
"""Seconds an operator's call may take."""
STATUS = 64 << 20
"""Bytes a status may have."""
END_OF_TIME = 253_402_214_400.0
"""31 December 9999, the last day a calendar can name, in seconds since the epoch."""

T = TypeVar("T")


@functools.cache
def _runner() -> asyncio.Runner:
    """One event loop for all calls of a process: gRPC's poller logs errors for loops that are closed between calls."""
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


class OperatorConfig(Section):
    """``operator.toml``, written by ``fp-server join``."""

    server: str
    """host:port of the server."""


class Token(NamedTuple):
    """A join token, and what the operator should know of the name."""

    text: str
    warning: str


class Ledger(NamedTuple):
    """What a run has learnt so far: a file a layer."""

    run: str
    model: str
    rounds: int
    manifest: ModelManifest
    layers: dict[int, Path]


def join(text: str, directory: Path, say: enroll.Say, again: bool = False) -> enroll.Joined:
    """Turn an operator's token into an operator's directory. Raises what `common.transport.enroll.join` does."""
    if (directory / "server.toml").exists():
        raise ConfigError(f"{directory}: is a server's data directory; join in another --dir")
    path = directory / FILE
    return _runner().run(enroll.join(text, directory, ROLE, lambda server: _write_server(path, server), say=say, again=again))


def _write_server(path: Path, server: str) -> None:
    path.write_text(f"# Written by `fp-server join`: where the server is.\nserver = {json.dumps(server)}\n")


class Operator:
    """An operator's connection to a server: the one of a data directory, or the one an operator's directory has joined."""

    def __init__(self, directory: Path) -> None:
        """Raises IdentityError when the directory has no valid operator certificate, ConfigError when it is neither kind."""
        self._directory = directory
        self._local = (directory / "server.toml").exists()
        if self._local:
            at = read_endpoint(directory)
            self.address = host_port(at.host, at.port)
            # The certificate always names localhost; the address that is listened on need not be in it.
            self._options = options(CHANNEL_OPTIONS, ssl_target_name_override="localhost", max_receive_message_length=STATUS)
        elif (directory / FILE).exists():
            self.address = configuration.load(directory / FILE, OperatorConfig).server
            split_address(self.address)
            self._options = options(CHANNEL_OPTIONS, max_receive_message_length=STATUS)
        else:
            raise ConfigError(
                f"{directory}: neither a server's directory (`fp-server init`) nor an operator's (`fp-server join TOKEN`)"
            )
        try:
            self._credentials = tls.client_credentials(directory, ROLE)
        except IdentityError as error:
            raise self._hint(error) from None

    def _hint(self, error: FedPrunerError) -> FedPrunerError:
        """The same error, with what helps here."""
        if isinstance(error, UnreachableError):
            here = (
                f"is `fp-server run --dir {self._directory}` running?"
                if self._local
                else "does the server run, and listen there?"
            )
            return UnreachableError(f"{error}; {here}")
        if isinstance(error, IdentityError) and self._local:
            return IdentityError(f"{error} (beside the server `fp-server operator --dir {self._directory}` makes another)")
        return error

    @contextlib.asynccontextmanager
    async def _stub(self) -> AsyncIterator[admin_pb2_grpc.AdminAsyncStub]:
        """The admin service; what it refuses is raised as an error of ours."""
        async with grpc.aio.secure_channel(self.address, self._credentials, self._options) as channel:
            try:
                yield admin_pb2_grpc.AdminStub(channel)
            except grpc.aio.AioRpcError as error:
                raise self._hint(from_rpc_error(error, self.address)) from None
            if not self._local:  # the server looks after the one beside it
                await self._renew(channel)

    async def _renew(self, channel: grpc.aio.Channel) -> None:
        """An operator's directory has no daemon: its certificate is renewed by whatever command is used in its last third."""
        if datetime.now(UTC) < tls.renewable_from(tls.check_validity(self._directory / f"{ROLE}.pem")):
            return
        try:
            await enroll.renew(channel, self._directory, ROLE)
            self._credentials = tls.client_credentials(self._directory, ROLE)
        except (FedPrunerError, grpc.aio.AioRpcError) as error:
            ours = from_rpc_error(error, self.address) if isinstance(error, grpc.aio.AioRpcError) else error
            logger.warning("the certificate ends soon and could not be renewed: %s", ours)

    def _run(self, call: Callable[[admin_pb2_grpc.AdminAsyncStub], Awaitable[T]]) -> T:
        async def go() -> T:
            async with self._stub() as stub:
                return await call(stub)

        return _runner().run(go())

    def start(self, toml: str, manifest: ModelManifest) -> str:
        """Start a run; returns its name."""
        request = admin_pb2.StartRunRequest(toml=toml, manifest=dump_manifest(manifest))
        return readable(self._run(lambda stub: stub.StartRun(request, timeout=TIMEOUT)), "reply", self.address).run

    def control(self, run: str, action: str) -> str:
        """Pause, resume or stop; returns the run's state."""
        request = admin_pb2.ControlRunRequest(run=run, action=action)
        return readable(self._run(lambda stub: stub.ControlRun(request, timeout=TIMEOUT)), "reply", self.address).state

    def runs(self) -> list[dict[str, Any]]:
        """All runs, newest first."""
        reply = self._run(lambda stub: stub.ListRuns(admin_pb2.ListRunsRequest(), timeout=TIMEOUT))
        return runs_of(reply, self.address)

    def _page(self, run: str, first: int, last: int) -> dict[str, Any]:
        request = admin_pb2.StatusRequest(run=run, first_round=first, last_rounds=last)
        return status_of(self._run(lambda stub: stub.GetStatus(request, timeout=TIMEOUT)), self.address)

    def status(self, run: str, last: int = 0) -> dict[str, Any]:
        """One run, now, with the `last` entries of its history (0: the usual ten), in as many calls as they need."""
        made = self._page(run, 0, last)
        if made["run"] is None:
            return made
        wanted = max(1, made["history_total"] - last + 1) if last else made["history_first"]
        pages: list[dict[str, Any]] = []
        while (at := wanted + len(pages)) < made["history_first"]:
            # An entry never changes once it is in the history, and a run keeps its name: pages of different moments fit.
            asked = made["history_first"] - at
            entries = self._page(made["run"], at, asked).get("history", [])
            if not 0 < len(entries) <= asked:  # else this might never come to its end
                raise ProtocolError(f"{self.address}: {len(entries)} entries of the history came, not {asked} from {at} on")
            pages += entries
        made["history"], made["history_first"] = pages + made["history"], wanted
        return made

    def token(self, name: str, role: str, ttl: int) -> Token:
        """A one-time join token."""
        request = admin_pb2.CreateTokenRequest(name=name, role=role, ttl_seconds=ttl)
        reply = readable(self._run(lambda stub: stub.CreateToken(request, timeout=TIMEOUT)), "token", self.address)
        return Token(reply.token, reply.warning)

    def revoke(self, name: str, force: bool = False) -> tuple[int, int]:
        """Revoke a name's certificates and unused tokens; returns how many of each. Raises NotFound unless `force`."""
        request = admin_pb2.RevokeRequest(name=name, force=force)
        reply = readable(self._run(lambda stub: stub.Revoke(request, timeout=TIMEOUT)), "reply", self.address)
        return reply.count, reply.tokens

    def audit(self, since: float = 0.0) -> list[Row]:
        """The entries of the audit trail from a time on, oldest first."""

        async def every(stub: admin_pb2_grpc.AdminAsyncStub) -> list[Row]:
            return [row_of(message, self.address) async for message in stub.ReadAudit(admin_pb2.AuditRequest(since=since))]

        return self._run(every)

    def ledger(self, run: str, into: Path) -> Ledger:
        """Fetch a run's ledger into a directory, a file a layer. Raises NotFound, DigestError when bytes are not what they
        claim, ProtocolError when they can't be read."""
        request = admin_pb2.LedgerRequest(run=run)
        return self._run(lambda stub: fetch_ledger(stub.ReadLedger(request), into, self.address))

    async def watch(self, run: str, last: int = 0) -> AsyncIterator[dict[str, Any]]:
        """A status whenever something changes, with as many of the `last` entries as one message holds."""
        request = admin_pb2.StatusRequest(run=run, last_rounds=last)
        async with self._stub() as stub:
            async for message in stub.WatchStatus(request):
                yield status_of(message, self.address)


def _value(text: str, what: str, address: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{address}: the server's {what} is no JSON ({type(error).__name__})") from None


def runs_of(message: admin_pb2.ListRunsReply | None, address: str) -> list[dict[str, Any]]:
    """The runs of a reply. Raises ProtocolError."""
    made = _value(readable(message, "list of runs", address).json, "list of runs", address)
    if not isinstance(made, list) or not all(isinstance(run, dict) for run in made):
        raise ProtocolError(f"{address}: the server's list of runs is no list of tables")
    return made


def status_of(message: admin_pb2.Status | None, address: str) -> dict[str, Any]:
    """A status as the server's JSON has it; of a run, with the history and its place. Raises ProtocolError."""
    made = _value(readable(message, "status", address).json, "status", address)
    kinds: dict[str, Any] = {"run": (str, type(None)), "state": str}
    if isinstance(made, dict) and made.get("run") is not None:
        kinds |= {"history": list, "history_first": int, "history_total": int}
    if not isinstance(made, dict) or not all(isinstance(made.get(key, ...), kind) for key, kind in kinds.items()):
        raise ProtocolError(f"{address}: the server's status lacks something every status has ({', '.join(kinds)})")
    return made


def row_of(message: admin_pb2.AuditEntry | None, address: str) -> Row:
    """An entry of the audit trail. Raises ProtocolError."""
    m = readable(message, "audit entry", address)
    if not 0 <= m.time < END_OF_TIME:
        raise ProtocolError(f"{address}: the audit entry {m.seq} is of no time ({m.time})")
    return Row(m.seq, m.time, Entry(Actor(m.actor, m.role, m.serial, m.address), m.action, m.object, m.outcome), m.hash)


async def fetch_ledger(messages: AsyncIterable[admin_pb2.LedgerPart | None], into: Path, address: str) -> Ledger:
    """Write the ledger that `messages` bring. Raises DigestError when bytes are not what they claim, ProtocolError."""
    parts = aiter(messages)

    async def next_part() -> admin_pb2.LedgerPart:
        try:
            return readable(await anext(parts), "ledger", address)
        except StopAsyncIteration:
            raise ProtocolError(f"{address}: the server ended the ledger before all of it was here") from None

    head = (await next_part()).head
    objects = [UnitObject(m.layer, serde.ref_from_pb(m.ref)) for m in head.objects]
    if len({item.layer for item in objects}) < len(objects):
        raise ProtocolError(f"{address}: the ledger has two objects of one layer")
    manifest = manifest_from_json(head.manifest, "the server's manifest")
    layers: dict[int, Path] = {}
    for item in objects:
        layers[item.layer] = path = into / f"layer-{item.layer}.safetensors"
        digest, left = hashlib.sha256(), item.ref.size
        with path.open("wb") as out:
            while left > 0:
                if not (data := (await next_part()).data):
                    raise ProtocolError(f"{address}: the server sent a piece of nothing")
                left -= len(data)
                digest.update(data)
                out.write(data)
        if left or digest.hexdigest() != item.ref.digest:
            raise DigestError(f"layer {item.layer + 1} of run {head.run}: the bytes received are not the ledger's; try again")
    return Ledger(head.run, head.model, head.rounds, manifest, layers)
