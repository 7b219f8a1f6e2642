"""A run's ledger, found in a data directory (the server need not run) or fetched from a server, as a PEFT adapter."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from common import config as configuration
from common.errors import ConfigError, NotFound
from fp_server.config import ServerConfig
from fp_server.coordinator import Coordinator
from fp_server.damage import ledger_path
from fp_server.export import export_peft
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore
from fp_server.operator import FILE, Ledger, Operator
from fp_server.rounds import RunMachine

TRIES = 5
"""How often the log is read because the server had removed a ledger's file that was in it."""


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
    with _held_ledger(directory, run) as (ledger, files):
        return _export(ledger, out, base, rank, files)


@contextlib.contextmanager
def _held_ledger(directory: Path, run: str) -> Iterator[tuple[Ledger, dict[int, FileIO]]]:
    """A run's ledger as it is at one moment, checked, and its files opened: a server beside this removes those of a round that
    is over, and an open file stays whole. Where one was gone already, the log is read again."""
    for attempt in range(TRIES):
        with open_run(directory, run) as (machine, store), contextlib.ExitStack() as held:
            files: dict[int, FileIO] = {}
            try:
                for layer, ref in machine.ledger.items():
                    files[layer] = held.enter_context(store.path(ref.digest).open("rb", buffering=0))
            except (NotFound, FileNotFoundError):
                if attempt + 1 < TRIES:
                    continue
            except OSError:
                pass  # what isn't open is opened below, where that is told of
            layers: dict[int, Path] = {}
            for layer, ref in machine.ledger.items():
                if layer in files and _digest(files[layer]) == ref.digest:
                    layers[layer] = directory / "objects" / ref.digest[:2] / ref.digest
                else:
                    layers[layer] = ledger_path(machine, store, layer, reading=True)  # raises, unless it was put back just now
                    files.pop(layer, None)
            found = Ledger(machine.name, machine.config.model.name, machine.history.committed, machine.manifest, layers)
            yield found, files
            return


def _digest(file: FileIO) -> str:
    """The digest of an open file; an empty text where the disk can't read it."""
    try:
        return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _export(ledger: Ledger, out: Path, base: str, rank: int | None, held: dict[int, FileIO] | None = None) -> str:
    dropped = export_peft(ledger.layers, ledger.manifest, out, base or ledger.model, rank, held)
    worst = max(dropped.values(), default=0.0)
    kept = "nothing dropped" if rank is None else f"at most {worst:.2%} of a module's energy dropped"
    what = f"run {ledger.run} after {ledger.rounds} rounds: {len(dropped)} modules in {len(ledger.layers)} layers"
    return f"{what} written to {out} ({kept})"
