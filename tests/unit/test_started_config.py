"""A run goes on as it was started, whatever the defaults of the version that takes it up again."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_rounds import MANIFEST, toml

from common.errors import ConfigError
from common.types import Gradient
from fp_server import events as e
from fp_server.config import ServerConfig, TrainSection
from fp_server.coordinator import Coordinator
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore
from fp_server.work import parse_run, run_started, started_config

RICH = (
    toml()
    + """
[lora]
targets = ["q_proj"]
start = "global"
[pruning]
units = "component"
[limits]
max_update_norm = 5.0
"""
)


@pytest.mark.parametrize("text", [toml(), RICH])
def test_every_default_is_written_out_and_comes_back(text: str) -> None:
    config = parse_run(text, "test")
    event = e.decode(*e.encode(run_started(config, text, MANIFEST)))
    assert isinstance(event, e.RunStarted) and event.toml == text
    written = json.loads(event.config)
    assert set(written["train"]) == set(TrainSection.model_fields) and written["train"]["gradient"] == "auto"
    assert started_config(replace(event, toml="another version reads this otherwise"), "test") == config


@pytest.mark.parametrize(
    ("text", "gradient"), [(toml(), Gradient.SUBMODEL), (toml() + '[train]\ngradient = "auto"\n', Gradient.AUTO)]
)
def test_in_a_log_of_before_an_absent_gradient_is_a_submodels(text: str, gradient: Gradient) -> None:
    old = e.RunStarted("r", text, MANIFEST)
    assert started_config(old, "test").train.gradient is gradient


def test_in_a_log_of_before_groups_are_of_any_size() -> None:
    config = parse_run(toml(), "test")
    assert config.pruning.group_sizes == "even"
    event = run_started(config, toml(), MANIFEST)
    written = json.loads(event.config)
    del written["pruning"]["group_sizes"]
    for old in (replace(event, config=json.dumps(written)), e.RunStarted("r", toml(), MANIFEST)):
        assert started_config(old, "test").pruning.group_sizes == "free"
    chosen = toml() + '[pruning]\ngroup_sizes = "even"\n'
    assert started_config(e.RunStarted("r", chosen, MANIFEST), "test").pruning.group_sizes == "even"


def test_in_a_log_of_before_updates_are_not_compared() -> None:
    config = parse_run(toml(), "test")
    assert config.limits.outliers == "reject"
    event = run_started(config, toml(), MANIFEST)
    written = json.loads(event.config)
    del written["limits"]["outliers"]
    for old in (replace(event, config=json.dumps(written)), e.RunStarted("r", toml(), MANIFEST)):
        assert started_config(old, "test").limits.outliers == "off"


def test_in_a_log_of_before_modules_are_judged_one_by_one() -> None:
    config = parse_run(toml(), "test")
    event = run_started(config, toml(), MANIFEST)
    written = json.loads(event.config)
    assert written["limits"].pop("max_update_ratio") == config.limits.max_update_ratio == 2.5
    assert started_config(replace(event, config=json.dumps(written)), "test").limits.max_update_ratio == math.inf


def test_what_was_pinned_and_can_not_be_read_is_named() -> None:
    with pytest.raises(ConfigError, match=r"run r: .*run: missing"):
        started_config(e.RunStarted("r", toml(), MANIFEST, "{}"), "run r")


def test_a_restart_keeps_the_mode_of_an_old_run(tmp_path: Path) -> None:
    database = Database(tmp_path / "log.sqlite")

    async def main() -> list[Gradient]:
        log = EventLog(database)
        await log.append(e.RunStarted("r", toml(), MANIFEST))
        coordinator = Coordinator(ServerConfig(names=["x"]), log, ObjectStore(tmp_path))
        await coordinator.start()
        try:
            assert coordinator.active is not None
            return [coordinator.active.config.train.gradient, coordinator.fold("r").config.train.gradient]
        finally:
            await coordinator.stop()

    assert asyncio.run(main()) == [Gradient.SUBMODEL] * 2
    database.close()
