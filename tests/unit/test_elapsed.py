"""How long a round has lasted is known after a restart, or said not to be."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from common import faults
from common.types import TaskKey
from fp_server.elapsed import EVERY, FILE, Elapsed

KEY = TaskKey("r", 2, 1)


def test_what_was_noted_is_there_for_the_same_attempt_alone(tmp_path):
    Elapsed(tmp_path).note(KEY, 12.5, 1e9)
    kept = Elapsed(tmp_path)
    assert kept.of(KEY) == 12.5
    assert kept.of(TaskKey("r", 2, 2)) is kept.of(TaskKey("r", 3, 1)) is kept.of(TaskKey("s", 2, 1)) is None
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_it_is_noted_now_and_then(tmp_path):
    one = Elapsed(tmp_path)
    for second in range(25):
        one.note(KEY, second, 1e9 + second)
    assert one.of(KEY) == 2 * EVERY


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"attempt": ["r", 2, 1]}', '{"attempt": ["r", 2, 1], "seconds": NaN}',
     '{"attempt": ["r", 2, 1], "seconds": -1}', '{"attempt": ["r", 2, 1], "seconds": []}'],
)  # fmt: skip
def test_a_damaged_note_is_none(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    assert Elapsed(tmp_path).of(KEY) is None


def test_a_disk_that_takes_nothing_harms_nobody(tmp_path):
    one = Elapsed(tmp_path / "missing")
    one.note(KEY, 1.0, 1e9)
    assert one.of(KEY) is None
    assert json.dumps(one.of(KEY)) == "null"


def test_a_note_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a power cut may leave an empty file, and the time the server was down would be the round's."""
    synced = []

    def fsync(descriptor):
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor).st_size, (tmp_path / FILE).exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    Elapsed(tmp_path).note(KEY, 12.5, 1e9)
    assert synced == [(tmp_path / f"{FILE}.tmp", (tmp_path / FILE).stat().st_size, False)]


def test_a_note_that_fails_is_told_once_until_one_succeeds(tmp_path, monkeypatch, caplog):
    def broken(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    one = Elapsed(tmp_path)

    def noted(times):
        for _ in range(times):
            noted.now += EVERY
            one.note(KEY, 1.0, noted.now)
        told = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return told

    noted.now = 1e9
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", broken)
            (told,) = noted(3)
            assert told.startswith(f"{tmp_path / FILE}: can't be written: No space left on device; until it can,")
        assert noted(3) == [] and one.of(KEY) == 1.0


def test_a_failure_before_the_rename_leaves_the_note_before(tmp_path, monkeypatch):
    one = Elapsed(tmp_path)
    one.note(KEY, 1.0, 1e9)
    plan = {"dir": str(tmp_path), "faults": [{"at": "server.elapsed.written", "do": "fail:ENOSPC"}]}
    try:
        faults.arm({faults.VARIABLE: json.dumps(plan)})
        one.note(KEY, 11.0, 1e9 + EVERY)
        assert one.of(KEY) == 1.0
        one.note(KEY, 21.0, 1e9 + 2 * EVERY)
        assert one.of(KEY) == 21.0
    finally:
        faults.arm({})
