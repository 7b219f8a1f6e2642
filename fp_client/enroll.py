"""Joining: a one-time token becomes a certificate, and nothing secret is said before the server is known.

1. The enrollment port's leaf certificate is taken unverified and used as the root of a channel for GetCa alone,
   so that a CA certificate arrives. Nothing is believed of it yet.
2. Its sha256 must be the token's.
3. A second channel, whose only root is that CA, verifies the port's certificate and name; only on it are the
   secret and the CSR sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ConfigError, FedPrunerError, IdentityError, ProtocolError, StorageError, TokenError, UnreachableError
from common.pb import enroll_pb2, enroll_pb2_grpc
from common.token import JoinToken
from common.transport import tls, wire
from fp_client.config import EXAMPLE, FILE

TIMEOUT = 15.0
"""Seconds one call may take."""

RENEWAL = timedelta(days=30)
"""So long before its end (or in the last third of a shorter validity) a certificate may be renewed by a plain `join`."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Joined:
    """What came of joining."""

    name: str
    role: str
    server: str


def split_address(address: str) -> tuple[str, int]:
    """host:port, the host without brackets. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


async def join(
    text: str, directory: Path, backoff: wire.Backoff | None = None, say: Say = lambda _: None, again: bool = False
) -> Joined:
    """Enroll with a join token and fill `directory`: ca.pem, device.key (0600), device.pem, client.toml.

    Safe to repeat after a lost reply: the key is kept, and the server lets the same key retry the same token. A directory
    that has joined gets a new certificate for the same key when the old one ends soon or has ended, or with `again`; the
    old one stays in place until the new one is complete.
    Raises TokenError, IdentityError, UnreachableError, StorageError.
    """
    token = JoinToken.decode(text)
    backoff = backoff or wire.Backoff(attempts=5, longest=5.0)
    key = await asyncio.to_thread(_prepare, directory, again)
    say(f"asking {token.enroll} for its CA certificate")
    ca = await _fetch_ca(token, backoff)
    say("the CA is the token's; sending the key to be signed")
    reply = await _enroll(token, ca, key, backoff)
    _check_certificate(reply.certificate_pem, ca, key)
    with _storage(directory):
        (directory / "ca.pem").write_text(ca)
        write_server(directory / FILE, token.server)
        tls.write_private(directory / "device.pem", reply.certificate_pem.encode())
    return Joined(reply.name, reply.role, token.server)


@contextlib.contextmanager
def _storage(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error.filename or directory}: can't be written: {error.strerror}") from None


def _prepare(directory: Path, again: bool) -> ec.EllipticCurvePrivateKey:
    with _storage(directory):
        directory.mkdir(parents=True, exist_ok=True)
        key = _own_key(directory)
    if not again:
        _forbid_rejoin(directory, key)
    return key


def _own_key(directory: Path) -> ec.EllipticCurvePrivateKey:
    path = directory / "device.key"
    if not path.exists():
        tls.write_private(path, tls.key_pem(tls.new_key()))
    return tls.load_key(path)


def _forbid_rejoin(directory: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """A certificate that is good for long is not thrown away by a second `join` in the wrong directory."""
    path = directory / "device.pem"
    if not path.exists():
        return
    try:
        certificate = tls.check_validity(path)
    except IdentityError:
        return
    end, begin = certificate.not_valid_after_utc, certificate.not_valid_before_utc
    soon = end - datetime.now(UTC) < min(RENEWAL, (end - begin) / 3)
    if certificate.public_key() == key.public_key() and not soon:
        raise IdentityError(
            f"{path}: this directory has already joined (valid until {end:%Y-%m-%d}); "
            "join in another --dir, or with --again to replace the certificate"
        )


async def _fetch_ca(token: JoinToken, backoff: wire.Backoff) -> str:
    host, port = split_address(token.enroll)

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
    if tls.ca_digest(reply.ca_pem) != token.ca:
        raise IdentityError(
            f"{token.enroll}: the server's CA is not the token's; this is another server, or someone stands in between. "
            "Nothing was sent. Ask the operator for a new token"
        )
    ca: str = reply.ca_pem
    return ca


async def _enroll(token: JoinToken, ca: str, key: ec.EllipticCurvePrivateKey, backoff: wire.Backoff) -> enroll_pb2.EnrollReply:
    limit = wire.options(wire.CHANNEL_OPTIONS, max_receive_message_length=64 << 10)
    request = enroll_pb2.EnrollRequest(secret=token.secret, csr_pem=tls.make_csr(key, "device"))
    async with grpc.aio.secure_channel(token.enroll, grpc.ssl_channel_credentials(ca.encode()), limit) as channel:
        stub = enroll_pb2_grpc.EnrollmentStub(channel)
        try:
            reply: enroll_pb2.EnrollReply = await wire.retrying(
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
    return reply


def _check_certificate(pem: str, ca: str, key: ec.EllipticCurvePrivateKey) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.encode()))
    except Exception as error:  # several kinds: not PEM, another issuer, a bad signature
        raise ProtocolError(f"the server's reply holds no certificate of its CA ({type(error).__name__})") from None
    if certificate.public_key() != key.public_key():
        raise ProtocolError("the server signed another key than ours; ask the operator for a new token")


def write_server(path: Path, server: str) -> None:
    """Put `server` into client.toml, keeping whatever else its owner wrote; make a commented file when there is none."""
    line = f"server = {json.dumps(server)}"
    if not path.exists():
        path.write_text(EXAMPLE.format(server=json.dumps(server)))
        return
    text = path.read_text()
    head, bracket, rest = re.match(r"(?s)(.*?)((?:^\s*\[)|\Z)(.*)", text, re.MULTILINE).groups()  # type: ignore[union-attr]
    if re.search(r"(?m)^\s*server\s*=", head):
        head = re.sub(r"(?m)^\s*server\s*=.*$", lambda _: line, head, count=1)
    else:
        head = f"{line}\n{head}"
    if head + bracket + rest != text:  # what says so already may be read-only, as a container's is
        path.write_text(head + bracket + rest)
