"""A device that joins, leaves or changes its budget between rounds is an ordinary event."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import replace
from typing import Any

from server_side import Device, Server, run_toml
from test_agent import Device as Agent
from test_agent import FakeWork, against, assignment

from common.types import Capacity, Gradient
from fp_client.config import load_config
from fp_client.rebudget import take_up
from fp_client.work import LocalWork


def at_round(number: int, status: dict[str, Any]) -> bool:
    return status["rounds_done"] >= number


async def run(server: Server, toml: str, first: list[Device], script) -> dict[str, Any]:
    name = await server.begin(toml)
    living = [asyncio.create_task(device.live()) for device in first]
    async with asyncio.timeout(60):
        await script(living)
        await server.until(lambda s: s["state"] == "finished", run=name)
    for task in living:
        task.cancel()
    await asyncio.wait(living)
    return await server.status(name)


def test_who_joins_in_a_run_takes_part_from_the_next_round(server):
    """Carol joins with her token in the middle of round 1; she is in rounds 2 and 3, and in none before."""
    alice, bob = Device(server, "alice"), Device(server, "bob")

    async def script(living):
        await middle.wait()
        await asyncio.to_thread(server.identity, "carol")
        carol = Device(server, "carol")
        living.append(asyncio.create_task(carol.live()))
        await server.until(lambda s: "carol" in s["devices"] and s["devices"]["carol"]["units"] > 0)
        assert (await server.status())["current"]["round"] == 1
        go_on.set()

    async def main():
        nonlocal middle, go_on
        middle, go_on = asyncio.Event(), asyncio.Event()
        return await run(server, run_toml(rounds=3, final_evaluation=False), [alice, bob], script)

    async def hold() -> None:
        middle.set()
        await go_on.wait()

    middle = go_on = asyncio.Event()
    alice.hooks["assigned"] = hold
    status = asyncio.run(main())
    assert [sorted(entry["weights"]) for entry in status["history"]] == [["alice", "bob"], *[["alice", "bob", "carol"]] * 2]
    assert status["history"][0]["attempt"] == 1


def test_who_leaves_is_away_and_the_run_goes_on_without_it(server):
    alice, bob = Device(server, "alice"), Device(server, "bob")

    async def script(living):
        await server.until(lambda s: at_round(1, s))
        living[1].cancel()  # its daemon is stopped for good
        await asyncio.wait({living[1]})
        gone.set()

    async def stay(assignment, device):
        if assignment.key.round == 1:
            await gone.wait()
        return device.honest(assignment)

    gone = asyncio.Event()
    alice.make = stay
    toml = run_toml(rounds=3, min_devices=1, progress_timeout_seconds=6.0, final_evaluation=False)
    status = asyncio.run(run(server, toml, [alice, bob], script))
    assert status["state"] == "finished" and [entry["committed"] for entry in status["history"]] == [True] * 3
    last = status["history"][-1]
    assert sorted(last["weights"]) == ["alice"] and last["excluded"] == {"bob": "not connected"}
    assert status["devices"]["bob"]["connected"] is False


def test_a_device_that_comes_back_with_another_budget_is_asked_before_the_next_round(server):
    """Bob holds three layers in round 1, one in round 2, and nothing from then on: his daemon was started anew each time."""
    holds = [3, 1, 0]
    alice, bobs = Device(server, "alice"), [Device(server, "bob", units=units) for units in holds]
    bob: list[asyncio.Task[None]] = []

    async def in_between(assignment, device):
        """Alice is slower: when she delivers, bob has delivered, gone, and come back."""
        now = assignment.key.round
        await carol.wait()
        if now < 2:
            await server.until(lambda s: s["current"]["devices"]["bob"]["stage"] == "done")
            bob[-1].cancel()
            await asyncio.wait({bob[-1]})
            bob.append(asyncio.create_task(bobs[now + 1].live()))
            await server.until(lambda s: s["devices"]["bob"]["connected"] and s["devices"]["bob"]["units"] == holds[now + 1])
        return device.honest(assignment)

    async def script(living):
        bob.append(asyncio.create_task(bobs[0].live()))
        await server.until(lambda s: "bob" in s["devices"] and s["devices"]["bob"]["units"] == 3)
        living.append(asyncio.create_task(alice.live()))
        await server.until(lambda s: s["current"] is not None)
        await asyncio.to_thread(server.identity, "carol")
        living.append(asyncio.create_task(Device(server, "carol").live()))
        await server.until(lambda s: "carol" in s["devices"] and s["devices"]["carol"]["units"] == 3)
        carol.set()

    async def main():
        try:
            return await run(server, run_toml(rounds=3, min_devices=2, final_evaluation=False), [], script)
        finally:
            for task in bob:
                task.cancel()
            await asyncio.wait(bob)

    carol = asyncio.Event()
    alice.make = in_between
    status = asyncio.run(main())
    drawn = [{name: len(member.get("units", [])) for name, member in entry["devices"].items()} for entry in status["history"]]
    assert drawn == [{"alice": 3, "bob": 3}, {"alice": 3, "bob": 1, "carol": 3}, {"alice": 3, "carol": 3}]
    assert "bob" in status["history"][2]["excluded"]


def test_sighup_has_the_budget_read_again_and_the_server_ask_anew(tmp_path):
    """The task under way goes on; a file that is wrong, or says the same, changes nothing."""

    class Work(FakeWork):
        def __init__(self) -> None:
            super().__init__()
            self.real = LocalWork(load_config(tmp_path), tmp_path)

        budget_bytes = property(lambda self: self.real.budget_bytes)  # type: ignore[assignment]

        def rebudget(self, config):
            return self.real.rebudget(config)

        async def plan(self, spec):
            units = self.budget_bytes // 100
            return replace(await super().plan(spec), capacities=(Capacity(Gradient.SUBMODEL, units, 4, True, 100),))

    def write(budget: int, extra: str = "") -> None:
        (tmp_path / "client.toml").write_text(
            f'server = {json.dumps("localhost:1")}\ndevice = "cpu"\n{extra}\n[budget]\nhost = {budget}\n'
        )

    async def body(server):
        write(200)
        async with Agent(server, tmp_path, Work()) as device:
            assert (await device.joins()).capacities[0].units == 2
            device.work.gate.clear()
            await device.hears("assignment", assignment())
            await device.until(lambda: "train" in device.work.begun)
            assert not await take_up(tmp_path, device.work, device.agent), "the same"
            write(500, "nonsense = 1")
            assert not await take_up(tmp_path, device.work, device.agent) and device.work.budget_bytes == 200
            assert server.sessions.opened == 1
            write(500)
            assert await take_up(tmp_path, device.work, device.agent) and device.work.budget_bytes == 500
            await device.until(lambda: server.sessions.opened == 2)
            await device.hears("assignment", assignment())  # a server sends the outstanding task again
            device.work.gate.set()
            await device.until(lambda: server.objects.accepted)
            assert device.work.begun.count("train") == 1 and device.work.killed == 0
            report = await device.joins()
            assert report.capacities[0].units == 5 and report.budget_bytes == 500

    against(tmp_path, body)


def test_a_daemon_that_gets_sighup_lives_on_with_its_new_budget(server, tmp_path):
    home = server.devices / "alice"

    def write(budget: str) -> None:
        text = f'server = "{server.address}"\ndevice = "cpu"\n[budget]\nhost = "{budget}"\n'
        (home / "client.toml").write_text(text)

    async def main() -> tuple[int | None, str]:
        write("200MiB")
        command = [sys.executable, "-c", "from fp_client.cli import main; main()", "run", "--dir", str(home)]
        with (tmp_path / "said").open("wb") as out:
            daemon = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out)
        try:
            await server.until(lambda s: "alice" in s["connected"])
            write("500MiB")
            daemon.send_signal(signal.SIGHUP)
            async with asyncio.timeout(30):
                while server.log().count("device alice connected") < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            daemon.send_signal(signal.SIGTERM)
            return await asyncio.wait_for(daemon.wait(), 30), (tmp_path / "said").read_text()
        finally:
            if daemon.returncode is None:
                daemon.kill()

    code, said = asyncio.run(main())
    assert code == 0 and "the budget is 500 MiB, it was 200 MiB; the server is told before the next round" in said
