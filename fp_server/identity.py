"""The server's own certificate authority, and one-time join tokens.

The server alone decides name, role and usages of a certificate; a CSR contributes its public key.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import sqlite3
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError, IdentityError, LimitError, TokenError
from common.token import JoinToken, secret_hash
from common.transport.tls import URI, Peer, ca_digest, key_pem, load_key, new_key, write_private
from common.types import NAME
from fp_server.limits import ServerLimits
from fp_server.log import Database

ROLES = ("device", "operator")
_CA_DAYS = 3650


def _name(common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, common), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "FedPruner")]
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _alternative_names(names: list[str]) -> x509.SubjectAlternativeName:
    entries: list[x509.GeneralName] = []
    for name in names:
        try:
            entries.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            entries.append(x509.DNSName(name))
    return x509.SubjectAlternativeName(entries)


def create_authority(directory: Path, names: list[str], days: int = 825) -> None:
    """Make ``ca.pem``/``ca.key`` and ``server.pem``/``server.key`` (0600) for these host names and addresses."""
    ca_key, now = new_key(), datetime.now(UTC)
    ca = (
        x509.CertificateBuilder()
        .subject_name(_name("FedPruner CA"))
        .issuer_name(_name("FedPruner CA"))
        .public_key(ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
                key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )  # fmt: skip
    write_private(directory / "ca.key", key_pem(ca_key))
    (directory / "ca.pem").write_bytes(_pem(ca))
    try:
        alternative = _alternative_names(names)
    except ValueError as error:
        raise ConfigError(f"--name: {names}: not host names or addresses: {error}") from None
    server_key = new_key()
    certificate = _sign(ca, ca_key, server_key.public_key(), names[0], alternative, ExtendedKeyUsageOID.SERVER_AUTH, days)
    write_private(directory / "server.key", key_pem(server_key))
    (directory / "server.pem").write_bytes(_pem(certificate))


def _sign(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    common: str,
    alternative: x509.SubjectAlternativeName,
    usage: x509.ObjectIdentifier,
    days: float,
) -> x509.Certificate:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common))
        .issuer_name(ca.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(alternative, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


class Authority:
    """Issues, looks up and revokes certificates."""

    def __init__(self, directory: Path, database: Database, most_tokens: int = ServerLimits().tokens) -> None:
        """Raises IdentityError when the directory has no usable CA."""
        self._directory, self._database = directory, database
        self.most_tokens = most_tokens
        try:
            self.ca_pem = (directory / "ca.pem").read_text()
            self._ca = x509.load_pem_x509_certificate(self.ca_pem.encode())
        except (OSError, ValueError) as error:
            raise IdentityError(f"{directory / 'ca.pem'}: no usable CA ({error}); run `fp-server init` first") from None
        self._key = load_key(directory / "ca.key")
        rows = database.run(lambda c: c.execute("SELECT serial FROM certificates WHERE revoked IS NOT NULL").fetchall())
        self._revoked = {str(row[0]) for row in rows}

    def issue(self, public_key: ec.EllipticCurvePublicKey, name: str, role: str, days: float) -> x509.Certificate:
        """A client certificate; the caller stores it in the same transaction as what allowed it."""
        alternative = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"{URI}{role}/{name}")])
        return _sign(self._ca, self._key, public_key, name, alternative, ExtendedKeyUsageOID.CLIENT_AUTH, days)

    def create_operator(self, name: str, days: float) -> None:
        """Write ``operator.pem`` and ``operator.key`` into the data directory, for the command line beside the server."""
        key = new_key()
        certificate = self.issue(key.public_key(), name, "operator", days)
        self._database.run(lambda c: _store(c, certificate, name, "operator", None))
        write_private(self._directory / "operator.key", key_pem(key))
        (self._directory / "operator.pem").write_bytes(_pem(certificate))

    def renew(self, names: list[str], operator_days: float, server_days: float = 825, margin: float = 30) -> list[str]:
        """Replace the server's and the operator's certificates when less than `margin` days are left; which ones.

        The keys and the CA stay where they are: whoever can start the server could do the same.
        """
        renewed: list[str] = []
        limit = datetime.now(UTC) + timedelta(days=margin)
        if _ends(self._directory / "server.pem") < limit:
            key = load_key(self._directory / "server.key").public_key()
            alternative = _alternative_names(names)
            certificate = _sign(self._ca, self._key, key, names[0], alternative, ExtendedKeyUsageOID.SERVER_AUTH, server_days)
            write_private(self._directory / "server.pem", _pem(certificate))
            renewed.append("server.pem")
        if _ends(self._directory / "operator.pem") < limit:
            self.create_operator("operator", operator_days)
            renewed.append("operator.pem")
        return renewed

    async def create_token(self, name: str, role: str, ttl: float, enroll: str, server: str) -> JoinToken:
        """A one-time token for `name`. Raises ConfigError for a bad name or role."""
        if NAME.fullmatch(name) is None:
            raise ConfigError(f"{name!r}: not a name (lower-case letters, digits, '.', '_', '-'; at most 63)")
        if role not in ROLES:
            raise ConfigError(f"{role!r}: not a role ({' or '.join(ROLES)})")
        secret = secrets.token_urlsafe(32)
        row = (secret_hash(secret), name, role, time.time() + ttl)

        def work(c: sqlite3.Connection) -> None:
            c.execute("DELETE FROM tokens WHERE used_by IS NULL AND expires < ?", (time.time(),))
            (waiting,) = c.execute("SELECT count(*) FROM tokens WHERE used_by IS NULL").fetchone()
            if waiting >= self.most_tokens:
                raise LimitError(
                    f"{waiting} tokens wait to be used already, and server.toml allows no more (limits.tokens); "
                    "they end by themselves, or with `fp-server revoke NAME`"
                )
            c.execute("INSERT INTO tokens (hash, name, role, expires) VALUES (?, ?, ?, ?)", row)

        await self._database.transact(work)
        return JoinToken(enroll, server, ca_digest(self.ca_pem), secret)

    async def enroll(self, secret: str, csr_pem: str, days: float) -> tuple[str, str, str]:
        """(certificate PEM, name, role). Using the token and issuing are one transaction; the same key may ask
        again after a lost reply. Raises TokenError, or IdentityError for a bad CSR."""
        try:
            csr = x509.load_pem_x509_csr(csr_pem.encode())
            key, signed = csr.public_key(), csr.is_signature_valid
        except (ValueError, UnsupportedAlgorithm):
            raise IdentityError("the certificate request is not a PEM CSR") from None
        if not signed or not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise IdentityError("the certificate request must be signed by its own P-256 key")
        spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        holder, hashed, now = secret_hash(spki.hex()), secret_hash(secret), time.time()

        def work(c: sqlite3.Connection) -> tuple[str, str, str]:
            row = c.execute("SELECT name, role, expires, used_by FROM tokens WHERE hash = ?", (hashed,)).fetchone()
            if row is None:
                raise TokenError("the token is unknown here; ask the operator for a new one (`fp-server token NAME`)")
            name, role, expires, used_by = str(row[0]), str(row[1]), float(row[2]), row[3]
            if used_by is not None and used_by != holder:
                raise TokenError(f"the token for {name!r} was used before; ask the operator for a new one")
            if now > expires:
                raise TokenError(f"the token for {name!r} has expired; ask the operator for a new one")
            if used_by is not None:
                pem = c.execute("SELECT pem FROM certificates WHERE token = ?", (hashed,)).fetchone()[0]
                return str(pem), name, role
            certificate = self.issue(key, name, role, days)
            _store(c, certificate, name, role, hashed)
            c.execute("UPDATE tokens SET used_by = ? WHERE hash = ?", (holder, hashed))
            return _pem(certificate).decode(), name, role

        return await self._database.transact(work)

    async def revoke(self, name: str) -> int:
        """Revoke every certificate of a name, and every token nobody has used; returns how many certificates."""

        def work(c: sqlite3.Connection) -> list[str]:
            rows = c.execute("SELECT serial FROM certificates WHERE name = ? AND revoked IS NULL", (name,)).fetchall()
            c.execute("UPDATE certificates SET revoked = ? WHERE name = ? AND revoked IS NULL", (time.time(), name))
            c.execute("DELETE FROM tokens WHERE name = ? AND used_by IS NULL", (name,))
            return [str(row[0]) for row in rows]

        async def both() -> list[str]:
            serials = await self._database.transact(work)
            self._revoked.update(serials)
            return serials

        # Shielded: a caller that hangs up must not leave a certificate revoked on disk and welcome here.
        return len(await asyncio.shield(asyncio.create_task(both())))

    def check(self, peer: Peer, role: str) -> None:
        """Raises IdentityError when the caller has another role or its certificate was revoked or has expired."""
        if peer.serial in self._revoked:
            raise IdentityError(f"the certificate of {peer.name!r} has been revoked; ask the operator for a new token")
        if peer.not_after is not None and datetime.now(UTC) > peer.not_after:
            raise IdentityError(f"the certificate of {peer.name!r} has expired; join again with a new token")
        if peer.role != role:
            raise IdentityError(f"{peer.name!r} is a {peer.role}; this needs the role {role}")


def _ends(path: Path) -> datetime:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise IdentityError(f"{path}: no usable certificate ({error}); was `fp-server init` interrupted?") from None


def _store(c: sqlite3.Connection, certificate: x509.Certificate, name: str, role: str, token: str | None) -> None:
    c.execute(
        "INSERT INTO certificates (serial, name, role, token, pem) VALUES (?, ?, ?, ?, ?)",
        (f"{certificate.serial_number:x}", name, role, token, _pem(certificate).decode()),
    )
