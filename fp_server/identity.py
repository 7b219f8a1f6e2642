"""Who belongs here: one-time join tokens, the certificates they become, their renewal and their revocation.

The server alone decides name, role and usages of a certificate; a CSR contributes its public key.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ConfigError, IdentityError, LimitError, NotFound, TokenError
from common.token import JoinToken, secret_hash
from common.transport.tls import ROLES, Peer, ca_digest, renewable_from
from fp_server import audit, books
from fp_server.audit import SERVER, Actor, Entry
from fp_server.certificates import Issuer, pem, requested_key
from fp_server.events import revoked_text
from fp_server.limits import ServerLimits
from fp_server.log import Database

MOST = 8
"""Valid certificates a name may have before a renewal is refused: whoever holds one can't fill the disk with more."""


class Issued(NamedTuple):
    """A certificate, PEM, and whose it is."""

    pem: str
    name: str
    role: str


class Revoked(NamedTuple):
    """How many certificates were revoked, and how many unused tokens made void."""

    certificates: int
    tokens: int


class Authority:
    """Issues, renews, looks up and revokes certificates; each in one transaction with its entry in the audit trail."""

    def __init__(self, directory: Path, database: Database, most_tokens: int = ServerLimits().tokens) -> None:
        """Raises IdentityError when the directory has no usable CA."""
        self._directory, self._database = directory, database
        self._most_tokens = most_tokens
        self._issuer = Issuer(directory)
        self.ca_pem = self._issuer.pem
        self.refusals = audit.Refusals(database)
        certificates = database.run(lambda c: c.execute("SELECT serial, revoked FROM certificates").fetchall())
        self._revoked = {str(serial) for serial, revoked in certificates if revoked is not None}
        self._known = {str(serial) for serial, _ in certificates}
        names = database.run(lambda c: c.execute("SELECT name FROM revocations").fetchall())
        self._names = {str(name) for (name,) in names}
        """Names that were revoked once: of these only certificates in the books count."""

    async def create_token(self, name: str, role: str, ttl: float, enroll: str, server: str, actor: Actor = SERVER) -> JoinToken:
        """A one-time token for `name`, valid for `ttl` seconds. Raises ConfigError for a bad name or role."""
        books.check_name(name)
        if role not in ROLES:
            raise ConfigError(f"{role!r}: not a role ({' or '.join(ROLES)})")
        secret, expires = secrets.token_urlsafe(32), time.time() + ttl
        entry = Entry(actor, "token", f"{role} {name}, valid for {ttl:.0f} s")

        def work(c: sqlite3.Connection) -> None:
            c.execute("DELETE FROM tokens WHERE used_by IS NULL AND expires < ?", (time.time(),))
            (waiting,) = c.execute("SELECT count(*) FROM tokens WHERE used_by IS NULL").fetchone()
            if waiting >= self._most_tokens:
                raise LimitError(
                    f"{waiting} tokens wait to be used already, and server.toml allows no more (limits.tokens); "
                    "they end by themselves, or with `fp-server revoke NAME`"
                )
            row = (secret_hash(secret), name, role, expires)
            c.execute("INSERT INTO tokens (hash, name, role, expires) VALUES (?, ?, ?, ?)", row)
            audit.append(c, entry)

        await self._database.transact(work)
        return JoinToken(enroll, server, ca_digest(self.ca_pem), secret)

    async def in_use(self, name: str, role: str) -> str:
        """What whoever makes a token for this name should know; empty when nobody has it."""
        return await self._database.transact(lambda c: books.in_use(c, name, role))

    async def enroll(self, secret: str, csr_pem: str, days: float, role: str = "", address: str = "") -> Issued:
        """The certificate a token stands for. Using the token and issuing are one transaction; the same key may ask again after
        a lost reply. `role`: what the caller means to become; empty: whatever the token says.

        Raises TokenError, or IdentityError for a bad CSR; then the token is not used up.
        """
        key = requested_key(csr_pem)
        spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        holder, hashed, now = secret_hash(spki.hex()), secret_hash(secret), time.time()

        def work(c: sqlite3.Connection) -> Issued:
            row = c.execute("SELECT name, role, expires, used_by FROM tokens WHERE hash = ?", (hashed,)).fetchone()
            if row is None:
                raise TokenError("the token is unknown here; ask the operator for a new one (`fp-server token NAME`)")
            name, granted, expires, used_by = str(row[0]), str(row[1]), float(row[2]), row[3]
            if used_by is not None and used_by != holder:
                raise TokenError(f"the token for {name!r} was used before; ask the operator for a new one")
            if now > expires:
                raise TokenError(f"the token for {name!r} has expired; ask the operator for a new one")
            if role and role != granted:
                command = "fp-server join" if granted == "operator" else "fp-client join"
                raise TokenError(f"the token for {name!r} is for the role {granted}: use it with `{command}`")
            if used_by is not None:
                return Issued(books.issued_for(c, hashed), name, granted)
            certificate = self._issuer.client(key, name, granted, days)
            books.store(c, certificate, name, granted, hashed)
            c.execute("UPDATE tokens SET used_by = ? WHERE hash = ?", (holder, hashed))
            actor = Actor(name, granted, books.serial_of(certificate), address)
            audit.append(c, Entry(actor, "enroll", f"{granted} {name}, valid until {books.until(certificate)}"))
            return Issued(pem(certificate).decode(), name, granted)

        return await self._remembered(work)

    async def renew(self, peer: Peer, csr_pem: str, days: float, address: str = "") -> Issued:
        """Another certificate for the caller, with the name and role of the one it shows; that one stays valid.

        The same key may ask again after a lost reply. Raises IdentityError for a bad CSR, a certificate that is revoked or not
        in the books, and when the name has `MOST` valid certificates already.
        """
        key = requested_key(csr_pem)

        def work(c: sqlite3.Connection) -> Issued:
            row = c.execute("SELECT revoked FROM certificates WHERE serial = ?", (peer.serial,)).fetchone()
            if row is None:
                raise IdentityError(
                    f"the certificate of {peer.name!r} is not in this server's books; join again with a new token"
                )
            if row[0] is not None:
                raise revoked_error(peer.name)
            valid = books.valid(c, peer.name, peer.role)
            if (again := _lost_reply(valid, peer, key)) is not None:
                return Issued(pem(again).decode(), peer.name, peer.role)
            if len(valid) >= MOST:
                raise IdentityError(
                    f"{peer.name!r} has {len(valid)} valid certificates already; wait until one ends, or revoke them and join "
                    "again with a new token"
                )
            certificate = self._issuer.client(key, peer.name, peer.role, days)
            books.store(c, certificate, peer.name, peer.role)
            said = f"{peer.role} {peer.name}, serial {books.serial_of(certificate)}, valid until {books.until(certificate)}"
            audit.append(c, Entry(Actor.of(peer, address), "renew", said))
            return Issued(pem(certificate).decode(), peer.name, peer.role)

        return await self._remembered(work)

    async def _remembered(self, work: Callable[[sqlite3.Connection], Issued]) -> Issued:
        issued = await self._database.transact(work)
        self._known.add(books.serial_of(x509.load_pem_x509_certificate(issued.pem.encode())))
        return issued

    async def revoke(self, name: str, actor: Actor = SERVER, force: bool = False) -> Revoked:
        """Revoke every certificate of a name, and every token nobody has used. Calls under way are for `access` to end.

        Raises NotFound for a name without certificate and token; with `force` it is revoked all the same, for certificates
        that a server restored from an older backup does not know.
        """

        def work(c: sqlite3.Connection) -> tuple[list[str], int]:
            if not force and not books.known(c, name):
                raise NotFound(f"no certificate and no token was ever issued for {name!r}; nothing was revoked")
            rows = c.execute("SELECT serial FROM certificates WHERE name = ? AND revoked IS NULL", (name,)).fetchall()
            c.execute("UPDATE certificates SET revoked = ? WHERE name = ? AND revoked IS NULL", (time.time(), name))
            c.execute("INSERT OR REPLACE INTO revocations (name, time) VALUES (?, ?)", (name, time.time()))
            tokens = c.execute("DELETE FROM tokens WHERE name = ? AND used_by IS NULL", (name,)).rowcount
            audit.append(c, Entry(actor, "revoke", f"{name}: {len(rows)} certificates, {tokens} unused tokens"))
            return [str(row[0]) for row in rows], tokens

        async def both() -> Revoked:
            serials, tokens = await self._database.transact(work)
            self._revoked.update(serials)
            self._names.add(name)
            return Revoked(len(serials), tokens)

        # Shielded: a caller that hangs up must not leave a certificate revoked on disk and welcome here.
        return await asyncio.shield(asyncio.create_task(both()))

    async def audited(self, after: int, since: float) -> list[audit.Row]:
        """A page of the audit trail: the entries after number `after`, of time `since` or later."""
        return await self._database.transact(lambda c: audit.page(c, after, since))

    def check(self, peer: Peer, *roles: str) -> None:
        """Raises IdentityError when the caller has another role or its certificate was revoked or has expired."""
        if peer.serial in self._revoked or (peer.name in self._names and not self._in_the_books(peer.serial)):
            raise revoked_error(peer.name)
        if peer.not_after is not None and datetime.now(UTC) > peer.not_after:
            raise IdentityError(f"the certificate of {peer.name!r} has expired; join again with a new token")
        if peer.role not in roles:
            kind = "an operator" if peer.role == "operator" else f"a {peer.role}"
            raise IdentityError(f"{peer.name!r} is {kind}; this needs the role {' or '.join(roles)}")

    def _in_the_books(self, serial: str) -> bool:
        """Whether this certificate was issued here, perhaps just now by `fp-server operator`, beside this server."""
        if serial not in self._known:
            query = "SELECT 1 FROM certificates WHERE serial = ? AND revoked IS NULL"
            if self._database.run(lambda c: c.execute(query, (serial,)).fetchone()) is None:
                return False
            self._known.add(serial)
        return True


def revoked_error(name: str) -> IdentityError:
    """What whoever shows a revoked certificate is told."""
    return IdentityError(revoked_text(name))


def _lost_reply(valid: list[x509.Certificate], peer: Peer, key: ec.EllipticCurvePublicKey) -> x509.Certificate | None:
    """The newest certificate of the caller, when it was made for this key and the caller does not show it yet."""
    if not valid or books.serial_of(valid[0]) == peer.serial or valid[0].public_key() != key:
        return None
    now = datetime.now(UTC)  # one made while this clock was ahead is of no use yet
    return valid[0] if valid[0].not_valid_before_utc <= now < renewable_from(valid[0]) else None
