"""The commands of `fp-server` about who may do what: tokens, certificates, revocation, the audit trail."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import ConfigError, IdentityError
from fp_server.cli_common import HERE, DataDirectory, Directory, Json, err, out

if TYPE_CHECKING:
    from fp_server.audit import Row

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def duration(text: str, flag: str) -> int:
    """Seconds from ``90s``, ``30m``, ``24h``, ``7d``. Raises ConfigError naming the flag."""
    match = re.fullmatch(r"(\d+)([smhd]?)", text)
    if match is None:
        raise ConfigError(f"{flag}: {text!r} is not a duration (for example 90s, 30m, 24h, 7d)")
    return int(match[1]) * _UNITS[match[2]]


def since(text: str) -> float:
    """Seconds since the epoch from a duration before now, or a date or time as ISO 8601 writes it. Raises ConfigError."""
    if not text:
        return 0.0
    if re.fullmatch(r"\d+[smhd]?", text):
        return time.time() - duration(text, "--since")
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError:
        raise ConfigError(
            f"--since: {text!r} is neither a duration (24h, 7d) nor a date (2026-01-31, 2026-01-31T12:00)"
        ) from None


def token(
    name: Annotated[str, typer.Argument(help="The device's or operator's name, unique in the federation.")],
    dir: Directory = HERE,
    role: Annotated[str, typer.Option(help="device or operator.")] = "device",
    ttl: Annotated[str, typer.Option(help="How long it can be used: 90s, 30m, 24h, 7d.")] = "24h",
) -> None:
    """Print a one-time join token for `fp-client join` (an operator's: for `fp-server join`)."""
    from fp_server.operator import Operator

    made = Operator(dir).token(name, role, duration(ttl, "--ttl"))
    if made.warning:
        err.print(f"warning: {made.warning}", highlight=False, soft_wrap=True)
    print(made.text)  # noqa: T201  plain, so that it can be piped


def revoke(
    name: Annotated[str, typer.Argument(help="Whose certificates.")],
    dir: Directory = HERE,
    force: Annotated[
        bool, typer.Option("--force", help="Also a name this server has no record of: after an older backup was restored.")
    ] = False,
) -> None:
    """Revoke every certificate and unused token of a name, and end whatever it has under way."""
    from fp_server.operator import Operator
    from fp_server.views import counted

    certificates, tokens = Operator(dir).revoke(name, force)
    void = f"; {counted(tokens, 'unused token')} void" if tokens else ""
    out.print(f"revoked {counted(certificates, 'certificate')} of {name}{void}", highlight=False)


def join(
    token: Annotated[
        str, typer.Argument(help="The token that `fp-server token NAME --role operator` printed; - reads it from standard input.")
    ],
    dir: Annotated[Path, typer.Option("--dir", help="The operator's directory to make; not a server's.")],
    again: Annotated[
        bool, typer.Option("--again", help="Replace a certificate that is still good for long; the key is kept.")
    ] = False,
    json_: Json = False,
) -> None:
    """Turn an operator's token into a directory from which all commands work against the server, on any machine."""
    from fp_server.operator import join as enroll

    text = sys.stdin.readline() if token == "-" else token
    joined = enroll(text, dir, lambda line: None if json_ else err.print(line, highlight=False, soft_wrap=True), again)
    if json_:
        print(json.dumps({"name": joined.name, "role": joined.role, "server": joined.server, "dir": str(dir)}))  # noqa: T201
    else:
        said = f"joined {joined.server} as {joined.role} {joined.name!r}\nnext: fp-server runs --dir {dir}"
        out.print(said, highlight=False, soft_wrap=True)


def _needs(directory: Path, *files: str) -> None:
    """Raises IdentityError where a server's directory has lost one of them."""
    from fp_server.verify import lacking

    lost = [said for name in ("ca", "server") for said in lacking(directory, name)]
    if (directory / "server.toml").exists() and (
        said := "; ".join(one for one in lost if one.startswith(tuple(f"{directory / file} " for file in files)))
    ):
        raise IdentityError(said)


def operator(
    dir: DataDirectory = HERE, name: Annotated[str, typer.Option(help="The name in the certificate.")] = "operator"
) -> None:
    """Make the operator's certificate in a data directory anew, with a new key: after it was revoked, lost or let expire.

    Works with or without the server running, and needs nothing but the directory.
    """
    from fp_server.maintenance import new_operator

    _needs(dir, "ca.pem", "ca.key")
    out.print(new_operator(dir, name), highlight=False, soft_wrap=True)


def certificate(dir: DataDirectory = HERE) -> None:
    """Make the server's certificate anew for the `names` in server.toml. A running server shows it to the next who connects."""
    from fp_server.maintenance import new_certificate

    _needs(dir, "ca.pem", "ca.key", "server.key")
    out.print(new_certificate(dir), highlight=False, soft_wrap=True)


def audit(
    dir: Directory = HERE,
    since_: Annotated[str, typer.Option("--since", help="Only what is younger: 24h, 7d, or a date (2026-01-31).")] = "",
    verify: Annotated[bool, typer.Option("--verify", help="Check the chain of hashes instead, and print its head.")] = False,
    head: Annotated[str, typer.Option(help="With --verify: an audit head noted earlier, in full; it must still be there.")] = "",
    json_: Json = False,
) -> None:
    """Show who did what: tokens, certificates, runs, and what was refused. In a data directory the server need not run."""
    from fp_server.audit import verify as check
    from fp_server.maintenance import audited
    from fp_server.views import NOTHING, audit_json, audit_lines, audit_table, counted

    if head and not verify:
        raise ConfigError("--head: goes with --verify")
    if head and re.fullmatch(r"[0-9a-fA-F]{64}", head) is None:  # a slip of whoever copied it is no tampering
        raise ConfigError(f"--head: {head!r} is not a full hash (64 hex digits)")
    rows = audited(dir, 0.0 if verify else since(since_))
    if verify:
        at = 0

        def noted() -> Iterator[Row]:
            nonlocal at
            for row in rows:
                at = row.seq if row.hash == head.lower() else at
                yield row

        last = check(noted(), head.lower())
        count, found = (last.seq, last.hash) if last is not None else (0, "")
        if json_:
            print(json.dumps({"entries": count, "head": found}))  # noqa: T201
        else:
            entries = counted(count, "entry", "entries")
            said = f"{entries}, each follows from the one before; audit head {found or '(none)'}"
            contains = f"\nit contains {head.lower()[:16]}… as entry {at}" if head else ""
            out.print(said + contains, highlight=False, soft_wrap=True)
    elif json_:
        for row in rows:
            print(json.dumps(audit_json(row)))  # noqa: T201
    elif out.is_terminal:
        out.print(audit_table(rows))
    else:
        some = False
        for line in audit_lines(rows):
            some = True
            print(line)  # noqa: T201
        if not some:
            print(NOTHING)  # noqa: T201


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Examples: `fp-server token phone-17 --ttl 24h`, `fp-server token alice --role operator`")(token)
    app.command(epilog="Example: `fp-server revoke phone-17`")(revoke)
    app.command(epilog="Example: `fp-server join fp1.eyJ… --dir ~/fp-operator`, then `fp-server status --dir ~/fp-operator`")(
        join
    )
    app.command(epilog="Example: `fp-server operator --dir /srv/fp`")(operator)
    app.command(epilog="Example: `fp-server certificate --dir /srv/fp`")(certificate)
    app.command(epilog="Examples: `fp-server audit --since 7d`, `fp-server audit --json | jq .actor`")(audit)
