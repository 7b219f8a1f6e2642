"""`make fuzz`: coverage-guided fuzzing of every decoder, the session and the agent; goes on where it was stopped.

A target runs in a process of its own (libFuzzer ends it at a finding). Corpus, findings and counts stay in the directory given.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _place in (ROOT / "tests" / "contract", ROOT / "tests", ROOT):
    sys.path.insert(0, str(_place))

from tests.faults import sources  # noqa: E402

SLOWEST = 60
"""Seconds one input may take; more is a hang. A few milliseconds are usual, on an idle machine."""
MACHINES, MORE = ("session", "pushes", "device's agent", "admin request"), 5
"""Targets with a state: hundreds of inputs a second, or fewer, and so many times as long."""
PARTS = ("common", "fp_server", "fp_client", "proto", "tests/fuzz")
MARKS = ("<!-- fuzz: written by `make fuzz-report` -->", "<!-- /fuzz -->")


def all_targets() -> dict[str, Any]:
    """Name -> target, the state machines last."""
    from fuzz.agent import agent, agent_seeds
    from fuzz.decoders import TARGETS, Target
    from fuzz.pushes import pushes, pushes_seeds
    from fuzz.session import session, session_seeds

    machines = {"session": Target(session, session_seeds, 400), "pushes": Target(pushes, pushes_seeds, 600)}
    return {**TARGETS, **machines, "device's agent": Target(agent, agent_seeds, 1500)}


def one(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process; never returns."""
    import atheris

    with atheris.instrument_imports(include=["common", "fp_server", "fp_client"]):
        target = all_targets()[name]
    for logger in ("fp_server", "fp_client"):
        logging.getLogger(logger).propagate = False
    atheris.Setup([sys.argv[0], *arguments], target.run)
    atheris.Fuzz()


def slug(name: str) -> str:
    return re.sub(r"[^a-z]+", "-", name)


def fuzz(name: str, seeds: list[bytes], longest: int, directory: Path, seconds: int, counts: dict[str, Any]) -> str:
    """Fuzz one target for a while and add to its counts; what went wrong, other than a finding, or nothing."""
    place = directory / slug(name)
    corpus, found = place / "corpus", place / "found"
    for path in (corpus, found):
        path.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    command = [
        sys.executable, str(Path(__file__)), "--one", name, str(corpus), f"-max_total_time={seconds}", f"-timeout={SLOWEST}",
        f"-max_len={longest}", "-len_control=0", "-rss_limit_mb=2048",
        "-print_final_stats=1", f"-artifact_prefix={found}/", "-verbosity=1",
    ]  # fmt: skip
    begin = time.monotonic()
    with (place / "log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False, env={**os.environ, "PYTHONPATH": _path()}).returncode
    said = (place / "log").read_text(errors="replace")
    executed = [int(n) for n in re.findall(r"stat::number_of_executed_units:\s*(\d+)", said)] or [
        int(n) for n in re.findall(r"^#(\d+)\s", said, re.MULTILINE)
    ][-1:]
    coverage = [int(n) for n in re.findall(r"cov: (\d+)", said)]
    kept = counts.setdefault(name, {"inputs": 0, "seconds": 0.0, "coverage": 0, "findings": 0})
    kept["inputs"] += executed[-1] if executed else 0
    kept["seconds"] = round(kept["seconds"] + time.monotonic() - begin, 1)
    kept["coverage"] = max([kept["coverage"], *coverage])
    kept["findings"] = len(list(found.iterdir()))
    kept["corpus"] = len(list(corpus.iterdir()))
    return f"fuzzing {name!r} was broken off (exit {code}); see {place / 'log'}" if code and not kept["findings"] else ""


def _path() -> str:
    return os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)


def table(counts: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [
        (name, f"{c['inputs']:,}", f"{c['coverage']:,}", f"{c['corpus']:,}", str(c["findings"]), f"{c['seconds']:,.0f}")
        for name, c in counts.items()
    ]
    total = (sum(c[key] for c in counts.values()) for key in ("inputs", "findings", "seconds"))
    inputs, findings, seconds = total
    return [*rows, ("in all", f"{inputs:,}", "", "", str(findings), f"{seconds:,.0f}")]


HEAD = ("target", "inputs", "edges covered", "corpus", "findings", "seconds")


def show(counts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    made = Table(*HEAD)
    for row in table(counts):
        made.add_row(*row)
    Console().print(made)


def load(path: Path) -> dict[str, Any]:
    """What was fuzzed of the present sources; inputs that older ones have seen count for nothing, the corpus stays."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return kept["targets"] if kept.get("sources") == sources.digest(parts=PARTS) else {}


def store(counts: dict[str, Any], path: Path) -> None:
    """Write the counts in one step."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"sources": sources.digest(parts=PARTS), "targets": counts}, indent=1))
    temporary.replace(path)


def report(counts: dict[str, Any], path: Path) -> None:
    """Put the table between the marks of a document."""
    if not counts:
        raise SystemExit("nothing was fuzzed of the present sources: make fuzz")
    lines = [
        "| " + " | ".join(HEAD) + " |",
        "| --- |" + " ---: |" * (len(HEAD) - 1),
        *("| " + " | ".join(r) + " |" for r in table(counts)),
        "",
        f"All of sources {sources.digest(parts=PARTS)} (commit {sources.commit(parts=PARTS) or 'unknown'}).",
    ]
    before, _, rest = path.read_text().partition(MARKS[0])
    path.write_text(before + MARKS[0] + "\n" + "\n".join(lines) + "\n" + MARKS[1] + rest.partition(MARKS[1])[2])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Example: make fuzz SECONDS_EACH=60, or: make fuzz TARGETS='session update'"
    )
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "fuzz")
    parser.add_argument("--seconds", type=int, default=60, help=f"for each target, {MORE} times as long for what has a state")
    parser.add_argument("--report", type=Path, help="write the table of all counts so far into this document, and fuzz nothing")
    parser.add_argument("--sample", action="store_true", help="a few seconds in all: does it run and find nothing?")
    parser.add_argument("targets", nargs="*", help="these alone; quote names with spaces")
    given = parser.parse_args()
    counts_file = given.dir / "counts.json"
    counts = load(counts_file)
    if given.report is not None:
        report(counts, given.report)
        return
    if find_spec("atheris") is None:
        print("fuzzing SKIPPED: atheris is not installed (pip install -c constraints.txt -e '.[fuzz]'; it has wheels for Linux)")
        return
    targets = all_targets()
    if unknown := [name for name in given.targets if name not in targets]:
        raise SystemExit(f"error: no such target: {', '.join(unknown)} (there are: {', '.join(targets)})")
    chosen = given.targets or (["device message", "session"] if given.sample else list(targets))
    given.dir.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        seconds = given.seconds * (MORE if name in MACHINES and not given.sample else 1)
        print(f"{name}: {seconds} s …", flush=True)
        problem = fuzz(name, targets[name].seeds(), targets[name].longest, given.dir, seconds, counts)
        store(counts, counts_file)
        if problem:
            raise SystemExit(problem)
    show({name: counts[name] for name in chosen})
    if findings := [str(p) for name in chosen for p in sorted((given.dir / slug(name) / "found").iterdir())]:
        raise SystemExit("findings:\n" + "\n".join(findings))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
    else:
        main()
