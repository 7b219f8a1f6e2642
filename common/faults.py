"""Named fault points: a test may kill, fail, delay or stop a process exactly there.

`fault("server.object.renamed")` stands wherever a round has just touched disk or wire, or is about to. Unarmed it is one look at
a global that is None, and that is all it ever is in production: points are armed by the environment variable `FP_FAULTS` alone,
which a process reads once, when it starts. Whoever can set a daemon's environment can replace its code just as well (PYTHONPATH,
LD_PRELOAD), so this opens no door; an armed process says so all the same. Nothing on the wire or in a file arms a point.

`FP_FAULTS` is JSON: `{"dir": …, "trace": …, "faults": [{"at": "point" or "point/which", "hit": 1, "do": "kill"}, …]}`.

- `dir`: where it is remembered which of the faults have happened, so that a process that is started again is not killed again.
- `trace`: a file that gets a line for every point that is passed.
- `do`: `kill` (SIGKILL to this process), `fail:ENOSPC` or another errno, `delay:SECONDS`, or `ask:WORDS`: the process waits there
  until whoever watches `dir` has done something from outside (cut its connections, killed its peer) and says so.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

VARIABLE = "FP_FAULTS"
ASKING = 60.0
"""Seconds after which a process that asked goes on by itself."""

DISK = frozenset({
    "server.log.append.before", "server.log.append.written", "server.endpoint.written", "server.elapsed.written",
    "server.object.arriving", "server.object.finished", "server.object.synced", "server.object.renamed", "server.object.discard",
    "server.aggregate.ledger", "server.aggregate.broadcast",
    "server.quarantine.before", "server.certificate.written", "server.operator.written",
    "server.export.layer", "server.export.joined", "server.export.written",
    "device.state.write", "device.state.written", "device.state.renamed", "device.outbox.moved",
    "device.fetch.chunk", "device.fetch.complete", "device.guard.written", "device.health.written",
    "worker.update.write", "worker.store.write", "worker.store.written", "worker.spill.write",
    "common.private.written", "common.fingerprint.written",
})  # fmt: skip
"""Points where a disk that is full or broken would be met, so that `fail` there is what the code has to expect."""

POINTS: dict[str, str] = {
    # The server's process.
    "server.start.locked": "the data directory is this process's; nothing was read yet",
    "server.start.folded": "the log is folded, the store not yet swept",
    "server.start.swept": "what a crash left in the store is gone; what was under way is taken up next",
    "server.start.listening": "the ports answer; endpoint.json is still the old one",
    "server.endpoint.written": "endpoint.json is written under a temporary name",
    "server.elapsed.written": "how long the round has lasted is written and synced under a temporary name",
    "server.stop.draining": "SIGTERM was seen; sessions are about to be ended",
    "server.stop.closed": "the ports are closed, the log is not",
    # The server's log. /which: the event's kind.
    "server.log.append.before": "an event is decided, its transaction begun, and nothing written",
    "server.log.append.written": "the event's row is written and not committed",
    "server.log.append.after": "the event is committed; its machine has not seen it and nobody was told",
    "server.machine.handled": "the machine has seen the event; what follows from it is not done",
    # What the server says and hears. /which: the message.
    "server.session.welcome": "a device is let in; the run does not know of it yet",
    "server.session.heard": "a device's message is read and not acted on",
    "server.session.say": "a command is about to be sent to a device",
    "server.session.said": "a command was handed to the wire",
    # The server's slow work.
    "server.choose.before": "a probe is in; units are about to be chosen",
    "server.choose.after": "units are chosen; no event says so yet",
    "server.review.before": "a round is closed; its updates are about to be compared",
    "server.review.after": "the updates are compared; no event says so yet",
    "server.aggregate.before": "a round is closed; its updates are about to be stacked",
    "server.aggregate.ledger": "a layer's new ledger lies in scratch/",
    "server.aggregate.broadcast": "a layer's new broadcast adapter lies in scratch/",
    "server.aggregate.after": "all layers of a round are stored; no event says so yet",
    # Objects in the server's store. /which: update, ledger or broadcast, where it is known.
    "server.object.arriving": "a piece of an update has come in and is about to be appended",
    "server.object.arrived": "a piece of an update is appended",
    "server.object.finished": "a whole file is about to be synced and moved into the store",
    "server.object.folder": "the object's folder is made and its entry not synced",
    "server.object.synced": "the file is synced and still has its old name",
    "server.object.renamed": "the file has its digest's name; its folder is not synced",
    "server.object.stored": "the object is durable; nothing refers to it yet",
    "server.object.discard": "an object that nothing refers to any more is about to be removed",
    # What the server finds in its directory that is damaged, or that nothing refers to.
    "server.quarantine.before": "an object is damaged and about to be moved to quarantine/",
    "server.quarantine.moved": "the damaged object is in quarantine/; its old folder is not synced, no event says so",
    "server.sweep.scratch": "a file that an interrupted aggregation left is about to be removed",
    "server.sweep.object": "an object that nothing refers to was found and is about to be removed",
    "server.sweep.arrival": "what came in part from a device that is not expected to push is about to be removed",
    # The server's own certificates.
    "server.certificate.written": "server.pem is made anew; the audit trail does not say so yet",
    "server.operator.written": "the operator's new certificate lies beside the old one",
    # Transfers, on the server.
    "server.fetch.before": "a device may fetch an object; nothing of it is sent",
    "server.fetch.chunk": "a piece of an object was sent",
    "server.push.header": "the header of a push is read",
    "server.push.complete": "all of an update has arrived; nothing of it is checked",
    "server.push.checked": "the update is checked and lies in partial/",
    "server.push.stored": "the update is in the store; it does not count yet",
    "server.push.accepted": "the update counts; the device does not know",
    # Export.
    "server.export.layer": "one layer's factors are written to a scratch file",
    "server.export.joined": "the adapter is written; its configuration is not",
    "server.export.written": "the directory is complete under its temporary name",
    "server.export.renamed": "the directory has its name; its parent is not synced",
    # The device's session. /which: the message.
    "device.session.open": "the daemon is about to connect",
    "device.session.hello": "Hello was sent; no Welcome has come",
    "device.session.welcome": "the session is open; nothing was done for it",
    "device.session.heard": "a message is read and not acted on",
    "device.session.say": "a message is about to be sent",
    "device.session.said": "a message was handed to the wire",
    # The device's tasks. /which: probe or train.
    "device.task.begin": "a task is about to begin",
    "device.task.allowed": "policy and sanity have let the task through",
    "device.task.fetched": "the adapter's objects are here",
    "device.task.done": "the worker has answered; nobody was told",
    "device.run.ended": "the server said that the run is over; its files are still here",
    "device.renewal.answered": "a new certificate has come; the old one is still in place",
    # Files of the daemon. /which: the file's kind, where there are several.
    "device.guard.written": "the count of tasks is written under a temporary name",
    "device.health.written": "the sign of life is written under a temporary name",
    "device.state.write": "a note of the daemon is about to be written (/runs, /outbox)",
    "device.state.written": "the note is written and synced under a temporary name",
    "device.state.renamed": "the note has its name; its folder is not synced",
    "device.outbox.dropped": "the note of an older update is gone; its bytes are not",
    "device.outbox.moved": "a finished update has its name; no note says so",
    # Transfers, on the device.
    "device.fetch.before": "an object is about to be fetched",
    "device.fetch.chunk": "a piece of an object has come in and is about to be written",
    "device.fetch.complete": "the object is whole and checked under its temporary name",
    "device.fetch.renamed": "the object has its digest's name",
    "device.push.offset": "the server has said from which byte to push on",
    "device.push.start": "the header is about to be sent",
    "device.push.middle": "a piece of the update was handed to the wire",
    "device.push.end": "the last piece was handed to the wire; no answer has come",
    "device.push.acked": "the server has answered that the update counts",
    # The worker, seen from its daemon and from inside. /which: the task.
    "device.worker.start": "the worker's process is about to be started",
    "device.worker.started": "the process is there and not configured",
    "device.worker.ready": "the worker has said that it is ready",
    "device.worker.asked": "a task was handed to the worker",
    "worker.start": "the worker's process has begun; nothing is loaded",
    "worker.ready": "libraries are loaded and warm; the daemon does not know",
    "worker.task.begin": "a task was read and not begun",
    "worker.task.step": "a task has got further by a layer or a step",
    "worker.update.write": "training is done; the update is about to be written",
    "worker.update.written": "the update is written and synced",
    "worker.store.write": "a quantized layer is about to be written",
    "worker.store.written": "a quantized layer is written under a temporary name",
    "worker.spill.write": "activations are about to be written to the spill file",
    "worker.spill.read": "spilled activations are about to be read back",
    "worker.task.done": "the result is known and not said",
    "worker.task.said": "the result was said",
    # Files that both sides have. /which: the file's name.
    "common.private.written": "a key or certificate is written and synced under a temporary name",
    "common.private.renamed": "the key or certificate has its name; its directory is not synced",
    "common.fingerprint.written": "the weights' fingerprint is written under a temporary name",
}
"""Every point, by name: what has just happened there, or will happen next. After a slash a point may say which of a kind."""


@dataclass(frozen=True)
class _Planned:
    at: str
    hit: int
    do: str
    mark: Path


class _Armed:
    """What `FP_FAULTS` asks of this process."""

    def __init__(self, plan: Mapping[str, object]) -> None:
        self.trace = str(plan.get("trace") or "")
        directory = Path(str(plan.get("dir") or "."))
        self.counts: Counter[str] = Counter()
        self.planned: list[_Planned] = []
        faults = plan.get("faults") or ()
        assert isinstance(faults, list | tuple)
        for number, one in enumerate(faults):
            self.planned.append(_Planned(str(one["at"]), int(one.get("hit", 1)), str(one["do"]), directory / f"fault-{number}"))
            if self.planned[-1].at.partition("/")[0] not in POINTS:
                raise ValueError(f"{VARIABLE}: no fault point is called {self.planned[-1].at!r}")

    def passed(self, point: str, which: str, raises: type[Exception]) -> None:
        full = f"{point}/{which}" if which else point
        if self.trace:
            _append(Path(self.trace), f"{time.time():.3f} {os.getpid()} {full}\n")
        names = {point, full}
        self.counts.update(names)
        for one in self.planned:
            if one.at in names and self.counts[one.at] >= one.hit and _first(one.mark):
                _do(one, full, raises)


_armed: _Armed | None = None


def fault(point: str, which: str = "", raises: type[Exception] = OSError) -> None:
    """Pass a point. `which`: which of its kind; `raises`: what a failure of this place's disk looks like here."""
    if _armed is not None:
        _armed.passed(point, which, raises)


def arm(environment: Mapping[str, str]) -> None:
    """Arm what the environment asks for, once, at a process's start. Raises ValueError for an unknown point."""
    global _armed
    text = environment.get(VARIABLE, "")
    _armed = _Armed(json.loads(text)) if text else None
    if _armed is not None and _armed.planned:
        log.warning("%s: this is a test: %s", VARIABLE, ", ".join(f"{one.do} at {one.at}" for one in _armed.planned))


def _first(mark: Path) -> bool:
    """Whether the fault has not happened before, in this process or an earlier one; from now on it has."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _append(path: Path, line: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def _do(one: _Planned, full: str, raises: type[Exception]) -> None:
    what, _, argument = one.do.partition(":")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "delay":
        time.sleep(float(argument))
    elif what == "fail":
        number = int(getattr(errno, argument))
        log.warning("fault point %s: %s", full, os.strerror(number))
        raise raises(number, os.strerror(number)) if issubclass(raises, OSError) else raises(os.strerror(number))
    elif what == "ask":
        one.mark.with_suffix(".asked").write_text(argument)
        ends = time.monotonic() + ASKING
        while not one.mark.with_suffix(".done").exists() and time.monotonic() < ends:
            time.sleep(0.005)
    else:
        raise ValueError(f"{VARIABLE}: {one.do!r}: not kill, fail:ERRNO, delay:SECONDS or ask:WORDS")
