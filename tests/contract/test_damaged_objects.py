"""A flipped bit in what a server has stored: found, put aside, and made good or named; the daemon lives on."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
from pathlib import Path

import grpc.aio
import pytest
from server_side import Device, Server, calm_ledger, digest_of, error_name, fetch, run_toml, whole_run

from common.errors import DamagedError
from common.pb import admin_pb2
from fp_server import audit
from fp_server import events as e
from fp_server.exporting import export_run
from fp_server.log import Database, EventLog

TOML = run_toml("global", final_evaluation=False)


def flip(path: Path, at: int = -1) -> None:
    """One bit of a stored object."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def object_of(server: Server, digest: str) -> Path:
    return server.directory / "objects" / digest[:2] / digest


def quarantined(server: Server) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in (server.directory / "quarantine").iterdir())
    return []


def events(server: Server, kind: type) -> list:
    database = Database(server.directory / "log.sqlite", reading=True)
    try:
        return [event for _, event in EventLog(database).replay("toy-run") if isinstance(event, kind)]
    finally:
        database.close()


def audited(server: Server, action: str) -> list[audit.Entry]:
    database = Database(server.directory / "log.sqlite", reading=True)
    try:
        return [row.entry for row in audit.read(database) if row.entry.action == action]
    finally:
        database.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, str]:
    """The ledger of a run nothing happened to."""
    return calm_ledger(tmp_path_factory.mktemp("calm") / "server", TOML)


def accepted_update(server: Server, device: str) -> Path:
    """The object of a device's newest accepted update."""
    digest = [event.ref.digest for event in events(server, e.UpdateAccepted) if event.device == device][-1]
    return object_of(server, digest)


@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_a_damaged_update_is_pushed_again_and_the_run_ends_with_the_same_bytes(server, undisturbed, harm):
    hurt = []

    async def hurt_alices() -> None:  # she has delivered, bob has not yet
        await server.until(lambda s: s["current"]["devices"]["alice"]["stage"] == "done")
        hurt.append(accepted_update(server, "alice"))
        harm(hurt[0])

    alice, bob = Device(server, "alice"), Device(server, "bob", hooks={"assigned": hurt_alices})
    status = asyncio.run(whole_run(server, [alice, bob], TOML))
    assert status["state"] == "finished" and all(entry["committed"] for entry in status["history"])
    assert [entry["weights"] for entry in status["history"]] == [{"alice": 40, "bob": 40}] * 2
    (lost,) = events(server, e.UpdatesLost)
    assert list(lost.lost) == ["alice"] and ("missing" if harm is Path.unlink else "not what was written") in lost.lost["alice"]
    assert len(alice.assignments) == 3 and len(bob.assignments) == 2, "she was asked again, he was not"
    if harm is flip:
        assert quarantined(server) == [hurt[0].name] and [entry.object for entry in audited(server, "quarantine")] == [
            f"object {hurt[0].name}"
        ]
    assert server.stop() == 0
    assert server.ledger() == undisturbed


def test_without_the_device_the_round_goes_on_by_the_usual_rules_and_the_log_says_why(server):
    """Bob's update is damaged when he has gone for good."""
    toml = run_toml("global", final_evaluation=False, rounds=1, progress_timeout_seconds=6.0)

    async def main():
        bob = Device(server, "bob")
        gone = asyncio.Event()

        async def leave() -> None:
            gone.set()
            await asyncio.Event().wait()

        async def hurt_bobs() -> None:
            await gone.wait()
            living.cancel()
            await asyncio.wait({living})
            flip(accepted_update(server, "bob"))

        bob.hooks["accepted"] = leave
        alice = Device(server, "alice", hooks={"assigned": hurt_bobs})
        run = await server.begin(toml)
        living = asyncio.create_task(bob.live())
        async with asyncio.timeout(60):
            await alice.live()
        return await server.status(run)

    status = asyncio.run(main())
    (entry,) = status["history"]
    assert status["state"] == "finished" and entry["committed"] and entry["weights"] == {"alice": 40}
    assert "no progress" in entry["devices"]["bob"]["message"]
    assert list(events(server, e.UpdatesLost)[0].lost) == ["bob"] and len(quarantined(server)) == 1
    assert server.stop() == 0


def in_the_second_round(device: Device, do) -> None:
    """Have `do` done when the device gets its second assignment."""

    async def first() -> None:
        device.hooks["assigned"] = do

    device.hooks["assigned"] = first


def test_a_damaged_adapter_object_is_made_again_from_the_ledger(server, undisturbed):
    """Of three, one is fetched by a device, and the others are read by the aggregation, which takes the devices' start back."""
    alice, bob = Device(server, "alice"), Device(server, "bob")
    hurt = []

    async def hurt_the_adapter() -> None:
        adapter = [item.ref.digest for item in alice.assignments[0].adapter] if alice.assignments[0].adapter else []
        assert adapter == [], "in the first round there is none"
        for commit in events(server, e.RoundCommitted)[-1].units[:3]:
            hurt.append(object_of(server, commit.broadcast.digest))
            flip(hurt[-1])
        async with server.channel("alice") as channel:
            for path in hurt:
                with contextlib.suppress(grpc.aio.AioRpcError):  # not each is of her task
                    assert digest_of(await fetch(channel, path.name)) == path.name

    in_the_second_round(alice, hurt_the_adapter)
    status = asyncio.run(whole_run(server, [alice, bob], TOML))
    assert status["state"] == "finished" and len(hurt) == 3
    assert set(quarantined(server)) <= {path.name for path in hurt} and quarantined(server)
    assert server.stop() == 0
    assert server.ledger() == undisturbed
    assert "made again from the ledger" in server.log()


def test_a_damaged_ledger_object_holds_the_run_until_it_is_back_and_says_what_to_do(server, undisturbed, tmp_path):
    alice, bob = Device(server, "alice"), Device(server, "bob")
    seen = []

    async def hurt_the_ledger() -> None:
        """Layers both will train again: the whole ledger."""
        for commit in events(server, e.RoundCommitted)[-1].units:
            path = object_of(server, commit.ledger.digest)
            shutil.copy(path, tmp_path / path.name)
            flip(path)

    async def main():
        run = await server.begin(TOML)
        living = asyncio.gather(alice.live(), bob.live())
        while "can't be aggregated" not in (status := await server.status())["problem"]:
            await asyncio.sleep(0.1)
            assert not living.done(), status
        seen.append(status["problem"])
        with pytest.raises(DamagedError, match=r"the ledger of layer \d+ of run 'toy-run': .*objects/.*of a backup"):
            await asyncio.to_thread(export_run, server.directory, "", tmp_path / "adapter", "", None)
        async with server.admin() as admin:
            with pytest.raises(grpc.aio.AioRpcError, match=r"ledger of layer") as refused:
                async for _ in admin.ReadLedger(admin_pb2.LedgerRequest()):
                    pass
        assert error_name(refused.value) == "DamagedError"
        for copy in tmp_path.iterdir():
            if len(copy.name) == 64:
                object_of(server, copy.name).unlink(missing_ok=True)
                shutil.copy(copy, object_of(server, copy.name))
        async with asyncio.timeout(60):
            await living
        return await server.status(run)

    in_the_second_round(alice, hurt_the_ledger)
    status = asyncio.run(main())
    assert status["state"] == "finished" and status["problem"] == ""
    assert "moved to quarantine/" in seen[0] and "of a backup to its place" in seen[0]
    assert server.stop() == 0
    assert server.ledger() == undisturbed


def test_a_damaged_log_is_not_served(server):
    asyncio.run(whole_run(server, [Device(server, "alice"), Device(server, "bob")], TOML))
    assert server.stop() == 0
    connection = sqlite3.connect(server.directory / "log.sqlite")
    connection.execute("UPDATE events SET body = replace(body, '40', '41') WHERE kind = 'RoundCommitted'")
    connection.commit()
    connection.close()
    server.process = None
    with pytest.raises(AssertionError, match=r"event \d+ is not what was written.*fp-server verify"):
        server.start()
    assert server.process.wait(10) == 11
