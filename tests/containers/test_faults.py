"""What happens to containers in the middle of a round: networks cut, processes frozen, stopped, replaced. The run ends with
the same bytes as an undisturbed one, and the logs say what happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.containers.fleet import Fleet, docker

GRACE = 8.0
"""Seconds: the default of server.toml and client.toml."""
STEPS = 60
"""Of a round: some seconds of training on an idle machine, in which a fault can happen."""


class Pair:
    """A server and two devices, and the ledger of an undisturbed run."""

    def __init__(self, fleet: Fleet, manifest: Path) -> None:
        self.fleet, self.manifest = fleet, manifest
        fleet.write_environment(**dict.fromkeys(fleet.devices, 800 << 20))
        fleet.start_server()
        for device in fleet.devices:
            fleet.join(device)
        fleet.up()
        fleet.start(fleet.run_file("calm", manifest, STEPS))
        fleet.wait_state("calm")
        self.calm = fleet.ledger("calm")
        assert self.calm

    def begin(self, run: str) -> None:
        """Start a run; returns in the middle of device-1's training."""
        self.since = time.time()
        self.fleet.start(self.fleet.run_file(run, self.manifest, STEPS))
        self.fleet.wait_stage(run, "device-1", "training")

    def log(self, service: str) -> str:
        """What a service has printed since the run began."""
        return docker("logs", "--since", f"{self.since:.3f}", self.fleet.container(service), both=True)

    def network(self, action: str, service: str) -> None:
        """`docker network disconnect` and `connect`, with the service's name as compose gives it."""
        container = self.fleet.container(service)
        network = docker("network", "ls", "-q", "--filter", f"label=com.docker.compose.project={self.fleet.project}")
        options = ["--alias", service] if action == "connect" else []
        docker("network", action, *options, network, container)

    def ended_like_the_calm_one(self, run: str) -> None:
        """The run finished; nobody was left out; the bytes are the undisturbed run's."""
        status = self.fleet.wait_state(run)
        assert all(not entry["excluded"] and not entry.get("attempt", 1) > 1 for entry in status["history"]), status["history"]
        members = [member for entry in status["history"] for member in entry["devices"].values()]
        assert all(member["stage"] == "done" for member in members), members
        assert self.fleet.ledger(run) == self.calm

    def wait_said(self, service: str, text: str, seconds: float = 120) -> None:
        """Wait for a line of a service's log."""
        self.fleet.wait(lambda: text in self.log(service), seconds, f"{service} says {text!r}")


@pytest.fixture(scope="module")
def pair(fleets: Callable[..., Fleet], tiny_manifest: Path) -> Pair:
    return Pair(fleets("pair", tiny_manifest, {"device-1": "60MB", "device-2": "200MB"}), tiny_manifest)


def stop(fleet: Fleet, service: str) -> None:
    """SIGTERM, as compose and every orchestrator do it: exit code 0 within the grace."""
    begin = time.monotonic()
    fleet.compose("stop", service)
    took = time.monotonic() - begin
    state = fleet.inspect(service)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False), (state, fleet.log(service)[-2000:])
    assert took < GRACE + 20, f"{took:.1f} s: it was not compose that took this long"
    assert "stopping" in fleet.log(service)


def test_a_devices_network_is_cut(pair: Pair) -> None:
    """What it trains meanwhile is pushed when the network is back."""
    pair.begin("device-cut")
    pair.network("disconnect", "device-1")
    pair.wait_said("server", "device device-1 disconnected")
    pair.wait_said("device-1", "; try ")
    assert "device device-2 disconnected" not in pair.log("server")
    pair.network("connect", "device-1")
    pair.ended_like_the_calm_one("device-cut")
    assert "connected as 'device-1'" in pair.log("device-1") and "device device-1 connected" in pair.log("server")


def test_the_servers_network_is_cut(pair: Pair) -> None:
    """Every device loses it, and finds it again by its name, at another address if need be."""
    pair.begin("server-cut")
    pair.network("disconnect", "server")
    for device in pair.fleet.devices:
        pair.wait_said(device, "; try ")
    pair.network("connect", "server")
    pair.ended_like_the_calm_one("server-cut")
    for device in pair.fleet.devices:
        assert f"connected as '{device}'" in pair.log(device)


def test_a_device_is_frozen_and_thawed(pair: Pair) -> None:
    """For longer than a keepalive takes to notice; less than `progress_timeout_seconds`."""
    pair.begin("device-frozen")
    docker("pause", pair.fleet.container("device-1"))
    pair.wait_said("server", "device device-1 disconnected")
    docker("unpause", pair.fleet.container("device-1"))
    pair.ended_like_the_calm_one("device-frozen")
    assert "connected as 'device-1'" in pair.log("device-1")


def test_the_server_is_frozen_and_thawed(pair: Pair) -> None:
    pair.begin("server-frozen")
    docker("pause", pair.fleet.container("server"))
    for device in pair.fleet.devices:
        pair.wait_said(device, "; try ")
    docker("unpause", pair.fleet.container("server"))
    pair.ended_like_the_calm_one("server-frozen")


def test_the_server_is_replaced_by_a_new_container_on_its_volume(pair: Pair) -> None:
    """A rolling restart, as an upgrade does it."""
    pair.begin("server-replaced")
    old = pair.fleet.container("server")
    stop(pair.fleet, "server")
    said = pair.log("server")
    assert "stopping: what is being received or aggregated has 7 s" in said and "the server is stopping; try again later" in said
    pair.fleet.compose("rm", "-f", "server")
    pair.fleet.compose("up", "-d", "--no-build", "server")
    assert pair.fleet.container("server") != old
    pair.ended_like_the_calm_one("server-replaced")
    assert "run server-replaced taken up again: round" in pair.log("server")
    assert "the server is stopping; try again later; try " in pair.log("device-2")


def test_a_device_is_stopped_in_mid_task_and_started_again(pair: Pair) -> None:
    """Its task ends with it and comes again."""
    pair.begin("device-stopped")
    stop(pair.fleet, "device-1")
    assert "a finished update is kept for the next start" in pair.log("device-1")
    pair.wait_said("server", "device device-1 disconnected")
    pair.fleet.up("device-1")
    pair.ended_like_the_calm_one("device-stopped")


def test_a_device_that_is_stopped_keeps_its_finished_update(pair: Pair) -> None:
    """It could not be delivered: the server was away."""
    pair.begin("update-kept")
    docker("pause", pair.fleet.container("device-1"))  # or it might be done before the server is told to stop
    stop(pair.fleet, "server")
    docker("unpause", pair.fleet.container("device-1"))
    outbox = ("ls", "/device/outbox/update-kept.json")
    pair.fleet.wait(lambda: bool(pair.fleet.inside("device-1", *outbox)), 300, "device-1 has trained")
    stop(pair.fleet, "device-1")
    pair.fleet.compose("up", "-d", "--no-build", "server", "device-1")
    pair.ended_like_the_calm_one("update-kept")
    assert "already trained; pushing the update that was kept" in pair.log("device-1")
