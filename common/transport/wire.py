"""What every channel and server of ours has in common: options, error translation, bounded retries."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio

from common.errors import BY_NAME, ConfigError, FedPrunerError, IdentityError, LimitError, UnreachableError

CHUNK = 1 << 20
"""Bytes a chunk: the fastest size on loopback, well under gRPC's default message limit."""

ERROR_KEY = "fp-error"
"""Trailing metadata that carries the error's class name."""

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.http2.bdp_probe", 0),  # with it, windows grow until eight pushes buffer their whole objects
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: nobody's kilobyte becomes a megabyte here
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # without it a frozen peer is found out after a minute more
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
]
SERVER_OPTIONS: list[tuple[str, int]] = [
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.settings_timeout", 10_000),  # until a peer has acknowledged them, not all of the limits hold
    ("grpc.max_concurrent_streams", 64),
    ("grpc.so_reuseport", 0),
    ("grpc.experimental.tcp_max_read_buffer_size", 64 << 10),  # kept for as long as a connection: it grew to 250 KiB and more
]

T = TypeVar("T")


def status_code(error: FedPrunerError) -> grpc.StatusCode:
    """The gRPC status of an error of ours; the table is in `common.errors`."""
    code: grpc.StatusCode = getattr(grpc.StatusCode, error.status)
    return code


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: FedPrunerError) -> NoReturn:
    """End a call with an error of ours, name included."""
    await context.abort(status_code(error), str(error)[:2000], ((ERROR_KEY, type(error).__name__),))
    raise AssertionError("abort returned")  # pragma: no cover


@contextlib.asynccontextmanager
async def errors_to_status(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """In a servicer method: errors of ours become their status."""
    try:
        yield
    except FedPrunerError as error:
        await abort(context, error)


def from_rpc_error(error: grpc.aio.AioRpcError, address: str) -> FedPrunerError:
    """The error of ours that a failed call stands for."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY and isinstance(value, str) and value in BY_NAME:
            return BY_NAME[value](error.details() or value)
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.UNAVAILABLE:
        words = details.lower()
        spoke, shaking = "SSL" in details or "CERTIFICATE" in details, "handshake" in words
        if not spoke and shaking and ("reset" in words or "closed" in words):  # nobody has looked at a certificate
            return UnreachableError(
                f"{address}: the connection was cut in the TLS handshake, as by a server that just stops or is full: {details}"
            )
        if spoke or shaking:
            return IdentityError(
                f"{address}: the TLS handshake failed: {details}. Is this device's certificate from this server?"
            )
        return UnreachableError(f"{address}: can't be reached: {details}")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnreachableError(f"{address}: did not answer in time")
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return IdentityError(f"{address}: {details}")
    return FedPrunerError(f"{address}: {code.name}: {details}")


@dataclass(frozen=True)
class Backoff:
    """Bounded, jittered exponential backoff. `attempts` counts tries without success in between."""

    first: float = 0.5
    longest: float = 30.0
    factor: float = 2.0
    attempts: int = 10

    def delay(self, attempt: int, jitter: Callable[[], float] = random.random) -> float:
        """Seconds to wait after failed try number `attempt` (0-based): half fixed, half random."""
        whole: float = min(self.longest, self.first * self.factor ** min(attempt, 62))
        return whole * (0.5 + 0.5 * jitter())


async def retrying(
    call: Callable[[], Awaitable[T]],
    backoff: Backoff,
    address: str,
    on_retry: Callable[[int, float, FedPrunerError], None] | None = None,
) -> T:
    """Run `call` until it succeeds; only unreachability and limits are waited out, and at most `backoff.attempts` times."""
    for attempt in range(backoff.attempts):
        try:
            return await call()
        except grpc.aio.AioRpcError as raw:
            error = from_rpc_error(raw, address)
            if not isinstance(error, (UnreachableError, LimitError)) or attempt + 1 == backoff.attempts:
                raise error from None
        delay = backoff.delay(attempt)
        if on_retry is not None:
            on_retry(attempt + 1, delay, error)
        await asyncio.sleep(delay)
    raise UnreachableError(f"{address}: can't be reached")


def options(base: Sequence[tuple[str, int]], **extra: int | str) -> list[tuple[str, Any]]:
    """gRPC options as the library wants them."""
    return [*base, *((f"grpc.{name}", value) for name, value in extra.items())]


def split_address(address: str) -> tuple[str, int]:
    """host:port, the host without brackets. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)
