"""Keys, identities and what is said of a certificate file that will not do."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common.errors import IdentityError, TokenError
from common.token import JoinToken, secret_hash
from common.transport import tls

sys.path.insert(0, str(Path(__file__).parent.parent / "contract"))
from fake_ca import FakeCa


@pytest.fixture
def joined(tmp_path):
    ca = FakeCa.make()
    ca.join(tmp_path)
    return tmp_path, ca


def test_private_files_are_private_and_replaced_whole(tmp_path):
    tls.write_private(tmp_path / "k", b"one")
    tls.write_private(tmp_path / "k", b"two")
    assert (tmp_path / "k").read_bytes() == b"two" and (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_keys_come_back(tmp_path):
    key = tls.new_key()
    tls.write_private(tmp_path / "k", tls.key_pem(key))
    assert tls.load_key(tmp_path / "k").private_numbers() == key.private_numbers()
    with pytest.raises(IdentityError, match="none: no key"):
        tls.load_key(tmp_path / "none")
    (tmp_path / "k").write_text("x")
    with pytest.raises(IdentityError, match="not a PEM private key"):
        tls.load_key(tmp_path / "k")
    other = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "k").write_bytes(other)
    with pytest.raises(IdentityError, match="not an elliptic-curve key"):
        tls.load_key(tmp_path / "k")


def test_a_csr_is_signed_by_its_key():
    key = tls.new_key()
    csr = x509.load_pem_x509_csr(tls.make_csr(key, "alice").encode())
    assert csr.is_signature_valid and csr.public_key() == key.public_key()


def auth(joined, *sans):
    directory, _ = joined
    return {"x509_subject_alternative_name": list(sans), "x509_pem_cert": [(directory / "device.pem").read_bytes()]}


def test_the_identity_is_the_certificates(joined):
    certificate = x509.load_pem_x509_certificate((joined[0] / "device.pem").read_bytes())
    expected = tls.Peer("device", "alice", f"{certificate.serial_number:x}", certificate.not_valid_after_utc)
    assert tls.peer_of(auth(joined, b"localhost", b"fedpruner://device/alice")) == expected
    for sans in ((), (b"localhost",), (b"spiffe://device/alice",)):
        with pytest.raises(IdentityError, match="no FedPruner identity"):
            tls.peer_of(auth(joined, *sans))


@pytest.mark.parametrize("name", ["ca.pem", "device.pem", "device.key"])
def test_a_missing_or_damaged_file_is_named(joined, name):
    directory, _ = joined
    assert tls.client_credentials(directory) is not None
    if name != "ca.pem":
        (directory / name).write_text("x")
        with pytest.raises(IdentityError, match=f"{name}: not a PEM"):
            tls.client_credentials(directory)
    (directory / name).unlink()
    with pytest.raises(IdentityError, match=f"{name}.*join"):
        tls.client_credentials(directory)


@pytest.mark.parametrize(("begin", "end", "said"), [(-5, -4, "expired on"), (4, 5, "not valid before")])
def test_a_certificate_out_of_its_time(tmp_path, begin, end, said):
    FakeCa.make().join(tmp_path, valid=(timedelta(days=begin), timedelta(days=end)))
    with pytest.raises(IdentityError, match=said):
        tls.client_credentials(tmp_path)


def test_the_ca_digest_is_of_the_certificate_and_not_of_its_spelling(joined):
    _, ca = joined
    assert tls.ca_digest(ca.pem.decode()) == tls.ca_digest("\n" + ca.pem.decode() + "\n")
    with pytest.raises(IdentityError):
        tls.ca_digest("x")


def test_tokens_come_back_and_nothing_else_is_one():
    token = JoinToken("fp.example:7444", "[::1]:7443", "ab" * 32, "s" * 43)
    assert JoinToken.decode(f"  {token.encode()}\n") == token
    bad = [
        "", "fp1.", "fp1.!!!", token.encode()[:-9], token.encode()[4:], "fp2." + token.encode()[4:], "fp1." + "A" * 5000,
        JoinToken("no port", "h:1", "ab" * 32, "s").encode(), JoinToken("h:1", "h:1", "zz", "s").encode(),
    ]  # fmt: skip
    for text in bad:
        with pytest.raises(TokenError, match="not a join token"):
            JoinToken.decode(text)
    assert secret_hash("x") == secret_hash("x") != secret_hash("y")
