"""Which device has which examples: written once to files below the experiment's directory, the same for every row."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError, DataError
from common.files import digest_file
from fp_client.data import DataSource, Rows, open_rows
from fp_client.template import Encoded, encode
from fp_lab.experiment import DataSection

VERBS = 15
"""Instruction verbs told apart; rarer ones are one kind together."""
Place = tuple[int, int]
"""A source's number and a row's in it."""


def device_names(count: int) -> tuple[str, ...]:
    """d00, d01, …"""
    width = max(2, len(str(count - 1)))
    return tuple(f"d{index:0{width}}" for index in range(count))


def prepare(directory: Path, section: DataSection, window: int, tokenizer: Any) -> Path:
    """`directory`/data with a .jsonl file for every device and ``held-out.jsonl``; made when it isn't there.

    Held-out rows fit `window` tokens and are no device's, by content. Safe against another process doing the same.
    Raises DataError when there are too few examples, ConfigError when the files are of another partition.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / "data"
    fd = os.open(directory / "data.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if target.exists():
            _check(target, section, window)
            return target
        if not section.sources:
            raise ConfigError("data.sources names no data; name files there, or give --data PATH")
        fresh = directory / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        _write(fresh, section, window, tokenizer)
        fresh.replace(target)
        return target
    finally:
        os.close(fd)


def check_partition(directory: Path, section: DataSection, window: int) -> None:
    """Raises ConfigError when `directory` holds another partition, or a file that is named is not there."""
    for source in section.sources:
        if Path(source).suffix in (".json", ".jsonl") and not Path(source).is_file():
            raise ConfigError(f"data.sources: {source}: no such file")
    if (directory / "data").exists():
        _check(directory / "data", section, window)


def _stamp(section: DataSection, window: int) -> dict[str, Any]:
    """What a partition is made from. Files are told by their content: they may be moved."""
    sources = [digest_file(Path(s)) if Path(s).is_file() else s for s in section.sources]
    return {**section.model_dump(mode="json", exclude_none=True), "sources": sources, "window": window}


def _check(target: Path, section: DataSection, window: int) -> None:
    made = json.loads((target / "partition.json").read_text())
    wanted = _stamp(section, window)
    if not section.sources:  # the files are here; nothing else is needed of where they came from
        wanted["sources"] = made["sources"]
    if different := sorted(key for key in made.keys() | wanted.keys() if wanted.get(key) != made.get(key)):
        raise ConfigError(
            f"{target}: was made with other {', '.join(different)}, and rows would not be comparable; "
            "use another --out for a new partition"
        )


def _write(fresh: Path, section: DataSection, window: int, tokenizer: Any) -> None:
    opened = [open_rows(DataSource(source)) for source in section.sources]
    rng = np.random.default_rng(section.seed)
    places = [(s, i) for s, rows in enumerate(opened) for i in range(len(rows))]
    order = [places[index] for index in rng.permutation(len(places)).tolist()]
    held: dict[bytes, Place] = {}
    for place in order:
        if len(held) == section.held_out:
            break
        if _fits(place, opened, window, tokenizer):
            held.setdefault(_digest(place, opened), place)
    rest = [place for place in order if _digest(place, opened) not in held]
    if len(held) < section.held_out or len(rest) < section.devices * section.rows_per_device:
        raise DataError(
            f"{', '.join(section.sources)}: {len(places)} examples are too few for {section.held_out} held-out rows of at most "
            f"{window} tokens and {section.devices} devices of {section.rows_per_device}"
        )
    _dump(fresh / "held-out.jsonl", opened, list(held.values()))
    dealt = deal(rest, opened, section, rng)
    for name, mine, count in zip(device_names(section.devices), dealt, row_counts(section), strict=True):
        _dump(fresh / f"{name}.jsonl", opened, sorted(_usable(name, mine[:count], opened, window, tokenizer)))
    (fresh / "partition.json").write_text(json.dumps(_stamp(section, window)) + "\n")


def _digest(place: Place, opened: Sequence[Rows]) -> bytes:
    return opened[place[0]].digests[place[1]]


def _fits(place: Place, opened: Sequence[Rows], window: int, tokenizer: Any) -> bool:
    """Whether a row's response fits the window."""
    return isinstance(encode(opened[place[0]].read(place[1]), tokenizer, window), Encoded)


def _usable(name: str, dealt: Sequence[Place], opened: Sequence[Rows], window: int, tokenizer: Any) -> list[Place]:
    """Without the rows that a device would hold out and can't use: it holds out the one of smallest digest, and needs it.

    Raises DataError when too few rows fit the window.
    """
    order = sorted(dealt, key=lambda place: _digest(place, opened))
    for count, place in enumerate(order):
        if _fits(place, opened, window, tokenizer):
            others = (other for other in order[count + 1 :] if _digest(other, opened) != _digest(place, opened))
            if any(_fits(other, opened, window, tokenizer) for other in others):
                return order[count:]
            break
    raise DataError(
        f"device {name} was dealt {len(order)} rows, of which too few have a response that fits {window} tokens; "
        "raise the experiment's window or data.rows_per_device"
    )


def _dump(path: Path, opened: Sequence[Rows], places: Sequence[Place]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for source, index in places:
            example = opened[source].read(index)
            row = {"instruction": example.instruction, "input": example.input, "output": example.output}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def row_counts(section: DataSection) -> list[int]:
    """How many rows each device has."""
    most, fewest = section.rows_per_device, section.fewest_rows or section.rows_per_device
    growth = (most / fewest) ** (1 / max(1, section.devices - 1))
    return [min(most, round(fewest * growth**index)) for index in range(section.devices)]


def deal(rest: Sequence[Place], opened: Sequence[Rows], section: DataSection, rng: np.random.Generator) -> list[list[Place]]:
    """`rows_per_device` of the rows in `rest` for each device, no row twice.

    By kind, a device's shares p ~ Dirichlet(alpha) are drawn and its rows one after another from kinds with these
    chances; a kind that has run out is passed over.
    """
    size = section.rows_per_device
    if section.partition == "iid":
        return [list(rest[n * size : (n + 1) * size]) for n in range(section.devices)]
    kinds = _kinds(rest, opened, section.partition)
    dealt: list[list[Place]] = []
    for _ in range(section.devices):
        shares = rng.dirichlet(np.full(len(kinds), section.alpha))
        mine: list[Place] = []
        while len(mine) < size:
            left = np.array([bool(kind) for kind in kinds])
            chances = np.where(left, shares + 1e-12, 0.0)
            counts = rng.multinomial(size - len(mine), chances / chances.sum())
            for kind, count in zip(kinds, counts.tolist(), strict=True):
                mine.extend(kind[:count])
                del kind[:count]
        dealt.append(mine)
    return dealt


def _kinds(rest: Sequence[Place], opened: Sequence[Rows], partition: str) -> list[list[Place]]:
    found: dict[str, list[Place]] = {}
    for place in rest:
        if partition == "source":
            kind = str(place[0])
        else:
            words = opened[place[0]].read(place[1]).instruction.split()
            kind = words[0].lower().strip(".,:;!?\"'")
        found.setdefault(kind, []).append(place)
    ranked = sorted(found, key=lambda kind: (-len(found[kind]), kind))
    if partition == "source":
        return [found[kind] for kind in ranked]
    common = [found[kind] for kind in ranked[:VERBS]]
    rare = [place for kind in ranked[VERBS:] for place in found[kind]]
    return [*common, rare] if rare else common
