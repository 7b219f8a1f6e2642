"""`make demo`: a real federated run on this machine. A server and six devices, each a process of its own, over mTLS.

Six devices with different memory budgets and different parts of the Python documentation fine-tune
SmolLM2-135M together; none of them ever holds the whole model. Every step is a command line that a
person would type; the demo shows each one. Five minutes on two fast cores, twenty-five on two slow ones. Exit code 1 when
the full model's held-out loss has not clearly fallen.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import pydocs
from demo_fleet import TOOLS, DemoError, Fleet
from demo_view import Lines, learned, live, report
from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from fp_client.data import DataSource, open_rows, split_rows
from fp_client.template import prompt

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path(".cache/models/SmolLM2-135M-Instruct")
HERE = Path(".cache/demo")
SERVER, ADAPTER, LOGS = HERE / "server", HERE / "adapter", HERE / "logs"
NAME = "smollm2-135m"
WINDOW = 128

BUDGETS = {
    "text": "120MiB", "numbers": "130MiB", "files": "150MiB", "network": "180MiB", "code": "220MiB", "time": "300MiB",
}  # fmt: skip
"""Device -> what its task may hold above the warmed worker."""

HELD_OUT = 8
"""Rows a device keeps for measuring; each is a forward pass of the full model every round."""
LONGEST_SECONDS = 3600.0

RUN = f"""\
[run]
name = "demo"
rounds = 3
seed = 1
min_devices = {len(BUDGETS)}
devices_per_round = 3            # three of the six; the paper draws 10 % of many
evaluation = "all"               # before and after, all six measure the full model: the same rows at both ends

[model]
name = "{NAME}"
path = "{{model}}"

[lora]
rank = 8
alpha = 16
start = "fresh"

[train]
gradient = "streamed"            # the full model's gradient, a layer at a time; "submodel" is the paper's
steps = 5
batch_size = 4
sequence_length = {WINDOW}
learning_rate = 1e-3             # ten times the paper's, for a run of three rounds; cosine down to 5e-6

[limits]
update_bytes = 4_000_000         # 12 of the 30 layers; streamed, memory alone would allow all of them
"""

CLIENT = """
device = "cpu"
threads = 1

[budget]
host = "{budget}"

[models."{name}"]
source = "{model}"

[data]
source = "data.jsonl"
held_out = 0.05
max_held_out = {held_out}
"""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def say(text: str) -> None:
    """A command line, as typed."""
    lines = textwrap.wrap(text, console.width - 8, break_long_words=False, break_on_hyphens=False)
    console.print(Text.assemble(("  $ ", "dim"), (" \\\n      ".join(lines), "cyan")), soft_wrap=True)


def step(text: str) -> None:
    """What comes next, in a line."""
    console.print(Text(f"\n{text}", style="bold"))


@contextmanager
def only_one() -> Iterator[None]:
    """Hold the demo's directory. Raises DemoError when another demo does."""
    HERE.parent.mkdir(exist_ok=True)
    fd = os.open(HERE.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError(f"another demo is running in {ROOT / HERE}; wait for it, or stop it") from None
        yield
    finally:
        os.close(fd)


def make_data() -> None:
    """Each device's partition, written where its client.toml will look."""
    step(f"1. Data: the documentation of this Python {sys.version.split()[0]}, a handful of related modules a device")
    fits = pydocs.window_check(MODEL / "tokenizer.json", WINDOW, prompt)
    for device, rows in pydocs.partitions(fits).items():
        if len(rows) < 2 * HELD_OUT:
            raise DemoError(
                f"this Python has only {len(rows)} docstrings for device {device}: does it run with -OO, or without them?"
            )
        pydocs.write(rows, HERE / device / "data.jsonl")
        modules = ", ".join(pydocs.PARTITIONS[device][:5])
        console.print(f"  {device:8} {len(rows):4} docstrings of {modules}, …")


def serve(fleet: Fleet) -> None:
    """A server on free ports of this machine."""
    step("2. A server: its own CA, mTLS on every connection, no torch")
    fleet.command(
        "fp-server",
        "init",
        "--dir",
        str(SERVER),
        "--name",
        "localhost",
        "--listen",
        "127.0.0.1",
        "--port",
        "0",
        "--enroll-port",
        "0",
    )
    fleet.daemon("server", "fp-server", "run", "--dir", str(SERVER))
    fleet.wait_for(SERVER / "endpoint.json", "the server")


def join(fleet: Fleet) -> None:
    """Six devices: a one-time token each, a certificate each, a budget and data of their own."""
    step("3. Six devices: a one-time token buys a certificate; client.toml says what the device has")

    def one(device: str) -> None:
        directory = HERE / device
        token = fleet.command("fp-server", "token", device, "--dir", str(SERVER), show="").strip()
        line = f"fp-server token {device} --dir {SERVER} | fp-client join - --dir {directory}"
        fleet.command("fp-client", "join", "-", "--dir", str(directory), stdin=token + "\n", show=line)
        file = directory / "client.toml"
        server = next(text for text in file.read_text().splitlines() if text.startswith("server"))
        file.write_text(server + CLIENT.format(budget=BUDGETS[device], name=NAME, model=ROOT / MODEL, held_out=HELD_OUT))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, BUDGETS))
    for device in BUDGETS:
        fleet.daemon(device, "fp-client", "run", "--dir", str(HERE / device))


def train(fleet: Fleet, begin: float) -> dict[str, Any]:
    """The run itself, watched to its end; returns the last status. Raises DemoError when it can't succeed."""
    step("4. The run: three rounds of 5 steps of 4 × 128 tokens, three of the six devices a round")
    file = HERE / "run.toml"
    file.write_text(RUN.format(model=ROOT / MODEL))
    console.print(f"  {file}: rank 8 on all linear modules, learning rate 1e-3, fresh start, streamed gradient")
    fleet.command("fp-server", "start", str(file), "--dir", str(SERVER))
    status: dict[str, Any] | None = None
    lines = Lines(console)
    shown = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else nullcontext()
    with shown as display:
        for line in fleet.follow("fp-server", "status", "--watch", "--json", "--dir", str(SERVER)):
            if line is not None:
                status = json.loads(line)
                _must_go_on(status)
            elapsed = time.monotonic() - begin
            if display is not None:
                display.update(live(status, BUDGETS, elapsed), refresh=True)
            else:
                lines.update(status, elapsed)
            if elapsed > LONGEST_SECONDS:
                raise DemoError(f"the run did not end within {LONGEST_SECONDS / 60:.0f} minutes; the logs are in {LOGS}")
    if status is None or status["state"] != "finished":
        raise DemoError(f"the run ended as {status['state'] if status else 'nothing'}; the logs are in {LOGS}")
    return status


def _must_go_on(status: dict[str, Any]) -> None:
    if status["run"] is None:
        return
    if status["problem"]:
        raise DemoError(f"the server has a problem: {status['problem']}")
    if status["paused"]:
        raise DemoError(f"the run paused: {status['paused']}; the logs are in {LOGS}")
    for name, device in status["devices"].items():
        if device["refusal"] and device["samples"] is not None:
            raise DemoError(f"device {name} can't take part: {device['refusal']}")
    for entry in [*status["history"], *([status["current"]] if status["current"] else [])]:
        for name, member in entry["devices"].items():
            if "message" in member:
                raise DemoError(
                    f"device {name} dropped out of round {entry['round']}: {member['message']} (see {LOGS / name}.log)"
                )


def use(fleet: Fleet) -> None:
    """The exported adapter, and what the model says with and without it."""
    step("6. The result: an ordinary PEFT adapter")
    said = fleet.command("fp-server", "export", "demo", "--out", str(ADAPTER), "--dir", str(SERVER))
    size = sum(file.stat().st_size for file in ADAPTER.iterdir())
    console.print(f"  {' '.join(said.split())}; {size / 2**20:.1f} MiB")
    data = DataSource(str(HERE / "text" / "data.jsonl"), heldout_max=HELD_OUT)
    rows = open_rows(data)
    asked = rows.read(split_rows(rows, data).heldout[0])
    say(f"{os.path.relpath(TOOLS)}/python examples/answer.py {MODEL} {ADAPTER} {shlex.quote(asked.instruction)}")
    console.print("  [dim]the model answers twice: some ten seconds, a minute or two on a slow machine[/dim]")
    answers = json.loads(fleet.command("python", "examples/answer.py", str(MODEL), str(ADAPTER), asked.instruction, show=""))
    same = " (the same text)" if answers["with"] == answers["without"] else ""
    for title, text in (
        ("a held-out question", asked.instruction), ("Python's own documentation", asked.output),
        ("SmolLM2-135M answers (greedy)", answers["without"]), (f"and with the adapter{same}", answers["with"]),
    ):  # fmt: skip
        console.print(f"  [dim]{title}[/dim]")
        console.print(Padding(Text(text), (0, 4)))
    console.print(
        f"  the adapter moves the question's logits by up to {answers['largest_logit_change']:.3f}; one answer after three "
        "rounds says little, the loss above is what was measured"
    )


def main() -> None:
    """All of it; exit 0 with the report, 1 with a message, 130 on Ctrl-C."""
    begin = time.monotonic()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    console.print(Panel("FedPruner: six devices fine-tune a language model that none of them holds", expand=False))
    fleet: Fleet | None = None
    try:
        with only_one():
            if not (MODEL / "model.safetensors").exists():
                raise DemoError(f"{MODEL}: no weights; run `make model`")
            shutil.rmtree(HERE, ignore_errors=True)
            fleet = Fleet(LOGS, say)
            try:
                make_data()
                serve(fleet)
                join(fleet)
                status = train(fleet, begin)
            finally:
                # From here on nothing may interrupt: what was started is stopped.
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
                fleet.stop()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, _interrupt)
            step("5. What happened (layers are 1-based; peaks are of a task above the warmed worker)")
            console.print(report(status))
            use(fleet)
            if not learned(status):
                raise DemoError("the full model's held-out loss hardly moved or rose, or could not be compared")
    except DemoError as error:
        console.print(Text.assemble(("\ndemo failed: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("\nstopped; every process that the demo started has ended")
        sys.exit(130)
    console.print(f"\n[bold]done in {time.monotonic() - begin:.0f} s[/bold]; everything is in {HERE} until the next demo")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
