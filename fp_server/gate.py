"""The gate every call passes before its service sees it: so many at a time, so many a second, so large, and in good time.

Who calls is known from the certificate, or, where there is none, from the address. A caller that goes on although it is refused
has its connections cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from common.bucket import Bucket, Buckets
from common.errors import FedPrunerError, IdentityError, LimitError, ProtocolError, UnreachableError
from common.transport.tls import peer_of
from common.transport.wire import abort
from fp_server import limits as n
from fp_server.hangup import Address, address_of, hang_up

Context = grpc.aio.ServicerContext[Any, Any]
PUSH, FETCH = "/fedpruner.v1.Objects/Push", "/fedpruner.v1.Objects/Fetch"


@dataclass(frozen=True)
class Rules:
    """What a gate lets through: of the main port by identity, of the enrollment port by address."""

    calls: float
    burst: float
    wait: float
    """Seconds a caller above its rate is made to wait at most; 0 refuses it at once."""
    in_all: float | None = None
    """Calls a second of all callers together."""
    at_once: int = n.CALLS_AT_ONCE
    connections: int = n.CONNECTIONS_EACH


def main_rules() -> Rules:
    """The main port: callers have certificates."""
    return Rules(n.CALLS, n.CALLS_BURST, n.CALLS_WAIT)


def enroll_rules(limits: n.ServerLimits) -> Rules:
    """The enrollment port: anyone may call, and many devices may share an address."""
    each, every = limits.enroll_per_second_each, limits.enroll_per_second
    return Rules(each, 10 * each, 0.0, every, at_once=n.CALLS_AT_ONCE, connections=n.OPERATOR_AT_ONCE)


class Caller:
    """What is under way of one identity or address."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.connections: OrderedDict[Address, Connection] = OrderedDict()
        """The longest unused first; closed ones, too, until somebody else calls from the address."""


@dataclass(eq=False)
class Connection:
    """A connection, as far as calls show it: nothing tells when one without calls has closed."""

    caller: Caller
    under_way: int = 0


class Gate(grpc.aio.ServerInterceptor):
    """Admits, slows down, refuses and hangs up. One a port."""

    def __init__(
        self,
        rules: Rules,
        limits: n.ServerLimits,
        complaints: n.Complaints,
        no_fetch: Callable[[Context], Awaitable[None]] | None = None,
    ) -> None:
        """`no_fetch` is told of each fetch that found no turn."""
        self._rules, self._limits, self._complaints, self._no_fetch = rules, limits, complaints, no_fetch
        self.port: int | None = None
        """The port it stands before, once that is known: no connection to another one is cut."""
        self._callers: OrderedDict[str, Caller] = OrderedDict()
        self._connections: dict[Address, Connection] = {}
        """Those of all callers. An address has one: who called from it last. Others' is not there to be cut any more."""
        self._rates = Buckets(rules.calls, rules.burst)
        self._opens = Buckets(n.OPENS, n.OPENS_BURST)
        self._refusals = Buckets(n.REFUSALS, n.REFUSALS_BURST)
        self._in_all = None if rules.in_all is None else Bucket(rules.in_all, 10 * rules.in_all)
        self._under_way: Counter[str] = Counter()
        self._turns = {
            PUSH: asyncio.Semaphore(limits.pushes),
            FETCH: asyncio.Semaphore(limits.fetches),
        }
        self._cutting: set[asyncio.Task[bool]] = set()

    # -- the interceptor -------------------------------------------------------------------------

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap whatever serves a call. Each becomes a streaming one, so that it is seen before its request has come."""
        inner, method = await continuation(handler_call_details), handler_call_details.method
        if inner is None:  # no such method: counted like any other
            return grpc.stream_unary_rpc_method_handler(self._unknown(method))
        decode, encode = _decoder(inner.request_deserializer, method), inner.response_serializer
        if inner.request_streaming and inner.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._streams(inner.stream_stream, method), decode, encode)
        if inner.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._replies(inner.stream_unary, method, True), decode, encode)
        if inner.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._sends(inner.unary_stream, method), decode, encode)
        return grpc.stream_unary_rpc_method_handler(self._replies(inner.unary_unary, method, False), decode, encode)

    def _replies(self, behaviour: Any, method: str, streaming: bool) -> Any:
        async def serve(requests: Any, context: Context) -> Any:
            async with self._admitted(method, context):
                return await behaviour(requests if streaming else await _request(context), context)

        return serve

    def _streams(self, behaviour: Any, method: str) -> Any:
        async def serve(requests: Any, context: Context) -> None:
            async with self._admitted(method, context):
                await behaviour(requests, context)

        return serve

    def _sends(self, behaviour: Any, method: str) -> Any:
        async def serve(requests: Any, context: Context) -> None:
            async with self._admitted(method, context):
                answer = behaviour(await _request(context), context)
                if hasattr(answer, "__aiter__"):
                    async for item in answer:
                        await context.write(item)
                else:
                    await answer

        return serve

    def _unknown(self, method: str) -> Any:
        async def serve(requests: Any, context: Context) -> None:
            async with self._admitted("", context):
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method[:200]!r}: this server has no such method")

        return serve

    # -- admission -------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _admitted(self, method: str, context: Context) -> AsyncIterator[None]:
        """From a call's beginning to its end. Errors of ours become their status, here as in the services."""
        key, operator = _who(context)
        address = address_of(context.peer())
        caller = self._callers.setdefault(key, Caller())
        connection, counted = None, False
        try:
            try:
                connection = self._connected(key, caller, address, operator)
                self._check_headers(context, caller, address)
                self._check_room(key, caller, method, operator)
                caller.calls[method] += 1
                self._under_way[method] += 1
                counted = True
                await self._pace(key, method)
                async with self._turn(method, context):
                    yield
            except FedPrunerError as error:
                if isinstance(error, LimitError):
                    self._complaints.say(key, f"{key} ({context.peer()}): {error}")
                    self._refused(key, caller, address)
                await abort(context, error)
            except grpc.aio.AbortError:
                if context.code() == grpc.StatusCode.PERMISSION_DENIED:
                    self._refused(key, caller, address)
                raise
        finally:
            if counted:
                caller.calls[method] -= 1
                self._under_way[method] -= 1
            self._left(key, caller, connection)

    def _check_headers(self, context: Context, caller: Caller, address: Address | None) -> None:
        """gRPC keeps to the limit once the peer has acknowledged its settings; before that it takes 16 MiB a call."""
        size = sum(32 + len(key) + len(value) for key, value in context.invocation_metadata() or ())
        if size > n.METADATA:
            if address is not None:
                self._cut(caller, address)
            raise LimitError(f"{size} bytes of headers; a call has {n.METADATA} at most")

    def _check_room(self, key: str, caller: Caller, method: str, operator: bool) -> None:
        name, sessions = method.rpartition("/")[2], self._limits.sessions
        most = n.OPERATOR_AT_ONCE if operator else self._rules.at_once
        if caller.calls.total() >= most:
            raise LimitError(f"{key} has {most} calls under way already; no more are served at a time")
        if caller.calls[method] >= (most_of_it := n.METHOD_AT_ONCE.get(method, most)):
            raise LimitError(f"{key} has {most_of_it} {name} calls under way already; no more are served at a time")
        if name == "Open" and not caller.calls[method] and self._under_way[method] >= sessions:
            raise LimitError(f"{sessions} devices have a session already, and server.toml allows no more (limits.sessions)")

    async def _pace(self, key: str, method: str) -> None:
        now = time.monotonic()
        if method.endswith("/Open") and not self._opens.allow(key, now):
            raise LimitError(
                f"{key} opens sessions too often (one in {1 / n.OPENS:.0f} s); does a second daemon use its identity?"
            )
        if (wait := self._rates.take(key, now, self._rules.wait)) > self._rules.wait:
            raise LimitError(f"{key} calls too often ({self._rules.calls:.0f} a second); try again in {wait:.0f} s")
        # After the caller's own: one who is refused for himself must not use up what is everybody's.
        if self._in_all is not None and not self._in_all.allow(now):
            raise LimitError("too many requests from everywhere; try again in a while")
        if wait:
            await asyncio.sleep(wait)

    @contextlib.asynccontextmanager
    async def _turn(self, method: str, context: Context) -> AsyncIterator[None]:
        turns = self._turns.get(method)
        if turns is None:
            yield
            return
        try:
            async with asyncio.timeout(n.WAIT_SECONDS):
                await turns.acquire()
        except TimeoutError:
            if method == FETCH and self._no_fetch is not None:
                await self._no_fetch(context)
            name = method.rpartition("/")[2].lower()
            raise LimitError(f"as many {name}es as this server takes at a time are under way; try again later") from None
        try:
            yield
        finally:
            turns.release()

    # -- connections -----------------------------------------------------------------------------

    def _connected(self, key: str, caller: Caller, address: Address | None, operator: bool) -> Connection | None:
        """Note which connection a caller uses; with too many the one longest unused is cut, or this one."""
        if address is None:
            return None
        connection = self._connections.get(address)
        if connection is None or connection.caller is not caller:
            if connection is not None:  # of a connection that has closed: the port is given again, by a NAT or a proxy, say
                del connection.caller.connections[address]
            connection = self._connections[address] = caller.connections[address] = Connection(caller)
        caller.connections.move_to_end(address)
        most = n.OPERATOR_AT_ONCE if operator else self._rules.connections  # each command of an operator's is one
        if len(caller.connections) > most:
            unused = next((known for known, one in caller.connections.items() if not one.under_way and known != address), None)
            self._forget(caller, unused or address)
            self._cut(caller, unused or address)
            if unused is None:
                raise LimitError(f"{key} uses {most} connections already; this one is cut")
        connection.under_way += 1
        return connection

    def _forget(self, caller: Caller, address: Address) -> None:
        del caller.connections[address], self._connections[address]

    def _left(self, key: str, caller: Caller, connection: Connection | None) -> None:
        if connection is not None:
            connection.under_way -= 1
        if self._callers.get(key) is caller:
            self._callers.move_to_end(key)
        if not caller.calls.total() and len(self._callers) > 2 * self._limits.sessions:
            idle = next((known for known, one in self._callers.items() if not _busy(one)), None)
            if idle is not None:
                gone = self._callers.pop(idle)
                for address in list(gone.connections):
                    self._forget(gone, address)

    def _refused(self, key: str, caller: Caller, address: Address | None) -> None:
        """A caller that does not listen to refusals costs more than it may: it has to shake hands again each time."""
        if address is not None and not self._refusals.allow(key, time.monotonic()):
            self._cut(caller, address)

    def _cut(self, caller: Caller, address: Address) -> None:
        """Unless somebody else has called from the address: then it is his connection."""

        async def later() -> bool:
            await asyncio.sleep(0.05)  # so that the refusal itself gets out
            connection = self._connections.get(address)
            return (connection is None or connection.caller is caller) and await asyncio.to_thread(hang_up, address, self.port)

        if len(self._cutting) < 64:
            task = asyncio.create_task(later())
            self._cutting.add(task)
            task.add_done_callback(self._cutting.discard)


def _busy(caller: Caller) -> bool:
    return caller.calls.total() > 0 or any(one.under_way for one in caller.connections.values())


def _who(context: Context) -> tuple[str, bool]:
    """(who calls, whether as an operator): the certificate's role and name, or the address."""
    with contextlib.suppress(IdentityError):
        peer = peer_of({key: list(values) for key, values in context.auth_context().items()})
        return f"{peer.role} {peer.name!r}", peer.role == "operator"
    address = address_of(context.peer())
    if address is None:
        return context.peer()[:100], False
    host = ipaddress.ip_address(address[0].partition("%")[0])
    return str(ipaddress.ip_network((host, 64), strict=False) if host.version == 6 else host), False


async def _request(context: Context) -> Any:
    """The one request of a call. Raises UnreachableError when it does not come in time, ProtocolError when none comes."""
    try:
        async with asyncio.timeout(n.HELLO_SECONDS):
            request = await context.read()
    except TimeoutError:
        raise UnreachableError(f"the request did not come within {n.HELLO_SECONDS:.0f} s") from None
    if request is grpc.aio.EOF:
        raise ProtocolError("the call ended without a request")
    return request


def _decoder(decode: Callable[[bytes], Any] | None, method: str) -> Callable[[bytes], Any]:
    most = n.SIZES.get(method, n.SMALL)

    def checked(raw: bytes) -> Any:
        if len(raw) > most:
            raise LimitError(f"a message of {len(raw)} bytes; {method.rpartition('/')[2]} takes {most} at most")
        try:
            return raw if decode is None else decode(raw)
        except DecodeError:
            raise ProtocolError(f"a message to {method.rpartition('/')[2]} can't be decoded") from None

    return checked
