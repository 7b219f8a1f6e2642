"""`Objects` under the session's random devices: pushes that are cut, doubled, broken into pieces, and fetches and offsets between
them. What must hold is what the session's cases check: nothing is counted that was not accepted, nothing twice, the log folds."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc.aio
from calls import Call, Open

from common.bucket import Buckets
from common.pb import objects_pb2
from fp_server.coordinator import Coordinator
from fp_server.operations import kick
from fp_server.transfer import Objects
from fuzz.session import DEVICES, Case, run_case
from fuzz.source import Source

ROUNDS_OF_THE_LOOP = 400
"""A push whose device says all it has to say is over after so many."""


class PushCase(Case):
    """A session's case whose updates come through `Objects`."""

    def _server(self) -> Coordinator:
        made = super()._server()
        self.objects = Objects(made, Open())  # type: ignore[arg-type]
        self.objects._waits = Buckets(1e9, 1e9)  # who is slowed down takes real time
        return made

    async def _move(self) -> None:
        source = self.source
        match source.below(6):
            case 0:
                await self._offset(source.of(DEVICES))
            case 1:
                name = source.of(DEVICES)
                machine = self.coordinator.active
                known = [] if machine is None else sorted(machine.may_fetch(name))
                request = objects_pb2.FetchRequest(digest=source.of((*known, "0" * 64, "")), offset=source.of((0, 1, 1 << 40)))
                await self._end(asyncio.ensure_future(self.objects.Fetch(request, Call(name))), source.below(2) == 1)
            case 2 if source.below(8) == 0:
                await self._revoke(source.of(DEVICES))
            case _:
                await super()._move()

    async def _revoke(self, name: str) -> None:
        """For good, as the authority enters it before the device is hung up."""
        self.log._books.execute("INSERT INTO revocations VALUES (?)", (name,))
        await kick(self.coordinator, name)
        self.peers[name].session = None

    async def _offset(self, name: str) -> int:
        if not self.pushed:
            return 0
        ready = objects_pb2.PushHeader.FromString(self.source.of(self.pushed)[0])
        request = objects_pb2.OffsetRequest(key=ready.key, ref=ready.ref)
        with contextlib.suppress(grpc.aio.AbortError):
            return int((await self.objects.Offset(request, Call(name))).offset)  # type: ignore[arg-type]
        return 0

    async def _arrive(self, name: str, header: bytes, data: bytes) -> None:
        source, first = self.source, objects_pb2.PushHeader.FromString(header)
        how, step = source.below(8), 1 << 20
        if how in (0, 1, 2, 3, 7):
            first.offset, step = source.of((await self._offset(name), source.below(4))), 64 * (1 + source.byte())
        data = data[first.offset :]
        chunks = [objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=data[n : n + step])) for n in range(0, len(data), step)]
        says = [objects_pb2.PushMessage(header=first), *chunks, grpc.aio.EOF]
        if how == 0:  # the line is cut
            says = says[: 1 + source.below(len(says))]
        elif how == 1:  # the device stops in the middle
            says[1 + source.below(len(says) - 1) :] = [grpc.aio.EOF]
        elif how == 2:  # what is no chunk
            says.insert(source.below(len(says)), source.of((says[0], objects_pb2.PushMessage())))
        pushing = [asyncio.ensure_future(self.objects.Push(None, Call(name, says)))]  # type: ignore[arg-type]
        while how == 3 and len(pushing) < 4:  # and again, on another line
            for _ in range(source.below(40)):
                await asyncio.sleep(0)
            pushing.append(asyncio.ensure_future(self.objects.Push(None, Call(name, says))))  # type: ignore[arg-type]
        for one in pushing:
            await self._end(one, how == 0 and source.below(2) == 1)

    async def _end(self, call: asyncio.Future[Any], cut: bool) -> None:
        """See a call to its end; it is cut at some moment, or when it says nothing more. Raises what is no error of ours."""
        for _ in range(self.source.below(40) if cut else ROUNDS_OF_THE_LOOP):
            if call.done():
                break
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait({call})
        if not call.cancelled() and (error := call.exception()) is not None and not isinstance(error, grpc.aio.AbortError):
            raise error


def pushes(data: bytes) -> None:
    """One case, from its bytes."""
    run_case(PushCase, Source(data))


def pushes_seeds() -> list[bytes]:
    """Runs that get somewhere: 4 as a move has every device answer, and as a push's manner is that of an honest one."""
    begin, connect, answer = bytes(5), bytes((5, 0, 0, 5, 1, 0, 5, 2, 0)), bytes((4, 4, 4))
    return [
        begin + connect + answer * 60,
        begin + connect + answer * 4 + bytes((3, 0, 3, 0, 1, 9, 9, 9)) + answer * 40,
        begin + connect + answer * 4 + bytes((0, 0, 0, 1, 0, 0, 0, 2, 0, 0)) + answer * 40,
    ]
