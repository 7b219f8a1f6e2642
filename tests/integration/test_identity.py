"""Same seed, same bytes: whole runs of real processes, undisturbed and with kills in mid-round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.federation import Federation, write_data

Federate = Callable[..., Federation]
DEVICES = {"alpha": "115MB", "beta": "400MB"}
ROUNDS = {"fresh": "", "global": 'start = "global"'}


def prepare(federate: Federate, model: Path, name: str) -> Federation:
    federation = federate(model, name=name)
    federation.start_server()
    for seed, (device, budget) in enumerate(DEVICES.items()):
        federation.add_device(device, write_data(federation.root / f"{device}.jsonl", 24 + 8 * seed, seed), budget)
        federation.start_device(device)
    return federation


def undisturbed(federate: Federate, model: Path, start: str, name: str) -> dict[str, str]:
    federation = prepare(federate, model, name)
    federation.run_cli("fp-server", "start", federation.run_file("run", lora=ROUNDS[start]), "--dir", federation.server_dir)
    federation.wait_state()
    federation.close()
    return federation.ledger("run")


@pytest.mark.parametrize("start", ["fresh", "global"])
def test_two_runs_give_the_same_bytes(federate: Federate, tiny_model: Path, start: str) -> None:
    first = undisturbed(federate, tiny_model, start, "first")
    second = undisturbed(federate, tiny_model, start, "second")
    assert first and first == second


def test_kills_in_mid_round_change_nothing(federate: Federate, tiny_model: Path) -> None:
    expected = undisturbed(federate, tiny_model, "fresh", "calm")
    federation = prepare(federate, tiny_model, "stormy")
    federation.run_cli("fp-server", "start", federation.run_file("run"), "--dir", federation.server_dir)
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
