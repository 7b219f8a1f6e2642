"""A device in a directory, for tests: a tiny random model with a byte-level tokenizer, and a little data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.unit import tiny


def add_tokenizer(directory: Path) -> Path:
    """A tokenizer of one token a byte, ids 3…258, with the special tokens of `tiny`'s configurations."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 256,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def model(directory: Path, family: str = "llama", **changes: Any) -> Path:
    """A model directory with weights and tokenizer."""
    return add_tokenizer(tiny.make(family, directory, **changes))


def rows(count: int) -> list[dict[str, str]]:
    """Alpaca rows, each different."""
    return [{"instruction": f"Say {i}", "input": f"n{i}" if i % 3 else "", "output": f"it is {i * i}"} for i in range(count)]


def data(path: Path, count: int = 40) -> Path:
    """A JSON lines file of them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path
