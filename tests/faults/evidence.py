"""What a federation has left in its directory: the bytes of its adapter, and what its log says of every step that got there."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from common.files import digest_file
from tests.faults import twin
from tests.faults.verdict import attempts_of


def inspect(server: Path, adapter: Path, flipped: list[str]) -> dict[str, Any]:
    """State, ledger, adapter, and what the log tells. `flipped`: files the case has damaged; an adapter object that nobody has
    read since is made again from the ledger when somebody does, so it is no damage of ours."""
    from fp_server import events as e
    from fp_server.exporting import open_run

    with open_run(server, "run") as (machine, store):
        events = [event for _, event in open_log(server)]
        again = {ref.digest for ref in machine.broadcast.values()} & {Path(name).name for name in flipped}
        damaged = [digest for digest in sorted(machine.references() - again) if not intact(store, digest)]
        return {
            "state": machine.phase.value,
            "ledger": {str(layer): ref.digest for layer, ref in sorted(machine.ledger.items())},
            "broadcast": {str(layer): ref.digest for layer, ref in sorted(machine.broadcast.items())},
            "adapter": adapter_digest(adapter),
            "events": Counter(type(event).__name__ for event in events),
            "weights": [event.weights for event in events if isinstance(event, e.RoundCommitted)],
            "damaged": damaged,
            "attempts": attempts_of(events),
            "paused": [f"paused: {event.reason}" for event in events if isinstance(event, e.RunPaused)],
            "twin": twin.recompute(events, server.parent / "kept", adapter),
        }


def intact(store: Any, digest: str) -> bool:
    """Whether an object is there with its very bytes."""
    return store.has(digest) and digest_file(store.path(digest)) == digest


def missing(root: Path, name: str) -> list[str]:
    """What a process had told somebody, by its trace, and its disk does not hold after the power went."""
    passed = Counter(line.split()[2] for line in (root / "marks" / name / "trace").read_text().splitlines())
    if name == "server":
        return lost_events(root / "server", passed)
    told = passed["device.session.said/plan"] and not passed["device.run.ended"]
    return [f"{name} has told its plan, and has forgotten the run"] if told and not remembers(root / name) else []


def lost_events(server: Path, passed: Counter[str]) -> list[str]:
    """Events that were committed, and objects they name, that are not there. Reads a copy of the log: opening it changes it."""
    from fp_server.coordinator import Coordinator
    from fp_server.log import Database, EventLog
    from fp_server.objects import ObjectStore

    with tempfile.TemporaryDirectory() as scratch:
        for path in server.glob("log.sqlite*"):
            shutil.copy(path, scratch)
        database = Database(Path(scratch) / "log.sqlite")
        try:
            log = EventLog(database)
            kept = Counter(type(event).__name__ for _, event in log.replay("run"))
            prefix = "server.log.append.after/"
            told = {point.removeprefix(prefix): count for point, count in passed.items() if point.startswith(prefix)}
            lost = [
                f"{count} {kind} were committed, {kept[kind]} are there" for kind, count in told.items() if kept[kind] < count
            ]
            if kept["RunStarted"]:
                store = ObjectStore(server)
                machine = Coordinator(None, log, store).fold("run")  # type: ignore[arg-type]
                lost += [f"object {d} is missing or damaged" for d in sorted(machine.references()) if not intact(store, d)]
            return lost
        finally:
            database.close()


def remembers(device: Path) -> bool:
    """Whether a device knows the run it has told its plan for."""
    from common.errors import NotFound
    from fp_client.state import Runs

    try:
        return Runs(device / "runs").get("run").run == "run"
    except NotFound:
        return False


def open_log(server: Path) -> list[tuple[float, Any]]:
    """All of the run's events, from the file."""
    from fp_server.log import Database, EventLog

    database = Database(server / "log.sqlite")
    try:
        return list(EventLog(database).replay("run"))
    finally:
        database.close()


def adapter_digest(directory: Path) -> str:
    """sha256 over the exported files."""
    whole = hashlib.sha256()
    for path in sorted(directory.glob("*")):
        whole.update(f"{path.name} {digest_file(path)}\n".encode())
    return whole.hexdigest()
