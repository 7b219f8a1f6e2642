"""A device's own data: Alpaca-form JSON, JSON lines or a `datasets` id; its fixed held-out split. Torch-free.

Only where each row lies is kept in memory (its place in the file and a digest of its content); rows are
read when a batch needs them, so a data set's size does not eat into the memory budget.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.errors import DataError
from fp_client.template import Example

_SPACE = re.compile(r"[ \t\r\n]*")
_FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True)
class DataSource:
    """Which data, and how it is split. `source`: a .json or .jsonl file, or a `datasets` id."""

    source: str
    split: str = "train"
    """The split of a `datasets` id; files have none."""
    heldout: float = 0.05
    """The fraction never trained on, rounded to the nearest row, at least one."""
    heldout_max: int = 64
    """No more held-out rows than this: each one is a forward pass of the full model every round."""
    on_long: Literal["error", "drop"] = "error"
    """What becomes of a response that does not fit the window."""

    @property
    def is_file(self) -> bool:
        """Whether `source` names a file and not a `datasets` id."""
        return Path(self.source).suffix in (".json", ".jsonl") or Path(self.source).exists()


@dataclass
class Rows:
    """The rows of one source, read on demand. `read(i)` gives row i; `digests[i]` is 16 bytes of its content."""

    name: str
    read: Callable[[int], Example]
    lines: array[int] = field(default_factory=lambda: array("q"))
    digests: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.digests)


@dataclass(frozen=True)
class Split:
    """Row numbers, each in file order. Rows equal in content are on the same side."""

    train: tuple[int, ...]
    heldout: tuple[int, ...]


def example_of(row: Any, where: str, line: int) -> Example:
    """A checked row. Raises DataError naming `where` and the key."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with instruction and output, found {type(row).__name__}")
    values = []
    for key in _FIELDS:
        value = row.get(key, "" if key == "input" else None)
        if value is None and key == "input":
            value = ""
        if value is None:
            raise DataError(f"{where}: key {key!r} is missing (each example needs instruction and output)")
        if not isinstance(value, str):
            raise DataError(f"{where}: {key!r} must be a text, found {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start].encode("ascii", "backslashreplace").decode()
            raise DataError(f"{where}: {key!r} holds {half}, half of a surrogate pair, which is no character") from None
        values.append(value)
    if not values[0].strip() or not values[2].strip():
        raise DataError(f"{where}: {'instruction' if not values[0].strip() else 'output'} is empty")
    return Example(values[0], values[1], values[2], line)


def digest(example: Example) -> bytes:
    """What the held-out split is chosen by: the content, not the place in the file."""
    text = json.dumps([example.instruction, example.input, example.output])
    return hashlib.sha256(text.encode()).digest()[:16]


def open_rows(source: DataSource) -> Rows:
    """Read and check every row once.

    Raises DataError naming file and line: missing or empty file, malformed JSON, missing or wrong key.
    """
    if not source.is_file:
        return _open_hub(source)
    path = Path(source.source)
    try:
        rows = _open_array(path) if _starts_array(path) else _open_lines(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not rows:
        raise DataError(f"{path}: holds no examples (expected objects with instruction, input and output)")
    return rows


def split_rows(rows: Rows, source: DataSource) -> Split:
    """The fixed split: the rows with the smallest content digests are held out, whatever their order.

    Raises DataError when nothing is left to train on.
    """
    unique = sorted(set(rows.digests))
    wanted = max(1, min(round(source.heldout * len(unique)), source.heldout_max))
    if len(unique) <= wanted:
        raise DataError(
            f"{rows.name}: too few different examples ({len(unique)}, {wanted} held out): nothing is left to train on"
        )
    held = set(unique[:wanted])
    first: dict[bytes, int] = {}
    for index, key in enumerate(rows.digests):
        if key in held:
            first.setdefault(key, index)
    train = tuple(index for index, key in enumerate(rows.digests) if key not in held)
    return Split(train, tuple(sorted(first.values())))


def count_examples(source: DataSource) -> tuple[int, int]:
    """(|D_n|, held-out rows), without a tokenizer: what a device announces when it joins a run."""
    split = split_rows(open_rows(source), source)
    return len(split.train), len(split.heldout)


def _starts_array(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        while text := file.read(4096):
            if text := text.lstrip():
                return text.startswith("[")
    raise DataError(f"{path}: is empty")


def _open_lines(path: Path) -> Rows:
    """JSON lines: one object a line, blank lines skipped."""
    starts: array[int] = array("q")

    def parse(raw: bytes, line: int) -> Example:
        where = f"{path}:{line}"
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: malformed JSON: {error.msg} (column {error.colno})") from None
        except RecursionError:
            raise DataError(f"{where}: malformed JSON: nested too deeply") from None
        except ValueError:  # the interpreter reads no whole number of more than some thousand digits
            raise DataError(f"{where}: malformed JSON: a number of too many digits") from None
        return example_of(row, where, line)

    def read(index: int) -> Example:
        with path.open("rb") as file:
            file.seek(starts[index])
            return parse(file.readline(), rows.lines[index])

    rows = Rows(str(path), read)
    offset = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                try:
                    rows.digests.append(digest(parse(raw, line)))
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{line}: is not UTF-8 text ({error.reason})") from None
                rows.lines.append(line)
                starts.append(offset)
            offset += len(raw)
    return rows


def _elements(text: str, path: Path) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of each element of a JSON array, so that an error can name its line."""
    decoder = json.JSONDecoder()

    def skip(at: int) -> int:
        match = _SPACE.match(text, at)
        return match.end() if match else at

    def bad(at: int, why: str) -> DataError:
        return DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: malformed JSON: {why}")

    at = skip(text.index("[") + 1)
    if text[at : at + 1] != "]":
        while True:
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                raise bad(error.pos, error.msg) from None
            except RecursionError:
                raise bad(at, "nested too deeply") from None
            except ValueError:  # as above
                raise bad(at, "a number of too many digits") from None
            yield at, end, value
            at = skip(end)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise bad(at, "expected ',' or ']' after an example")
            at = skip(at + 1)
    if skip(at + 1) != len(text):
        raise bad(at + 1, "text after the end of the array")


def _open_array(path: Path) -> Rows:
    """One JSON array of objects; kept as byte ranges of the file."""
    starts: array[int] = array("q")
    sizes: array[int] = array("q")

    def read(index: int) -> Example:
        with path.open("rb") as file:
            file.seek(starts[index])
            raw = file.read(sizes[index])
        try:
            row = json.loads(raw)
        except ValueError:
            raise DataError(f"{path}:{rows.lines[index]}: the file has changed while in use; start the task again") from None
        return example_of(row, f"{path}:{rows.lines[index]}", rows.lines[index])

    rows = Rows(str(path), read)
    text = path.read_bytes().decode("utf-8")
    seen, byte, line = 0, 0, 1
    for start, end, value in _elements(text, path):
        line += text.count("\n", seen, start)
        byte += len(text[seen:start].encode())
        size = len(text[start:end].encode())
        rows.digests.append(digest(example_of(value, f"{path}:{line}", line)))
        rows.lines.append(line)
        starts.append(byte)
        sizes.append(size)
        line += text.count("\n", start, end)
        byte, seen = byte + size, end
    return rows


def _open_hub(source: DataSource) -> Rows:
    """A `datasets` id. Nothing of a data set's own code is ever run."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{source.source!r} is no .json or .jsonl file, and a data set id needs the package `datasets`") from None
    try:
        table = load_dataset(source.source, split=source.split)
    except Exception as error:  # the library raises many kinds: not found, offline, unknown split
        raise DataError(f"data set {source.source!r}, split {source.split!r}: can't be loaded: {str(error)[:300]}") from None
    missing = {"instruction", "output"} - set(table.column_names)
    if missing:
        raise DataError(f"data set {source.source!r}: has no column {sorted(missing)[0]!r} (columns: {table.column_names})")

    def read(index: int) -> Example:
        return example_of(table[index], f"{source.source} ({source.split}), row {index + 1}", index + 1)

    rows = Rows(source.source, read)
    for index in range(len(table)):
        rows.digests.append(digest(read(index)))
        rows.lines.append(index + 1)
    if not rows:
        raise DataError(f"data set {source.source!r}, split {source.split!r}: holds no examples")
    return rows
