"""A throw-away CA with `cryptography`, as a server would make it."""

from __future__ import annotations

import base64
import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.transport import tls


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass
class FakeCa:
    """Issues server and device certificates."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @staticmethod
    def make() -> FakeCa:
        key, now = tls.new_key(), datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name("throw-away CA"))
            .issuer_name(_name("throw-away CA"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.KeyUsage(True, False, False, False, False, True, True, False, False),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return FakeCa(key, certificate)

    @property
    def pem(self) -> bytes:
        return _pem(self.certificate)

    @property
    def digest(self) -> str:
        return tls.ca_digest(self.pem.decode())

    def issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        names: list[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        valid: tuple[timedelta, timedelta] = (timedelta(minutes=-5), timedelta(days=1)),
    ) -> bytes:
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name("leaf"))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + valid[0])
            .not_valid_after(now + valid[1])
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return _pem(certificate)

    def server(self, host: str = "localhost") -> tuple[bytes, bytes]:
        """(certificate, key), PEM."""
        key = tls.new_key()
        names: list[x509.GeneralName] = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return self.issue(key.public_key(), names, ExtendedKeyUsageOID.SERVER_AUTH), tls.key_pem(key)

    def device(self, name: str, public_key: ec.EllipticCurvePublicKey, role: str = "device", **extra: object) -> bytes:
        uri: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"{tls.URI}{role}/{name}")]
        return self.issue(public_key, uri, ExtendedKeyUsageOID.CLIENT_AUTH, **extra)  # type: ignore[arg-type]

    def join(self, directory: Path, name: str = "alice", **extra: object) -> None:
        """What `fp-client join` leaves in a device directory, without the network."""
        directory.mkdir(parents=True, exist_ok=True)
        key = tls.new_key()
        tls.write_private(directory / "device.key", tls.key_pem(key))
        (directory / "device.pem").write_bytes(self.device(name, key.public_key(), **extra))
        (directory / "ca.pem").write_bytes(self.pem)

    def altered(self, pem: bytes, old: bytes, new: bytes) -> bytes:
        """A certificate with some of its bytes replaced by as many others, signed again: what no library would make."""
        certificate = x509.load_pem_x509_certificate(pem)
        content = certificate.tbs_certificate_bytes
        assert content.count(old) == 1 and len(old) == len(new)
        content = content.replace(old, new)
        algorithm = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256
        signature = b"\0" + self.key.sign(content, ec.ECDSA(hashes.SHA256()))
        body = content + algorithm + b"\x03" + bytes((len(signature),)) + signature
        whole = base64.encodebytes(b"\x30\x82" + len(body).to_bytes(2, "big") + body)
        return b"-----BEGIN CERTIFICATE-----\n" + whole + b"-----END CERTIFICATE-----\n"


VERSION = (bytes.fromhex("a003020102"), bytes.fromhex("a003020106"))
"""For `altered`: version 7 instead of 3."""
KEY_KIND = (bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06072a8648ce3d0209"))
"""A public key of an algorithm nobody knows."""
NAMES = (bytes.fromhex("0603551d11"), bytes.fromhex("0603551d13"))
"""The alternative names said to be basic constraints, of which there are some already."""
