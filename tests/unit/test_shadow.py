"""The storage fake: only what was synced survives it."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import shadow

pytestmark = pytest.mark.skipif(shadow.compiler() is None, reason="the storage fake needs a C compiler (cc)")

SYNC = """
import os
def write(path, text, sync):
    with open(path, "w") as out:
        out.write(text); out.flush()
        if sync: os.fsync(out.fileno())
def folder(path):
    fd = os.open(path, os.O_RDONLY); os.fsync(fd); os.close(fd)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shadow.build(tmp_path_factory.mktemp("shadow"))


def after(tmp_path: Path, library: Path, code: str, rng: random.Random | None = None) -> dict[str, str]:
    """Files below a directory after `code` has run in it and the power went."""
    root, notes = tmp_path / "root", tmp_path / "notes"
    root.mkdir(exist_ok=True)
    (root / "old").write_text("old")
    shadow.begin(root, notes)
    environment = {**os.environ, **shadow.environment(root, notes), "LD_PRELOAD": str(library)}
    subprocess.run([sys.executable, "-c", SYNC + code], cwd=root, check=True, env=environment)
    shadow.lose(root, notes, rng)
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("code", "left"),
    [
        ("", {"old": "old"}),
        ("write('new', 'x', True)", {"old": "old"}),  # the bytes are there, and no name
        ("write('new', 'x', False); folder('.')", {"old": "old", "new": ""}),  # the name, and no bytes
        ("write('new', 'x', True); folder('.')", {"old": "old", "new": "x"}),
        ("write('new', 'x', True); folder('.'); write('new', 'y', False)", {"old": "old", "new": "x"}),
        ("write('new', 'x', True); os.replace('new', 'old')", {"old": "old"}),
        ("write('new', 'x', True); os.replace('new', 'old'); folder('.')", {"old": "x"}),
        ("os.unlink('old')", {"old": "old"}),
        ("os.unlink('old'); folder('.')", {}),
        ("os.mkdir('d'); write('d/new', 'x', True); folder('d')", {"old": "old"}),  # nobody has synced the entry of d itself
        ("os.mkdir('d'); write('d/new', 'x', True); folder('d'); folder('.')", {"old": "old", "d/new": "x"}),
    ],
)
def test_only_what_was_synced_is_left(tmp_path: Path, library: Path, code: str, left: dict[str, str]) -> None:
    assert after(tmp_path, library, code) == left


def test_an_inode_number_is_not_taken_for_another_file(tmp_path: Path, library: Path) -> None:
    code = "\nfor n in range(30):\n write('a', str(n), True); folder('.'); os.unlink('a'); write(f'b{n}', 'lost', False)\n"
    left = after(tmp_path, library, code + "folder('.')")
    assert left == {"old": "old", **{f"b{n}": "" for n in range(30)}}


def test_a_commit_of_sqlite_is_left_and_an_open_transaction_is_not(tmp_path: Path, library: Path) -> None:
    code = (
        "\nimport sqlite3, signal\nc = sqlite3.connect('log.sqlite', isolation_level=None)\n"
        "for s in ('PRAGMA journal_mode=WAL', 'PRAGMA synchronous=FULL', 'CREATE TABLE t (x)', 'INSERT INTO t VALUES (1)',\n"
        "          'BEGIN IMMEDIATE', 'INSERT INTO t VALUES (2)'):\n    c.execute(s).fetchall()\n"
        "folder('.')\nos._exit(0)"
    )
    root, notes = tmp_path / "root", tmp_path / "notes"
    root.mkdir()
    shadow.begin(root, notes)
    environment = {**os.environ, **shadow.environment(root, notes), "LD_PRELOAD": str(library)}
    subprocess.run([sys.executable, "-c", SYNC + code], cwd=root, check=True, env=environment)
    shadow.lose(root, notes)
    connection = sqlite3.connect(root / "log.sqlite")
    assert connection.execute("SELECT x FROM t").fetchall() == [(1,)]
    connection.close()


def test_with_chance_each_change_is_kept_or_not(tmp_path: Path, library: Path) -> None:
    seen = set()
    for seed in range(12):
        directory = tmp_path / str(seed)
        directory.mkdir()
        left = after(directory, library, "write('new', 'x', False)", random.Random(seed))
        seen.add(left.get("new"))
    assert seen == {None, "", "x"}
