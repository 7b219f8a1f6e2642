"""The server's and the operator's own certificates: made, kept valid, and shown without a restart."""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.errors import ConfigError, IdentityError
from common.transport import tls
from fp_server import audit
from fp_server.certificates import create_authority
from fp_server.log import Database
from fp_server.own import OwnCertificates

NAMES = ["fp.example", "10.0.0.5"]


@pytest.fixture
def database(tmp_path):
    create_authority(tmp_path, NAMES, 90)
    one = Database(tmp_path / "log.sqlite")
    yield one
    one.close()


@pytest.fixture
def own(tmp_path, database):
    made = OwnCertificates(tmp_path, database)
    made.operator("operator", 90)
    return made


def names(path) -> list[str]:
    found = tls.check_validity(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(entry.value) for entry in found]


def later(monkeypatch, days, module="own"):
    """Own certificates look at this time; module "certificates": they are made at it."""

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=days)

    monkeypatch.setattr(f"fp_server.{module}.datetime", Later)


def test_what_is_private_is_private(own, tmp_path):
    for name in ("ca.key", "server.key", "operator.key"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        assert tls.exposed(tmp_path / name) == ""
    (tmp_path / "ca.key").chmod(0o640)
    said = tls.exposed(tmp_path / "ca.key")
    assert "ca.key: others on this machine can read this key (mode 640); chmod 600" in said


def test_the_operators_certificate_is_usable_and_the_servers_is_for_its_names(own, tmp_path):
    assert tls.identity_of(tls.check_validity(tmp_path / "operator.pem")) == ("operator", "operator")
    assert tls.client_credentials(tmp_path, "operator") is not None
    assert names(tmp_path / "server.pem") == [*NAMES, "localhost", "127.0.0.1"]
    usages = tls.check_validity(tmp_path / "server.pem").extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_in_their_last_third_both_are_made_anew_with_the_same_keys(own, database, tmp_path, monkeypatch):
    paths = [tmp_path / "server.pem", tmp_path / "operator.pem"]
    before = [tls.check_validity(path) for path in paths]
    later(monkeypatch, 59)
    assert own.keep_valid(NAMES, 90) == []
    later(monkeypatch, 61)
    assert own.keep_valid(NAMES, 120) == ["server.pem", "operator.pem"]
    for path, old in zip(paths, before, strict=True):
        new = tls.check_validity(path)
        assert new.serial_number != old.serial_number and new.public_key() == old.public_key()
        assert new.not_valid_after_utc > old.not_valid_after_utc
        assert new.extensions.get_extension_for_class(x509.SubjectAlternativeName).value == (
            old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        )
    said = [(row.entry.actor.name, row.entry.action, row.entry.object[:10]) for row in audit.read(database)]
    assert said[1:] == [("server", "issue", "server.pem"), ("server", "issue", "operator o")]


def test_what_was_made_while_the_clock_was_ahead_is_made_anew(own, tmp_path, monkeypatch):
    paths = [tmp_path / "server.pem", tmp_path / "operator.pem"]
    with monkeypatch.context() as ahead:
        later(ahead, 40, "certificates")
        own.server(NAMES, 90)
        own.operator("operator", 90, same_key=True)
    for path in paths:
        with pytest.raises(IdentityError, match="not valid before"):
            tls.check_validity(path)
    assert own.keep_valid(NAMES, 90) == ["server.pem", "operator.pem"]
    for path in paths:
        assert tls.check_validity(path)
    assert own.keep_valid(NAMES, 90) == []


def test_a_clock_that_is_a_little_behind_or_before_the_ca_makes_nothing_anew(own, monkeypatch):
    """What is made with a clock in 1970 has ended for everybody else."""
    for days in (-4 / 24 / 60, -10, -10000):
        later(monkeypatch, days)
        assert own.keep_valid(NAMES, 90) == []


def test_all_of_a_new_authority_is_on_the_disk_when_it_is_made(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def spy(fd):
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()).removesuffix(".tmp"))
        fsync(fd)

    monkeypatch.setattr("os.fsync", spy)
    before = os.umask(0o027)
    try:
        create_authority(tmp_path, NAMES)
    finally:
        os.umask(before)
    for name in ("ca.key", "ca.pem", "server.key", "server.pem"):
        at = synced.index(f"{tmp_path}/{name}")
        assert synced[at + 1] == str(tmp_path), name
    assert (tmp_path / "ca.pem").stat().st_mode & 0o777 == 0o640


def test_other_names_make_another_certificate_at_once(own, tmp_path):
    assert own.keep_valid(["other.example"], 90) == ["server.pem"]
    assert names(tmp_path / "server.pem") == ["other.example", "localhost", "127.0.0.1"]
    with pytest.raises(ConfigError, match=r"names: 'bücher\.example': not a host name or an address"):
        own.server(["bücher.example"], 90)
    assert names(tmp_path / "server.pem") == ["other.example", "localhost", "127.0.0.1"]


def test_a_name_longer_than_a_common_name_may_be(own, tmp_path):
    long = f"{'a' * 60}.example.org"
    own.server([long], 90)
    assert names(tmp_path / "server.pem")[0] == long


def test_a_revoked_operators_certificate_is_not_renewed(own, database, tmp_path, monkeypatch):
    later(monkeypatch, 70)
    serial = f"{tls.check_validity(tmp_path / 'operator.pem').serial_number:x}"
    database.run(lambda c: c.execute("UPDATE certificates SET revoked = 1 WHERE serial = ?", (serial,)).rowcount)
    assert own.keep_valid(NAMES, 90) == ["server.pem"]


def test_the_server_does_not_depend_on_the_operators_files(own, tmp_path, caplog):
    (tmp_path / "operator.pem").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert own.keep_valid(NAMES, 90) == []
    assert "operator.pem: no usable certificate" in caplog.text
    assert f"`fp-server operator --dir {tmp_path}` makes another" in caplog.text
    (tmp_path / "operator.pem").unlink()
    assert own.keep_valid(NAMES, 90) == []
    (tmp_path / "server.pem").unlink()
    with pytest.raises(IdentityError, match=r"server\.pem: no usable certificate"):
        own.keep_valid(NAMES, 90)


def test_a_pair_is_shown_when_it_is_whole(own, tmp_path, caplog):
    shown = tls.ServerCertificate(tmp_path)
    first = shown._pair
    shown._refresh()
    assert shown._pair == first
    other = tmp_path / "other"
    other.mkdir()
    create_authority(other, NAMES)
    with caplog.at_level(logging.WARNING):
        for name, said in (("server.pem", "no certificate of this server's CA"), ("server.key", "is not of server.key")):
            kept = (tmp_path / name).read_bytes()
            tls.write_private(tmp_path / name, (other / name).read_bytes())
            shown._refresh()
            assert shown._pair == first and said in caplog.text
            with pytest.raises(IdentityError, match=said):
                tls.ServerCertificate(tmp_path)
            tls.write_private(tmp_path / name, kept)
    own.server(NAMES, 90)
    shown._refresh()
    assert shown._pair[1] == (tmp_path / "server.pem").read_bytes() != first[1]


def test_when_a_certificate_is_renewed(own, tmp_path):
    certificate = tls.check_validity(tmp_path / "server.pem")
    assert abs(tls.renewable_from(certificate) - datetime.now(UTC) - timedelta(days=60)) < timedelta(minutes=10)
