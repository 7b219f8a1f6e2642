"""`fp-lab`: run an experiment, see where it stands, write its results."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

# Before numpy is imported: one BLAS thread gives the same sums everywhere; torch's threads are the experiment file's.
for _name, _value in (("OPENBLAS_NUM_THREADS", "1"), ("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(_name, _value)

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from common.version import add_version
from fp_client.commands import run_app

if TYPE_CHECKING:
    from fp_lab.results import Line
    from fp_lab.runner import JobPlace

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Compare methods: whole federations in one process, with the round logic and device code of the daemons.",
)  # fmt: skip
add_version(app, "fp-lab")
out, err = Console(markup=False), Console(stderr=True, markup=False)
Directory = Annotated[Path, typer.Argument(help="An experiment's directory (--out of `fp-lab run`).")]
STOPPED = 130
"""Exit code after Ctrl-C or SIGTERM."""


FAST = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "536870912"}
"""glibc keeps what was freed for the next tensor instead of giving it back and faulting it in again."""


def as_worker(threads: int, fast: bool) -> None:
    """Start this process anew in a worker's environment, unless it has it: glibc reads its settings at the start.

    Without them memory peaks are not those of a device's worker: `fast` does without.
    """
    from fp_client.pool import worker_environment

    wanted = {
        **worker_environment(threads),
        "OPENBLAS_NUM_THREADS": "1",
        **(FAST if fast else {}),
    }  # the server's numpy: one thread
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", "fp_lab", *sys.argv[1:]], wanted)


@app.command(epilog="Example: `fp-lab run fp_lab/experiments/gradients.toml --data alpaca.jsonl --out gradients`")
def run(
    file: Annotated[Path, typer.Argument(help="An experiment file.")],
    directory: Annotated[Path, typer.Option("--out", help="Where everything goes; goes on with what is there.")],
    data: Annotated[list[str] | None, typer.Option(help="A .json or .jsonl file instead of data.sources; repeatable.")] = None,
    model: Annotated[Path | None, typer.Option(help="A checkpoint directory instead of the file's.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Only this row; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; repeatable.")] = None,
    rounds: Annotated[int | None, typer.Option(min=0, help="Stop each job after so many rounds; its schedule stays.")] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Keep freed memory: less time a step, the same losses; seconds and peaks don't count as a device's."
        ),
    ] = False,
) -> None:
    """Work on an experiment's jobs (rows × seeds) until they are done. Ctrl-C stops; run it again to go on."""
    from fp_lab.experiment import load_experiment

    experiment = load_experiment(file, data, model)
    as_worker(experiment.threads, fast)
    from fp_lab.runner import Signals, Watch, chosen, run_jobs

    jobs = chosen(experiment, directory, row or [], seed or [])
    from fp_lab.job import Stopped  # torch comes with it: not before everything asked for is known to be there

    signals = Signals()
    with signals.handled(), err.status("starting") as status:
        watch = Watch(lambda text: err.print(text, highlight=False), lambda *p: _progress(status, *p), _told)
        try:
            busy = run_jobs(experiment, file.read_text(), directory, jobs, rounds, signals, watch, fast)
        except Stopped:
            err.print("stopped; the same command goes on from here")
            raise SystemExit(STOPPED) from None
    if busy:
        err.print(f"{busy} jobs were left to other processes")


def _progress(status: Status, phase: str, done: int, total: int) -> None:
    status.update(f"{phase} {done}/{total}")


def _told(place: JobPlace, first: Line, line: Line) -> None:
    seconds = _seconds(line)
    loss = f"loss {line['loss']:.4f}" if line["loss"] is not None else "not evaluated"
    gain = f" ({first['loss'] - line['loss']:+.4f})" if line["loss"] is not None and line["round"] else ""
    err.print(f"{place.label}: round {line['round']}/{place.rounds}: {loss}{gain}, {seconds:.0f} s", highlight=False)


def _seconds(line: Line) -> float:
    """Of a round, evaluation included."""
    return float(sum(value or 0.0 for value in line["seconds"].values()))


@app.command(epilog="Example: `fp-lab status gradients`")
def status(directory: Directory) -> None:
    """Show every job: rounds done, loss, gain, seconds a round."""
    from fp_lab.runner import kept_experiment, places

    experiment = kept_experiment(directory)
    table = Table(title=experiment.name)
    for head in ("row", "seed", "rounds", "loss", "gain", "s a round", ""):
        table.add_column(head, justify="left" if head in ("row", "") else "right")
    for place in places(experiment, directory):
        lines = place.lines()
        known = [line for line in lines if line["loss"] is not None]
        done = max(0, len(lines) - 1)
        state = "running" if place.busy() else "done" if done == place.rounds else "begun" if lines else ""
        table.add_row(
            place.row.name, str(place.seed), f"{done}/{place.rounds}", f"{known[-1]['loss']:.4f}" if known else "",
            f"{known[0]['loss'] - known[-1]['loss']:+.4f}" if len(known) > 1 else "", _each(lines[1:]), state,
        )  # fmt: skip
    out.print(table)


def _each(lines: list[Line]) -> str:
    """Seconds of a round on average, evaluation included."""
    if not lines:
        return ""
    total = sum(map(_seconds, lines))
    return f"{total / len(lines):.0f}"


@app.command(epilog="Example: `fp-lab report gradients --out docs/results/gradients.md --reference full --round 5 --round 12`")
def report(
    directory: Directory,
    page: Annotated[Path | None, typer.Option("--out", help="The Markdown file; standard output when left out.")] = None,
    plot: Annotated[Path | None, typer.Option(help="The plot; with --out, next to the page when left out.")] = None,
    reference: Annotated[str | None, typer.Option(help="The row whose gain counts as 100 %.")] = None,
    round_: Annotated[
        list[int] | None, typer.Option("--round", min=1, help="A column: after so many rounds; repeatable.")
    ] = None,
) -> None:
    """Write the results so far as Markdown tables and a plot."""
    from fp_lab.report import collect, default_rounds, draw, markdown
    from fp_lab.runner import kept_experiment

    experiment = kept_experiment(directory)
    results = collect(experiment, directory)
    rounds = sorted(set(round_ or default_rounds(results)))
    if plot is None and page is not None:
        plot = page.with_suffix(".png")
    near = os.path.relpath(plot, page.parent) if plot is not None and page is not None else ""
    text = markdown(experiment, results, rounds, reference, near)
    if plot is not None:
        draw(results, plot)
    if page is None:
        typer.echo(text)
    else:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)


def main() -> None:
    """Entry point: errors of ours become one line and their exit code."""
    run_app(app)
