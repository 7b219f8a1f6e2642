"""Does a server serve? Both sides: the health service of its ports, and who asks both, over TLS, and believes nothing else.

Light to import: `python -m fp_server.health` is a container's health check and runs again and again, so nothing of the
command line, of scipy or of pydantic is needed for it.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import ConfigError, FedPrunerError, IdentityError, UnreachableError
from common.transport.replies import serving
from common.transport.tls import client_credentials
from common.transport.wire import from_rpc_error

FILE = "endpoint.json"
"""Where a server writes down how it is reached."""
TIMEOUT = 5.0
"""Seconds a port may take to answer."""
ANYWHERE = ("0.0.0.0", "::", "[::]")
"""Listening on all addresses, localhost among them."""

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Endpoint:
    """Where a running server listens; `host` is how it is reached from its own machine."""

    port: int
    enroll_port: int
    host: str = "localhost"


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The standard health service without its streams: one question, one answer, and nothing that stays.

    The library's own holds a lock while it writes to who watches, and needs the same one to say that the server stops: a peer
    that reads nothing would keep it from stopping.
    """

    def __init__(self) -> None:
        self.serving = False

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Any:  # noqa: N802
        """Whether the server serves. It has no parts: any name but "" is NOT_FOUND."""
        if request.service:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.service[:200]!r}: this server has no such part")
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if self.serving else states.NOT_SERVING)

    async def _unserved(self, request: Any, context: Context) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server answers Check alone; ask again to see a change")

    Watch = List = _unserved  # the stubs that would be inherited leave a trace in the log for every call


def local_host(listen: str) -> str:
    """How a server that listens on this address is reached from its own machine."""
    return "localhost" if listen in ANYWHERE else listen


def host_port(host: str, port: int) -> str:
    """An address as gRPC wants it: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _written(directory: Path) -> Endpoint | None:
    """What a running server wrote; None where it is missing or damaged."""
    try:
        return Endpoint(**json.loads((directory / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_endpoint(directory: Path) -> Endpoint:
    """Where the server of a directory listens, or last listened. Raises ConfigError.

    server.toml is read only where the server never ran, or not to the end of its start.
    """
    if (at := _written(directory)) is not None:
        return at
    from common import config as configuration
    from fp_server.config import ServerConfig

    config = configuration.load(directory / "server.toml", ServerConfig)
    return Endpoint(config.port, config.enroll_port, local_host(config.listen))


def check(directory: Path, timeout: float = TIMEOUT) -> Endpoint:
    """The endpoint, when both ports say SERVING. Raises ConfigError, IdentityError, or UnreachableError with the reason.

    The main port is asked with the operator's certificate, the enrollment port with none, as who joins asks it.
    """
    if (at := _written(directory)) is None:
        raise ConfigError(f"{directory / FILE}: missing or damaged; `fp-server run --dir {directory}` writes it")
    try:
        _ask(host_port(at.host, at.port), client_credentials(directory, "operator"), timeout)
    except IdentityError as error:
        raise IdentityError(
            f"{error} (it is asked as its operator; `fp-server operator --dir {directory}` makes another)"
        ) from None
    _ask(host_port(at.host, at.enroll_port), grpc.ssl_channel_credentials((directory / "ca.pem").read_bytes()), timeout)
    return at


def _ask(address: str, credentials: grpc.ChannelCredentials, timeout: float) -> None:
    # The certificate always names localhost; the address that is listened on need not be in it.
    with grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", "localhost")]) as channel:
        try:
            reply: Any = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as raw:
            error: Any = raw  # a `grpc.Call` too
            raise from_rpc_error(error, address) from None
    if (said := serving(reply, address)) != "SERVING":
        raise UnreachableError(f"{address}: {said}; is it stopping?")


def main() -> int:
    """For a container: 0 when it serves, 1 when not, with a line that says why."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("FP_SERVER_DIR", "fp-server-data"))
    try:
        at = check(directory)
    except FedPrunerError as error:
        print(f"unhealthy: {error}")  # noqa: T201
        return 1
    print(f"serving on port {at.port} (enrollment on {at.enroll_port})")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
