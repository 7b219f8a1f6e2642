"""Cutting a connection that gRPC holds.

grpc.aio ends calls and never a connection: a peer whose calls are all refused could keep its connections for ever. The kernel
knows the socket by its peer's address, and shutting it down looks to gRPC like a peer that has hung up.
"""

from __future__ import annotations

import os
import socket
import stat
from urllib.parse import unquote

Address = tuple[str, int]


def address_of(peer: str) -> Address | None:
    """(host, port) of a peer as gRPC names it: ``ipv4:192.0.2.1:443`` or ``ipv6:%5B2001:db8::1%5D:443``; None for others."""
    kind, _, rest = unquote(peer).partition(":")
    host, _, port = rest.rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdigit():
        return None
    return _plain(host.strip("[]")), int(port)


def _plain(host: str) -> str:
    return host.removeprefix("::ffff:") if host.startswith("::ffff:") and "." in host else host


def hang_up(peer: Address, port: int | None = None) -> bool:
    """Shut down this process's sockets with that peer, on that port of ours or on any; whether there was one.

    Only where there is a /proc (Linux). A peer may have one port of its own for two connections, to different ports here or to
    different addresses of this machine: which of the latter gRPC means it does not say, so that both are cut.
    """
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    except OSError:
        return False
    found = False
    for descriptor in descriptors:
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            # A copy: gRPC may close its own at any moment, and the number may then be another file's.
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    host, theirs = connection.getpeername()[:2]
                    if (_plain(host), theirs) == peer and port in (None, connection.getsockname()[1]):
                        connection.shutdown(socket.SHUT_RDWR)
                        found = True
        except OSError:  # closed meanwhile, or not connected
            continue
    return found
