"""`kill -9` of the server at every point of a round: the run completes, and its ledger is bit-identical."""

from __future__ import annotations

import asyncio

import pytest
from server_side import Device, Server, run_toml, whole_run

POINTS = ["planned", "probed", "assigned", "pushing", "accepted", "aggregating"]
TOML = run_toml("global")


def run_with(server: Server, devices: list[Device], toml: str = TOML) -> tuple[dict, dict[int, str]]:
    server.start()
    try:
        status = asyncio.run(whole_run(server, devices, toml, 30))
        assert server.stop() == 0
    finally:
        if server.process is not None:
            server.kill()
    return status, server.ledger()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, str]:
    server = Server(tmp_path_factory.mktemp("calm") / "server")
    status, ledger = run_with(server, [Device(server, "alice"), Device(server, "bob")])
    assert status["state"] == "finished"
    return ledger


@pytest.mark.parametrize("point", POINTS)
def test_the_run_completes_bit_identical_after_kill_9(tmp_path, undisturbed, point):
    server = Server(tmp_path / "server")
    kills = []

    async def crash() -> None:
        server.kill()
        kills.append(point)
        await asyncio.to_thread(server.start)

    accepted = asyncio.Semaphore(0)

    async def crash_when_both_are_in() -> None:
        accepted.release()
        if alice.seen.count("accepted") + bob.seen.count("accepted") == 2:
            await crash()

    alice, bob = Device(server, "alice"), Device(server, "bob")
    if point == "aggregating":
        alice.hooks["accepted"] = bob.hooks["accepted"] = crash_when_both_are_in
    else:
        alice.hooks[point] = crash
    status, ledger = run_with(server, [alice, bob])
    assert kills == [point]
    assert status["state"] == "finished" and status["rounds_done"] == 2
    assert all(r["committed"] or r["evaluation"] for r in status["history"]), status["history"]
    assert ledger == undisturbed
    assert set(status["history"][-1]["devices"]) == {"alice", "bob"}, "the final evaluation waits for those who come back"


def test_sigterm_in_mid_round_loses_nothing_and_devices_may_come_back(tmp_path, undisturbed):
    server = Server(tmp_path / "server")

    async def restart() -> None:
        assert await asyncio.to_thread(server.stop) == 0
        await asyncio.to_thread(server.start)

    alice, bob = Device(server, "alice", hooks={"assigned": restart}), Device(server, "bob")
    status, ledger = run_with(server, [alice, bob])
    assert status["state"] == "finished" and ledger == undisturbed
    assert any("stopping" in error or "UNAVAILABLE" in error for error in alice.errors + bob.errors)


def test_what_a_device_had_pushed_in_part_is_not_asked_for_again(tmp_path, undisturbed):
    server = Server(tmp_path / "server")
    offsets = []

    async def crash() -> None:
        await server.arriving("alice")
        server.kill()
        (partial,) = (server.directory / "partial" / "alice").iterdir()
        offsets.append(partial.stat().st_size)
        await asyncio.to_thread(server.start)

    alice, bob = Device(server, "alice", chunk=64), Device(server, "bob")
    alice.hooks["pushing"] = crash
    status, ledger = run_with(server, [alice, bob])
    assert status["state"] == "finished" and ledger == undisturbed
    assert offsets[0] > 0
