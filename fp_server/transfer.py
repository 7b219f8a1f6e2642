"""Object transfer for devices: what may be fetched, and how an update arrives."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import grpc.aio

from common.bucket import Buckets
from common.errors import (
    AlreadyDone,
    FedPrunerError,
    IdentityError,
    LimitError,
    NotFound,
    OffsetError,
    ProtocolError,
    StorageError,
    TooLate,
    UnreachableError,
    UpdateRejected,
)
from common.faults import fault
from common.pb import objects_pb2, objects_pb2_grpc
from common.transport import serde
from common.transport.tls import Peer
from common.transport.wire import CHUNK, errors_to_status
from common.types import Assignment, Start, TaskKey, UpdateReady
from fp_server import commands as c
from fp_server.access import Access, Context
from fp_server.coordinator import Coordinator
from fp_server.hangup import address_of, hang_up
from fp_server.limits import HELLO_SECONDS, PIECES, PIECES_BURST, SMALL_PIECE
from fp_server.objects import Arrival
from fp_server.pushes import Push, Ration, Unfinished
from fp_server.quota import Quota
from fp_server.reports import accept, reject
from fp_server.rounds import RunMachine
from fp_server.validation import check_metrics, check_update, norm_limit, starting_points, update_bytes_limit

TELL_SECONDS = 1.0
"""A push's progress counts so often."""
LOOK_SECONDS = 1.0
"""And so often it is looked whether a peer that sends nothing is still expected to."""


class Objects(objects_pb2_grpc.ObjectsServicer):
    """Object transfer for devices."""

    def __init__(self, coordinator: Coordinator, access: Access) -> None:
        self._coordinator, self._access = coordinator, access
        self.port: int | None = None
        """The port it is served on, once that is known: no connection to another one is cut."""
        self._pushing: dict[str, Push] = {}
        self._unfinished = Unfinished(coordinator.background)
        self._under_way = 0
        """Pushes that have their turn, those included that give way to another of their device."""
        self._waits = Buckets(1 / TELL_SECONDS, 1)
        self._small = Buckets(PIECES, PIECES_BURST)
        self._ration = Ration()
        self._quota = Quota(coordinator.store.partial, coordinator.config.limits)
        self._checking = asyncio.Semaphore(1)  # memory must not grow with the number of devices that push at once

    async def Fetch(self, request: objects_pb2.FetchRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """An object of the device's current task, from an offset on."""
        async with errors_to_status(context), self._access.admitted(context, "Fetch", "device") as peer:
            machine = self._coordinator.active
            if machine is None or request.digest not in machine.may_fetch(peer.name):
                raise NotFound(f"object {request.digest[:16]!r}… is not part of this device's current task")
            size = next(one.ref.size for one in machine.objects() if one.ref.digest == request.digest)
            if request.offset > size:
                raise ProtocolError(f"object {request.digest[:16]}… has {size} bytes; there is no byte {request.offset}")
            if request.offset == size:  # a device that has all of it; nothing is read for that
                return
            await self._coordinator.keeper.sendable(request.digest)
            fault("server.fetch.before")
            chunks = self._coordinator.store.chunks(request.digest, request.offset, CHUNK)
            rate, patience = machine.config.run.min_bytes_per_second, machine.config.run.progress_timeout_seconds
            ends = time.monotonic() + patience  # and what all that was sent may have taken: a place here is not held by a trickle
            while chunk := await asyncio.to_thread(next, chunks, b""):
                if self._coordinator.active is not machine or request.digest not in machine.may_fetch(peer.name):
                    raise TooLate(f"object {request.digest[:16]}… is not part of this device's task any more")
                self._ration.count(peer.name, machine, len(chunk))
                self._coordinator.fetched(len(chunk))
                ends = ends + len(chunk) / rate if rate else time.monotonic() + patience  # 0: any progress counts
                await _write(context, objects_pb2.Chunk(data=chunk), ends, self.port)
                fault("server.fetch.chunk")

    async def Offset(self, request: objects_pb2.OffsetRequest, context: Context) -> objects_pb2.OffsetReply:  # noqa: N802
        """How much of an update has arrived."""
        async with errors_to_status(context):
            peer = self._access.caller(context, "Offset", "device")
            key, ref = serde.key_from_pb(request.key), serde.ref_from_pb(request.ref)
            if self._coordinator.machine_for(key.run).check_push(peer.name, key, ref):
                return objects_pb2.OffsetReply(offset=ref.size, accepted=True)
            if self._under_way >= self._coordinator.config.limits.pushes and peer.name not in self._pushing:
                await self._waiting(peer.name, key)  # a device asks before each push, and there the gate turns it away
            return objects_pb2.OffsetReply(offset=self._coordinator.store.arrived(peer.name, ref))
        raise AssertionError("unreachable")

    async def Push(self, request_iterator: Any, context: Context) -> objects_pb2.PushReply:  # noqa: N802
        """Receive an update; the reply means it is durable, checked and counted."""
        async with errors_to_status(context), self._access.admitted(context, "Push", "device") as peer:
            task = asyncio.current_task()
            assert task is not None
            wanted: TaskKey | None = None
            older, current = self._pushing.get(peer.name), Push(task)
            self._pushing[peer.name] = current
            self._under_way += 1
            try:
                if older is not None:
                    await older.give_way()
                await self._unfinished.over(peer.name)
                try:
                    async with asyncio.timeout(HELLO_SECONDS):
                        first = await context.read()
                except TimeoutError:
                    raise UnreachableError(f"no header within {HELLO_SECONDS:.0f} s") from None  # it may have been frozen
                if first is grpc.aio.EOF or first.WhichOneof("body") != "header":
                    raise ProtocolError("a push must begin with its header")
                ready = serde.ready_from_pb(first.header)
                wanted = ready.key
                fault("server.push.header")
                reply = await self._receive(peer, ready, first.header.offset, context)
                fault("server.push.accepted")
                self._coordinator.note("objects")
                return reply
            except StorageError as error:  # what has arrived is kept, and the device tries again
                if wanted is not None:
                    self._expected(peer.name, wanted)  # or the round has closed, and the file gone with it
                    await self._waiting(peer.name, wanted)
                self._coordinator.note("objects", f"the update of {peer.name!r} can't be stored: {error}")
                raise
            except asyncio.CancelledError:
                if not current.superseded:
                    raise
                task.uncancel()  # so that the older call ends with a status and not with silence
                raise ProtocolError("another push of the same device took this one's place") from None
            finally:
                self._under_way -= 1
                current.over.set()
                if self._pushing.get(peer.name) is current:
                    del self._pushing[peer.name]
        raise AssertionError("unreachable")

    async def no_turn(self, context: Context) -> None:
        """A device could not fetch because of what others fetch."""
        with contextlib.suppress(IdentityError):
            device = self._access.caller(context, "Fetch", "device").name
            if (machine := self._coordinator.active) is not None and (current := machine.current) is not None:
                await self._waiting(device, current.opened.key)

    async def _waiting(self, device: str, key: TaskKey) -> None:
        """A device wants to push or fetch, and the server can't: that time is not the device's, within the round's hard limit."""
        if self._waits.allow(device, time.monotonic()):
            await self._coordinator.post(c.NotReceived(device, key))

    async def _receive(self, peer: Peer, ready: UpdateReady, offset: int, context: Context) -> objects_pb2.PushReply:
        device = peer.name
        machine = self._coordinator.machine_for(ready.key.run)
        if machine.check_push(device, ready.key, ready.ref):
            return objects_pb2.PushReply(duplicate=True)
        assignment = machine.assignment(device, ready.key)
        try:
            check_metrics(ready.metrics, len(assignment.units))
        except UpdateRejected as error:
            await reject(self._coordinator, device, ready.key, error)
            raise
        limit = update_bytes_limit(assignment, machine.manifest)
        if ready.ref.size > limit:
            text = f"the update announces {ready.ref.size} bytes; this assignment can't need more than {limit}"
            await reject(self._coordinator, device, ready.key, ProtocolError(text))
            raise ProtocolError(text)
        arrival = self._coordinator.store.arrival(device, ready.ref)
        _check_offset(offset, arrival.expected)  # before anything is read
        async with contextlib.AsyncExitStack() as room:
            try:
                await room.enter_async_context(self._quota.held(device, ready.ref.size))
            except LimitError:  # what others send is in the way
                if self._quota.fits(ready.ref.size):
                    await self._waiting(device, ready.key)
                raise
            opening = self._unfinished.keep(device, asyncio.to_thread(arrival.open))
            try:
                _check_offset(offset, await asyncio.shield(opening))
                await self._append(device, ready, arrival, context)
            finally:
                await asyncio.shield(self._unfinished.keep(device, _closed(arrival, opening)))
        return await asyncio.shield(self._unfinished.keep(device, self._settle(peer, ready, machine, assignment, arrival)))

    async def _settle(
        self, peer: Peer, ready: UpdateReady, machine: RunMachine, assignment: Assignment, arrival: Arrival
    ) -> objects_pb2.PushReply:
        """Check what has come whole, and count it. It is done whole although the push is broken off meanwhile."""
        device = peer.name
        fault("server.push.complete")
        path = await asyncio.to_thread(arrival.finish)
        try:
            norm = norm_limit(machine.config.limits.max_update_norm, self._coordinator.config.max_update_norm)
            given = assignment.adapter if assignment.spec.start is Start.GLOBAL else ()
            paths = {unit.ref.digest: await self._coordinator.keeper.readable(unit.ref.digest) for unit in given}
            starts = starting_points(assignment.spec.start, assignment.adapter, paths.__getitem__)

            async def check() -> None:
                async with self._checking:
                    self._expected(device, ready.key)  # it may have waited for its turn
                    await asyncio.to_thread(check_update, path, assignment, machine.manifest, norm, starts)

            checking = self._unfinished.keep(device, check())
            while not (await asyncio.wait({checking}, timeout=TELL_SECONDS))[0]:
                await self._waiting(device, ready.key)  # the others' updates and its own take the server's time
            checking.result()
        except (TooLate, NotFound):
            arrival.discard()
            raise
        except StorageError:  # what the device started with can't be read: the server's trouble; the device tries again
            for unit in assignment.adapter:
                await self._coordinator.keeper.readable(unit.ref.digest)
            raise
        except FedPrunerError as error:
            arrival.discard()
            await reject(self._coordinator, device, ready.key, error)
            raise
        fault("server.push.checked")
        self._access.authority.check(peer, "device")  # it may have been revoked a moment ago
        try:
            with self._coordinator.keeper.held(ready.ref.digest):
                await asyncio.to_thread(arrival.adopt)
                fault("server.push.stored")
                return objects_pb2.PushReply(duplicate=await accept(self._coordinator, device, ready))
        except (TooLate, NotFound, AlreadyDone):  # since a moment ago
            self._coordinator.keeper.let_go(ready.ref.digest)
            raise

    def _expected(self, device: str, key: TaskKey) -> None:
        """Raises TooLate or NotFound as soon as the round is closed or the device is out of it."""
        self._coordinator.machine_for(key.run).assignment(device, key)

    async def _append(self, device: str, ready: UpdateReady, arrival: Arrival, context: Context) -> None:
        def expected() -> None:
            self._expected(device, ready.key)

        told = 0.0
        while (message := await _read(context, expected)) is not grpc.aio.EOF:
            if message.WhichOneof("body") != "chunk":
                raise ProtocolError("after its header a push holds chunks only")
            if len(message.chunk.data) < SMALL_PIECE and (wait := self._small.take(device, time.monotonic())):
                await asyncio.sleep(wait)
            await asyncio.to_thread(arrival.write, message.chunk.data)
            if (now := time.monotonic()) - told >= TELL_SECONDS:
                told = now
                expected()
                seen = c.ProgressSeen(device, ready.key, "push", arrival.offset, ready.ref.size, measured=True)
                await self._coordinator.post(seen)


async def _closed(arrival: Arrival, opening: asyncio.Task[int]) -> None:
    await asyncio.wait({opening})
    await asyncio.to_thread(arrival.close)


def _check_offset(offset: int, have: int) -> None:
    if offset != have:
        raise OffsetError(f"the push begins at byte {offset}, expected {have}; ask Offset first")


async def _read(context: Context, expected: Callable[[], None]) -> Any:
    """The next message. Raises what `expected` does, which is asked again and again: a peer that sends nothing, or a byte now and
    then, must not hold its place here for longer than in the round."""
    reading = asyncio.ensure_future(context.read())
    try:
        while not (await asyncio.wait({reading}, timeout=LOOK_SECONDS))[0]:
            expected()
        return reading.result()
    finally:
        reading.cancel()


async def _write(context: Context, message: Any, ends: float, port: int | None) -> None:
    """Send a message. A peer that has not read it by `ends`, of the monotonic clock, has its connection cut: an orderly end would
    wait for it, too."""
    writing = asyncio.ensure_future(context.write(message))
    try:
        timeout = max(0.0, ends - time.monotonic())
        if not (await asyncio.wait({writing}, timeout=timeout))[0] and (address := address_of(context.peer())) is not None:
            await asyncio.to_thread(hang_up, address, port)
        await writing
    finally:
        writing.cancel()
