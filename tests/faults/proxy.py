"""A TCP forwarder between devices and server that cuts, delays or swallows what goes through it, when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from pathlib import Path


class Proxy:
    """Forwards `port` to `target`. Words of one datagram each: ``cut``, ``halfopen SECONDS``, ``delay SECONDS FOR``."""

    def __init__(self, port: int, target: int, control: Path) -> None:
        self.port, self.target, self.control = port, target, control
        self._writers: set[asyncio.StreamWriter] = set()
        self._swallowing: set[asyncio.StreamWriter] = set()
        self._delay, self._until = 0.0, 0.0

    async def serve(self) -> None:
        """Until killed."""
        words = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        words.setblocking(False)
        self.control.unlink(missing_ok=True)
        words.bind(str(self.control))
        asyncio.get_running_loop().add_reader(words, lambda: self._hear(words))
        server = await asyncio.start_server(self._forward, "127.0.0.1", self.port)
        async with server:
            await server.serve_forever()

    def _hear(self, words: socket.socket) -> None:
        said, address = words.recvfrom(200)
        count = self._told(said.decode().split())
        with contextlib.suppress(OSError):  # who asked may be gone
            words.sendto(str(count).encode(), address)

    def _told(self, words: list[str]) -> int:
        """Do it; to how many connections."""
        loop, now = asyncio.get_running_loop(), set(self._writers)
        match words:
            case ["cut"]:
                self._cut(now)
            case ["halfopen", seconds]:  # neither side hears from the other, nor that it is gone
                self._swallowing |= now
                loop.call_later(float(seconds), self._cut, now)
            case ["delay", seconds, lasting]:
                self._delay, self._until = float(seconds), loop.time() + float(lasting)
        return len(now)

    def _cut(self, writers: set[asyncio.StreamWriter]) -> None:
        for writer in writers:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, to = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, to}
        try:
            await asyncio.gather(self._pump(reader, to), self._pump(there, writer))
        finally:
            self._writers -= {writer, to}
            self._swallowing -= {writer, to}

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                if asyncio.get_running_loop().time() < self._until:
                    await asyncio.sleep(self._delay)
                if sink not in self._swallowing:
                    sink.write(data)
                    await sink.drain()
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError, RuntimeError):
                sink.close()


def proxying(port: int, target: int, control: Path) -> Callable[[], object]:
    """The work of a proxy's process."""
    return lambda: asyncio.run(Proxy(port, target, control).serve())


def tell(control: Path, words: str) -> int:
    """Tell a proxy something; how many connections it had to do it to, 0 also when it does not answer yet."""
    own = control.with_suffix(".asking")
    own.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
        to.bind(str(own))
        to.settimeout(2.0)
        try:
            to.sendto(words.encode(), str(control))
            return int(to.recv(20))
        except OSError:
            return 0
