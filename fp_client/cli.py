"""`fp-client`: the device's command line. Light to import: no torch, and gRPC only where it is needed."""

from __future__ import annotations

import os
import sys
from typing import Annotated

# One BLAS thread and no chatter: the daemon computes nothing, and gRPC's own log says nothing that our errors do not.
for _name, _value in (("OPENBLAS_NUM_THREADS", "1"), ("OMP_NUM_THREADS", "1"), ("GRPC_VERBOSITY", "ERROR")):
    os.environ.setdefault(_name, _value)

import typer

from common.ending import leave_on_sigterm
from common.version import add_version
from fp_client import commands_doctor, commands_model, commands_plan, commands_probe
from fp_client.commands import HERE, Directory, Json, at, run_app
from fp_client.health import PATIENCE, check

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="A FedPruner device: joins a server, fine-tunes the part of a model that fits its memory, uploads LoRA factors.",
    epilog="Example:  fp-client join fp1.eyJ…  --dir dev1  &&  fp-client doctor --dir dev1  &&  fp-client run --dir dev1",
)  # fmt: skip


@app.command(epilog="Example:  fp-client join fp1.eyJlbnJvbGwi… --dir dev1   (use - to read the token from standard input)")
def join(
    token: Annotated[
        str, typer.Argument(help="The one-time token that `fp-server token` printed; - reads it from standard input.")
    ],
    directory: Directory = HERE,
    again: Annotated[
        bool, typer.Option("--again", help="Replace a certificate that is still good for long; the key is kept.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a join token into this device's certificate and a first client.toml."""
    import asyncio
    import json

    from fp_client.enroll import join as enroll

    text = sys.stdin.readline() if token == "-" else token
    say = (lambda _: None) if as_json else (lambda line: typer.echo(line, err=True))
    known = (directory / "client.toml").exists()
    joined = asyncio.run(enroll(text, directory, say=say, again=again))
    if as_json:
        typer.echo(json.dumps({"name": joined.name, "role": joined.role, "server": joined.server, "dir": str(directory)}))
    else:
        if again and known:
            then = f" with a new certificate; a daemon that runs takes it up, else `fp-client run{at(directory)}`"
        else:
            then = f"; edit {directory / 'client.toml'}, then `fp-client doctor{at(directory)}`"
        typer.echo(f"joined {joined.server} as {joined.role} {joined.name!r}{then}")


@app.command(epilog="Example:  fp-client renew --dir dev1   (the daemon does this by itself; it takes the new one up as it runs)")
def renew(directory: Directory = HERE) -> None:
    """Get a new certificate now, with the one that is still valid."""
    import asyncio

    from common.errors import UnreachableError
    from fp_client.config import load_config, need_server
    from fp_client.renewal import renew as ask
    from fp_client.rpc import Connection

    async def now() -> str:
        connection = Connection(directory, need_server(load_config(directory), directory))
        try:
            for _ in range(2):  # a refused certificate is believed the second time
                try:
                    return f"{(await ask(connection)).not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
                except UnreachableError as error:
                    away = error
            raise away
        finally:
            await connection.close()

    typer.echo(f"{directory / 'device.pem'} is renewed: valid until {asyncio.run(now())}")


@app.command(epilog="Example:  fp-client run --dir dev1   (ends with SIGTERM or Ctrl-C; exit code 7 when the server stays away)")
def run(
    directory: Directory = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Log as JSON lines.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Run the device daemon; it logs to standard error."""
    leave_on_sigterm()
    from fp_client import app as daemon

    daemon.log_to_stderr(as_json, verbose)
    daemon.run(directory)


@app.command(epilog="Example:  fp-client health --dir dev1 && echo connected")
def health(
    directory: Directory = HERE,
    patience: Annotated[float, typer.Option(min=0, help="Seconds without a session that are still well.")] = PATIENCE,
) -> None:
    """Does the daemon of this directory run, with a session? Exits with 7 when not. The image's health check asks the same."""
    typer.echo(check(directory, patience))


add_version(app, "fp-client")
for _module in (commands_plan, commands_probe, commands_doctor, commands_model):
    _module.register(app)


def main() -> None:
    """Entry point: errors of ours become one line and their exit code."""
    run_app(app)


if __name__ == "__main__":
    main()
