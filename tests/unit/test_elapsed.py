"""How long a round has lasted is known after a restart, or said not to be."""

from __future__ import annotations

import json

import pytest

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
