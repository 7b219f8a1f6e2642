"""Keys, CSRs and credentials: what both sides need for mTLS. Issuing is the server's alone."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.errors import IdentityError
from common.faults import fault
from common.files import sync_directory
from common.types import NAME

log = logging.getLogger(__name__)

URI = "fedpruner://"
"""Identities are a subject alternative name ``fedpruner://<role>/<name>``, one a certificate."""
ROLES = ("device", "operator")


@dataclass(frozen=True)
class Peer:
    """Who is on the other side, from its certificate alone."""

    role: str
    name: str
    serial: str = ""
    not_after: datetime | None = None
    """When the certificate ends: a session can outlive it."""


def write_private(path: Path, data: bytes) -> None:
    """Write a file only its owner can read (0600), durably and in one step: a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(fd, 0o600)  # a crash may have left one of another mode
        with os.fdopen(os.dup(fd), "wb") as out:
            out.write(data)
        os.fsync(fd)
        fault("common.private.written", path.name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    temporary.replace(path)
    fault("common.private.renamed", path.name)
    sync_directory(path.parent)


def private_directory(path: Path) -> None:
    """Make a directory only its owner can enter (0700); one that is there keeps its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def exposed(path: Path) -> str:
    """What to say of a key others on this machine could read; empty when they can't."""
    mode = path.stat().st_mode & 0o777
    return f"{path}: others on this machine can read this key (mode {mode:o}); chmod 600 {path}" if mode & 0o077 else ""


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
    except (TypeError, UnsupportedAlgorithm):
        raise IdentityError(f"{path}: the private key is encrypted, or of an unknown algorithm") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path}: not an elliptic-curve key")
    return key


def make_csr(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    """A certificate signing request, PEM. The server takes only the key from it."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256()).public_bytes(
        serialization.Encoding.PEM
    ).decode()  # fmt: skip


def parse_certificate(pem: bytes, where: str) -> x509.Certificate:
    """The first certificate of a PEM text. Raises IdentityError, which begins with `where`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise IdentityError(f"{where}: not a PEM certificate") from None
    except x509.InvalidVersion as error:  # no ValueError
        raise IdentityError(f"{where}: is of version {error.parsed_version + 1}, which is unknown") from None


def one_certificate(pem: str) -> str:
    """The first certificate of a PEM text, alone: whatever comes after it was not looked at. Raises IdentityError."""
    certificate = parse_certificate(pem.encode(), "the server's certificate")
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def ca_digest(ca_pem: str) -> str:
    """sha256 of the CA certificate's DER form, as a join token carries it. Raises IdentityError."""
    certificate = parse_certificate(ca_pem.encode(), "the server's CA certificate")
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def peer_of(auth: dict[str, list[bytes]]) -> Peer:
    """The caller's identity from gRPC's authentication context. Raises IdentityError when there is none, or not exactly one."""
    role, name = _identity([raw.decode(errors="replace") for raw in auth.get("x509_subject_alternative_name", [])])
    for pem in auth.get("x509_pem_cert", []):
        certificate = x509.load_pem_x509_certificate(pem)
        return Peer(role, name, f"{certificate.serial_number:x}", certificate.not_valid_after_utc)
    raise IdentityError("the caller shows no certificate")


def identity_of(certificate: x509.Certificate) -> tuple[str, str]:
    """(role, name) of a client certificate. Raises IdentityError when it carries none, not exactly one, or can't be read."""
    try:  # they are parsed here: the certificate itself may have been read without a complaint
        extensions = certificate.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        found = []
    except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise IdentityError(f"the certificate's extensions can't be read ({type(error).__name__})") from None
    return _identity(found)


def _identity(names: list[str]) -> tuple[str, str]:
    found = [text for text in names if text.startswith(URI)]
    if not found:
        raise IdentityError("the certificate carries no FedPruner identity")
    if len(found) > 1:
        raise IdentityError(f"the certificate carries {len(found)} identities; it must be one")
    role, _, name = found[0].removeprefix(URI).partition("/")
    if role not in ROLES or NAME.fullmatch(name) is None:
        raise IdentityError(f"the certificate carries {found[0][:120]!r}, which is no identity ({URI}<role>/<name>)")
    return role, name


def renewable_from(certificate: x509.Certificate) -> datetime:
    """When a certificate's last third begins: from then on it is renewed."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begin + (end - begin) * 2 / 3


class ServerCertificate:
    """``server.pem`` and ``server.key`` of a directory. A pair that is renewed there is shown from the next handshake on;
    connections that stand are not touched."""

    def __init__(self, directory: Path) -> None:
        """Raises IdentityError naming the file that is missing, damaged, or not of this CA or key."""
        self._directory = directory
        self._stamp = self._look()
        self._pair = self._read()

    def _paths(self) -> tuple[Path, Path]:
        return self._directory / "server.key", self._directory / "server.pem"

    def _look(self) -> tuple[tuple[int, int], ...]:
        with contextlib.suppress(OSError):
            stats = [path.stat() for path in self._paths()]
            return tuple((stat.st_ino, stat.st_mtime_ns) for stat in stats)
        return ()

    def _read(self) -> tuple[bytes, bytes]:
        key_path, path = self._paths()
        try:
            authority = x509.load_pem_x509_certificate((self._directory / "ca.pem").read_bytes())
            pem = path.read_bytes()
            certificate = x509.load_pem_x509_certificate(pem)
            certificate.verify_directly_issued_by(authority)
        except OSError as error:
            raise IdentityError(f"{error.filename}: {error.strerror}; was `fp-server init` interrupted?") from None
        except Exception as error:  # several kinds: not PEM, another issuer, a bad signature
            raise IdentityError(f"{path}: no certificate of this server's CA ({type(error).__name__})") from None
        if load_key(key_path).public_key() != certificate.public_key():
            raise IdentityError(f"{path}: is not of {key_path.name}; make it anew with `fp-server certificate`")
        return key_path.read_bytes(), pem

    def credentials(self, clients: bool) -> grpc.ServerCredentials:
        """mTLS when `clients` (they must show a certificate of the CA), else server-authenticated TLS."""
        roots = (self._directory / "ca.pem").read_bytes() if clients else None
        shown = self._pair

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Called before every handshake, from a thread of gRPC's; None: what is shown already."""
            nonlocal shown
            self._refresh()
            if shown == self._pair:
                return None
            shown = self._pair
            return grpc.ssl_server_certificate_configuration([shown], root_certificates=roots)

        first = grpc.ssl_server_certificate_configuration([shown], root_certificates=roots)
        return grpc.dynamic_ssl_server_credentials(first, fetch, require_client_authentication=clients)  # type: ignore[arg-type]

    def _refresh(self) -> None:
        if (stamp := self._look()) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._pair = self._read()
            log.info("%s: renewed; shown from now on", self._directory / "server.pem")
        except IdentityError as error:  # perhaps only half of it is there yet
            log.warning("%s; the one before is shown further", error)


def client_credentials(directory: Path, stem: str = "device") -> grpc.ChannelCredentials:
    """mTLS credentials from ``ca.pem``, ``<stem>.pem`` and ``<stem>.key`` of a directory; checks expiry.

    Raises IdentityError naming the file that is missing, damaged or expired.
    """
    parts: dict[str, bytes] = {}
    for name in ("ca.pem", f"{stem}.pem", f"{stem}.key"):
        try:
            parts[name] = (directory / name).read_bytes()
        except OSError as error:
            hint = "run `fp-client join` (device), `fp-server join` (operator) or `fp-server init` (server) first"
            raise IdentityError(f"{directory / name}: {error.strerror}; {hint}") from None
    check_validity(directory / f"{stem}.pem")
    load_key(directory / f"{stem}.key")
    return grpc.ssl_channel_credentials(parts["ca.pem"], parts[f"{stem}.key"], parts[f"{stem}.pem"])


def check_validity(path: Path) -> x509.Certificate:
    """The certificate of a PEM file. Raises IdentityError when it is damaged, not yet valid or expired."""
    try:
        certificate = parse_certificate(path.read_bytes(), str(path))
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}; join again with a new token") from None
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
