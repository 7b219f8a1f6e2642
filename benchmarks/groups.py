"""FDLO and IALS on real weights and text: groups and probabilities of a real run, early and late (as the paper's Tables 5 to 8).

    python benchmarks/groups.py --rounds 10 --units 12 --out docs/results/groups.md

A server and two devices on this machine fine-tune SmolLM2-135M on the Python documentation; each device's budget is the
smallest with which `fp-client plan` allows the asked number of units. The tables are what the server recorded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import pydocs
from demo_fleet import DemoError, Fleet

from fp_client.template import prompt

HERE = ROOT / ".cache/groups"
MODEL = ROOT / ".cache/models/SmolLM2-135M-Instruct"
DEVICES = ("text", "numbers")
SHAPE = ["--batch", "4", "--sequence", "128", "--rank", "8"]
RUN = """\
[run]
name = "groups"
rounds = {rounds}
min_devices = 2
devices_per_round = 1.0
[model]
name = "smollm2-135m"
path = "{model}"
[lora]
rank = 8
alpha = 16
[train]
steps = 5
batch_size = 4
sequence_length = 128
gradient = "{gradient}"
learning_rate = {lr}
final_learning_rate = {lr}
[probe]
sample = "{sample}"
[pruning]
units = "{units}"
eigenvectors = "{eigenvectors}"
group_sizes = "free"  # the paper's, whose tables these are beside
"""
CLIENT = """
device = "cpu"
threads = 1
[budget]
host = "{budget}MiB"
[models."smollm2-135m"]
source = "{model}"
[data]
source = "data.jsonl"
max_held_out = 8
"""


def smallest_budget(fleet: Fleet, directory: Path, units: int) -> int:
    """The smallest budget, in MiB, that holds so many units."""
    low, high = 128, 1024
    while low < high:
        middle = (low + high) // 2
        try:
            said = fleet.command(
                "fp-client",
                "plan",
                "--dir",
                str(directory),
                "--budget",
                f"{middle}MiB",
                "--json",
                "--no-measure",
                *SHAPE,
                show="",
            )
            modes = json.loads(said)["models"][0]["modes"]
            fits = any(mode["gradient"] == "submodel" and mode["units"] >= units for mode in modes)
        except DemoError:  # exit 5: nothing fits
            fits = False
        low, high = (low, middle) if fits else (middle + 1, high)
    return low


def table(member: dict[str, Any]) -> str:
    """One device's groups in one round, as Markdown."""
    component = any(unit[-1] in "MN" for unit in member["units"])
    what = "component" if component else "layer"
    lines = [f"| group | {what}s | selection probability | drawn |", "| --- | --- | --- | --- |"]
    for number, (group, chances) in enumerate(zip(member["groups"], member["probabilities"], strict=True), 1):
        drawn = next(unit for unit in member["units"] if unit in group)
        shown = ", ".join(f"{p:.3f}" for p in chances)
        lines.append(f"| {number} | {', '.join(group)} | {shown} | {'' if component else 'layer '}{drawn} |")
    return "\n".join(lines)


def main() -> None:
    """Run, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--units", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--components", action="store_true", help="attention and feed-forward apart: twice as many groups")
    parser.add_argument("--gradient", default="submodel", choices=["submodel", "stitched", "streamed"])
    parser.add_argument("--eigenvectors", default="k", choices=["k", "k-1"])
    parser.add_argument("--sample", default="clean", choices=["clean", "raw"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    shutil.rmtree(HERE, ignore_errors=True)
    fleet = Fleet(HERE / "logs", lambda line: print("$", line))
    try:
        server = str(HERE / "server")
        fleet.command(
            "fp-server",
            "init",
            "--dir",
            server,
            "--name",
            "localhost",
            "--listen",
            "127.0.0.1",
            "--port",
            "0",
            "--enroll-port",
            "0",
        )
        fleet.daemon("server", "fp-server", "run", "--dir", server)
        fleet.wait_for(HERE / "server/endpoint.json", "the server")
        rows = pydocs.partitions(pydocs.window_check(MODEL / "tokenizer.json", 128, prompt))
        for device in DEVICES:
            directory = HERE / device
            token = fleet.command("fp-server", "token", device, "--dir", server, show="").strip()
            fleet.command("fp-client", "join", "-", "--dir", str(directory), stdin=token + "\n")
            pydocs.write(rows[device], directory / "data.jsonl")
            file = directory / "client.toml"
            address = next(text for text in file.read_text().splitlines() if text.startswith("server"))
            file.write_text(address + CLIENT.format(budget=1024, model=MODEL))
            budget = smallest_budget(fleet, directory, given.units)
            file.write_text(address + CLIENT.format(budget=budget, model=MODEL))
            print(f"{device}: {given.units} units fit in {budget} MiB")
            fleet.daemon(device, "fp-client", "run", "--dir", str(directory))
        run = HERE / "run.toml"
        run.write_text(
            RUN.format(
                rounds=given.rounds,
                model=MODEL,
                lr=given.lr,
                eigenvectors=given.eigenvectors,
                sample=given.sample,
                units="component" if given.components else "layer",
                gradient=given.gradient,
            )
        )
        fleet.command("fp-server", "start", str(run), "--dir", server)
        status: dict[str, Any] = {}
        for line in fleet.follow("fp-server", "status", "--watch", "--json", "--rounds", "all", "--dir", server):
            if line is not None:
                status = json.loads(line)
                print(f"{status['state']}: {status['rounds_done']} of {status['rounds']} rounds", flush=True)
    finally:
        fleet.stop()
    trained = [entry for entry in status["history"] if entry["committed"]]
    parts = [
        f"### Round {entry['round']}, device `{device}`\n\n{table(entry['devices'][device])}\n"
        for entry in (trained[0], trained[-1])
        for device in DEVICES
    ]
    losses = ", ".join(f"{row['loss']:.4f}" for row in status["loss"])
    parts.append(f"Full-model held-out loss after 0, 1, … rounds: {losses}\n")
    text = "\n".join(parts)
    print(text)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)


if __name__ == "__main__":
    main()
