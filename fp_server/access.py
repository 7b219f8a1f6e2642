"""Who may call what, and for how long: who calls comes from the certificate alone, and no call outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from common.errors import IdentityError, StorageError
from common.transport.tls import Peer, peer_of
from fp_server.audit import Actor, Entry, address
from fp_server.identity import Authority

logger = logging.getLogger("fp_server")

LOOK = 1.0
"""Seconds between looks at the certificates of calls under way."""

Context = grpc.aio.ServicerContext[Any, Any]


class Access:
    """The calls under way, each with the certificate it was let in by."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self._calls: set[tuple[Peer, asyncio.Timeout]] = set()
        self._problem = ""

    def caller(self, context: Context, what: str, *roles: str) -> Peer:
        """Who calls `what`. Raises IdentityError for another role, a revoked or expired certificate, or none of ours."""
        peer: Peer | None = None
        try:
            peer = peer_of({key: list(values) for key, values in context.auth_context().items()})
            self.authority.check(peer, *roles)
        except IdentityError as error:
            self.refused(context, "call", what, error, peer)
            raise
        return peer

    def refused(self, context: Context, action: str, what: str, error: IdentityError, peer: Peer | None = None) -> None:
        """Have a refusal entered in the audit trail."""
        actor = Actor("", address=address(context.peer())) if peer is None else self.actor(context, peer)
        self.authority.refusals.note(Entry(actor, action, what, f"refused: {error}"))

    def actor(self, context: Context, peer: Peer) -> Actor:
        """The caller, as the audit trail names it."""
        return Actor.of(peer, address(context.peer()))

    @contextlib.asynccontextmanager
    async def admitted(self, context: Context, what: str, *roles: str) -> AsyncIterator[Peer]:
        """Who calls `what`, for as long as it may: a revocation or the certificate's end ends the call with IdentityError."""
        peer = self.caller(context, what, *roles)
        try:
            async with asyncio.timeout(None) as limit:
                call = (peer, limit)
                self._calls.add(call)
                try:
                    yield peer
                finally:
                    self._calls.discard(call)
        except TimeoutError:
            if not limit.expired():
                raise
            self.authority.check(peer, *roles)
            raise IdentityError(f"the certificate of {peer.name!r} no longer counts; connect again") from None

    def look(self) -> None:
        """End the calls whose certificate has been revoked or has expired."""
        for call in list(self._calls):
            peer, limit = call
            try:
                self.authority.check(peer, peer.role)
            except IdentityError as error:
                logger.info("a call of %s %s is ended: %s", peer.role, peer.name, error)
                self._calls.discard(call)
                limit.reschedule(asyncio.get_running_loop().time())

    async def watch(self) -> None:
        """Look every second, and enter refusals in the audit trail."""
        while True:
            await asyncio.sleep(LOOK)
            try:
                self.look()
                await self.authority.refusals.flush()
                self._problem = ""
            except StorageError as error:  # what is to be entered is kept for the next look
                if self._problem != str(error):
                    logger.error("refused attempts can't be entered in the audit trail yet: %s", error)
                self._problem = str(error)
            except Exception:  # whatever it was, certificates must be looked at again
                logger.exception("a look at the calls under way failed")
