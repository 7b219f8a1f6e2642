"""One device's open stream, as the coordinator sees it."""

from __future__ import annotations

import asyncio

from common.errors import FedPrunerError, LimitError
from fp_server.commands import Send
from fp_server.limits import OUTBOX


class Session:
    """One device's open stream, as the coordinator sees it: a queue of what to say, and whether to hang up."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.outbox: asyncio.Queue[Send | FedPrunerError] = asyncio.Queue()
        self.reason = ""

    def close(self, error: FedPrunerError) -> None:
        """Ask the stream's handler to end it with this error."""
        self.reason = str(error)
        self.outbox.put_nowait(error)

    def say(self, command: Send) -> None:
        """Queue a message. A device that leaves too many unread is hung up: what it has missed is said again when it is back."""
        if self.outbox.qsize() < OUTBOX:
            self.outbox.put_nowait(command)
        elif not self.reason:
            self.close(LimitError(f"{self.device!r} has left {OUTBOX} messages unread"))
