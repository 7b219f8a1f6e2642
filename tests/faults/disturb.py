"""What a daemon under test has besides its own code: a clock that can jump, and messages that come twice, late or swapped.

All of it is asked for from outside, by files in the process's directory of marks, and installed after the fork.
"""

from __future__ import annotations

import asyncio
import datetime
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

LATE = 1.5
"""Seconds by which a late message comes."""


def install(marks: Path) -> None:
    """In a daemon's process, before its `main`."""
    _clock(marks / "clock")
    _messages(marks / "mischief")


def _clock(path: Path) -> None:
    real = time.time

    def skew() -> float:
        try:
            return float(path.read_text() or 0)
        except OSError:
            return 0.0

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.fromtimestamp(real() + skew(), tz)

    time.time = lambda: real() + skew()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("common", "fp_server", "fp_client") and getattr(module, "datetime", None) is datetime.datetime:
            module.datetime = Clock  # type: ignore[attr-defined]


class _Mischief:
    """Does to the next message what the file says, once for each request."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: list[Callable[[], Any]] = []

    def wanted(self) -> str:
        try:
            what = self._path.read_text()
            self._path.unlink()
        except OSError:
            return ""
        return what

    def __call__(self, say: Callable[[], Any]) -> Any:
        held, self._held = self._held, []
        what = self.wanted()
        if what == "late":
            asyncio.get_running_loop().call_later(LATE, say)
            return None
        if what == "swap":
            self._held.append(say)
            asyncio.get_running_loop().call_later(LATE, self._flush)
            return None
        result = say()
        if what == "twice":
            say()
        for other in held:
            other()
        return result

    def _flush(self) -> None:
        held, self._held = self._held, []
        for say in held:
            say()


def _messages(path: Path) -> None:
    from fp_client import rpc
    from fp_server import sessions

    mischief = _Mischief(path)
    say, send = sessions.Session.say, rpc.Session._send
    kept: set[asyncio.Task[None]] = set()

    def said(self: Any, command: Any) -> None:
        mischief(lambda: say(self, command))

    async def sent(self: Any, value: Any) -> None:
        def begin() -> Awaitable[None]:
            task = asyncio.create_task(send(self, value))
            kept.add(task)
            task.add_done_callback(lambda done: (kept.discard(done), done.cancelled() or done.exception()))
            return task

        if (task := mischief(begin)) is not None:
            await task

    sessions.Session.say = said  # type: ignore[method-assign]
    rpc.Session._send = sent  # type: ignore[method-assign]
