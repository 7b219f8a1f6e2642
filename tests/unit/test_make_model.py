"""`examples/make_smollm2.py`: nothing counts as the model before all of it is written."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from examples import make_smollm2


class Saves:
    """A model or tokenizer that writes files; `then` happens after the first."""

    config = types.SimpleNamespace()

    def __init__(self, *names: str, fails: bool = False) -> None:
        self.names, self.fails, self.inode = names, fails, 0

    def from_pretrained(self, *args: object, **options: object) -> Saves:
        return self

    def save_pretrained(self, directory: str) -> None:
        for name in self.names:
            (Path(directory) / name).write_text("written")
            self.inode = (Path(directory) / name).stat().st_ino
            if self.fails:
                raise KeyboardInterrupt


def convert(monkeypatch: pytest.MonkeyPatch, target: Path, model: Saves, tokenizer: Saves) -> None:
    fake = types.SimpleNamespace(AutoModelForCausalLM=model, AutoTokenizer=tokenizer)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    monkeypatch.setattr(make_smollm2, "gguf_directory", lambda: target.parent)
    monkeypatch.setattr(sys, "argv", ["make_smollm2.py", str(target)])
    make_smollm2.main()


def test_the_finished_directory_is_renamed_and_not_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A copy would leave a model that looks complete when it is killed half-way; a rename can't."""
    target = tmp_path / "models" / "smol"
    target.mkdir(parents=True)
    (target / "config.json").write_text("of an interrupted conversion")
    model = Saves("config.json", "model.safetensors")
    convert(monkeypatch, target, model, Saves("tokenizer.json"))
    assert (target / "model.safetensors").stat().st_ino == model.inode
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in target.parent.iterdir()] == ["smol"], "no scratch is left"
    assert (target / "config.json").read_text() == "written"


def test_an_interrupted_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "models" / "smol"
    with pytest.raises(KeyboardInterrupt):
        convert(monkeypatch, target, Saves("model.safetensors"), Saves("tokenizer.json", fails=True))
    assert list(target.parent.iterdir()) == []
