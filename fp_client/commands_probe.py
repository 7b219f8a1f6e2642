"""`fp-client probe`: the probe on the device's own data, without a server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from common.errors import StorageError
from common.types import Kernel, Part, Positions, ProbeReport, ProbeSpec, ProbeTask, RunSpec, TaskKey, TrainSpec, UnitId
from fp_client.commands import HERE, Directory, Json, bar, only_model, out
from fp_client.config import ClientConfig, human, load_config

_COLOURS = ("#0d0887", "#5b02a3", "#9a179b", "#cb4678", "#eb7852", "#fbb32f", "#f0f921")
"""From unlike to alike (plasma); readable with colour blindness."""
_SHADES = " ░▒▓█"


def local_spec(model: str, probe: ProbeSpec) -> RunSpec:
    """A run of nobody's, so that the daemon's own code can be used without a server."""
    train = TrainSpec(1, probe.batch_size, probe.sequence_length, 1e-4, 1, 1.0, (), probe.seed)
    return RunSpec("local", model, "", "", Part.LAYER, train, probe, 0, 1)


async def run_probe(config: ClientConfig, directory: Path, model: str, spec: ProbeSpec, quiet: bool) -> ProbeReport:
    """Fingerprint (remembered), then the probe in a worker."""
    from fp_client.work import LocalWork

    work, run = LocalWork(config, directory), local_spec(model, spec)
    try:
        with bar("reading the weights once", quiet) as progress:
            run = replace(run, fingerprint=await work.fingerprint(run, lambda _, done, total: progress(done, total)))
        with bar("probing, one unit in memory at a time", quiet) as progress:
            task = ProbeTask(TaskKey("local", 0, 0), spec, ())
            return await work.probe(run, task, (), lambda _, done, total: progress(done, total))
    finally:
        await work.close()


def as_dict(report: ProbeReport) -> dict[str, Any]:
    """The report as plain values; units are 1-based labels."""
    units = [UnitId(i).label for i in range(len(report.in_out))]
    return {
        "units": units, "similarity": np.round(report.similarity.astype(float), 6).tolist(),
        "in_out": np.round(report.in_out.astype(float), 6).tolist(), "loss": report.loss, "tokens": report.tokens,
        "peak_bytes": report.peak_bytes, "seconds": report.seconds,
    }  # fmt: skip


def heat_map(similarity: np.ndarray[Any, np.dtype[np.float32]], width: int, colour: bool) -> Text:
    """The U x U matrix as cells from least to most alike: coloured, or shaded where there is no colour."""
    low, high = float(similarity.min()), float(similarity.max())
    cell = 2 if 2 * len(similarity) + 5 <= width else 1
    text = Text()
    for i, row in enumerate(similarity):
        text.append(f"{UnitId(i).label:>4} ")
        for value in row:
            level = int((float(value) - low) / max(high - low, 1e-9) * (len(_COLOURS) - 1) + 0.5)
            _cell(text, level, cell, colour)
        text.append("\n")
    text.append(f"     {low:.3f} ")
    for level in range(len(_COLOURS)):
        _cell(text, level, 2, colour)
    return text.append(f" {high:.3f}")


def _cell(text: Text, level: int, width: int, colour: bool) -> None:
    if colour:
        text.append(" " * width, style=f"on {_COLOURS[level]}")
    else:
        text.append(_SHADES[level * (len(_SHADES) - 1) // (len(_COLOURS) - 1)] * width)


def probe(
    directory: Directory = HERE,
    model: Annotated[str, typer.Option(help="A model of client.toml; the only one if left out.")] = "",
    positions: Annotated[int, typer.Option(min=2, help="Token positions in the Gram matrices.")] = 512,
    kernel: Annotated[Kernel, typer.Option(help="The CKA kernel.")] = Kernel.LINEAR,
    sample: Annotated[
        Positions, typer.Option(help="Drop attention sinks and padding (clean), or keep all (raw).")
    ] = Positions.CLEAN,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the probe batch.")] = 4,
    sequence: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the batch and of the positions.")] = 0,
    output: Annotated[Path | None, typer.Option("--out", help="Write the report there too (JSON).")] = None,
    as_json: Json = False,
) -> None:
    """Measure on this device's data how alike the model's layers are, and the full model's held-out loss."""
    config = load_config(directory)
    spec = ProbeSpec(Part.LAYER, positions, kernel, sample, batch, sequence, seed)
    report = asyncio.run(run_probe(config, directory, only_model(config, model, directory), spec, as_json))
    if output is not None:
        try:
            output.write_text(json.dumps(as_dict(report)) + "\n")
        except OSError as error:
            raise StorageError(f"{output}: can't be written: {error.strerror}") from None
    if as_json:
        typer.echo(json.dumps(as_dict(report)))
        return
    out.print("CKA between the outputs of layers (row and column), from unlike to alike:")
    out.print(heat_map(report.similarity, out.width, out.is_terminal and not out.no_color))
    table = Table(title="input against output of each layer (s of Eq. 3; high: the layer changes little)")
    table.add_column("layer", justify="right")
    table.add_column("similarity", justify="right")
    table.add_column("how much it changes (1 - s)")
    most = max(1e-9, 1 - float(report.in_out.min()))
    for i, value in enumerate(report.in_out):
        table.add_row(UnitId(i).label, f"{value:.4f}", "█" * round(30 * (1 - float(value)) / most))
    out.print(table)
    out.print(
        f"held-out loss of the full model: {report.loss:.4f} over {report.tokens} response tokens; "
        f"peak {human(report.peak_bytes)} above the warmed worker, {report.seconds:.1f} s"
    )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example:  fp-client probe --dir dev1 --sequence 256 --out probe.json")(probe)
