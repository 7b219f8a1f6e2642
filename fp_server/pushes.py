"""One push a device at a time, its unfinished work included; and how often a device may fetch."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeVar

from common.errors import LimitError
from common.types import TaskKey
from fp_server.background import Background
from fp_server.limits import FETCHES
from fp_server.rounds import RunMachine

T = TypeVar("T")


class Push:
    """A push under way. A half-open stream of the same device must not write to the same file."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task, self.superseded, self.over = task, False, asyncio.Event()

    async def give_way(self) -> None:
        """End it; returns when it has let go of its file."""
        if not self.over.is_set():
            self.superseded = True
            self._task.cancel()
            await self.over.wait()


class Unfinished:
    """Work on a device's update that goes on although its push is broken off, because a thread can't be: whoever cuts one push
    after the other must not have the server do it many times at once, nor may the next push meet a file that is being moved."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._work: dict[str, set[asyncio.Task[Any]]] = {}

    def keep(self, device: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin it; to be awaited behind a shield."""
        task = self._background.keep(work)
        self._work.setdefault(device, set()).add(task)
        task.add_done_callback(partial(self._done, device))
        return task

    def _done(self, device: str, task: asyncio.Task[Any]) -> None:
        self._work[device].discard(task)
        if not self._work[device]:
            del self._work[device]

    async def over(self, device: str) -> None:
        """Wait until nothing of the device's is under way."""
        while left := {task for task in self._work.get(device, ()) if not task.done()}:
            await asyncio.wait(left)


class Ration:
    """How much of the adapter each device has fetched in the round under way."""

    def __init__(self) -> None:
        self._had: dict[str, tuple[TaskKey, int, int]] = {}
        """Device -> its round, the adapter's bytes, and those it has fetched."""

    def count(self, device: str, machine: RunMachine, size: int) -> None:
        """Raises LimitError when a device asks for the adapter again and again."""
        if (current := machine.current) is None:
            return
        key, whole, had = self._had.get(device, (None, 0, 0))
        if key != current.opened.key:
            key, whole, had = current.opened.key, sum(one.ref.size for one in machine.objects()), 0
        if had + size > FETCHES * whole:
            text = f"device {device!r} has fetched {had} bytes in this round: {FETCHES} times the adapter's {whole} is all"
            raise LimitError(text)
        self._had[device] = key, whole, had + size
