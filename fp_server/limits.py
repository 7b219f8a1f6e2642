"""What one server allows those who talk to it: every number that bounds a peer, and the table of docs/security.md.

What an operator may want to change is a key of ``[limits]`` in ``server.toml``; the others are constants here.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable

from pydantic import Field, PositiveFloat, PositiveInt

from common.bucket import Bucket, Buckets
from common.config import Section

logger = logging.getLogger("fp_server")

HANDSHAKE_SECONDS = 10.0
"""A new connection may take so long for TLS and the first frames of HTTP/2; then it is closed."""
HELLO_SECONDS = 10.0
"""A call may take so long for its first message: Hello, the header of a push, the request of any other call."""
IDLE_SECONDS = 60.0
"""A connection without a call is closed after this."""
WRITE_SECONDS = 60.0
"""A device that has not read what was said to its session for so long is hung up."""
WAIT_SECONDS = 30.0
"""A push or fetch waits so long for its turn when as many as the server allows are under way."""

STREAMS = 32
"""Calls one connection may have at a time; more are refused by HTTP/2 itself."""
METADATA = 16 << 10
"""Bytes of headers a call may have; from half of it on gRPC refuses some already."""
MESSAGE = 2 << 20
"""Bytes any message to the main port may have: a similarity matrix of 700 units."""
ENROLL_MESSAGE = 64 << 10
"""Bytes a message to the enrollment port may have: anyone may send one."""
SIZES = {
    "/fedpruner.v1.Sessions/Open": MESSAGE,
    "/fedpruner.v1.Objects/Push": (1 << 20) + (64 << 10),  # a chunk and some
    "/fedpruner.v1.Admin/StartRun": (1 << 20) + (128 << 10),
}
"""Bytes one message of a method may have."""
SMALL = 64 << 10
"""The same of every other method."""
RUN_FILE = 64 << 10
"""Bytes a run file may have."""

CALLS, CALLS_BURST, CALLS_WAIT = 50.0, 400.0, 5.0
"""Calls a second of one identity, and how many at once; more are made to wait, up to that many seconds, then refused."""
OPENS, OPENS_BURST = 0.5, 20.0
"""Sessions one identity may open a second, and how many at once: two daemons with one identity replace each other."""
PIECES, PIECES_BURST, SMALL_PIECE = 50.0, 400.0, 64 << 10
"""Pieces of an update below so many bytes that are read a second, and how many at once; our devices send 1 MiB."""
FETCHES = 8
"""How many times the size of the adapter one device may fetch in a round: once is needed, cut lines and restarts come on top."""
CALLS_AT_ONCE = 16
"""Calls of one device at a time."""
OPERATOR_AT_ONCE = 64
"""The same of an operator: every `status --watch` is one."""
METHOD_AT_ONCE = {"/fedpruner.v1.Sessions/Open": 3, "/fedpruner.v1.Objects/Push": 3, "/fedpruner.v1.Objects/Fetch": 4}
"""The same of one method: a newer session or push takes the older one's place while that is still ending."""
CONNECTIONS_EACH = 8
"""Connections one device may use; with a ninth the one longest unused is cut."""
REFUSALS, REFUSALS_BURST = 1.0, 50.0
"""Refused calls of one caller a second, and how many at once; with every further one its connection is cut."""
OUTBOX = 64
"""Messages that wait for a device to read them; with more it is hung up."""
DESCRIPTORS_KEPT = 256
"""Descriptors that are not for connections: log, libraries, objects that are read, files of a round."""


class ServerLimits(Section):
    """``[limits]`` of ``server.toml``."""

    sessions: PositiveInt = 2000
    """Devices with an open session at a time."""
    connections: PositiveInt = 4096
    """Connections to the main port at a time, with or without a session."""
    enroll_connections: PositiveInt = 256
    """Connections to the enrollment port at a time."""
    pushes: PositiveInt = 64
    """Updates that arrive at a time; others wait their turn."""
    fetches: PositiveInt = 128
    """Adapter objects that are sent at a time; others wait their turn."""
    arrival_bytes: PositiveInt = 64 << 30
    """Bytes of updates in part, over all devices."""
    disk_reserve_bytes: int = Field(256 << 20, ge=0)
    """Free space that no update may take: the log needs it."""
    tokens: PositiveInt = 10_000
    """Join tokens nobody has used yet."""
    enroll_per_second: PositiveFloat = 20.0
    """Requests a second to the enrollment port, in all; ten times as many at once."""
    enroll_per_second_each: PositiveFloat = 5.0
    """The same from one address (of IPv6: one /64 network)."""


class Complaints:
    """Log lines about peers that go too far: a few of each, then one in a while with a count of those left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._each, self._all, self._kept_back = Buckets(1 / 30, 3), Bucket(1.0, 20), 0

    def say(self, who: str, text: str) -> None:
        """Log a line about `who`, unless there were many."""
        now = self._clock()
        if not (self._each.allow(who, now) and self._all.allow(now)):
            self._kept_back += 1
            return
        more, self._kept_back = self._kept_back, 0
        logger.warning("%s%s", text, f" ({more} more such lines were left out)" if more else "")


def raise_descriptors(limits: ServerLimits) -> int:
    """Raise the soft limit of open files to the hard one; how many connections to the main port that leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kept = DESCRIPTORS_KEPT + limits.pushes + limits.fetches + limits.enroll_connections
    room = (1 << 20 if hard == resource.RLIM_INFINITY else hard) - kept
    connections = max(1, min(limits.connections, room))
    logger.info(
        "up to %d open files: room for %d connections and %d devices at a time",
        hard, connections, min(limits.sessions, connections),
    )  # fmt: skip
    if connections < limits.connections:
        logger.warning(
            "limits.connections is %d, and the limit of open files (%d) leaves room for %d: raise it (ulimit -Hn, LimitNOFILE=)",
            limits.connections, hard, connections,
        )  # fmt: skip
    return connections
