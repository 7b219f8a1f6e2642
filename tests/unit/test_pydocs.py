"""The Python documentation set that the demo's devices learn from."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fp_client.data import DataSource, open_rows, split_rows
from fp_client.template import Encoded, Example, encode, prompt

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "examples" / "pydocs.py"
WEIGHTS = ROOT / ".cache/models/SmolLM2-135M-Instruct"
WINDOW = 128


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pydocs", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pydocs"] = module
    spec.loader.exec_module(module)
    return module


pydocs = _load()


def _words(row: object) -> bool:
    return len(f"{row.instruction} {row.output}".split()) <= 60  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def partitions() -> dict[str, list[object]]:
    return dict(pydocs.partitions(_words))


def test_six_partitions_each_with_enough_examples(partitions):
    assert len(partitions) == 6
    assert all(len(rows) >= 100 for rows in partitions.values())
    assert len({len(rows) for rows in partitions.values()}) > 1, "sizes differ, so the devices' weights do"


def test_partitions_share_no_module_question_or_answer(partitions):
    modules = [module for names in pydocs.PARTITIONS.values() for module in names]
    assert len(modules) == len(set(modules))
    rows = [row for some in partitions.values() for row in some]
    assert len({row.output for row in rows}) == len(rows)
    by_question = {name: {row.instruction for row in some} for name, some in partitions.items()}
    assert sum(len(asked) for asked in by_question.values()) == len(rows)
    assert len(set().union(*by_question.values())) == len(rows)


def test_a_partition_asks_only_about_its_own_modules(partitions):
    for name, rows in partitions.items():
        for row in rows:
            asked = row.instruction.split("`")[1]
            assert any(asked.startswith(module + ".") for module in pydocs.PARTITIONS[name]), row.instruction


def test_every_answer_begins_the_functions_docstring(partitions):
    import inspect
    import textwrap

    fill = next(row for row in partitions["text"] if row.instruction.split("`")[1].startswith("textwrap.shorten("))
    assert "`textwrap.shorten(text, width, **kwargs)`" in fill.instruction
    assert inspect.getdoc(textwrap.shorten).startswith(fill.output)
    assert all(len(row.output) >= pydocs.SHORTEST_ANSWER and _words(row) for rows in partitions.values() for row in rows)


def test_the_devices_reader_takes_the_files(partitions, tmp_path):
    for name, rows in partitions.items():
        path = tmp_path / name / "data.jsonl"
        pydocs.write(rows, path)
        source = DataSource(str(path))
        read = open_rows(source)
        assert len(read) == len(rows)
        assert read.read(0) == Example(rows[0].instruction, "", rows[0].output, 1)
        assert split_rows(read, source).heldout


def test_the_same_set_in_every_process():
    script = (
        "import hashlib, json, sys; sys.path.insert(0, sys.argv[1]); import pydocs\n"
        "few = lambda row: len(f'{row.instruction} {row.output}'.split()) <= 60\n"
        "found = {n: [[r.instruction, r.output] for r in rows] for n, rows in pydocs.partitions(few).items()}\n"
        "print(sum(map(len, found.values())), hashlib.sha256(json.dumps(found).encode()).hexdigest())"
    )
    # Fresh processes, as the demo's is: a test process has modules that others have patched.
    said = [
        subprocess.run(
            [sys.executable, "-c", script, str(FILE.parent)],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("7", "11")
    ]
    assert said[0] == said[1]
    assert int(said[0].split()[0]) > 500


def test_no_address_of_an_object_gets_in(partitions):
    assert not [row.instruction for rows in partitions.values() for row in rows if " at 0x" in row.instruction]


def test_an_answer_is_cut_at_a_paragraph_then_at_a_sentence():
    def fits(limit: int):
        return lambda row: len(row.output) <= limit

    doc = "A first sentence of this. And a second one.\n\nA second paragraph of it."
    assert pydocs._answer(doc, "?", fits(200)) == doc
    assert pydocs._answer(doc, "?", fits(60)) == "A first sentence of this. And a second one."
    assert pydocs._answer(doc, "?", fits(30)) == "A first sentence of this."
    assert pydocs._answer(doc, "?", fits(10)) is None
    assert pydocs._answer("Too short.", "?", fits(200)) is None


@pytest.mark.weights
def test_prompt_and_answer_fit_the_window_uncut():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    fits = pydocs.window_check(WEIGHTS / "tokenizer.json", WINDOW, prompt)
    longest = 0
    for rows in pydocs.partitions(fits).values():
        assert len(rows) >= 100
        for line, row in enumerate(rows, 1):
            encoded = encode(Example(row.instruction, row.input, row.output, line), tokenizer, WINDOW)
            assert isinstance(encoded, Encoded)
            assert list(encoded.ids[: encoded.prompt]) == tokenizer(prompt(row.instruction))["input_ids"], "the prompt is whole"
            longest = max(longest, len(encoded.ids))
    assert longest <= WINDOW
    assert longest > WINDOW * 0.9, "the window is made use of"
