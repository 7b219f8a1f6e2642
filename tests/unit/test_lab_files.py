"""Experiment files, partitions and reports of the lab; nothing here computes with a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from common.blocks import read_blocks, write_blocks
from common.errors import ConfigError, DataError
from common.types import LoraBlock
from fp_client.batches import load_dataset
from fp_client.data import DataSource
from fp_lab import cli
from fp_lab.attacks import spoil
from fp_lab.experiment import DataSection, Experiment, Row, load_experiment, run_of, to_toml
from fp_lab.partition import device_names, prepare
from fp_lab.report import collect, default_rounds, draw, markdown
from fp_lab.runner import FILE, places
from fp_server.work import parse_run
from tests.unit import device

ROOT = Path(__file__).parents[2]
SMALL = 'name = "x"\nmodel = "m"\n[[row]]\nname = "a"\nunits = 2\n[[row]]\nname = "b"\ntrain.gradient = "submodel"\n'


class Words:
    """A tokenizer of one token a word."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text.split())}


def load(tmp_path: Path, text: str) -> Experiment:
    path = tmp_path / "x.toml"
    path.write_text(text)
    return load_experiment(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SMALL + "learning_rate = 1\n", "row.1.learning_rate: unknown key"),
        (SMALL + "train.rate = 1.0\n", r"row 'b': train\.rate: unknown key"),
        (SMALL + 'run.method = "magic"\n', r"run\.method: no such method"),
        (SMALL + "run.seed = 1\n", "run.seed is the experiment's own"),
        (SMALL + "train.sequence_length = 64\n", "see `rounds`, `seeds` and `window`"),
        (SMALL.replace('"b"', '"a"'), "two rows are called 'a'"),
        (SMALL + "train.step_seconds = 2.5\n", r"row 'b': train\.step_seconds: .* leave it out"),
        (SMALL + 'budget = "much"\n', "not a size"),
        (SMALL + "attackers = 21\n", "row 'b': attackers: 21, and there are 20 devices"),
        (SMALL + "attackers = 2\nstrength = 0.0\n", "strength"),
        (SMALL + 'attackers = 2\nlora.start = "global"\n', "would need twice the rank"),
        ('name = "x"\nmodel = "m"\n', "row: missing"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, text)


@pytest.mark.parametrize(("attack", "factor"), [("sign-flip", -3.0), ("scale", 3.0)])
def test_an_attack_changes_the_product_and_nothing_else(tmp_path: Path, attack: str, factor: float) -> None:
    rng = np.random.default_rng(0)
    block = LoraBlock(3, "q_proj", rng.standard_normal((2, 5), np.float32), rng.standard_normal((4, 2), np.float32))
    write_blocks(tmp_path / "update", [block])
    spoil(tmp_path / "update", Row.model_validate({"name": "x", "attackers": 1, "attack": attack, "strength": 3.0}))
    (found,) = read_blocks(tmp_path / "update")
    assert (found.layer, found.module) == (3, "q_proj")
    np.testing.assert_allclose(found.b @ found.a, factor * block.b @ block.a, rtol=1e-5)


def test_rows_override_the_experiment_key_by_key(tmp_path: Path) -> None:
    found = load(tmp_path, SMALL.replace("[[row]]", "[train]\nsteps = 3\nlearning_rate = 0.5\n[[row]]", 1) + "train.steps = 7\n")
    first, _ = run_of(found, found.find("a"), 0)
    second, toml = run_of(found, found.find("b"), 5)
    assert (first.train.steps, first.train.learning_rate, second.train.steps) == (3, 0.5, 7)
    assert (second.run.name, second.run.seed, second.run.min_devices) == ("b-s5", 5, 20)
    assert second.train.sequence_length == found.window and not second.run.final_evaluation
    assert parse_run(toml, "again") == second


def test_toml_holds_any_text() -> None:
    import tomllib

    tables = {"model": {"name": 'a "b" \\ ü 😀\n', "list": ["q", "v"]}, "train": {"rate": 1e-05, "on": True, "steps": 3}}
    assert tomllib.loads(to_toml(tables)) == tables


def test_the_experiments_that_come_with_the_lab_are_right() -> None:
    files = sorted((ROOT / "fp_lab/experiments").glob("*.toml"))
    assert files
    for path in files:
        assert not load_experiment(path).data.sources, "the data is the person's"


def rows_in(path: Path) -> list[str]:
    return [json.loads(line)["output"] for line in path.read_text().splitlines()]


def source(path: Path, count: int = 100) -> str:
    rows = device.rows(count)
    for index, row in enumerate(rows):
        row["instruction"] = f"{('Add', 'Take', 'Draw')[index % 3]} {index}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("partition", ["iid", "verb", "source"])
def test_no_row_is_dealt_twice(tmp_path: Path, partition: Any) -> None:
    section = DataSection(
        sources=[source(tmp_path / "a.jsonl"), str(device.data(tmp_path / "b.jsonl", 40))],
        devices=5, rows_per_device=20, held_out=7, partition=partition, seed=3,
    )  # fmt: skip
    made = prepare(tmp_path / "out", section, 64, Words())
    dealt = [rows_in(made / f"{name}.jsonl") for name in device_names(5)]
    held = rows_in(made / "held-out.jsonl")
    assert [len(one) for one in dealt] == [20] * 5 and len(held) == 7
    lines = [line for path in made.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(set(lines)) == len(lines) == 107
    again = prepare(tmp_path / "again", section, 64, Words())
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in made.iterdir())
    assert prepare(tmp_path / "out", section, 64, Words()) == made
    with pytest.raises(ConfigError, match="made with other seed"):
        prepare(tmp_path / "out", section.model_copy(update={"seed": 4}), 64, Words())


def test_a_row_that_a_device_can_not_use_is_not_what_it_holds_out(tmp_path: Path) -> None:
    """Half of the rows are too long; each device holds out a single one."""
    rows = device.rows(100)
    for row in rows[::2]:
        row["output"] += " more" * 200
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(sources=[str(tmp_path / "a.jsonl")], devices=8, rows_per_device=10, held_out=5)
    made = prepare(tmp_path / "out", section, 64, Words())
    for name in device_names(8):
        found = load_dataset(DataSource(str(made / f"{name}.jsonl"), heldout_max=1, on_long="drop"), Words(), 64)
        assert len(found.split.heldout) == 1 and found.dropped + len(found.split.train) < 10
    with pytest.raises(DataError, match=r"device d00 was dealt 1 rows, of which too few .*data\.rows_per_device"):
        prepare(tmp_path / "one", section.model_copy(update={"rows_per_device": 1}), 64, Words())


@pytest.mark.parametrize("partition", ["iid", "source"])
def test_devices_may_have_ever_more_rows(tmp_path: Path, partition: Any) -> None:
    sources = [source(tmp_path / "a.jsonl")]
    section = DataSection(sources=sources, devices=4, rows_per_device=20, held_out=7, fewest_rows=3, partition=partition)
    made = prepare(tmp_path / "out", section, 64, Words())
    assert [len(rows_in(made / f"{name}.jsonl")) for name in device_names(4)] == [3, 6, 11, 20]
    alike = section.model_copy(update={"fewest_rows": None})
    with pytest.raises(ConfigError, match="made with other fewest_rows"):
        prepare(tmp_path / "out", alike, 64, Words())
    made = prepare(tmp_path / "alike", alike, 64, Words())
    assert "fewest_rows" not in (made / "partition.json").read_text(), "a partition of before has none"


def test_mixtures_differ_more_with_a_small_alpha(tmp_path: Path) -> None:
    path = source(tmp_path / "a.jsonl", 600)

    def spread(alpha: float) -> float:
        section = DataSection(sources=[path], devices=6, rows_per_device=30, held_out=5, partition="verb", alpha=alpha)
        made = prepare(tmp_path / str(alpha), section, 64, Words())
        most = []
        for name in device_names(6):
            verbs = [json.loads(line)["instruction"].split()[0] for line in (made / f"{name}.jsonl").read_text().splitlines()]
            most.append(max(verbs.count(verb) for verb in ("Add", "Take", "Draw")) / 30)
        return sum(most) / 6

    assert spread(0.05) > 0.75 > 0.55 > spread(100.0)


def test_too_little_data_is_said(tmp_path: Path) -> None:
    section = DataSection(sources=[source(tmp_path / "a.jsonl")], devices=20, rows_per_device=20)
    with pytest.raises(DataError, match="100 examples are too few for 96 held-out rows"):
        prepare(tmp_path / "out", section, 64, Words())
    assert not (tmp_path / "out/data").exists()
    with pytest.raises(ConfigError, match="--data"):
        prepare(tmp_path / "out", section.model_copy(update={"sources": []}), 64, Words())


def write_results(experiment: Experiment, directory: Path, losses: dict[str, list[list[float]]], fast_from: int = 99) -> None:
    """Rounds from `fast_from` on were run with --fast: ten times the seconds and peaks."""
    for place in places(experiment, directory):
        place.directory.mkdir(parents=True)
        found = losses[place.row.name][experiment.seeds_of(place.row).index(place.seed)]
        with (place.directory / "results.jsonl").open("w") as file:
            for number, loss in enumerate(found):
                fast = number >= fast_from
                by = 10 if fast else 1
                one = {
                    "units": ["1", "2"],
                    "probe_seconds": 1.5 * by,
                    "train_seconds": 2.0 * by,
                    "train_peak": (3 << 20) * by,
                    "fidelity": 0.25,
                }
                line = {
                    "round": number,
                    "loss": loss,
                    "fast": fast,
                    "seconds": {"devices": 4.5 * by, "aggregate": 0.25 * by, "evaluate": 1.0},
                    "bytes_up": 2048,
                }
                file.write(json.dumps({**line, "devices": {"d00": one}} if number else line) + "\n")


def test_report_and_status(tmp_path: Path) -> None:
    experiment = load(tmp_path, "seeds = [0, 1]\n" + SMALL)
    losses = {"a": [[2.0, 1.9, 1.8], [2.2, 2.1, 1.9]], "b": [[2.0, 1.8, 1.5], [2.2, 2.0]]}
    out = tmp_path / "out"
    write_results(experiment, out, losses)
    results = collect(experiment, out)
    assert default_rounds(results) == [1, 2]
    page = markdown(experiment, results, [1, 2], "b")
    # b has one seed at round 2; a's share is over that seed alone: 0.2 of 0.5.
    assert "| a | 2.000 (1.900, 2.100) | 1.850 (1.800, 1.900) | +0.250 | 40% |" in page
    assert "| b | 1.900 (1.800, 2.000) | 1.500 | +0.500 | 100% |" in page
    assert "2.000 to 2.200" in page and "| 3 MiB |" in page and "| 2 | 4.5 | 0.2 | 1.5 |" in page and "| 0.250 |" in page
    with pytest.raises(ConfigError, match="row 'c' has no results"):
        markdown(experiment, results, [1, 2], "c")
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (out / FILE).write_text((tmp_path / "x.toml").read_text())
    shown = CliRunner().invoke(cli.app, ["status", str(out)])
    assert shown.exit_code == 0 and "2/12" in shown.output and "+0.5000" in shown.output
    written = CliRunner().invoke(cli.app, ["report", str(out), "--out", str(tmp_path / "page.md"), "--round", "2"])
    assert written.exit_code == 0 and "![full-model loss by round](page.png)" in (tmp_path / "page.md").read_text()


def test_what_was_compared_is_counted_for_attackers_and_the_others(tmp_path: Path) -> None:
    attacked = SMALL.replace('"a"\nunits = 2', '"a"\nattackers = 1\nlimits.outliers = "report"')
    experiment = load(tmp_path, "seeds = [0]\n" + attacked)
    write_results(experiment, tmp_path / "out", {"a": [[2.0, 1.9]], "b": [[2.0, 1.8]]})
    assert "compared" not in markdown(experiment, collect(experiment, tmp_path / "out"), [1], None)
    path = tmp_path / "out/jobs/a/seed-0/results.jsonl"
    first, line = [json.loads(text) for text in path.read_text().splitlines()]
    figures = {"d00": (-0.01, 3.5, 4.0, "why"), "d01": (0.002, 0.9, 1.0, None), "d02": (0.004, 1.1, 1.25, None)}
    figures["d03"] = (None, None, None, None)
    line["devices"] = {
        name: {"review": {"agreement": agreement, "whole": whole, "size": size, "outlier": outlier}}
        for name, (agreement, whole, size, outlier) in figures.items()
    }
    path.write_text("".join(json.dumps(one) + "\n" for one in (first, line)))
    page = markdown(experiment, collect(experiment, tmp_path / "out"), [1], None)
    attackers, others = "-0.0100 to -0.0100 | 3.50 to 3.50 | 4.00 to 4.00", "+0.0020 to +0.0040 | 0.90 to 1.10 | 1.00 to 1.25"
    assert f"| a | 1 | 1 | {attackers} | 3 | 0 | {others} |" in page


def test_fast_rounds_count_for_losses_and_bytes_alone(tmp_path: Path) -> None:
    experiment = load(tmp_path, "seeds = [0]\n" + SMALL)
    write_results(experiment, tmp_path / "out", {"a": [[2.0, 1.9, 1.8]], "b": [[2.0, 1.8, 1.5]]}, fast_from=2)
    page = markdown(experiment, collect(experiment, tmp_path / "out"), [2], None)
    assert "| a | 1.800 | +0.200 |" in page
    assert "| 2 | 4.5 | 0.2 | 1.5 | 2.0 |" in page and "| 3 MiB |" in page and "30 MiB" not in page


def test_only_evaluated_rounds_are_columns_and_only_whole_rounds_are_timed(tmp_path: Path) -> None:
    """Evaluated after 5, 10 and 12 rounds; the last round of `a` was interrupted, and its seconds are of what came after."""
    experiment = load(tmp_path, "seeds = [0]\n" + SMALL)
    every = [2.0 - 0.01 * n if n in (0, 5, 10, 12) else None for n in range(13)]
    write_results(experiment, tmp_path / "out", {"a": [every], "b": [every[:6]]})
    path = tmp_path / "out/jobs/a/seed-0/results.jsonl"
    *lines, last = [json.loads(text) for text in path.read_text().splitlines()]
    last["seconds"]["devices"] = 3.4  # less than its device's probe and training together
    path.write_text("".join(json.dumps(line) + "\n" for line in (*lines, last)))
    results = collect(experiment, tmp_path / "out")
    assert default_rounds(results) == [5, 10, 12]
    page = markdown(experiment, results, default_rounds(results), "a")
    assert "| a | 1.950 | 1.900 | 1.880 | +0.120 | 100% |" in page and "| b | 1.950 |  |  | +0.050 (after 5) | 100% |" in page
    assert len(results[0].lines()) == 12 and len(results[0].timed()) == 11 and "| a | 12 | 11 | 2 | 4.5 |" in page


def test_a_directory_without_an_experiment_is_said(tmp_path: Path) -> None:
    shown = CliRunner().invoke(cli.app, ["status", str(tmp_path)])
    assert isinstance(shown.exception, ConfigError) and "fp-lab run FILE" in str(shown.exception)
