"""What the commands share: consoles and options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out, err = Console(markup=False), Console(stderr=True, markup=False)  # names, paths and devices' words may hold [brackets]

Directory = Annotated[Path, typer.Option("--dir", envvar="FP_SERVER_DIR", help="The server's data directory, or an operator's.")]
DataDirectory = Annotated[Path, typer.Option("--dir", envvar="FP_SERVER_DIR", help="The server's data directory.")]
"""For what an operator's directory does not do."""
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
HERE = Path("fp-server-data")
