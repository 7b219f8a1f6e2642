"""What can be done with a data directory in hand, whether its server runs or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import config as configuration
from common.errors import ConfigError
from fp_server import audit
from fp_server.audit import Row
from fp_server.config import ServerConfig
from fp_server.log import Database
from fp_server.operator import FILE, Operator
from fp_server.own import OwnCertificates


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[tuple[ServerConfig, Database]]:
    """Raises ConfigError when this is no server's directory."""
    if not (directory / "log.sqlite").exists():
        raise ConfigError(f"{directory}: not a server directory; run this on the server's machine, with its --dir")
    config = configuration.load(directory / "server.toml", ServerConfig)
    database = Database(directory / "log.sqlite")
    try:
        yield config, database
    finally:
        database.close()


def new_operator(directory: Path, name: str) -> str:
    """Make ``operator.pem`` and ``operator.key`` anew; a line for a person. Raises ConfigError, IdentityError, StorageError."""
    with _opened(directory) as (config, database):
        end = OwnCertificates(directory, database).operator(name, config.certificate_days)
    return f"{directory / 'operator.pem'}: operator {name!r}, valid until {end:%Y-%m-%d}"


def new_certificate(directory: Path) -> str:
    """Make ``server.pem`` anew for the names in server.toml; a line for a person. Raises ConfigError, IdentityError."""
    with _opened(directory) as (config, database):
        end = OwnCertificates(directory, database).server(config.names, config.certificate_days)
    return f"{directory / 'server.pem'}: for {', '.join(config.names)} and this machine, valid until {end:%Y-%m-%d}"


def audited(directory: Path, since: float) -> Iterable[Row]:
    """The audit trail from a time on: of a data directory, or from the server an operator's directory has joined."""
    if (directory / FILE).exists() and not (directory / "log.sqlite").exists():
        return Operator(directory).audit(since)
    return _read(directory, since)


def _read(directory: Path, since: float) -> Iterator[Row]:
    with _opened(directory) as (_, database):
        yield from audit.read(database, since)
