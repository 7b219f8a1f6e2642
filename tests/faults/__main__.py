"""`make faults`, `make faults-random`, `make faults-storage`: whole federations with a fault at every named point.

    python -m tests.faults points|random|storage|sample --dir DIR [--seconds N] [--only WORDS] [--again]
    python -m tests.faults report --dir DIR --out docs/reliability.md

Results go to DIR/<mode>.jsonl, one line a case, as they come; a case that has its line is not done again (`--again`: those that
failed are). A case that fails leaves its directory in DIR/failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults import shadow, spawn
from tests.faults.case import Case
from tests.faults.cases import RANDOM, Trace, counted, point_cases, random_case, sample, storage_cases
from tests.faults.fleet import play
from tests.faults.ground import DEVICES, Ground
from tests.faults.report import report
from tests.faults.workers import WorkerHost


def fast_place() -> Path:
    """Where federations live while they run: in memory, where the system has such a place. What one that was killed has left
    there goes."""
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    for left in memory.glob("fp-faults-*-*"):
        if not Path(f"/proc/{left.name.split('-')[2]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"fp-faults-{os.getpid()}-", dir=memory))


@contextmanager
def grounds(directory: Path) -> Iterator[tuple[Ground, Path]]:
    """(template, a place to play), with a host for workers that is ended at the end."""
    place = fast_place()
    host = WorkerHost(place)
    try:
        spawn.preload()
        ground = Ground(directory / "ground", host.stub)
        ground.make()
        host.wait()
        yield ground, place
    finally:
        host.close()
        shutil.rmtree(place, ignore_errors=True)


def undisturbed(ground: Ground, place: Path, directory: Path) -> tuple[dict[str, Any], Trace]:
    """What an undisturbed run gives, and which points it passes. Fails when it gives something else than before."""
    root, kept = place / "calm", directory / "calm.json"
    result = play(ground, root, Case("undisturbed", trace=True), None)
    assert result.outcome == "identical" and not result.restarts, result.why
    names = ("server", *DEVICES, "export")
    trace = counted({name: (root / "marks" / name / "trace").read_text().splitlines() for name in names})
    before = json.loads(kept.read_text()) if kept.exists() else None
    if before is not None:
        same = all(before["found"][key] == result.found[key] for key in ("ledger", "broadcast", "adapter"))
        assert same, f"two undisturbed runs differ: {kept} is of another version or machine; remove {directory} to begin anew"
    kept.write_text(json.dumps({"found": result.found, "trace": trace}))
    return result.found, trace


def recorded(path: Path, again: bool) -> dict[str, str]:
    """Case -> outcome of what was done before. `again`: forget what failed."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if again:
        lines = [line for line in lines if line["outcome"] != "failed"]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {line["name"]: line["outcome"] for line in lines}


def sweep(cases: list[Case], ground: Ground, place: Path, path: Path, expected: dict[str, Any], seconds: float) -> int:
    """Do the cases, writing each as it ends, for so many seconds; how many failed."""
    done, failed, ends = recorded(path, False), 0, time.monotonic() + seconds
    for case in cases:
        if case.name in done:
            continue
        if time.monotonic() > ends:
            print("out of time: call again to go on")
            break
        root = place / "case"
        result = play(ground, root, case, expected)
        line = {key: value for key, value in asdict(result).items() if key != "found"}
        with path.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(f"{result.outcome:9} {result.seconds:5.1f} s  {case.name}  {result.why[:160]}", flush=True)
        if result.outcome == "failed":
            failed += 1
            kept = path.parent / "failed" / case.name.replace("/", "_").replace(" ", "_")
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(root, kept, symlinks=True, ignore=shutil.ignore_patterns("*.sock"))
    counts = list(recorded(path, False).values())
    print(f"{path.name}: " + ", ".join(f"{counts.count(what)} {what}" for what in sorted(set(counts))))
    return failed


def cases_of(mode: str, trace: Trace) -> list[Case]:
    """The cases of a mode."""
    if mode == "points":
        return point_cases(trace)
    if mode == "sample":
        return [case for case in sample(trace) if not case.power or shadow.compiler()]
    if mode == "storage":
        return storage_cases(trace)
    return [random_case(seed, trace) for seed in range(RANDOM)]


def with_shadow(directory: Path) -> bool:
    """Begin anew with the storage fake loaded. False, and said why, where it can't be built."""
    if shadow.compiler() is None:
        print("skipped: the storage fake needs a C compiler (cc)")
        return False
    library = str(shadow.build(directory.resolve()))
    if os.environ.get("LD_PRELOAD") != library:
        os.environ["LD_PRELOAD"] = library
        os.execv(sys.executable, [sys.executable, "-m", "tests.faults", *sys.argv[1:]])
    return True


def main() -> int:
    """The command line; 1 when a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("points", "random", "storage", "sample", "report"))
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    if given.mode == "report":
        return report(given.dir, given.out)
    if given.mode in ("storage", "sample") and not with_shadow(given.dir) and given.mode == "storage":
        return 0
    path = given.dir / f"{given.mode}.jsonl"
    recorded(path, given.again)
    with grounds(given.dir.resolve()) as (ground, place):
        expected, trace = undisturbed(ground, place, given.dir)
        cases = [case for case in cases_of(given.mode, trace) if given.only in case.name]
        return 1 if sweep(cases, ground, place, path, expected, given.seconds) else 0


if __name__ == "__main__":
    sys.exit(main())
