"""A full disk at every place where a server writes: a clear error, nothing lost, and on it goes when there is space again.

On a real small disk (a tmpfs, where this machine lets us mount one), and by a failure at every named point.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from server_side import GONE, Device, Server, error_name, run_toml, whole_run
from test_verify import tool

from common.errors import StorageError
from common.faults import DISK, VARIABLE
from common.pb import enroll_pb2, enroll_pb2_grpc
from common.token import JoinToken
from common.transport import tls
from common.types import UpdateReady
from fp_server import own
from fp_server.identity import Authority
from fp_server.log import Database
from fp_server.maintenance import new_operator
from fp_server.operator import Operator
from fp_server.verify import verify

TOML = run_toml("global", final_evaluation=False)
RESERVE = "\n[limits]\ndisk_reserve_bytes = 0\n"
POINTS = ["planned", "probed", "assigned", "pushing", "accepted", "aggregating"]


class Patient(Device):
    """A device that does what ours does while the server's disk is full: it tries again."""

    async def push(self, channel: grpc.aio.Channel, ready: UpdateReady, data: bytes) -> bool:
        while True:
            try:
                return await super().push(channel, ready, data)
            except grpc.aio.AioRpcError as error:
                self.errors.append(f"{error.code().name}: {error.details()}")
                # INTERNAL is what gRPC makes of an answer that comes while the next piece is being written.
                if error_name(error) not in ("StorageError", "OffsetError", "DigestError") and error.code() not in GONE:
                    raise
                await asyncio.sleep(0.2)


class Disk:
    """A small disk, and what fills it."""

    def __init__(self, root: Path) -> None:
        self.root, self._balloon = root, root / "balloon"

    def fill(self) -> None:
        """Take all that is left, to the last block."""
        for _ in range(50):  # the server may free a temporary file meanwhile
            with self._balloon.open("ab", buffering=0) as out:
                for size in (1 << 20, 1 << 16, 4096):
                    with contextlib.suppress(OSError):
                        while out.write(b"\0" * size) == size:
                            pass
            if shutil.disk_usage(self.root).free < 4096:
                return
        raise AssertionError("the disk does not fill up")

    def free(self) -> None:
        self._balloon.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    root = tmp_path / "disk"
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", str(root)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk is a tmpfs, which only root may mount")
    try:
        yield Disk(root)
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


@pytest.fixture
def small(disk) -> Iterator[Server]:
    """A server on the small disk."""
    one = Server(disk.root)
    with (disk.root / "server.toml").open("a") as out:
        out.write(RESERVE)
    yield one
    if one.process is not None:
        one.kill()


def finish(server: Server, devices: list[Device]) -> tuple[dict[str, Any], dict[int, str]]:
    server.start()
    status = asyncio.run(whole_run(server, devices, TOML, 60))
    assert server.stop() == 0
    return status, server.ledger()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, str]:
    server = Server(tmp_path_factory.mktemp("calm") / "server")
    try:
        return finish(server, [Device(server, "alice"), Device(server, "bob")])[1]
    finally:
        if server.process is not None:
            server.kill()


def assert_nothing_lost(server: Server, status: dict[str, Any], ledger: dict[int, str], undisturbed: dict[int, str]) -> None:
    assert status["state"] == "finished" and status["problem"] == ""
    assert [(entry["attempt"], entry["committed"], entry["weights"]) for entry in status["history"]] == [
        (1, True, {"alice": 40, "bob": 40})
    ] * 2
    assert ledger == undisturbed
    found = verify(server.directory)
    assert not found.damaged and not found.orphans and not found.quarantine, found


def assert_said_clearly(server: Server, felt: bool = True) -> None:
    """No stack trace, and a line of its own about the disk, beside the one that a fault point says."""
    said = (server.directory / "server.log").read_text()
    assert "Traceback" not in said, said[said.index("Traceback") :][:2000]
    lines = [line for line in said.splitlines() if "fault point" not in line and ("full" in line or "space" in line)]
    assert lines or not felt, said[-2000:]


@pytest.mark.parametrize("point", POINTS)
def test_a_disk_that_fills_up_in_a_round(small, disk, undisturbed, point):
    """Full from this point of round 1 on, for two seconds, whatever the server wants to write meanwhile."""
    seen: list[str] = []

    async def squeeze() -> None:
        disk.fill()
        freeing.append(asyncio.create_task(later()))

    async def later() -> None:
        await asyncio.sleep(2.0)
        assert small.process is not None and small.process.poll() is None, "the daemon lives"
        seen.append((await small.status())["problem"])
        disk.free()

    async def when_both_are_in() -> None:
        if alice.seen.count("accepted") + bob.seen.count("accepted") == 2:
            await squeeze()

    freeing: list[asyncio.Task[None]] = []
    alice, bob = Patient(small, "alice"), Patient(small, "bob")
    if point == "aggregating":
        alice.hooks["accepted"] = bob.hooks["accepted"] = when_both_are_in
    else:
        alice.hooks[point] = squeeze
    status, ledger = finish(small, [alice, bob])
    assert_nothing_lost(small, status, ledger, undisturbed)
    assert_said_clearly(small, felt=False)
    assert len(seen) == 1 and all("full" in text or "space" in text for text in seen if text)
    said = [error for error in alice.errors + bob.errors if "RESOURCE_EXHAUSTED" in error]
    assert all("full" in error or "space" in error for error in said)
    if point in ("pushing", "accepted"):
        assert seen[0] or said, "this one must have been felt"


@pytest.mark.parametrize("point", sorted(p for p in DISK if p.startswith(("server.log", "server.object", "server.aggregate"))))
@pytest.mark.parametrize("hit", [1, 4])
def test_a_full_disk_at_every_named_point_of_a_round(tmp_path, monkeypatch, undisturbed, point, hit):
    server = Server(tmp_path / "server")
    faults = tmp_path / "faults"
    faults.mkdir()
    plan = {"dir": str(faults), "faults": [{"at": point, "hit": hit, "do": "fail:ENOSPC"}]}
    try:
        monkeypatch.setenv(VARIABLE, json.dumps(plan))
        server.start()
        monkeypatch.delenv(VARIABLE)

        async def main() -> dict[str, Any]:
            while True:
                try:
                    run = await server.begin(TOML)
                    break
                except grpc.aio.AioRpcError as error:
                    assert error_name(error) == "StorageError" and "full" in str(error.details())
            async with asyncio.timeout(60):
                await asyncio.gather(Patient(server, "alice").live(), Patient(server, "bob").live())
            return await server.status(run)

        status = asyncio.run(main())
        assert server.stop() == 0
        assert list(faults.iterdir()), "the point was passed"
        if point == "server.object.discard":  # what could not be removed goes at the next start
            server.start()
            assert server.stop() == 0
        assert_nothing_lost(server, status, server.ledger(), undisturbed)
        assert_said_clearly(server)
    finally:
        if server.process is not None:
            server.kill()


def enroll(directory: Path, name: str) -> str:
    """A certificate through a token, as `Enroll` makes it."""
    database = Database(directory / "log.sqlite")
    try:
        authority = Authority(directory, database)

        async def both() -> str:
            token = await authority.create_token(name, "device", 60, "localhost:1", "localhost:2")
            return (await authority.enroll(token.secret, tls.make_csr(tls.new_key(), name), 1)).pem

        return asyncio.run(both())
    finally:
        database.close()


async def certificate(call: Any) -> str:
    """What an enrollment or a renewal gives: a certificate, or the error's name and text."""
    try:
        return str((await call).certificate_pem)
    except grpc.aio.AioRpcError as error:
        return f"{error_name(error)}: {error.details()}"


def renewal(server: Server, name: str) -> str:
    """A device's renewal over the wire."""

    async def body() -> str:
        key = tls.load_key(server.devices / name / "device.key")
        request = enroll_pb2.RenewRequest(csr_pem=tls.make_csr(key, name))
        async with server.channel(name) as channel:
            return await certificate(enroll_pb2_grpc.RenewalStub(channel).Renew(request, timeout=20))

    return asyncio.run(body())


def enrollment(server: Server, token: str) -> str:
    """A token's use over the wire, as `fp-client join` sends it."""
    said = JoinToken.decode(token)

    async def body() -> str:
        request = enroll_pb2.EnrollRequest(secret=said.secret, csr_pem=tls.make_csr(tls.new_key(), "x"))
        credentials = grpc.ssl_channel_credentials((server.directory / "ca.pem").read_bytes())
        async with grpc.aio.secure_channel(said.enroll, credentials) as channel:
            return await certificate(enroll_pb2_grpc.EnrollmentStub(channel).Enroll(request, timeout=20))

    return asyncio.run(body())


def test_every_command_on_a_full_disk_says_so_and_works_when_there_is_space(small, disk, tmp_path):
    finish(small, [Device(small, "alice"), Device(small, "bob")])
    small.start()
    (disk.root / "inside").mkdir()
    where = str(disk.root)
    commands = {
        "token": ("token", "carol", "--dir", where),
        "revoke": ("revoke", "alice", "--dir", where),
        "operator": ("operator", "--dir", where),
        "certificate": ("certificate", "--dir", where),
        "export": ("export", "--out", str(disk.root / "inside" / "adapter"), "--dir", where),
    }
    before = verify(disk.root)
    token = Operator(disk.root).token("erin", "device", 600).text
    disk.fill()
    fill_log(disk)
    for name, words in commands.items():
        said = tool(*words)
        assert said.returncode == 11, (name, said.stdout, said.stderr)
        assert "full" in said.stderr or "space" in said.stderr, (name, said.stderr)
        assert "Traceback" not in said.stderr
    with pytest.raises(StorageError, match=r"full|space"):
        enroll(disk.root, "dave")
    for refused in (renewal(small, "bob"), enrollment(small, token)):
        assert refused.startswith("StorageError: ") and ("full" in refused or "space" in refused), refused
    assert tool("status", "--dir", where).returncode == 0, "and who asks is answered"
    assert verify(disk.root).head == before.head
    backup = tool("backup", "--out", str(tmp_path / "backup"), "--dir", where)
    assert backup.returncode == 0 and "not in the audit trail" in backup.stderr, "elsewhere there is space"
    assert not verify(tmp_path / "backup").damaged
    disk.free()
    for name, words in commands.items():
        said = tool(*words)
        assert said.returncode == 0, (name, said.stderr)
    assert "BEGIN CERTIFICATE" in enroll(disk.root, "dave")
    assert "BEGIN CERTIFICATE" in renewal(small, "bob")
    assert "BEGIN CERTIFICATE" in enrollment(small, token), "it was not used up"
    assert tool("audit", "--verify", "--dir", where).returncode == 0
    assert small.stop() == 0
    assert not verify(disk.root).damaged


def fill_log(disk: Disk) -> None:
    """SQLite's journal may have room of its own: write until it has none."""
    database = Database(disk.root / "log.sqlite")
    try:
        for index in range(2000):
            database.run(lambda c, i=index: c.execute("INSERT INTO tokens VALUES (?, 'x', 'device', 0, 'x')", (f"{i}" * 300,)))
        raise AssertionError("the log took it all")
    except StorageError:
        pass
    finally:
        database.close()


def test_a_server_that_can_not_start_says_why_and_starts_when_there_is_space(small, disk):
    finish(small, [Device(small, "alice"), Device(small, "bob")])
    head = verify(disk.root).head
    (disk.root / "server.log").unlink()
    disk.fill()
    said = tool("run", "--dir", str(disk.root))
    assert said.returncode == 11 and "Traceback" not in said.stderr, said.stderr
    assert "full" in said.stderr or "space" in said.stderr
    disk.free()
    assert verify(disk.root).head == head
    small.start()
    assert small.stop() == 0


def test_init_on_a_full_disk_leaves_nothing_that_looks_like_a_server(disk):
    disk.fill()
    said = tool("init", "--dir", str(disk.root / "new"), "--name", "localhost")
    assert said.returncode == 11 and "Traceback" not in said.stderr and ("space" in said.stderr or "full" in said.stderr)
    disk.free()
    assert tool("init", "--dir", str(disk.root / "new"), "--name", "localhost").returncode == 0


def test_an_operators_new_key_does_not_replace_the_old_one_without_its_certificate(tmp_path, monkeypatch):
    server = Server(tmp_path / "server")
    before = {name: (server.directory / name).read_bytes() for name in ("operator.key", "operator.pem")}
    written: list[Path] = []

    def full_at_the_second(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        tls.write_private(path, data)

    monkeypatch.setattr(own, "write_private", full_at_the_second)
    with pytest.raises(StorageError, match="no space left"):
        new_operator(server.directory, "operator")
    assert {name: (server.directory / name).read_bytes() for name in before} == before
    assert not list(server.directory.glob("*.new")) and not verify(server.directory).notes
    monkeypatch.undo()
    new_operator(server.directory, "operator")
    assert (server.directory / "operator.key").read_bytes() != before["operator.key"] and not verify(server.directory).notes
