"""`fp-server backup` while the server works: what is copied is sound, and a run goes on from it elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
import subprocess
import tarfile
from pathlib import Path

import pytest
from server_side import Device, Server, calm_ledger, run_toml, whole_run
from test_damaged_objects import audited, flip
from test_verify import tool

from common.errors import ConfigError, DamagedError, StorageError
from fp_server import backup as backing
from fp_server.backup import backup
from fp_server.verify import verify

TOML = run_toml("global", final_evaluation=False)


def restored(backup_: Path, to: Path, original: Server) -> Server:
    """A server on what was restored from a backup, with the original's address and devices."""
    if backup_.suffix == ".tar":
        to.mkdir(mode=0o700)
        subprocess.run(["tar", "-xf", str(backup_), "-C", str(to)], check=True)
    else:
        subprocess.run(["cp", "-a", str(backup_), str(to)], check=True)
    server = Server.__new__(Server)
    server.directory, server.port, server.process = to, original.port, None
    server.devices.symlink_to(original.devices)
    return server


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, str]:
    return calm_ledger(tmp_path_factory.mktemp("calm") / "server", TOML)


@pytest.mark.parametrize("name", ["backup", "backup.tar"])
def test_a_backup_in_mid_round_is_sound_and_the_run_ends_from_it_elsewhere(server, undisturbed, tmp_path, name):
    """Round 2, alice has delivered, bob is half through his push. Then the original is gone."""
    out, servers = tmp_path / name, [server]

    async def disaster() -> None:
        await server.until(lambda s: s["current"]["devices"]["alice"]["stage"] == "done")
        said = await asyncio.to_thread(tool, "backup", "--dir", str(server.directory), "--out", str(out), "--json")
        assert said.returncode == 0, said.stderr
        assert json.loads(said.stdout)["objects"] > 3
        server.kill()
        shutil.rmtree(server.directory / "objects")
        other = restored(out, tmp_path / "elsewhere" / "server", server)
        servers.append(other)
        found = await asyncio.to_thread(verify, other.directory)
        assert not found.damaged and not found.orphans and not found.leftovers and found.runs["toy-run"].startswith("round, 1")
        assert {(other.directory / key).stat().st_mode & 0o777 for key in ("ca.key", "server.key", "operator.key")} == {0o600}
        await asyncio.to_thread(other.start)

    (tmp_path / "elsewhere").mkdir()
    alice, bob = Device(server, "alice"), Device(server, "bob", chunk=64)

    half = asyncio.Event()

    async def stand_still() -> None:  # until the server is gone, and the push with it
        half.set()
        await asyncio.Event().wait()

    async def second_round() -> None:
        bob.hooks["pushing"] = stand_still

    bob.hooks["accepted"] = second_round

    async def main():
        await server.begin(TOML)
        async with asyncio.timeout(90):
            living = asyncio.gather(alice.live(), bob.live())
            await half.wait()
            await disaster()
            await living
        return await servers[-1].status()

    try:
        status = asyncio.run(main())
        assert status["state"] == "finished" and status["rounds_done"] == 2
        assert servers[1].stop() == 0
        assert servers[1].ledger() == undisturbed
    finally:
        server.process = None
        if len(servers) > 1 and servers[1].process is not None:
            servers[1].kill()


def test_backups_under_load_are_all_sound(server, tmp_path):
    """Rounds are committed and objects removed while they are copied."""
    outs: list[Path] = []

    async def main():
        devices = [Device(server, "alice"), Device(server, "bob")]
        running = asyncio.create_task(whole_run(server, devices, run_toml("global", rounds=15, final_evaluation=False), 120))
        while not running.done():
            outs.append(tmp_path / (f"b{len(outs)}" + (".tar" if len(outs) % 2 else "")))
            await asyncio.to_thread(backup, server.directory, outs[-1])
        return await running

    assert asyncio.run(main())["state"] == "finished"
    assert len(outs) > 3
    rounds = set()
    for index, out in enumerate(outs):
        found = verify(restored(out, tmp_path / f"r{index}", server).directory)
        assert not found.damaged and not found.orphans, found
        rounds.update(found.runs.values())
    assert len(rounds) > 2, "they are of different moments"
    assert trail(server) == ["ok"] * len(outs)


@pytest.fixture
def stopped(server) -> Server:
    """A server with a finished run, stopped."""
    asyncio.run(whole_run(server, [Device(server, "alice"), Device(server, "bob")], TOML))
    assert server.stop() == 0
    return server


def nothing_left(directory: Path, *but: str) -> bool:
    return sorted(path.name for path in directory.iterdir()) == sorted(but)


def test_nothing_is_replaced_and_nothing_half_made_is_left(stopped, tmp_path, monkeypatch):
    place = tmp_path / "backups"
    place.mkdir()
    (place / "there").mkdir()
    for out, said in ((place / "there", "exists already"), (stopped.directory / "inside", "lies in the directory")):
        with pytest.raises(ConfigError, match=said):
            backup(stopped.directory, out)
    refused = tool("backup", "--dir", str(stopped.directory), "--out", str(place / "there"))
    assert refused.returncode == 2 and "exists already" in refused.stderr
    with pytest.raises(ConfigError, match="not a server directory"):
        backup(tmp_path, place / "new")
    with pytest.raises(ConfigError, match="no such directory; mount the disk"):
        backup(stopped.directory, tmp_path / "unmounted" / "new.tar")
    assert not (tmp_path / "unmounted").exists() and trail(stopped) == []
    path, other, *rest = sorted((stopped.directory / "objects").glob("??/*"))
    flip(path)
    other.unlink()
    for name in ("new", "new.tar"):
        with pytest.raises(DamagedError) as refused:
            backup(stopped.directory, place / name)
        said = str(refused.value)
        assert said.startswith(f"2 of {len(rest) + 2} objects: ") and "of layer" in said, said
        assert re.search(rf"{path} \([^)]*of run toy-run\) is damaged", said) and re.search(
            rf"{other} \([^)]*\) is missing", said
        )
        assert said.endswith(f"; see `fp-server verify {stopped.directory}`; `--without-damaged` leaves them out")
    assert nothing_left(place, "there")
    assert len(trail(stopped)) == 2 and all(outcome.startswith("failed: 2 of ") for outcome in trail(stopped))


def test_what_is_not_in_a_backup_is_said_and_what_to_do(stopped, tmp_path):
    (stopped.directory / "ca.key").unlink()
    made = tool("backup", "--dir", str(stopped.directory), "--out", str(tmp_path / "new"))
    assert made.returncode == 0, made.stderr
    remedy = (
        "ca.key is missing: copy it from an older backup; without it make a new directory (`fp-server init`), and every device"
    )
    assert f"warning: {stopped.directory}/{remedy}" in made.stderr
    assert "\nnot in it: ca.key\nit holds the keys of the server: keep it" in made.stdout
    said = tool("run", "--dir", str(tmp_path / "new"))
    assert said.returncode == 6 and remedy in said.stderr and "fp-client join" not in said.stderr
    assert any(remedy in problem for problem in verify(tmp_path / "new").problems)
    shown = tool("verify", str(tmp_path / "new"))
    assert shown.returncode == 11 and "each follows from the one before" in " ".join(shown.stdout.replace("│", " ").split())


def trail(server: Server) -> list[str]:
    """How the backups ended, as the audit trail has it."""
    return [entry.outcome for entry in audited(server, "backup")]


@pytest.mark.parametrize("name", ["new", "new.tar"])
def test_a_damaged_object_can_be_left_out_and_is_named(stopped, tmp_path, name):
    damaged, missing, *sound = sorted((stopped.directory / "objects").glob("??/*"))
    flip(damaged)
    missing.unlink()
    made = tool("backup", "--dir", str(stopped.directory), "--out", str(tmp_path / name), "--without-damaged", "--json")
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert set(found["left_out"]) == {damaged.name, missing.name} and found["objects"] == len(sound)
    assert f"{damaged} (" in made.stderr and f"{missing} (" in made.stderr
    other = tool("backup", "--dir", str(stopped.directory), "--out", str(tmp_path / f"other-{name}"), "--without-damaged")
    assert f", {len(sound)} of {len(sound) + 2} objects of " in other.stdout
    if name == "new":
        assert {path.name for path in (tmp_path / name / "objects").glob("??/*")} == {path.name for path in sound}


def test_an_object_that_the_disk_can_not_read_is_damaged_and_named(stopped, tmp_path):
    class Broken:
        def readable(self):
            return True

        def readinto(self, buffer):
            raise OSError(5, "Input/output error")

        read = readinto

        def seek(self, offset):
            return offset

        def fileno(self):
            return os.open("/dev/null", os.O_RDONLY)

    (tmp_path / "new").mkdir()
    digest = next((stopped.directory / "objects").glob("??/*")).name
    assert list(backing._damaged(stopped.directory, {digest: ["ledger"]}, {digest: Broken()})) == [digest]
    with pytest.raises(DamagedError, match=f"{digest} can't be read: Input/output error"):
        backing._add_object(stopped.directory, backing._Directory(tmp_path / "new"), digest, Broken())


def test_a_disk_without_hard_links_takes_an_archive(stopped, tmp_path, monkeypatch):
    def none(source, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    assert backup(stopped.directory, tmp_path / "new.tar").objects > 0
    with tarfile.open(tmp_path / "new.tar") as tar:
        assert "log.sqlite" in tar.getnames()
    assert (tmp_path / "new.tar").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_leaves_nothing_and_says_so(stopped, tmp_path, monkeypatch):
    place = tmp_path / "backups"
    place.mkdir()

    def full(fd):
        raise OSError(28, "No space left on device")

    for name in ("new", "new.tar"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StorageError, match=f"{place / name}: no space left on the device"):
                backup(stopped.directory, place / name)
        assert nothing_left(place) and trail(stopped)[-1].startswith("failed: ")
        backup(stopped.directory, place / name)
        (shutil.rmtree if name == "new" else os.unlink)(place / name)
    connect = sqlite3.connect

    def small(place, *args, **named):  # the copy of the log has no room
        connection = connect(place, *args, **named)
        if str(place).endswith("/log.sqlite") and "backups" in str(place):
            connection.execute("PRAGMA max_page_count = 2")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(StorageError, match=f"^{place / 'new.tar'}: no space left on the device"):
        backup(stopped.directory, place / "new.tar")
    assert nothing_left(place)


def test_an_object_the_server_removed_meanwhile_leads_to_a_newer_log(stopped, tmp_path, monkeypatch):
    tries = []
    read_log = backing._read_log

    def once_late(copy):
        log, objects, living = read_log(copy)
        tries.append(copy)
        return (log, objects, ["0" * 64]) if len(tries) == 1 else (log, objects, living)

    monkeypatch.setattr(backing, "_read_log", once_late)
    assert backup(stopped.directory, tmp_path / "new").objects > 0 and len(tries) == 2
    assert not verify(tmp_path / "new").damaged


@pytest.fixture
def halfway(server) -> Server:
    """A server that was killed in the second round, with an update in the store."""
    half = asyncio.Event()

    async def stand_still() -> None:
        half.set()
        await asyncio.Event().wait()

    alice, bob = Device(server, "alice"), Device(server, "bob", chunk=64)

    async def second_round() -> None:
        bob.hooks["pushing"] = stand_still

    bob.hooks["accepted"] = second_round

    async def main() -> None:
        await server.begin(TOML)
        living = [asyncio.create_task(device.live()) for device in (alice, bob)]
        async with asyncio.timeout(60):
            await half.wait()
            await server.until(lambda s: s["current"]["devices"]["alice"]["stage"] == "done")
        server.kill()
        for task in living:
            task.cancel()
        await asyncio.wait(living)

    asyncio.run(main())
    server.process = None
    return server


def is_open(path: Path) -> int:
    """How many descriptors of this process are of an object below `path`."""
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]  # noqa: PTH208
    return sum(link.startswith(f"{path.resolve()}/") for link in links)


@pytest.mark.parametrize("name", ["new", "new.tar"])
@pytest.mark.parametrize("where", ["_room", "_read_log"])
def test_a_server_that_moves_on_while_the_log_is_copied_and_read_is_not_in_the_way(halfway, tmp_path, monkeypatch, name, where):
    """However long that takes: here every object of the run goes and the log goes on before the copy is begun, or before it is
    read."""
    store, whole, moved = halfway.directory / "objects", tmp_path / "whole", []
    before = backup(halfway.directory, whole)
    there, real = {path.name: path.read_bytes() for path in store.glob("??/*")}, getattr(backing, where)

    def late(copy):
        if not moved:
            moved.append(copy)
            backing._enter(halfway.directory, tmp_path, "later")
            for path in store.glob("??/*"):
                path.unlink()
        return real(copy)

    monkeypatch.setattr(backing, where, late)
    monkeypatch.setattr(backing, "TRIES", 1)
    made = backup(halfway.directory, tmp_path / name)
    assert moved and (made.head, made.objects, made.bytes) == (before.head, before.objects, before.bytes)
    (tmp_path / "elsewhere").mkdir()
    copy = restored(tmp_path / name, tmp_path / "elsewhere" / "server", halfway)
    found = verify(copy.directory)
    assert not found.damaged and not found.orphans and found.runs["toy-run"].startswith("round, 1")
    assert {path.name: path.read_bytes() for path in (copy.directory / "objects").glob("??/*")} == there
    assert "later" not in trail(copy), "the log is as old as what is held"
    assert not is_open(store) and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_backup_shares_no_file_with_the_store(halfway, tmp_path):
    backup(halfway.directory, tmp_path / "new")
    assert all(path.stat().st_nlink == 1 for at in (halfway.directory, tmp_path / "new") for path in at.glob("objects/??/*"))


def test_the_newest_objects_are_held_and_not_more_than_so_many(halfway, tmp_path, monkeypatch):
    store = halfway.directory / "objects"
    paths = sorted(store.glob("??/*"))
    for age, path in enumerate(paths):
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(backing, "HELD", 2)
    files = {}
    try:
        backing._hold(halfway.directory, files)
        assert set(files) == {path.name for path in paths[:2]} and is_open(store) == 2
    finally:
        backing._let_go(files)
    assert not files and not is_open(store)
    seen, read_log = [], backing._read_log

    def look(copy):
        seen.append(is_open(store))
        return read_log(copy)

    monkeypatch.setattr(backing, "_read_log", look)
    assert backup(halfway.directory, tmp_path / "new").objects == len(paths) > 2, "the others are opened when they are known"
    assert seen == [2] and not is_open(store) and not verify(tmp_path / "new").damaged


def test_an_archive_holds_what_a_directory_holds(stopped, tmp_path):
    backup(stopped.directory, tmp_path / "new")
    backup(stopped.directory, tmp_path / "new.tar")
    assert (tmp_path / "new.tar").stat().st_mode & 0o777 == 0o600 and (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    names = {str(path.relative_to(tmp_path / "new")): path for path in (tmp_path / "new").rglob("*") if path.is_file()}
    with tarfile.open(tmp_path / "new.tar") as tar:
        assert set(tar.getnames()) == set(names)
        assert {member.name: member.mode for member in tar} == {n: p.stat().st_mode & 0o777 for n, p in names.items()}
        for name, path in names.items():
            assert name == "log.sqlite" or tar.extractfile(name).read() == path.read_bytes()
