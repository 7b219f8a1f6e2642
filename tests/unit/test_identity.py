"""Tokens, certificates, roles and revocation: the server's word alone counts."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError, IdentityError, TokenError
from common.token import JoinToken
from common.transport import tls
from common.transport.tls import Peer
from fp_server.identity import Authority, create_authority
from fp_server.log import Database


@pytest.fixture
def database(tmp_path):
    create_authority(tmp_path, ["localhost", "10.0.0.5"])
    one = Database(tmp_path / "log.sqlite")
    yield one
    one.close()


@pytest.fixture
def authority(tmp_path, database):
    return Authority(tmp_path, database)


def token(authority, name="alice", role="device", ttl=60.0) -> JoinToken:
    return asyncio.run(authority.create_token(name, role, ttl, "h:1", "h:2"))


def enroll(authority, secret, key=None, name="mallory") -> x509.Certificate:
    pem, *_ = asyncio.run(authority.enroll(secret, tls.make_csr(key or tls.new_key(), name), 30))
    return x509.load_pem_x509_certificate(pem.encode())


def uris(certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def test_the_token_decides_name_and_role_whatever_the_csr_asks_for(authority):
    certificate = enroll(authority, token(authority, "alice").secret, name="operator")
    assert uris(certificate) == ["fedpruner://device/alice"]
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "alice"
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_what_a_csr_asks_for_beyond_its_key_is_ignored(authority):
    key = tls.new_key()
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier("fedpruner://operator/root")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), True)
        .sign(key, SHA256())
    )
    secret = token(authority).secret
    pem, name, role = asyncio.run(authority.enroll(secret, csr.public_bytes(Encoding.PEM).decode(), 30))
    certificate = x509.load_pem_x509_certificate(pem.encode())
    assert (name, role, uris(certificate)) == ("alice", "device", ["fedpruner://device/alice"])
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_a_token_works_once_but_the_same_key_may_ask_again(authority):
    secret, key = token(authority).secret, tls.new_key()
    first = enroll(authority, secret, key)
    assert enroll(authority, secret, key).serial_number == first.serial_number
    with pytest.raises(TokenError, match="'alice' was used before"):
        enroll(authority, secret)


def test_two_keys_at_once_one_certificate(authority):
    secret = token(authority).secret

    async def both():
        calls = [authority.enroll(secret, tls.make_csr(tls.new_key(), "x"), 30) for _ in range(5)]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(both())
    assert sum(isinstance(r, tuple) for r in results) == 1 and sum(isinstance(r, TokenError) for r in results) == 4


def test_wrong_and_expired_tokens(authority, monkeypatch):
    with pytest.raises(TokenError, match="unknown here"):
        enroll(authority, "x" * 43)
    secret, now = token(authority, ttl=60).secret, time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    with pytest.raises(TokenError, match="'alice' has expired"):
        enroll(authority, secret)


def test_secrets_are_stored_hashed(authority, database, tmp_path):
    one = token(authority)
    assert all(one.secret.encode() not in path.read_bytes() for path in tmp_path.glob("log.sqlite*"))
    assert one.ca == tls.ca_digest((tmp_path / "ca.pem").read_text()) and JoinToken.decode(one.encode()) == one


@pytest.mark.parametrize("bad", ["Alice", "", "a/b", "../x", "x" * 64, "a b"])
def test_bad_names_and_roles(authority, bad):
    with pytest.raises(ConfigError, match="not a name"):
        token(authority, bad)
    with pytest.raises(ConfigError, match="not a role"):
        token(authority, "x", role="king")


def test_bad_requests_do_not_use_the_token_up(authority):
    secret = token(authority).secret
    big = rsa.generate_private_key(65537, 2048)
    for key in (big, ec.generate_private_key(ec.SECP384R1())):
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, SHA256())
        with pytest.raises(IdentityError, match="P-256"):
            asyncio.run(authority.enroll(secret, csr.public_bytes(Encoding.PEM).decode(), 30))
    for text in ("", "x", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----"):
        with pytest.raises(IdentityError, match="not a PEM CSR"):
            asyncio.run(authority.enroll(secret, text, 30))
    assert enroll(authority, secret)


def test_roles_and_revocation(authority, database, tmp_path):
    certificate = enroll(authority, token(authority).secret)
    spare = token(authority).secret
    peer = Peer("device", "alice", f"{certificate.serial_number:x}")
    authority.check(peer, "device")
    with pytest.raises(IdentityError, match="'alice' is a device; this needs the role operator"):
        authority.check(peer, "operator")
    assert asyncio.run(authority.revoke("alice")) == 1 and asyncio.run(authority.revoke("alice")) == 0
    for one in (authority, Authority(tmp_path, database)):  # also after a restart
        with pytest.raises(IdentityError, match="'alice' has been revoked"):
            one.check(peer, "device")
    with pytest.raises(TokenError, match="unknown"):
        enroll(authority, spare)  # an unused token of a revoked name is void too
    again = enroll(authority, token(authority).secret)
    authority.check(Peer("device", "alice", f"{again.serial_number:x}"), "device")


def test_the_operators_certificate_is_private_and_usable(authority, tmp_path):
    authority.create_operator("operator", 30)
    assert (tmp_path / "operator.key").stat().st_mode & 0o777 == 0o600
    assert uris(tls.check_validity(tmp_path / "operator.pem")) == ["fedpruner://operator/operator"]
    assert tls.client_credentials(tmp_path, "operator") is not None


def test_a_directory_without_a_ca(tmp_path, database):
    (tmp_path / "ca.pem").write_text("x")
    with pytest.raises(IdentityError, match=re.escape("ca.pem: no usable CA")):
        Authority(tmp_path, database)


def test_names_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="not host names"):
        create_authority(tmp_path, ["bücher.example"])


def test_certificates_about_to_expire_are_renewed_at_the_start_with_the_same_keys(authority, tmp_path):
    authority.create_operator("operator", 90)
    assert authority.renew(["localhost"], 90) == []
    before = tls.check_validity(tmp_path / "server.pem")
    authority.create_operator("operator", 29)
    assert authority.renew(["localhost", "10.0.0.5"], 90, margin=30) == ["operator.pem"]
    assert authority.renew(["localhost", "10.0.0.5"], 900, margin=830) == ["server.pem", "operator.pem"]
    after = tls.check_validity(tmp_path / "server.pem")
    assert after.serial_number != before.serial_number and after.public_key() == before.public_key()
    kind = x509.SubjectAlternativeName
    assert after.extensions.get_extension_for_class(kind).value == before.extensions.get_extension_for_class(kind).value
    (tmp_path / "operator.pem").unlink()
    with pytest.raises(IdentityError, match=r"operator\.pem: no usable certificate"):
        authority.renew(["localhost"], 90)


def test_a_certificate_that_has_ended_is_refused_in_a_session_too(authority):
    now = datetime.now(UTC)
    authority.check(Peer("device", "alice", "1", now + timedelta(minutes=1)), "device")
    with pytest.raises(IdentityError, match="'alice' has expired"):
        authority.check(Peer("device", "alice", "1", now - timedelta(seconds=1)), "device")
