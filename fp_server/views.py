"""What a person sees of a status: tables made from the JSON that scripts get."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def size(count: float | None) -> str:
    """Bytes for a person."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def plain(text: str, style: str = "") -> Text:
    """Another machine's words: no markup is read in them, and control characters can't steer the terminal."""
    return Text("".join(c if c.isprintable() else " " for c in text), style=style)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def runs_table(runs: list[dict[str, Any]]) -> RenderableType:
    """All runs, newest first."""
    if not runs:
        return Text("no runs yet; start one with `fp-server start RUN.toml`")
    table = Table("run", "state", "method", "model", "rounds", "held-out loss")
    for run in runs:
        first, last = run["loss_first"], run["loss_last"]
        loss = "–" if first is None else f"{first:.4f} → {last:.4f}"
        words = (run["run"], run["state"], run["method"], run["model"], f"{run['rounds_done']} of {run['rounds']}", loss)
        table.add_row(*map(plain, words))
    return table


def status_view(status: dict[str, Any]) -> RenderableType:
    """One run and the devices."""
    if status["run"] is None:
        connected = ", ".join(status["connected"]) or "none"
        return plain(f"no run yet; devices connected: {connected}")
    parts: list[RenderableType] = [_headline(status)]
    if status["problem"]:
        parts.append(plain(f"problem: {status['problem']}", "bold red"))
    if status["paused"]:
        parts.append(plain(f"paused: {status['paused']}", "yellow"))
    if status["state"] not in ("finished", "stopped"):
        parts.append(_devices(status))
    rounds = status["history"] + ([status["current"]] if status["current"] else [])
    if rounds:
        if (left := status["history_first"] - 1) > 0:
            parts.append(Text(f"{left} earlier rounds and attempts are not shown (--rounds N or --rounds all)", style="dim"))
        parts.append(_rounds(rounds, {row["rounds_done"]: row["loss"] for row in status["loss"]}))
    return Group(*parts)


def _headline(status: dict[str, Any]) -> Text:
    text = Text()
    text.append(status["run"], style="bold")
    text.append(plain(f"  {status['state']}  {status['method']} on {status['model']}, "))
    text.append(f"{status['rounds_done']} of {status['rounds']} rounds, gradient {status['gradient']}, start {status['start']}")
    if status["loss_first"] is not None:
        text.append(f"\nfull-model held-out loss {status['loss_first']:.4f} → {status['loss_last']:.4f}")
    return text


def _devices(status: dict[str, Any]) -> Table:
    table = Table("device", "", "budget", "units", "samples", "doing", title="devices", title_justify="left")
    current = status["current"]["devices"] if status["current"] else {}
    for name, device in status["devices"].items():
        doing = device["refusal"]
        if (member := current.get(name)) is not None:
            doing = member["stage"]
            if "progress" in member:
                p = member["progress"]
                doing += f" ({p['phase']} {p['done']}/{p['total']})"
            if "message" in member:
                doing += f": {member['message']}"
        mark = Text("●", style="green" if device["connected"] else "red")
        units = str(device["units"]) if device["units"] else "–"
        samples = "–" if device["samples"] is None else str(device["samples"])
        table.add_row(plain(name), mark, size(device["budget_bytes"]), units, samples, plain(doing))
    return table


def _rounds(rounds: list[dict[str, Any]], losses: dict[int, float]) -> Table:
    table = Table(
        "round", "device", "groups", "layers drawn", "up", "peak predicted", "peak measured", "submodel loss", "outcome",
        title="rounds (layers are 1-based)", title_justify="left",
    )  # fmt: skip
    for entry in rounds:
        done = entry["round"] - 1
        name = "end" if entry["evaluation"] else str(entry["round"])
        if entry["attempt"] > 1:
            name += f" ({entry['attempt']}. attempt)"
        loss = losses.get(done)
        before = "" if loss is None else f"full-model held-out loss {loss:.4f}"
        table.add_row(
            name,
            f"{len(entry['devices'])} devices",
            "",
            before,
            size(entry["bytes_up"]),
            "",
            "",
            "",
            plain(entry["closed"] or ""),
        )
        if entry["evaluation"]:
            continue
        for device, member in entry["devices"].items():
            trained = "loss_last" in member
            loss_text = f"{_loss(member['loss_first'])} → {_loss(member['loss_last'])}" if trained else ""
            table.add_row(
                "", plain(device), str(len(member["groups"])) if "groups" in member else "",
                " ".join(member.get("units", [])), size(member["update_bytes"]) if trained else "",
                size(member["predicted_peak_bytes"]) if trained else "",
                size(member["measured_peak_bytes"]) if trained else "", loss_text,
                plain(member.get("message", member["stage"])),
            )  # fmt: skip
        table.add_section()
    return table
