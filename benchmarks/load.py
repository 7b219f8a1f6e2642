"""A thousand connected devices on one server: its memory, its file descriptors, and how late its commands arrive.

    python benchmarks/load.py [--devices 1000] [--per-round 100] [--minutes 30] [--out load.jsonl]

A real `fp-server` process with the product's defaults; the devices are sessions without torch in this process, each with a
certificate, a channel and a stream of its own, that speak the real protocol: plan, probe, assignment, update (2 MiB) over mTLS.
Rounds follow each other without a pause. Every 2 s the server's resident memory, descriptors and CPU time are read and appended
to --out. Growth is that of each minute's least value (what is above it is rounds at work) in the minutes after a warm-up of 60
rounds: by then 2 of 1,000 devices have not been in one, and a session takes some 0.1 MiB more from its first round on. How late
a command is: from the moment its event was made (its time in the log, before it is committed) until the device has decoded it.
Exit code 1 when a device saw an error, memory or descriptors grew, or the 99th percentile was over a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.numpy import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "contract"))

from server_side import Server, digest_of, fetch, hello, plan_report, probe_report, read, ready_for, run_toml

from common.pb import objects_pb2, objects_pb2_grpc, session_pb2, session_pb2_grpc
from common.transport import serde, wire
from common.types import Assignment, ModelManifest, ModuleShape, ProbeTask
from fp_server import events as e
from fp_server.log import Database, EventLog
from fp_server.validation import expected_shapes

RANK, UNITS = 16, 8
MANIFEST = ModelManifest(
    "load", "llama", 24, 512, 32_000,
    tuple(ModuleShape(f"self_attn.{name}_proj", 512, 512) for name in "koqv"),
    "ef" * 32,
)  # fmt: skip
"""8 of 24 layers with four modules of 512 x 512 at rank 16: an update of 2 MiB."""
EVERY = 2.0
"""Seconds between looks at the server."""
ROUND_SECONDS = 120.0
"""A warm-up whose rounds take longer than this is a server that stands still."""
OVER = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
"""How a fetch and a push end whose task is over."""
SLOPE = 1.0
"""MiB in ten minutes that resident memory may grow by."""


@dataclass
class Seen:
    """What the devices have seen together."""

    late: dict[tuple[str, str, int, int], float] = field(default_factory=dict)
    """(command, device, round, attempt) -> when it was decoded, seconds since the epoch."""
    errors: list[str] = field(default_factory=list)
    connected: int = 0
    pushed: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    stopping: bool = False
    """The run is being stopped: a device that is just fetching or pushing is told that its task is over."""

    def failed(self, device: str, error: Exception) -> None:
        """Note an error, unless it says that the task is over and the run is being stopped."""
        if isinstance(error, grpc.aio.AioRpcError):
            if not (self.stopping and error.code() in OVER):
                self.errors.append(f"{device}: {error.code().name}: {error.details()}")
        else:
            self.errors.append(f"{device}: {type(error).__name__}: {error}")


class LoadDevice:
    """One device: a session that answers every task at once with values of its own."""

    def __init__(self, server: Server, name: str, pool: np.ndarray[Any, np.dtype[np.float32]], seen: Seen, clock: Any) -> None:
        self.server, self.name, self.pool, self.seen, self.clock = server, name, pool, seen, clock
        self._pushes: set[asyncio.Task[None]] = set()
        self._had: set[str] = set()

    async def live(self, pause: float) -> None:
        """Until the run has ended; any error is noted, and ends this device."""
        await asyncio.sleep(pause)
        try:
            async with self.server.channel(self.name) as channel:
                call = session_pb2_grpc.SessionsStub(channel).Open()
                await call.write(hello())
                await read(call)
                self.seen.connected += 1
                while True:
                    message = await read(call)
                    if message.WhichOneof("body") == "ended":
                        return
                    await self._answer(channel, call, message)
        except Exception as error:
            self.seen.failed(self.name, error)
        finally:
            for pushing in self._pushes:
                pushing.cancel()

    async def _answer(self, channel: grpc.aio.Channel, call: Any, message: session_pb2.ServerMessage) -> None:
        match message.WhichOneof("body"):
            case "plan":
                spec = serde.run_spec_from_pb(message.plan.spec)
                report = plan_report(spec.run, MANIFEST, UNITS)
                await call.write(session_pb2.DeviceMessage(plan=serde.plan_report_to_pb(report)))
            case "probe":
                task = serde.probe_task_from_pb(message.probe)
                self._note("probe", task)
                for item in task.adapter:
                    if item.ref.digest not in self._had:
                        self.seen.bytes_down += len(await fetch(channel, item.ref.digest))
                self._had = {item.ref.digest for item in task.adapter}
                await call.write(
                    session_pb2.DeviceMessage(probe=serde.probe_report_to_pb(probe_report(task, self.name, MANIFEST.layers)))
                )
            case "assignment":
                assignment = serde.assignment_from_pb(message.assignment)
                self._note("assignment", assignment)
                pushing = asyncio.create_task(self._push(channel, assignment))
                self._pushes.add(pushing)
                pushing.add_done_callback(self._pushes.discard)
            case "cancel" if self.seen.stopping:  # the round that the run's end broke off
                pass
            case other:  # a cancelled task: no device here is ever late
                raise AssertionError(f"the server said {other}: {str(message)[:300]}")

    def _note(self, command: str, task: ProbeTask | Assignment) -> None:
        self.seen.late[command, self.name, task.key.round, task.key.attempt] = self.clock()

    async def _push(self, channel: grpc.aio.Channel, assignment: Assignment) -> None:
        data = self._update(assignment)
        ready = ready_for(assignment.key, data)

        async def pieces() -> AsyncIterator[objects_pb2.PushMessage]:
            yield objects_pb2.PushMessage(header=serde.ready_to_pb(ready, 0))
            for begin in range(0, len(data), wire.CHUNK):
                yield objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=data[begin : begin + wire.CHUNK]))

        try:
            stub = objects_pb2_grpc.ObjectsStub(channel)
            await stub.Offset(objects_pb2.OffsetRequest(key=serde.key_to_pb(ready.key), ref=serde.ref_to_pb(ready.ref)))
            await stub.Push(pieces())
            self.seen.pushed += 1
            self.seen.bytes_up += len(data)
        except Exception as error:
            self.seen.failed(f"{self.name}: push", error)

    def _update(self, assignment: Assignment) -> bytes:
        """Random factors: a window of the pool that no other device has in this round."""
        at = int(digest_of(f"{self.name}/{assignment.key.round}".encode())[:8], 16)
        tensors = {}
        for name, shape in expected_shapes(assignment, MANIFEST).items():
            size = shape[0] * shape[1]
            begin = at % (self.pool.size - size)
            tensors[name], at = self.pool[begin : begin + size].reshape(shape), at + size
        return save(tensors)


def look(process: psutil.Process, begin: float, seen: Seen) -> dict[str, Any]:
    """The server now."""
    with process.oneshot():
        cpu = process.cpu_times()
        return {
            "at": round(time.monotonic() - begin, 1), "rss": process.memory_info().rss, "fds": process.num_fds(),
            "threads": process.num_threads(), "cpu": cpu.user + cpu.system, "pushed": seen.pushed, "errors": len(seen.errors),
        }  # fmt: skip


def floor(samples: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Each whole minute's sample with the least value: the first and the last minute of `samples` are parts of one."""
    minutes: dict[int, dict[str, Any]] = {}
    for sample in samples:
        minute = int(sample["at"] // 60)
        if minute not in minutes or sample[key] < minutes[minute][key]:
            minutes[minute] = sample
    return list(minutes.values())[1:-1]


def slope(samples: list[dict[str, Any]], key: str) -> float:
    """Least-squares growth of a sampled value, in ten minutes; nan of fewer than three samples."""
    if len(samples) < 3:
        return math.nan
    return statistics.linear_regression([s["at"] for s in samples], [s[key] for s in samples]).slope * 600


def lateness(server: Server, run: str, seen: Seen) -> tuple[list[float], list[str]]:
    """Seconds from each command's event to its device, and what should not have been.

    That is: commands of closed rounds that never came to their device, devices that were out of a round, further attempts, rounds
    that were closed for another reason than the usual.
    """
    database = Database(server.directory / "log.sqlite")
    issued: dict[tuple[str, str, int, int], float] = {}
    closed: set[tuple[int, int]] = set()
    wrong: list[str] = []
    try:
        for at, event in EventLog(database).replay(run):
            match event:
                case e.RoundOpened():
                    issued |= {("probe", device, event.key.round, event.key.attempt): at for device in event.drawn}
                    wrong += [f"{event.key} is another attempt"] if event.failed else []
                case e.Assigned():
                    issued["assignment", event.device, event.key.round, event.key.attempt] = at
                case e.DeviceDropped():
                    wrong.append(f"{event.device} is out of {event.key}: {event.message}")
                case e.RoundClosed():
                    closed.add((event.key.round, event.key.attempt))
                    if event.reason != "every drawn device has delivered or dropped out":
                        wrong.append(f"{event.key} was closed: {event.reason}")
    finally:
        database.close()
    wrong += [f"{key} never came" for key in issued if key[2:] in closed and key not in seen.late]
    return [seen.late[key] - at for key, at in issued.items() if key in seen.late], wrong


async def drive(given: argparse.Namespace, server: Server, names: list[str], console: Console) -> dict[str, Any]:
    """Connect everybody, let rounds go by, stop; the figures."""
    offset = time.time() - time.monotonic()
    rng, seen = np.random.default_rng(0), Seen()
    pool = (0.01 * rng.standard_normal(4 << 20)).astype(np.float32)
    toml = run_toml(
        rounds=1_000_000, min_devices=given.devices, devices_per_round=float(given.per_round), final_evaluation=False,
        lora_rank=RANK, lora_alpha=16.0, lora_broadcast_rank=8,
    )  # fmt: skip
    assert server.process is not None
    process, begin = psutil.Process(server.process.pid), time.monotonic()
    devices = [LoadDevice(server, name, pool, seen, lambda: offset + time.monotonic()) for name in names]
    living = [asyncio.create_task(device.live(i / given.joins)) for i, device in enumerate(devices)]
    samples: list[dict[str, Any]] = []
    run, rounds, warmed, warm = "", 0, 0.0, 0
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console) as bar:
        shown = bar.add_task("connecting", total=given.devices)
        while seen.connected < given.devices and not seen.errors:
            bar.update(shown, completed=seen.connected)
            await asyncio.sleep(0.5)
        bar.reset(shown, total=given.minutes * 60, description="rounds")
        run = await server.begin(toml, MANIFEST)
        begun = time.monotonic()
        with given.out.open("w") as out:
            while (spent := time.monotonic() - warmed if warmed else 0.0) < given.minutes * 60 and not seen.errors:
                await asyncio.sleep(EVERY)
                samples.append(look(process, begin, seen))
                out.write(json.dumps(samples[-1]) + "\n")
                out.flush()
                done = seen.pushed // given.per_round
                if not warmed and done >= given.warm_up:
                    warmed, warm = time.monotonic(), len(samples)
                if not warmed and time.monotonic() - begun > given.warm_up * ROUND_SECONDS:
                    seen.errors.append(f"after {given.warm_up * ROUND_SECONDS:.0f} s there were {done} of {given.warm_up} rounds")
                said = f"{done} rounds{'' if warmed else f' (warm-up: {given.warm_up})'}, {samples[-1]['rss'] / 2**20:.0f} MiB"
                bar.update(shown, completed=spent, description=said)
        rounds = (await server.status(run, last_rounds=1))["rounds_done"]
        seen.stopping = True
        async with server.admin() as admin:
            from common.pb import admin_pb2

            await admin.ControlRun(admin_pb2.ControlRunRequest(run=run, action="stop"), timeout=60)
    await asyncio.wait(living, timeout=60)
    for task in living:
        task.cancel()
    settled = samples[warm:] or samples
    late, wrong = lateness(server, run, seen)
    late.sort()
    spent = samples[-1]["at"] - samples[0]["at"]
    seen.errors += wrong
    fds = [s["fds"] for s in settled]
    return {
        "devices": given.devices, "per_round": given.per_round, "minutes": round(spent / 60, 1), "rounds": rounds,
        "minutes_after_warm_up": round((settled[-1]["at"] - settled[0]["at"]) / 60, 1) if warmed else 0,
        "updates": seen.pushed, "up_mib": seen.bytes_up >> 20, "down_mib": seen.bytes_down >> 20, "errors": seen.errors[:20],
        "rss_floor_mib": [round(s["rss"] / 2**20, 1) for s in floor(settled, "rss")],
        "rss_max_mib": round(max(s["rss"] for s in samples) / 2**20, 1),
        "rss_slope_mib_10min": round(slope(floor(settled, "rss"), "rss") / 2**20, 3),
        "rss_slope_of_all_mib_10min": round(slope(settled, "rss") / 2**20, 3),
        "fds": [min(fds), max(fds)], "fds_slope_10min": round(slope(floor(settled, "fds"), "fds"), 2),
        "threads": max(s["threads"] for s in samples), "cpu_share": round((samples[-1]["cpu"] - samples[0]["cpu"]) / spent, 2),
        "commands": len(late), "late_p50": round(late[len(late) // 2], 3) if late else None,
        "late_p99": round(late[int(len(late) * 0.99)], 3) if late else None, "late_max": round(late[-1], 3) if late else None,
        "log_mib": round((server.directory / "log.sqlite").stat().st_size / 2**20, 1),
    }  # fmt: skip


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--per-round", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=30.0, help="after the warm-up")
    parser.add_argument("--warm-up", type=int, default=60, help="rounds that do not count for growth")
    parser.add_argument("--joins", type=float, default=50.0, help="new connections a second at the start")
    parser.add_argument("--out", type=Path, default=Path("load.jsonl"), help="a sample a line, as they come")
    given = parser.parse_args()
    if given.minutes < 5:
        parser.error("growth needs five whole minutes after the warm-up: --minutes 5 at least")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    console = Console(stderr=True)
    names = [f"device-{n:04}" for n in range(given.devices)]
    with tempfile.TemporaryDirectory() as directory:
        with console.status(f"{given.devices} certificates"):
            server = Server(Path(directory) / "server", ())
            server.identities(names)
        server.start()
        try:
            found = asyncio.run(drive(given, server, names, console))
        finally:
            server.kill()
        if "Traceback" in (said := server.log()):
            found["errors"].append("a traceback in the server's log: " + said[said.index("Traceback") :][:2000])
    print(json.dumps(found))
    table = Table("figure", "value")
    for name, value in found.items():
        table.add_row(name, str(value))
    console.print(table)
    flat = found["rounds"] > 0 and found["rss_slope_mib_10min"] < SLOPE and found["fds_slope_10min"] < 1
    return 0 if flat and not found["errors"] and (found["late_p99"] or 9.9) < 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
