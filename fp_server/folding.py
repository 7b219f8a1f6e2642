"""The event log folded into the state of a run: at a start, for an export, to check a directory."""

from __future__ import annotations

from common.errors import NotFound
from fp_server import events as e
from fp_server.log import EventLog
from fp_server.rounds import RunMachine
from fp_server.roundstate import Entry, History
from fp_server.work import started_config


def fold(log: EventLog, run: str) -> RunMachine:
    """A run's state from its events. Raises NotFound, DamagedError."""
    machine: RunMachine | None = None
    for at, event in log.replay(run):
        if isinstance(event, e.RunStarted):
            machine = RunMachine(started_config(event, f"run {run}"), event.manifest)
        if machine is not None:
            machine.handle(event, at)
    if machine is None:
        raise NotFound(f"no run {run!r} here (`fp-server runs` lists them)")
    return machine


def past(log: EventLog, run: str, index: int, count: int) -> list[Entry]:
    """At most `count` ended rounds of a run from the 0-based `index` on, read from the log. For a thread of its own."""
    _, started = next(log.replay(run))
    assert isinstance(started, e.RunStarted)
    machine = RunMachine(started_config(started, f"run {run}"), started.manifest, History(count))
    for at, event in log.replay(run, log.opened(run, index)):
        machine.handle(event, at)
        if machine.history.total == count:
            break
    return list(machine.history)
