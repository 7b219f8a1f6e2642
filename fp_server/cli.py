"""The `fp-server` command line."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong, our own errors say
# One BLAS thread: the same sums in the same order on every machine, and no idle thread pools for months.
for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"

import typer
from rich.text import Text

from common.ending import leave_on_sigterm
from common.errors import ConfigError, FedPrunerError, IdentityError, StorageError
from common.faults import arm
from common.files import disk_full
from common.logs import OneLine
from common.version import add_version
from fp_server import cli_access, cli_data, memory
from fp_server.cli_common import HERE, DataDirectory, Directory, Json, err, out

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="The FedPruner aggregation server. Torch-free; it never sees training data.",
)  # fmt: skip
Run = Annotated[str, typer.Argument(help="The run's name; the active or newest one if left out.")]
PROGRESS_SECONDS = 15.0
"""A watch into a pipe says how far the devices are this often; what they do, whenever it changes."""
ALL = 2**32 - 1


@app.command(epilog="Example: `fp-server init --dir /srv/fp --name fp.example.org --name 10.0.0.5`")
def init(
    name: Annotated[list[str], typer.Option(help="A host name or address devices reach this server by; repeatable.")],
    dir: DataDirectory = HERE,
    listen: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Main port (mTLS); 0 picks a free one at each start.")] = 7443,
    enroll_port: Annotated[int, typer.Option(help="Enrollment port; 0 picks a free one at each start.")] = 7444,
) -> None:
    """Make a data directory: a CA, the server's certificate and an operator's."""
    from fp_server.app import initialise

    initialise(dir, name, listen, port, enroll_port)
    out.print(f"initialised {dir} for {', '.join(name)}\nnext: fp-server run --dir {dir}", highlight=False)


@app.command(epilog="Example: `fp-server run --dir /srv/fp`")
def run(
    dir: DataDirectory = HERE, verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Debug lines too.")] = False
) -> None:
    """Serve until SIGTERM; takes up again whatever was under way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    leave_on_sigterm()
    for noisy in ("grpc", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    memory.pin()
    from fp_server.app import serve
    from fp_server.verify import lacking

    if (dir / "server.toml").exists() and (lost := [one for name in ("ca", "server") for one in lacking(dir, name)]):
        raise IdentityError("; ".join(lost))
    asyncio.run(serve(dir))


@app.command(epilog="Example: `fp-server health --dir /srv/fp && echo all is well`")
def health(dir: DataDirectory = HERE, json_: Json = False) -> None:
    """Ask both ports whether they serve; exits with 7 when not. The image's health check asks the same."""
    from fp_server.health import check

    at = check(dir)
    if json_:
        print(json.dumps({"serving": True, "port": at.port, "enroll_port": at.enroll_port}))  # noqa: T201
    else:
        out.print(f"serving on port {at.port} (enrollment on {at.enroll_port})", highlight=False)


@app.command(epilog="Example: `fp-server start run.toml`")
def start(
    file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file; docs/configure-a-run.md explains every key.")],
    dir: Directory = HERE,
) -> None:
    """Start a run. Reads the model's shapes and fingerprint from the checkpoint or manifest the file names."""
    from common import config as configuration
    from common.checkpoint import Checkpoint, cached_fingerprint, load_manifest
    from fp_server.config import RunConfig
    from fp_server.operator import Operator

    config = configuration.load(file, RunConfig)
    if config.model.manifest is not None:
        manifest = load_manifest(file.parent / config.model.manifest)
    else:
        assert config.model.path is not None, "the configuration demands one of them"
        checkpoint = Checkpoint(file.parent / config.model.path)
        with err.status(Text(f"fingerprinting {checkpoint.directory}")) as shown:
            fingerprint = cached_fingerprint(
                checkpoint, dir / "cache", lambda done, total: shown.update(f"fingerprinting {done / total:.0%}")
            )
        manifest = checkpoint.manifest(config.model.name, fingerprint)
    config.check(manifest)
    name = Operator(dir).start(file.read_text(), manifest)
    out.print(f"run {name} started\nwatch it: fp-server status --watch --dir {dir}", highlight=False)
    if config.limits.min_holders == 1:
        err.print(
            "warning: limits.min_holders is 1: a layer only one device trained goes to all devices as that device's own update; "
            "limits.min_holders = 2 in the run file holds it back, and 3 what one of two holders could work out",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if why := _uncapped(dir, config.limits.max_samples):
        err.print(
            f"warning: {why}: who claims more samples than others weighs more; set limits.max_samples in the run file, or "
            "max_samples in server.toml, to what an honest device has",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _uncapped(directory: Path, most: int | None) -> str:
    """What nothing but a default caps of the samples a device claims; empty where the run (`most`) or server.toml has a cap."""
    from common import config as configuration
    from fp_server.config import ServerConfig

    default = ServerConfig.model_fields["max_samples"].default
    if most is not None and most < default:
        return ""
    if not (directory / "server.toml").exists():
        return "limits.max_samples is not set, and what the server's own file says can't be seen from here"
    try:
        most = configuration.load(directory / "server.toml", ServerConfig).max_samples
    except FedPrunerError:  # the run has been started; the server says what is wrong with its file
        return ""
    return f"a device may claim {most:,} samples" if most >= default else ""


def _entries(text: str) -> int:
    if text == "all":
        return ALL
    if not text.isdecimal() or not 1 <= int(text) < ALL:
        raise ConfigError(f"--rounds: {text!r} is neither a number from 1 on nor `all`")
    return int(text)


@app.command(epilog="Examples: `fp-server status --watch`, `fp-server status my-run --json | jq .loss`")
def status(
    run: Run = "",
    dir: Directory = HERE,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it until the run ends.")] = False,
    json_: Json = False,
    rounds: Annotated[str, typer.Option(help="How many of the last rounds and attempts to show, or `all`.")] = "10",
) -> None:
    """Show a run: devices, rounds, drawn layers, losses, bytes and peaks."""
    from fp_server.operator import Operator
    from fp_server.views import status_view

    operator, last = Operator(dir), _entries(rounds)
    if watch:
        asyncio.run(_watch(operator, run, json_, last))
    elif json_:
        print(json.dumps(operator.status(run, last), indent=1))  # noqa: T201
    else:
        out.print(status_view(operator.status(run, last)))


async def _watch(operator: Any, run: str, json_: bool, last: int) -> None:
    from rich.live import Live

    from fp_server.views import brief, status_view

    async def follow(show: Callable[[dict[str, Any]], object]) -> None:
        async for seen in operator.watch(run, last):
            show(seen)
            if seen["state"] in ("finished", "stopped"):
                return

    if json_:
        await follow(lambda seen: print(json.dumps(seen), flush=True))  # noqa: T201
    elif not out.is_terminal:
        said, known, at = "", "", 0.0

        def tell(seen: dict[str, Any]) -> None:
            nonlocal said, known, at
            line, state = brief(seen, progress=True), brief(seen)
            if state != known or (line != said and time.monotonic() - at >= PROGRESS_SECONDS):
                said, known, at = line, state, time.monotonic()
                print(line, flush=True)  # noqa: T201

        await follow(tell)
    else:
        final: dict[str, Any] = {}

        def show(seen: dict[str, Any]) -> None:
            final.update(seen)
            shown = {**seen, "history": seen["history"][-1:]} if "history" in seen else seen
            live.update(status_view(shown), refresh=True)

        # Only the latest rounds while it goes on: a picture taller than the screen would leave copies of itself behind.
        with Live(console=out, auto_refresh=False, transient=True) as live:
            await follow(show)
        out.print(status_view(final))


def _control(dir: Path, run: str, action: str) -> None:
    from fp_server.operator import Operator

    operator = Operator(dir)
    name = run or operator.status("")["run"] or ""
    state = operator.control(name, action)
    late = action == "pause" and state != "paused"
    out.print(f"run {name}: " + ("pauses when the round under way is done" if late else state), highlight=False)


@app.command()
def pause(run: Run = "", dir: Directory = HERE) -> None:
    """Open no new round; the one under way is completed."""
    _control(dir, run, "pause")


@app.command()
def resume(run: Run = "", dir: Directory = HERE) -> None:
    """Let a paused run go on."""
    _control(dir, run, "resume")


@app.command()
def stop(run: Run = "", dir: Directory = HERE) -> None:
    """End a run for good; what was committed can be exported."""
    _control(dir, run, "stop")


@app.command()
def runs(dir: Directory = HERE, json_: Json = False) -> None:
    """List all runs, newest first."""
    from fp_server.operator import Operator
    from fp_server.views import runs_table

    found = Operator(dir).runs()
    if json_:
        print(json.dumps(found, indent=1))  # noqa: T201
    else:
        out.print(runs_table(found, "" if dir == HERE else f" --dir {dir}"), soft_wrap=not found)


@app.command(epilog="Example: `fp-server export my-run --out adapter/` then load it with PEFT, or `fp-client merge`.")
def export(
    out_dir: Annotated[Path, typer.Option("--out", help="Directory to write; must not exist.")],
    run: Run = "",
    dir: Directory = HERE,
    rank: Annotated[int | None, typer.Option(help="Largest rank a module; without it nothing is lost.")] = None,
    base: Annotated[str, typer.Option(help="What to call the base model in adapter_config.json.")] = "",
) -> None:
    """Write a run's adapter as a PEFT directory. Works with or without the server running."""
    from fp_server.exporting import export_run

    with err.status(Text(f"exporting to {out_dir}")):
        said = export_run(dir, run, out_dir, base, rank)
    out.print(said, highlight=False, soft_wrap=True)


add_version(app, "fp-server")
cli_access.register(app)
cli_data.register(app)


def main() -> None:
    """Entry point: errors of ours become one line and their exit code."""
    arm(os.environ)
    try:
        app()
    except FedPrunerError as error:
        from fp_server.views import plain

        err.print(Text.assemble(("error:", "red"), " ", plain(str(error))), highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:  # where nobody looked for it
        if not disk_full(error):
            raise
        where = f"{error.filename}: " if error.filename else ""
        err.print(f"error: {where}no space left on the device; free some and try again", highlight=False, soft_wrap=True)
        sys.exit(StorageError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
