"""Keys, CSRs and credentials: what both sides need for mTLS. Issuing is the server's alone."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.errors import IdentityError

URI = "fedpruner://"
"""Identities are a subject alternative name ``fedpruner://<role>/<name>``."""


@dataclass(frozen=True)
class Peer:
    """Who is on the other side, from its certificate alone."""

    role: str
    name: str
    serial: str = ""
    not_after: datetime | None = None
    """When the certificate ends: a session can outlive it."""


def write_private(path: Path, data: bytes) -> None:
    """Write a file only its owner can read (0600), durably and in one step."""
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8 PEM, unencrypted: the file's mode protects it."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Raises IdentityError when the file is missing or no key."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        raise IdentityError(f"{path}: no key; run `fp-client join` (device) or `fp-server init` (server) first") from None
    except ValueError:
        raise IdentityError(f"{path}: not a PEM private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path}: not an elliptic-curve key")
    return key


def make_csr(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    """A certificate signing request, PEM. The server takes only the key from it."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256()).public_bytes(
        serialization.Encoding.PEM
    ).decode()  # fmt: skip


def ca_digest(ca_pem: str) -> str:
    """sha256 of the CA certificate's DER form, as a join token carries it. Raises IdentityError."""
    try:
        certificate = x509.load_pem_x509_certificate(ca_pem.encode())
    except ValueError:
        raise IdentityError("the server's CA certificate is not a PEM certificate") from None
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def peer_of(auth: dict[str, list[bytes]]) -> Peer:
    """The caller's identity from gRPC's authentication context. Raises IdentityError when there is none."""
    for raw in auth.get("x509_subject_alternative_name", []):
        text = raw.decode(errors="replace")
        if text.startswith(URI):
            role, _, name = text.removeprefix(URI).partition("/")
            serial, not_after = "", None
            for pem in auth.get("x509_pem_cert", []):
                certificate = x509.load_pem_x509_certificate(pem)
                serial, not_after = f"{certificate.serial_number:x}", certificate.not_valid_after_utc
            return Peer(role, name, serial, not_after)
    raise IdentityError("the caller's certificate carries no FedPruner identity")


def server_credentials(certificate: bytes, key: bytes, ca: bytes | None) -> grpc.ServerCredentials:
    """mTLS when `ca` is given (clients must show a certificate of it), else server-authenticated TLS."""
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=ca is not None)


def client_credentials(directory: Path, stem: str = "device") -> grpc.ChannelCredentials:
    """mTLS credentials from ``ca.pem``, ``<stem>.pem`` and ``<stem>.key`` of a directory; checks expiry.

    Raises IdentityError naming the file that is missing, damaged or expired.
    """
    parts: dict[str, bytes] = {}
    for name in ("ca.pem", f"{stem}.pem", f"{stem}.key"):
        try:
            parts[name] = (directory / name).read_bytes()
        except OSError as error:
            hint = "run `fp-client join` (device) or `fp-server init` (server) first"
            raise IdentityError(f"{directory / name}: {error.strerror}; {hint}") from None
    check_validity(directory / f"{stem}.pem")
    load_key(directory / f"{stem}.key")
    return grpc.ssl_channel_credentials(parts["ca.pem"], parts[f"{stem}.key"], parts[f"{stem}.pem"])


def check_validity(path: Path) -> x509.Certificate:
    """The certificate of a PEM file. Raises IdentityError when it is damaged, not yet valid or expired."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise IdentityError(f"{path}: not a PEM certificate") from None
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise IdentityError(
            f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; join again with a new token"
        )
    if now < certificate.not_valid_before_utc:
        raise IdentityError(
            f"{path}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; is the clock right?"
        )
    return certificate
