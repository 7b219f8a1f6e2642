"""Device sessions: decode, check, call, encode. Who calls comes from the certificate alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

import grpc.aio

from common.bucket import Bucket
from common.errors import FedPrunerError, ProtocolError, UnreachableError
from common.faults import fault
from common.pb import session_pb2, session_pb2_grpc
from common.transport import serde
from common.transport.wire import errors_to_status
from common.version import installed
from fp_server import commands as c
from fp_server import reports
from fp_server.access import Access, Context
from fp_server.coordinator import Coordinator
from fp_server.hangup import address_of, hang_up
from fp_server.limits import HELLO_SECONDS, WRITE_SECONDS
from fp_server.sessions import Session

logger = logging.getLogger("fp_server")

VERSION = installed()
MESSAGES, BURST = 10.0, 50.0
"""Messages a second that are read from a device, and how many at once; more of them wait on the device's side."""


class Sessions(session_pb2_grpc.SessionsServicer):
    """Device sessions."""

    def __init__(self, coordinator: Coordinator, access: Access) -> None:
        self._coordinator, self._access = coordinator, access
        self.port: int | None = None
        """The port it is served on, once that is known: no connection to another one is cut."""

    async def Open(self, request_iterator: Any, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """One device's session, for as long as it lasts."""
        async with errors_to_status(context), self._access.admitted(context, "Open", "device") as peer:
            await _expect_hello(context)
            await self._say(
                peer.name, context, session_pb2.ServerMessage(welcome=session_pb2.Welcome(device=peer.name, version=VERSION))
            )
            session = Session(peer.name)
            fault("server.session.welcome")
            try:
                await self._coordinator.connect(session)
                await self._serve(session, context)
            finally:
                await asyncio.shield(self._coordinator.disconnect(session))

    async def _serve(self, session: Session, context: Context) -> None:
        listening = asyncio.create_task(self._listen(session.device, context))
        speaking: asyncio.Task[c.Send | FedPrunerError] | None = None
        try:
            while True:
                speaking = asyncio.create_task(session.outbox.get())
                done, _ = await asyncio.wait({listening, speaking}, return_when=asyncio.FIRST_COMPLETED)
                if listening in done:
                    listening.result()
                    return
                command = speaking.result()
                if isinstance(command, FedPrunerError):
                    raise command
                message = _encode(command)
                kind = message.WhichOneof("body") or ""
                fault("server.session.say", kind)
                await self._say(session.device, context, message)
                fault("server.session.said", kind)
        finally:
            if speaking is not None:
                speaking.cancel()
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await listening

    async def _listen(self, device: str, context: Context) -> None:
        bucket = Bucket(MESSAGES, BURST)
        while (message := await context.read()) is not grpc.aio.EOF:
            await self._hear(device, message)
            if (wait := bucket.take(time.monotonic())) > 0:  # not reading is what slows the sender down
                await asyncio.sleep(wait)

    async def _hear(self, device: str, message: session_pb2.DeviceMessage) -> None:
        """One message. What does not decode costs the device this round and not its session."""
        coordinator, kind = self._coordinator, message.WhichOneof("body")
        fault("server.session.heard", kind or "")
        act: Coroutine[Any, Any, None] | None = None
        try:
            match kind:
                case "plan":
                    act = reports.plan_reported(coordinator, device, serde.plan_report_from_pb(message.plan))
                case "probe":
                    if not reports.awaits_probe(coordinator, device, serde.key_from_pb(message.probe.key)):
                        return
                    act = reports.probe_reported(coordinator, device, serde.probe_report_from_pb(message.probe))
                case "progress":
                    act = reports.progressed(coordinator, device, serde.progress_from_pb(message.progress))
                case "failed":
                    act = reports.task_failed(coordinator, device, serde.failed_from_pb(message.failed))
        except ProtocolError as error:
            act = reports.unreadable(coordinator, device, kind == "plan", error)
        if act is None:
            raise ProtocolError(f"unexpected message {kind or '(empty)'} in a session")
        await act

    async def _say(self, device: str, context: Context, message: session_pb2.ServerMessage) -> None:
        """Say something. A device that does not read has its connection cut: an orderly end would wait for it, too."""
        writing = asyncio.ensure_future(context.write(message))
        try:
            if not (await asyncio.wait({writing}, timeout=WRITE_SECONDS))[0]:
                logger.warning("device %s has read nothing for %.0f s; its connection is cut", device, WRITE_SECONDS)
                if (address := address_of(context.peer())) is not None:
                    await asyncio.to_thread(hang_up, address, self.port)
            await writing
        finally:
            writing.cancel()


async def _expect_hello(context: Context) -> None:
    try:
        async with asyncio.timeout(HELLO_SECONDS):  # not wait_for, which may swallow the cancellation of a revoked device's call
            first = await context.read()
    except TimeoutError:
        raise UnreachableError(f"no Hello within {HELLO_SECONDS:.0f} s") from None  # frozen, perhaps: it may try again
    if first is grpc.aio.EOF or first.WhichOneof("body") != "hello":
        raise ProtocolError("a session must begin with Hello")
    if first.hello.schema != serde.schema():
        theirs = first.hello.schema[:16] or "(none)"
        raise ProtocolError(
            f"the device speaks protocol schema {theirs}… (version {first.hello.version[:40]}), "
            f"this server {serde.schema()[:16]}… (version {VERSION}); install the same version on both sides"
        )


def _encode(command: c.Send) -> session_pb2.ServerMessage:
    match command:
        case c.SendPlanRequest():
            return session_pb2.ServerMessage(plan=session_pb2.PlanRequest(spec=serde.run_spec_to_pb(command.spec)))
        case c.SendProbe():
            return session_pb2.ServerMessage(probe=serde.probe_task_to_pb(command.task))
        case c.SendAssignment():
            return session_pb2.ServerMessage(assignment=serde.assignment_to_pb(command.assignment))
        case c.SendCancel():
            return session_pb2.ServerMessage(cancel=session_pb2.Cancel(key=serde.key_to_pb(command.key), reason=command.reason))
        case c.SendEnded():
            return session_pb2.ServerMessage(ended=session_pb2.RunEnded(run=command.run, outcome=command.outcome))
