"""The commands of `fp-server` about a whole data directory: check it, back it up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from common.errors import DamagedError
from fp_server.cli_common import HERE, Directory, Json, err, out


def verify(
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="The directory; the one of --dir if left out.")] = None,
    dir: Directory = HERE,
    json_: Json = False,
) -> None:
    """Check a whole data directory: the log, the audit trail, every object they need. Changes nothing; the server may run.

    Exits with 11 when something is damaged or missing.
    """
    from fp_server.verify import verify as check
    from fp_server.views import verdict_view

    place = directory or dir
    with err.status(Text(f"reading {place}")) as shown:
        verdict = check(place, lambda done, total: shown.update(f"reading objects, {done} of {total}"))
    if json_:
        print(json.dumps(verdict.json(), indent=1))  # noqa: T201
    else:
        out.print(verdict_view(verdict.json()))
    if verdict.damaged:
        raise typer.Exit(DamagedError.exit_code)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Examples: `fp-server verify /srv/fp`, `fp-server verify --json | jq .bad_objects`")(verify)
