"""Training data: reading, the fixed split, the window, batches; and what bad data says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import DataError
from common.types import ProbeSpec, TrainSpec
from fp_client import batches as fb
from fp_client.data import DataSource, count_examples, open_rows, split_rows
from fp_client.template import IGNORE, TAIL, Encoded, Example, encode, prompt


class Letters:
    """A tokenizer that a person can check by eye: one token a character, BOS 1, EOS 2."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ([1] if add_special_tokens else []) + [ord(c) + 10 for c in text]}

    def text(self, ids: Any) -> str:
        return "".join(chr(int(i) - 10) for i in ids if int(i) > 2)


def rows(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"Do thing {i}", "input": "" if i % 2 else f"on {i}", "output": f"done é {i}"} for i in range(count)]


def jsonl(path: Path, data: list[Any]) -> DataSource:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data))
    return DataSource(str(path))


def spec(steps: int, batch: int, seed: int = 0) -> TrainSpec:
    return TrainSpec(steps, batch, 512, 1e-4, 4, 8.0, ("self_attn.q_proj",), seed)


def test_array_and_lines_give_the_same_rows_and_split(tmp_path: Path) -> None:
    lines = jsonl(tmp_path / "d.jsonl", rows(60))
    indented, dense = tmp_path / "a.json", tmp_path / "b.json"
    indented.write_text(json.dumps(rows(60), indent=2, ensure_ascii=False))
    dense.write_text("\ufeff" + json.dumps(rows(60)))
    opened = [open_rows(s) for s in (lines, DataSource(str(indented)), DataSource(str(dense)))]
    for one in opened:
        assert len(one) == 60
        for i in (0, 31, 59):
            found = one.read(i)
            assert (found.instruction, found.output) == (f"Do thing {i}", f"done é {i}")
        assert one.digests == opened[0].digests
    assert opened[0].lines[:3].tolist() == [1, 2, 3]
    assert opened[1].lines[:3].tolist() == [2, 7, 12]
    assert count_examples(lines) == (57, 3)


def test_split_is_fixed_by_content_and_never_trained_on(tmp_path: Path) -> None:
    data = rows(100)
    first = jsonl(tmp_path / "a.jsonl", data)
    second = jsonl(tmp_path / "b.jsonl", [*reversed(data), *data[:20]])
    held = []
    for source in (first, second):
        opened = open_rows(source)
        split = split_rows(opened, source)
        texts = {opened.read(i).instruction for i in split.heldout}
        assert len(texts) == len(split.heldout) == 5
        assert not texts & {opened.read(i).instruction for i in split.train}
        held.append(texts)
    assert held[0] == held[1]
    assert len(split_rows(open_rows(first), DataSource(first.source, heldout=0.5, heldout_max=7)).heldout) == 7
    assert len(split_rows(open_rows(first), DataSource(first.source, heldout=0.001)).heldout) == 1


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("d.jsonl", "", "d.jsonl: is empty"),
        ("d.json", " \n ", "d.json: is empty"),
        ("d.json", "[]", "d.json: holds no examples"),
        ("d.jsonl", '{"instruction": "a", "output": "b"}\n\n{"instruction": \n', "d.jsonl:3: malformed JSON"),
        ("d.jsonl", '{"instruction": "a"}\n', "d.jsonl:1: key 'output' is missing"),
        ("d.jsonl", '{"instruction": "a", "output": "b"}\n{"output": "b"}\n', "d.jsonl:2: key 'instruction' is missing"),
        ("d.jsonl", '{"instruction": 7, "output": "b"}', "d.jsonl:1: 'instruction' must be a text, found int"),
        ("d.jsonl", '{"instruction": "a", "input": [], "output": "b"}', "'input' must be a text, found list"),
        ("d.jsonl", '{"instruction": "a", "output": " "}', "d.jsonl:1: output is empty"),
        ("d.jsonl", "7\n", "d.jsonl:1: expected an object"),
        ("d.jsonl", "{" * 100_000, "d.jsonl:1: malformed JSON"),
        (
            "d.jsonl",
            '\n{"instruction": "a", "output": "b", "n": ' + "1" * 5000 + "}",
            "d.jsonl:2: malformed JSON: a number of too",
        ),
        (
            "d.json",
            '[\n{"instruction": "a", "output": "b", "n": ' + "1" * 5000 + "}]",
            "d.json:2: malformed JSON: a number of too",
        ),
        ("d.jsonl", '\n{"instruction": "a", "output": "b \\ud800 c"}', r"d.jsonl:2: 'output' holds \ud800, half of a surrogate"),
        ("d.json", '[\n{"instruction": "a", "output": "b \\udc00"}]', r"d.json:2: 'output' holds \udc00, half of a surrogate"),
        ("d.json", '[\n{"instruction": "a", "output": "b"},\n\n{"instruction": "a"}]', "d.json:4: key 'output' is missing"),
        ("d.json", '[\n{"instruction": "a", "output": "b"}\n{"x": 1}]', "d.json:3: malformed JSON: expected ','"),
        ("d.json", '[\n{"instruction": "a",\n "output": oops}]', "d.json:3: malformed JSON"),
        ("d.json", '[{"instruction": "a", "output": "b"}]\n]', "text after the end"),
        ("d.json", "[\n" * 100_000, "malformed JSON"),
        ("d.jsonl", '{"instruction": "a", "output": "b"}', "nothing is left to train on"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        count_examples(DataSource(str(tmp_path / name)))
    assert expected in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.jsonl: can't be read: No such file"):
        count_examples(DataSource(str(tmp_path / "nope.jsonl")))
    (tmp_path / "b.jsonl").write_bytes(b'{"instruction": "a", "output": "\xff"}\n')
    with pytest.raises(DataError, match="UTF-8"):
        count_examples(DataSource(str(tmp_path / "b.jsonl")))


def test_unknown_data_set_id(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(name: str, split: str) -> None:
        raise FileNotFoundError(f"{name} not on the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"data set 'acme/none', split 'train': can't be loaded"):
        count_examples(DataSource("acme/none"))


def test_data_set_id(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows(40)))
    opened = open_rows(DataSource("acme/rows"))
    assert opened.read(3).output == "done é 3"
    assert count_examples(DataSource("acme/rows")) == (38, 2)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list([{"text": "x"}]))
    with pytest.raises(DataError, match="has no column 'instruction'"):
        open_rows(DataSource("acme/rows"))


def test_counting_needs_no_torch(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", rows(40))
    code = (
        "import sys; from fp_client.data import DataSource, count_examples;"
        f"print(count_examples(DataSource({source.source!r})), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(38, 2) False False"


def test_loss_is_on_the_response_and_eos_only() -> None:
    tok = Letters()
    found = encode(Example("Say hi", "to Bo", "hi Bo", 1), tok, 1000)
    assert isinstance(found, Encoded)
    assert tok.text(found.ids[: found.prompt]) == prompt("Say hi", "to Bo")
    assert tok.text(found.ids[found.prompt :]) == "hi Bo"
    assert found.ids[-1] == tok.eos_token_id


def test_a_long_prompt_loses_the_end_of_its_input_only() -> None:
    tok = Letters()
    example = Example("Shorten", "x" * 500, "short", 1)
    found = encode(example, tok, 300)
    assert isinstance(found, Encoded) and len(found.ids) == 300
    text = tok.text(found.ids)
    assert text.endswith("xxx" + TAIL + "short") and "### Instruction:\nShorten\n\n### Input:\nxx" in text
    least = encode(Example("Shorten", "", "y" * 400, 1), tok, 300)
    assert isinstance(least, int)
    assert isinstance(encode(Example("Shorten", "", "y" * 400, 1), tok, least), Encoded)
    assert isinstance(encode(Example("Shorten", "", "y" * 400, 1), tok, least - 1), int)


def test_a_response_longer_than_the_window_names_the_line(tmp_path: Path) -> None:
    data = rows(30)
    data[12]["output"] = "z" * 900
    source = jsonl(tmp_path / "d.jsonl", data)
    with pytest.raises(DataError) as caught:
        fb.load_dataset(source, Letters(), 400)
    assert "d.jsonl:13: the response does not fit the window" in str(caught.value) and 'on_long = "drop"' in str(caught.value)
    dropped = fb.load_dataset(DataSource(source.source, on_long="drop"), Letters(), 400)
    assert dropped.dropped == 1 and 12 not in dropped.split.train
    with pytest.raises(DataError, match="no training example"):
        fb.load_dataset(DataSource(source.source, on_long="drop"), Letters(), 50)


def test_batches_are_seeded_epochs_without_replacement(tmp_path: Path) -> None:
    tok = Letters()
    data = fb.load_dataset(jsonl(tmp_path / "d.jsonl", rows(21)), tok, 512)
    assert len(data.split.train) == 20
    assert fb.order(data.split.train, 50, 3) == fb.order(data.split.train, 50, 3) != fb.order(data.split.train, 50, 4)
    drawn = fb.order(data.split.train, 60, 3)
    for epoch in range(3):
        assert sorted(drawn[20 * epoch : 20 * (epoch + 1)]) == sorted(data.split.train)
    assert drawn[:20] != drawn[20:40]
    made = list(fb.train_batches(data, spec(steps=7, batch=3, seed=5), tok))
    again = list(fb.train_batches(data, spec(steps=7, batch=3, seed=5), tok))
    assert len(made) == 7 and all(torch.equal(a[k], b[k]) for a, b in zip(made, again, strict=True) for k in a)
    seen = [tok.text(row[row != IGNORE]) for batch in made for row in batch["labels"]]
    assert seen == [data.rows.read(i).output for i in fb.order(data.split.train, 21, 5)]


def test_a_batch_is_right_padded_to_its_longest_row(tmp_path: Path) -> None:
    tok = Letters()
    data = fb.load_dataset(jsonl(tmp_path / "d.jsonl", rows(21)), tok, 512)
    batch = fb.probe_batch(data, ProbeSpec(batch_size=5, seed=2), tok)
    assert batch["input_ids"].dtype == torch.long and batch["input_ids"].shape[0] == 5
    lengths = batch["attention_mask"].sum(1)
    assert int(lengths.max()) == batch["input_ids"].shape[1]
    for row in range(5):
        end = int(lengths[row])
        assert batch["attention_mask"][row, :end].all() and not batch["attention_mask"][row, end:].any()
        assert (batch["input_ids"][row, end:] == tok.eos_token_id).all() and (batch["labels"][row, end:] == IGNORE).all()
        kept = batch["labels"][row] != IGNORE
        assert torch.equal(batch["labels"][row][kept], batch["input_ids"][row][kept])
    held = list(fb.heldout_batches(data, 4, tok))
    assert sum(len(b["input_ids"]) for b in held) == len(data.split.heldout)
    assert fb.narrow(data, 0).split.heldout == ()
