"""`make faults`, `make faults-random`, `make faults-storage`: whole federations with a fault at every named point.

    python -m tests.faults points|random|storage|sample --dir DIR [--seconds N] [--only PATTERN] [--again] [--keep-older]
    python -m tests.faults report --dir DIR --out docs/reliability.md [--keep-older]

Results go to DIR/<mode>.jsonl, one line a case, as they come. A case that has a line of these sources is not done again, and when
that line says that it failed, so does this command; `--again` plays those anew. A line of other sources counts for nothing,
unless `--keep-older` is given. A case that fails leaves its directory in DIR/failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults import shadow, sources, spawn
from tests.faults.case import Case, Result
from tests.faults.cases import RANDOM, Trace, counted, events, point_cases, random_case, sample, storage_cases
from tests.faults.fleet import play
from tests.faults.ground import DEVICES, Ground
from tests.faults.report import recorded, report
from tests.faults.verdict import against, contradictions, refusals, same
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


class Played:
    """Undisturbed runs and reference runs, and what came of the cases."""

    def __init__(self, ground: Ground, place: Path, directory: Path) -> None:
        self._ground, self._place, self._directory = ground, place, directory
        self.sources, self.commit = sources.digest(), sources.commit()
        self.expected: dict[bool, dict[str, Any]] = {}
        self.traces: dict[bool, Trace] = {}
        self._references: dict[str, dict[str, Any]] = {}

    def undisturbed(self) -> None:
        """Play the ordinary and the eventful federation: their bytes, and the points they pass. Fails when one gives something
        else than it gave with the same sources."""
        path = self._directory / "calm.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        before = kept.get("calm", {}) if kept.get("sources") == self.sources else {}
        written: dict[str, Any] = {}
        for eventful in (False, True):
            root, name = self._place / "calm", "eventful" if eventful else "ordinary"
            case = Case(f"undisturbed, {name}", events(eventful), trace=True, eventful=eventful)
            result = play(self._ground, root, case, None)
            if result.outcome != "identical" or result.restarts:
                keep(root, self._directory, case.name)
            assert result.outcome == "identical" and not result.restarts, f"{case.name}: {result.why}"
            processes = ("server", *DEVICES, "export")
            trace = counted({one: (root / "marks" / one / "trace").read_text().splitlines() for one in processes})
            if name in before:  # how often some points are passed differs a little, and the cases must stay the same
                trace = before[name]["trace"]
            same_as_before = name not in before or same(before[name]["found"], result.found)
            assert same_as_before, f"two undisturbed runs differ: {path} is of another machine; remove {self._directory}"
            self.expected[eventful], self.traces[eventful] = result.found, trace
            written[name] = {"found": result.found, "trace": trace}
        path.write_text(json.dumps({"sources": self.sources, "calm": written}))

    def reference(self, case: Case, found: dict[str, Any]) -> dict[str, Any] | str:
        """What a run gives in which the same devices fail at the same tasks, and nothing else happens; or why there is none."""
        refuse = refusals(found)
        key = json.dumps(
            [
                case.eventful,
                [[device, [[o["task"], o["stage"], o["error"]] for o in refuse[device]]] for device in sorted(refuse)],
            ]
        )
        if key not in self._references:
            calm = Case(f"reference of {case.name}", events(case.eventful), eventful=case.eventful, refuse=refuse)
            result = play(self._ground, self._place / "reference", calm, None)
            if result.outcome == "failed":
                keep(self._place / "reference", self._directory, calm.name)
                return f"the reference run has failed: {result.why}"
            self._references[key] = result.found
        return self._references[key]

    def play(self, case: Case) -> Result:
        """A case, and where it has other bytes than the undisturbed run, whether they are those of its reference."""
        result = play(self._ground, self._place / "case", case, self.expected[case.eventful])
        result.sources, result.commit = self.sources, self.commit
        if result.outcome == "other":
            reference = self.reference(case, result.found)
            result.outcome, result.why = ("failed", reference) if isinstance(reference, str) else against(result.found, reference)
        if result.outcome == "failed":
            keep(self._place / "case", self._directory, case.name)
        return result


def keep(root: Path, directory: Path, name: str) -> None:
    """Copy the directory of a case that has failed."""
    kept = directory / "failed" / name.replace("/", "_").replace(" ", "_")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(root, kept, symlinks=True, ignore=shutil.ignore_patterns("*.sock", "*.asking"))


def sweep(cases: list[Case], played: Played, path: Path, seconds: float, older: bool) -> int:
    """Do the cases that have no line yet, writing each as it ends, for so many seconds; how many have failed, now or before."""
    ends = time.monotonic() + seconds
    done = {line["name"] for line in recorded(path, "" if older else played.sources)}
    for case in cases:
        if case.name in done:
            continue
        if time.monotonic() > ends:
            print("out of time: call again to go on")
            break
        result = played.play(case)
        with path.open("a") as out:
            out.write(json.dumps({**asdict(result), "eventful": case.eventful}) + "\n")
        print(f"{result.outcome:9} {result.seconds:5.1f} s  {case.name}  {result.why[:160]}", flush=True)
    names = {case.name for case in cases}
    lines = [line for line in recorded(path, "" if older else played.sources) if line["name"] in names]
    outcomes = [line["outcome"] for line in lines]
    print(f"{path.name}: " + ", ".join(f"{outcomes.count(what)} {what}" for what in sorted(set(outcomes))))
    failed = [line["name"] for line in lines if line["outcome"] == "failed"]
    if failed:
        print(f"failed (played again with --again): {'; '.join(failed)}")
    differing = contradictions(lines)
    print("\n".join(differing) if differing else "all cases with the same history have the same bytes")
    return len(failed) + len(differing)


def forget_failed(path: Path) -> None:
    """Drop the lines of what failed, so that it is played again."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if lines:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["outcome"] != "failed"))


def cases_of(mode: str, traces: dict[bool, Trace]) -> list[Case]:
    """The cases of a mode."""
    if mode == "points":
        return point_cases(traces[False], traces[True])
    if mode == "sample":
        return [case for case in sample(traces[False], traces[True]) if not case.power or shadow.compiler()]
    if mode == "storage":
        return storage_cases(traces[False], traces[True])
    return [random_case(seed, traces[False]) for seed in range(RANDOM)]


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
    parser.add_argument("--keep-older", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    if given.mode == "report":
        return report(given.dir, given.out, given.keep_older)
    if given.mode in ("storage", "sample") and not with_shadow(given.dir) and given.mode == "storage":
        return 0
    path = given.dir / f"{given.mode}.jsonl"
    if given.again:
        forget_failed(path)
    with grounds(given.dir.resolve()) as (ground, place):
        played = Played(ground, place, given.dir)
        played.undisturbed()
        cases = [case for case in cases_of(given.mode, played.traces) if re.search(given.only, case.name)]
        return 1 if sweep(cases, played, path, given.seconds, given.keep_older) else 0


if __name__ == "__main__":
    sys.exit(main())
