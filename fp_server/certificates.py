"""How the server's own certificate authority makes certificates: what is in them is decided here alone."""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError, IdentityError
from common.files import sync_directory
from common.transport.tls import URI, key_pem, load_key, new_key, write_private

_CA_DAYS = 3650
_CSR = 16 << 10
"""Characters of a certificate request that are looked at."""
_ALWAYS = ("localhost", "127.0.0.1")
"""Names the server's certificate always has: the command line beside the server speaks to it there."""


def _name(common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, common), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "FedPruner")]
    )


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _alternative_names(names: list[str]) -> x509.SubjectAlternativeName:
    entries: list[x509.GeneralName] = []
    for name in dict.fromkeys([*names, *_ALWAYS]):
        try:
            entries.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            try:
                entries.append(x509.DNSName(name))
            except ValueError as error:
                raise ConfigError(f"names: {name!r}: not a host name or an address: {error}") from None
    return x509.SubjectAlternativeName(entries)


def create_authority(directory: Path, names: list[str], days: float = 90) -> None:
    """Make ``ca.pem``/``ca.key`` and ``server.pem``/``server.key`` (0600) for these host names and addresses."""
    alternative = _alternative_names(names)
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
    _write_public(directory / "ca.pem", pem(ca))
    server_key = new_key()
    certificate = _sign(ca, ca_key, server_key.public_key(), names[0], alternative, ExtendedKeyUsageOID.SERVER_AUTH, days)
    write_private(directory / "server.key", key_pem(server_key))
    write_private(directory / "server.pem", pem(certificate))


def _write_public(path: Path, data: bytes) -> None:
    """Write a file durably, with the mode a new file has here."""
    with path.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    sync_directory(path.parent)


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
        .subject_name(_name(common[:64]))  # a common name may not be longer; the alternative names are what counts
        .issuer_name(ca.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
                key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(alternative, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )  # fmt: skip


def requested_key(csr_pem: str) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate request, and nothing else of it. Raises IdentityError unless it signed the request.

    Of other kinds of keys no signature is looked at: with a large RSA key that takes long, and anybody may ask.
    """
    try:
        csr = x509.load_pem_x509_csr(csr_pem[:_CSR].encode())
        key = csr.public_key()
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1" and csr.is_signature_valid:
            return key
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise IdentityError("the certificate request is not a PEM CSR") from None
    raise IdentityError("the certificate request must be signed by its own P-256 key")


class Issuer:
    """The CA of a data directory."""

    def __init__(self, directory: Path) -> None:
        """Raises IdentityError when the directory has no usable CA."""
        self.directory = directory
        try:
            self.pem = (directory / "ca.pem").read_text()
            self._certificate = x509.load_pem_x509_certificate(self.pem.encode())
        except (OSError, ValueError) as error:
            raise IdentityError(f"{directory / 'ca.pem'}: no usable CA ({error}); run `fp-server init` first") from None
        self.begins = self._certificate.not_valid_before_utc
        self._key = load_key(directory / "ca.key")

    def client(self, public_key: ec.EllipticCurvePublicKey, name: str, role: str, days: float) -> x509.Certificate:
        """A device's or an operator's certificate: identity, role and usage are ours to say."""
        alternative = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"{URI}{role}/{name}")])
        return _sign(self._certificate, self._key, public_key, name, alternative, ExtendedKeyUsageOID.CLIENT_AUTH, days)

    def server(self, names: list[str], days: float) -> x509.Certificate:
        """Write ``server.pem`` anew for these names, for the key that is there. Raises ConfigError for what is no name."""
        alternative = _alternative_names(names)
        key = load_key(self.directory / "server.key").public_key()
        usage = ExtendedKeyUsageOID.SERVER_AUTH
        certificate = _sign(self._certificate, self._key, key, names[0], alternative, usage, days)
        write_private(self.directory / "server.pem", pem(certificate))
        return certificate

    def names_differ(self, certificate: x509.Certificate, names: list[str]) -> bool:
        """Whether the server's certificate is for other names than these."""
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value != _alternative_names(names)
