"""What a federation has come to, judged from what `evidence.py` has found in its directory.

A run is `identical` when its bytes are the undisturbed run's. Other bytes are `explained` only when all of this holds: a device
that is missing from an attempt at a round is missing for a reason that the log gives for this very device and attempt; what was
stacked is what was accepted, less what was lost or left out; the ledger is the sum of those updates (`twin.py`); and a reference
run, in which the same devices fail at the same tasks and nothing else happens, has the same bytes.
"""

from __future__ import annotations

import json
from typing import Any

BYTES = ("ledger", "broadcast", "adapter", "weights")
"""What two runs with the same history have in common, to the bit."""

EARLY = ("quorum", "the round's time limit")
"""Reasons for which a round is closed before all have delivered: they excuse every device that is missing."""


def attempts_of(events: list[Any]) -> list[dict[str, Any]]:
    """The attempts at the rounds, as the log tells them, in order; evaluations are not among them."""
    from fp_server import events as e

    found: dict[Any, dict[str, Any]] = {}
    for x in events:
        if isinstance(x, e.RoundOpened):
            if not x.evaluate:
                found[x.key] = {
                    "round": x.key.round, "attempt": x.key.attempt, "drawn": sorted(x.drawn), "excluded": dict(x.excluded),
                    "assigned": {}, "accepted": {}, "twice": [], "lost": {}, "dropped": {}, "left_out": {}, "closed": "",
                    "aggregate": False, "stacked": None,
                }  # fmt: skip
            continue
        if (one := found.get(getattr(x, "key", None))) is None:
            continue
        if isinstance(x, e.Assigned):
            one["assigned"][x.device] = [len(x.units), x.micro_batch, x.checkpointing, str(x.gradient)]
        elif isinstance(x, e.UpdateAccepted):
            one["twice"] += [x.device] if x.device in one["accepted"] else []
            one["accepted"][x.device] = x.ref.digest
        elif isinstance(x, e.UpdatesLost):  # damaged on the disk: asked for and accepted again
            one["lost"] |= x.lost
            for device in x.lost:
                one["accepted"].pop(device, None)
        elif isinstance(x, e.DeviceDropped):
            one["dropped"].setdefault(x.device, [x.error, x.message])
        elif isinstance(x, e.UpdatesReviewed):
            one["left_out"] = dict(x.outliers) if x.reject else {}
        elif isinstance(x, e.RoundClosed):
            one["closed"], one["aggregate"] = x.reason, x.aggregate
        elif isinstance(x, e.RoundCommitted):
            one["stacked"] = sorted(x.weights)
    return list(found.values())


def _where(one: dict[str, Any]) -> str:
    return f"round {one['round'] + 1}, attempt {one['attempt'] + 1}"


def wrong(attempts: list[dict[str, Any]], devices: tuple[str, ...], rounds: int) -> list[str]:
    """What must not be in a log, whatever has happened: an accepted update that was lost or counted twice, a round that was not
    committed or was committed twice, a device that is missing and nothing says why."""
    found: list[str] = []
    for one in attempts:
        where, counts = _where(one), sorted(set(one["accepted"]) - set(one["left_out"]))
        if one["twice"]:
            found.append(f"{where}: counted twice: {one['twice']}")
        if one["stacked"] is None and (one["aggregate"] or not one["closed"]):
            found.append(f"{where}: accepted {sorted(one['accepted'])}, and neither stacked nor closed without them")
        if one["stacked"] is not None and one["stacked"] != counts:
            found.append(f"{where}: stacked {one['stacked']}, accepted and not lost or left out {counts}")
        if one["stacked"] is not None and not one["aggregate"]:
            found.append(f"{where}: stacked, and not closed to be")
        there = counts if one["stacked"] is None else one["stacked"]
        for device in sorted(set(devices) - set(there)):
            told = device in one["dropped"] or device in one["excluded"] or device in one["left_out"]
            if not told and not any(reason in one["closed"] for reason in EARLY):
                found.append(f"{where}: {device} is missing, and the log gives no reason for it")
    committed = [one["round"] for one in attempts if one["stacked"] is not None]
    if committed != list(range(rounds)):
        found.append(f"rounds committed: {[number + 1 for number in committed]} of {rounds}")
    return found


def history(found: dict[str, Any]) -> str:
    """Who took part in which attempt at which round, and in what manner: what decides a run's bytes."""
    return json.dumps(
        [
            [one["round"], one["attempt"], one["stacked"], {device: one["assigned"].get(device) for device in one["stacked"]}]
            for one in found["attempts"]
            if one["stacked"] is not None
        ]
    )


def reasons(found: dict[str, Any]) -> list[str]:
    """What the log says of everything that was not as in an undisturbed run."""
    out = list(found.get("paused", []))
    for one in found["attempts"]:
        where = _where(one)
        for what in ("excluded", "left_out"):
            out += [f"{where}: {device} left out: {why}" for device, why in one[what].items()]
        out += [f"{where}: the update of {device} was damaged and asked for again" for device in one["lost"]]
        out += [f"{where}: {device} is out: {message}" for device, (_, message) in one["dropped"].items()]
        if one["stacked"] is None:
            out.append(f"{where} closed: {one['closed']}")
    return out


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs have the same bytes."""
    return all(one[key] == other[key] for key in BYTES)


def judge(found: dict[str, Any], expected: dict[str, Any] | None, devices: tuple[str, ...], rounds: int) -> tuple[str, str]:
    """(outcome, why): ``identical``, ``other`` (to be compared with a reference), or ``failed``."""
    if found["state"] != "finished":
        return "failed", f"the run is {found['state']}"
    if found["damaged"]:
        return "failed", f"objects are missing or damaged: {found['damaged']}"
    if problems := [*wrong(found["attempts"], devices, rounds), *found["twin"]]:
        return "failed", "; ".join(problems)
    if expected is None or same(found, expected):
        return "identical", "; ".join(reasons(found))
    if history(found) == history(expected):
        return "failed", "other bytes than the undisturbed run's, and the same devices took part in the same attempts"
    return "other", "; ".join(reasons(found))


def refusals(found: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """What a reference run's devices must fail at to have this run's history: device -> tasks."""
    out: dict[str, list[dict[str, str]]] = {}
    for one in found["attempts"]:
        for device, (error, message) in one["dropped"].items():
            stage = "train" if device in one["assigned"] else "probe"
            task = {"task": f"{one['round']}/{one['attempt']}", "stage": stage, "error": error, "message": message}
            out.setdefault(device, []).append(task)
    return out


def against(found: dict[str, Any], reference: dict[str, Any]) -> tuple[str, str]:
    """(outcome, why) of a run with other bytes than the undisturbed one's, by the reference run with its history."""
    if history(found) != history(reference):
        return "failed", f"the reference run has another history: {history(reference)}; this one: {history(found)}"
    if differ := [key for key in BYTES if found[key] != reference[key]]:
        return "failed", f"other {' and '.join(differ)} than the reference run in which the same devices drop out"
    return "explained", "; ".join(reasons(found))


def contradictions(lines: list[dict[str, Any]]) -> list[str]:
    """Cases that have the history of another one, and other bytes."""
    first: dict[tuple[bool, str], dict[str, Any]] = {}
    out = []
    for line in lines:
        if line["outcome"] == "failed" or not line.get("found"):
            continue
        one = first.setdefault((line.get("eventful", False), history(line["found"])), line)
        if not same(one["found"], line["found"]):
            out.append(f"{line['name']} and {one['name']} have the same history and other bytes")
    return out
