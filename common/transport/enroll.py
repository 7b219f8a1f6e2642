"""Joining and renewing: a one-time token becomes a certificate, and a certificate that ends soon another one.

Joining says nothing secret before the server is known:

1. The enrollment port's leaf certificate is taken unverified and used as the root of a channel for GetCa alone,
   so that a CA certificate arrives. Nothing is believed of it yet.
2. Its sha256 must be the token's.
3. A second channel, whose only root is that CA, verifies the port's certificate and name; only on it are the
   secret and the CSR sent.

Renewing goes over the main port, where the certificate that is renewed says who asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import FedPrunerError, IdentityError, ProtocolError, StorageError, TokenError, UnreachableError
from common.faults import fault
from common.pb import enroll_pb2, enroll_pb2_grpc
from common.token import JoinToken
from common.transport import tls, wire
from common.transport.replies import readable

TIMEOUT = 15.0
"""Seconds one call may take."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Joined:
    """What came of joining."""

    name: str
    role: str
    server: str


async def join(
    text: str, directory: Path, role: str, remember: Callable[[str], None], backoff: wire.Backoff | None = None,
    say: Say = lambda _: None, again: bool = False,
) -> Joined:  # fmt: skip
    """Enroll with a join token and fill `directory` (0700): ca.pem, ``<role>.key``, ``<role>.pem`` (0600 each).

    `remember` is told the server's address before the certificate is written. Safe to repeat after a lost reply: the key is
    kept, and the server lets the same key retry the same token. A directory that has joined gets a new certificate for the
    same key when the old one ends soon or has ended, or with `again`; the old one stays in place until the new one is complete.
    Raises TokenError (also for a token of another role), IdentityError, UnreachableError, StorageError.
    """
    token = JoinToken.decode(text)
    backoff = backoff or wire.Backoff(attempts=5, longest=5.0)
    key = await asyncio.to_thread(_prepare, directory, role, again)
    say(f"asking {token.enroll} for its CA certificate")
    ca = await _fetch_ca(token, backoff)
    say("the CA is the token's; sending the key to be signed")
    pem, certificate = await _enroll(token, ca, role, key, backoff)
    given, name = tls.identity_of(certificate)
    if given != role:
        raise ProtocolError(f"{token.enroll}: the server's certificate is for {given}/{name[:80]}, asked was a {role}'s")
    if (before := _name_before(directory / f"{role}.pem")) not in ("", name):
        say(f"{directory} was {before!r} and is {name!r} from now on; `fp-server revoke {before}` ends the old certificate")
    with _storage(directory):
        tls.write_private(directory / "ca.pem", ca.encode())
        remember(token.server)
        tls.write_private(directory / f"{role}.pem", pem.encode())
    return Joined(name, role, token.server)


async def renew(channel: grpc.aio.Channel, directory: Path, role: str) -> x509.Certificate:
    """Get another certificate for the same key and write it over the old one, in one step; the old one stays valid.

    `channel` must show the certificate of `directory`. Raises IdentityError (expired here, refused, or what comes is not valid
    yet), ProtocolError when what comes is not a certificate for this key and identity, StorageError, and gRPC's errors as they
    come.
    """
    path = directory / f"{role}.pem"
    with _storage(directory, "read"):  # all of it before the server signs what could not be checked then
        old, key = tls.check_validity(path), tls.load_key(directory / f"{role}.key")
        ca = (directory / "ca.pem").read_text()
    request = enroll_pb2.RenewRequest(csr_pem=tls.make_csr(key, role))
    stub: enroll_pb2_grpc.RenewalAsyncStub = enroll_pb2_grpc.RenewalStub(channel)
    reply = await stub.Renew(request, timeout=TIMEOUT)
    pem, new = certificate_of(reply, ca, key, "renewal")
    if tls.identity_of(new) != tls.identity_of(old):
        raise ProtocolError(f"the server's certificate is for {'/'.join(tls.identity_of(new))}; {path} is kept")
    with _storage(directory, "read"):
        _forbid_future(new, path)
    fault("device.renewal.answered")
    with _storage(directory):
        await asyncio.to_thread(tls.write_private, path, pem.encode())
    return new


def _forbid_future(new: x509.Certificate, path: Path) -> None:
    """With a certificate that is not valid yet nothing could connect after a restart: it does not replace the one in `path`."""
    now, begins = datetime.now(UTC), new.not_valid_before_utc
    if begins <= now:
        return
    written = max(path.stat().st_mtime, path.parent.stat().st_mtime)  # by this machine's clock, as it was then
    clock = "this machine's clock seems to be behind" if now.timestamp() < written else "the server's clock seems to be ahead"
    raise IdentityError(
        f"the server's certificate is not valid before {begins:%Y-%m-%d %H:%M} UTC, here it is {now:%Y-%m-%d %H:%M} UTC: "
        f"{clock}; {path} is kept"
    )


@contextlib.contextmanager
def _storage(directory: Path, done: str = "written") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error.filename or directory}: can't be {done}: {error.strerror}") from None


def _prepare(directory: Path, role: str, again: bool) -> ec.EllipticCurvePrivateKey:
    with _storage(directory):
        tls.private_directory(directory)
        key = _own_key(directory / f"{role}.key")
    if not again:
        _forbid_rejoin(directory / f"{role}.pem", key)
    return key


def _own_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if not path.exists():
        tls.write_private(path, tls.key_pem(tls.new_key()))
    return tls.load_key(path)


def _forbid_rejoin(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """A certificate that is good for long is not thrown away by a second `join` in the wrong directory."""
    if not path.exists():
        return
    try:
        certificate = tls.check_validity(path)
    except IdentityError:
        return
    if certificate.public_key() == key.public_key() and datetime.now(UTC) < tls.renewable_from(certificate):
        raise IdentityError(
            f"{path}: this directory has already joined (valid until {certificate.not_valid_after_utc:%Y-%m-%d}); "
            "join in another --dir, or with --again to replace the certificate (it may be revoked: that does not show here)"
        )


def _name_before(path: Path) -> str:
    """The name in the certificate that is about to be replaced; empty when there is none or it can't be read."""
    try:
        return tls.identity_of(x509.load_pem_x509_certificate(path.read_bytes()))[1]
    except (OSError, ValueError, FedPrunerError):
        return ""


async def _fetch_ca(token: JoinToken, backoff: wire.Backoff) -> str:
    host, port = wire.split_address(token.enroll)

    async def leaf() -> str:
        try:
            return await asyncio.to_thread(ssl.get_server_certificate, (host, port), timeout=TIMEOUT)
        except ssl.SSLError as error:
            raise IdentityError(f"{token.enroll}: is not the enrollment port of a server: {error.reason}") from None
        except (OSError, socket.gaierror) as error:
            raise UnreachableError(f"{token.enroll}: can't be reached: {error.strerror or error}") from None

    for attempt in range(backoff.attempts):
        try:
            root = await leaf()
            break
        except UnreachableError:
            if attempt + 1 == backoff.attempts:
                raise
            await asyncio.sleep(backoff.delay(attempt))
    limit = wire.options(wire.CHANNEL_OPTIONS, max_receive_message_length=64 << 10)
    async with grpc.aio.secure_channel(token.enroll, grpc.ssl_channel_credentials(root.encode()), limit) as channel:
        stub = enroll_pb2_grpc.EnrollmentStub(channel)
        reply = await wire.retrying(
            lambda: stub.GetCa(enroll_pb2.GetCaRequest(), timeout=TIMEOUT), wire.Backoff(attempts=3), token.enroll
        )
    return ca_of(reply, token)


def ca_of(reply: enroll_pb2.GetCaReply | None, token: JoinToken) -> str:
    """The CA certificate (PEM) of a reply from whoever. Raises ProtocolError, IdentityError unless it is the token's."""
    ca = readable(reply, "CA certificate", token.enroll).ca_pem
    if tls.ca_digest(ca) != token.ca:
        raise IdentityError(
            f"{token.enroll}: the server's CA is not the token's; this is another server, or someone stands in between. "
            "Nothing was sent. Ask the operator for a new token"
        )
    return tls.one_certificate(ca)  # what follows the first one has no digest in the token


async def _enroll(
    token: JoinToken, ca: str, role: str, key: ec.EllipticCurvePrivateKey, backoff: wire.Backoff
) -> tuple[str, x509.Certificate]:
    limit = wire.options(wire.CHANNEL_OPTIONS, max_receive_message_length=64 << 10)
    request = enroll_pb2.EnrollRequest(secret=token.secret, csr_pem=tls.make_csr(key, role), role=role)
    async with grpc.aio.secure_channel(token.enroll, grpc.ssl_channel_credentials(ca.encode()), limit) as channel:
        stub = enroll_pb2_grpc.EnrollmentStub(channel)
        try:
            reply: enroll_pb2.EnrollReply | None = await wire.retrying(
                lambda: stub.Enroll(request, timeout=TIMEOUT), backoff, token.enroll
            )
        except TokenError:
            raise
        except IdentityError as error:
            raise IdentityError(f"{token.enroll}: enrollment was refused: {error}") from None
        except UnreachableError:
            raise
        except FedPrunerError as error:
            raise TokenError(f"{token.enroll}: enrollment failed: {error}") from None
    return certificate_of(reply, ca, key, token.enroll)


def certificate_of(
    reply: enroll_pb2.EnrollReply | None, ca: str, key: ec.EllipticCurvePrivateKey, where: str
) -> tuple[str, x509.Certificate]:
    """The certificate of a reply, as PEM and parsed. Raises ProtocolError unless `ca` (PEM) issued it for this key."""
    pem = readable(reply, "certificate", where).certificate_pem
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.encode()))
        signed = certificate.public_key()
    except Exception as error:  # several kinds: not PEM, another issuer, a bad signature, an unknown algorithm
        raise ProtocolError(f"the server's reply holds no certificate of its CA ({type(error).__name__})") from None
    if signed != key.public_key():
        raise ProtocolError("the server signed another key than ours; ask the operator for a new token")
    return tls.one_certificate(pem), certificate
