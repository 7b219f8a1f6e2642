"""What a person sees of a status: tables made from the JSON that scripts get."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.errors import NotRenderableError
from rich.table import Table
from rich.text import Text

from common.errors import ProtocolError
from fp_server.audit import OK, Row

T = TypeVar("T")


def _of_a_server(view: Callable[..., T]) -> Callable[..., T]:
    """What is shown came over the wire, from a server that may be of another version, or say anything."""

    @functools.wraps(view)
    def shown(*args: Any, **how: Any) -> T:
        try:
            return view(*args, **how)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, NotRenderableError) as error:
            why = f"{type(error).__name__}: {str(error)[:100]}"
            raise ProtocolError(f"what the server said can't be shown ({why}); --json prints it as it came") from None

    return shown


def size(count: float | None) -> str:
    """Bytes for a person."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def plain(text: str, style: str = "") -> Text:
    """Another machine's words: no markup is read in them, and control characters can't steer the terminal."""
    return Text("".join(c if c.isprintable() else " " for c in text), style=style)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _progress(progress: dict[str, Any]) -> str:
    """A device's phase and its share; what is counted differs from phase to phase."""
    done, total = progress["done"], progress["total"]
    return f"{progress['phase']} {100 * min(done, total) // total} %" if total else str(progress["phase"])


@_of_a_server
def runs_table(runs: list[dict[str, Any]], options: str = "") -> RenderableType:
    """All runs, newest first. `options`: of the command that would start one."""
    if not runs:
        return plain(f"no runs yet; start one with `fp-server start RUN.toml{options}`")
    table = Table("run", "state", "method", "model", "rounds", "held-out loss")
    for run in runs:
        words = (run["run"], run["state"], run["method"], run["model"], f"{run['rounds_done']} of {run['rounds']}", _change(run))
        table.add_row(*map(plain, words))
    return table


def _change(run: dict[str, Any]) -> str:
    """The held-out loss at first and now; one figure as long as it was measured once."""
    first, last = run["loss_first"], run["loss_last"]
    if first is None:
        return "–"
    return f"{first:.4f}" if first == last else f"{first:.4f} → {last:.4f}"


def _whose(run: dict[str, Any]) -> str:
    """Whose data the first and the last loss were measured on."""
    first, last = run["loss_devices"]
    if run["loss_same_devices"]:
        return f"on the data of the same {devices(first)}"
    if run["loss_first"] == run["loss_last"]:
        return f"on the data of {devices(first)}"
    return f"on the data of {devices(first)} at first and {devices(last)} now, not the same ones (run.evaluation)"


def _names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def devices(count: int) -> str:
    """``1 device``, ``3 devices``."""
    return counted(count, "device")


def counted(count: int, one: str, many: str = "") -> str:
    """``1 entry``, ``3 entries``."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def _are(count: int) -> str:
    return f"{count} {'is' if count == 1 else 'are'}"


@_of_a_server
def brief(status: dict[str, Any], progress: bool = False) -> str:
    """One line: where the run stands and what each device of the round under way does, if asked how far it is with it."""
    if status["run"] is None:
        return "no run yet"
    text = f"{status['run']}: {status['state']}, {status['rounds_done']} of {status['rounds']} rounds"
    if status["loss_first"] is not None:
        text += f", full-model held-out loss {_change(status)}"
    if (current := status["current"]) is not None:
        doing = (
            f"{name} {member['stage']}" + (f" ({_progress(member['progress'])})" if progress and "progress" in member else "")
            for name, member in current["devices"].items()
        )
        text += f"; {_name(current)}: {', '.join(doing)}"
    return plain(text).plain


@_of_a_server
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
        text.append(f"\nfull-model held-out loss {_change(status)}")
        more = "; measured again with the next round" if status["loss_first"] == status["loss_last"] else ""
        text.append(f"\n  {_whose(status)}{more}", style="dim")
    if status["state"] == "gathering":
        if waited := status.get("awaited_devices"):  # an older server says nothing of it
            text.append(plain(f"\nthe final evaluation waits for {_names(waited)}, at most run.progress_timeout_seconds"))
        if status["rounds_done"] == status["rounds"]:
            return text
        able = sum(device["connected"] and device["units"] > 0 for device in status["devices"].values())
        needed = status.get("needed_devices", status["min_devices"])  # an older server says nothing of it
        why = "run.min_devices" if needed == status["min_devices"] else "of fewer not run.min_updates would be drawn"
        text.append(f"\nwaits for {needed} able devices ({why}); {_are(able)} here")
    return text


def _devices(status: dict[str, Any]) -> Table:
    head = f"units of {status['model_units']}" if "model_units" in status else "units"  # an older server says nothing of it
    table = Table("device", "", "budget", head, "samples", "doing", title="devices", title_justify="left")
    current = status["current"]["devices"] if status["current"] else {}
    for name, device in status["devices"].items():
        doing = device["refusal"] or ("ready" if device["connected"] else "away")
        if (member := current.get(name)) is not None:
            doing = member["stage"]
            if "progress" in member:
                doing += f" ({_progress(member['progress'])})"
            if "message" in member:
                doing += f": {member['message']}"
        if not device["connected"] and device.get("revoked"):  # an older server says nothing of it
            doing = "revoked"
        mark = Text("●", style="green") if device["connected"] else Text("○", style="red")
        units = str(device["units"]) if device["units"] else "–"
        if status["gradient"] == "auto" and device["gradient"]:
            units += f" {device['gradient']}"
        samples = "–" if device["samples"] is None else str(device["samples"])
        table.add_row(plain(name), mark, size(device["budget_bytes"]), units, samples, plain(doing))
    return table


def spans(labels: list[str]) -> str:
    """Unit names, runs of layers joined: ``1-4 7N 14 24-30``. A layer's two components together are its number."""
    layers = [label.rstrip("MN") for label in labels]
    parts: list[list[str]] = []
    for label in dict.fromkeys(n if layers.count(n) > 1 else label for n, label in zip(layers, labels, strict=True)):
        if parts and label.isdigit() and parts[-1][-1].isdigit() and int(label) == int(parts[-1][-1]) + 1:
            parts[-1].append(label)
        else:
            parts.append([label])
    return " ".join(part[0] if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _rounds(rounds: list[dict[str, Any]], losses: dict[int, float]) -> Group:
    """A line and a narrow table a round; fits 80 columns for device names of up to some 12 letters."""
    parts: list[RenderableType] = []
    for entry in rounds:
        parts.append(_round_line(entry, losses.get(entry["round"] - 1)))
        if not entry["evaluation"]:
            parts += _round_table(entry)
            parts += _gradient_table(entry)
    return Group(*parts)


def _name(entry: dict[str, Any]) -> str:
    """What a round is called."""
    if entry["evaluation"]:
        return "final evaluation" if entry["rounds_done"] else "first evaluation"
    return f"round {entry['round']}"


def _round_line(entry: dict[str, Any], loss: float | None) -> Text:
    name = _name(entry)
    if entry["attempt"] > 1:
        name += f", attempt {entry['attempt']}"
    said = [devices(len(entry["devices"]))]
    if loss is not None:
        said.append(f"full-model held-out loss {loss:.4f}" + ("" if entry["evaluation"] else " before it"))
    if entry["bytes_up"] is not None:
        said.append(f"up {size(entry['bytes_up'])}, down {size(entry['bytes_down'])}")
    if entry["closed"] and not entry["committed"] and not entry["evaluation"]:
        said.append(f"not counted: {entry['closed']}")
    return Text.assemble((f"\n{name}", "bold"), plain("  " + ", ".join(said)))


def _round_table(entry: dict[str, Any]) -> list[RenderableType]:
    """The devices of a round; what is long is said below, or the table would not fit."""
    said: list[RenderableType] = []
    table = Table("device", "units drawn", "up", "peak (planned)", "training loss", "", box=None, header_style="dim")
    for device, member in entry["devices"].items():
        trained, (word, reason) = "loss_last" in member, _apart(member)
        peak = f"{size(member['measured_peak_bytes'])} ({size(member['predicted_peak_bytes'])})" if trained else ""
        table.add_row(
            plain(device), spans(member.get("units", [])),
            size(member["update_bytes"]) if trained else "", peak,
            f"{_loss(member['loss_first'])} → {_loss(member['loss_last'])}" if member.get("loss_last") is not None else "",
            plain(word or ("" if trained else member["stage"])),
        )  # fmt: skip
        if reason:
            said.append(plain(f"{device}: {reason}", "dim"))
    return [table, *said]


def _apart(member: dict[str, Any]) -> tuple[str, str]:
    """What set a device apart, in a word and in full; both empty when nothing did."""
    if message := member.get("message"):
        return "revoked" if member.get("revoked") else "dropped", message
    review = member.get("review")
    if review is None or review["outlier"] is None:
        return "", ""
    word = "left out" if review["rejected"] else "stands out"
    return word, f"{word}: {review['outlier']}"


def _gradient_table(entry: dict[str, Any]) -> list[RenderableType]:
    """How each device made its gradient, how long a step took, and how near the full model's gradient it was.

    Left out where there is nothing to tell but plain submodels; the cosine, where no device has measured it.
    """
    measured = any(member.get("fidelity") is not None for member in entry["devices"].values())
    heads = ["device", "gradient", "a step (expected)", *(["cosine with the full model's"] if measured else [])]
    table = Table(*heads, box=None, header_style="dim")
    for device, member in entry["devices"].items():
        seconds, cosine, mode = member.get("step_seconds"), member.get("fidelity"), member.get("gradient")
        if mode is None or (mode == "submodel" and seconds is None and cosine is None):
            continue
        expected = member.get("predicted_step_seconds")
        step = ("–" if seconds is None else f"{seconds:.2f} s") + ("" if expected is None else f" ({expected:.2f} s)")
        said = ("exact" if mode == "streamed" else "") if cosine is None else f"{cosine:.3f}"
        if cosine is not None and (units := member.get("unit_fidelity")):
            said += f" (units {min(units.values()):.3f} to {max(units.values()):.3f})"
        table.add_row(plain(device), mode, step, *([said] if measured else []))
    return [table] if table.row_count else []


def audit_json(row: Row) -> dict[str, Any]:
    """An audit entry for scripts."""
    who, what = row.entry.actor, row.entry
    return {
        "seq": row.seq, "time": row.time, "actor": who.name, "role": who.role, "serial": who.serial, "address": who.address,
        "action": what.action, "object": what.object, "outcome": what.outcome, "hash": row.hash,
    }  # fmt: skip


NOTHING = "nothing in the audit trail for that time"


def audit_lines(rows: Iterable[Row]) -> Iterator[str]:
    """Who did what, oldest first: for a pipe a line an entry, its columns separated by tabs, nothing cut."""
    for row in rows:
        yield "\t".join(plain(word).plain for word in _audit_words(row))


def audit_table(rows: Iterable[Row]) -> RenderableType:
    """Who did what, oldest first. The port a call came from is nobody's address, and left out here."""
    table = _folded("time", "who", "what", "of what", "outcome", "from", box=None, pad_edge=False, header_style="dim")
    for row in rows:
        *words, address = _audit_words(row)
        address = re.sub(r"^(\d+\.\d+\.\d+\.\d+|\[.+\]):\d+$", r"\1", address)
        table.add_row(*(plain(word, "" if row.entry.outcome == OK else "red") for word in (*words, address)))
    return table if table.row_count else Text(NOTHING)


def _audit_words(row: Row) -> tuple[str, ...]:
    who, what = row.entry.actor, row.entry
    at = f"{datetime.fromtimestamp(row.time):%Y-%m-%d %H:%M:%S}"
    object_ = re.sub(r"valid for (\d+) s$", lambda m: f"valid for {_span(int(m[1]))}", what.object)
    return at, f"{who.role} {who.name}".strip() or "–", what.action, object_, what.outcome, who.address or "–"


def _span(seconds: int) -> str:
    """A duration as it was typed, nearly always."""
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds % length == 0 and (seconds > length or (seconds == length and unit != "d")):
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _folded(*heads: str, **how: Any) -> Table:
    """A table whose words are never cut, so that they can be copied."""
    table = Table(**how)
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


UNSEEN = "not looked at"


def verdict_view(found: dict[str, Any]) -> RenderableType:
    """What `fp-server verify` found, from the JSON that scripts get."""
    table = _folded("what", "", "found")

    def row(what: str, good: bool | None, said: str) -> None:
        mark = (
            Text("–", style="dim") if good is None else Text("ok", style="green") if good else Text("damaged", style="bold red")
        )
        table.add_row(plain(what), mark, plain(said))

    for what, sound, count, one, many in (
        ("event log", found["log_sound"], found["events"], "event", "events"),
        ("audit trail", found["audit_sound"], found["audit_entries"], "entry", "entries"),
    ):
        if sound is not False:  # then a problem says why not
            row(what, sound, f"{counted(count, one, many)}, each follows from the one before" if sound else UNSEEN)
    for problem in found["problems"]:
        row("problem", False, problem)
    for run, state in found["runs"].items():
        row(f"run {run}", True, state)
    looked, good = found["objects_looked_at"], found["objects"] - len(found["bad_objects"])
    there = f"{good} of {found['objects']} are there and sound, {size(found['object_bytes'])}"
    row("objects needed", not found["bad_objects"] if looked else None, there if looked else UNSEEN)
    for bad in found["bad_objects"]:
        row(bad["digest"][:16] + "…", False, f"{', '.join(bad['uses'])}: {bad['problem']}; {bad['advice']}")
    for what, files, said in (
        ("orphans", found["orphans"], "nothing refers to; a server removes them when it starts"),
        ("leftovers", found["leftovers"], "of what is under way, or was interrupted"),
        ("quarantine", found["quarantine"], "damaged; nothing uses them"),
    ):
        none = "none" if looked or what != "orphans" else UNSEEN
        row(what, None, f"{counted(len(files), 'file')}, {size(sum(files.values()))}, {said}" if files else none)
    for note in found["notes"]:
        row("note", None, note)
    return table
