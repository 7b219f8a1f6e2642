"""A run to its end through compose.yaml as it is: a server and four devices with different memory limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.containers.fleet import Fleet, call, compose_command

BUDGETS = {"device-1": "60MB", "device-2": "90MB", "device-3": "130MB", "device-4": "200MB"}
IDLE = 650 << 20
"""More than a daemon and a worker hold idle (tests/containers/test_memory.py gives devices exactly what they need)."""


def test_a_run_to_the_end(fleets: Callable[..., Fleet], tiny_manifest: Path) -> None:
    fleet = fleets("compose", tiny_manifest, BUDGETS)
    limits = {device: IDLE + int(budget.removesuffix("MB")) * 10**6 for device, budget in BUDGETS.items()}
    fleet.write_environment(**limits)
    early = fleet.compose("run", "--rm", "-T", "server", check=False, both=True)
    assert "not a server directory; run `fp-server init --dir /data --name HOST` first" in early
    fleet.start_server()
    assert "already initialised" in fleet.compose("run", "--rm", "-T", "server", "init", "--name", "x", check=False, both=True)
    unjoined = fleet.compose("run", "--rm", "-T", "device-1", check=False, both=True)
    assert "run `fp-client join`" in unjoined, unjoined
    for device in BUDGETS:
        assert f"joined server:7443 as device '{device}'" in fleet.join(device)
    fleet.up()
    manifest = fleet.compose("run", "--rm", "-T", "device-1", "manifest", "/models/tiny", "-o", "-")
    assert json.loads(manifest) == json.loads(tiny_manifest.read_text()), "made where the weights are, and nothing else printed"
    fleet.start(fleet.run_file("run", tiny_manifest, steps=5))
    status = fleet.wait_state("run")
    for service in ("server", *BUDGETS):
        fleet.wait_health(service, seconds=90)
        hardened(fleet, service)
    rounds = [entry for entry in status["history"] if entry["committed"]]
    assert [sorted(entry["holders"]["1"]) for entry in rounds] == [sorted(BUDGETS)] * 2
    assert status["connected"] == sorted(BUDGETS) and status["loss_last"] < status["loss_first"]
    for device, limit in limits.items():
        found = fleet.memory(device)
        assert found["limit"] == limit - limit % 4096 and found["swap_limit"] == 0 and found["kills"] == 0, found
        assert "run run: can take part: submodel" in fleet.log(device) and "run run: finished" in fleet.log(device)
    assert "connected to server:7443 as 'device-1'" in fleet.inside("device-1", "fp-client", "health")
    everything_stops_in_time(fleet)


def hardened(fleet: Fleet, service: str) -> None:
    """Read-only root, no capability, no new privilege, not root; and it says so of itself."""
    host = fleet.inspect(service)["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges:true"]
    assert not host["Privileged"] and host["PidsLimit"] == 256 and "docker.sock" not in json.dumps(host)
    found = fleet.inside(service, "sh", "-c", "touch /x 2>&1; id -u; grep -E 'CapEff|NoNewPrivs' /proc/1/status").split()
    assert "Read-only" in found and "10001" in found and found[-1] == "1" and int(found[-3], 16) == 0, found


def everything_stops_in_time(fleet: Fleet) -> None:
    """SIGTERM: exit code 0. After `stop_grace_period` they would have been killed: 137."""
    fleet.compose("stop")
    for service in ("server", *fleet.devices):
        state = fleet.inspect(service)["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False), (service, state, fleet.log(service)[-2000:])
        assert "stopped" in fleet.log(service).splitlines()[-1]


def test_the_file_is_one_that_compose_reads_and_has_no_secret() -> None:
    """As it lies in the checkout, with no .env."""
    text = call(*compose_command(), "config").stdout
    assert text.count("memswap_limit") == 4 and text.count("read_only: true") == 5 and "service_healthy" in text
    for word in ("password", "token", "secret", "key:"):
        assert word not in text.lower(), word
