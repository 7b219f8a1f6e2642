"""Which cases there are: every point on both sides, and random schedules of several faults."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from common.faults import DISK, POINTS
from tests.faults.case import Case

WRITING = (
    "server.log", "server.object", "server.push", "server.aggregate", "server.export", "device.state", "device.outbox",
    "device.fetch", "device.push", "worker.update", "worker.store", "worker.spill", "server.quarantine", "server.sweep",
    "server.certificate", "server.operator", "device.renewal", "common",
)  # fmt: skip
"""Where something is being written, or has just been; elsewhere it makes no difference how much of nothing is left."""

Trace = dict[str, dict[str, int]]
"""Process -> point (with its /which) -> how often an undisturbed run passes it."""

RANDOM = 100
"""Seeds of random schedules that are played."""

LONG = 20
"""In one of so many random schedules something lasts for `LASTING` instead of a moment."""
SILENT = ("net:halfopen", "freeze:server", "freeze:alpha", "net:halfopen", "freeze:beta")
LASTING = 40
"""Seconds after which keepalive (20 s, and 10 s for the answer) has ended a session whose other side is silent."""

UNSTEADY = (
    "/progress", "server.elapsed", "device.health.written", "worker.task.step", "server.fetch", "device.fetch",
    "server.object.arriv", "server.object.discard", "server.object.folder", "server.sweep", "common", "device.session.open",
)  # fmt: skip
"""What a run passes more or less often, by its timing; the first time is certain."""


def counted(lines: dict[str, list[str]]) -> Trace:
    """From the traces of the undisturbed run."""
    return {name: dict(Counter(line.split()[2] for line in text)) for name, text in lines.items()}


PLACES = ("server", "alpha", "export")
"""Processes whose points are tried; beta's are alpha's."""

EVENTS: dict[str, list[dict[str, Any]]] = {
    "server": [{"at": "server.review.before", "do": "ask:flip:objects"}],
    "alpha": [{"at": "worker.task.step", "do": "delay:2.5"}],
}
"""What an eventful federation has besides (`ground.liven`): an update is damaged, so that it is quarantined, and a task takes so
long that its device says how far it is, on a fast machine, too."""


def events(eventful: bool) -> dict[str, list[dict[str, Any]]]:
    """The faults of a federation that is undisturbed otherwise."""
    return {name: [dict(one) for one in faults] for name, faults in EVENTS.items()} if eventful else {}


@dataclass(frozen=True)
class Passed:
    """A point that is tried, and where."""

    point: str
    place: str
    times: int
    eventful: bool

    def case(self, name: str, do: str, **more: Any) -> Case:
        """Something is done there. The hit is in the middle of the run, where that is certain to come."""
        fault = {"at": self.point, "hit": self.hit, "do": do}
        faults = events(self.eventful)
        faults.setdefault(self.place, []).append(fault)
        return Case(f"{self.point} {name}", faults, eventful=self.eventful, **more)

    @property
    def hit(self) -> int:
        """The first where it is passed more or less often."""
        return 1 if any(part in self.point for part in UNSTEADY) else (self.times + 1) // 2


def passed(trace: Trace, eventful: Trace) -> list[Passed]:
    """The points of an ordinary run, then those that only an eventful one has; each in the order of `POINTS`."""
    found: dict[str, Passed] = {}
    for lively, one in ((False, trace), (True, eventful)):
        for name in PLACES:
            for point, times in one.get(name, {}).items():
                known = point in found or (lively and not point.startswith(LIVELY))
                if not known:
                    found[point] = Passed(point, name, times, lively)
    return sorted(found.values(), key=lambda one: (one.eventful, list(POINTS).index(one.point.partition("/")[0]), one.point))


LIVELY = (
    "server.quarantine",
    "server.sweep",
    "server.certificate",
    "server.operator",
    "device.renewal",
    "worker.spill",
    "common",
    "server.session.heard/progress",
    "device.session.say/progress",
    "device.session.said/progress",
)
"""What an eventful run is for; what else it passes, the ordinary one does as well."""


def stops(do: str) -> dict[str, list[dict[str, Any]]]:
    """A server that is told to stop in mid-round, and something on the way."""
    return {
        "server": [
            {"at": "server.session.heard/probe", "hit": 2, "do": "ask:term:server"},
            {"at": do.split()[1], "do": do.split()[0]},
        ]
    }


def point_cases(trace: Trace, eventful: Trace) -> list[Case]:
    """Every point that is passed: its own side killed there, and the other side; where it is at a disk, that is full."""
    cases: list[Case] = []
    for one in passed(trace, eventful):
        if one.place == "server":
            cases += [one.case("kill server", "kill"), one.case("kill device", "ask:kill:alpha")]
        elif one.place == "alpha":
            worker = one.point.startswith("worker")
            cases.append(one.case("kill device", "ask:kill:alpha" if worker else "kill"))
            cases.append(one.case("kill server", "ask:kill:server"))
            if worker:
                cases.append(one.case("kill worker", "kill"))
        else:
            cases.append(one.case("kill server", "kill"))
        if one.point.partition("/")[0] in DISK:
            cases.append(one.case("disk full", "fail:ENOSPC"))
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


def storage_cases(trace: Trace, eventful: Trace) -> list[Case]:
    """At every point the power of its machine goes: with all that was not synced, and with some of it."""
    cases = []
    for chance in (None, 1):
        for number, one in enumerate(passed(trace, eventful)):
            if chance is not None and not one.point.startswith(WRITING):
                continue
            how = "nothing unsynced is left" if chance is None else "some of it is left"
            seed = None if chance is None else number
            power = f"ask:power:{one.place}"
            cases.append(one.case(f"power fails, {how}", power, trace=True, power=one.place, chance=seed))
    return cases


SAMPLE = (
    "server.log.append.written/UpdateAccepted kill server",
    "device.outbox.moved kill device",
    "device.push.middle kill server",
    "server.object.synced/update disk full",
    "server.object.renamed/ledger power fails, nothing unsynced is left",
    "device.state.renamed/runs power fails, nothing unsynced is left",
    "worker.update.write disk full",
)
"""What `make test` plays, and one random schedule."""


def sample(trace: Trace, eventful: Trace) -> list[Case]:
    """A few of each kind. Raises KeyError when a point is no longer passed."""
    known = {case.name: case for case in (*point_cases(trace, eventful), *storage_cases(trace, eventful))}
    return [*(known[name] for name in SAMPLE), random_case(0, trace)]


def random_case(seed: int, trace: Trace, faults: int = 3) -> Case:
    """A schedule of several faults, the same for the same seed."""
    rng = random.Random(seed)
    out: dict[str, list[dict[str, Any]]] = {}
    for number in range(faults):
        name = rng.choice(("server", "server", "alpha", "beta"))
        points = sorted(point for point in trace[name] if "start" not in point.split(".")[1] or name != "server")
        point = rng.choice(points)
        hit = rng.randint(1, max(1, trace[name][point] // 2))
        what = deed(rng, name, point)
        if seed % LONG == LONG // 2 and number == 0:
            what = f"ask:{SILENT[seed // LONG % len(SILENT)]}:{LASTING}"
        out.setdefault(name, []).append({"at": point, "hit": hit, "do": what})
    return Case(f"seed {seed:03}", out, proxied=True, must=False)


JUMPS = (-240, 240, -3600, 3600, 7200, -86_400, 86_400, 6_048_000)
"""Seconds by which a clock is set: up to 70 days ahead, where certificates are due to be renewed."""


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
        (3, f"ask:jump:{rng.choice((name, other))}:{rng.choice(JUMPS)}"),
        (3, f"ask:mischief:{rng.choice((name, other))}:{rng.choice(('twice', 'late', 'swap'))}"),
        (2, f"ask:flip:{rng.choice(('cache', 'outbox', 'partial', 'objects'))}"),
    ]  # fmt: skip
    if point.partition("/")[0] in DISK:
        choices.append((8, "fail:ENOSPC"))
    return rng.choices([what for _, what in choices], [weight for weight, _ in choices])[0]
