"""`fp-client probe` on a tiny model with real worker processes; and what a device's pace can't do: fail a task."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import replace

import pytest

from common.errors import WorkerError
from common.types import Gradient, Part, ProbeSpec, RunSpec, TrainSpec
from fp_client.config import load_config
from fp_client.work import LocalWork
from tests.unit import device

SMALL = ("--batch", "2", "--sequence", "256", "--positions", "32")
LAYERS, LABELS = ["1", "2", "3"], ["1M", "1N", "2M", "2N", "3M", "3N"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dev")
    device.model(directory, num_hidden_layers=3).rename(directory / "model")
    device.data(directory / "data.jsonl")
    (directory / "client.toml").write_text(
        'device = "cpu"\n[budget]\nhost = "1GiB"\n[models."tiny"]\nsource = "model"\n'
        '[data]\nsource = "data.jsonl"\nheld_out = 0.1\n'
    )
    return directory


@pytest.fixture
def run(capsys):
    """The command line's entry point in this process: (exit code, output, errors)."""
    from fp_client import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["fp-client", *map(str, arguments)])
            cli.main()
        seen = capsys.readouterr()
        return ended.value.code or 0, seen.out, seen.err

    return call


def test_probe_of_layers(home, run, tmp_path):
    code, out, err = run("probe", "--dir", home, *SMALL, "--out", tmp_path / "probe.json")
    assert code == 0, err
    assert "held-out loss of the full model" in out and "input against output of each layer" in out
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["units"] == LAYERS and found["tokens"] > 0 and found["peak_bytes"] > 0
    assert [len(row) for row in found["similarity"]] == [3] * 3 and len(found["in_out"]) == 3


def test_probe_takes_the_same_units_as_plan(home, run):
    code, out, err = run("probe", "--dir", home, *SMALL, "--units", "component", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["units"] == LABELS and len(found["similarity"]) == len(found["in_out"]) == 6
    for command in ("probe", "plan"):
        code, _, err = run(command, "--dir", home, "--units", "attention")
        assert code == 2 and "layer" in err and "component" in err


def test_probe_with_fidelity(home, run):
    code, out, err = run("probe", "--dir", home, *SMALL, "--fidelity", "3", "--rank", "4", "--json")
    assert code == 0, err
    found = json.loads(out)["fidelity"]
    assert found["units"] == LAYERS and set(found["modes"]) == {"submodel", "stitched"}
    for mode in found["modes"].values():  # every layer is kept: the submodel is the full model
        assert mode["overall"] == pytest.approx(1, abs=1e-4) and mode["loss"] == pytest.approx(found["full_model_loss"], abs=1e-3)


def test_fidelity_within_a_tight_budget(tmp_path, run):
    """Streamed fits a few rows at a time; a submodel of all layers doesn't, and neither keeps the other from being shown."""
    device.model(tmp_path, num_hidden_layers=24, hidden_size=256, intermediate_size=1024).rename(tmp_path / "model")
    device.data(tmp_path / "data.jsonl")
    text = (
        'device = "cpu"\n[budget]\nhost = "{}"\n[models."tiny"]\nsource = "model"\n'
        '[data]\nsource = "data.jsonl"\nheld_out = 0.1\n'
    )
    asked = ("--batch", "4", "--sequence", "512", "--positions", "32", "--fidelity", "24", "--rank", "4")
    (tmp_path / "client.toml").write_text(text.format("100MiB"))
    code, out, err = run("probe", "--dir", tmp_path, *asked, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["loss"] > 0 and found["fidelity"]["full_model_loss"] == pytest.approx(found["loss"], abs=0.5)
    assert "the budget is 100 MiB" in found["fidelity"]["modes"]["submodel"]["refused"]
    (tmp_path / "client.toml").write_text(text.format("64MiB"))
    code, out, err = run("probe", "--dir", tmp_path, *asked[:-1], "64")
    assert code == 0, err
    assert "held-out loss of the full model" in out and "the full model's gradient: " in out and "64 MiB" in out


def test_a_pace_that_cant_be_measured_fails_no_task(home, caplog, monkeypatch):
    """Whatever the measurement ends with: the plan is made without times, and says so."""

    class Dying:
        async def run(self, task, *_):
            raise WorkerError(f"the worker died in {task!r}")

    async def worker(self, spec):
        return Dying()

    monkeypatch.setattr(LocalWork, "worker", worker)
    train = TrainSpec(1, 2, 128, 1e-3, 4, 8.0, ("mlp.down_proj",), 0, gradient=Gradient.AUTO)
    spec = RunSpec("r", "tiny", "ab" * 32, "fedpruner", Part.LAYER, train, ProbeSpec(batch_size=2, sequence_length=128), 8, 1)
    work = LocalWork(load_config(home), home)
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(work.pace(spec)) is None
        planned = asyncio.run(work._remembered(replace(spec, rounds=2)))
    assert [mode.step_seconds for mode in planned.modes] == [0.0] * 3
    assert "step times are not predicted: the worker died in 'pace'" in caplog.text
