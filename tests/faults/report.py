"""`make faults-report`: what the sweeps have shown so far, as the tables of docs/reliability.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from common.faults import POINTS
from tests.faults import sources
from tests.faults.cases import LASTING, RANDOM, SIDES, point_cases, storage_cases
from tests.faults.deeds import NOTHING
from tests.faults.verdict import contradictions

MARKS = ("<!-- faults: written by `make faults-report` -->", "<!-- /faults -->")
POWER = ("power fails, nothing unsynced is left", "power fails, some of it is left")
WORDS = {"identical": "same bytes", "explained": "logged", "failed": "FAILED"}


def recorded(path: Path, wanted: str = "") -> list[dict[str, Any]]:
    """A sweep's results, the newest of each case. `wanted`: only those of these sources."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({line["name"]: line for line in lines if not wanted or line.get("sources") == wanted}.values())


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
    """How many of the cases there are have been played, and came to what."""
    if not lines:
        return f"`{what}`: none of its {planned} cases has been played yet."
    counts = Counter(line["outcome"] for line in lines)
    seconds = sum(line["seconds"] for line in lines)
    parts = [f"{counts[kind]} {text}" for kind, text in (
        ("identical", "ended with the same bytes"),
        ("explained", "ended, for a reason that is in the log, with the bytes of the run in which the same devices just fail"),
        ("failed", "failed"),
    )]  # fmt: skip
    said = [f"`{what}`: {len(lines)} of {planned} cases in {seconds / 60:.0f} minutes; " + ", ".join(parts) + "."]
    differing = contradictions(lines)
    said.append("; ".join(differing) + "." if differing else "All cases with the same history have the same bytes.")
    return " ".join([*said, origin(lines)])


def origin(lines: list[dict[str, Any]]) -> str:
    """Of which code the lines are."""
    found = Counter((line.get("sources") or "?", line.get("commit") or "?") for line in lines)
    texts = [f"sources {digest} (commit {commit})" for digest, commit in sorted(found)]
    if len({digest for digest, _ in found}) == 1:
        return f"All are of {' and '.join(texts)}."
    return (
        "MIXED: " + ", ".join(f"{count} of {text}" for text, (_, count) in zip(texts, sorted(found.items()), strict=True)) + "."
    )


HERE = re.compile(r"/\S*/fp-faults-[^/]+/case/")
"""Where a federation was played."""


def reasons(lines: list[dict[str, Any]]) -> list[str]:
    """Every outcome that was not the same bytes, and why."""
    return [
        f"- {line['name']} ({'; '.join(line['happened'])}): {HERE.sub('', line['why'])}"
        for line in lines
        if line["outcome"] != "identical"
    ]


def written(directory: Path, wanted: str) -> str:
    """The text between the marks."""
    calm = json.loads((directory / "calm.json").read_text())["calm"]
    traces = calm["ordinary"]["trace"], calm["eventful"]["trace"]
    planned = {
        "points": {case.name for case in point_cases(*traces)},
        "random": {f"seed {seed:03}" for seed in range(RANDOM)},
        "storage": {case.name for case in storage_cases(*traces)},
    }
    points, chance, storage = (
        [line for line in recorded(directory / f"{mode}.jsonl", wanted) if line["name"] in names]
        for mode, names in planned.items()
    )
    out = ["### Every point, on both sides", "", summary(points, "make faults", len(planned["points"])), ""]
    if points:
        out += [*table(gathered(points, SIDES), SIDES), "", "Not the same bytes:", "", *(reasons(points) or ["- none"]), ""]
    out += ["### Three faults at random", "", summary(chance, "make faults-random", RANDOM), ""]
    if chance:
        out += [*deeds(chance), "", "Not the same bytes:", "", *(reasons(chance) or ["- none"]), ""]
    out += ["### The power fails", "", summary(storage, "make faults-storage", len(planned["storage"]))]
    if storage:
        out += ["", *table(gathered(storage, POWER), POWER), "", "Not the same bytes:", "", *(reasons(storage) or ["- none"])]
    return "\n".join(out)


def deeds(lines: list[dict[str, Any]]) -> list[str]:
    """What has acted how often, without its seconds, and how often it found nothing to act on."""
    kinds: Counter[str] = Counter()
    idle: Counter[str] = Counter()
    for deed in (deed for line in lines for deed in line["happened"]):
        if ": " not in deed:  # the file a flip has hit
            continue
        parts = deed.split(": ", 1)[1].split(" at ")[0].removeprefix("ask:").split(":")
        kind = " ".join(part for part in parts if not part.lstrip("-").replace(".", "").isdigit() or parts[0] == "jump")
        if parts[0] in ("freeze", "net") and parts[-1] == str(LASTING):
            kind += f" for {LASTING} s"
        (idle if deed.endswith(NOTHING) else kinds)[kind] += 1
    rows = [f"| {kind} | {kinds[kind]} | {idle[kind] or ''} |" for kind in sorted(kinds | idle)]
    return ["| what happened | times | found nothing to act on |", "| --- | --- | --- |", *rows]


def report(directory: Path, out: Path, older: bool = False) -> int:
    """Write it into the document, between the marks. `older`: count lines of other sources, too."""
    text = out.read_text()
    begin, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    out.write_text(text[:begin] + "\n\n" + written(directory, "" if older else sources.digest()) + "\n\n" + text[end:])
    print(f"{out} is written")
    return 0
