"""What the lab compares is what the daemons do: the same run in one process and over the wire gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fp_lab.experiment import load_experiment, run_of
from fp_lab.partition import device_names
from fp_server import events as e
from fp_server.log import Database, EventLog
from tests.integration.federation import Federation, write_data

EXPERIMENT = """
name = "both"
model = "{model}"
window = 224
seeds = [3]
rounds = 2
evaluate_every = 2
[data]
sources = ["{data}"]
devices = 2
rows_per_device = 24
held_out = 8
[lora]
rank = 4
alpha = 8.0
[train]
steps = 2
batch_size = 4
learning_rate = 1e-3
[probe]
positions = 64
[run]
devices_per_round = 1.0
[[row]]
name = "streamed"
budget = "115MB"
train.gradient = "streamed"
limits.update_bytes = 140_000
[[row]]
name = "stitched"
budget = "400MB"
train.gradient = "stitched"
limits.update_bytes = 140_000
"""


def ledger(log: Path, run: str) -> dict[int, str]:
    """Layer -> digest of its ledger at the end of a run."""
    database = Database(log)
    try:
        commits = [event for _, event in EventLog(database).replay(run) if isinstance(event, e.RoundCommitted)]
    finally:
        database.close()
    assert len(commits) == 2
    return {unit.layer: unit.ledger.digest for commit in commits for unit in commit.units}


@pytest.mark.parametrize("row", ["streamed", "stitched"])
def test_the_lab_and_the_daemons_give_the_same_bytes(
    federate: Callable[..., Federation], tiny_model: Path, tmp_path: Path, row: str
) -> None:
    file, out = tmp_path / "both.toml", tmp_path / "lab"
    data = write_data(tmp_path / "data.jsonl", 80, 5)
    file.write_text(EXPERIMENT.format(model=tiny_model, data=data))
    experiment = load_experiment(file)
    chosen = experiment.find(row)
    _, toml = run_of(experiment, chosen, 3)
    federation = federate(tiny_model, model_name=tiny_model.name)
    federation.run_cli("fp-lab", "run", file, "--out", out, "--row", row)
    (directory,) = (path for path in (out / "data").rglob("d00.jsonl"))
    federation.start_server()
    for name in device_names(2):
        made = federation.add_device(name, directory.parent / f"{name}.jsonl", str(chosen.budget))
        config = (made / "client.toml").read_text()
        (made / "client.toml").write_text(config.replace("held_out = 0.1", 'max_held_out = 1\non_long = "drop"'))
        federation.start_device(name)
    (federation.root / "run.toml").write_text(toml)
    federation.run_cli("fp-server", "start", federation.root / "run.toml", "--dir", federation.server_dir)
    federation.wait_state()
    federation.close()
    found = ledger(federation.server_dir / "log.sqlite", f"{row}-s3")
    assert found and found == ledger(out / "jobs" / row / "seed-3" / "log.sqlite", f"{row}-s3")
