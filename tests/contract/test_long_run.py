"""The status of a long run with many devices: small enough for a message, and whole for whoever asks for all of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tracemalloc

import numpy as np
import pytest
from server_side import MANIFEST, Server, plan_report, run_toml
from test_server_cli import cli

from common.errors import NotFound
from common.types import ObjectRef, TaskKey, UnitId, UpdateMetrics
from fp_server import events as e
from fp_server.config import ServerConfig
from fp_server.coordinator import Coordinator
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore
from fp_server.operator import Operator
from fp_server.rounds import RunMachine
from fp_server.roundstate import KEPT, History
from fp_server.status import status
from fp_server.work import parse_run

ROUNDS, NAMES = 300, tuple(f"device-{i:02}" for i in range(20))
RUN = "toy-run"
EMPTY = np.empty((0, 0), np.float32)


def long_run():
    """The events of 300 rounds with 20 devices and groups as large as a model of 30 layers has."""
    yield e.RunStarted(RUN, run_toml(rounds=ROUNDS, final_evaluation=False), MANIFEST)
    yield from (e.PlanReceived(RUN, name, plan_report(RUN), 40) for name in NAMES)
    groups = tuple(tuple(UnitId(i) for i in range(j, 30, 10)) for j in range(10))
    probabilities = tuple((0.123456, 0.345678, 0.530866) for _ in groups)
    for index in range(ROUNDS):
        key = TaskKey(RUN, index, 0)
        yield e.RoundOpened(RUN, key, NAMES, NAMES)
        for name in NAMES:
            yield e.ProbeReceived(RUN, key, name, EMPTY, EMPTY.ravel(), 2.0 - index / 1000, 100, 1, 1.0)
            yield e.Assigned(RUN, key, name, tuple(g[0] for g in groups), groups, probabilities, 0, 0, 1, True)
            yield e.UpdateAccepted(RUN, key, name, ObjectRef(f"{index:032x}{name:0<32}"[:64], 10), UpdateMetrics())
        yield e.RoundClosed(RUN, key, True, "quorum")
        yield e.RoundCommitted(RUN, key, (), (), dict.fromkeys(NAMES, 40), 1, 1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    one = Server(tmp_path_factory.mktemp("long") / "server", ())
    database = Database(one.directory / "log.sqlite")
    rows = [(event.run, 0.0, *e.encode(event)) for event in long_run()]
    database.run(lambda c: c.executemany("INSERT INTO events (run, time, kind, body) VALUES (?, ?, ?, ?)", rows))
    database.close()
    one.start()
    yield one
    assert one.stop() == 0


def test_the_status_and_the_watch_of_a_long_run_fit_into_a_message(server):
    status = asyncio.run(server.status())
    assert len(json.dumps(status)) < 1 << 20
    assert [entry["round"] for entry in status["history"]] == list(range(291, 301))
    assert status["history_first"] == 291 and status["history_total"] == 300
    assert len(status["loss"]) == ROUNDS and status["loss"][-1]["loss"] == pytest.approx(1.701)

    async def first(last):
        async with contextlib.aclosing(Operator(server.directory).watch("", last)) as watch:
            return await anext(watch)

    assert asyncio.run(first(0))["history_first"] == 291
    assert 1 < asyncio.run(first(2**32 - 1))["history_first"] < 291


def test_all_of_it_comes_in_pages(server):
    said = json.loads(cli("status", "--dir", server.directory, "--json", "--rounds", "all"))
    assert [entry["round"] for entry in said["history"]] == list(range(1, 301)) and said["history_first"] == 1
    assert all(len(entry["devices"]["device-07"]["groups"]) == 10 for entry in said["history"])
    said = json.loads(cli("status", "--dir", server.directory, "--json", "--rounds", "250"))
    assert [entry["round"] for entry in said["history"]] == list(range(51, 301))
    assert "290 earlier rounds" in cli("status", "--dir", server.directory)
    assert "--rounds" in cli("status", "--dir", server.directory, "--rounds", "few", code=2)


def entries(found):
    def member(m):
        return m.stage, m.assigned, m.accepted, m.dropped, m.probe and (m.probe.loss, m.probe.tokens)

    return [(r.opened, r.closed, {name: member(m) for name, m in r.members.items()}, commit) for r, commit in found]


def test_what_the_server_keeps_of_it_does_not_grow_with_its_rounds(server):
    """Ended rounds are read back from the log, and are the very rounds that a fold with room for all of them has."""
    database = Database(server.directory / "log.sqlite")
    try:
        coordinator = Coordinator(ServerConfig(names=["localhost"]), EventLog(database), ObjectStore(server.directory))
        machine = coordinator.fold(RUN)
        assert (len(list(machine.history)), machine.history.first, machine.history.total) == (KEPT, ROUNDS - KEPT, ROUNDS)
        whole = RunMachine(machine.config, machine.manifest, History(ROUNDS))
        for at, event in coordinator.log.replay(RUN):
            whole.handle(event, at)
        rounds = entries(whole.history)
        assert len(rounds) == ROUNDS and machine.history.losses() == whole.history.losses()
        assert entries(machine.history) == rounds[-KEPT:]
        assert entries(coordinator.past(RUN, 0, 3)) == rounds[:3]
        assert entries(coordinator.past(RUN, 117, 100)) == rounds[117:217]
        assert entries(coordinator.past(RUN, ROUNDS - 1, 100)) == rounds[-1:]
        with pytest.raises(NotFound, match="no round number 301"):
            coordinator.past(RUN, ROUNDS, 1)
    finally:
        database.close()


def test_a_round_that_is_long_over_costs_a_point_of_the_curve_and_no_more():
    """Months of rounds: what the state grows by is a few figures a round, and a status stays small."""
    names = tuple(f"device-{i:02}" for i in range(10))
    machine = RunMachine(parse_run(run_toml(rounds=10_000, final_evaluation=False), "test"), MANIFEST)
    for name in names:
        machine.handle(e.PlanReceived(RUN, name, plan_report(RUN), 40), 0.0)

    def rounds(begin, end):
        for index in range(begin, end):
            key = TaskKey(RUN, index, 0)
            machine.handle(e.RoundOpened(RUN, key, names, names), 0.0)
            for name in names:
                machine.handle(e.ProbeReceived(RUN, key, name, EMPTY, EMPTY.ravel(), 2.0, 100, 1, 1.0), 0.0)
            machine.handle(e.RoundClosed(RUN, key, True, "quorum"), 0.0)
            machine.handle(e.RoundCommitted(RUN, key, (), (), dict.fromkeys(names, 40), 1, 1), 0.0)

    rounds(0, 100)
    tracemalloc.start()
    try:
        rounds(100, 130)
        before = tracemalloc.get_traced_memory()[0]
        rounds(130, 1530)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown / 1400 < 400, f"{grown / 1400:.0f} bytes a round"
    said = status(machine, "", list(names))
    assert said["loss"][0]["devices"] == sorted(names) == said["loss"][-1]["devices"] and said["loss"][700]["devices"] is None
    assert all(point["measured_by"] == 10 for point in said["loss"])
    assert 765 <= len(said["loss"]) <= 1100 and said["loss"][-1]["rounds_done"] == 1529
    assert {entry["rounds_done"] for entry in said["history"]} <= {point["rounds_done"] for point in said["loss"]}
    assert len(json.dumps(said)) < 1 << 19
