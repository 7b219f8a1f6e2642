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

from common.errors import ConfigError, IdentityError, NotFound, TokenError
from common.token import JoinToken
from common.transport import tls
from common.transport.tls import Peer
from fp_server import audit
from fp_server.certificates import create_authority, requested_key
from fp_server.identity import MOST, Authority
from fp_server.log import Database
from fp_server.own import OwnCertificates


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
    assert asyncio.run(authority.revoke("alice")) == (1, 1) and asyncio.run(authority.revoke("alice")) == (0, 0)
    for one in (authority, Authority(tmp_path, database)):  # also after a restart
        with pytest.raises(IdentityError, match="'alice' has been revoked"):
            one.check(peer, "device")
    with pytest.raises(TokenError, match="unknown"):
        enroll(authority, spare)  # an unused token of a revoked name is void too
    again = enroll(authority, token(authority).secret)
    authority.check(Peer("device", "alice", f"{again.serial_number:x}"), "device")


def test_a_directory_without_a_ca(tmp_path, database):
    (tmp_path / "ca.pem").write_text("x")
    with pytest.raises(IdentityError, match=re.escape("ca.pem: no usable CA")):
        Authority(tmp_path, database)


def test_a_certificate_that_has_ended_is_refused_in_a_session_too(authority):
    now = datetime.now(UTC)
    authority.check(Peer("device", "alice", "1", now + timedelta(minutes=1)), "device")
    with pytest.raises(IdentityError, match="'alice' has expired"):
        authority.check(Peer("device", "alice", "1", now - timedelta(seconds=1)), "device")


def peer_of(certificate, name="alice", role="device") -> Peer:
    return Peer(role, name, f"{certificate.serial_number:x}", certificate.not_valid_after_utc)


def renew(authority, peer, key=None, days=60.0) -> x509.Certificate:
    issued = asyncio.run(authority.renew(peer, tls.make_csr(key or tls.new_key(), "root"), days))
    assert (issued.name, issued.role) == (peer.name, peer.role)
    return x509.load_pem_x509_certificate(issued.pem.encode())


def test_a_renewal_has_the_name_and_role_of_the_certificate_whatever_the_csr_asks_for(authority):
    key = tls.new_key()
    old = enroll(authority, token(authority).secret, key)
    for asked in (key, tls.new_key()):
        new = renew(authority, peer_of(old), asked)
        assert uris(new) == ["fedpruner://device/alice"] and new.public_key() == asked.public_key()
        assert new.serial_number != old.serial_number and new.not_valid_after_utc > old.not_valid_after_utc
        assert list(new.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        assert new.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
        authority.check(peer_of(new), "device")
    authority.check(peer_of(old), "device")  # until it ends
    assert asyncio.run(authority.revoke("alice")) == (3, 0)
    for one in (old, new):
        with pytest.raises(IdentityError, match="'alice' has been revoked"):
            authority.check(peer_of(one), "device")


def test_a_renewal_whose_reply_was_lost_is_given_again(authority):
    key = tls.new_key()
    old = enroll(authority, token(authority).secret, key)
    first = renew(authority, peer_of(old), key)
    assert renew(authority, peer_of(old), key).serial_number == first.serial_number
    assert renew(authority, peer_of(old)).serial_number != first.serial_number
    assert renew(authority, peer_of(first), key).serial_number != first.serial_number, "who shows the new one wants another"


def test_a_renewal_made_while_the_clock_was_ahead_is_not_given_again(authority, monkeypatch):
    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=2)

    key = tls.new_key()
    peer = peer_of(enroll(authority, token(authority).secret, key))
    with monkeypatch.context() as ahead:
        ahead.setattr("fp_server.certificates.datetime", Later)
        lost = renew(authority, peer, key)
    assert lost.not_valid_before_utc > datetime.now(UTC)
    new = renew(authority, peer, key)
    assert new.serial_number != lost.serial_number and new.not_valid_before_utc < datetime.now(UTC)
    assert renew(authority, peer, key) == new


@pytest.mark.parametrize(
    "key", [rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP384R1())], ids=["rsa", "p-384"]
)
def test_the_signature_of_a_key_of_another_kind_is_not_even_looked_at(monkeypatch, key):
    class Request:
        def public_key(self):
            return key.public_key()

        @property
        def is_signature_valid(self):
            raise AssertionError("this takes long with a large key")

    monkeypatch.setattr(x509, "load_pem_x509_csr", lambda _: Request())
    with pytest.raises(IdentityError, match="must be signed by its own P-256 key"):
        requested_key("")


def test_what_can_not_be_renewed(authority, database):
    old = enroll(authority, token(authority).secret)
    stranger = enroll(authority, token(authority, "bob").secret)
    with pytest.raises(IdentityError, match="'alice' is not in this server's books; join again"):
        renew(authority, Peer("device", "alice", "abc", old.not_valid_after_utc))
    with pytest.raises(IdentityError, match="not a PEM CSR"):
        asyncio.run(authority.renew(peer_of(old), "x", 30))
    for _ in range(MOST - 1):
        renew(authority, peer_of(old))
    with pytest.raises(IdentityError, match=f"'alice' has {MOST} valid certificates already; wait until one ends"):
        renew(authority, peer_of(old))
    renew(authority, peer_of(stranger, "bob"))
    asyncio.run(authority.revoke("alice"))
    with pytest.raises(IdentityError, match="'alice' has been revoked"):  # also when it got past the check before that
        renew(authority, peer_of(old))
    assert sum(row.entry.action == "renew" for row in audit.read(database)) == MOST


def test_revoking_a_name_nobody_has_is_an_error_unless_forced(authority, database):
    with pytest.raises(NotFound, match="ever issued for 'mallory'; nothing was revoked"):
        asyncio.run(authority.revoke("mallory"))
    assert list(audit.read(database)) == []
    secret = token(authority, "bob").secret
    assert asyncio.run(authority.revoke("bob")) == (0, 1)  # a token alone is somebody
    with pytest.raises(TokenError, match="unknown"):
        enroll(authority, secret)
    assert asyncio.run(authority.revoke("mallory", force=True)) == (0, 0)


def test_of_a_name_that_was_revoked_only_certificates_in_the_books_count(authority, database, tmp_path):
    """Those a server that was restored from an older backup does not know end with the others of their name."""
    now = datetime.now(UTC) + timedelta(days=1)
    lost = Peer("device", "alice", "123abc", now)
    authority.check(lost, "device")
    asyncio.run(authority.revoke("alice", force=True))
    again = enroll(authority, token(authority).secret)
    for one in (authority, Authority(tmp_path, database)):
        with pytest.raises(IdentityError, match="'alice' has been revoked"):
            one.check(lost, "device")
        one.check(peer_of(again), "device")


def test_an_operators_certificate_made_beside_a_running_server_counts_there(authority, database, tmp_path):
    own = OwnCertificates(tmp_path, database)
    own.operator("operator", 30)
    old = tls.check_validity(tmp_path / "operator.pem")
    asyncio.run(authority.revoke("operator"))
    with pytest.raises(IdentityError, match="revoked"):
        authority.check(peer_of(old, "operator", "operator"), "operator")
    own.operator("operator", 30)
    authority.check(peer_of(tls.check_validity(tmp_path / "operator.pem"), "operator", "operator"), "operator")


@pytest.mark.parametrize(
    ("role", "said"),
    [
        ("device", "device 'alice' has a certificate that is valid until .*: whoever uses this token is 'alice' too"),
        ("operator", "device 'alice' has a certificate that is valid until .*: revoking 'alice' will revoke both"),
    ],
)
def test_a_token_for_a_name_in_use_is_worth_a_warning(authority, role, said):
    assert asyncio.run(authority.in_use("alice", role)) == ""
    secret = token(authority).secret
    assert asyncio.run(authority.in_use("alice", role)) == "there is an unused token for 'alice' already; both can be used"
    enroll(authority, secret)
    assert re.match(said, asyncio.run(authority.in_use("alice", role)))
    asyncio.run(authority.revoke("alice"))
    assert asyncio.run(authority.in_use("alice", role)) == ""


def test_a_token_of_another_role_is_refused_and_not_used_up(authority):
    for granted, wanted, command in (("operator", "device", "fp-server join"), ("device", "operator", "fp-client join")):
        secret, csr = token(authority, f"a-{granted}", granted).secret, tls.make_csr(tls.new_key(), "x")
        with pytest.raises(TokenError, match=f"is for the role {granted}: use it with `{command}`"):
            asyncio.run(authority.enroll(secret, csr, 30, wanted))
        assert asyncio.run(authority.enroll(secret, csr, 30, granted)).role == granted
