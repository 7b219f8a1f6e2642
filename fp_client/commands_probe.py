"""`fp-client probe`: the probe on the device's own data, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from common.checkpoint import Checkpoint
from common.errors import BudgetError, ConfigError, ProtocolError, StorageError
from common.types import (
    Gradient,
    Kernel,
    Part,
    Positions,
    ProbeReport,
    ProbeSpec,
    ProbeTask,
    RunSpec,
    TaskKey,
    TrainSpec,
    UnitId,
    model_units,
)  # fmt: skip
from fp_client.commands import HERE, Directory, Json, bar, only_model, out
from fp_client.commands_plan import Units
from fp_client.config import ClientConfig, cache_dir, human, load_config, need_model
from fp_client.messages import FidelityArgs, FidelityResult, ModeFidelity
from fp_client.shapes import shape_of
from fp_client.units import keep

_COLOURS = ("#0d0887", "#5b02a3", "#9a179b", "#cb4678", "#eb7852", "#fbb32f", "#f0f921")
"""From unlike to alike (plasma); readable with colour blindness."""
_SHADES = " ░▒▓█"


def local_spec(model: str, probe: ProbeSpec, targets: tuple[str, ...] = ()) -> RunSpec:
    """A run of nobody's, so that the daemon's own code can be used without a server. Any gradient mode will do, so that no
    budget is refused that holds the least of them."""
    train = TrainSpec(1, probe.batch_size, probe.sequence_length, 1e-4, 1, 1.0, targets, probe.seed, gradient=Gradient.AUTO)
    return RunSpec("local", model, "", "", probe.part, train, probe, 0, 1)


@dataclass(frozen=True)
class Asked:
    """What is measured: the probe, and where `fidelity` is given the gradients of its units."""

    probe: ProbeSpec
    targets: tuple[str, ...]
    """The model's linear modules."""
    fidelity: FidelityArgs | None = None


async def run_probe(
    config: ClientConfig, directory: Path, model: str, asked: Asked, quiet: bool
) -> tuple[ProbeReport, FidelityResult | None]:
    """Fingerprint (remembered), then the probe in a worker, then the gradients' fidelity if asked for."""
    from fp_client.work import LocalWork

    work, run = LocalWork(config, directory), local_spec(model, asked.probe, asked.targets)
    try:
        with bar("reading the weights once", quiet) as progress:
            run = replace(run, fingerprint=await work.fingerprint(run, lambda _, done, total: progress(done, total)))
        with bar("probing, one unit in memory at a time", quiet) as progress:
            task = ProbeTask(TaskKey("local", 0, 0), asked.probe, ())
            report = await work.probe(run, task, (), lambda _, done, total: progress(done, total))
        if asked.fidelity is None:
            return report, None
        with bar("comparing gradients with the full model's", quiet) as progress:
            try:
                return report, await work.fidelity(run, asked.fidelity, lambda _, done, total: progress(done, total))
            except BudgetError as error:
                why = f"the full model's gradient: {error}"
                modes = tuple(ModeFidelity(mode, refused=why) for mode in asked.fidelity.modes)
                return report, FidelityResult(modes, report.loss)
    finally:
        await work.close()


def anatomy(config: ClientConfig, directory: Path, model: str) -> tuple[int, tuple[str, ...]]:
    """(layers, names of a layer's linear modules, sorted) of a configured model. Raises ConfigError, ModelError."""
    from fp_client.models import resolve

    section = need_model(config, model, directory)
    checkpoint = Checkpoint(resolve(section.source, cache_dir(config, directory) / "hub"))
    try:
        return checkpoint.layers, tuple(sorted(m.name for m in shape_of(checkpoint.config).modules))
    finally:
        checkpoint.close()


def fidelity_args(units: str, layers: int, modules: tuple[str, ...], probe: ProbeSpec, rank: int) -> FidelityArgs:
    """The units to compare: "2,5,9M", or how many layers, spread evenly. Raises ConfigError."""
    try:
        names = [part.strip() for part in units.split(",")]
        if len(names) == 1 and names[0].isdigit():
            if (count := int(names[0])) > layers:
                raise ValueError(f"{count} are more than there are")
            chosen = tuple(UnitId(index * layers // count) for index in range(count))
        else:
            chosen = tuple(sorted(UnitId.parse(name) for name in names))
        keep(chosen, layers, modules)
    except (ValueError, ZeroDivisionError, ProtocolError) as error:
        raise ConfigError(
            f"--fidelity {units!r}: give a number of layers (8), or units such as 2,5,9 or 3M,7N of a model with {layers} layers "
            f"({error})"
        ) from None
    spec = TrainSpec(1, probe.batch_size, probe.sequence_length, 1e-4, rank, 2.0 * rank, modules, probe.seed)
    return FidelityArgs(spec, chosen, (Gradient.SUBMODEL, Gradient.STITCHED))


def fidelity_dict(found: FidelityResult, units: tuple[UnitId, ...]) -> dict[str, Any]:
    """The comparison as plain values."""
    return {
        "units": [unit.label for unit in units], "full_model_loss": found.loss,
        "modes": {
            m.mode.value: {"refused": m.refused} if m.refused else {"overall": m.overall, "units": list(m.units), "loss": m.loss}
            for m in found.modes
        },
    }  # fmt: skip


def fidelity_table(found: FidelityResult, units: tuple[UnitId, ...]) -> Table:
    """A row a unit, a column a mode; a mode that the budget does not hold has none."""
    table = Table(title="cosine of the LoRA gradient with the full model's (1: the same direction)")
    table.add_column("unit", justify="right")
    for mode in found.modes:
        table.add_column(mode.mode.value, justify="right")

    def cells(value: Callable[[ModeFidelity], str]) -> list[str]:
        return ["–" if mode.refused else value(mode) for mode in found.modes]

    for index, unit in enumerate(units):
        table.add_row(unit.label, *cells(lambda mode, index=index: f"{mode.units[index]:+.3f}"))  # type: ignore[misc]
    table.add_section()
    table.add_row("all", *cells(lambda mode: f"{mode.overall:+.3f}"), style="bold")
    table.add_row(f"loss (full {found.loss:.3f})", *cells(lambda mode: f"{mode.loss:.3f}"))
    return table


def as_dict(report: ProbeReport, part: Part = Part.LAYER) -> dict[str, Any]:
    """The report as plain values; units are 1-based labels."""
    count = len(report.in_out) if part is Part.LAYER else len(report.in_out) // 2
    return {
        "units": [unit.label for unit in model_units(part, count)],
        "similarity": np.round(report.similarity.astype(float), 6).tolist(),
        "in_out": np.round(report.in_out.astype(float), 6).tolist(), "loss": report.loss, "tokens": report.tokens,
        "peak_bytes": report.peak_bytes, "seconds": report.seconds,
    }  # fmt: skip


def heat_map(similarity: np.ndarray[Any, np.dtype[np.float32]], labels: Sequence[str], width: int, colour: bool) -> Text:
    """The U x U matrix as cells from least to most alike: coloured, or shaded where there is no colour."""
    low, high = float(similarity.min()), float(similarity.max())
    cell = 2 if 2 * len(similarity) + 5 <= width else 1
    text = Text()
    for i, row in enumerate(similarity):
        text.append(f"{labels[i]:>4} ")
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
    units: Annotated[
        Units, typer.Option(help="What a unit is: a layer, or a component (attention or feed-forward).")
    ] = Units.LAYER,
    fidelity: Annotated[
        str,
        typer.Option(
            metavar="UNITS",
            help="Also compare the gradients of these units with the full model's: a number of layers (8), or 2,5,9 or 3M,7N.",
        ),
    ] = "",
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank of that comparison.")] = 16,
    output: Annotated[Path | None, typer.Option("--out", help="Write the report there too (JSON).")] = None,
    as_json: Json = False,
) -> None:
    """Measure on this device's data how alike the model's layers are, and the full model's held-out loss."""
    config = load_config(directory)
    spec = ProbeSpec(units.part, positions, kernel, sample, batch, sequence, seed)
    name = only_model(config, model, directory)
    layers, modules = anatomy(config, directory, name)
    compared = fidelity_args(fidelity, layers, modules, spec, rank) if fidelity else None
    report, found = asyncio.run(run_probe(config, directory, name, Asked(spec, modules, compared), as_json))
    said = as_dict(report, units.part)
    if found is not None and compared is not None:
        said["fidelity"] = fidelity_dict(found, compared.units)
    if output is not None:
        try:
            output.write_text(json.dumps(said) + "\n")
        except OSError as error:
            raise StorageError(f"{output}: can't be written: {error.strerror}") from None
    if as_json:
        typer.echo(json.dumps(said))
        return
    labels, what = said["units"], units.value
    out.print(f"CKA between the outputs of {what}s (row and column), from unlike to alike:")
    out.print(heat_map(report.similarity, labels, out.width, out.is_terminal and not out.no_color))
    table = Table(title=f"input against output of each {what} (s of Eq. 3; high: the {what} changes little)")
    table.add_column(what, justify="right")
    table.add_column("similarity", justify="right")
    table.add_column("how much it changes (1 - s)")
    most = max(1e-9, 1 - float(report.in_out.min()))
    for i, value in enumerate(report.in_out):
        table.add_row(labels[i], f"{value:.4f}", "█" * round(30 * (1 - float(value)) / most))
    out.print(table)
    if found is not None and compared is not None:
        out.print(fidelity_table(found, compared.units))
        for mode in found.modes:
            if mode.refused:
                out.print(Text(f"{mode.mode.value}: {mode.refused}", style="yellow"))
    out.print(
        f"held-out loss of the full model: {report.loss:.4f} over {report.tokens} response tokens; "
        f"peak {human(report.peak_bytes)} above the warmed worker, {report.seconds:.1f} s"
    )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example:  fp-client probe --dir dev1 --sequence 256 --out probe.json")(probe)
