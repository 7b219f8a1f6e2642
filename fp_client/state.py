"""What the daemon remembers on disk: the runs it has joined, and updates the server may not have yet.

Both survive `kill -9` and a loss of power: a file is written whole under a temporary name, synced, renamed, and its directory
synced.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from common.codec import from_json, to_json
from common.errors import NotFound
from common.faults import fault
from common.files import digest_file, make_directory, sync_directory
from common.types import Assignment, ObjectRef, RunSpec, TaskKey, UpdateMetrics, UpdateReady
from fp_client.cache import storage_error

KEPT = 32
"""Runs that are remembered: a server that starts ever new ones can't fill the disk."""
_ENDINGS = (".json", ".json.tmp", ".safetensors", ".safetensors.new")
"""What follows a run's name in its files of the outbox; a run's name has dots too, and no two runs share a file."""


def _write(path: Path, value: object) -> None:
    temporary, kind = path.with_name(path.name + ".tmp"), path.parent.name
    try:
        fault("device.state.write", kind)
        make_directory(path.parent)
        with temporary.open("w") as out:
            json.dump(value, out)
            out.flush()
            os.fsync(out.fileno())
        fault("device.state.written", kind)
        temporary.replace(path)
        fault("device.state.renamed", kind)
        sync_directory(path.parent)
    except OSError as error:
        raise storage_error(path, error) from None


def work_digest(task: Assignment) -> str:
    """sha256 of everything an assignment asks for: an update answers this very assignment or none."""
    return hashlib.sha256(json.dumps(to_json(task), sort_keys=True).encode()).hexdigest()


class Runs:
    """The RunSpecs of the runs this device has joined: tasks name their run, but not its model."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def remember(self, spec: RunSpec) -> list[str]:
        """Keep a run's spec; the names of the runs that must go for it. Raises StorageError."""
        _write(self.directory / f"{spec.run}.json", to_json(spec))
        kept = sorted(self.directory.glob("[a-z0-9]*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [path.stem for path in kept[KEPT:]]

    def get(self, run: str) -> RunSpec:
        """Raises NotFound when this device has not joined such a run."""
        try:
            return from_json(RunSpec, json.loads((self.directory / f"{run}.json").read_text()))
        except (OSError, ValueError):
            raise NotFound(f"run {run!r}: this device has not joined it; send it a plan request first") from None

    def forget(self, run: str) -> None:
        """The run is over."""
        (self.directory / f"{run}.json").unlink(missing_ok=True)


class Outbox:
    """At most one finished update a run: kept until a later one or the run's end, so that it is never trained twice."""

    def __init__(self, directory: Path) -> None:
        """`directory`: the specs of the runs that are remembered lie beside it, in `runs`."""
        self.directory = directory
        self._runs = directory.parent / "runs"

    def blank(self, run: str) -> Path:
        """Where a task may write its update. Raises StorageError."""
        try:
            make_directory(self.directory)
        except OSError as error:
            raise storage_error(self.directory, error) from None
        return self.directory / f"{run}.safetensors.new"

    def put(self, task: Assignment, update: Path, metrics: UpdateMetrics) -> UpdateReady:
        """Take a written update in; what was there for its run goes. Raises StorageError.

        This may be a thread whose task was cancelled because the run is over: then nothing of the update stays.
        """
        run = task.key.run
        ready = UpdateReady(task.key, ObjectRef(digest_file(update), update.stat().st_size), metrics)
        self._drop_update(run)
        try:
            update.replace(self.path(run))
            fault("device.outbox.moved")
        except OSError as error:
            raise storage_error(self.path(run), error) from None
        _write(self.directory / f"{run}.json", {"work": work_digest(task), "ready": to_json(ready)})
        self.sweep()
        return ready

    def sweep(self) -> None:
        """Drop what there is of runs that are not remembered: nobody will name them any more, their end was not heard or came
        while an update was taken in. For the daemon's start; what can't be deleted stays."""
        if not self._runs.is_dir():  # a device that has joined no run, or not a device's directory
            return
        names = [path.name for path in self.directory.glob("[a-z0-9]*")]
        for run in {name.removesuffix(ending) for name in names for ending in _ENDINGS if name.endswith(ending)}:
            with suppress(OSError):
                if not (self._runs / f"{run}.json").exists():  # looked up after its file was seen: a run is remembered first
                    self.drop(run)

    def path(self, run: str) -> Path:
        """The file of a run's update."""
        return self.directory / f"{run}.safetensors"

    def find(self, task: Assignment) -> UpdateReady | None:
        """The update that answers this very assignment, with its bytes intact, or None."""
        try:
            entry = json.loads((self.directory / f"{task.key.run}.json").read_text())
            ready = from_json(UpdateReady, entry["ready"])
            if entry["work"] == work_digest(task) and digest_file(self.path(task.key.run)) == ready.ref.digest:
                return ready
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def drop_task(self, key: TaskKey) -> None:
        """Drop a run's update if it is of this task."""
        try:
            entry = json.loads((self.directory / f"{key.run}.json").read_text())
            if from_json(UpdateReady, entry["ready"]).key == key:
                self._drop_update(key.run)  # a later task of the run may be writing its own
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def drop(self, run: str) -> None:
        """Drop all there is of a run: its update, and what a killed training or daemon has left half-written."""
        self._drop_update(run)
        for ending in _ENDINGS:
            (self.directory / f"{run}{ending}").unlink(missing_ok=True)

    def _drop_update(self, run: str) -> None:
        """The note goes first, so that no note ever names bytes that are gone or others."""
        (self.directory / f"{run}.json").unlink(missing_ok=True)
        fault("device.outbox.dropped")
        self.path(run).unlink(missing_ok=True)
