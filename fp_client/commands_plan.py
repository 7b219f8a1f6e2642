"""`fp-client plan`: what fits this device's memory, with the planner's breakdown, before anything is loaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from common.errors import BudgetError, ConfigError
from common.types import Gradient, Part, ProbeSpec, Quantization, RunSpec, Start, TrainSpec, model_units
from fp_client.commands import HERE, Directory, Json, err, out
from fp_client.config import FILE, ClientConfig, human, load_config, parse_bytes
from fp_client.memory import MIB
from fp_client.pace import Pace
from fp_client.planner import ModePlan

IDLE_MARGIN = 1.1
"""A container's limit: budget plus what daemon and worker hold idle, plus a tenth."""


class Units(StrEnum):
    """What FDLO groups."""

    LAYER = "layer"
    COMPONENT = "component"

    @property
    def part(self) -> Part:
        """As the planner and the probe are told; any component stands for both."""
        return Part.LAYER if self is Units.LAYER else Part.FFN


@dataclass(frozen=True)
class Candidate:
    """A model to plan for."""

    name: str
    config: Mapping[str, Any]
    quantization: Quantization
    stored: int
    """Bytes of the dtype on disk."""


def candidates(
    config: ClientConfig, directory: Path, model: str, shapes: list[str], quantization: Quantization | None
) -> list[Candidate]:
    """The models and shapes asked for; all configured models, or all common shapes, when none is. Raises ConfigError."""
    from common.checkpoint import EMBEDDING_KEY
    from common.tensorfile import ITEMSIZE
    from fp_client.shapes import CONFIGS
    from fp_client.work import LocalWork

    found = []
    if unknown := [shape for shape in shapes if shape not in CONFIGS]:
        raise ConfigError(f"--shape: {unknown[0]!r} is not known (known: {', '.join(CONFIGS)})")
    for name in [model] if model else ([] if shapes else sorted(config.models)):
        section, checkpoint = LocalWork(config, directory).open_model(name)
        stored = ITEMSIZE[checkpoint.info(EMBEDDING_KEY).dtype]
        checkpoint.close()
        found.append(Candidate(name, checkpoint.config, quantization or section.quantization, stored))
    common = shapes or ([] if found else list(CONFIGS))
    return found + [Candidate(name, CONFIGS[name], quantization or Quantization.NF4, 2) for name in common]


@dataclass(frozen=True)
class Measured:
    """This device, measured: bytes of main memory held idle by this process with the daemon's imports and by a warmed
    worker, and the pace of a model where its steps could be timed."""

    daemon: int
    worker: int
    pace: Pace | None


async def measure_device(config: ClientConfig, directory: Path, spec: RunSpec) -> Measured:
    """Start a worker and measure; takes seconds."""
    import grpc
    import grpc.aio

    import fp_client.app  # noqa: F401  # the daemon's footprint: its imports, and gRPC's threads below
    from fp_client.measure import resident
    from fp_client.work import LocalWork

    work = LocalWork(config, directory)
    channel = grpc.aio.secure_channel("localhost:1", grpc.ssl_channel_credentials())  # to nobody
    try:
        channel.get_state(try_to_connect=True)
        spec = replace(spec, fingerprint=await work.fingerprint(spec, lambda *_: None))
        ready = await (await work.worker(spec)).start()
        held = resident()
        try:
            pace = await work.pace(spec)
        except BudgetError:  # shown in the table
            pace = None
        return Measured(held, ready.warmed_bytes, pace)
    finally:
        await work.close()
        await channel.close()


def plan(
    directory: Directory = HERE,
    model: Annotated[str, typer.Option(help="A model of client.toml; all of them if left out.")] = "",
    shape: Annotated[
        list[str] | None, typer.Option(help="A common shape: smollm2-135m, tinyllama-1.1b, llama2-7b, llama2-13b.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Plan for this budget instead, for example 3GB.")] = "",
    quantization: Annotated[Quantization | None, typer.Option(help="Plan for this quantization instead.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 16,
    broadcast_rank: Annotated[int, typer.Option(min=0, help="Largest rank the server broadcasts.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 4,
    sequence: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 512,
    start: Annotated[Start, typer.Option(help="Where a round's LoRA starts.")] = Start.FRESH,
    gradient: Annotated[Gradient, typer.Option(help="Only this gradient mode; auto shows all.")] = Gradient.AUTO,
    units: Annotated[
        Units, typer.Option(help="What a unit is: a layer, or a component (attention or feed-forward).")
    ] = Units.LAYER,
    measure: Annotated[
        bool, typer.Option(help="Measure this device: idle memory for the container limit, and step times (takes seconds).")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show how many units fit the budget in each gradient mode, and where the bytes go. Exits with 5 when nothing fits."""
    from fp_client import planner
    from fp_client.memory import Setting
    from fp_client.shapes import shape_of
    from fp_client.work import budget_of, resolve_device

    if not directory.is_dir():
        raise ConfigError(f"--dir: {directory} is no directory; name the one that `fp-client join` made, or leave it out")
    config = load_config(directory) if (directory / FILE).exists() else ClientConfig()
    device = resolve_device(config.device)
    try:
        limit = parse_bytes(budget) if budget else budget_of(config, device)
    except ValueError as error:
        raise ConfigError(f"--budget: {error}") from None
    part = units.part
    train = TrainSpec(10, batch, sequence, 1e-4, rank, 2.0 * rank, (), 0, gradient=gradient, start=start)
    probe = ProbeSpec(part=part, batch_size=batch, sequence_length=sequence)
    held = config.data.max_held_out if config.data else 64
    asked = candidates(config, directory, model, shape or [], quantization)
    specs = [
        RunSpec(
            "local", one.name, "", "", part,
            replace(train, targets=tuple(module.name for module in shape_of(one.config).modules)), probe, broadcast_rank, 1,
        )
        for one in asked
    ]  # fmt: skip
    known = next((spec for spec in specs if spec.model in config.models), None) if measure and config.data else None
    measured = asyncio.run(_measured(config, directory, known, as_json)) if known else None
    rows: list[dict[str, Any]] = []
    limits = planner.Limits(disk_bytes=config.cache.max_spill)
    for one, spec in zip(asked, specs, strict=True):
        setting = Setting(one.quantization, 2 if config.dtype == "bfloat16" else 4, one.stored, config.threads)
        size = shape_of(one.config).layers * len(model_units(part, 1))
        row: dict[str, Any] = {"model": one.name, "quantization": one.quantization.value, "of": size, "budget": limit}
        pace = measured.pace if measured and spec is known and quantization is None else None
        try:
            made = planner.plan(one.config, setting, spec.train, probe, broadcast_rank, limit, held, part, limits, pace)
        except BudgetError as error:
            unbounded = planner.plan(one.config, setting, spec.train, probe, broadcast_rank, 0, held, part)
            smallest = {mode.value: size for mode, size in unbounded.smallest}
            row |= {"smallest_budget": error.smallest, "smallest_budgets": smallest, "refusal": str(error), "modes": []}
        else:
            row |= {
                "smallest_budget": made.smallest_budget,
                "smallest_budgets": {mode.value: size for mode, size in made.smallest},
                "unit_bytes": made.unit_bytes[: len(model_units(part, 1))],
                "modes": [_mode(mode) for mode in made.modes],
                "probe": {"moment": made.probe.moment, "peak": made.probe.peak, "rows": dict(made.probe.rows)},
            }
        rows.append(row)
    container = int((limit + measured.daemon + measured.worker) * IDLE_MARGIN) if measured and limit and device == "cpu" else None
    if as_json:
        idle = {"daemon": measured.daemon, "worker": measured.worker} if measured else None
        typer.echo(
            json.dumps({"device": device, "budget": limit, "idle": idle, "container_limit": container, "models": rows}, indent=1)
        )
    else:
        asked_for = f"{batch} rows of {sequence} tokens a step, rank {rank}, broadcast rank {broadcast_rank}"
        _show(rows, limit, device, asked_for)
        if measured:
            held_idle = f"idle daemon {human(measured.daemon)}, idle worker {human(measured.worker)}"
            total = f": give the container {human(container)} (budget + idle + 10 %)" if container else ""
            out.print(f"measured: {held_idle}{total}")
        elif measure:
            out.print("container limit: budget + idle daemon and worker + 10 %; measured once a model and [data] are configured")
    if rows and not any(row["modes"] for row in rows):
        raise BudgetError(str(rows[0]["refusal"]), int(rows[0]["smallest_budget"]))


def _mode(mode: ModePlan) -> dict[str, Any]:
    stream = mode.stream
    return {
        "gradient": mode.gradient.value, "units": mode.units, "micro_batch": mode.micro_batch,
        "checkpointing": mode.checkpointing,
        "peak": mode.peak_bytes, "disk": mode.disk_bytes,
        "step_seconds": mode.step_seconds or None, "prepare_seconds": mode.prepare_seconds or None,
        "train": {"moment": mode.train.moment, "peak": mode.train.peak, "rows": dict(mode.train.rows)},
        "stream": None if mode.gradient is Gradient.SUBMODEL else {
            "resident_layers": stream.resident, "read_ahead": stream.ahead, "head_resident": stream.head,
            "boundary_bytes": stream.boundary_bytes, "prefix_bytes": stream.prefix_bytes,
        },
    }  # fmt: skip


async def _measured(config: ClientConfig, directory: Path, spec: RunSpec, quiet: bool) -> Measured:
    if quiet:
        return await measure_device(config, directory, spec)
    with err.status("starting a worker to measure this device"):
        return await measure_device(config, directory, spec)


def _memory(mode: dict[str, Any]) -> str:
    """What of the stream stays in memory, in few words."""
    stream = mode["stream"]
    if stream is None:
        return "checkpointed" if mode["checkpointing"] else ""
    spilled = "" if stream["boundary_bytes"] < 0 else "spills"
    if mode["gradient"] == Gradient.STITCHED.value:
        return ", ".join(text for text in ("checkpointed" if mode["checkpointing"] else "", spilled) if text)
    head = "" if stream["head_resident"] else "head in blocks"
    stay = f"{stream['resident_layers']} layers stay" if stream["resident_layers"] else ""
    return ", ".join(text for text in (stay, "reads ahead" if stream["read_ahead"] else "", head, spilled) if text)


def _at_least(size: int) -> str:
    """A smallest budget, never rounded down: what is shown would do."""
    return f"{-(-size // MIB)} MiB"


def _show(rows: list[dict[str, Any]], limit: int, device: str, asked_for: str) -> None:
    held = f"budget {human(limit) if limit else 'unbounded'} ({'VRAM' if device == 'cuda' else 'main memory'})"
    table = Table(title=f"{held}: {asked_for}", title_justify="left", box=None, pad_edge=False, header_style="dim")
    for name in ("model", "gradient", "units", "micro", "peak", "disk", "a step", "smallest"):
        table.add_column(name, justify="left" if name in ("model", "gradient") else "right", no_wrap=name != "model")
    for row in rows:
        name = f"{row['model']} {row['quantization']}".removesuffix(" none")
        for mode in row["modes"]:
            seconds = f"{mode['step_seconds']:.2f} s" if mode["step_seconds"] else ""
            table.add_row(
                name, mode["gradient"], f"{mode['units']} of {row['of']}", str(mode["micro_batch"]), human(mode["peak"]),
                human(mode["disk"]) if mode["disk"] else "", seconds, _at_least(row["smallest_budgets"][mode["gradient"]]),
            )  # fmt: skip
            name = ""
        for gradient, size in row["smallest_budgets"].items():
            if gradient not in {mode["gradient"] for mode in row["modes"]}:
                table.add_row(name, gradient, Text(f"0 of {row['of']}", "red"), "", "", "", "", _at_least(size))
                name = ""
    out.print(table)
    for row in rows:
        if any(mode["units"] < row["of"] and mode["gradient"] != Gradient.STREAMED.value for mode in row["modes"]):
            out.print(f"{row['model']}: one more layer kept takes {' + '.join(human(size) for size in row['unit_bytes'])}")
        for mode in row["modes"]:
            chosen = _memory(mode)
            out.print(_worst(row["model"], mode["gradient"] + (f" ({chosen})" if chosen else ""), mode["train"]))
        if "probe" in row:
            out.print(_worst(row["model"], "probe", row["probe"]))


def _worst(model: str, name: str, task: dict[str, Any]) -> str:
    parts = ", ".join(f"{what} {human(size)}" for what, size in task["rows"].items() if size)
    return f"{model}, {name}: {human(task['peak'])} at its worst ({task['moment']}): {parts}"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example:  fp-client plan --dir dev1   or   fp-client plan --shape llama2-7b --budget 3GB --batch 1")(plan)
