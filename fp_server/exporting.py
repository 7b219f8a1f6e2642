"""A run's ledger, found in a data directory (the server need not run) or fetched from a server, as a PEFT adapter."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import config as configuration
from common.errors import ConfigError
from fp_server.config import ServerConfig
from fp_server.coordinator import Coordinator
from fp_server.damage import ledger_path
from fp_server.export import export_peft
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore
from fp_server.operator import FILE, Ledger, Operator
from fp_server.rounds import RunMachine


@contextlib.contextmanager
def open_run(directory: Path, run: str) -> Iterator[tuple[RunMachine, ObjectStore]]:
    """A run (the newest for an empty name) and the store of a data directory, for reading only.

    Raises ConfigError when this is no server directory, NotFound for an unknown run.
    """
    if not (directory / "log.sqlite").exists():
        raise ConfigError(f"{directory}: not a server directory")
    config = configuration.load(directory / "server.toml", ServerConfig)
    database = Database(directory / "log.sqlite")
    try:
        coordinator = Coordinator(config, EventLog(database), ObjectStore(directory))
        coordinator.names = coordinator.log.runs()
        yield coordinator.run(run), coordinator.store
    finally:
        database.close()


def export_run(directory: Path, run: str, out: Path, base: str, rank: int | None) -> str:
    """Export a run (the newest for an empty name); returns a line for a person. `directory`: a server's, or an operator's.

    Raises NotFound for an unknown run or an empty ledger, ConfigError when `out` exists, DamagedError for a damaged ledger.
    """
    if (directory / FILE).exists() and not (directory / "log.sqlite").exists():
        if out.exists():
            raise ConfigError(f"{out}: exists already; name a directory that does not")
        with tempfile.TemporaryDirectory(prefix="fp-export-") as scratch:
            return _export(Operator(directory).ledger(run, Path(scratch)), out, base, rank)
    with open_run(directory, run) as (machine, store):
        layers = {layer: ledger_path(machine, store, layer, reading=True) for layer in machine.ledger}
        found = Ledger(machine.name, machine.config.model.name, machine.history.committed, machine.manifest, layers)
        return _export(found, out, base, rank)


def _export(ledger: Ledger, out: Path, base: str, rank: int | None) -> str:
    dropped = export_peft(ledger.layers, ledger.manifest, out, base or ledger.model, rank)
    worst = max(dropped.values(), default=0.0)
    kept = "nothing dropped" if rank is None else f"at most {worst:.2%} of a module's energy dropped"
    what = f"run {ledger.run} after {ledger.rounds} rounds: {len(dropped)} modules in {len(ledger.layers)} layers"
    return f"{what} written to {out} ({kept})"
