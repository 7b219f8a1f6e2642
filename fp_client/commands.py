"""What the commands share: consoles, a progress bar, and which model is meant."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from common.errors import ConfigError, FedPrunerError
from common.faults import arm
from fp_client.config import FILE, ClientConfig

# No markup: messages and paths hold square brackets of their own.
out, err = Console(highlight=False, markup=False), Console(stderr=True, highlight=False, markup=False)

Directory = Annotated[
    Path,
    typer.Option("--dir", envvar="FP_CLIENT_DIR", help="The device directory: certificate, client.toml, policy.toml, caches."),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
HERE = Path()


def at(directory: Path) -> str:
    """What to write behind a command that is named to a person, so that it works on the same directory."""
    return "" if directory == HERE else f" --dir {shlex.quote(str(directory))}"


@contextlib.contextmanager
def bar(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; call it with (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


def only_model(config: ClientConfig, name: str, directory: Path) -> str:
    """The model asked for, or the only one configured. Raises ConfigError."""
    if name:
        return name
    if len(config.models) != 1:
        known = ", ".join(sorted(config.models)) or "none"
        raise ConfigError(f"{directory / FILE}: say which model with --model (configured: {known})")
    return next(iter(config.models))


def run_app(app: typer.Typer) -> None:
    """Run a command line: errors of ours become one line and their exit code."""
    arm(os.environ)
    try:
        app()
    except FedPrunerError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
