"""The books: which certificates and tokens were issued, in log.sqlite. Each function works within a caller's transaction."""

from __future__ import annotations

import sqlite3
import time
from datetime import UTC, datetime

from cryptography import x509

from common.errors import ConfigError
from common.transport.tls import ROLES
from common.types import NAME
from fp_server.certificates import pem


def check_name(name: str) -> None:
    """Raises ConfigError when this can't be a device's or an operator's name."""
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"{name!r}: not a name (lower-case letters, digits, '.', '_', '-'; at most 63)")


def serial_of(certificate: x509.Certificate) -> str:
    """The serial number as it is kept: hexadecimal digits."""
    return f"{certificate.serial_number:x}"


def until(certificate: x509.Certificate) -> str:
    """The last day of a certificate, for people."""
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}"


def store(c: sqlite3.Connection, certificate: x509.Certificate, name: str, role: str, token: str | None = None) -> None:
    """Enter a certificate; `token`: the hash of the secret it was issued for."""
    c.execute(
        "INSERT INTO certificates (serial, name, role, token, pem) VALUES (?, ?, ?, ?, ?)",
        (serial_of(certificate), name, role, token, pem(certificate).decode()),
    )


def issued_for(c: sqlite3.Connection, token: str) -> str:
    """The certificate, PEM, that a used token became."""
    return str(c.execute("SELECT pem FROM certificates WHERE token = ?", (token,)).fetchone()[0])


def valid(c: sqlite3.Connection, name: str, role: str) -> list[x509.Certificate]:
    """The certificates of a name and role that count now, newest first."""
    rows = c.execute(
        "SELECT pem FROM certificates WHERE name = ? AND role = ? AND revoked IS NULL ORDER BY rowid DESC", (name, role)
    ).fetchall()
    found = [x509.load_pem_x509_certificate(str(row[0]).encode()) for row in rows]
    return [certificate for certificate in found if certificate.not_valid_after_utc > datetime.now(UTC)]


def known(c: sqlite3.Connection, name: str) -> bool:
    """Whether a certificate or a token was ever issued for this name."""
    return any(c.execute(f"SELECT 1 FROM {table} WHERE name = ?", (name,)).fetchone() for table in ("certificates", "tokens"))


def in_use(c: sqlite3.Connection, name: str, role: str) -> str:
    """What whoever makes a token for this name should know; empty when nobody has it."""
    for other in ROLES:
        if found := valid(c, name, other):
            text = f"{other} {name!r} has a certificate that is valid until {until(found[0])}: "
            if other != role:
                return text + f"revoking {name!r} will revoke both"
            return text + f"whoever uses this token is {name!r} too; `fp-server revoke {name}` first if that one must not stay"
    row = (name, time.time())
    if c.execute("SELECT 1 FROM tokens WHERE name = ? AND used_by IS NULL AND expires > ?", row).fetchone():
        return f"there is an unused token for {name!r} already; both can be used"
    return ""


def revoked(c: sqlite3.Connection, name: str) -> bool:
    """Whether a device was revoked and has not joined again since; whether a certificate has ended is not asked."""
    query = "SELECT 1 FROM certificates WHERE name = ? AND role = 'device' AND revoked IS NULL"
    once = c.execute("SELECT 1 FROM revocations WHERE name = ?", (name,)).fetchone() is not None
    return once and c.execute(query, (name,)).fetchone() is None
