"""The certificates of the server's own machine: the server's, and the operator's beside it."""

from __future__ import annotations

import logging
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from common.errors import IdentityError
from common.faults import fault
from common.files import sync_directory
from common.transport.tls import identity_of, key_pem, load_key, new_key, renewable_from, write_private
from fp_server import audit, books
from fp_server.audit import SERVER, Entry
from fp_server.certificates import Issuer, pem
from fp_server.log import Database
from fp_server.objects import stored

logger = logging.getLogger("fp_server")


class OwnCertificates:
    """``server.pem`` and ``operator.pem`` of a data directory. Whoever can write there can make them: no token is needed."""

    def __init__(self, directory: Path, database: Database) -> None:
        """Raises IdentityError when the directory has no usable CA."""
        self._directory, self._database, self._issuer = directory, database, Issuer(directory)

    def operator(self, name: str, days: float, same_key: bool = False) -> datetime:
        """Write ``operator.pem`` and ``operator.key``, for the command line beside the server; until when it is valid.

        Works beside a running server. Raises ConfigError for a bad name, StorageError when the disk is full.
        """
        books.check_name(name)
        key = load_key(self._directory / "operator.key") if same_key else new_key()
        certificate = self._issuer.client(key.public_key(), name, "operator", days)

        def work(c: sqlite3.Connection) -> None:
            books.store(c, certificate, name, "operator")
            audit.append(c, Entry(SERVER, "issue", f"operator {name}, valid until {books.until(certificate)}"))

        self._database.run(work)
        made = (
            {"operator.pem": pem(certificate)} if same_key else {"operator.key": key_pem(key), "operator.pem": pem(certificate)}
        )
        with stored(self._directory):
            _replace_all(self._directory, made)
        return certificate.not_valid_after_utc

    def server(self, names: list[str], days: float) -> datetime:
        """Write ``server.pem`` anew for these host names and addresses; until when it is valid.

        A running server shows it from the next connection on. The key stays. Raises ConfigError for what is no name.
        """
        with stored(self._directory):
            certificate = self._issuer.server(names, days)
            fault("server.certificate.written")
        entry = Entry(SERVER, "issue", f"server.pem for {', '.join(names)}, valid until {books.until(certificate)}")
        self._database.run(lambda c: audit.append(c, entry))
        return certificate.not_valid_after_utc

    def keep_valid(self, names: list[str], days: float) -> list[str]:
        """Make both anew in the last third of their validity or before it begins, and the server's when `names` are others; which
        were made.

        Raises IdentityError when the server's can't be read.
        """
        renewed: list[str] = []
        server = _read(self._directory / "server.pem")
        if not self._fresh(server) or self._issuer.names_differ(server, names):
            self.server(names, days)
            renewed.append("server.pem")
        if (self._directory / "operator.pem").exists() and self._keep_operator(days):
            renewed.append("operator.pem")
        return renewed

    def _keep_operator(self, days: float) -> bool:
        """The server does not depend on the operator's files: what is wrong with them is said, and for `fp-server operator`."""
        try:
            certificate = _read(self._directory / "operator.pem")
            if self._fresh(certificate) or self._revoked(certificate):
                return False
            self.operator(identity_of(certificate)[1], days, same_key=True)
        except IdentityError as error:
            logger.warning("%s; `fp-server operator --dir %s` makes another", error, self._directory)
            return False
        return True

    def _fresh(self, certificate: x509.Certificate) -> bool:
        """One that was made while the clock was ahead is not. Before the CA is valid the clock is behind, and nothing is made."""
        now = datetime.now(UTC)
        return now < self._issuer.begins or certificate.not_valid_before_utc <= now < renewable_from(certificate)

    def _revoked(self, certificate: x509.Certificate) -> bool:
        query, serial = "SELECT 1 FROM certificates WHERE serial = ? AND revoked IS NOT NULL", books.serial_of(certificate)
        return self._database.run(lambda c: c.execute(query, (serial,)).fetchone()) is not None


def _replace_all(directory: Path, made: dict[str, bytes]) -> None:
    """Write all of them before any takes its place: with a full disk the old key and the old certificate stay together."""
    try:
        for name, data in made.items():
            write_private(directory / f"{name}.new", data)
        fault("server.operator.written")
        for name in made:
            (directory / f"{name}.new").replace(directory / name)
        sync_directory(directory)
    finally:
        for name in made:
            (directory / f"{name}.new").unlink(missing_ok=True)


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IdentityError(f"{path}: no usable certificate ({error}); was `fp-server init` interrupted?") from None
