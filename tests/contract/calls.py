"""A call of `Objects` without a wire: its context, and an access that lets in whoever calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import grpc.aio

from common.transport.tls import Peer


class Call:
    """One call's context. `says`: what its peer says, in order; an exception is raised, and after the last it is silent."""

    def __init__(self, device: str = "a", says: Sequence[Any] = ()) -> None:
        self.device, self.sent, self.error = device, list[Any](), ""
        self._says, self.reading, self.cut = list(says), asyncio.Event(), asyncio.Event()

    async def read(self) -> Any:
        self.reading.set()
        if not self._says:
            await asyncio.Event().wait()
        if isinstance(said := self._says.pop(0), Exception):
            raise said
        return said

    async def write(self, message: Any) -> None:
        self.sent.append(message)

    async def abort(self, code: Any, details: str = "", metadata: Any = ()) -> None:
        self.error = f"{dict(metadata)['fp-error']}: {details}"
        raise grpc.aio.AbortError

    def peer(self) -> str:
        return "ipv4:192.0.2.1:443"


class Open:
    """Lets in whoever calls, as the device it says it is."""

    authority = SimpleNamespace(check=lambda peer, role: None)

    def caller(self, context: Any, what: str, *roles: str) -> Peer:
        return Peer("device", context.device)

    @contextlib.asynccontextmanager
    async def admitted(self, context: Any, what: str, *roles: str) -> AsyncIterator[Peer]:
        yield self.caller(context, what)
