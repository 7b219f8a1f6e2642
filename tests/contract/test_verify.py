"""`fp-server verify`: a whole directory is clean, also while its server works; whatever is harmed is found and named."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from server_side import Device, Server, run_toml, whole_run

from fp_server.folding import fold
from fp_server.log import Database, EventLog
from fp_server.verify import verify
from fp_server.views import verdict_view

TOML = run_toml("global", final_evaluation=False)


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", "from fp_server.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The directory of a server that was killed in the second round, with an update in the store and another half there."""
    server = Server(tmp_path_factory.mktemp("verify") / "server")
    server.start()
    killed = asyncio.Event()

    async def kill() -> None:
        await server.until(lambda s: s["rounds_done"] == 1 and s["current"]["devices"]["alice"]["stage"] == "done")
        await server.arriving("bob")
        server.kill()
        killed.set()
        await asyncio.Event().wait()

    alice, bob = Device(server, "alice"), Device(server, "bob", chunk=64)

    async def later() -> None:
        bob.hooks["pushing"] = kill

    bob.hooks["accepted"] = later

    async def main() -> None:
        await server.begin(TOML)
        living = [asyncio.create_task(device.live()) for device in (alice, bob)]
        async with asyncio.timeout(60):
            await killed.wait()
        for task in living:
            task.cancel()
        await asyncio.wait(living)

    asyncio.run(main())
    return server.directory


@pytest.fixture
def directory(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """What must not change: every file but SQLite's own index of its journal."""
    return {
        str(path.relative_to(directory)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file() and not path.name.endswith("-shm")
    }


def test_a_killed_server_leaves_a_sound_directory_and_looking_changes_nothing(directory):
    before = snapshot(directory)
    found = verify(directory)
    assert not found.damaged, found
    assert found.events > 10 and len(found.head) == 64 and found.runs == {"toy-run": "round, 1 of 2 rounds"}
    assert found.needed >= 3 and found.needed_bytes > 0 and found.bad == []
    assert any(name.startswith("partial/bob/") for name in found.leftovers) and found.quarantine == {}
    assert snapshot(directory) == before
    said = tool("verify", str(directory))
    assert said.returncode == 0 and "each follows from the one before" in said.stdout and "damaged;" not in said.stdout
    assert said.stdout.endswith(f"\nevent log head {found.head[:16]}…\naudit head {found.audit_head}\n")
    as_json = json.loads(tool("verify", "--dir", str(directory), "--json").stdout)
    assert as_json["damaged"] is False and as_json["head"] == found.head and as_json["objects"] == found.needed
    assert snapshot(directory) == before
    audited = json.loads(tool("audit", "--verify", "--dir", str(directory), "--json").stdout)
    assert as_json["audit_head"] == audited["head"] == found.audit_head != as_json["head"]


def needed(directory: Path, what: str) -> Path:
    """An object the state needs, by what it is."""
    found = verify(directory)
    assert not found.damaged
    database = Database(directory / "log.sqlite", reading=True)
    try:
        named = fold(EventLog(database), "toy-run").uses()
    finally:
        database.close()
    digest = next(digest for digest, names in named.items() if any(name.startswith(what) for name in names))
    return directory / "objects" / digest[:2] / digest


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["ledger", "adapter object", "update of alice for round 2"])
@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_a_harmed_object_is_named_with_what_to_do(directory, what, harm):
    path = needed(directory, what)
    harm(path)
    found = verify(directory)
    (bad,) = found.bad
    assert bad.digest == path.name and bad.uses[0].startswith(what) and found.problems == []
    assert ("missing" if harm is Path.unlink else "not what was written") in bad.problem
    assert ("push it again" if what.startswith("update") else f"objects/{path.name[:2]}/{path.name}") in bad.advice
    assert harm is Path.unlink or path.exists(), "verify moves nothing"
    said = tool("verify", str(directory))
    assert said.returncode == 11 and path.name[:16] in said.stdout and "damaged" in said.stdout
    whole = "".join(cells[3].strip() for line in said.stdout.splitlines() if len(cells := line.split("│")) > 3)
    assert what.startswith("update") or f"{path.name[:2]}/{path.name}" in whole, "folded, and not cut"
    as_json = tool("verify", str(directory), "--json")
    assert as_json.returncode == 11 and json.loads(as_json.stdout)["bad_objects"][0]["digest"] == path.name


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE events SET body = replace(body, 'toy', 'tow') WHERE seq = 3", "event 3 is not what was written"),
        ("DELETE FROM events WHERE seq = 5", "event 5 is missing"),
        ("DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)", r"event \d+ is missing"),
    ],
)
def test_a_harmed_log_is_named(directory, statement, said):
    connection = sqlite3.connect(directory / "log.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()
    found = verify(directory)
    assert found.damaged and len(found.problems) == 1
    assert re.search(said, found.problems[0])
    assert found.orphans == {}, "what is needed is not known, so nothing is called an orphan"
    console = Console(file=io.StringIO(), width=80)
    console.print(verdict_view(found.json()))
    rows = {
        cells[1].strip(): cells[3].strip() for line in console.file.getvalue().splitlines() if len(cells := line.split("│")) > 3
    }
    assert rows["objects needed"] == rows["orphans"] == "not looked at" and "event log" not in rows
    assert rows["audit trail"].endswith("entries, each follows from the one before") and found.audit_sound


def test_a_page_of_the_database_overwritten(directory):
    sqlite3.connect(directory / "log.sqlite").execute("PRAGMA wal_checkpoint(TRUNCATE)").connection.close()
    with (directory / "log.sqlite").open("r+b") as file:
        file.seek(2 * 4096)
        file.write(b"\xaa" * 4096)
    said = tool("verify", str(directory))
    assert said.returncode == 11 and "damaged" in said.stdout


def test_keys_configuration_orphans_and_quarantine(directory):
    (directory / "objects" / "00").mkdir(exist_ok=True)
    (directory / "objects" / "00" / ("0" * 64)).write_bytes(b"nobody's")
    (directory / "quarantine").mkdir()
    (directory / "quarantine" / ("1" * 64)).write_bytes(b"bad")
    (directory / "ca.key").chmod(0o644)
    found = verify(directory)
    assert not found.damaged and found.orphans == {"0" * 64: 8} and list(found.quarantine.values()) == [3]
    assert any("ca.key: others on this machine can read" in note for note in found.notes)
    shutil.copy(directory / "operator.key", directory / "server.key")
    with (directory / "server.toml").open("a") as out:
        out.write("\nnonsense = 1\n")
    found = verify(directory)
    assert any("server.key: not the key of server.pem" in problem for problem in found.problems)
    assert any("nonsense: unknown key" in problem for problem in found.problems)


def test_a_directory_that_is_none(tmp_path):
    said = tool("verify", str(tmp_path))
    assert said.returncode == 2 and "not a server directory" in said.stderr
    (tmp_path / "b.tar").touch()
    said = tool("verify", str(tmp_path / "b.tar"))
    assert said.returncode == 2 and "unpack it first (`mkdir" in said.stderr


def test_the_server_works_on_while_it_is_verified(server):
    """Rounds are committed, and objects removed, between and during the looks; none of it is ever called damage."""
    looks = []

    async def main():
        alice, bob = Device(server, "alice"), Device(server, "bob")
        running = asyncio.create_task(whole_run(server, [alice, bob], run_toml("global", rounds=12, final_evaluation=False), 90))
        while not running.done():
            looks.append(await asyncio.to_thread(verify, server.directory))
        return await running

    status = asyncio.run(main())
    assert status["state"] == "finished" and len(looks) > 3
    assert [look for look in looks if look.damaged] == []
    assert len({look.head for look in looks}) > 1, "the log grew meanwhile"
