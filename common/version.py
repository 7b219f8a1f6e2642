"""The installed version: in the first words of a session, and as ``--version`` of every command line."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def installed() -> str:
    """The installed version, for people."""
    try:
        return metadata.version("fedpruner")
    except metadata.PackageNotFoundError:
        return "unknown"


def add_version(app: typer.Typer, name: str) -> None:
    """Give the command line `name` a ``--version``."""
    import typer  # not for the daemons, which import this module too

    def show(asked: bool) -> None:
        if asked:
            typer.echo(f"{name} {installed()}")
            raise typer.Exit

    option = typer.Option(False, "--version", callback=show, is_eager=True, help="Show the installed version and exit.")

    @app.callback()
    def anything(version: bool = option) -> None:
        pass
