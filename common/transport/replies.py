"""What a client reads. Where a message doesn't decode, `grpc.aio` hands over None and says so in its own log alone."""

from __future__ import annotations

from typing import Any, TypeVar

from grpc_health.v1 import health_pb2

from common.errors import FedPrunerError, ProtocolError

M = TypeVar("M")


def readable(message: M | None, what: str, address: str, error: type[FedPrunerError] = ProtocolError) -> M:
    """The message. Raises `error` naming it and who sent it when it could not be decoded."""
    if message is None:
        raise error(f"{address}: the server's {what} can't be read: its bytes are no such message")
    return message


def serving(reply: Any, address: str) -> str:
    """The name of the state in a health service's reply, ``SERVING`` for one. Raises ProtocolError."""
    status = readable(reply, "health", address).status
    try:
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
    except ValueError:
        return f"state {status}, which has no name"
