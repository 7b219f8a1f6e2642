"""The commands of `fp-server` about a whole data directory: check it, back it up."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from common.errors import DamagedError
from fp_server.cli_common import HERE, DataDirectory, Json, err, out


def verify(
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="The directory; the one of --dir if left out.")] = None,
    dir: DataDirectory = HERE,
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
        if verdict.head:
            out.print(f"event log head {verdict.head[:16]}…", highlight=False)
        if verdict.audit_head:  # whole and on a line of its own: it is the one to be noted
            out.print(f"audit head {verdict.audit_head}", highlight=False, soft_wrap=True)
    if verdict.damaged:
        raise typer.Exit(DamagedError.exit_code)


def backup(
    target: Annotated[
        Path, typer.Option("--out", help="What to write: a directory, or an archive when it ends in .tar; must not exist.")
    ],
    dir: DataDirectory = HERE,
    without_damaged: Annotated[
        bool, typer.Option("--without-damaged", help="Leave damaged or missing objects out and name them, instead of giving up.")
    ] = False,
    json_: Json = False,
) -> None:
    """Copy a data directory, consistent while its server works: log, objects, configuration, certificates and all keys (0600)."""
    from fp_server.backup import backup as make
    from fp_server.verify import lacking
    from fp_server.views import counted, size

    with err.status(Text(f"backing up {dir} to {target}")) as shown:
        made = make(dir, target, lambda done, total: shown.update(f"copying objects, {done} of {total}"), without_damaged)
    lost = [said for name in ("ca", "server") for said in lacking(dir, name)] if made.missing else []
    warnings = [*(f"{said}, and not in the backup" for said in made.bad), *lost, *filter(None, [made.warning])]
    for said in warnings:
        err.print(f"warning: {said}", highlight=False, soft_wrap=True)
    if json_:
        print(json.dumps({**asdict(made), "out": str(made.out)}))  # noqa: T201
    else:
        log = f"{counted(made.events, 'event')} (event log head {made.head[:16]}…)"
        objects = f"{made.objects} of {made.needed} objects" if made.left_out else counted(made.objects, "object")
        keys = [whose for name, whose in (("server.key", "the server"), ("ca.key", "its CA")) if name not in made.missing]
        held = f"it holds the keys of {' and '.join(keys) or 'no server'}: keep it where nobody else reads"
        lacks = f"\nnot in it: {', '.join(made.missing)}" if made.missing else ""
        said = f"{made.out}: {log}, {objects} of {size(made.bytes)}{lacks}\n{held}"
        out.print(said, highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Examples: `fp-server verify /srv/fp`, `fp-server verify --json | jq .bad_objects`")(verify)
    app.command(epilog="Examples: `fp-server backup --dir /srv/fp --out /backup/fp-monday.tar`")(backup)
