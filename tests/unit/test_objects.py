"""The object store: content-addressed, durable, resumable; and what is left after the power goes."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path

import pytest

from common.errors import DigestError, NotFound, StorageError
from common.types import ObjectRef
from fp_server import objects
from fp_server.objects import ObjectStore
from tests.unit.disk import Disk


def ref_of(data: bytes) -> ObjectRef:
    return ObjectRef(hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def store(tmp_path):
    return ObjectStore(tmp_path)


def made(store, data: bytes, name: str = "x") -> Path:
    path = store.scratch / name
    path.write_bytes(data)
    return path


def arrive(store, data: bytes, device: str = "alice"):
    arrival = store.arrival(device, ref_of(data))
    arrival.open()
    return arrival


def test_adopting_moves_a_file_to_its_digest(store):
    path = made(store, b"abc")
    ref = store.adopt(path)
    assert ref == ref_of(b"abc") and not path.exists() and store.has(ref.digest)
    assert store.path(ref.digest).read_bytes() == b"abc" and store.path(ref.digest).stat().st_mode & 0o777 == 0o444
    assert store.adopt(made(store, b"abc", "y")) == ref and not (store.scratch / "y").exists()
    assert b"".join(store.chunks(ref.digest, 1, 1)) == b"bc" and list(store.chunks(ref.digest, 3, 10)) == []
    with pytest.raises(NotFound, match="0000000000000000"):
        store.path("0" * 64)


def test_scratch_is_cleared_and_arrivals_are_kept(store):
    made(store, b"left")
    arrival = arrive(store, b"abc")
    arrival.write(b"ab")
    arrival.close()
    store.clear_scratch()
    assert list(store.scratch.iterdir()) == [] and arrival.offset == 2
    store.discard_arrivals("alice")
    assert arrival.offset == 0


def test_an_arrival_goes_on_where_it_stopped_also_in_another_process(store, tmp_path):
    arrival = arrive(store, b"abcdef")
    arrival.write(b"abc")
    assert arrival.offset == 3, "what was written is in the file: a kill of the process loses none of it"
    again = ObjectStore(tmp_path).arrival("alice", ref_of(b"abcdef"))
    assert again.open() == 3
    again.write(b"def")
    again.finish()
    assert again.adopt() == ref_of(b"abcdef") and store.has(ref_of(b"abcdef").digest)
    arrival.close()


def test_another_object_of_the_device_takes_the_first_ones_place(store):
    first = arrive(store, b"abc")
    first.write(b"ab")
    first.close()
    other = arrive(store, b"abc", "bob")
    other.close()
    arrive(store, b"xyz").close()
    assert first.offset == 0 and other.path.exists()


def test_truncated_keeps_wrong_drops_and_more_than_announced_is_refused(store):
    arrival = arrive(store, b"abcdef")
    arrival.write(b"abc")
    with pytest.raises(DigestError, match="ended at byte 3 of 6; go on from there"):
        arrival.finish()
    assert arrival.open() == 3
    with pytest.raises(DigestError, match="more than the 6 bytes"):
        arrival.write(b"defg")
    arrival.write(b"dex")
    with pytest.raises(DigestError, match="do not have the digest"):
        arrival.finish()
    assert arrival.offset == 0 and not store.has(ref_of(b"abcdef").digest)


def test_a_file_longer_than_announced_begins_anew(store):
    arrival = store.arrival("alice", ref_of(b"abc"))
    arrival.path.write_bytes(b"abcdef")
    assert arrival.open() == 0
    arrival.close()


def refuse_reading(monkeypatch):
    """From now on nobody reads a file."""
    whole = Path.open

    def only_written(self, mode="r", *args, **kwargs):
        assert "r" not in mode, "it was read again"
        return whole(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", only_written)


def test_what_came_in_part_is_read_once_however_often_a_push_begins_anew(store, tmp_path, monkeypatch):
    first = arrive(store, b"abcdef")
    first.write(b"abcd")
    first.close()
    again = ObjectStore(tmp_path)
    arrive(again, b"abcdef").close()  # after a restart
    with monkeypatch.context() as patch:
        refuse_reading(patch)
        for _ in range(3):
            arrive(again, b"abcdef").close()
        last = arrive(again, b"abcdef")
        last.write(b"ef")
        last.finish()
    assert last.adopt() == ref_of(b"abcdef")


def test_where_a_push_must_begin_is_known_without_reading(store, monkeypatch):
    arrival = store.arrival("alice", ref_of(b"abcdef"))
    assert arrival.expected == 0
    arrival.path.write_bytes(b"abcd")
    refuse_reading(monkeypatch)
    assert arrival.expected == 4
    longer = ObjectRef(ref_of(b"abcdef").digest, 3)
    assert store.arrival("alice", longer).expected == 0


@pytest.mark.parametrize("times", [False, True], ids=["times told", "times set back"])
def test_a_bit_flipped_in_what_came_in_part_is_found(store, times):
    arrival = arrive(store, b"abcdef")
    arrival.write(b"abcd")
    arrival.close()
    before = arrival.path.stat()
    time.sleep(0.02)
    arrival.path.write_bytes(b"abce")
    if times:
        os.utime(arrival.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert arrival.open() == 4
    arrival.write(b"ef")
    with pytest.raises(DigestError, match="do not have the digest"):
        arrival.finish()


def test_a_write_that_was_not_whole_is_read_again(store):
    arrival = arrive(store, b"abcdefgh")
    arrival.write(b"ab")
    arrival._file = Full(arrival._file, 3)
    with pytest.raises(StorageError):
        arrival.write(b"cdefgh")
    arrival.close()
    assert arrival.open() == 5
    arrival.write(b"fgh")
    arrival.finish()


class Full:
    """A file on a disk with `room` bytes left."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return self._file.write(data[:taken])

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_full_disk_keeps_what_came_and_the_push_goes_on_when_there_is_room(store):
    data = b"abcdefgh"
    arrival = arrive(store, data)
    arrival._file = Full(arrival._file, 5)
    with pytest.raises(StorageError, match="no space left"):
        arrival.write(data)
    arrival.close()
    assert arrival.open() == 5
    arrival.write(data[5:])
    arrival.finish()
    assert arrival.adopt() == ref_of(data)


def test_a_full_disk_at_adoption_loses_nothing(store, monkeypatch):
    path = made(store, b"abc")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        store.adopt(path)
    assert path.read_bytes() == b"abc" and not store.has(ref_of(b"abc").digest)
    monkeypatch.undo()
    assert store.adopt(path) == ref_of(b"abc")


def test_a_full_disk_when_a_device_first_pushes(store, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(StorageError, match="no space left"):
        store.arrival("carol", ref_of(b"abc"))


def test_what_adopt_returned_is_there_after_the_power_went(store, tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    first, second = store.adopt(made(store, b"abc")), store.adopt(made(store, b"abd"))
    left = disk.after_the_power_went()
    for ref, data in ((first, b"abc"), (second, b"abd")):
        assert left[f"objects/{ref.digest[:2]}/{ref.digest}"] == data


def test_an_object_whose_rename_was_not_synced_is_synced_by_who_finds_it(store, tmp_path, monkeypatch):
    """The process was killed between rename and fsync; the next push of the same bytes must not trust what it sees."""
    disk = Disk(tmp_path, monkeypatch)
    with monkeypatch.context() as killed:
        killed.setattr(objects, "sync_directory", lambda path: None)
        ref = store.adopt(made(store, b"abc"))
    objects.sync_directory(store._objects)
    disk.names[(store._objects / ref.digest[:2]).stat().st_ino] = {}
    assert f"objects/{ref.digest[:2]}/{ref.digest}" not in disk.after_the_power_went()
    assert store.adopt(made(store, b"abc", "again")) == ref
    assert disk.after_the_power_went()[f"objects/{ref.digest[:2]}/{ref.digest}"] == b"abc"


def test_a_folder_whose_entry_was_not_synced_is_synced_by_who_finds_it(store, tmp_path, monkeypatch):
    """The process was killed when it had made the folder; the next one finds it and must not take it for durable."""
    digest = objects.digest_file(made(store, b"abc"))
    disk = Disk(tmp_path, monkeypatch)
    (store._objects / digest[:2]).mkdir()
    again = objects.ObjectStore(tmp_path)
    ref = again.adopt(made(again, b"abc", "again"))
    assert disk.after_the_power_went()[f"objects/{digest[:2]}/{ref.digest}"] == b"abc"


def test_the_fake_disk_does_forget(store, tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    (tmp_path / "objects" / "loose").write_bytes(b"never synced")
    assert disk.after_the_power_went() == {}
