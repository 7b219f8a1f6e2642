"""The device's side of the wire: the channel and the session stream. Values in, values out. Objects: `rpc_objects`.

gRPC reports a refused certificate as UNAVAILABLE, the same as a server that is down; `diagnose` tells the two apart.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import grpc.aio

from common.bucket import Bucket
from common.errors import FedPrunerError, IdentityError, ProtocolError, UnreachableError
from common.pb import session_pb2, session_pb2_grpc
from common.transport import serde, tls, wire
from common.types import Assignment, PlanReport, ProbeReport, ProbeTask, Progress, RunSpec, TaskFailed, TaskKey
from fp_client.enroll import split_address

ANSWER_SECONDS = 20.0
"""How long the server may take for Welcome or an offset."""
WRITE_SECONDS = 60.0
"""How long it may leave unread what this device says."""
MESSAGES, BURST = 10.0, 50.0
"""Messages a second that are read from a server, and how many at once."""
MESSAGE = 2 << 20
"""Bytes a server's message may have."""

Translate = Callable[[grpc.aio.AioRpcError], Awaitable[FedPrunerError]]

_WORTH_A_RETRY = (
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
"""What a server that is stopping or overloaded answers, when the error is none of ours."""


def software_version() -> str:
    """The installed version, for people."""
    try:
        return metadata.version("fedpruner")
    except metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class Cancel:
    """The server drops a task."""

    key: TaskKey
    reason: str


@dataclass(frozen=True)
class RunEnded:
    """A run is over; `outcome` is finished, stopped or failed."""

    run: str
    outcome: str


ServerSays = RunSpec | ProbeTask | Assignment | Cancel | RunEnded
DeviceSays = PlanReport | ProbeReport | Progress | TaskFailed


def decode(message: session_pb2.ServerMessage) -> ServerSays:
    """A server's message as a value. Raises ProtocolError for one that has no place here."""
    body = message.WhichOneof("body")
    if body == "plan":
        return serde.run_spec_from_pb(message.plan.spec)
    if body == "probe":
        return serde.probe_task_from_pb(message.probe)
    if body == "assignment":
        return serde.assignment_from_pb(message.assignment)
    if body == "cancel":
        return Cancel(serde.key_from_pb(message.cancel.key), message.cancel.reason[: serde.TEXT])
    if body == "ended":
        return RunEnded(serde.run_name(message.ended.run), message.ended.outcome[: serde.TEXT])
    raise ProtocolError(f"the server sent an unexpected message ({body or 'empty'}); update fp-client")


def encode(value: DeviceSays) -> session_pb2.DeviceMessage:
    """A value as a device's message."""
    if isinstance(value, PlanReport):
        return session_pb2.DeviceMessage(plan=serde.plan_report_to_pb(value))
    if isinstance(value, ProbeReport):
        return session_pb2.DeviceMessage(probe=serde.probe_report_to_pb(value))
    if isinstance(value, Progress):
        return session_pb2.DeviceMessage(progress=serde.progress_to_pb(value))
    return session_pb2.DeviceMessage(failed=serde.failed_to_pb(value))


def diagnose(directory: Path, address: str, timeout: float = 5.0) -> IdentityError | None:
    """Why a server that does not answer might be refusing this certificate, or None when it is merely away.

    A server that accepts a certificate speaks first (HTTP/2 settings); one that refuses it closes after the handshake.
    """
    host, port = split_address(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    refused = IdentityError(
        f"{address}: the server refuses this device's certificate ({directory / 'device.pem'}); "
        "is it this server's, and not revoked? Join again with a new token"
    )
    try:
        context.load_verify_locations(directory / "ca.pem")
        context.load_cert_chain(directory / "device.pem", directory / "device.key")
        with socket.create_connection((host, port), timeout) as raw:
            try:
                with context.wrap_socket(raw, server_hostname=host) as stream:
                    return None if stream.recv(1) else refused
            except ssl.SSLCertVerificationError as error:
                return IdentityError(
                    f"{address}: the server's certificate can't be verified with {directory / 'ca.pem'}: {error.verify_message}"
                )
            except ssl.SSLError as error:
                return refused if "ALERT" in (error.reason or "") else None
            except ConnectionResetError:
                return refused
    except OSError:
        return None


class Session:
    """One open session stream. `device` is the name the server reads from our certificate."""

    def __init__(self, call: Any, device: str, version: str, translate: Translate) -> None:
        self.device, self.server_version = device, version
        self._call, self._translate = call, translate
        self._writing = asyncio.Lock()

    async def send(self, value: DeviceSays) -> None:
        """Raises UnreachableError when the stream has ended."""
        async with self._writing:
            try:
                await asyncio.wait_for(self._call.write(encode(value)), WRITE_SECONDS)
            except TimeoutError:
                self._call.cancel()
                raise UnreachableError(f"the server has read nothing for {WRITE_SECONDS:.0f} s") from None
            except grpc.aio.AioRpcError as error:
                raise await self._translate(error) from None
            except asyncio.InvalidStateError:
                raise UnreachableError("the session has ended") from None

    async def __aiter__(self) -> AsyncIterator[ServerSays]:
        """What the server says, until it ends the stream. Raises its error."""
        bucket = Bucket(MESSAGES, BURST)
        while True:
            try:
                message = await self._call.read()
            except grpc.aio.AioRpcError as error:
                raise await self._translate(error) from None
            if message is grpc.aio.EOF:
                await _ended(self._call, self._translate)
                return
            yield decode(message)
            if (wait := bucket.take(monotonic())) > 0:
                await asyncio.sleep(wait)

    async def close(self) -> None:
        """End our side; the server sees an ordinary end of stream."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(2.0):
                await self._call.done_writing()
        self._call.cancel()


async def _ended(call: Any, translate: Translate) -> None:
    """Raise the error a stream ended with, if any."""
    if (code := await call.code()) != grpc.StatusCode.OK:
        trailing = await call.trailing_metadata() or grpc.aio.Metadata()
        raise await translate(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=await call.details()))


class Connection:
    """A channel to the server with this device's certificate. One for the daemon's life."""

    def __init__(self, directory: Path, address: str, backoff: wire.Backoff | None = None) -> None:
        """Raises IdentityError when certificate or key are missing, damaged or expired."""
        self.directory, self.address = directory, address
        self.backoff = backoff or wire.Backoff()
        # gRPC's own reconnect backoff grows to two minutes and would hide a server that is back.
        options = wire.options(
            wire.CHANNEL_OPTIONS, initial_reconnect_backoff_ms=200, min_reconnect_backoff_ms=2000, max_reconnect_backoff_ms=2000,
            use_local_subchannel_pool=1, max_receive_message_length=MESSAGE,
        )  # fmt: skip
        self.channel = grpc.aio.secure_channel(address, tls.client_credentials(directory), options)
        self._refusals = 0

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close()

    async def translate(self, raw: grpc.aio.AioRpcError) -> FedPrunerError:
        """The error of ours that a failed call stands for; asks `diagnose` when the server seems away."""
        error = wire.from_rpc_error(raw, self.address)
        if raw.code() == grpc.StatusCode.UNAVAILABLE and type(error) in (IdentityError, UnreachableError):
            verdict = await asyncio.to_thread(diagnose, self.directory, self.address)
            # A server that is just going down looks the same once; a refusal is believed the second time.
            self._refusals = self._refusals + 1 if verdict else 0
            if verdict is not None and self._refusals >= 2:
                return verdict
            return UnreachableError(f"{self.address}: can't be reached: {raw.details()}")
        if raw.code() in _WORTH_A_RETRY and type(error) is FedPrunerError:
            return UnreachableError(str(error))
        return error

    async def open(self) -> Session:
        """Open the session: Hello, then Welcome.

        Raises UnreachableError, IdentityError (also for an expired certificate), ProtocolError when the schemas differ.
        """
        tls.check_validity(self.directory / "device.pem")
        call: Any = session_pb2_grpc.SessionsStub(self.channel).Open()
        message: Any
        try:
            hello = session_pb2.Hello(schema=serde.schema(), version=software_version())
            async with asyncio.timeout(ANSWER_SECONDS):
                try:
                    await call.write(session_pb2.DeviceMessage(hello=hello))
                    message = await call.read()
                except grpc.aio.AioRpcError as error:
                    raise await self.translate(error) from None
                except asyncio.InvalidStateError:
                    message = grpc.aio.EOF
                if message is grpc.aio.EOF:
                    await _ended(call, self.translate)
                    raise UnreachableError(f"{self.address}: ended the session before its welcome")
            if message.WhichOneof("body") != "welcome":
                raise ProtocolError(f"{self.address}: the first message is {message.WhichOneof('body')!r}, expected a welcome")
        except TimeoutError:
            call.cancel()
            raise UnreachableError(f"{self.address}: did not answer in {ANSWER_SECONDS:.0f} s") from None
        except BaseException:
            call.cancel()
            raise
        self._refusals = 0
        return Session(call, message.welcome.device, message.welcome.version, self.translate)
