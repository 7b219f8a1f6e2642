"""Same seed, same bytes: whole runs of real processes, undisturbed and with kills in mid-round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.federation import Federation, write_data

Federate = Callable[..., Federation]
DEVICES = {"alpha": "115MB", "beta": "400MB"}
RUNS = {
    "default": {},
    "submodel": {"train": 'gradient = "submodel"'},
    "stitched components": {"train": 'gradient = "stitched"\nfidelity = true', "pruning": 'units = "component"'},
    "streamed components": {
        "lora": 'start = "global"', "train": 'gradient = "streamed"\nfidelity = true', "pruning": 'units = "component"',
        "limits": "update_bytes = 140_000",
    },
}  # fmt: skip
"""What a run file says, by name."""
MODES = {"default": "streamed", "submodel": "submodel", "stitched components": "stitched", "streamed components": "streamed"}


def prepare(federate: Federate, model: Path, name: str) -> Federation:
    federation = federate(model, name=name)
    federation.start_server()
    for seed, (device, budget) in enumerate(DEVICES.items()):
        federation.add_device(device, write_data(federation.root / f"{device}.jsonl", 24 + 8 * seed, seed), budget)
        federation.start_device(device)
    return federation


def undisturbed(federate: Federate, model: Path, kind: str, name: str) -> dict[str, str]:
    federation = prepare(federate, model, name)
    federation.run_cli("fp-server", "start", federation.run_file("run", **RUNS[kind]), "--dir", federation.server_dir)
    status = federation.wait_state()
    federation.close()
    members = [member for entry in status["history"] for member in entry["devices"].values() if "gradient" in member]
    assert members and {member["gradient"] for member in members} == {MODES[kind]}
    if kind.endswith("components"):
        assert {unit[-1] for member in members for unit in member["units"]} == {"M", "N"}
    if kind == "streamed components":
        assert all(member["fidelity"] is None and len(member["units"]) == 4 for member in members)
    if kind == "stitched components":
        said = [member["fidelity"] for member in members]
        assert all(cosine is not None and abs(cosine) <= 1 + 1e-6 for cosine in said), said
        assert all(len(member["unit_fidelity"]) == len(member["units"]) for member in members)
    return federation.ledger("run")


@pytest.mark.parametrize("kind", ["default", "stitched components", "streamed components"])
def test_two_runs_give_the_same_bytes(federate: Federate, tiny_model: Path, kind: str) -> None:
    first = undisturbed(federate, tiny_model, kind, "first")
    second = undisturbed(federate, tiny_model, kind, "second")
    assert first and first == second


def test_kills_in_mid_round_change_nothing(federate: Federate, tiny_model: Path) -> None:
    expected = undisturbed(federate, tiny_model, "submodel", "calm")
    federation = prepare(federate, tiny_model, "stormy")
    federation.run_cli("fp-server", "start", federation.run_file("run", **RUNS["submodel"]), "--dir", federation.server_dir)
    federation.wait_stage("alpha", "probing", "choosing", "training")
    federation.kill("alpha")  # in mid-round: its worker must end with it, its task must come again
    federation.kill("server")
    federation.start_server()
    federation.start_device("alpha")
    federation.wait(lambda: federation.status()["rounds_done"] >= 1, 180, "round 1 is committed")
    federation.kill("server")
    federation.start_server()
    federation.kill("beta")
    federation.start_device("beta")
    status = federation.wait_state()
    federation.close()
    assert federation.ledger("run") == expected
    assert all(not entry["excluded"] for entry in status["history"])
