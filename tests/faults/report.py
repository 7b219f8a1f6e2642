"""`make faults-report`: what the sweeps have shown so far, as the tables of docs/reliability.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from common.faults import POINTS
from tests.faults.cases import RANDOM, SIDES, point_cases, storage_cases

MARKS = ("<!-- faults: written by `make faults-report` -->", "<!-- /faults -->")
POWER = ("power fails, nothing unsynced is left", "power fails, some of it is left")
WORDS = {"identical": "same bytes", "explained": "logged", "failed": "FAILED"}


def read(path: Path) -> list[dict[str, Any]]:
    """A sweep's results, the newest of each case."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({line["name"]: line for line in lines}.values())


def split(name: str, kinds: tuple[str, ...]) -> tuple[str, str]:
    """(point, kind) of a case's name."""
    kind = next((kind for kind in kinds if name.endswith(kind)), "")
    return name.removesuffix(kind).strip(), kind


def cell(outcomes: list[str]) -> str:
    """A point's outcomes over all of its kinds of message, event or task, in a few words."""
    counts = Counter(outcomes)
    if len(outcomes) == 1:
        return WORDS[outcomes[0]]
    return ", ".join(
        f"{count} × {WORDS[what]}" for what, count in sorted(counts.items(), key=lambda item: list(WORDS).index(item[0]))
    )


def table(results: dict[tuple[str, str], list[str]], columns: tuple[str, ...]) -> list[str]:
    """A row a point, in the order of `POINTS`."""
    rows = ["| point | just then | " + " | ".join(columns) + " |", "|" + " --- |" * (2 + len(columns))]
    for point, text in POINTS.items():
        cells = [cell(results[point, kind]) if (point, kind) in results else "" for kind in columns]
        if any(cells):
            rows.append(f"| `{point}` | {text} | " + " | ".join(cells) + " |")
    return rows


def gathered(lines: list[dict[str, Any]], kinds: tuple[str, ...]) -> dict[tuple[str, str], list[str]]:
    """(point without its /which, kind) -> outcomes."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        point, kind = split(line["name"], kinds)
        found.setdefault((point.partition("/")[0], kind), []).append(line["outcome"])
    return found


def summary(lines: list[dict[str, Any]], what: str, planned: int) -> str:
    """How many cases came to what, in a sentence."""
    if not lines:
        return f"`{what}`: none of its {planned} cases has been played yet."
    counts = Counter(line["outcome"] for line in lines)
    seconds = sum(line["seconds"] for line in lines)
    parts = [f"{counts[kind]} {text}" for kind, text in (
        ("identical", "ended with the same bytes"), ("explained", "ended with other bytes for a reason that is in the log"),
        ("failed", "failed"),
    )]  # fmt: skip
    planned = max(planned, len(lines))  # how often an undisturbed run passes a point differs by a few from one to the next
    return f"`{what}`: {len(lines)} of {planned} cases in {seconds / 60:.0f} minutes; " + ", ".join(parts) + "."


HERE = re.compile(r"/\S*/fp-faults-[^/]+/case/")
"""Where a federation was played."""


def reasons(lines: list[dict[str, Any]]) -> list[str]:
    """Every outcome that was not the same bytes, and why."""
    return [
        f"- {line['name']} ({'; '.join(line['happened'])}): {HERE.sub('', line['why'])}"
        for line in lines
        if line["outcome"] != "identical"
    ]


def written(directory: Path) -> str:
    """The text between the marks."""
    trace = json.loads((directory / "calm.json").read_text())["trace"]
    points, chance, storage = (read(directory / f"{mode}.jsonl") for mode in ("points", "random", "storage"))
    out = ["### Every point, on both sides", "", summary(points, "make faults", len(point_cases(trace))), ""]
    if points:
        out += [*table(gathered(points, SIDES), SIDES), "", "Not the same bytes:", "", *(reasons(points) or ["- none"]), ""]
    out += ["### Three faults at random", "", summary(chance, "make faults-random", RANDOM), ""]
    if chance:
        out += [*deeds(chance), "", "Not the same bytes:", "", *(reasons(chance) or ["- none"]), ""]
    out += ["### The power fails", "", summary(storage, "make faults-storage", len(storage_cases(trace)))]
    if storage:
        out += ["", *table(gathered(storage, POWER), POWER), "", "Not the same bytes:", "", *(reasons(storage) or ["- none"])]
    return "\n".join(out)


def deeds(lines: list[dict[str, Any]]) -> list[str]:
    """What has happened how often, without its seconds."""
    kinds: Counter[str] = Counter()
    for deed in (deed for line in lines for deed in line["happened"]):
        if ": " in deed:
            parts = deed.split(": ", 1)[1].split(" at ")[0].removeprefix("ask:").split(":")
            kinds[" ".join(part for part in parts if not part.lstrip("-").replace(".", "").isdigit())] += 1
        else:
            kinds["a bit was flipped"] += 1
    return ["| what happened | times |", "| --- | --- |", *(f"| {kind} | {count} |" for kind, count in sorted(kinds.items()))]


def report(directory: Path, out: Path) -> int:
    """Write it into the document, between the marks."""
    text = out.read_text()
    begin, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    out.write_text(text[:begin] + "\n\n" + written(directory) + "\n\n" + text[end:])
    print(f"{out} is written")
    return 0
