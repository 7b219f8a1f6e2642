"""What a daemon under test has besides its own code: a clock that can jump, messages that come twice, late or swapped, and a copy
of every object that comes into the server's store; in a reference run, tasks that its device fails at.

All of it is asked for from outside, by files in the process's directory of marks, and installed after the fork.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import shutil
import sys
import time
import types
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

LATE = 1.5
"""Seconds by which a late message comes."""


def install(marks: Path) -> None:
    """In a daemon's process, before its `main`."""
    clock(marks / "clock")
    _messages(marks / "mischief")
    if marks.name == "server":
        _keep(marks.parent.parent / "kept")
    if (marks / "refuse").exists():
        _refuse(json.loads((marks / "refuse").read_text()))


def clock(path: Path, issuing: bool = False) -> None:
    """Time as the product sees it is off by the seconds in a file. `issuing`: certificates begin by that time, too; else by the
    real one, which is what TLS goes by."""
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

    own = types.ModuleType(
        "time"
    )  # gRPC's deadlines: its core goes by the real clock, and would find each of them over, or far off
    own.__dict__.update(vars(time))
    time.time = lambda: real() + skew()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "grpc" and getattr(module, "time", None) is time:
            module.time = own  # type: ignore[attr-defined]
        if name == "fp_server.certificates" and not issuing:
            continue
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


def _keep(kept: Path) -> None:
    """Copy each object when it has come into the store and nobody knows yet; and note of what kind it is."""
    from fp_server.objects import ObjectStore

    adopt = ObjectStore.adopt

    def adopted(self: Any, source: Path, digest: str | None = None, kind: str = "update") -> Any:
        ref = adopt(self, source, digest, kind)
        if not (kept / ref.digest).exists():
            (kept / f"{ref.digest}.kind").write_text(kind)
            shutil.copyfile(self.path(ref.digest), kept / f"{ref.digest}.new")
            (kept / f"{ref.digest}.new").replace(kept / ref.digest)
        return ref

    ObjectStore.adopt = adopted  # type: ignore[method-assign]


def _refuse(tasks: list[dict[str, str]]) -> None:
    """The device fails at these tasks, before it begins, with the error that the log of another run has for them."""
    from common import errors
    from fp_client import agent

    def failing(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        async def tried(self: Any, spec: Any, task: Any) -> None:
            for one in tasks:
                if one["stage"] == stage and one["task"] == f"{task.key.round}/{task.key.attempt}":
                    raise getattr(errors, one["error"], errors.WorkerError)(one["message"])
            await work(self, spec, task)

        return tried

    agent.Agent._probe = failing("probe", agent.Agent._probe)  # type: ignore[method-assign]
    agent.Agent._train = failing("train", agent.Agent._train)  # type: ignore[method-assign]
