"""What a person sees of the demo: live progress, and the report at the end. Made from `fp-server status --json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

Status = Mapping[str, Any]

STILL = 0.01
"""A smaller change of a loss than this is called no change: the held-out set is some 1,200 tokens."""
DOING = {
    "": "waits", "fetch": "fetches", "probe": "probes the full model", "load": "loads its layers", "train": "trains",
    "fidelity": "compares its gradient", "push": "uploads",
}  # fmt: skip


BRIEF = {"starts", "begins", "gets its layers", DOING["fetch"], DOING["load"]}
"""Moments too short for a line of their own."""
QUIET = 15.0
"""Seconds without a line after which one says how far everybody is."""


def mib(count: float | None) -> str:
    """Bytes as whole MiB, or KiB when small."""
    if count is None:
        return "–"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB" if count else "0"


def in_mib(count: float | None) -> str:
    """The same below a head that names the unit."""
    return "–" if count is None else f"{count / 2**20:.{0 if count >= 10 * 2**20 else 1}f}"


def ranges(layers: list[str]) -> str:
    """Layer names shortened: ``1-4 7 9-11``."""
    numbers = sorted(int(layer) for layer in layers)
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return " ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


class Measured(NamedTuple):
    """The full model's held-out loss, and the devices whose rows it was measured on."""

    loss: float
    devices: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.loss:.4f} ({len(self.devices)} devices)"


def losses(status: Status) -> dict[int, Measured]:
    """Completed rounds -> full-model held-out loss, only where every device that was asked has reported."""
    rounds = [*status["history"], *([status["current"]] if status["current"] else [])]
    partly = {r["rounds_done"] for r in rounds if any("loss" not in member for member in r["devices"].values())}
    return {
        entry["rounds_done"]: Measured(entry["loss"], tuple(entry["devices"]))
        for entry in status["loss"]
        if entry["rounds_done"] not in partly
    }


def headline(status: Status) -> str:
    """Where the run stands."""
    current = status["current"]
    if status["state"] == "finished":
        return "finished"
    if current is None:
        return "waiting for all six devices" if not status["history"] else "between rounds"
    if current["evaluation"]:
        asked = f"{len(current['devices'])} devices measure the full model"
        return f"final evaluation: {asked} once more" if current["rounds_done"] else f"first evaluation: {asked}"
    return f"round {current['round']} of {status['rounds']}"


def doing(status: Status, device: str) -> str:
    """What a device does now."""
    current = status["current"]
    if status["state"] == "finished":
        return "done"
    if current is None:
        seen = status["devices"][device]
        if not seen["connected"]:
            return "starts"
        return f"ready, holds {seen['units']} layers" if seen["units"] else "plans its memory"
    member = current["devices"].get(device)
    if member is None:
        return "waits"
    stage: str = member["stage"]
    if stage == "done":
        return "done"
    if stage == "dropped":
        return f"dropped out: {member['message']}"
    progress = member.get("progress")
    if progress is None:
        starting = {"probing": "begins", "choosing": "gets its layers", "training": DOING["load"]}
        return starting.get(stage, stage)
    phase = str(progress["phase"])
    return DOING.get(phase, phase)


def _share(status: Status, device: str) -> float | None:
    """How much of what a device does now is done."""
    current = status["current"]
    progress: Mapping[str, int] | None = (current["devices"].get(device) or {}).get("progress") if current else None
    return None if progress is None or not progress["total"] else min(1.0, progress["done"] / progress["total"])


def _bar(status: Status, device: str, width: int = 16) -> str:
    if (share := _share(status, device)) is None:
        return ""
    filled = round(width * share)
    return "━" * filled + "·" * (width - filled) + f" {int(100 * share)} %"


def live(status: Status | None, budgets: Mapping[str, str], elapsed: float) -> RenderableType:
    """The table that updates while the run goes on."""
    if status is None or status["run"] is None:
        return Text(f"{elapsed:4.0f} s  the server starts the run")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, width in (("device", 9), ("budget", 8), ("layers it draws", 30), ("doing", 22), ("", 24)):
        table.add_column(name, min_width=min(width, 9), max_width=width, no_wrap=name != "layers it draws")
    for device in budgets:
        if device not in status["devices"]:
            table.add_row(device, budgets[device], "", "done" if status["state"] == "finished" else "starts", "")
            continue
        member = ((status["current"] or {}).get("devices") or {}).get(device, {})
        style = "green" if member.get("stage") == "done" else ""
        table.add_row(
            device, budgets[device], ranges(member.get("units", [])), doing(status, device), _bar(status, device), style=style
        )
    known = losses(status)
    curve = "  →  ".join(str(found) for _, found in sorted(known.items())) or "not measured yet"
    head = Text.assemble((headline(status), "bold"), f"   {elapsed:.0f} s\nfull-model held-out loss: {curve}")
    return Group(head, table)


class Lines:
    """Progress as plain lines, where there is no terminal: one when a device's work changes, and one after a while without."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, str] = {}
        self._said = 0.0

    def update(self, status: Status | None, elapsed: float) -> None:
        """Print what is new."""
        if status is None or status["run"] is None:
            return
        self._tell("", headline(status), elapsed)
        for device in status["devices"] if status["state"] != "finished" else ():
            if (what := doing(status, device)) not in BRIEF:
                self._tell(device, what, elapsed)
        if elapsed - self._said >= QUIET:
            far = [
                f"{device} {100 * share:.0f} %" for device in status["devices"] if (share := _share(status, device)) is not None
            ]
            self._tell("", "so far: " + ", ".join(far) if far else f"{headline(status)}, still", elapsed, again=True)

    def _tell(self, who: str, what: str, elapsed: float, again: bool = False) -> None:
        if again or self._last.get(who) != what:
            if not again:
                self._last[who] = what
            self._said = elapsed
            self._console.print(f"{elapsed:5.0f} s  {who or 'server':9} {what}", highlight=False, markup=False)


def report(status: Status) -> RenderableType:
    """The rounds, as a table for a person, and what to make of them."""
    parts: list[RenderableType] = []
    known = losses(status)
    trained = _trained(status)
    for entry in trained:
        before = known.get(entry["rounds_done"])
        probes = [member["probe_peak_bytes"] for member in entry["devices"].values() if "probe_peak_bytes" in member]
        title = Text.assemble(
            (f"Round {entry['round']}", "bold"), f"  full-model held-out loss before it {before or 'not measured'}",
            f"\n{len(entry['devices'])} devices, up {mib(entry['bytes_up'])}, down {mib(entry['bytes_down'])}, ",
            f"{len(entry['changed_layers'])} layers changed, largest probe peak {mib(max(probes, default=None))}",
        )  # fmt: skip
        parts += [title, _round(entry, status), Text("")]
    if trained:
        parts += [_groups(trained[-1], status), Text(""), _verdict(trained, known)]
    return Group(*parts)


def learned(status: Status) -> bool:
    """Whether the full model's held-out loss fell, over the same devices before the first round and after the last."""
    both = _ends(_trained(status), losses(status))
    return both is not None and both[1].loss < both[0].loss - STILL


def _trained(status: Status) -> list[Mapping[str, Any]]:
    """The committed rounds."""
    return [r for r in status["history"] if not r["evaluation"] and r["committed"]]


def _ends(trained: list[Mapping[str, Any]], known: Mapping[int, Measured]) -> tuple[Measured, Measured] | None:
    """The held-out loss before the first round and after the last, where the same devices have measured both."""
    before, after = known.get(0), known.get(trained[-1]["round"]) if trained else None
    return None if before is None or after is None or before.devices != after.devices else (before, after)


def _by_budget(entry: Mapping[str, Any], status: Status) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(entry["devices"].items(), key=lambda item: (status["devices"][item[0]]["budget_bytes"] or 0, item[0]))


def _round(entry: Mapping[str, Any], status: Status) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")  # all of it fits 80 columns
    table.add_column("device", min_width=8)
    table.add_column("groups", justify="right")
    table.add_column("layers drawn,\none a group", ratio=1, min_width=18)
    for name in ("up", "budget", "predicted", "measured"):
        table.add_column(f"{name}\nMiB", justify="right", no_wrap=True)
    table.add_column("training\nloss", no_wrap=True)
    for device, member in _by_budget(entry, status):
        if "update_bytes" not in member:
            table.add_row(device, "", Text(member.get("message", member["stage"]), style="red"), "", "", "", "", "")
            continue
        table.add_row(
            device, str(len(member["groups"])), ranges(member["units"]), in_mib(member["update_bytes"]),
            in_mib(status["devices"][device]["budget_bytes"]), in_mib(member["predicted_peak_bytes"]),
            in_mib(member["measured_peak_bytes"]),
            f"{member['loss_first']:.2f} → {member['loss_last']:.2f}",
        )  # fmt: skip
    return table


def _groups(entry: Mapping[str, Any], status: Status) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(min_width=8)
    table.add_column()
    for device, member in _by_budget(entry, status):
        if "groups" in member:
            groups = sorted(member["groups"], key=lambda group: min(int(layer) for layer in group))
            table.add_row(device, "  │  ".join(ranges(group) for group in groups))
    title = Text.assemble(
        (f"Groups of similar layers in round {entry['round']}", "bold"),
        ", by each device's own data (1-based; one layer of each is drawn)",
    )
    return Group(title, table)


def _verdict(trained: list[Mapping[str, Any]], known: Mapping[int, Measured]) -> Text:
    members = [m for r in trained for m in r["devices"].values() if "loss_last" in m]
    first = sum(m["loss_first"] for m in members) / len(members)
    last = sum(m["loss_last"] for m in members) / len(members)
    text = Text.assemble(("What the losses say. ", "bold"))
    text.append(
        f"Within a round the training loss went from {first:.2f} at the first step to {last:.2f} at the last, on "
        "average; each is one batch, so a few tenths are noise. "
    )
    if (both := _ends(trained, known)) is None:
        text.append("The full model's held-out loss was not measured by the same devices, so nothing is said of it.")
        return text
    before, after = both
    change = after.loss - before.loss
    word = "improved" if change < -STILL else "got worse" if change > STILL else "hardly moved"
    text.append(f"The full model's held-out loss {word}: {before.loss:.4f} → {after.loss:.4f} ({change:+.4f})", style="bold")
    text.append(f", over the held-out rows of the same {len(after.devices)} devices. ")
    text.append(
        "Each device trained its layers with the full model's gradient, streamed a layer at a time within its budget. With "
        'gradient = "submodel", the paper\'s, the layers left out are skipped in training too; on real weights that gradient '
        "has little to do with the full model's, and the full model hardly learns."
    )
    return text
