"""A container with exactly the limit that `fp-client plan` prints, and one whose budget lies, on real weights.

The limit is of memory and swap. It is the kernel's own account that is asked, version 1 or 2 of control groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.containers.fleet import Fleet

BUDGETS = {"device-1": "130MiB", "device-2": "300MiB", "device-3": "700MiB"}
"""device-3 lies: it gets device-1's limit."""
WINDOW = 128
"""Tokens a row, of 4 rows a batch."""

pytestmark = pytest.mark.weights


def planned(fleet: Fleet, device: str) -> dict[str, int]:
    """`fp-client plan` in the device's own container, measured there: the container limit, and the parts of it."""
    printed = fleet.compose("run", "--rm", "-T", device, "plan", "--json", "--batch", 4, "--sequence", WINDOW, timeout=600)
    plan = json.loads(printed[printed.index("{") :])
    return {"limit": plan["container_limit"], "budget": plan["budget"], **plan["idle"]}


def test_the_planned_limit_holds_and_a_lie_fails_alone(fleets: Callable[..., Fleet], real_manifest: Path) -> None:
    fleet = fleets("memory", real_manifest, BUDGETS, data_rows=40)
    fleet.write_environment(**dict.fromkeys(BUDGETS, 2 << 30))  # to plan in; the limits come from the plans
    fleet.start_server()
    for device in BUDGETS:
        fleet.join(device)
    honest = ["device-1", "device-2"]
    plans = {device: planned(fleet, device) for device in honest}
    plans["device-3"] = plans["device-1"]
    fleet.write_environment(**{device: plan["limit"] for device, plan in plans.items()})
    fleet.up()
    fleet.start(fleet.run_file("run", real_manifest, steps=2, window=WINDOW))
    with fleet.held("device-1") as first, fleet.held("device-2") as second, fleet.held("device-3") as third:
        status = fleet.wait_state("run", seconds=1200)
        held = {"device-1": first(), "device-2": second(), "device-3": third()}
    for device, plan in plans.items():
        found = fleet.memory(device)
        print(device, {**plan, **found, "held": held[device]})
        assert found["limit"] == plan["limit"] - plan["limit"] % 4096 and found["swap_limit"] == 0, found
        assert fleet.inspect(device)["RestartCount"] == 0, "the daemon has lived through it all"
        assert (found["kills"] > 0) == (device == "device-3"), (device, found, held)
        assert fleet.inspect(device)["State"]["OOMKilled"] is False or device == "device-3"
    rounds = [entry for entry in status["history"] if entry["committed"]]
    assert len(rounds) == status["rounds"] == 2 and all(sorted(entry["weights"]) == honest for entry in rounds)
    lied = rounds[0]["devices"]["device-3"]
    assert lied["stage"] == "dropped" and lied["error"] == "WorkerError", lied
    assert "the worker was killed during 'train' (probably out of memory: predicted" in lied["message"]
    assert "budget 700 MiB" in lied["message"] and "its container a higher limit" in lied["message"]
    assert lied["message"] in fleet.log("server") and lied["message"] in fleet.log("device-3")
    for device in honest:
        member = rounds[1]["devices"][device]
        assert member["gradient"] == "streamed" and 0 < member["measured_peak_bytes"] <= plans[device]["budget"], member
    assert "connected to server:7443" in fleet.inside("device-3", "fp-client", "health")
