"""The lab's jobs on a tiny random model: interrupted anywhere they end with the same bits; rows are paired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import BudgetError, ConfigError
from common.types import Capacity, Gradient, RunSpec
from fp_client.planner import Plan
from fp_lab.devices import Fleet, JobDevices
from fp_lab.experiment import Experiment, load_experiment
from fp_lab.job import Job, Stopped, locked
from fp_lab.partition import device_names, prepare
from fp_lab.results import Results, comparable, read
from fp_lab.runner import JobPlace, Signals, Watch, chosen, run_jobs
from fp_server import events as e
from fp_server.log import Database, EventLog
from tests.unit import device

TOML = """
name = "tiny"
model = "{model}"
window = 256
seeds = [3]
rounds = 3
[data]
sources = ["{data}"]
devices = 4
rows_per_device = 12
held_out = 6
[run]
devices_per_round = 2.0
[lora]
rank = 4
alpha = 8.0
[train]
steps = 2
batch_size = 2
learning_rate = 1e-2
[probe]
positions = 32
batch_size = 2
[[row]]
name = "three"
units = 3
[[row]]
name = "attacked"
units = 3
rounds = 1
run.devices_per_round = 1.0
attackers = 1
strength = 50.0
limits.outliers = "reject"
[[row]]
name = "all-rbf"
probe.kernel = "rbf"
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    root = tmp_path_factory.mktemp("lab")
    path = root / "tiny.toml"
    path.write_text(TOML.format(model=device.model(root), data=device.data(root / "data.jsonl", 60)))
    return load_experiment(path)


@pytest.fixture(scope="module")
def fleet(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    root = tmp_path_factory.mktemp("fleet")
    made = Fleet(experiment, root)
    made.use(prepare(root, experiment.data, experiment.window, made.tokenizer))
    return made


def job(experiment: Experiment, fleet: Fleet, directory: Path, row: str = "three", **changes: Any) -> Job:
    chosen_row = experiment.find(row).model_copy(update=changes)
    return Job(experiment, chosen_row, 3, directory, fleet)


def finish(experiment: Experiment, fleet: Fleet, directory: Path, row: str = "three") -> Path:
    with closing(job(experiment, fleet, directory, row)) as one:
        one.run()
    return directory


def told(directory: Path, run: str) -> list[tuple[str, str]]:
    """What the log holds, in order: kinds of events and devices."""
    database = Database(directory / "log.sqlite")
    try:
        return [(type(event).__name__, getattr(event, "device", "")) for _, event in EventLog(database).replay(run)]
    finally:
        database.close()


def outcome(directory: Path) -> list[dict[str, Any]]:
    return [comparable(line) for line in read(directory / "results.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(experiment: Experiment, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("undisturbed")
    return {row.name: finish(experiment, fleet, root / row.name, row.name) for row in experiment.row}


class Crash(BaseException):
    """As sudden as a kill: nothing catches it."""


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Every write of the log and of the results fails the first time before it's made, the second time just after."""
    tried: Counter[str] = Counter()
    append, write = EventLog.append, Results.append

    async def log(self: EventLog, event: e.Event, at: float | None = None) -> None:
        place = f"{type(event).__name__} {getattr(event, 'key', '')} {getattr(event, 'device', '')}"
        tried[place] += 1
        if tried[place] == 1:
            raise Crash
        await append(self, event, at)
        raise Crash

    def results(self: Results, line: dict[str, Any]) -> None:
        tried[place := f"line {line['round']}"] += 1
        if tried[place] == 1:
            raise Crash
        write(self, line)
        raise Crash

    monkeypatch.setattr(EventLog, "append", log)
    monkeypatch.setattr(Results, "append", results)
    yield tried


@pytest.mark.parametrize("row", ["three", "all-rbf"])
def test_interrupted_before_and_after_every_write(
    row: str, experiment: Experiment, fleet: Fleet, undisturbed: dict[str, Path], crashing: Counter[str], tmp_path: Path
) -> None:
    starts = 0
    while True:
        starts += 1
        assert starts < 200
        try:
            finish(experiment, fleet, tmp_path, row)
            break
        except Crash:
            pass
    expected = told(undisturbed[row], f"{row}-s3")
    assert told(tmp_path, f"{row}-s3") == expected
    assert outcome(tmp_path) == outcome(undisturbed[row])
    # Nothing was done more than twice: what was durable was never done again.
    assert set(crashing.values()) == {2} and len(crashing) == len(expected) + 4
    assert starts == 2 * len(crashing) + 1


def test_a_finished_job_keeps_what_a_restart_needs_and_no_more(
    undisturbed: dict[str, Path], experiment: Experiment, fleet: Fleet
) -> None:
    with closing(job(experiment, fleet, undisturbed["three"])) as one:
        there = {path.name for path in (undisturbed["three"] / "objects").glob("??/*")}
        assert there == set(one.machine.references())
        assert one.machine.ended is not None and one.machine.next_round == 3
        one.run()  # nothing left to do
    assert not list((undisturbed["three"] / "scratch").iterdir())


def test_the_lines_say_what_happened(undisturbed: dict[str, Path], fleet: Fleet) -> None:
    lines = read(undisturbed["three"] / "results.jsonl")
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert len({line["loss"] for line in lines}) == 4 and lines[3]["loss"] < lines[0]["loss"]
    assert lines[1]["bytes_down"] == 0 < lines[2]["bytes_down"]
    for line in lines[1:]:
        assert len(line["devices"]) == 2 and set(line["devices"]) <= set(device_names(4))
        assert line["bytes_up"] == sum(one["bytes_up"] for one in line["devices"].values())
        for one in line["devices"].values():
            assert len(one["units"]) == 3 and one["train_peak"] > 0 and one["probe_seconds"] > 0
    whole = read(undisturbed["all-rbf"] / "results.jsonl")
    assert all(len(one["units"]) == 6 for line in whole[1:] for one in line["devices"].values())


def test_an_attackers_update_is_spoilt_and_left_out(
    undisturbed: dict[str, Path], experiment: Experiment, fleet: Fleet, tmp_path: Path
) -> None:
    lines = read(undisturbed["attacked"] / "results.jsonl")
    assert [line["attack"] for line in lines] == ["1 sign-flip 50"] * 2
    reviews = {device: one["review"] for device, one in lines[1]["devices"].items()}
    assert "times as far" in reviews["d00"]["outlier"] and reviews["d00"]["size"] > 5
    assert [reviews[device]["outlier"] for device in ("d01", "d02", "d03")] == [None] * 3
    assert "attack" not in read(undisturbed["three"] / "results.jsonl")[0]
    # What is checked before it counts puts the device out of the round.
    with closing(job(experiment, fleet, tmp_path, "attacked", attack="nan")) as one:
        one.run()
        assert "must be finite" in read(tmp_path / "results.jsonl")[1]["devices"]["d00"]["dropped"]
    with pytest.raises(ConfigError, match="was started with other attackers"):
        job(experiment, fleet, tmp_path, "attacked")


def test_rows_are_paired(undisturbed: dict[str, Path]) -> None:
    drawn = {row: [sorted(line.get("devices", {})) for line in read(path / "results.jsonl")] for row, path in undisturbed.items()}
    assert drawn["three"] == drawn["all-rbf"]
    zero = {read(path / "results.jsonl")[0]["loss"] for path in undisturbed.values()}
    assert len(zero) == 1


def test_evaluation_is_the_probes_loss(experiment: Experiment, fleet: Fleet, undisturbed: dict[str, Path]) -> None:
    from tests.unit import tiny

    model = tiny.whole(experiment.model)
    from fp_client.batches import heldout_batches

    total, tokens = 0.0, 0
    for batch in heldout_batches(fleet._held(), 2, fleet.tokenizer):
        count = int((batch["labels"][:, 1:] != -100).sum())
        total, tokens = total + tiny.full_loss(model, batch) * count, tokens + count
    first = read(undisturbed["three"] / "results.jsonl")[0]
    assert first["tokens"] == tokens and first["loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_stop_after_rounds_and_go_on(experiment: Experiment, fleet: Fleet, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    with closing(job(experiment, fleet, tmp_path)) as one:
        one.run(1)
    assert len(read(tmp_path / "results.jsonl")) == 2
    assert outcome(finish(experiment, fleet, tmp_path)) == outcome(undisturbed["three"])


def test_fast_rounds_are_marked_and_give_the_same_bits(
    experiment: Experiment, fleet: Fleet, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    with closing(job(experiment, fleet, tmp_path)) as one:
        one.run(1)
    with closing(Job(experiment, experiment.find("three"), 3, tmp_path, fleet, fast=True)) as one:
        one.run()
    assert [line["fast"] for line in read(tmp_path / "results.jsonl")[1:]] == [False, True, True]
    assert outcome(tmp_path) == outcome(undisturbed["three"])


def test_a_torn_last_line_is_made_again(
    experiment: Experiment, fleet: Fleet, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    with closing(job(experiment, fleet, tmp_path)) as one:
        one.run(1)
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert len(read(path)) == 1
    assert outcome(finish(experiment, fleet, tmp_path)) == outcome(undisturbed["three"])


def test_other_settings_are_refused(experiment: Experiment, fleet: Fleet, tmp_path: Path) -> None:
    job(experiment, fleet, tmp_path).close()
    with pytest.raises(ConfigError, match="other settings than row 'three'"):
        job(experiment, fleet, tmp_path, train={"learning_rate": 1e-3})


def test_a_device_that_fails_is_dropped_and_the_job_says_why(experiment: Experiment, fleet: Fleet, tmp_path: Path) -> None:
    with (
        closing(job(experiment, fleet, tmp_path, train={"learning_rate": 1e30})) as one,
        pytest.raises(ConfigError, match=r"is paused: round 1 failed 3 times.*lower the learning rate"),
    ):
        one.run()


def test_busy_jobs_are_left_out_and_a_stop_is_clean(
    experiment: Experiment, undisturbed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = chosen(experiment, tmp_path, ["three", "all-rbf"], [])
    assert [place.label for place in jobs] == ["three seed 3", "all-rbf seed 3"]
    signals, seen = Signals(), list[str]()

    def line(place: JobPlace, first: dict[str, Any], line: dict[str, Any]) -> None:
        seen.append(place.row.name)
        signals.asked.set()

    with locked(jobs[0].directory):
        assert jobs[0].busy() and not jobs[1].busy()
        with pytest.raises(Stopped):
            run_jobs(experiment, "", tmp_path, jobs, None, signals, Watch(line=line))
    assert seen == ["all-rbf"] and not jobs[0].busy()
    with locked(jobs[0].directory):
        assert run_jobs(experiment, "", tmp_path, jobs, 1, Signals(), Watch()) == 1
    assert run_jobs(experiment, "", tmp_path, jobs, None, Signals(), Watch()) == 0
    assert {place.row.name: outcome(place.directory) for place in jobs} == {
        place.row.name: outcome(undisturbed[place.row.name]) for place in jobs
    }


def test_a_budget_that_holds_nothing_is_said(experiment: Experiment, fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="smallest that would do"):
        job(experiment, fleet, tmp_path, budget=1)


def test_a_mode_no_device_offers_is_said(
    experiment: Experiment, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submodel(self: JobDevices, planned: Plan, spec: RunSpec) -> tuple[Capacity, ...]:
        return (replace(planned.capacities[0], gradient=Gradient.SUBMODEL),)

    monkeypatch.setattr(JobDevices, "_capacities", submodel)
    with (
        closing(job(experiment, fleet, tmp_path, train={"gradient": "stitched"})) as one,
        pytest.raises(ConfigError, match=r'd00 can.t train with gradient = "stitched" \(it can with: submodel\)'),
    ):
        one.run()


@pytest.mark.parametrize("gradient", ["stitched", "streamed", "auto"])
@pytest.mark.parametrize("units", ["layer", "component"])
def test_every_mode_and_kind_of_unit(experiment: Experiment, fleet: Fleet, tmp_path: Path, gradient: str, units: str) -> None:
    changes = {"train": {"gradient": gradient, "fidelity": True}, "pruning": {"units": units}}
    with closing(job(experiment, fleet, tmp_path, **changes)) as one:
        one.run(1)
    for found in read(tmp_path / "results.jsonl")[1]["devices"].values():
        assert len(found["units"]) == (3 if units == "layer" else 6)
        assert found["gradient"] == ("streamed" if gradient == "auto" else gradient)
        if found["gradient"] == "streamed":
            assert found["fidelity"] is None, "it is what others are compared with"
        else:
            assert 0 < abs(found["fidelity"]) <= 1 + 1e-6 and len(found["unit_fidelity"]) == len(found["units"])
