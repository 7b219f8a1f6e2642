"""The device's side of the wire: the channel and the session stream. Values in, values out. Objects: `rpc_objects`.

gRPC reports a refused certificate as UNAVAILABLE, the same as a server that is down; `diagnose` tells the two apart.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from common.errors import FedPrunerError, IdentityError, ProtocolError, UnreachableError
from common.faults import fault
from common.pb import session_pb2, session_pb2_grpc
from common.transport import serde, tls, wire
from common.transport.replies import readable
from common.version import installed
from fp_client.says import DeviceSays, ServerSays, decode, encode, plain

log = logging.getLogger(__name__)

ANSWER_SECONDS = 20.0
"""How long the server may take for Welcome or an offset."""
WRITE_SECONDS = 60.0
"""How long it may leave unread what this device says."""
MESSAGE = 4 << 20
"""Bytes a server's message may have."""
PAUSES = (0.3, 1.0)
"""Seconds between the looks at a server that seems to refuse a certificate."""

Translate = Callable[[grpc.aio.AioRpcError], Awaitable[FedPrunerError]]

_WORTH_A_RETRY = (
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
"""What a server that is stopping or overloaded answers, when the error is none of ours."""

_AROUND = re.compile(
    r"failed to connect to all addresses; last error: \w+: ipv[46]:\S+: (Failed to connect to remote host: )?"
    r"|errors resolving .*address lookup failed for \S+: "
)
"""What gRPC puts around the system's words for a server that can't be reached."""


def diagnose(directory: Path, address: str, timeout: float = 5.0, pauses: tuple[float, ...] = PAUSES) -> IdentityError | None:
    """Why a server that does not answer might be refusing this certificate, or None when it is merely away.

    A server that accepts a certificate speaks first (HTTP/2 settings); one that refuses it closes after the handshake, without
    a word. So does one that is killed just then, and nobody listens afterwards: a refusal counts when it is one at every look.
    """
    verdict = _look_at(directory, address, timeout)
    for pause in pauses:
        if verdict is None:
            return None
        time.sleep(pause)
        verdict = _look_at(directory, address, timeout)
    return verdict


def _look_at(directory: Path, address: str, timeout: float) -> IdentityError | None:
    host, port = wire.split_address(address)
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
                stream = context.wrap_socket(raw, server_hostname=host)
            except ssl.SSLCertVerificationError as error:
                return UnverifiedServer(
                    f"{address}: the server's certificate can't be verified with {directory / 'ca.pem'}: {error.verify_message}"
                )
            except ssl.SSLError:  # in TLS 1.3 a refusal comes after the handshake: this may be anyone
                return None
            with stream:  # whoever cuts a connection before this point has not seen a certificate
                try:
                    return None if stream.recv(1) else refused
                except ssl.SSLError as error:
                    return refused if "ALERT" in (error.reason or "") else None
                except ConnectionResetError:
                    return refused
    except OSError:
        return None


class UnverifiedServer(IdentityError):
    """Whoever answers there has no certificate of our CA. It may be anyone, for a while: no reason for a daemon to end."""


class Session:
    """One open session stream. `device` is the name the server reads from our certificate; `held` ends stream and channel."""

    def __init__(self, call: Any, held: AsyncExitStack, device: str, version: str, address: str, translate: Translate) -> None:
        self.device, self.server_version, self.address = device, version, address
        self._call, self._held, self._translate = call, held, translate
        self._writing = asyncio.Lock()
        self._sending: set[asyncio.Task[None]] = set()

    async def send(self, value: DeviceSays) -> None:
        """Raises UnreachableError when the stream has ended.

        A message that was begun is written whole although its sender is cancelled meanwhile (its task is dropped, say): gRPC
        ends the whole stream when a write is cancelled.
        """
        sending = asyncio.create_task(self._send(value))
        self._sending.add(sending)
        sending.add_done_callback(self._sent)
        await asyncio.shield(sending)

    def _sent(self, sending: asyncio.Task[None]) -> None:
        self._sending.discard(sending)
        if not sending.cancelled():
            sending.exception()  # nobody waits for it any more when its sender was cancelled

    async def _send(self, value: DeviceSays) -> None:
        async with self._writing:
            try:
                message = encode(value)
                kind = message.WhichOneof("body") or ""
                fault("device.session.say", kind)
                async with asyncio.timeout(WRITE_SECONDS):
                    await self._call.write(message)
                fault("device.session.said", kind)
            except TimeoutError:
                self._call.cancel()
                raise UnreachableError(f"the server has read nothing for {WRITE_SECONDS:.0f} s") from None
            except grpc.aio.AioRpcError as error:
                raise await self._translate(error) from None
            except (asyncio.InvalidStateError, asyncio.CancelledError):
                raise UnreachableError("the session has ended") from None

    async def __aiter__(self) -> AsyncIterator[ServerSays]:
        """What the server says, until it ends the stream. Raises its error, ProtocolError for what can't be read."""
        while True:
            try:
                message = await self._call.read()
            except grpc.aio.AioRpcError as error:
                raise await self._translate(error) from None
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                raise UnreachableError("the session's stream was cancelled") from None  # the call, and not this task
            if message is grpc.aio.EOF:
                await _ended(self._call, self._translate)
                return
            yield heard(message, self.address)

    async def finish(self) -> None:
        """Say that no more will come: the server ends the stream, and whoever iterates over it comes to its end."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(2.0):
                await self._call.done_writing()

    async def close(self) -> None:
        """End our side; the server sees an ordinary end of stream."""
        await self.finish()
        await self._held.aclose()


def _reason(details: str) -> str:
    """Why a server can't be reached, without gRPC's own words around the system's."""
    if (around := _AROUND.match(details)) is None:
        return details
    words = details[around.end() :].rstrip("]")
    return words[:1].lower() + words[1:]


def heard(message: session_pb2.ServerMessage | None, address: str) -> ServerSays:
    """What a session's stream has brought, as a value. Raises ProtocolError."""
    message = readable(message, "message", address)
    fault("device.session.heard", message.WhichOneof("body") or "")
    return decode(message)


async def _ended(call: Any, translate: Translate) -> None:
    """Raise the error a stream ended with, if any."""
    if (code := await call.code()) != grpc.StatusCode.OK:
        trailing = await call.trailing_metadata() or grpc.aio.Metadata()
        raise await translate(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=await call.details()))


class Connection:
    """A channel to the server with this device's certificate, for the daemon's life.

    A certificate that is renewed in the directory is shown from the next session, fetch or push on; what is under way goes on
    over the channel it began with, which is closed when nobody uses it any more.
    """

    def __init__(self, directory: Path, address: str, backoff: wire.Backoff | None = None) -> None:
        """Raises IdentityError when certificate or key are missing, damaged or expired."""
        self.directory, self.address = directory, address
        self.backoff = backoff or wire.Backoff()
        self._certificate = directory / "device.pem"
        self._stamp = self._look()
        self.channel = self._connect()
        self._users: dict[grpc.aio.Channel, int] = {}
        self._refusals = 0

    def _connect(self) -> grpc.aio.Channel:
        # gRPC's own reconnect backoff grows to two minutes and would hide a server that is back; so would its half a minute
        # between two look-ups of the name, when a container comes back at another address.
        options = wire.options(
            wire.CHANNEL_OPTIONS, initial_reconnect_backoff_ms=200, min_reconnect_backoff_ms=2000, max_reconnect_backoff_ms=2000,
            use_local_subchannel_pool=1, dns_min_time_between_resolutions_ms=2000, max_receive_message_length=MESSAGE,
        )  # fmt: skip
        return grpc.aio.secure_channel(self.address, tls.client_credentials(self.directory), options)

    def _look(self) -> tuple[int, int]:
        with suppress(OSError):
            stat = self._certificate.stat()
            return stat.st_ino, stat.st_mtime_ns
        return 0, 0

    @asynccontextmanager
    async def using(self) -> AsyncIterator[grpc.aio.Channel]:
        """The channel with the certificate as it is now; not closed before the end of the block."""
        await self._refresh()
        channel = self.channel
        self._users[channel] = self._users.get(channel, 0) + 1
        try:
            yield channel
        finally:
            self._users[channel] -= 1
            await self._let_go(channel)

    def _outdated(self, channel: grpc.aio.Channel) -> bool:
        return channel is not self.channel or self._look() != self._stamp

    async def _refresh(self) -> None:
        if (stamp := self._look()) == self._stamp:
            return
        self._stamp, old = stamp, self.channel
        try:
            self.channel = self._connect()
        except IdentityError as error:
            log.warning("%s; the certificate before it is used further", error)
            return
        log.info("%s: renewed; shown from now on", self._certificate)
        self._refusals = 0
        await self._let_go(old)

    async def _let_go(self, channel: grpc.aio.Channel) -> None:
        if channel is not self.channel and not self._users.get(channel):
            self._users.pop(channel, None)
            await channel.close()

    async def close(self) -> None:
        """Close all channels."""
        for channel in {self.channel, *self._users}:
            await channel.close()

    async def translate(self, raw: grpc.aio.AioRpcError, channel: grpc.aio.Channel | None = None) -> FedPrunerError:
        """The error of ours that a failed call stands for; asks `diagnose` when the server seems away.

        A refusal of the certificate is worth another try when that of `channel` has been renewed meanwhile.
        """
        error = wire.from_rpc_error(raw, self.address)
        if isinstance(error, IdentityError) and channel is not None and self._outdated(channel):
            return UnreachableError(f"{error}; it has been renewed")
        if raw.code() == grpc.StatusCode.UNAVAILABLE and type(error) in (IdentityError, UnreachableError):
            verdict = await asyncio.to_thread(diagnose, self.directory, self.address)
            if isinstance(verdict, UnverifiedServer):
                self._refusals = 0
                return UnreachableError(str(verdict))
            # A server that is just going down looks the same once; a refusal is believed the second time.
            self._refusals = self._refusals + 1 if verdict else 0
            if verdict is not None and self._refusals >= 2:
                return verdict
            return UnreachableError(f"{self.address}: can't be reached: {_reason(raw.details() or '')}")
        if raw.code() in _WORTH_A_RETRY and type(error) is FedPrunerError:
            return UnreachableError(str(error))
        return error

    async def open(self) -> Session:
        """Open the session: Hello, then Welcome.

        Raises UnreachableError, IdentityError (also for an expired certificate), ProtocolError when the schemas differ, and the
        server's errors, its StorageError for one.
        """
        fault("device.session.open")
        tls.check_validity(self._certificate)
        async with AsyncExitStack() as held:
            channel = await held.enter_async_context(self.using())
            translate = partial(self.translate, channel=channel)  # what is said of an older certificate is no news
            call: Any = session_pb2_grpc.SessionsStub(channel).Open()
            held.callback(call.cancel)
            welcome = await self._greet(call, translate)
            fault("device.session.welcome")
            self._refusals = 0
            name, version = plain(welcome.device, 64), plain(welcome.version, 40)
            return Session(call, held.pop_all(), name, version, self.address, translate)

    async def _greet(self, call: Any, translate: Translate) -> session_pb2.Welcome:
        message: Any
        try:
            hello = session_pb2.Hello(schema=serde.schema(), version=installed())
            async with asyncio.timeout(ANSWER_SECONDS):
                try:
                    await call.write(session_pb2.DeviceMessage(hello=hello))
                    fault("device.session.hello")
                    message = await call.read()
                except grpc.aio.AioRpcError as error:
                    raise await translate(error) from None
                except asyncio.InvalidStateError:
                    message = grpc.aio.EOF
                if message is grpc.aio.EOF:
                    await _ended(call, translate)
                    raise UnreachableError(f"{self.address}: ended the session before its welcome")
        except TimeoutError:
            raise UnreachableError(f"{self.address}: did not answer in {ANSWER_SECONDS:.0f} s") from None
        message = readable(message, "welcome", self.address, UnreachableError)  # a ProtocolError here would end the daemon
        if (body := message.WhichOneof("body")) != "welcome":
            raise ProtocolError(f"{self.address}: the first message is {body!r}, expected a welcome")
        return message.welcome  # type: ignore[no-any-return]
