"""Attacks by what a device uploads and claims, against a real server: it counts for no more than the operator allows."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
from server_side import Device, Server, blocks_of, error_name, fetch, ready_for, run_toml, seeded, whole_run
from siege import Besieged

from common.blocks import read_blocks, write_blocks


@pytest.fixture
def strict(tmp_path: Path):
    """A server whose operator caps norms and sample counts for all runs."""
    one = Server(tmp_path / "server")
    path = one.directory / "server.toml"
    path.write_text("max_update_norm = 100.0\nmax_samples = 60\n" + path.read_text())
    one.start()
    yield one
    if one.process is not None:
        one.kill()


def changed(change, rounds):
    """Honest updates, but for these rounds: there every block is `change(block)`."""

    def make(assignment, device):
        blocks = blocks_of(assignment, device.name)
        if assignment.key.round in rounds:
            blocks = [change(block) for block in blocks]
        path = device.server.devices / device.name / "made.safetensors"
        write_blocks(path, blocks)
        return path.read_bytes()

    return make


def started_with(ledger_scale):
    """Continue the broadcast's top components, `ledger_scale` away from them. α/r = 2."""

    async def make(assignment, device):
        path = device.server.devices / device.name / "made.safetensors"
        blocks = {(b.layer, b.module): b for b in blocks_of(assignment, device.name)}
        async with device.server.channel(device.name) as channel:
            for item in assignment.adapter:
                path.write_bytes(await fetch(channel, item.ref.digest))
                for given in read_blocks(path):
                    if (given.layer, given.module) in blocks:
                        top = replace(given, a=given.a[:2], b=given.b[:, :2] / 2)
                        blocks[given.layer, given.module] = replace(top, b=top.b * np.float32(ledger_scale))
        write_blocks(path, list(blocks.values()))
        return path.read_bytes()

    return make


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused_and_the_others_make_the_round(server, value):
    bob = Device(server, "bob", make=changed(lambda b: replace(b, a=np.full_like(b.a, value)), {0}))
    status = asyncio.run(whole_run(server, [Device(server, "alice"), bob], run_toml()))
    first, second = status["history"][:2]
    assert first["devices"]["bob"]["error"] == "UpdateRejected" and "must be finite" in first["devices"]["bob"]["message"]
    assert (first["weights"], second["weights"]) == ({"alice": 40}, {"alice": 40, "bob": 40})
    assert "is rejected" in server.log() and f"holds {value}" in server.log()


def cancelling(block):
    """‖B·A‖ is 10¹⁵ or so; tr((BᵀB)(AAᵀ)) makes 0 of it. The two columns of B are equal, and the rows of A but for an ulp."""
    a, b = block.a * np.float32(1e12), np.repeat(block.b[:, :1], 2, axis=1) * np.float32(1e12)
    a[1] = -a[0]
    a[1, 0] = np.nextafter(a[1, 0], np.float32(np.inf))
    return replace(block, a=a, b=b)


def overflowing(block):
    """An ordinary B·A, of which (α/r)·B is no float32 any more. α/r = 2."""
    return replace(block, a=np.full_like(block.a, 1e-38), b=np.full_like(block.b, 3e38))


@pytest.mark.parametrize("start", ["fresh", "global"])
@pytest.mark.parametrize(("attack", "said"), [(cancelling, "components cancel"), (overflowing, "holds 3e+38")])
def test_factors_that_hide_what_they_are_cost_their_device_the_round_and_no_more(server, attack, said, start):
    """The ledger is the one of a run in which bob was never heard in that round."""
    toml = run_toml(start, rounds=3, limits_max_update_norm=1e4)
    bob = Device(server, "bob", make=changed(attack, {1}))
    status = asyncio.run(whole_run(server, [Device(server, "alice"), bob], toml))
    assert [entry["weights"].get("bob") for entry in status["history"][:3]] == [40, None, 40]
    refused = status["history"][1]["devices"]["bob"]
    assert refused["error"] == "UpdateRejected" and said in refused["message"]
    bob = Device(server, "bob", make=changed(lambda b: replace(b, a=np.full_like(b.a, np.nan)), {1}))
    asyncio.run(whole_run(server, [Device(server, "alice"), bob], toml.replace("toy-run", "without")))
    assert server.ledger("without") == server.ledger("toy-run")


class Unchecked(Besieged):
    """As before entries had a limit: updates are taken as they come."""

    checks = False

    def command(self) -> list[str]:
        begin, code, *rest = super().command()[1:]
        skip = "" if self.checks else "import fp_server.transfer as t; t.check_update = lambda *args: None\n"
        return [sys.executable, begin, code.replace("from fp_server.cli", f"{skip}from fp_server.cli"), *rest]


@pytest.mark.parametrize("outliers", ["off", "reject"])
def test_what_an_older_version_accepted_and_could_not_aggregate_is_left_out_after_the_next_start(tmp_path, outliers):
    """The accepted update is in the log. It is asked for again, refused, and the run goes on."""
    server = Unchecked(tmp_path / "server", ("alice", "bob"))
    server.start()

    async def body():
        accepted, restarted = asyncio.Event(), asyncio.Event()

        async def told():
            accepted.set()

        async def last(assignment, device):
            await restarted.wait()
            return device.honest(assignment)

        async def upgraded():
            await accepted.wait()
            server.kill()
            server.checks = True
            await asyncio.to_thread(server.start)
            restarted.set()

        bob = Device(server, "bob", make=changed(overflowing, {0}), hooks={"accepted": told})
        upgrade = asyncio.create_task(upgraded())
        status = await whole_run(server, [Device(server, "alice", make=last), bob], run_toml(limits_outliers=outliers), 60)
        await upgrade
        assert [entry["weights"] for entry in status["history"][:2]] == [{"alice": 40}, {"alice": 40, "bob": 40}]
        refused = status["history"][0]["devices"]["bob"]
        assert refused["error"] == "UpdateRejected" and "holds 3e+38" in refused["message"]

    try:
        asyncio.run(body())
        assert "the update of bob is lost and asked for again: tensor" in server.log()
        assert "Traceback" not in server.log()
    finally:
        server.kill()


def test_the_operators_cap_on_norms_holds_whatever_the_run_file_says(strict):
    huge = changed(lambda b: replace(b, b=b.b * np.float32(1e6)), {0})
    toml = run_toml(limits_max_update_norm=1e9)
    status = asyncio.run(whole_run(strict, [Device(strict, "alice"), Device(strict, "bob", make=huge)], toml))
    assert "at most 100 counts" in status["history"][0]["devices"]["bob"]["message"]
    assert [entry["weights"] for entry in status["history"][:2]] == [{"alice": 40}, {"alice": 40, "bob": 40}]


def test_a_norm_is_measured_from_the_factors_a_device_continued(server):
    """start = "global": bob's factors are the broadcast's own, a tenth larger, then a hundred times; B·A alone says little."""
    made = {1: started_with(1.1), 2: started_with(100.0)}

    async def make(assignment, device):
        if assignment.key.round in made:
            return await made[assignment.key.round](assignment, device)
        return device.honest(assignment)

    # Honest updates have a norm of some 5 a module.
    devices = [Device(server, "alice", units=6), Device(server, "bob", make=make, units=6)]
    status = asyncio.run(whole_run(server, devices, run_toml("global", rounds=3, limits_max_update_norm=25.0)))
    assert [entry["weights"].get("bob") for entry in status["history"][:3]] == [40, 40, None]
    assert "away from where it started, at most 25 counts" in status["history"][2]["devices"]["bob"]["message"]


def test_where_the_starting_point_is_damaged_it_is_made_again_and_the_update_still_counts(server):
    """Nobody's fault but the disk's: the push is refused for now, and passes when the device tries again."""
    said = []

    async def make(assignment, device):
        data = device.honest(assignment)
        if assignment.key.round == 1:
            for item in assignment.adapter:
                path = server.directory / "objects" / item.ref.digest[:2] / item.ref.digest
                path.chmod(0o600)
                path.write_bytes(b"\xff" * item.ref.size)
            try:
                async with server.channel(device.name) as channel:
                    await device.push(channel, ready_for(assignment.key, data), data)
            except grpc.aio.AioRpcError as error:  # unless alice's push has met the damage before
                said.append(error_name(error))
        return data

    bob = Device(server, "bob", make=make)
    status = asyncio.run(whole_run(server, [Device(server, "alice"), bob], run_toml("global")))
    assert all(name in ("StorageError", "DamagedError") for name in said)
    assert list((server.directory / "quarantine").iterdir()), "the damage was found"
    assert [entry["weights"] for entry in status["history"][:2]] == [{"alice": 40, "bob": 40}] * 2


def test_an_inflated_sample_count_buys_no_more_than_the_operators_cap(strict):
    bob = Device(strict, "bob", samples=10**12)
    status = asyncio.run(whole_run(strict, [Device(strict, "alice"), bob], run_toml()))
    assert all(entry["weights"] == {"alice": 40, "bob": 60} for entry in status["history"][:2])
    assert status["devices"]["bob"]["samples"] == 60


def test_a_run_may_cap_lower_and_never_higher(strict):
    for most, counted in ((50, 50), (70, 60)):
        bob = Device(strict, "bob", samples=10**12)
        toml = run_toml(name=f"most-{most}", limits_max_samples=most)
        status = asyncio.run(whole_run(strict, [Device(strict, "alice"), bob], toml))
        assert status["history"][0]["weights"] == {"alice": 40, "bob": counted}


def test_what_is_claimed_after_joining_a_run_changes_nothing(strict):
    """bob joins with 5 samples, goes away after the first round and comes back with many."""
    delivered = asyncio.Event()

    async def gone():
        delivered.set()

    modest, greedy = Device(strict, "bob", samples=5, hooks={"accepted": gone}), Device(strict, "bob", samples=10**12)

    class Both(Device):
        async def live(self):
            first = asyncio.create_task(modest.live())
            await delivered.wait()
            first.cancel()
            await asyncio.wait([first])
            await greedy.live()

    both = Both(strict, "bob")
    status = asyncio.run(whole_run(strict, [Device(strict, "alice"), both], run_toml(rounds=3)))
    assert "planned" in greedy.seen, "it was asked again and said more"
    assert all(entry["weights"] == {"alice": 40, "bob": 5} for entry in status["history"][:3])


# -- the comparison of a round's updates ------------------------------------------------------------

TEN = tuple(f"d{n}" for n in range(10))


@pytest.fixture
def ten(tmp_path: Path):
    """A server of ten devices."""
    one = Server(tmp_path / "server", TEN)
    one.start()
    yield one
    if one.process is not None:
        one.kill()


def alike(factor):
    """An update along the round's one gradient, in a random subspace of the device's own, times `factor`."""

    def make(assignment, device):
        blocks = []
        for block in blocks_of(assignment, device.name):
            gradient = seeded("gradient", assignment.key.round, block.layer, block.module).standard_normal(
                (len(block.b), block.a.shape[1]), np.float32
            )
            blocks.append(replace(block, b=np.float32(-0.1 * factor) * gradient @ block.a.T))
        path = device.server.devices / device.name / "made.safetensors"
        write_blocks(path, blocks)
        return path.read_bytes()

    return make


def nan(assignment, device):
    blocks = [replace(block, a=np.full_like(block.a, np.nan)) for block in blocks_of(assignment, device.name)]
    path = device.server.devices / device.name / "made.safetensors"
    write_blocks(path, blocks)
    return path.read_bytes()


def fleet(server, attack):
    """Ten devices that hold all six layers; d2 and d7 attack."""
    return [Device(server, name, make=attack if name in ("d2", "d7") else alike(1), units=6) for name in TEN]


def test_sign_flipped_updates_of_two_in_ten_are_left_out_with_a_reason_and_leave_no_trace(ten):
    toml = run_toml(min_devices=10)
    status = asyncio.run(whole_run(ten, fleet(ten, alike(-1)), toml, 120))
    honest = {name: 40 for name in TEN if name not in ("d2", "d7")}
    for entry in status["history"][:2]:
        assert entry["weights"] == honest
        for name, device in entry["devices"].items():
            review = device["review"]
            assert review["others"] == 9 and review["rejected"] is (name in ("d2", "d7"))
            if name in ("d2", "d7"):
                assert "points against the others: mean cosine -" in review["outlier"] and review["agreement"] < 0
            else:
                assert review["outlier"] is None and review["agreement"] > 0
    assert "device d2: its update of round 1 is left out: points against the others" in ten.log()
    # The very ledger of a run in which the two were never heard.
    again = asyncio.run(whole_run(ten, fleet(ten, nan), toml.replace("toy-run", "without"), 120))
    assert again["history"][0]["weights"] == honest
    assert ten.ledger("without") == ten.ledger("toy-run")


def test_reported_outliers_count_all_the_same(ten):
    toml = run_toml(min_devices=10, rounds=1, limits_outliers="report")
    entry = asyncio.run(whole_run(ten, fleet(ten, alike(-1)), toml, 120))["history"][0]
    assert set(entry["weights"]) == set(TEN)
    assert entry["devices"]["d2"]["review"]["outlier"] is not None and not entry["devices"]["d2"]["review"]["rejected"]
    assert "device d2: its update of round 1 stands out" in ten.log()


def test_an_update_many_times_as_large_as_the_others_is_left_out_without_any_limit_set(ten):
    entry = asyncio.run(whole_run(ten, fleet(ten, alike(50)), run_toml(min_devices=10, rounds=1), 120))["history"][0]
    assert "d2" not in entry["weights"] and "d7" not in entry["weights"] and len(entry["weights"]) == 8
    assert "times as far as the other devices' do (median), at most 5 counts" in entry["devices"]["d7"]["review"]["outlier"]


def test_of_two_devices_that_disagree_neither_is_left_out(server):
    devices = [Device(server, "alice", make=alike(1), units=6), Device(server, "bob", make=alike(-50), units=6)]
    entry = asyncio.run(whole_run(server, devices, run_toml(rounds=1)))["history"][0]
    assert entry["weights"] == {"alice": 40, "bob": 40}
    review = entry["devices"]["bob"]["review"]
    assert (review["others"], review["against"], review["size"], review["outlier"]) == (1, 1, None, None)
