"""Which cases there are: every point on both sides, and random schedules of several faults."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from common.faults import DISK, POINTS
from tests.faults.case import Case

WRITING = (
    "server.log", "server.object", "server.push", "server.aggregate", "server.export", "device.state", "device.outbox",
    "device.fetch", "device.push", "worker.update", "worker.store",
)  # fmt: skip
"""Where something is being written, or has just been; elsewhere it makes no difference how much of nothing is left."""

Trace = dict[str, dict[str, int]]
"""Process -> point (with its /which) -> how often an undisturbed run passes it."""

RANDOM = 100
"""Seeds of random schedules that are played."""

UNSTEADY = ("/progress", "device.health.written", "worker.task.step", "server.fetch", "device.fetch", "server.object.")
"""What a run passes more or less often, by its timing; the first time is certain."""


def counted(lines: dict[str, list[str]]) -> Trace:
    """From the traces of the undisturbed run."""
    return {name: dict(Counter(line.split()[2] for line in text)) for name, text in lines.items()}


def hit_of(point: str, times: int) -> int:
    """In the middle of the run, where that is certain to come."""
    return 1 if any(part in point for part in UNSTEADY) else (times + 1) // 2


def place(point: str) -> str:
    """The process that passes a point."""
    if point.startswith("server.export"):
        return "export"
    return "server" if point.startswith("server") else "alpha"


def stops(do: str) -> dict[str, list[dict[str, Any]]]:
    """A server that is told to stop in mid-round, and something on the way."""
    return {
        "server": [
            {"at": "server.session.heard/probe", "hit": 2, "do": "ask:term:server"},
            {"at": do.split()[1], "do": do.split()[0]},
        ]
    }


def point_cases(trace: Trace) -> list[Case]:
    """Every point that is passed: its own side killed there, and the other side; where it is at a disk, that is full."""
    cases: list[Case] = []
    points = {point: times for name in ("server", "alpha", "export") for point, times in trace[name].items()}
    for point, times in sorted(points.items(), key=lambda item: (list(POINTS).index(item[0].partition("/")[0]), item[0])):
        where, hit = place(point), hit_of(point, times)

        def case(side: str, do: str, point: str = point, where: str = where, hit: int = hit) -> Case:
            return Case(f"{point} {side}", {where: [{"at": point, "hit": hit, "do": do}]})

        if where == "server":
            cases += [case("kill server", "kill"), case("kill device", "ask:kill:alpha")]
        elif where == "alpha":
            own = "ask:kill:alpha" if point.startswith("worker") else "kill"
            cases += [case("kill device", own), case("kill server", "ask:kill:server")]
            if point.startswith("worker"):
                cases.append(case("kill worker", "kill"))
        else:
            cases.append(case("kill server", "kill"))
        if point.partition("/")[0] in DISK:
            cases.append(case("disk full", "fail:ENOSPC"))
    for point in ("server.stop.draining", "server.stop.closed"):
        cases.append(Case(f"{point} kill server", stops(f"kill {point}")))
        cases.append(Case(f"{point} kill device", stops(f"ask:kill:alpha {point}")))
    return first_of_each(cases)


SIDES = ("kill server", "kill device", "disk full", "kill worker")


def first_of_each(cases: list[Case]) -> list[Case]:
    """Every point on every side before the other messages, events and tasks of the same point."""
    seen: set[tuple[str, str]] = set()
    ranked: list[tuple[int, int, Case]] = []
    for case in cases:
        side = next(side for side in SIDES if case.name.endswith(side))
        again = (case.name.partition(" ")[0].partition("/")[0], side) in seen
        seen.add((case.name.partition(" ")[0].partition("/")[0], side))
        ranked.append((again, SIDES.index(side), case))
    return [case for _, _, case in sorted(ranked, key=lambda one: one[:2])]


def storage_cases(trace: Trace) -> list[Case]:
    """At every point the power of its machine goes: with all that was not synced, and with some of it."""
    cases = []
    points = {point: times for name in ("server", "alpha", "export") for point, times in trace[name].items()}
    ordered = sorted(points, key=lambda name: (list(POINTS).index(name.partition("/")[0]), name))
    for chance in (None, 1):
        for number, point in enumerate(ordered):
            if chance is not None and not point.startswith(WRITING):
                continue
            where, how = place(point), "nothing unsynced is left" if chance is None else "some of it is left"
            fault = {"at": point, "hit": hit_of(point, points[point]), "do": f"ask:power:{where}"}
            seed = None if chance is None else number
            cases.append(Case(f"{point} power fails, {how}", {where: [fault]}, trace=True, power=where, chance=seed))
    return cases


SAMPLE = (
    "server.log.append.written/UpdateAccepted kill server",
    "device.outbox.moved kill device",
    "device.push.middle kill server",
    "server.object.synced disk full",
    "server.object.renamed power fails, nothing unsynced is left",
    "device.state.renamed/runs power fails, nothing unsynced is left",
)
"""What `make test` plays, and one random schedule."""


def sample(trace: Trace) -> list[Case]:
    """A few of each kind. Raises KeyError when a point is no longer passed."""
    known = {case.name: case for case in (*point_cases(trace), *storage_cases(trace))}
    return [*(known[name] for name in SAMPLE), random_case(0, trace)]


def random_case(seed: int, trace: Trace, faults: int = 3) -> Case:
    """A schedule of several faults, the same for the same seed."""
    rng = random.Random(seed)
    out: dict[str, list[dict[str, Any]]] = {}
    for _ in range(faults):
        name = rng.choice(("server", "server", "alpha", "beta"))
        points = sorted(point for point in trace[name] if "start" not in point.split(".")[1] or name != "server")
        point = rng.choice(points)
        hit = rng.randint(1, max(1, trace[name][point] // 2))
        out.setdefault(name, []).append({"at": point, "hit": hit, "do": deed(rng, name, point)})
    return Case(f"seed {seed:03}", out, proxied=True, must=False)


def deed(rng: random.Random, name: str, point: str) -> str:
    """What happens at a point of a process."""
    other = rng.choice(("alpha", "beta")) if name == "server" else "server"
    own = f"ask:kill:{name}" if point.startswith("worker") else "kill"
    choices = [
        (5, own), (5, f"ask:kill:{other}"),
        (3, "ask:net:cut"), (2, f"ask:net:halfopen:{rng.uniform(0.5, 3):.1f}"),
        (2, f"ask:net:delay:{rng.uniform(0.05, 0.4):.2f}:3"),
        (2, f"ask:freeze:{rng.choice((name, other))}:{rng.uniform(0.5, 3):.1f}"),
        (1, f"delay:{rng.uniform(0.2, 2):.1f}"),
        (2, f"ask:jump:{rng.choice((name, other))}:{rng.choice((-240, 240, 7200, 6_048_000))}"),
        (3, f"ask:mischief:{rng.choice((name, other))}:{rng.choice(('twice', 'late', 'swap'))}"),
        (2, f"ask:flip:{rng.choice(('cache', 'outbox', 'partial', 'objects'))}"),
    ]  # fmt: skip
    if point.partition("/")[0] in DISK and name == "server":
        choices.append((8, "fail:ENOSPC"))
    return rng.choices([what for _, what in choices], [weight for weight, _ in choices])[0]
