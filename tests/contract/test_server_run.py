"""Whole runs over the real wire, without torch: fresh and global starts, twice the same, then export."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from server_side import MANIFEST, MODULES, Device, Server, blocks_of, fetch, run_toml, whole_run

from common.tensorfile import TensorFile
from common.types import Gradient, component_units, unit_modules
from fp_server.exporting import export_run

SAMPLES = {"alice": 40, "bob": 10}


def one_run(directory: Path, start: str) -> tuple[dict, dict[int, str], list[Device], Server]:
    server = Server(directory)
    server.start()
    devices = [Device(server, "alice"), Device(server, "bob", units=2, samples=10)]
    try:
        status = asyncio.run(whole_run(server, devices, run_toml(start)))
        assert server.stop() == 0
    finally:
        if server.process is not None:
            server.kill()
    return status, server.ledger(), devices, server


@pytest.mark.parametrize("start", ["fresh", "global"])
def test_two_rounds_run_to_the_end_and_twice_to_the_same_bytes(tmp_path, start):
    status, ledger, _, server = one_run(tmp_path / "a", start)
    assert status["state"] == "finished" and status["rounds_done"] == 2 and status["problem"] == ""
    assert [(r["round"], r["evaluation"], r["committed"]) for r in status["history"]] == [
        (1, False, True), (2, False, True), (3, True, False),
    ]  # fmt: skip
    first = status["history"][0]
    assert first["roster"] == ["alice", "bob"] and first["weights"] == {"alice": 40, "bob": 10}
    assert len(first["devices"]["alice"]["units"]) == 3 and len(first["devices"]["bob"]["units"]) == 2
    assert first["bytes_up"] == sum(first["devices"][d]["update_bytes"] for d in ("alice", "bob"))
    said = first["devices"]["bob"]
    assert (said["gradient"], said["predicted_step_seconds"], said["step_seconds"], said["fidelity"]) == (
        "submodel",
        0.75,
        0.5,
        0.25,
    )
    assert [point["rounds_done"] for point in status["loss"]] == [0, 1, 2]
    assert set(status["ledger_layers"]) == {layer + 1 for layer in ledger}
    assert json.loads(json.dumps(status, allow_nan=False)) == status
    with server.folded() as machine:
        stored = {path.name for path in (server.directory / "objects").glob("??/*")}
        assert stored == machine.references(), "updates and older ledgers are removed"
    assert "Traceback" not in server.log() and "Warning" not in server.log()
    _, again, _, _ = one_run(tmp_path / "b", start)
    assert again == ledger


def test_the_export_is_the_weighted_sum_of_what_was_pushed(tmp_path):
    _, ledger, devices, server = one_run(tmp_path / "a", "fresh")
    expected = {(layer, m.name): np.zeros((m.d_out, m.d_in)) for layer in ledger for m in MODULES}
    samples = {"alice": 40, "bob": 10}
    for index in range(2):
        held = {d.name: next(a for a in d.assignments if a.key.round == index) for d in devices}
        for layer in {u.layer for a in held.values() for u in a.units}:
            holders = [name for name, a in held.items() if layer in {u.layer for u in a.units}]
            total = sum(samples[name] for name in holders)
            for name in holders:
                for block in blocks_of(held[name], name):
                    if block.layer == layer:
                        update = block.b.astype(np.float64) @ block.a.astype(np.float64)
                        expected[layer, block.module] += samples[name] / total * (4.0 / 2) * update
    said = export_run(server.directory, "", tmp_path / "adapter", "", None)
    assert "toy-run after 2 rounds" in said
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MANIFEST.name
    with TensorFile(tmp_path / "adapter" / "adapter_model.safetensors") as file:
        for (layer, module), delta in expected.items():
            name = next(n for n in file.tensors if f".{layer}.{module}.lora_A" in n)
            got = file.float32(name.replace("lora_A", "lora_B")).astype(np.float64) @ file.float32(name)
            np.testing.assert_allclose(got, delta, atol=1e-5)


def test_components_run_to_the_end_and_each_is_summed_over_its_own_holders(server):
    devices = [Device(server, "alice"), Device(server, "bob", units=2, samples=10)]
    status = asyncio.run(whole_run(server, devices, run_toml(pruning_units="component")))
    assert status["state"] == "finished" and status["rounds_done"] == 2
    assert [len(status["history"][0]["devices"][d]["units"]) for d in ("alice", "bob")] == [6, 4]
    expected: dict[tuple[int, str], np.ndarray] = {}
    alone = 0
    for index in range(2):
        held = {d.name: next(a for a in d.assignments if a.key.round == index) for d in devices}
        for name, assignment in held.items():
            assert sum({"M": 250, "N": 750}[unit.label[-1]] for unit in assignment.units) <= 1000 * len(assignment.units) // 2
            for block in blocks_of(assignment, name):
                unit = next(
                    u for u in component_units(MANIFEST.layers) if u.layer == block.layer and unit_modules(u, (block.module,))
                )
                total = sum(count for other, count in SAMPLES.items() if unit in held[other].units)
                alone += total < sum(SAMPLES.values())
                update = SAMPLES[name] / total * (4.0 / 2) * (block.b.astype(np.float64) @ block.a)
                expected[block.layer, block.module] = expected.get((block.layer, block.module), 0) + update
        told = status["history"][index]["holders"]
        wanted = {unit.label: sorted(d for d in held if unit in held[d].units) for a in held.values() for unit in a.units}
        assert told == wanted
    assert alone > 0, "some components had one holder"
    export_run(server.directory, "", server.directory / "adapter", "", None)
    with TensorFile(server.directory / "adapter" / "adapter_model.safetensors") as file:
        names = {name.rsplit(".lora_", 1)[0] for name in file.tensors}
        assert names == {f"base_model.model.model.layers.{layer}.{module}" for layer, module in expected}
        for (layer, module), delta in expected.items():
            name = f"base_model.model.model.layers.{layer}.{module}.lora_{{}}.weight"
            got = file.float32(name.format("B")).astype(np.float64) @ file.float32(name.format("A"))
            np.testing.assert_allclose(got, delta, atol=1e-5)


def test_random_units_need_no_similarities(server):
    devices = [Device(server, "alice"), Device(server, "bob", units=2)]
    status = asyncio.run(whole_run(server, devices, run_toml(method="random")))
    assert status["state"] == "finished" and status["rounds_done"] == 2 and status["method"] == "random"
    assert devices[0].seen.count("probed") == 0 and devices[0].seen.count("evaluated") == 3, "no probe asks for similarities"
    assert [point["rounds_done"] for point in status["loss"]] == [0, 1, 2], "the loss is measured all the same"
    member = status["history"][0]["devices"]["alice"]
    assert len(member["units"]) == 3 and member["groups"] == []


def test_auto_gives_each_device_its_own_mode_and_the_adapter_that_mode_needs(server):
    alice = Device(server, "alice", modes=(Gradient.SUBMODEL, Gradient.STREAMED))
    bob = Device(server, "bob")
    fetched: list[int] = []

    async def make(assignment, device):
        async with server.channel(device.name) as channel:
            fetched.extend([len(await fetch(channel, item.ref.digest)) for item in assignment.adapter])
        return device.honest(assignment)

    alice.make = make
    status = asyncio.run(whole_run(server, [alice, bob], run_toml(train_gradient="auto")))
    assert status["state"] == "finished" and status["gradient"] == "auto"
    assert {a.spec.gradient for a in alice.assignments} == {Gradient.STREAMED}
    assert {a.spec.gradient for a in bob.assignments} == {Gradient.SUBMODEL}
    trained = {u.layer for device in (alice, bob) for u in device.assignments[0].units}
    assert {item.layer for item in alice.assignments[1].adapter} == trained and len(fetched) == len(trained)
    assert {item.layer for item in bob.assignments[1].adapter} == trained & {u.layer for u in bob.assignments[1].units}
    assert [r["devices"]["alice"]["gradient"] for r in status["history"][:2]] == ["streamed"] * 2


def test_a_device_that_fails_its_task_leaves_the_round_to_the_others(server):
    def broken(assignment, device):
        raise_for = device.seen.count("assigned")
        return b"nothing useful" if raise_for == 1 else device.honest(assignment)

    devices = [Device(server, "alice"), Device(server, "bob", make=broken)]
    status = asyncio.run(whole_run(server, devices, run_toml()))
    assert status["state"] == "finished"
    bob = status["history"][0]["devices"]["bob"]
    assert bob["stage"] == "dropped" and bob["error"] == "UpdateRejected" and "can't be read" in bob["message"]
    assert status["history"][0]["weights"] == {"alice": 40}
    assert status["history"][1]["weights"] == {"alice": 40, "bob": 40}
