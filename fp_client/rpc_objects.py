"""Objects between device and server: fetch and push, in chunks, each going on from the byte that arrived last.

Retries are bounded: the count begins anew only after at least a chunk has got through. A server that is away and one whose
disk is full are waited for alike.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import grpc.aio

from common.errors import (
    DigestError,
    FedPrunerError,
    LimitError,
    NotFound,
    OffsetError,
    ProtocolError,
    StorageError,
    UnreachableError,
)
from common.faults import fault
from common.pb import objects_pb2, objects_pb2_grpc
from common.transport import serde, wire
from common.transport.replies import readable
from common.types import ObjectRef, UpdateReady
from fp_client.cache import storage_error
from fp_client.rpc import ANSWER_SECONDS, Connection
from fp_client.says import plain

log = logging.getLogger(__name__)

MAX_OBJECT = 4 << 30
"""No adapter object is larger; a server that announces more is refused before a byte is fetched."""

STALL_SECONDS, STALL_BYTES = 60.0, 64 << 10
"""A fetch that brings fewer bytes in so many seconds is cut and tried again: who trickles does not answer."""

WAITED_OUT = (UnreachableError, StorageError, LimitError)
"""What only time can mend, where the server says it; the same StorageError about this device's own disk is final."""

ASKED_AGAIN = (OffsetError, DigestError)
"""What another `Offset` mends: a cut stream's last bytes came in meanwhile, or what had arrived was damaged and dropped."""

AGAIN = 5
"""Times in a row a push asks again for such a reason."""

OnBytes = Callable[[int, int], None]
"""(bytes done, bytes in all); a push says so of a piece that is about to be sent."""


@dataclass
class Sent:
    """What was sent of updates in a round, over all its pushes."""

    bytes: int = 0
    size: int = 0
    """Bytes of the latest of these updates, whole."""
    units: int = 0
    """What it has been trained of."""


class Transfer:
    """Fetches and pushes over a connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def _stub(self, channel: grpc.aio.Channel) -> objects_pb2_grpc.ObjectsAsyncStub:
        stub: objects_pb2_grpc.ObjectsAsyncStub = objects_pb2_grpc.ObjectsStub(channel)
        return stub

    async def admitted(self) -> None:
        """Ask for the offset of nothing: the server looks at who asks before it looks at what, and nothing changes by it.

        Raises IdentityError for a certificate that is revoked or of another role, which the health service lets pass.
        """
        async with self.connection.using() as channel:
            try:
                await self._stub(channel).Offset(objects_pb2.OffsetRequest(), timeout=ANSWER_SECONDS)
            except grpc.aio.AioRpcError as raw:
                error = await self.connection.translate(raw, channel)
                if not isinstance(error, (ProtocolError, NotFound)):  # these are about the question: who asks may ask
                    raise error from None

    async def fetch(self, ref: ObjectRef, target: Path, progress: OnBytes = lambda done, total: None) -> None:
        """Fetch an object into `target`, going on from ``<target>.part`` where one is left.

        Raises DigestError when the bytes are not what was announced, twice; NotFound; UnreachableError and the server's
        StorageError after bounded tries; StorageError about this device's disk at once.
        """
        if ref.size > MAX_OBJECT:
            raise ProtocolError(f"object {ref.digest[:12]}: {ref.size} bytes is more than any adapter object ({MAX_OBJECT})")
        part = target.with_name(target.name + ".part")
        tries, corrupt = 0, 0
        fault("device.fetch.before")
        while True:
            before = part.stat().st_size if part.exists() else 0
            async with self.connection.using() as channel:
                try:
                    await self._fetch_rest(channel, ref, part, progress)
                    break
                except DigestError:
                    part.unlink(missing_ok=True)
                    corrupt += 1
                    if corrupt == 2:
                        raise
                except (grpc.aio.AioRpcError, UnreachableError) as raw:
                    error = await self.connection.translate(raw, channel) if isinstance(raw, grpc.aio.AioRpcError) else raw
                    if not isinstance(error, WAITED_OUT):
                        raise error from None
                    tries = await self._pause(
                        tries, part.stat().st_size - before if part.exists() else 0, error, f"object {ref.digest[:12]}"
                    )
        fault("device.fetch.complete")
        part.replace(target)
        fault("device.fetch.renamed")

    async def _fetch_rest(self, channel: grpc.aio.Channel, ref: ObjectRef, part: Path, progress: OnBytes) -> None:
        digest = hashlib.sha256()
        try:
            with part.open("ab+") as out:
                out.seek(0)
                while piece := out.read(wire.CHUNK):
                    digest.update(piece)
                done = out.tell()
                if done > ref.size:
                    raise DigestError(f"object {ref.digest[:12]}: {done} bytes, announced {ref.size}")
                call = self._stub(channel).Fetch(objects_pb2.FetchRequest(digest=ref.digest, offset=done))
                try:
                    async for chunk in self._steadily(call, ref):
                        if not chunk.data:
                            raise ProtocolError(f"object {ref.digest[:12]}: the server sent a piece of nothing")
                        done += len(chunk.data)
                        if done > ref.size:
                            raise DigestError(f"object {ref.digest[:12]}: more than the {ref.size} bytes announced")
                        fault("device.fetch.chunk")
                        out.write(chunk.data)
                        digest.update(chunk.data)
                        progress(done, ref.size)
                finally:
                    call.cancel()
                out.flush()
        except OSError as error:
            raise storage_error(part, error) from None
        if done < ref.size:
            raise UnreachableError(f"{self.connection.address}: sent {done} of {ref.size} bytes of object {ref.digest[:12]}")
        if digest.hexdigest() != ref.digest:
            raise DigestError(f"object {ref.digest[:12]}: the bytes received have digest {digest.hexdigest()[:12]}")

    async def _steadily(self, call: Any, ref: ObjectRef) -> AsyncIterator[objects_pb2.Chunk]:
        """A call's chunks. Raises UnreachableError when they come too slowly, ProtocolError for one that can't be read."""
        what = f"piece of object {ref.digest[:12]}"
        chunks, came, ends = aiter(call), 0, monotonic() + STALL_SECONDS
        try:
            while True:
                async with asyncio.timeout(ends - monotonic()):
                    chunk = readable(await anext(chunks), what, self.connection.address)
                came += len(chunk.data)
                if came >= STALL_BYTES:
                    came, ends = 0, monotonic() + STALL_SECONDS
                yield chunk
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise UnreachableError(
                f"{self.connection.address}: sent {came} bytes of object {ref.digest[:12]} in {STALL_SECONDS:.0f} s"
            ) from None

    async def push(
        self, ready: UpdateReady, path: Path, progress: OnBytes = lambda done, total: None,
        allowed: Callable[[int], None] = lambda sent: None, sent: Sent | None = None,
    ) -> bool:  # fmt: skip
        """Push an update, going on from what the server has. True when it had been accepted before.

        `allowed` is asked before each try about the bytes that will have been sent after it, those sent again included, and
        those that `sent` brings from earlier pushes.

        Raises TooLate, AlreadyDone, UpdateRejected, NotFound, what `allowed` does, and after bounded tries UnreachableError,
        OffsetError, DigestError and the server's StorageError; StorageError when the update can't be read here.
        """
        tries, again, best, at, sent = 0, 0, 0, 0, sent or Sent()
        broken: list[Exception] = []

        def note(done: int, total: int) -> None:
            nonlocal at
            sent.bytes, at = sent.bytes + done - at, done
            progress(done, total)

        while True:
            async with self.connection.using() as channel:
                try:
                    stub = self._stub(channel)
                    request = objects_pb2.OffsetRequest(key=serde.key_to_pb(ready.key), ref=serde.ref_to_pb(ready.ref))
                    answer = await stub.Offset(request, timeout=ANSWER_SECONDS)
                    reply = readable(answer, "answer about an update's offset", self.connection.address)
                    fault("device.push.offset")
                    if reply.accepted:
                        return True
                    if reply.offset > ready.ref.size:
                        raise ProtocolError(f"the server asks for byte {reply.offset} of an update of {ready.ref.size}")
                    if reply.offset >= best + wire.CHUNK:
                        tries = again = 0
                    best, at = max(best, reply.offset), reply.offset
                    allowed(sent.bytes + ready.ref.size - reply.offset)
                    broken.clear()
                    acked = await stub.Push(_pieces(ready, reply.offset, path, note, broken))
                    done = readable(acked, "answer to a push", self.connection.address)
                    fault("device.push.acked")
                    return bool(done.duplicate)
                except asyncio.CancelledError:
                    if not broken or (task := asyncio.current_task()) is None or task.cancelling():
                        raise
                    raise broken[0] from None  # gRPC tells nobody: it cancels the call, as for a task that ends
                except grpc.aio.AioRpcError as raw:
                    error = await self.connection.translate(raw, channel)
                    if isinstance(error, ASKED_AGAIN) and again < AGAIN:
                        again += 1
                        await asyncio.sleep(self.connection.backoff.delay(again - 1))
                    elif isinstance(error, WAITED_OUT):
                        tries = await self._pause(tries, 0, error, f"run {ready.key.run}, round {ready.key.round + 1}, update")
                    else:
                        raise error from None

    async def _pause(self, tries: int, progressed: int, error: FedPrunerError, what: str) -> int:
        """Wait before the next try; its number, begun anew after real progress. Raises when the tries are used up.

        A refusal is logged at tries 1, 2, 4, 8 and so on. That a server is away the session says.
        """
        tries = 1 if progressed >= wire.CHUNK else tries + 1
        if tries >= self.connection.backoff.attempts:
            raise error
        delay, most = self.connection.backoff.delay(tries - 1), self.connection.backoff.attempts
        if not isinstance(error, UnreachableError) and tries & (tries - 1) == 0:
            log.warning(
                "%s: the server refuses for now: %s; try %d of %d in %.1f s", what, plain(str(error)), tries + 1, most, delay
            )
        await asyncio.sleep(delay)
        return tries


async def _pieces(
    ready: UpdateReady, offset: int, path: Path, progress: OnBytes, broken: list[Exception]
) -> AsyncIterator[objects_pb2.PushMessage]:
    """An update as messages, from a byte on. What ends them too early is put into `broken`: nobody hears what is raised here."""
    try:
        fault("device.push.start")
        yield objects_pb2.PushMessage(header=serde.ready_to_pb(ready, offset))
        with path.open("rb") as file:
            file.seek(offset)
            done = offset
            while piece := file.read(wire.CHUNK):
                done += len(piece)
                progress(done, ready.ref.size)  # before: a stream that breaks while the piece is under way never comes back here
                yield objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=piece))
                fault("device.push.middle")
        fault("device.push.end")
    except Exception as error:
        broken.append(_unreadable(path, error) if isinstance(error, OSError) else error)
        raise


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: the update can't be read: {error.strerror or error}; look at this device's disk. "
        "Asked again, the device trains anew what it still can't read"
    )
