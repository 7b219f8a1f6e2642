"""What the device keeps on disk: runs, unpushed updates, cached objects."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import InUseError, NotFound, StorageError
from common.types import Assignment, ObjectRef, Part, ProbeSpec, RunSpec, TaskKey, TrainSpec, UnitId, UpdateMetrics
from fp_client.app import only_daemon
from fp_client.cache import ObjectCache
from fp_client.state import Outbox, Runs
from tests.unit.disk import Disk

KEY = TaskKey("r", 0, 0)
TRAIN = TrainSpec(5, 4, 128, 1e-4, 8, 16.0, ("self_attn.q_proj",), 1)
SPEC = RunSpec("r", "m", "f" * 64, "fedpruner", Part.LAYER, TRAIN, ProbeSpec(), 8, 3)
TASK = Assignment(KEY, (UnitId(0),), ((UnitId(0),),), ((1.0,),), TRAIN, (), 4, True)


def test_runs_are_remembered_until_they_end(tmp_path):
    Runs(tmp_path).remember(SPEC)
    assert Runs(tmp_path).get("r") == SPEC
    Runs(tmp_path).forget("r")
    with pytest.raises(NotFound, match="has not joined"):
        Runs(tmp_path).get("r")


def test_a_run_that_was_told_about_is_remembered_after_the_power_went(tmp_path, monkeypatch):
    """Also where the directory was made before, by who did not sync it."""
    for name in ("made", "runs"):
        (tmp_path / name).mkdir()
    disk = Disk(tmp_path, monkeypatch)
    disk.names[tmp_path.stat().st_ino] = {}
    Runs(tmp_path / "runs").remember(SPEC)
    Runs(tmp_path / "new" / "runs").remember(SPEC)
    left = disk.after_the_power_went()
    assert {name for name, data in left.items() if data} == {"runs/r.json", "new/runs/r.json"}


def test_a_finished_update_is_kept_when_the_power_goes(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    outbox = Outbox(tmp_path / "outbox")
    path = outbox.blank("r")
    with path.open("wb") as out:  # as `write_blocks` does
        out.write(b"update")
        out.flush()
        os.fsync(out.fileno())
    outbox.put(TASK, path, UpdateMetrics(2.0, 1.0))
    left = disk.after_the_power_went()
    assert left["outbox/r.safetensors"] == b"update" and left["outbox/r.json"]


def put(outbox: Outbox, task: Assignment, data: bytes):
    path = outbox.blank(task.key.run)
    path.write_bytes(data)
    return outbox.put(task, path, UpdateMetrics(2.0, 1.0))


def test_an_update_answers_its_very_assignment(tmp_path):
    ready = put(Outbox(tmp_path), TASK, b"update")
    again = Outbox(tmp_path)
    assert again.find(TASK) == ready and again.path("r").read_bytes() == b"update"
    assert ready.ref == ObjectRef(hashlib.sha256(b"update").hexdigest(), 6)
    for other in (
        replace(TASK, key=replace(KEY, attempt=1)),
        replace(TASK, units=(UnitId(1),)),
        replace(TASK, spec=replace(TRAIN, seed=2)),
    ):
        assert again.find(other) is None


@pytest.mark.parametrize(
    "damage", [lambda o: o.path("r").write_bytes(b"updatE"), lambda o: (o.directory / "r.json").write_text("{")]
)
def test_a_damaged_entry_is_no_entry(tmp_path, damage):
    outbox = Outbox(tmp_path)
    put(outbox, TASK, b"update")
    damage(outbox)
    assert outbox.find(TASK) is None


def test_one_update_a_run(tmp_path):
    outbox = Outbox(tmp_path)
    put(outbox, TASK, b"first")
    later = replace(TASK, key=replace(KEY, round=1))
    put(outbox, later, b"second")
    assert outbox.find(TASK) is None and outbox.find(later) is not None
    outbox.drop_task(KEY)
    assert outbox.find(later) is not None
    outbox.drop_task(later.key)
    assert list(tmp_path.iterdir()) == []


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_dropping_a_run_leaves_nothing_of_it(tmp_path):
    outbox = Outbox(tmp_path)
    put(outbox, TASK, b"update")
    outbox.blank("r").write_bytes(b"a training that was killed")
    (tmp_path / "r.json.tmp").write_bytes(b"a daemon that was killed")
    put(outbox, replace(TASK, key=replace(KEY, run="r.new")), b"of another run")
    outbox.drop("r")
    assert names(tmp_path) == {"r.new.json", "r.new.safetensors"}


def test_dropping_an_older_update_leaves_the_one_that_is_being_written(tmp_path):
    outbox = Outbox(tmp_path)
    put(outbox, TASK, b"first")
    path = outbox.blank("r")
    path.write_bytes(b"second")
    outbox.drop_task(KEY)
    assert names(tmp_path) == {path.name}


def test_an_update_whose_run_ends_while_it_is_taken_in_does_not_stay(tmp_path, monkeypatch):
    """`put` is a thread: the task that waits for it is cancelled, and what it does comes after the run's files were dropped."""
    runs, outbox = Runs(tmp_path / "runs"), Outbox(tmp_path / "outbox")
    runs.remember(SPEC)

    def ended(point: str, which: str = "") -> None:
        if (point, which) == during:
            runs.forget("r")
            outbox.drop("r")

    monkeypatch.setattr("fp_client.state.fault", ended)
    for during in (("device.outbox.moved", ""), ("device.state.write", "outbox"), ("device.state.renamed", "outbox")):
        runs.remember(SPEC)
        put(outbox, TASK, b"update")
        assert names(tmp_path / "outbox") == set(), during


def test_what_there_is_of_runs_that_nobody_remembers_goes(tmp_path):
    runs, outbox = Runs(tmp_path / "runs"), Outbox(tmp_path / "outbox")
    lost = replace(TASK, key=replace(KEY, run="lost"))
    put(outbox, lost, b"no run was joined here")
    (tmp_path / "outbox" / "stuck.json").mkdir()  # unlink refuses a directory
    assert outbox.find(lost) is not None
    runs.remember(SPEC)
    outbox.blank("r").write_bytes(b"being written")
    for name in ("a.b.safetensors", "c.new.safetensors", "d.safetensors.new", "e.json.tmp", ".f.json", "notes.txt"):
        (tmp_path / "outbox" / name).write_bytes(b"left")
    left = {"stuck.json", ".f.json", "notes.txt"}
    outbox.sweep()
    assert names(tmp_path / "outbox") == left | {outbox.blank("r").name}
    (tmp_path / "outbox" / "g.safetensors").write_bytes(b"left")
    assert put(outbox, TASK, b"update") == outbox.find(TASK)
    assert names(tmp_path / "outbox") == left | {"r.json", "r.safetensors"}


def test_a_device_without_an_outbox_has_nothing_to_sweep(tmp_path):
    Outbox(tmp_path / "outbox").sweep()
    Runs(tmp_path / "runs").remember(SPEC)
    Outbox(tmp_path / "outbox").sweep()
    assert names(tmp_path) == {"runs"}


def ref_of(data: bytes) -> ObjectRef:
    return ObjectRef(hashlib.sha256(data).hexdigest(), len(data))


def test_a_full_disk_is_said_plainly(tmp_path):
    async def fetch(ref: ObjectRef, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"disk is full; free some space"):
        asyncio.run(ObjectCache(tmp_path, 100).get(ref_of(b"x"), fetch))


def test_objects_in_use_are_not_evicted(tmp_path):
    async def main():
        cache = ObjectCache(tmp_path, 10)
        data = {ref_of(bytes([n]) * 4): bytes([n]) * 4 for n in range(4)}

        async def fetch(ref: ObjectRef, path: Path) -> None:
            path.write_bytes(data[ref])  # noqa: ASYNC240

        keep = frozenset(ref.digest for ref in data)
        for ref in data:
            await cache.get(ref, fetch, keep)
        assert all(cache.holds(ref) for ref in data)  # over the bound rather than broken
        await cache.get(ref_of(b"other!"), lambda ref, path: asyncio.to_thread(path.write_bytes, b"other!"))
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 10

    asyncio.run(main())


def test_one_daemon_a_directory(tmp_path):
    with only_daemon(tmp_path), pytest.raises(InUseError, match="another fp-client"), only_daemon(tmp_path):
        pass
    with only_daemon(tmp_path):
        pass
