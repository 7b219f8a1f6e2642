"""Ports for the processes of a test."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """A port nobody listens on now."""
    for _ in range(100):  # below those a system gives to clients, one of which could take it while a server is down
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")
