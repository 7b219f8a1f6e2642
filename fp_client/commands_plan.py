"""`fp-client plan`: what fits this device's memory, with the planner's breakdown, before anything is loaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from common.errors import BudgetError, ConfigError
from common.types import ProbeSpec, Quantization, Start, TrainSpec
from fp_client.commands import HERE, Directory, Json, err, out
from fp_client.config import FILE, ClientConfig, human, load_config, parse_bytes

IDLE_MARGIN = 1.1
"""A container's limit: budget plus what daemon and worker hold idle, plus a tenth."""


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


async def measure_idle(config: ClientConfig, directory: Path, model: str) -> tuple[int, int]:
    """(daemon, worker): bytes of main memory held idle, measured: this process with the daemon's imports, and a warmed worker."""
    import grpc.aio

    import fp_client.app  # noqa: F401  # the daemon's footprint: its imports, and gRPC's threads below
    from fp_client.commands_probe import local_spec
    from fp_client.measure import resident
    from fp_client.work import LocalWork

    work, channel = LocalWork(config, directory), grpc.aio.insecure_channel("localhost:1")
    try:
        channel.get_state(try_to_connect=True)
        ready = await (await work.worker(local_spec(model, ProbeSpec()))).start()
        return resident(), ready.warmed_bytes
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
    measure: Annotated[
        bool, typer.Option(help="Measure the idle daemon and worker for the container limit (takes seconds).")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show how many units fit the budget, and where the bytes go. Exits with 5 when nothing fits."""
    from fp_client import planner
    from fp_client.memory import Setting
    from fp_client.shapes import shape_of
    from fp_client.work import budget_of, resolve_device

    config = load_config(directory) if (directory / FILE).exists() else ClientConfig()
    device = resolve_device(config.device)
    try:
        limit = parse_bytes(budget) if budget else budget_of(config, device)
    except ValueError as error:
        raise ConfigError(f"--budget: {error}") from None
    spec = TrainSpec(1, batch, sequence, 1e-4, rank, 2.0 * rank, (), 0, start=start)
    probe = ProbeSpec(batch_size=batch, sequence_length=sequence)
    held = config.data.max_held_out if config.data else 64
    rows: list[dict[str, Any]] = []
    for one in candidates(config, directory, model, shape or [], quantization):
        setting = Setting(one.quantization, 2 if config.dtype == "bfloat16" else 4, one.stored, config.threads)
        layers = shape_of(one.config).layers
        row: dict[str, Any] = {"model": one.name, "quantization": one.quantization.value, "layers": layers, "budget": limit}
        targets = tuple(module.name for module in shape_of(one.config).modules)
        try:
            made = planner.plan(one.config, setting, replace(spec, targets=targets), probe, broadcast_rank, limit, held)
        except BudgetError as error:
            row |= {"units": 0, "smallest_budget": error.smallest, "refusal": str(error)}
        else:
            row |= {
                "units": made.units, "micro_batch": made.micro_batch, "checkpointing": made.checkpointing,
                "peak": made.peak_bytes, "smallest_budget": made.smallest_budget,
                "unit_bytes": made.unit_bytes[0],
                "train": {"moment": made.train.moment, "peak": made.train.peak, "rows": dict(made.train.rows)},
                "probe": {"moment": made.probe.moment, "peak": made.probe.peak, "rows": dict(made.probe.rows)},
            }  # fmt: skip
        rows.append(row)
    measured = (model or next(iter(sorted(config.models)), "")) if measure and config.data else ""
    idle = asyncio.run(_measured(config, directory, measured, as_json)) if measured else None
    container = int((limit + sum(idle)) * IDLE_MARGIN) if idle and limit and device == "cpu" else None
    if as_json:
        names = {"daemon": idle[0], "worker": idle[1]} if idle else None
        typer.echo(
            json.dumps({"device": device, "budget": limit, "idle": names, "container_limit": container, "models": rows}, indent=1)
        )
    else:
        _show(rows, limit, device)
        if idle:
            held_idle = f"idle daemon {human(idle[0])}, idle worker {human(idle[1])}"
            total = f": give the container {human(container)} (budget + idle + 10 %)" if container else ""
            out.print(f"measured: {held_idle}{total}")
        elif measure:
            out.print("container limit: budget + idle daemon and worker + 10 %; measured once a model and [data] are configured")
    if rows and not any(row["units"] for row in rows):
        raise BudgetError(str(rows[0]["refusal"]), int(rows[0]["smallest_budget"]))


async def _measured(config: ClientConfig, directory: Path, model: str, quiet: bool) -> tuple[int, int]:
    if quiet:
        return await measure_idle(config, directory, model)
    with err.status("starting a worker to measure it idle"):
        return await measure_idle(config, directory, model)


def _show(rows: list[dict[str, Any]], limit: int, device: str) -> None:
    table = Table(title=f"budget {human(limit) if limit else 'unbounded'} ({'VRAM' if device == 'cuda' else 'main memory'})")
    for name in ("model", "weights", "units", "micro", "ckpt", "peak", "+1 unit", "smallest"):
        table.add_column(name, justify="left" if name in ("model", "weights") else "right", no_wrap=True)
    for row in rows:
        fits: list[str | Text] = [Text(f"0 of {row['layers']}", "red"), "", "", "", ""]
        if row["units"]:
            keeps = "yes" if row["checkpointing"] else "no"
            fits = [
                f"{row['units']} of {row['layers']}",
                str(row["micro_batch"]),
                keeps,
                human(row["peak"]),
                human(row["unit_bytes"]),
            ]
        table.add_row(row["model"], row["quantization"], *fits, human(row["smallest_budget"]))
    out.print(table)
    for row in rows:
        for task in ("train", "probe"):
            if task in row:
                parts = ", ".join(f"{name} {human(size)}" for name, size in row[task]["rows"].items() if size)
                out.print(f"{row['model']}, {task}: {human(row[task]['peak'])} at its worst ({row[task]['moment']}): {parts}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example:  fp-client plan --dir dev1   or   fp-client plan --shape llama2-7b --budget 3GB --batch 1")(plan)
